"""Ranks that see different things still decide alike.

The objective is the mean over the ranks of their mean losses; one process that averages the losses
of two halves says what two ranks must come out at.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from tests.helpers.families import every_family
from tests.helpers.modules import vectors
from tests.helpers.optimizer_db import Contract
from tests.helpers.rank_callbacks import Weights
from tests.helpers.rank_modules import (
    IGNORED,
    Ignoring,
    NoForwardRule,
    NoForwardRuleLater,
    NoneIsZero,
    Parts,
    WrongForwardRule,
    with_ignored_targets,
)
from tests.helpers.ranks import RankPool
from tests.helpers.two_ranks import assert_same_on_all, compare, deviation, failure, fit

pytestmark = [pytest.mark.ddp]

GROUP = "Distributed"
WINDOWS = [("strategy", 1), ("built", 1), ("strategy", 2)]


def _within(contract: Contract, otherwise: float = 1e-12) -> float:
    """Return how near two fits on four examples must come.

    EK-FAC averages in an eigenbasis, of which so few examples determine a part only.
    """
    return max(otherwise, 1e-2) if contract.info.name == "ekfac" else otherwise


@every_family
@pytest.mark.parametrize(("route", "accumulate"), WINDOWS)
@pytest.mark.feature(GROUP, "Ranks with different numbers of ignored targets")
def test_ignored_targets(contract: Contract, route: str, accumulate: int, ranks: RankPool) -> None:
    """Three targets on one rank, one on the other."""
    compare(
        ranks,
        fit,
        contract,
        Ignoring,
        within=_within(contract),
        route=route,
        data=with_ignored_targets(),
        accumulate_grad_batches=accumulate,
        max_epochs=2,
    )


@every_family
@pytest.mark.parametrize("directional", ["jvp", "fd"])
@pytest.mark.parametrize(("route", "accumulate"), WINDOWS)
@pytest.mark.feature(GROUP, "One rank without a target: zero loss")
def test_no_target_and_a_loss_of_zero(
    contract: Contract, route: str, accumulate: int, directional: str, ranks: RankPool
) -> None:
    """No loss function is called on that rank: its curvature is zero, the other's counts half."""
    compare(
        ranks,
        fit,
        contract,
        NoneIsZero,
        within=_within(contract, 1e-12 if directional == "jvp" else 1e-5),
        route=route,
        directional=directional,
        data=with_ignored_targets(empty=True),
        accumulate_grad_batches=accumulate,
        max_epochs=2,
    )


@every_family
@pytest.mark.feature(GROUP, "One rank without a target: zero loss")
def test_the_very_first_batch_has_no_target(contract: Contract, ranks: RankPool) -> None:
    """... on one rank: no rank may take that for a loss that is never captured."""
    rows = (tensor[8:] for tensor in with_ignored_targets(empty=True).tensors)
    data = TensorDataset(*rows)
    compare(ranks, fit, contract, NoneIsZero, within=_within(contract), data=data)


@every_family
@pytest.mark.parametrize(("route", "accumulate"), WINDOWS)
@pytest.mark.feature(GROUP, "One rank without a target: NaN loss")
def test_no_target_and_a_loss_of_nan(
    contract: Contract, route: str, accumulate: int, ranks: RankPool
) -> None:
    """Its gradient is zero, not NaN: all ranks take the step of a loss of zero, and go on.

    Those that know of nothing but the loss skip that step, on all ranks.
    """
    settings: dict[str, Any] = {
        "data": with_ignored_targets(empty=True),
        "accumulate_grad_batches": accumulate,
        "callbacks": [Weights()],
    }
    within = _within(contract)
    first, second, _ = compare(
        ranks, fit, contract, Ignoring, within=within, route=route, **settings
    )
    assert [math.isnan(loss) for loss in second.losses] == [False, True, False, False, False]
    if contract.forward_only:
        assert first.stats["skipped_steps"] == second.stats["skipped_steps"] == 1
        assert not torch.equal(first.seen["weights"][2], first.seen["weights"][4])
        return
    zero = fit(contract, NoneIsZero, **settings)
    weights, expected = first.seen["weights"], zero.seen["weights"]
    # Later steps may differ: no reduction ratio comes out of a loss of NaN.
    for step in range(3):
        torch.testing.assert_close(weights[step], expected[step], rtol=0, atol=within)
    assert not torch.equal(weights[1 if accumulate == 1 else 0], weights[2])
    assert not torch.equal(weights[2], weights[4])


@every_family
@pytest.mark.feature(GROUP, "No captured loss on any rank")
def test_no_rank_ever_calls_a_loss_function(
    contract: Contract, ranks: RankPool, refused: Callable[[str], None]
) -> None:
    """All ranks say so, none waits for the others."""
    data = vectors(8)
    data = TensorDataset(data.tensors[0], torch.full_like(data.tensors[1], IGNORED))
    message = "The curvature of the loss is unknown"
    texts = ranks.run(failure, fit, contract, NoneIsZero, data=data)
    if contract.needs_known_loss:
        assert all(text.startswith(f"NoLossCapturedError: {message}") for text in texts)
        refused(message)
    else:
        assert texts == [None, None]


@every_family
@pytest.mark.parametrize(("make_module", "epochs"), [(NoForwardRule, 2), (NoForwardRuleLater, 11)])
@pytest.mark.parametrize("route", ["strategy", "auto"])
@pytest.mark.feature(GROUP, "Forward mode fails on one rank")
def test_forward_mode_fails_on_one_rank(
    contract: Contract, route: str, make_module: Any, epochs: int, ranks: RankPool
) -> None:
    """That rank goes on with finite differences and says so; the other when it next checks."""
    settings: dict[str, Any] = {"directional": "auto", "max_epochs": epochs}
    outcomes = ranks.run(fit, contract, make_module, route=route, **settings)
    assert_same_on_all(outcomes)
    first, second = outcomes
    single = fit(contract, make_module, **settings)
    assert deviation(first, single) < 1e-5
    if contract.info.asks >= {"directional"}:
        (text,) = second.warnings
        assert "Forward-mode differentiation is not possible" in text
        assert second.method == "fd"
    assert first.warnings == []


@every_family
@pytest.mark.parametrize("route", ["strategy", "auto"])
@pytest.mark.feature(GROUP, "Self-check fails on one rank")
def test_forward_mode_goes_wrong_on_one_rank(
    contract: Contract, route: str, ranks: RankPool
) -> None:
    """Both ranks notice it in their average, both change to finite differences."""
    settings: dict[str, Any] = {"directional": "auto", "max_epochs": 2}
    outcomes = ranks.run(fit, contract, WrongForwardRule, route=route, **settings)
    assert_same_on_all(outcomes)
    single = fit(contract, WrongForwardRule, **settings)
    assert deviation(outcomes[0], single) < 1e-5
    for outcome in (*outcomes, single) if contract.info.asks >= {"directional"} else ():
        (text,) = outcome.warnings
        assert "going on with 'fd'" in text
        assert outcome.method == "fd"


@every_family
@pytest.mark.feature(GROUP, "Last batches of different lengths")
@pytest.mark.parametrize(("rows", "batch_size"), [(36, 8), (37, 8), (27, 5)])
def test_last_batch_of_another_length(
    contract: Contract, rows: int, batch_size: int, ranks: RankPool
) -> None:
    """Shorter, and of different lengths on the ranks: 3 rows and 2, 1 row and 1."""
    compare(ranks, fit, contract, Parts, data=vectors(rows), batch_size=batch_size, max_epochs=2)
