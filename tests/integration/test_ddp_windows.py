"""Accumulation and gradient clipping on two ranks and on one."""

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.utils.data import TensorDataset

from tests.helpers.families import every_family
from tests.helpers.modules import vectors
from tests.helpers.optimizer_db import Contract, every_optimizer
from tests.helpers.rank_callbacks import Gradients
from tests.helpers.ranks import RankPool
from tests.helpers.two_ranks import compare, deviation, failure, fit

pytestmark = [pytest.mark.ddp]

GROUP = "Accumulation and clipping"
CLIPPING: dict[str, dict[str, Any]] = {
    "norm": {"gradient_clip_val": 0.05},
    "value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
}


@every_optimizer
@pytest.mark.parametrize("route", ["strategy", "callback"])
@pytest.mark.feature(GROUP, "`accumulate_grad_batches`: 1 x 8 equals 4 x 2, two ranks and one")
def test_one_batch_equals_four_micro_batches(
    contract: Contract, route: str, ranks: RankPool
) -> None:
    """A batch of 8 on each rank; 4 micro-batches of 2 on each; 1 x 16 and 4 x 4 in one process."""
    whole: dict[str, Any] = {"route": route, "batch_size": 16, "max_epochs": 4}
    parts = {**whole, "batch_size": 4, "accumulate_grad_batches": 4}
    data = {"data": vectors(48)}
    large, _, one_large = compare(ranks, fit, contract, **whole, **data)
    small, _, one_small = compare(ranks, fit, contract, **parts, **data)
    assert large.steps == small.steps == 12
    for outcome in (small, one_large, one_small):
        assert deviation(large, outcome) <= 1e-12


@every_family
@pytest.mark.parametrize("accumulate", [2, 3])
@pytest.mark.feature(GROUP, "short last window")
def test_ragged_last_window(contract: Contract, accumulate: int, ranks: RankPool) -> None:
    """5 batches: the last window has 1 micro-batch of 2, or 2 of 3, which weigh 1/2 or 1/3."""
    first, _, _ = compare(ranks, fit, contract, accumulate_grad_batches=accumulate, max_epochs=3)
    assert first.steps == 3 * -(-5 // accumulate)


@every_family
@pytest.mark.parametrize("route", ["strategy", "built"])
@pytest.mark.feature(GROUP, "`GradientAccumulationScheduler`, two ranks and one")
def test_accumulation_scheduler(contract: Contract, route: str, ranks: RankPool) -> None:
    schedule = GradientAccumulationScheduler({0: 1, 1: 2, 2: 3})
    first, _, _ = compare(ranks, fit, contract, route=route, callbacks=[schedule], max_epochs=3)
    assert first.steps == 5 + 3 + 2


@every_family
@pytest.mark.parametrize("route", ["strategy", "callback"])
@pytest.mark.feature(GROUP, '`window="last"`')
def test_curvature_of_the_last_micro_batch(
    contract: Contract, route: str, ranks: RankPool, refused: Any
) -> None:
    settings: dict[str, Any] = {"route": route, "accumulate_grad_batches": 2, "max_epochs": 2}
    if contract.forward_only:
        message = "knows of the data only what it asks"
        texts = ranks.run(failure, fit, contract, window="last", **settings)
        assert all(message in text for text in texts)
        refused(f"{contract.info.cls.__name__} {message}.")
        return
    last, _, _ = compare(ranks, fit, contract, window="last", **settings)
    if contract.needs_known_loss:
        assert deviation(last, fit(contract, **settings)) > 1e-6


@every_family
@pytest.mark.feature(GROUP, '`window="last"`')
def test_the_last_micro_batch_stands_for_all(contract: Contract, ranks: RankPool) -> None:
    """Micro-batches that are alike, 2 + 2 + 1 of them: one is as good as all, also in the end."""
    if contract.sampler is not None:
        pytest.skip("draws for each of them")
    if contract.forward_only:
        pytest.skip("is refused")
    x, y = vectors(24).tensors
    repeated = [torch.cat([t[:8], t[:8], t[8:16], t[8:16], t[16:]]) for t in (x, y)]
    settings: dict[str, Any] = {
        "data": TensorDataset(*repeated),
        "accumulate_grad_batches": 2,
        "max_epochs": 2,
    }
    last, _, _ = compare(ranks, fit, contract, window="last", **settings)
    assert deviation(last, fit(contract, **settings)) <= 1e-12


@every_family
@pytest.mark.parametrize(("route", "accumulate"), [("strategy", 1), ("callback", 2)])
@pytest.mark.parametrize("algorithm", CLIPPING)
@pytest.mark.feature(GROUP, "clipping on two ranks, by norm and by value")
def test_gradient_clipping(
    contract: Contract, algorithm: str, route: str, accumulate: int, ranks: RankPool
) -> None:
    settings = {**CLIPPING[algorithm], "accumulate_grad_batches": accumulate, "max_epochs": 2}
    if contract.forward_only:
        # Nothing to clip on either rank; see test_features_gradients.py.
        compare(ranks, fit, contract, route=route, **settings)
        return
    outcomes = compare(ranks, fit, contract, route=route, callbacks=[Gradients()], **settings)
    limit = settings["gradient_clip_val"]
    measure = {"norm": "norm", "value": "entry"}[algorithm]
    for outcome in outcomes:
        assert limit * 0.9 < outcome.seen[measure] <= limit * (1 + 1e-9)


@every_family
@pytest.mark.parametrize("accumulate", [1, 2])
def test_clipping_by_the_optimizer(contract: Contract, accumulate: int, ranks: RankPool) -> None:
    if not contract.takes("grad_clip_norm"):
        pytest.skip("has no grad_clip_norm")
    settings = {"accumulate_grad_batches": accumulate, "max_epochs": 2}
    clipped, _, _ = compare(ranks, fit, contract, options={"grad_clip_norm": 0.05}, **settings)
    assert deviation(clipped, fit(contract, **settings)) > 1e-6
