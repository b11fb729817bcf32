"""Fault drill on two ranks: what happens to one of them must be decided alike on both.

Files under test: optim/qlr.py, optim/failures.py, oracle/window.py, oracle/ranks.py.
"""

from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision

from tests.helpers.families import every_family
from tests.helpers.faults import assert_finite
from tests.helpers.modules import MakeOptimizer
from tests.helpers.optimizer_db import Contract, every_optimizer
from tests.helpers.ranks import RankPool, world
from tests.helpers.spoiled import BAD_EXTRA, BAD_GRADIENTS, GOOD_LOSSES, SpoiledModule, Spoiler
from tests.helpers.two_ranks import Outcome, assert_same_on_all, failure, fit

pytestmark = pytest.mark.ddp

BAD = (2, 3, 9)
PER_EPOCH, EPOCHS = 5, 4
LIMIT = 4
ROUTES = ("strategy", "callback", "auto")


class Inspection(Callback):
    """Looks for what is not finite after every batch."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        assert_finite(pl_module, trainer.optimizers[0])


def module_for(make_optimizer: MakeOptimizer, *, kind: str, bad: Any, rank: int) -> SpoiledModule:
    """Make the module of this rank; only one rank meets the bad batches."""
    return SpoiledModule(make_optimizer, Spoiler(kind, bad if world()[0] == rank else ()))


def spoiled_fit(
    contract: Contract, kind: str, *, bad: Any = BAD, rank: int = 1, **settings: Any
) -> Outcome:
    """Fit on this rank."""
    chosen = {"max_failures": LIMIT, "curvature_guard": False}
    return fit(
        contract,
        partial(module_for, kind=kind, bad=bad, rank=rank),
        options=contract.known(chosen),
        exactly=False,
        callbacks=[Inspection()],
        max_epochs=EPOCHS,
        **settings,
    )


def failed_fit(*args: Any, **settings: Any) -> str:
    """Fit on this rank and return what it fails with."""
    with pytest.raises(RuntimeError) as caught:
        spoiled_fit(*args, **settings)
    return str(caught.value)


def assert_survived(outcomes: list[Outcome], contract: Contract, skipped: int) -> None:
    """Assert that both ranks took the same decisions and that training went on."""
    assert_same_on_all(outcomes)
    for outcome in outcomes:
        good = [loss for loss in outcome.losses if torch.tensor(loss).isfinite()]
        # Along a few directions twenty steps do not learn random labels, but nor do they diverge.
        factor = 1.05 if contract.forward_only else 0.95
        assert sum(good[-PER_EPOCH:]) < factor * sum(good[:PER_EPOCH])
        if "skipped_steps" in outcome.stats:
            assert outcome.stats["skipped_steps"] == skipped
            told = f"{contract.info.cls.__name__} skipped"
            assert len([text for text in outcome.warnings if told in text]) == (skipped > 0)


@every_optimizer
@pytest.mark.parametrize("kind", BAD_GRADIENTS)
@pytest.mark.feature("Faults", "NaN or infinity on one rank only")
def test_one_bad_batch(contract: Contract, kind: str, ranks: RankPool) -> None:
    """The gradients are averaged, so the step is skipped on both ranks."""
    outcomes = ranks.run(spoiled_fit, contract, kind)
    unseen = contract.forward_only and kind in GOOD_LOSSES
    assert_survived(outcomes, contract, 0 if unseen else len(BAD))


@every_family
@pytest.mark.parametrize("route", ROUTES[1:])
@pytest.mark.feature("Faults", "NaN or infinity on one rank only")
def test_one_bad_batch_by_other_routes(contract: Contract, route: str, ranks: RankPool) -> None:
    """Under stock ``ddp``, on the first rank."""
    outcomes = ranks.run(spoiled_fit, contract, "nan batch", rank=0, route=route)
    assert_survived(outcomes, contract, len(BAD))


@every_family
@pytest.mark.parametrize("kind", BAD_EXTRA)
@pytest.mark.parametrize("directional", ["fd", "jvp"])
@pytest.mark.feature("Faults", "NaN or infinity on one rank only")
def test_one_bad_extra_pass(
    contract: Contract, directional: str, kind: str, ranks: RankPool
) -> None:
    """Curvature and new loss are averaged too."""
    outcomes = ranks.run(spoiled_fit, contract, kind, directional=directional)
    needed = contract.forward_only or kind == BAD_EXTRA[0]
    skipped = len(BAD) if contract.runs_again and needed else 0
    assert_survived(outcomes, contract, skipped)


@every_family
@pytest.mark.feature("Faults", "NaN or infinity on one rank only")
def test_one_bad_micro_batch(contract: Contract, ranks: RankPool) -> None:
    """Windows of two and a short one at the end of the epoch."""
    outcomes = ranks.run(spoiled_fit, contract, "nan batch", bad=(3, 9), accumulate_grad_batches=2)
    assert_survived(outcomes, contract, 2)


@every_family
@pytest.mark.parametrize("kind", ["nan batch", "infinite loss", BAD_EXTRA[0]])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.feature("Faults", "Too many unusable steps in a row on two ranks")
def test_max_failures(contract: Contract, route: str, kind: str, ranks: RankPool) -> None:
    """Both ranks stop at the same step with the same error."""
    if not contract.takes("max_failures"):
        return
    if kind in BAD_EXTRA and not contract.runs_again:
        pytest.skip("makes no extra pass")
    errors = ranks.run(failed_fit, contract, kind, bad=range(6, 100), route=route)
    name = contract.info.cls.__name__
    assert errors[0].startswith(f"{name} found no usable step {LIMIT} times in a row")
    assert "step 10:" in errors[0]
    assert errors[0] == errors[1]
    # The pool is fit for the next run.
    assert_survived(ranks.run(spoiled_fit, contract, "", bad=()), contract, 0)


class Overflow(SpoiledModule):
    """The loss is finite, but not what the scaler makes of it."""

    def __init__(self, make_optimizer: MakeOptimizer, factor: float) -> None:
        super().__init__(make_optimizer, Spoiler("", ()))
        self.factor = factor
        self.seen: dict[str, Any] = {"scales": []}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Return a loss whose gradient is too large for float16 in some batches."""
        loss = super().training_step(batch, batch_idx)
        if self.spoiler.number in BAD:
            factor = self.factor
            # The value stays; float32 gradients of it overflow with the scale.
            loss = loss + (factor * loss - (factor * loss).detach())
        return loss

    def on_train_batch_end(self, *args: Any) -> None:
        """Note the scale."""
        self.seen["scales"].append(self.trainer.precision_plugin.scaler.get_scale())


def overflowing(make_optimizer: MakeOptimizer) -> Overflow:
    """Make the module of this rank."""
    return Overflow(make_optimizer, 1e38 if world()[0] == 1 else 0.0)


def scaled_fit(contract: Contract, route: str) -> Outcome:
    """Fit under a scaler; one rank's gradients overflow."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    plugin = MixedPrecision(precision="16-mixed", device="cpu", scaler=scaler)
    return fit(
        contract,
        overflowing,
        exactly=False,
        route=route,
        callbacks=[Inspection()],
        max_epochs=EPOCHS,
        plugins=[plugin],
        precision=None,
    )


@every_family
@pytest.mark.parametrize("route", ROUTES[:2])
@pytest.mark.feature("Faults", "GradScaler overflow on one rank only")
def test_scaler_overflow(contract: Contract, route: str, ranks: RankPool, refused: Any) -> None:
    """The scaler leaves the step out on both ranks, and halves its scale on both."""
    if contract.forward_only:
        message = f"{contract.info.cls.__name__} re-evaluates the loss, which 16-mixed precision"
        texts = ranks.run(failure, scaled_fit, contract, route)
        assert all(message in text for text in texts)
        refused(f"{message} cannot do.")
        return
    outcomes = ranks.run(scaled_fit, contract, route)
    assert_survived(outcomes, contract, 0)
    scales = outcomes[0].seen["scales"]
    assert scales == outcomes[1].seen["scales"]
    assert scales[-1] == 1024.0 / 2 ** len(BAD)
