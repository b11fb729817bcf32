"""Optimizers that run no backward in a Trainer: what a user may do to them.

Files under test: strategies/forward_only.py, strategies/recorder.py, optim/zeroth_order.py.
"""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint, OnExceptionCheckpoint
from torch import Tensor

from lightning_curvature import in_extra_pass
from tests.helpers.features import Validated, batched, learnable, quiet
from tests.helpers.forward_only import DOUBLE, every_kind, fit, maker, mlp
from tests.helpers.modules import StockModule
from tests.helpers.probing import assert_bitwise, make_trainer, parameters_and_buffers

pytestmark = quiet

# Windows, loops and overridden hooks


@every_kind
def test_micro_batches_are_one_batch(kind: str) -> None:
    """Every main pass is displaced along the direction of the coming step."""
    ends = []
    for size, window in ((8, 1), (4, 2), (2, 4)):
        module = mlp(maker(kind))
        data = batched(learnable(16), size)
        fit(module, data=data, accumulate_grad_batches=window, max_epochs=2, **DOUBLE)
        ends.append(parameters_and_buffers(module))
    for end in ends[1:]:
        for name, tensor in ends[0].items():
            torch.testing.assert_close(end[name], tensor, rtol=0, atol=1e-10)


class CallsItself(Validated):
    """Runs the closure before the step, as some recipes do."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        closure()
        optimizer.step()


class Manual(StockModule):
    """Steps by hand."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Step with a closure that does what all closures do."""
        optimizer = self.optimizers()

        def closure() -> Tensor:
            loss: Tensor = super(Manual, self).training_step(batch, batch_idx)
            optimizer.zero_grad()
            self.manual_backward(loss)
            return loss

        optimizer.step(closure)


@every_kind
@pytest.mark.parametrize("other", [CallsItself, Manual])
def test_other_ways_to_step(kind: str, other: type[StockModule]) -> None:
    ends = []
    for cls in (Validated, other):
        module = mlp(maker(kind), cls)
        trainer = fit(module, max_epochs=2)
        assert trainer.global_step == 10
        ends.append(parameters_and_buffers(module))
    assert_bitwise(ends[1], ends[0])


SETTINGS: dict[str, dict[str, Any]] = {
    "overfit_batches": {"overfit_batches": 2, "max_epochs": 3},
    "limit_train_batches": {"limit_train_batches": 0.5, "max_epochs": 2},
    "detect_anomaly": {"detect_anomaly": True},
    "profiler": {"profiler": "simple"},
    "no inference mode": {"inference_mode": False, "val_check_interval": 2},
    "fast_dev_run": {"fast_dev_run": 3},
    "barebones": {"barebones": True, "enable_checkpointing": None, "logger": None,
                  "enable_progress_bar": None, "enable_model_summary": None,
                  "log_every_n_steps": None, "num_sanity_val_steps": None},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_the_trainer(name: str) -> None:
    """Training goes on, and what comes after a fit works."""
    module = mlp(maker())
    trainer = fit(module, val=batched(), **SETTINGS[name])
    expected = {"overfit_batches": 6, "limit_train_batches": 4, "fast_dev_run": 3}
    assert trainer.global_step == expected.get(name, 5)
    assert all(p.isfinite().all() and p.grad is None for p in module.parameters())
    before = parameters_and_buffers(module)
    trainer.validate(module, batched(), verbose=False)
    assert_bitwise(parameters_and_buffers(module), before)
    # Nothing is left: the same module learns by gradients.
    module.make_optimizer = lambda params: torch.optim.SGD(params, lr=0.1)
    fit(module)
    assert all(p.grad is not None for p in module.parameters())


def test_several_loaders() -> None:
    """A batch of batches, also a sequential one."""

    class Both(Validated):
        def training_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return sum(self.loss(self(x), y) for x, y in batch.values())

    module = mlp(maker(), Both)
    loaders = {"a": batched(), "b": batched(learnable(16, seed=8), 4)}
    assert fit(module, data=loaders).global_step == 5


def test_fit_twice_is_one_fit() -> None:
    """The optimizer is made anew, as always in Lightning; a checkpoint takes it along."""
    module = mlp(maker("hizoo"))
    trainer = make_trainer("auto", max_epochs=1)
    trainer.fit(module, batched())
    first = parameters_and_buffers(module)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, batched())
    assert trainer.global_step == 10
    assert any(
        not torch.equal(tensor, first[name])
        for name, tensor in parameters_and_buffers(module).items()
    )


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")
def test_batches_without_a_loss() -> None:
    """No step, no direction used up; in a window the others count as they would."""

    class Picky(Validated):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx in (1, 2) else {"loss": loss}

    module = mlp(maker(), Picky)
    trainer = fit(module, max_epochs=2)
    assert trainer.optimizers[0]._steps_done == 6
    assert all(p.isfinite().all() for p in module.parameters())


def test_gradient_penalty() -> None:
    """A training step that differentiates with respect to its inputs, with gradients on."""
    penalties: list[float] = []

    class Penalty(Validated):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            with torch.enable_grad():
                x = x.clone().requires_grad_(True)
                loss = self.loss(self(x), y)
                (slope,) = torch.autograd.grad(loss, x, create_graph=True)
            penalties.append(float(slope.square().sum()))
            return loss + slope.square().sum()

    module = mlp(maker(), Penalty)
    fit(module)
    assert len(penalties) == 10
    assert min(penalties) > 0
    assert all(p.grad is None for p in module.parameters())


# Hybrid groups and other optimizers


class Hybrid(Validated):
    """Trains its last layer by gradients."""

    def configure_optimizers(self) -> Any:
        first, last = self.network[0].parameters(), self.network[2].parameters()
        return self.make_optimizer([{"params": first}, {"params": last, "first_order": True}])


def test_groups_with_gradients() -> None:
    """The gradients are those at the undisplaced weights; the others never have one."""
    expected: list[Tensor] = []

    class Watched(Hybrid):
        def on_after_backward(self) -> None:
            assert [p.grad is None for p in self.parameters()] == [True, True, False, False]
            assert all(p.requires_grad for p in self.parameters())
            expected.append(self.network[2].weight.detach() - 0.05 * self.network[2].weight.grad)

    module = mlp(maker(), Watched)
    after: list[Tensor] = []
    note = LambdaCallback(
        on_train_batch_end=lambda t, m, *_: after.append(m.network[2].weight.detach().clone())
    )
    start = parameters_and_buffers(module)
    fit(module, callbacks=[note], **DOUBLE)
    for one, other in zip(after, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    assert not torch.equal(module.network[0].weight.float(), start["network.0.weight"])


def test_a_group_with_gradients_that_thaws() -> None:
    """Frozen in the first epoch, trained by gradients in the second."""

    class Thawing(Hybrid):
        def on_train_epoch_start(self) -> None:
            self.network[2].requires_grad_(self.current_epoch > 0)

    module = mlp(maker(), Thawing)
    seen: list[Tensor] = []
    note = LambdaCallback(
        on_train_epoch_end=lambda t, m: seen.append(m.network[2].weight.detach().clone())
    )
    start = module.network[2].weight.detach().clone()
    fit(module, callbacks=[note], max_epochs=2)
    assert torch.equal(seen[0], start)
    assert not torch.equal(seen[1], start)


# Interrupts


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Listen to Ctrl+C again: Lightning ignores it for ever after the first."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


# Lightning says these of every fit with an `OnExceptionCheckpoint`.
@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable:UserWarning")
@pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available:UserWarning")
@pytest.mark.filterwarnings("ignore:.*was called without a model:UserWarning")
@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("restore", ["snapshot", "fused"])
@pytest.mark.parametrize("passes", [0, 1])
def test_interrupted_while_displaced(
    restore: str, passes: int, window: int, tmp_path: Path
) -> None:
    """What is saved on the way out are the weights before the step, not displaced ones."""

    class Interrupted(Validated):
        calls = 0

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.calls += in_extra_pass() == bool(passes)
            if self.calls == 5:
                raise KeyboardInterrupt
            return loss

    before: list[dict[str, Tensor]] = []
    note = LambdaCallback(
        on_train_batch_start=lambda t, m, *_: before.append(parameters_and_buffers(m))
    )
    saving = [OnExceptionCheckpoint(tmp_path), ModelCheckpoint(tmp_path, save_on_exception=True)]
    module = mlp(maker(restore=restore), Interrupted)
    with pytest.raises(SystemExit):
        fit(
            module,
            callbacks=[note, *saving],
            accumulate_grad_batches=window,
            enable_checkpointing=True,
        )
    paths = list(tmp_path.glob("*.ckpt"))
    assert len(paths) == 2
    for path in paths:
        saved = torch.load(path, weights_only=True)["state_dict"]
        for name, tensor in before[-1].items():
            if restore == "snapshot":
                assert torch.equal(saved[name], tensor)
            torch.testing.assert_close(saved[name], tensor, rtol=0, atol=1e-6)
    assert all(p.grad is None for p in module.parameters())
