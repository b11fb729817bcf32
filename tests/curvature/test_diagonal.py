"""Tests of lightning_curvature/curvature/diagonal.py: Hutchinson's estimate of a diagonal."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature.curvature.diagonal import ProbeSampler, hutchinson
from lightning_curvature.oracle.plans import ProbePlan
from tests.helpers.dense import DenseModel, mlp
from tests.helpers.estimates import backward, flat, watched
from tests.helpers.losses import inputs, values
from tests.helpers.ranks import RankPool

STANDARD_ERRORS = 5


def network() -> nn.Sequential:
    """Build a smooth network with reproducible weights."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return mlp(hidden=3).double()


def far(z: Tensor, t: Tensor) -> Tensor:
    """Return a loss with a strong Hessian of either sign."""
    return F.mse_loss(z, 5 * t)


def estimates(distribution: Any, draws: int, **options: Any) -> Tensor:
    """Return one estimate per row."""
    model, found = network(), []
    oracle = watched(model, None, far)
    for step in range(draws):
        plan = ProbePlan(ProbeSampler(distribution, 4, step).draw, **options)
        oracle.plan = lambda plan=plan: plan
        backward(oracle, (inputs(), values()))
        found.append(flat(hutchinson(oracle)))
    return torch.stack(found)


def truth() -> Tensor:
    """Return the exact diagonal."""
    return DenseModel(network()).hessian((inputs(),), lambda z: far(z, values())).diag()


@pytest.mark.parametrize("distribution", ["rademacher", "normal"])
def test_the_mean_is_the_diagonal(distribution: Any) -> None:
    """Negative entries included."""
    expected = truth()
    assert bool((expected < -0.01).any())
    assert bool((expected > 0.01).any())
    found = estimates(distribution, 500)
    error = found.std(0) / len(found) ** 0.5
    assert bool(((found.mean(0) - expected).abs() <= STANDARD_ERRORS * error + 1e-12).all())
    assert float(error.norm() / expected.norm()) < 0.3


def test_the_variances_of_both_distributions() -> None:
    """Signs have the variance of the entries beside the diagonal, numbers also twice its own."""
    hessian = DenseModel(network()).hessian((inputs(),), lambda z: far(z, values()))
    beside = hessian.square().sum(1) - hessian.diag().square()
    expected = {"rademacher": beside, "normal": beside + 2 * hessian.diag().square()}
    found = {kind: estimates(kind, 400).var(0).sum() for kind in expected}
    for kind, variance in expected.items():
        assert float(found[kind] / variance.sum()) == pytest.approx(1.0, abs=0.25)
    assert found["rademacher"] < found["normal"]


def test_several_probes_are_averaged() -> None:
    """Three probes of one step, against three steps."""
    model = network()
    oracle = watched(model, ProbePlan(ProbeSampler("normal", 4, 0).draw, num_probes=3), far)
    backward(oracle, (inputs(), values()))
    single = []
    for index in range(3):

        def draw(params: Sequence[Tensor], _: int, index: int = index) -> list[Tensor]:
            return ProbeSampler("normal", 4, 0).draw(params, index)

        alone = watched(model, ProbePlan(draw), far)
        backward(alone, (inputs(), values()))
        single.append(flat(hutchinson(alone)))
    backward(oracle, (inputs(), values()))
    found = flat(hutchinson(oracle))
    torch.testing.assert_close(found, torch.stack(single).mean(0))
    # Asking twice changes nothing.
    assert torch.equal(flat(hutchinson(oracle)), found)


def test_all_signs_give_the_diagonal_exactly() -> None:
    """Of a model that is small enough to try all."""
    model = nn.Sequential(nn.Linear(2, 1), nn.Tanh(), nn.Linear(1, 1)).double()
    params = list(model.parameters())
    x, t = torch.tensor([[0.3, -0.8]]).double(), torch.tensor([[2.0]]).double()
    sizes = [p.numel() for p in params]
    found = []
    for row in itertools.product([-1.0, 1.0], repeat=sum(sizes)):
        parts = torch.tensor(row).double().split(sizes)
        z = [part.view_as(p) for part, p in zip(parts, params, strict=True)]
        oracle = watched(model, ProbePlan(lambda params, index, z=z: z), F.mse_loss)
        backward(oracle, (x, t))
        found.append(flat(hutchinson(oracle)))
        oracle.close()
    expected = DenseModel(model).hessian((x,), lambda out: F.mse_loss(out, t)).diag()
    torch.testing.assert_close(torch.stack(found).mean(0), expected, rtol=1e-10, atol=1e-12)


# Probes


def _params() -> list[Tensor]:
    return [torch.zeros(40, 30), torch.zeros(7), torch.zeros(()), torch.zeros(0), torch.zeros(3, 3)]


def test_signs() -> None:
    probe = ProbeSampler("rademacher", 1, 2).draw(_params(), 0)
    assert [z.shape for z in probe] == [p.shape for p in _params()]
    drawn = flat(probe)
    assert set(drawn.tolist()) == {-1.0, 1.0}
    assert abs(float(drawn.mean())) < 5 / len(drawn) ** 0.5
    # Neighbors, and those of other bytes, are independent.
    for lag in (1, 2, 7, 8, 16, 30):
        correlation = float((drawn[lag:] * drawn[:-lag]).mean())
        assert abs(correlation) < 5 / len(drawn) ** 0.5


def test_numbers() -> None:
    drawn = flat(ProbeSampler("normal", 1, 2).draw(_params(), 0))
    assert float(drawn.mean()) == pytest.approx(0.0, abs=0.15)
    assert float(drawn.std()) == pytest.approx(1.0, abs=0.1)
    assert float(drawn.pow(4).mean()) == pytest.approx(3.0, abs=0.8)


@pytest.mark.parametrize("distribution", ["rademacher", "normal"])
def test_streams(distribution: Any) -> None:
    """Seed, step and number of the probe; the global stream is left alone."""
    state = torch.get_rng_state()

    def draw(seed: int, step: int, index: int) -> list[float]:
        return flat(ProbeSampler(distribution, seed, step).draw(_params(), index)).tolist()

    first = draw(0, 0, 0)
    assert draw(0, 0, 0) == first
    others = [first, draw(1, 0, 0), draw(0, 1, 0), draw(0, 0, 1)]
    assert all(one != other for one, other in itertools.combinations(others, 2))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
@pytest.mark.parametrize("distribution", ["rademacher", "normal"])
def test_precision(distribution: Any, dtype: torch.dtype, expected: torch.dtype) -> None:
    (probe,) = ProbeSampler(distribution, 0, 0).draw([torch.zeros(5, dtype=dtype)], 0)
    assert probe.dtype is expected


def estimate_of_rank(batch_of: dict[int, tuple[Tensor, Tensor]]) -> tuple[list[float], list[float]]:
    """Return a probe and the estimate on this rank; runs on the ranks."""
    from lightning_curvature.oracle.ranks import mean_over_ranks
    from tests.helpers.ranks import world

    model = network()
    sampler = ProbeSampler("rademacher", 4, 0)
    oracle = watched(model, ProbePlan(sampler.draw), far, mean=mean_over_ranks)
    torch.manual_seed(world()[0])
    backward(oracle, batch_of[world()[0]])
    return flat(sampler.draw(oracle.params, 0)).tolist(), flat(hutchinson(oracle)).tolist()


@pytest.mark.ddp
def test_ranks_share_their_probes(ranks: RankPool) -> None:
    """So that the average is the product with the Hessian of the mean."""
    x, t = inputs(), values()
    (z, found), (other_z, other) = ranks.run(
        estimate_of_rank, {0: (x[:3], t[:3]), 1: (x[3:], t[3:])}
    )
    assert z == other_z
    assert found == other
    probe = torch.tensor(z, dtype=torch.float64)
    hessian = DenseModel(network()).hessian((x,), lambda out: far(out, t))
    torch.testing.assert_close(
        torch.tensor(found, dtype=torch.float64), probe * (hessian @ probe), rtol=1e-9, atol=1e-9
    )
