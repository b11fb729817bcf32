"""Tests of lightning_curvature/curvature/assignment.py."""

import itertools
import math
import random
from collections.abc import Sequence
from typing import Any

import pytest

from lightning_curvature.curvature.assignment import assign, balance, inverse_cost


def largest_load(costs: Sequence[float], owners: Sequence[int], ranks: int) -> float:
    """Return the cost of the busiest rank."""
    return max(
        sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank)
        for rank in range(ranks)
    )


def test_inverse_cost() -> None:
    assert inverse_cost(10) == 1000
    assert inverse_cost(2, count=5) == 40


@pytest.mark.parametrize(
    ("costs", "ranks", "owners"),
    [
        ([], 3, []),
        ([5.0, 1.0], 1, [0, 0]),
        ([1.0, 5.0], 4, [1, 0]),
        ([2.0, 2.0, 2.0], 3, [0, 1, 2]),  # ties: in the order given, to the lowest rank
        ([0.0, 0.0, 0.0], 2, [0, 1, 0]),  # then the number of jobs counts
        ([3, 3, 2, 2, 2], 2, [0, 1, 0, 1, 0]),  # not the optimum, which is 6
    ],
)
def test_assign(costs: list[float], ranks: int, owners: list[int]) -> None:
    assert assign(costs, ranks) == owners


def test_the_largest_load_is_near_the_best() -> None:
    numbers = random.Random(0)
    for _ in range(20):
        ranks = numbers.choice([2, 3])
        costs = [inverse_cost(numbers.randrange(1, 9)) for _ in range(6)]
        best = min(
            largest_load(costs, owners, ranks)
            for owners in itertools.product(range(ranks), repeat=len(costs))
        )
        owners = assign(costs, ranks)
        assert largest_load(costs, owners, ranks) <= best * (4 / 3 - 1 / (3 * ranks)) + 1e-9
        mean = sum(costs) / ranks
        expected = largest_load(costs, owners, ranks) / mean
        assert balance(costs, owners, ranks) == pytest.approx(expected)


def test_balance() -> None:
    assert balance([1, 1, 1, 1], [0, 1, 0, 1], 2) == 1
    assert balance([1, 1, 1, 1], [0, 0, 0, 0], 4) == 4
    assert balance([0, 0], [0, 0], 2) == 1
    assert balance([], [], 2) == 1


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: assign([1], 0), ValueError, "Invalid ranks=0: must be an integer >= 1."),
        (
            lambda: assign([1, -2], 2),
            ValueError,
            "Invalid costs[1]=-2: must be finite and >= 0.",
        ),
        (
            lambda: balance([math.nan], [0], 2),
            ValueError,
            "Invalid costs[0]=nan: must be finite and >= 0.",
        ),
        (
            lambda: balance([1, 2], [0], 2),
            ValueError,
            "Invalid owners=[0]: must have one rank per cost, here 2.",
        ),
        (lambda: balance([1], [2], 2), ValueError, "Invalid owner 2: must be in [0, 2)."),
        (lambda: balance([1], [-1], 2), ValueError, "Invalid owner -1: must be in [0, 2)."),
        (
            lambda: balance([1], [0], 1.5),  # type: ignore[arg-type]
            TypeError,
            "Invalid ranks=1.5: must be an integer >= 1, got float.",
        ),
    ],
)
def test_errors(call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == text
