"""Tests of lightning_curvature/curvature/quadratic.py."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_curvature.curvature.quadratic import model_change, reduction_ratio, step_length

TINY = torch.finfo(torch.float64).tiny
finite = st.floats(-1e6, 1e6)
positive = st.floats(1e-6, 1e6)
repeatable = settings(derandomize=True, database=None, deadline=None)


def scalar(value: float) -> Tensor:
    """Return a 0-dim float64 tensor."""
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize(
    ("slope", "curvature", "damping", "options", "length", "kappa"),
    [
        (2.0, 3.0, 1.0, {}, 0.5, 4.0),
        (-2.0, 3.0, 1.0, {}, -0.5, 4.0),  # momentum may point uphill
        (0.0, 3.0, 1.0, {}, 0.0, 4.0),
        # Negative: its magnitude, plus the damping.
        (2.0, -3.0, 1.0, {}, 0.5, 4.0),
        # Small and negative: the damping outweighs it, nothing needs a guard.
        (2.0, -0.5, 1.0, {}, 4.0, 0.5),
        # The official variants.
        (2.0, -3.0, 1.0, {"guard": False}, -1.0, -2.0),
        (2.0, -3.0, 1.0, {"saddle_free": True}, 1.0, 2.0),
        (2.0, -3.0, 1.0, {"saddle_free": True, "guard": False}, 1.0, 2.0),
        # A curvature that is not finite leaves the scale to the damping.
        (2.0, math.nan, 1.0, {}, 2.0, 1.0),
        (2.0, math.inf, 1.0, {}, 2.0, 1.0),
        (2.0, -math.inf, 1.0, {}, 2.0, 1.0),
        (2.0, 0.0, 1.0, {}, 2.0, 1.0),
        (2.0, 1.0, math.inf, {}, 0.0, math.inf),
    ],
)
def test_step_length(
    slope: float,
    curvature: float,
    damping: float,
    options: dict[str, bool],
    length: float,
    kappa: float,
) -> None:
    answer = step_length(scalar(slope), scalar(curvature), scalar(damping), **options)
    assert answer.found.item()
    assert answer.length.item() == length
    assert answer.kappa.item() == kappa


@pytest.mark.parametrize(
    ("slope", "curvature", "damping", "options"),
    [
        (1.0, 0.0, 0.0, {}),
        (0.0, 0.0, 0.0, {}),
        (1.0, TINY / 2, 0.0, {}),
        (1.0, math.nan, 0.0, {}),
        (1.0, 1.0, math.nan, {}),
        (math.nan, 1.0, 1.0, {}),
        (math.inf, 1.0, 1.0, {}),
        (1e300, 1e-300, 0.0, {}),  # overflow
        (1.0, 0.0, 0.0, {"guard": False}),
        (1.0, math.nan, 1.0, {"guard": False}),
        (1.0, -1.0, 1.0, {"guard": False}),
        (1.0, -1.0, 1.0, {"saddle_free": True, "guard": False}),
    ],
)
def test_no_step_length(
    slope: float, curvature: float, damping: float, options: dict[str, bool]
) -> None:
    answer = step_length(scalar(slope), scalar(curvature), scalar(damping), **options)
    assert not answer.found.item()
    assert answer.length.item() == 0.0


@given(slope=finite, curvature=finite, damping=st.floats(0, 1e6))
@example(slope=1.0, curvature=3.4e-301, damping=0.0)  # the square of the length overflows
@repeatable
def test_guarded_step_never_climbs_its_model(
    slope: float, curvature: float, damping: float
) -> None:
    """The kappa in use is positive, so q <= 0, and the length has the sign of the slope."""
    answer = step_length(scalar(slope), scalar(curvature), scalar(damping))
    assert math.isfinite(answer.length.item())
    if answer.found.item():
        assert answer.kappa.item() > 0
        assert answer.length.item() * slope >= 0
        assert model_change(answer.length, scalar(slope), answer.kappa).item() <= 0


@given(slope=finite, kappa=positive, other=finite)
@repeatable
def test_minimum_of_the_model(slope: float, kappa: float, other: float) -> None:
    """At the minimizer q = -a t / 2, and no other step promises more."""
    best = step_length(scalar(slope), scalar(kappa), scalar(0.0)).length
    lowest = model_change(best, scalar(slope), scalar(kappa)).item()
    assert lowest == pytest.approx(-0.5 * slope * best.item(), rel=1e-12, abs=1e-300)
    elsewhere = model_change(best + other, scalar(slope), scalar(kappa)).item()
    assert elsewhere >= lowest - 1e-9 * (abs(lowest) + abs(elsewhere))


def test_model_change() -> None:
    assert model_change(scalar(2.0), scalar(3.0), scalar(5.0)).item() == 4.0


def test_reduction_ratio() -> None:
    assert reduction_ratio(scalar(1.0), scalar(2.0), scalar(-4.0)).item() == 0.25
    assert reduction_ratio(scalar(3.0), scalar(2.0), scalar(-4.0)).item() == -0.25
    # No step, nothing promised: the ratio says nothing.
    assert math.isnan(reduction_ratio(scalar(2.0), scalar(2.0), scalar(0.0)).item())
    assert math.isnan(reduction_ratio(scalar(math.nan), scalar(2.0), scalar(-1.0)).item())


def test_dtype_is_kept() -> None:
    answer = step_length(torch.tensor(1.0), torch.tensor(2.0), torch.tensor(0.5))
    assert answer.length.dtype is answer.kappa.dtype is torch.float32
    assert answer.found.dtype is torch.bool
