"""What else a Trainer does, on two ranks: buffers, metrics, validation, groups, manual steps."""

import itertools
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule

from tests.helpers.families import LEADER, every_family
from tests.helpers.modules import MakeOptimizer, images
from tests.helpers.optimizer_db import Contract, every_optimizer
from tests.helpers.probing import Probe
from tests.helpers.rank_callbacks import Trace, Weights
from tests.helpers.rank_modules import (
    Augmented,
    Grouped,
    ManualClosure,
    ManualLayerOfOnePart,
    Validated,
)
from tests.helpers.ranks import RankPool
from tests.helpers.two_ranks import assert_same_on_all, compare, deviation, fit, unlike

pytestmark = [pytest.mark.ddp]

GROUP = "Distributed"
# Arguments that change which questions are asked, and when.
VARIANTS: dict[str, dict[str, Any]] = {
    "curvature now and then": {"curvature_update_interval": 3},
    "damping now and then": {"damping_update_interval": 4},
    "both now and then": {"curvature_update_interval": 3, "damping_update_interval": 4},
    "hessian": {"curvature": "hessian"},
    "fixed damping": {"damping_algorithm": "fixed"},
    "averages": {"curvature_ema": 0.5, "lr_ema": 0.5},
    "decay": {"weight_decay": 0.1},
    "maximize": {"maximize": True},
}


@every_family
@pytest.mark.parametrize("name", VARIANTS)
def test_variants(contract: Contract, name: str, ranks: RankPool) -> None:
    """Decisions come from averages or from the number of the step, so all ranks ask alike."""
    options = VARIANTS[name]
    if not contract.takes(*options):
        pytest.skip(f"has no {', '.join(options)}")
    settings: dict[str, Any] = {"accumulate_grad_batches": 2, "max_epochs": 3}
    first, _, _ = compare(ranks, fit, contract, options=options, **settings)
    assert deviation(first, fit(contract, **settings)) > 1e-6, "the arguments changed nothing"


@every_family
def test_steps_taken_back(contract: Contract, ranks: RankPool) -> None:
    """Long steps, some of them uphill: all ranks reject the same ones."""
    options = {"damping_algorithm": "decreasing-loss", "amplification": 2.5}
    if not contract.takes(*options):
        pytest.skip("takes no step back")
    first, _, _ = compare(
        ranks, fit, contract, within=1e-9, options=options, callbacks=[Weights()], max_epochs=2
    )
    weights = first.seen["weights"]
    stood = [torch.equal(*pair) for pair in itertools.pairwise(weights)]
    assert True in stood
    assert False in stood


@every_family
@pytest.mark.parametrize(("route", "accumulate"), [("strategy", 1), ("auto", 2)])
@pytest.mark.feature(GROUP, "Finite differences on two ranks")
def test_finite_differences(
    contract: Contract, route: str, accumulate: int, ranks: RankPool
) -> None:
    first, _, _ = compare(
        ranks,
        fit,
        contract,
        within=1e-6,
        route=route,
        directional="fd",
        accumulate_grad_batches=accumulate,
        max_epochs=2,
    )
    if contract.info.asks >= {"directional"}:
        assert first.method == "fd"


@every_family
@pytest.mark.parametrize(("route", "accumulate"), [("strategy", 1), ("callback", 2)])
@pytest.mark.feature(GROUP, "BatchNorm, dropout, metrics, another seed on each rank")
def test_ranks_with_noise_of_their_own(
    contract: Contract, route: str, accumulate: int, ranks: RankPool
) -> None:
    """Initial weights, masks, noise and statistics differ from rank to rank: no weight does."""
    first, second = ranks.run(
        fit,
        contract,
        Augmented,
        route=route,
        data=images(20),
        own_seeds=True,
        validate=True,
        accumulate_grad_batches=accumulate,
        max_epochs=3,
    )
    assert_same_on_all([first, second])
    assert all(a != b for a, b in zip(first.losses, second.losses, strict=True))
    assert first.warnings == second.warnings == [], "extra passes saw other noise than the gradient"


def standing_still(make_optimizer: MakeOptimizer) -> LightningModule:
    """Make the module with an optimizer that asks nothing and moves nothing."""
    return Augmented(lambda params: torch.optim.SGD(params, lr=0.0))


def asking(make_optimizer: MakeOptimizer) -> LightningModule:
    """Make the module with AdamW that asks everything there is, and ignores the answers."""
    # Last one that moves the weights for a while: the others do just what the main pass did.
    questions = ("directional", "loss", "hvp", "directional")
    return Augmented(lambda params: Probe(params, passes=questions))


def not_asking(make_optimizer: MakeOptimizer) -> LightningModule:
    """Make the module with the same AdamW that asks nothing."""
    return Augmented(lambda params: Probe(params, passes=()))


TRACED: dict[str, Any] = {"data": images(20), "own_seeds": True, "validate": True, "max_epochs": 2}


@every_optimizer
@pytest.mark.parametrize(("route", "accumulate"), [("strategy", 1), ("callback", 2)])
@pytest.mark.feature(GROUP, "Extra passes leave no trace on any rank")
def test_no_trace(contract: Contract, route: str, accumulate: int, ranks: RankPool) -> None:
    """With a learning rate of 0 it asks everything, and nothing else happens on any rank."""
    settings = {**TRACED, "accumulate_grad_batches": accumulate, "callbacks": [Trace()]}
    # Main passes at the parameters, and a way back to their very bits.
    quiet = contract.known({"estimator": "one_sided", "restore": "snapshot"})
    options = {"lr": 0.0, **quiet}
    asked = ranks.run(fit, contract, Augmented, route=route, options=options, **settings)
    still = ranks.run(fit, contract, standing_still, route="ddp", **settings)
    for ours, theirs in zip(asked, still, strict=True):
        assert unlike(ours.seen, theirs.seen) == []
        assert unlike(ours.buffers, theirs.buffers) == []
        assert torch.equal(ours.weights, theirs.weights)
    if "directional" in contract.info.asks:
        assert asked[0].method == "jvp"


@pytest.mark.parametrize("directional", ["jvp", "fd"])
@pytest.mark.parametrize("route", ["strategy", "callback"])
def test_no_trace_while_weights_move(route: str, directional: str, ranks: RankPool) -> None:
    settings = {**TRACED, "route": route, "directional": directional, "callbacks": [Trace()]}
    asked = ranks.run(fit, LEADER, asking, **settings)
    silent = ranks.run(fit, LEADER, not_asking, **settings)
    for ours, theirs in zip(asked, silent, strict=True):
        assert unlike(ours.seen, theirs.seen) == []
        assert unlike(ours.buffers, theirs.buffers) == []
        assert torch.equal(ours.weights, theirs.weights)


@every_family
@pytest.mark.parametrize("route", ["strategy", "built"])
@pytest.mark.feature(GROUP, "Validation within an epoch")
def test_validation_within_an_epoch(contract: Contract, route: str, ranks: RankPool) -> None:
    first, _, single = compare(
        ranks,
        fit,
        contract,
        Validated,
        route=route,
        validate=True,
        val_check_interval=2,
        num_sanity_val_steps=1,
        accumulate_grad_batches=2,
        max_epochs=2,
    )
    assert first.seen["validations"] == single.seen["validations"] == 5


@every_family
@pytest.mark.parametrize(
    ("route", "directional"),
    [("strategy", "jvp"), ("callback", "jvp"), ("auto", "jvp"), ("strategy", "fd")],
)
@pytest.mark.feature(GROUP, "Manual optimization with a closure")
def test_manual_optimization(
    contract: Contract, route: str, directional: str, ranks: RankPool
) -> None:
    settings: dict[str, Any] = {"route": route, "directional": directional, "max_epochs": 2}
    within = 1e-12 if directional == "jvp" else 1e-6
    compare(ranks, fit, contract, ManualClosure, within=within, **settings)


@every_family
@pytest.mark.parametrize(
    ("make_module", "flag"),
    [
        (ManualClosure, "static_graph"),
        (ManualClosure, "find_unused_parameters"),
        (ManualLayerOfOnePart, "find_unused_parameters"),
    ],
)
@pytest.mark.feature(GROUP, "Manual optimization with a closure")
def test_manual_optimization_under_the_flags_of_ddp(
    contract: Contract, make_module: Any, flag: str, ranks: RankPool
) -> None:
    """An extra pass must not make DDP expect another backward."""
    warns = "no gradient in this step" if contract.info.cls.needs_whole_params else None
    compare(ranks, fit, contract, make_module, warns=warns, flags={flag: True}, max_epochs=2)


@every_family
@pytest.mark.parametrize(("route", "accumulate"), [("strategy", 1), ("built", 2)])
@pytest.mark.feature(GROUP, "Groups, schedulers, tied and frozen parameters")
def test_groups(contract: Contract, route: str, accumulate: int, ranks: RankPool) -> None:
    first, _, _ = compare(
        ranks,
        fit,
        contract,
        Grouped,
        route=route,
        accumulate_grad_batches=accumulate,
        max_epochs=2,
    )
    rates = [group["lr"] for group in first.state["param_groups"]]
    initial = [group["initial_lr"] for group in first.state["param_groups"]]
    assert initial[0] == 0.5 * initial[1]
    assert all(rate < start for rate, start in zip(rates, initial, strict=True))
