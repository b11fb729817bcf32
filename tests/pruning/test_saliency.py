"""Tests of lightning_curvature/pruning/saliency.py."""

import pytest
import torch
from torch import Tensor

from lightning_curvature.curvature.inverse_fisher import InverseFisher
from lightning_curvature.pruning import saliency
from lightning_curvature.pruning.saliency import (
    fisher_scores,
    group_updates,
    magnitude_scores,
    products,
    random_scores,
)
from tests.pruning.dense import best_subset, cost, fisher, flags

D, DAMPING = 24, 1e-3
GROUPS = torch.arange(D).view(-1, 4)
ALL = torch.ones(6, 4, dtype=torch.bool)


def problem(num: int, block_size: int | None) -> tuple[InverseFisher, Tensor, Tensor]:
    """Return an inverse, the dense matrix and weights."""
    generator = torch.Generator().manual_seed(num)
    rows = torch.randn(num, D, generator=generator, dtype=torch.float64)
    rows += rows[:, :1]
    weights = torch.randn(D, generator=generator, dtype=torch.float64)
    inverse = InverseFisher(rows, DAMPING, block_size=block_size)
    return inverse, fisher(rows, DAMPING, block_size), weights


@pytest.fixture(params=[(5, None), (5, 8), (60, None), (60, 8)], ids=str)
def case(request: pytest.FixtureRequest) -> tuple[InverseFisher, Tensor, Tensor]:
    return problem(*request.param)


@pytest.fixture(params=[1 << 22, 20])
def _chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saliency, "_CHUNK", request.param)


def test_single_weights(case: tuple[InverseFisher, Tensor, Tensor]) -> None:
    inverse, h, weights = case
    found = fisher_scores(inverse, weights, torch.arange(D)[:, None], torch.ones(D, 1) > 0, 0)
    expected = [cost(h, weights, flags(D, q)) for q in range(D)]
    torch.testing.assert_close(found.scores, torch.stack(expected), rtol=1e-9, atol=0)
    assert found.pruned.all()


@pytest.mark.usefixtures("_chunked")
def test_blocks(case: tuple[InverseFisher, Tensor, Tensor]) -> None:
    inverse, h, weights = case
    found = fisher_scores(inverse, weights, GROUPS, ALL, 0)
    expected = [cost(h, weights, flags(D, *group)) for group in GROUPS.tolist()]
    torch.testing.assert_close(found.scores, torch.stack(expected), rtol=1e-9, atol=0)
    assert found.pruned.all()


@pytest.mark.usefixtures("_chunked")
@pytest.mark.parametrize("num_kept", [1, 2, 3])
def test_best_subsets(case: tuple[InverseFisher, Tensor, Tensor], num_kept: int) -> None:
    inverse, h, weights = case
    found = fisher_scores(inverse, weights, GROUPS, ALL, num_kept)
    for number, group in enumerate(GROUPS.tolist()):
        expected, subset = best_subset(h, weights, group, 4 - num_kept)
        assert float(found.scores[number]) == pytest.approx(expected, rel=1e-9)
        assert GROUPS[number][found.pruned[number]].tolist() == list(subset)


def test_interactions_decide() -> None:
    """The two least important weights of a group need not be the best pair."""
    inverse, h, weights = problem(60, None)
    best = fisher_scores(inverse, weights, GROUPS, ALL, 2)
    single = 0.5 * weights.square() / inverse.diagonal()
    naive = torch.zeros_like(ALL).scatter_(1, single.view(6, 4).argsort(1)[:, :2], True)
    differs = (naive != best.pruned).any(1)
    assert differs.any(), "else the test shows nothing"
    for number in differs.nonzero().view(-1).tolist():
        worse = cost(h, weights, flags(D, *GROUPS[number][naive[number]].tolist()))
        assert float(best.scores[number]) < float(worse)


def test_gaps_go_first() -> None:
    """One of two that go is a gap, also beside two weights that cost as little."""
    rows = torch.randn(60, D, dtype=torch.float64)
    rows[:, 2] = 0
    weights = torch.randn(D, dtype=torch.float64)
    weights[[0, 1, 2]] = 0
    present = ALL.clone()
    present[0, 2] = False
    inverse = InverseFisher(rows, DAMPING)
    for found in (
        fisher_scores(inverse, weights, GROUPS, present, 2),
        magnitude_scores(weights[GROUPS], present, 2),
    ):
        assert found.pruned[0].tolist() == [True, False, False, False]
        assert float(found.scores[0]) == 0
        assert found.pruned[1:].sum(1).tolist() == [2] * 5


def test_no_group() -> None:
    inverse, _, weights = problem(5, None)
    found = fisher_scores(inverse, weights, GROUPS[:0], ALL[:0], 2)
    assert found.scores.shape == (0,)
    assert found.pruned.shape == (0, 4)


@pytest.mark.usefixtures("_chunked")
@pytest.mark.parametrize("size", [1, 4])
def test_sum_of_updates(case: tuple[InverseFisher, Tensor, Tensor], size: int) -> None:
    """Each group alone, exactly; the sum of these."""
    inverse, h, weights = case
    groups = torch.arange(D).view(-1, size)[[1, 3, 5]]
    pruned = torch.ones(3, size) > 0
    pruned[:, :1] = size == 1
    expected = torch.zeros_like(weights)
    inverted = torch.linalg.inv(h)
    for group, gone in zip(groups, pruned, strict=True):
        q = group[gone]
        alone = -inverted[:, q] @ torch.linalg.solve(inverted[q][:, q], weights[q])
        torch.testing.assert_close(alone[q], -weights[q], rtol=1e-8, atol=1e-12)
        expected += alone
    found = group_updates(inverse, weights, groups, pruned)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_inverse_that_is_not_positive() -> None:
    class Broken:
        def submatrices(self, groups: Tensor) -> Tensor:
            return -torch.eye(4, dtype=torch.float64).expand(len(groups), 4, 4)

    with pytest.raises(RuntimeError, match="damping is too small"):
        fisher_scores(Broken(), torch.ones(D).double(), GROUPS, ALL, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_kept", [0, 1, 3])
def test_magnitude(num_kept: int) -> None:
    """The same as with the identity for the Fisher matrix."""
    weights = torch.randn(D, dtype=torch.float64)
    identity = InverseFisher(torch.zeros(1, D, dtype=torch.float64), 1.0)
    expected = fisher_scores(identity, weights, GROUPS, ALL, num_kept)
    found = magnitude_scores(weights[GROUPS], ALL, num_kept)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-12, atol=0)
    assert torch.equal(found.pruned, expected.pruned)


def test_random() -> None:
    """By position, so that it does not matter how weights are grouped; every pair is as likely."""
    positions = torch.arange(12_000).view(-1, 4)
    present = torch.ones(3000, 4, dtype=torch.bool)
    found = random_scores(positions, present, 2, 12_000, 0)
    again = random_scores(positions[1000:], present[1000:], 2, 12_000, 0)
    assert torch.equal(found.scores[1000:], again.scores)
    other = random_scores(positions, present, 2, 12_000, 1)
    assert not torch.equal(found.scores, other.scores)
    assert found.pruned.sum(1).tolist() == [2] * 3000
    pairs = (found.pruned * torch.tensor([1, 2, 4, 8])).sum(1).bincount()
    pairs = pairs[pairs > 0]
    assert len(pairs) == 6
    # Five standard errors of 500 expected ones.
    assert bool(((pairs - 500).abs() < 5 * (500 * 5 / 6) ** 0.5).all())


@pytest.mark.parametrize("block_size", [None, 8, 10, 24, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_predicted_change(block_size: int | None, dtype: torch.dtype) -> None:
    rows = torch.randn(7, D).to(dtype)
    change = torch.randn(D, dtype=torch.float64)
    expected = 0.5 * change @ fisher(rows, 0.0, block_size) @ change
    found = products(rows, change, block_size)
    assert found.dtype == torch.float64
    assert float(0.5 * found.square().sum() / 7) == pytest.approx(float(expected), rel=1e-12)
