"""Optimizers that run no backward in a Trainer: what hooks see, and what is random.

Files under test: strategies/forward_only.py, strategies/recorder.py, optim/zeroth_order.py.
"""

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor, nn

from lightning_curvature import in_extra_pass
from tests.helpers.faults import random_streams
from tests.helpers.features import Validated, batched, quiet
from tests.helpers.forward_only import DOUBLE, every_kind, fit, maker, mlp
from tests.helpers.modules import CLASSES, StockModule, norm_dropout_module
from tests.helpers.probing import assert_bitwise, parameters_and_buffers

pytestmark = quiet

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
        self.seen[name].append(parameters_and_buffers(module))


def _noting(name: str) -> Callable[..., None]:
    def hook(self: Diary, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.note(name, pl_module)

    return hook


for _name in Diary.HOOKS:
    setattr(Diary, _name, _noting(_name))


@every_kind
@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
def test_hooks_once_no_gradient_and_clean_parameters_and_buffers(kind: str) -> None:
    """Whoever may look at the weights for their own sake finds them where the last step left them.

    Validation comes within an accumulation window. Only around the backward of the step they may
    be displaced.
    """
    diary = Diary()
    module = mlp(maker(kind))
    start = parameters_and_buffers(module)
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
    still = {"hessian_smoothing": 0.0} if kind == "hizoo" else {}
    make = maker(kind, perturbation_scale=1e-6, num_samples=2, lr=0.0, **still)
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
