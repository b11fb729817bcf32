"""Tests of lightning_curvature/pruning/exchange.py, and of pruning on two ranks."""

from typing import Any

import pytest
import torch

from lightning_curvature.pruning.exchange import Columns
from tests.helpers.ranks import RankPool
from tests.pruning import on_ranks
from tests.pruning.on_ranks import Pruned

pytestmark = pytest.mark.ddp


def compare(pool: RankPool, counts: tuple[int, int], **kwargs: Any) -> None:
    """Two ranks are alike bit for bit, and like one process with the gradients of both."""
    first, second = pool.run(on_ranks.pruned, counts, **kwargs)
    alone = on_ranks.pruned(counts, **kwargs)
    assert isinstance(first, Pruned)
    assert all(report.num_pruned > 0 for report in alone.reports)
    for event in range(2):
        assert torch.equal(first.weights[event], second.weights[event])
        assert torch.equal(first.keep[event], second.keep[event])
        assert torch.equal(first.keep[event], alone.keep[event])
        expected = alone.weights[event]
        error = (first.weights[event] - expected).norm() / expected.norm()
        assert float(error) < 1e-9
        ours, theirs = first.reports[event], alone.reports[event]
        assert ours.quad_model_change == second.reports[event].quad_model_change
        assert ours.quad_model_change == pytest.approx(theirs.quad_model_change, rel=1e-9)
        assert ours.saliency is not None
        assert theirs.saliency is not None
        assert ours.saliency.threshold == pytest.approx(theirs.saliency.threshold, rel=1e-9)
        assert ours.layer_sparsities == theirs.layer_sparsities


@pytest.mark.parametrize("counts", [(4, 4), (5, 2), (7, 0)])
@pytest.mark.parametrize("block_size", [None, 6, 20], ids=["whole", "primal", "dual"])
def test_two_ranks_are_one_process(
    ranks: RankPool, counts: tuple[int, int], block_size: int | None
) -> None:
    compare(ranks, counts, block_size=block_size)


@pytest.mark.parametrize("block_size", [None, 6, 20, 120, 1000])
@pytest.mark.parametrize("pattern", ["2:4", "3x2"])
def test_groups(ranks: RankPool, block_size: int | None, pattern: str) -> None:
    """Also with blocks that one rank has most of, or all but one that is empty."""
    compare(ranks, (5, 4), block_size=block_size, pattern=pattern)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"weight_update": "sum"},
        {"weight_update": "sum", "block_size": None},
        {"weight_update": "none", "block_size": None},
        {"scope": "layer"},
        {"criterion": "magnitude"},
        {"criterion": "random", "block_size": None},
        {"weight_update": "sum", "block_size": None, "pattern": "2:4"},
    ],
    ids=str,
)
def test_choices(ranks: RankPool, kwargs: dict[str, Any]) -> None:
    compare(ranks, (3, 6), **{"block_size": 16, **kwargs})


# The exchange alone


@pytest.mark.parametrize("counts", [(3, 3), (1, 4), (0, 5)])
@pytest.mark.parametrize(("num", "unit"), [(10, 1), (10, 4), (5, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_all_rows_of_own_columns(
    ranks: RankPool, counts: tuple[int, int], num: int, unit: int, dtype: torch.dtype
) -> None:
    for permuted in (False, True):
        parts = ranks.run(on_ranks.exchanged, counts, num, unit, dtype, permuted)
        whole = torch.arange(sum(counts) * num).view(-1, num).to(dtype)
        if permuted:
            whole = whole.flip(1)
            whole[:, 1] = 0
        (start, middle, left), (again, stop, right) = parts
        assert (start, again, stop) == (0, middle, num)
        assert middle % unit == 0
        assert torch.equal(torch.cat([left, right], dim=1), whole)
        assert torch.equal(on_ranks.exchanged(counts, num, unit, dtype, permuted)[2], whole)


def test_parts_of_different_lengths(ranks: RankPool) -> None:
    for found in ranks.run(on_ranks.gathered, [3, 1]):
        assert found.tolist() == [[0, 0]] * 3 + [[1, 1]]
    for found in ranks.run(on_ranks.gathered, [0, 2]):
        assert found.tolist() == [[1, 1]] * 2


def test_one_rank() -> None:
    columns = Columns(10, 4)
    rows = torch.randn(3, 10)
    assert columns.exchange(rows, None) is rows
    assert columns.gather(rows, [3]) is rows
    assert Columns.least(128) == 1


# Gradients of each rank, and what goes wrong on one


def test_ranks_share_the_gradients(ranks: RankPool) -> None:
    """Rounded up, and no batch twice."""
    assert ranks.run(on_ranks.collected, 5) == [[0, 1, 2], [3, 4, 5]]
    assert on_ranks.collected(5) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [
        ("nan", "RuntimeError: Nothing was pruned; see the error of rank 1.", "[2] are not finite"),
        ("shape", "RuntimeError: Nothing was pruned; see the error of rank 1.", "expected grad"),
        ("absent", "no gradients, on ranks [4, -1]", "no gradients, on ranks [4, -1]"),
        ("empty", "no gradients, on ranks [0, 0]", "no gradients, on ranks [0, 0]"),
    ],
)
def test_no_rank_waits_for_ever(ranks: RankPool, kind: str, first: str, second: str) -> None:
    for found, expected in zip(ranks.run(on_ranks.failing, kind), (first, second), strict=True):
        assert expected in found


def test_inverse_that_fails_on_one_rank(ranks: RankPool) -> None:
    found = ranks.run(on_ranks.failing_inverse)
    assert found == ["Nothing was pruned; see the error of rank 1.", "no inverse"]
