"""Tests of lightning_curvature/pruning/report.py."""

import pytest
import torch

from lightning_curvature.pruning.report import SaliencySummary


def test_summary() -> None:
    scores = torch.logspace(-4, 2, 601, dtype=torch.float64)
    pruned = torch.arange(601) < 201
    found = SaliencySummary.of(scores, pruned)
    assert (found.smallest, found.largest) == pytest.approx((1e-4, 1e2))
    assert found.median == pytest.approx(0.1)
    assert found.threshold == pytest.approx(1e-2)
    assert len(found.edges) == len(found.kept) + 1 == len(found.pruned) + 1
    assert (found.edges[0].item(), found.edges[-1].item()) == pytest.approx((1e-4, 1e2))
    assert int(found.kept.sum()) == 400
    assert int(found.pruned.sum()) == 201
    for flags, counts in ((pruned, found.pruned), (~pruned, found.kept)):
        inside = scores[flags, None] < found.edges[1:]
        inside &= scores[flags, None] >= found.edges[:-1]
        inside[scores[flags] == found.largest, -1] = True
        assert torch.equal(inside.sum(0), counts)
    last = int(found.pruned.nonzero().max())
    assert found.edges[last] <= found.threshold <= found.edges[last + 1]


@pytest.mark.parametrize("values", [[0.0, 0.0], [0.0, 3.0], [2.0, 2.0]])
def test_degenerate(values: list[float]) -> None:
    found = SaliencySummary.of(torch.tensor(values).double(), torch.tensor([True, False]))
    assert int(found.kept.sum()) == int(found.pruned.sum()) == 1
    assert found.edges.isfinite().all()
    assert (found.smallest, found.largest) == tuple(values)
