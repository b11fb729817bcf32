"""Tests of lightning_curvature/curvature/damping.py."""

import math

import pytest
import torch
from torch import Tensor

from lightning_curvature.curvature.damping import accept_or_raise, clamp, levenberg_marquardt

FACTORS = {"increase_factor": 3.0, "decrease_factor": 0.25}


def scalar(value: float) -> Tensor:
    """Return a 0-dim float64 tensor."""
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        (-math.inf, 6.0),
        (-1.0, 6.0),
        (0.0, 6.0),
        (0.2499, 6.0),
        (0.25, 2.0),
        (0.5, 2.0),
        (0.75, 2.0),
        (0.7501, 0.5),
        (2.0, 0.5),
        (math.inf, 0.5),
        (math.nan, 2.0),
    ],
)
def test_levenberg_marquardt(ratio: float, expected: float) -> None:
    assert levenberg_marquardt(scalar(2.0), scalar(ratio), **FACTORS).item() == expected


@pytest.mark.parametrize("ratio", [-1.0, 0.5, 2.0, math.nan, math.inf])
@pytest.mark.parametrize("failed", [True, False])
def test_a_failed_step_raises_whatever_the_ratio_says(ratio: float, failed: bool) -> None:
    usual = levenberg_marquardt(scalar(2.0), scalar(ratio), **FACTORS).item()
    told = levenberg_marquardt(scalar(2.0), scalar(ratio), failed=torch.tensor(failed), **FACTORS)
    assert told.item() == (6.0 if failed else usual)


def test_levenberg_marquardt_limits_of_trust() -> None:
    adapted = [
        levenberg_marquardt(scalar(1.0), scalar(ratio), low=0.1, high=0.9, **FACTORS).item()
        for ratio in (0.05, 0.5, 0.95)
    ]
    assert adapted == [3.0, 1.0, 0.25]


@pytest.mark.parametrize(("accepted", "expected"), [(True, 0.5), (False, 6.0)])
def test_accept_or_raise(accepted: bool, expected: float) -> None:
    assert accept_or_raise(scalar(2.0), torch.tensor(accepted), **FACTORS).item() == expected


@pytest.mark.parametrize(
    ("value", "low", "high", "expected"),
    [
        (1e-9, 1e-8, 1e8, 1e-8),
        (1e9, 1e-8, 1e8, 1e8),
        (1.0, 1e-8, 1e8, 1.0),
        (1e300, 0.0, math.inf, 1e300),
        (0.0, 0.0, math.inf, 0.0),
        (1e300, 0.5, math.inf, 1e300),
        (0.1, 0.5, math.inf, 0.5),
    ],
)
def test_clamp(value: float, low: float, high: float, expected: float) -> None:
    assert clamp(scalar(value), low, high).item() == expected


def test_dtype_is_kept() -> None:
    damping = torch.tensor(1.0, dtype=torch.float32)
    ratio = torch.tensor(0.0, dtype=torch.float32)
    assert levenberg_marquardt(damping, ratio, **FACTORS).dtype is torch.float32
    assert accept_or_raise(damping, torch.tensor(True), **FACTORS).dtype is torch.float32
    assert clamp(damping, 0.0, 1.0).dtype is torch.float32
