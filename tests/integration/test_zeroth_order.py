"""Optimizers that run no backward in a Trainer: what a user may do to them.

Files under test: strategies/forward_only.py, strategies/recorder.py, optim/zeroth_order.py.
"""

import copy
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint, OnExceptionCheckpoint
from torch import Tensor, nn

from lightning_curvature import ForwardGradient, HiZOO, MeZO, in_extra_pass
from tests.helpers.faults import random_streams
from tests.helpers.features import Validated, batched, learnable
from tests.helpers.modules import CLASSES, StockModule, mlp_module, norm_dropout_module
from tests.helpers.probing import assert_bitwise, make_trainer, parameters_and_buffers

KINDS: dict[str, dict[str, Any]] = {
    "two-sided": {"cls": MeZO},
    "one-sided": {"cls": MeZO, "estimator": "one_sided"},
    "hizoo": {"cls": HiZOO, "hessian_smoothing": 1e-3},
    "forward gradient": {"cls": ForwardGradient},
}
every_kind = pytest.mark.parametrize("kind", KINDS)
DOUBLE: dict[str, Any] = {"precision": "64-true"}


def maker(kind: str = "two-sided", **options: Any) -> Callable[[Any], Any]:
    """Return what makes the optimizer; by default parameters come back to their very bits."""
    given = dict(KINDS[kind])
    cls = given.pop("cls")
    if cls is not ForwardGradient:
        given = {"restore": "snapshot", "perturbation_scale": 0.01, **given}
    return lambda params: cls(params, **{"lr": 0.05, **given, **options})


def fit(
    module: LightningModule,
    *,
    route: str = "strategy",
    data: Any = None,
    val: Any = None,
    callbacks: Sequence[Callback] = (),
    **settings: Any,
) -> Trainer:
    """Fit five batches of eight rows, or what is given."""
    trainer = make_trainer(route, callbacks=callbacks, **settings)
    trainer.fit(module, batched() if data is None else data, val)
    return trainer


def mlp(make: Callable[[Any], Any], kind: type[StockModule] = Validated) -> StockModule:
    """Build the same small module every time."""
    seed_everything(5)
    return kind(mlp_module(make).network, make)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return parameters_and_buffers(module)


# What hooks see


class Diary(Callback):
    """Notes at every hook whether there are gradients, and the parameters."""

    HOOKS = (
        "on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward",
        "on_before_optimizer_step", "on_train_batch_end", "on_validation_start",
    )  # fmt: skip

    def __init__(self) -> None:
        self.seen: dict[str, list[dict[str, Tensor]]] = {name: [] for name in self.HOOKS}

    def note(self, name: str, module: LightningModule) -> None:
        assert all(p.grad is None for p in module.parameters())
        assert not in_extra_pass()
        self.seen[name].append(weights(module))


def _noting(name: str) -> Callable[..., None]:
    def hook(self: Diary, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.note(name, pl_module)

    return hook


for _name in Diary.HOOKS:
    setattr(Diary, _name, _noting(_name))


@every_kind
@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
def test_hooks_once_no_gradient_and_clean_weights(kind: str) -> None:
    """Whoever may look at the weights for their own sake finds them where the last step left them.

    Validation comes within an accumulation window. Only around the backward of the step they may
    be displaced.
    """
    diary = Diary()
    module = mlp(maker(kind))
    start = weights(module)
    trainer = fit(
        module,
        val=batched(),
        callbacks=[diary],
        accumulate_grad_batches=2,
        val_check_interval=1,
        limit_val_batches=1,
        max_epochs=2,
    )
    assert trainer.global_step == 6
    counts = {name: len(seen) for name, seen in diary.seen.items()}
    # Gradients are zeroed where a window begins.
    assert counts == {**dict.fromkeys(Diary.HOOKS, 10), "on_before_zero_grad": 6,
                      "on_before_optimizer_step": 6}  # fmt: skip
    current, steps = start, {1, 3, 4, 6, 8, 9}
    for number in range(10):
        assert_bitwise(diary.seen["on_train_batch_start"][number], current)
        if number in steps:
            assert any(
                not torch.equal(tensor, current[name])
                for name, tensor in diary.seen["on_train_batch_end"][number].items()
            )
            current = diary.seen["on_train_batch_end"][number]
        assert_bitwise(diary.seen["on_train_batch_end"][number], current)
        assert_bitwise(diary.seen["on_validation_start"][number], current)


@every_kind
def test_logs_are_those_of_the_training_steps(kind: str) -> None:
    """Each batch is logged once, whatever the number of passes, and passes see no graph."""
    logged: list[float] = []

    class Counting(Validated):
        passes = 0

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.passes += 1
            loss = super().training_step(batch, batch_idx)
            assert not loss.requires_grad or kind == "forward gradient"
            self.log("one", 1.0, on_step=False, on_epoch=True, reduce_fx="sum")
            return {"loss": loss, "more": loss.detach()}

    note = LambdaCallback(
        on_train_batch_end=lambda trainer, *_: logged.append(trainer.callback_metrics["train_loss"])
    )
    module = mlp(maker(kind), Counting)
    trainer = fit(module, callbacks=[note])
    assert trainer.callback_metrics["one"] == 5
    assert len({float(loss) for loss in logged}) == 5
    passes = {"two-sided": 2, "one-sided": 2, "hizoo": 3, "forward gradient": module.passes / 5}
    assert module.passes == 5 * passes[kind]


# Randomness


@every_kind
def test_global_streams_go_on_as_with_sgd(kind: str) -> None:
    """Dropout, NumPy and Python are drawn from once per batch; directions come from elsewhere."""

    class Noisy(Validated):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            x = x + 0.01 * random.random() + 0.01 * np.random.rand()  # noqa: NPY002
            return self.loss(self(x), y)

    after = []
    buffers = []
    for make in (maker(kind, lr=0.0), lambda params: torch.optim.SGD(params, lr=0.0)):
        seed_everything(5)
        module = Noisy(norm_dropout_module(make).network, make)
        fit(module, data=batched(), max_epochs=2)
        after.append(random_streams())
        buffers.append(dict(module.named_buffers()))
    assert after[0]["python"] == after[1]["python"]
    assert after[0]["numpy"] == after[1]["numpy"]
    assert torch.equal(after[0]["torch"], after[1]["torch"])
    for name, buffer in buffers[1].items():  # statistics once per batch, of the main pass
        # It may be a displaced one.
        torch.testing.assert_close(buffers[0][name], buffer, rtol=0.1, atol=0.1)
        assert "num_batches" not in name or torch.equal(buffers[0][name], buffer)


class Dropped(StockModule):
    """Half of the hidden units are left out; notes the masks, and the derivative of main passes."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        super().__init__(nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, CLASSES)), make)
        self.dropout = nn.Dropout(0.5)
        self.masks: list[tuple[bool, Tensor]] = []
        self.batch: Any = None

    def masked(self, batch: Any, mask: Tensor) -> Tensor:
        """Return the loss of the masked network."""
        hidden = self.network[1](self.network[0](batch[0])) * mask
        return F.cross_entropy(self.network[2](hidden), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss."""
        mask = self.dropout(torch.ones(len(batch[0]), 8, dtype=torch.float64))
        self.masks.append((in_extra_pass(), mask))
        self.batch = batch
        return self.masked(batch, mask)


@pytest.mark.parametrize("kind", ["two-sided", "one-sided", "hizoo"])
def test_all_passes_of_a_step_have_the_same_masks(kind: str) -> None:
    """The slope is the derivative of the network that is left of the masks."""
    seed_everything(5)
    make = maker(kind, perturbation_scale=1e-6, num_samples=2, lr=0.0)
    module = Dropped(make).double()
    answers: list[Tensor] = []
    slopes: list[float] = []

    class Compare(Callback):
        def on_train_start(self, trainer: Trainer, *args: Any) -> None:
            trainer.optimizers[0].on_answer = answers.append

        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            (main, mask), *others = module.masks
            assert not main
            assert len(others) == {"two-sided": 3, "one-sided": 2, "hizoo": 4}[kind]
            assert all(extra and torch.equal(other, mask) for extra, other in others)
            assert 0 < mask.count_nonzero() < mask.numel()
            module.masks.clear()
            params = list(module.parameters())
            grads = torch.autograd.grad(module.masked(module.batch, mask), params)
            moving = trainer.optimizers[0]._moving()
            for sample in range(2):
                direction = moving.whole(sample, range(len(params)))
                pairs = zip(grads, direction, strict=True)
                slopes.append(float(sum((g * z).sum() for g, z in pairs)))

    fit(module, callbacks=[Compare()], **DOUBLE)
    measured = torch.cat(answers)[:, 0]
    torch.testing.assert_close(measured, torch.tensor(slopes).double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["two-sided", "hizoo"])
def test_eval_mode_is_that_of_the_passes_only(kind: str) -> None:
    """No dropout and no statistics in any pass; hooks see the module in the mode it has."""
    modes: list[bool] = []

    class Watched(Validated):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            assert not any(part.training for part in self.modules())
            return super().training_step(batch, batch_idx)

    seed_everything(5)
    make = maker(kind, model_mode="eval")
    module = Watched(norm_dropout_module(make).network, make)
    before = dict(copy.deepcopy(list(module.named_buffers())))
    hooks = ("on_before_backward", "on_before_optimizer_step", "on_train_batch_end")

    def note(trainer: Any, pl_module: nn.Module, *args: Any) -> None:
        modes.extend(part.training for part in pl_module.modules())

    fit(module, callbacks=[LambdaCallback(**dict.fromkeys(hooks, note))])
    assert modes
    assert all(modes)
    assert_bitwise(dict(module.named_buffers()), before)


# Windows, loops and overridden hooks


@every_kind
def test_micro_batches_are_one_batch(kind: str) -> None:
    """Every main pass is displaced along the direction of the coming step."""
    ends = []
    for size, window in ((8, 1), (4, 2), (2, 4)):
        module = mlp(maker(kind))
        data = batched(learnable(16), size)
        fit(module, data=data, accumulate_grad_batches=window, max_epochs=2, **DOUBLE)
        ends.append(weights(module))
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
        ends.append(weights(module))
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
    before = weights(module)
    trainer.validate(module, batched(), verbose=False)
    assert_bitwise(weights(module), before)
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
    first = weights(module)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, batched())
    assert trainer.global_step == 10
    assert any(not torch.equal(tensor, first[name]) for name, tensor in weights(module).items())


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

    class Penalty(Validated):
        penalties: list[float] = []

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            with torch.enable_grad():
                x = x.clone().requires_grad_(True)
                loss = self.loss(self(x), y)
                (slope,) = torch.autograd.grad(loss, x, create_graph=True)
            self.penalties.append(float(slope.square().sum()))
            return loss + slope.square().sum()

    module = mlp(maker(), Penalty)
    fit(module)
    assert len(module.penalties) == 10
    assert min(module.penalties) > 0
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
    start = weights(module)
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


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable:UserWarning")
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
    note = LambdaCallback(on_train_batch_start=lambda t, m, *_: before.append(weights(m)))
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
