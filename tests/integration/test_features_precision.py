"""Every optimizer under every precision of the Trainer that runs on a CPU; refusals of the rest."""

import itertools
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import (
    BitsandbytesPrecision,
    MixedPrecision,
    TransformerEnginePrecision,
)
from torch import Tensor

from tests.helpers.families import every_family
from tests.helpers.features import BATCH_SIZE, BATCHES, Run, batched, learnable, prepare, train
from tests.helpers.modules import StockModule, mlp_module
from tests.helpers.optimizer_db import Contract, identical
from tests.helpers.probing import assert_bitwise

WEIGHTS = {
    "32-true": torch.float32,
    "64-true": torch.float64,
    "bf16-mixed": torch.float32,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
    "16-mixed": torch.float32,
}
# Moments of half-precision parameters are kept in float32.
STATE = {
    precision: torch.float64 if weights is torch.float64 else torch.float32
    for precision, weights in WEIGHTS.items()
}
SCALED = pytest.mark.feature("Precision", "`16-mixed` (`GradScaler`)")

every_precision = pytest.mark.parametrize(
    "precision",
    [
        pytest.param(
            precision,
            marks=SCALED
            if precision == "16-mixed"
            else pytest.mark.feature("Precision", f"`{precision}`"),
        )
        for precision in WEIGHTS
    ],
)


def scaler(**settings: Any) -> torch.amp.GradScaler:
    """Build a gradient scaler for the CPU."""
    return torch.amp.GradScaler("cpu", **{"init_scale": 1024.0, **settings})


def scaling(grad_scaler: torch.amp.GradScaler) -> dict[str, Any]:
    """Return the Trainer arguments for 16-mixed with a scaler of the test."""
    plugin = MixedPrecision(precision="16-mixed", device="cpu", scaler=grad_scaler)
    return {"plugins": [plugin]}


def without_gradients(contract: Contract, refused: Any, precision: str = "16-mixed") -> bool:
    """Tell whether there is nothing for a scaler to scale, and assert that it is refused then."""
    if precision != "16-mixed" or not contract.forward_only:
        return False
    name = contract.info.cls.__name__
    text = (
        f"{name} re-evaluates the loss, which 16-mixed precision cannot do. Use bf16-mixed or "
        "32-true."
    )
    for make in (mlp_module, lambda make: Manual(mlp_module(make).network, make)):
        run = prepare(contract, make, **scaling(scaler()))
        with pytest.raises(MisconfigurationException, match=f"^{re.escape(text)}$"):
            run.trainer.fit(run.module, batched())
    refused(text)
    return True


def settings_of(precision: str) -> dict[str, Any]:
    """Return the Trainer arguments for a precision."""
    if precision == "16-mixed":
        return scaling(scaler(growth_interval=8))
    return {"precision": precision}


@every_family
@pytest.mark.parametrize("route", ["strategy", "callback"])
@every_precision
def test_trains(contract: Contract, precision: str, route: str, refused: Any) -> None:
    """The loss falls, types stay, and no method of measuring curvature complains."""
    if without_gradients(contract, refused, precision):
        return
    run = train(contract, mlp_module, route=route, max_epochs=6, **settings_of(precision))
    assert run.steps == 6 * BATCHES
    run.assert_learned()
    params = list(run.module.parameters())
    assert {p.dtype for p in params} == {WEIGHTS[precision]}
    state = [value for p in params for value in run.optimizer.state[p].values()]
    assert {t.dtype for t in state if t.is_floating_point()} <= {STATE[precision]}
    assert all(t.isfinite().all() for t in state)


def double_module(make_optimizer: Any) -> StockModule:
    """Build a module in float64: Lightning loads weights before it converts a module."""
    return mlp_module(make_optimizer).double()


@every_family
@every_precision
def test_resumes(contract: Contract, precision: str, tmp_path: Path, refused: Any) -> None:
    """Bit for bit, with the scale of a scaler, and no state cast on the way."""
    if without_gradients(contract, refused, precision):
        return
    make = double_module if precision == "64-true" else mlp_module
    whole = train(contract, make, max_epochs=4, **settings_of(precision))
    half = train(contract, make, max_epochs=2, **settings_of(precision))
    half.trainer.save_checkpoint(tmp_path / "half.ckpt")
    torch.load(tmp_path / "half.ckpt", weights_only=True)
    rest = prepare(contract, make, max_epochs=4, **settings_of(precision))
    rest.trainer.fit(rest.module, batched(), ckpt_path=tmp_path / "half.ckpt")
    assert_bitwise(rest.tensors, whole.tensors)
    assert identical(rest.optimizer.state_dict(), whole.optimizer.state_dict())


@every_family
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.feature("Precision", "mixed, with clipping and accumulation")
def test_clipped_windows(contract: Contract, precision: str, accumulate: int, refused: Any) -> None:
    """A scaler unscales before it clips: the slope that is compared is the true one."""
    if without_gradients(contract, refused, precision):
        return
    with pytest.warns(UserWarning, match="no effect") if contract.forward_only else nullcontext():
        run = train(
            contract,
            mlp_module,
            data=batched(learnable(64)),
            gradient_clip_val=0.05,
            accumulate_grad_batches=accumulate,
            max_epochs=8,
            **(scaling(scaler()) if precision == "16-mixed" else settings_of(precision)),
        )
    assert run.steps == 8 * 8 // accumulate
    run.assert_learned(per_epoch=8)


class Scales(Callback):
    """Notes the scale after every batch."""

    def __init__(self, grad_scaler: torch.amp.GradScaler) -> None:
        self.scaler = grad_scaler
        self.seen: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        """Note."""
        self.seen.append(self.scaler.get_scale())


def scaled_run(contract: Contract, grad_scaler: torch.amp.GradScaler, **settings: Any) -> Any:
    """Fit under a scaler; return the run and the scales."""
    scales = Scales(grad_scaler)
    run = train(contract, mlp_module, callbacks=[scales], **scaling(grad_scaler), **settings)
    return run, scales.seen


@every_family
@SCALED
def test_the_scale_grows(contract: Contract, refused: Any) -> None:
    """... and nothing depends on it, as long as nothing overflows or vanishes."""
    if without_gradients(contract, refused):
        return
    growing, scales = scaled_run(contract, scaler(growth_interval=6))
    constant, _ = scaled_run(contract, scaler(growth_interval=10**6))
    assert scales == [1024.0] * 5 + [2048.0] * 6 + [4096.0] * 4
    for name, tensor in constant.tensors.items():
        torch.testing.assert_close(growing.tensors[name], tensor, rtol=1e-2, atol=1e-3)


@every_family
@pytest.mark.parametrize("accumulate", [1, 2])
@SCALED
def test_steps_that_the_scaler_leaves_out(
    contract: Contract, accumulate: int, refused: Any
) -> None:
    """As if their batches had not been there: no step is counted, and no batch is remembered."""
    if without_gradients(contract, refused):
        return
    huge = 2.0**24
    rows = learnable(12 * BATCH_SIZE)
    window = {"accumulate_grad_batches": accumulate, "max_epochs": 1}
    run, scales = scaled_run(
        contract, scaler(init_scale=huge, backoff_factor=1 / 16), data=batched(rows), **window
    )
    taken = scales[accumulate - 1 :: accumulate]
    skipped = sum(after < before for before, after in itertools.pairwise([huge, *taken]))
    assert 0 < skipped < len(taken) - 1
    left = 12 // accumulate - skipped
    assert run.optimizer._steps_done == left
    first = run.watch.weights[skipped * accumulate - 1]
    fresh = prepare(contract, mlp_module)
    assert_bitwise(first, {n: p.detach() for n, p in fresh.module.named_parameters()})
    rest = type(rows)(*(t[skipped * accumulate * BATCH_SIZE :] for t in rows.tensors))
    other, _ = scaled_run(contract, scaler(init_scale=taken[-1]), data=batched(rest), **window)
    assert_bitwise(run.tensors, other.tensors)
    assert identical(run.optimizer.state_dict(), other.optimizer.state_dict())


class Overflows(StockModule):
    """Has an infinite gradient in some batches."""

    bad = (6,)

    def on_after_backward(self) -> None:
        """Spoil the gradient."""
        if self.trainer.fit_loop.epoch_loop.total_batch_idx in self.bad:
            next(self.parameters()).grad.view(-1)[0] = torch.inf


@every_family
@SCALED
def test_an_infinite_gradient_on_the_way(contract: Contract, refused: Any) -> None:
    """The scaler leaves the step out; weights and state stay, and the next step is taken."""
    if without_gradients(contract, refused):
        return

    def make(make_optimizer: Any) -> Overflows:
        return Overflows(mlp_module(make_optimizer).network, make_optimizer)

    grad_scaler = scaler()
    run = train(contract, make, max_epochs=6, **scaling(grad_scaler))
    before, bad, after = run.watch.weights[5:8]
    assert_bitwise(bad, before)
    assert any(not torch.equal(after[name], bad[name]) for name in bad)
    assert run.optimizer._steps_done == 6 * BATCHES - 1
    assert grad_scaler.get_scale() == 512.0
    run.assert_learned()


class NeverStarts(StockModule):
    """Must be refused before its first batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Fail."""
        raise AssertionError("a batch was reached")


def pretend(trainer: Trainer, kind: type) -> None:
    """Let the precision plugin pass for one of a kind that cannot be built here."""
    plugin = trainer.strategy.precision_plugin

    class Pretender(type(plugin)):
        @property
        def __class__(self) -> type:
            return kind

    plugin.__class__ = Pretender
    Pretender.__name__ = kind.__name__


@every_family
@pytest.mark.parametrize("route", ["strategy", "callback", "auto"])
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        pytest.param(
            TransformerEnginePrecision,
            "scales by statistics that an extra pass would change",
            marks=pytest.mark.feature("Precision", "`TransformerEnginePrecision`"),
        ),
        pytest.param(
            BitsandbytesPrecision,
            "quantizes the weights that an extra pass would move",
            marks=pytest.mark.feature("Precision", "`BitsandbytesPrecision`"),
        ),
    ],
)
def test_plugins_that_are_refused(
    contract: Contract, kind: type, reason: str, route: str, refused: Any
) -> None:
    def make(make_optimizer: Any) -> LightningModule:
        return NeverStarts(mlp_module(make_optimizer).network, make_optimizer)

    run = prepare(contract, make, route=route)
    pretend(run.trainer, kind)
    if not contract.info.asks:
        with pytest.raises(AssertionError, match="a batch was reached"):
            run.trainer.fit(run.module, batched())
        return
    text = f"{contract.info.cls.__name__} evaluates the loss again; precision plugin "
    with pytest.raises(MisconfigurationException, match=f"^{re.escape(text)}") as refusal:
        run.trainer.fit(run.module, batched())
    assert reason in str(refusal.value)
    assert "Use precision='32-true'" in str(refusal.value)
    refused(f"{text}... {reason}.")


class Manual(StockModule):
    """Steps by hand, with a closure."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Step."""
        optimizer = self.optimizers()

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = super(Manual, self).training_step(batch, batch_idx)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure)


@every_family
@pytest.mark.parametrize(
    "precision",
    [
        pytest.param(
            precision,
            marks=pytest.mark.feature("Precision", f"`{precision}`, manual optimization"),
        )
        for precision in WEIGHTS
    ],
)
def test_manual_optimization(contract: Contract, precision: str, refused: Any) -> None:
    """A closure can be evaluated again, except where a scaler has run it before."""
    if without_gradients(contract, refused, precision):
        return

    def make(make_optimizer: Any) -> Manual:
        return Manual(mlp_module(make_optimizer).network, make_optimizer)

    run: Run = prepare(contract, make, max_epochs=6, **settings_of(precision))
    if precision == "16-mixed" and contract.info.asks:
        text = (
            f"{contract.info.cls.__name__} runs the closure of manual optimization again; "
            "precision '16-mixed' runs it before the optimizer sees it."
        )
        with pytest.raises(MisconfigurationException, match=f"^{re.escape(text)}"):
            run.trainer.fit(run.module, batched())
        refused(text)
        return

    def loss() -> float:
        x, y = learnable().tensors
        with torch.no_grad():
            dtype = next(run.module.parameters()).dtype
            return float(run.module.loss(run.module(x.to(dtype)).float(), y))

    before = loss()
    run.trainer.fit(run.module, batched())
    assert run.steps == 6 * BATCHES
    assert loss() < 0.9 * before
    assert {p.dtype for p in run.module.parameters()} == {WEIGHTS[precision]}
