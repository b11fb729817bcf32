"""Tests of lightning_curvature/curvature/query_schedule.py."""

import math
from typing import Any

import pytest

from lightning_curvature.curvature.query_schedule import adazeta_num_samples, linear_num_samples


def test_adazeta_by_the_formula() -> None:
    for epochs in (2, 5, 30):
        power = math.log(20 / 0.85) / math.log(epochs)
        expected = [min(max(int(0.85 * e**power), 1), 15) for e in range(epochs)]
        assert [adazeta_num_samples(epoch, epochs) for epoch in range(epochs)] == expected


def test_adazeta_ends_at_its_aim() -> None:
    assert adazeta_num_samples(7, 7, nominal=20, largest=50) == 20
    assert adazeta_num_samples(9, 7, nominal=20, largest=50) == 20
    assert adazeta_num_samples(6, 7, nominal=20, largest=4) == 4
    assert [adazeta_num_samples(epoch, 1) for epoch in range(3)] == [1, 15, 15]


@pytest.mark.parametrize("shrink", [0.1, 0.85, 3.0])
def test_adazeta_never_falls(shrink: float) -> None:
    found = [adazeta_num_samples(epoch, 12, shrink=shrink) for epoch in range(15)]
    assert found == sorted(found)
    assert found[0] == 1


def test_linear() -> None:
    assert [linear_num_samples(step, 10, 5) for step in range(12)] == [
        *(1, 1, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5),
    ]
    assert {linear_num_samples(step, 10, 1) for step in range(12)} == {1}


@pytest.mark.parametrize(
    ("function", "arguments", "error", "message"),
    [
        (adazeta_num_samples, (-1, 3), ValueError, "Invalid epoch=-1: must be >= 0"),
        (adazeta_num_samples, (0, 0), ValueError, "Invalid num_epochs=0"),
        (adazeta_num_samples, (0, 3, 0), ValueError, "Invalid nominal=0"),
        (adazeta_num_samples, (0, 3, 2.0), TypeError, "Invalid nominal=2"),
        (adazeta_num_samples, (0, 3, 2, 0.0), ValueError, "Invalid shrink=0"),
        (adazeta_num_samples, (0, 3, 2, 2.0), ValueError, "Invalid shrink=2.0: must be below"),
        (adazeta_num_samples, (0, 3, 2, 0.5, 0), ValueError, "Invalid largest=0"),
        (linear_num_samples, (-1, 3, 4), ValueError, "Invalid step=-1"),
        (linear_num_samples, (0, 0, 4), ValueError, "Invalid num_steps=0"),
        (linear_num_samples, (0, 3, 0), ValueError, "Invalid largest=0"),
    ],
)
def test_errors(function: Any, arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        function(*arguments)
