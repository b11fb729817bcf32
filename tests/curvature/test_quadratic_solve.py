"""Tests of lightning_curvature/curvature/quadratic_solve.py."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_curvature.curvature.quadratic_solve import quadratic_change, solve_coefficients


def model(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Draw a positive definite matrix and slopes."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    slopes = torch.randn(2, generator=generator, dtype=torch.float64)
    return (root @ root.T).to(dtype), slopes.to(dtype)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_are_free(seed: int, dtype: torch.dtype) -> None:
    matrix, slopes = model(seed, dtype)
    found = solve_coefficients(matrix, slopes)
    expected = -np.linalg.solve(matrix.double().numpy(), slopes.double().numpy())
    assert found.found
    assert found.values.dtype == dtype
    torch.testing.assert_close(found.values, torch.from_numpy(expected).to(dtype))
    change = quadratic_change(found.values, matrix, slopes)
    torch.testing.assert_close(change, 0.5 * slopes @ found.values)


@pytest.mark.parametrize("seed", range(3))
def test_one_is_given(seed: int) -> None:
    matrix, slopes = model(seed)
    given = torch.tensor(-0.3, dtype=torch.float64)
    m, b = matrix.numpy(), slopes.numpy()
    first = solve_coefficients(matrix, slopes, second=given).values
    expected = [-(b[0] + m[0, 1] * -0.3) / m[0, 0], -0.3]
    torch.testing.assert_close(first, torch.tensor(expected, dtype=torch.float64))
    second = solve_coefficients(matrix, slopes, first=given).values
    expected = [-0.3, -(b[1] + m[0, 1] * -0.3) / m[1, 1]]
    torch.testing.assert_close(second, torch.tensor(expected, dtype=torch.float64))
    both = solve_coefficients(matrix, slopes, first=given, second=2 * given)
    assert both.found
    assert both.values.tolist() == [-0.3, -0.6]


def test_given_zero_coefficients_count() -> None:
    """A number 0 is an answer, not its absence."""
    matrix, slopes = model(0)
    zero = torch.zeros((), dtype=torch.float64)
    assert solve_coefficients(matrix, slopes, first=zero).values[0] == 0
    found = solve_coefficients(matrix, slopes, second=zero).values
    torch.testing.assert_close(found, torch.stack([-slopes[0] / matrix[0, 0], zero]))


@pytest.mark.parametrize("limit", [1e-3, 0.05, 1e3])
@pytest.mark.parametrize("seed", range(4))
def test_the_second_is_bounded(seed: int, limit: float) -> None:
    """Within the bound nothing changes; on it the first one minimizes what is left."""
    matrix, slopes = model(seed)
    free = solve_coefficients(matrix, slopes).values
    found = solve_coefficients(matrix, slopes, second_limit=limit)
    assert found.found
    second = free[1].clamp(-limit, limit)
    first = -(slopes[0] + matrix[0, 1] * second) / matrix[0, 0]
    torch.testing.assert_close(found.values, torch.stack([first, second]))
    if free[1].abs() <= limit:
        assert torch.equal(found.values, free)
    # No other point within the bound is better.
    best = quadratic_change(found.values, matrix, slopes)
    for shift in torch.tensor([[0.01, 0.0], [-0.01, 0.0], [0.0, 0.01], [0.0, -0.01]]).double():
        other = found.values * (1 + shift)
        other[1] = other[1].clamp(-limit, limit)
        assert quadratic_change(other, matrix, slopes) >= best - 1e-12


def test_what_the_bound_leaves_alone() -> None:
    """A second one that is given is not bounded; beside a given first one it is, as at a minimum.

    There, with the first direction zero, only the old update is left.
    """
    matrix, slopes = model(2)
    given = torch.tensor(-3.0, dtype=torch.float64)
    assert solve_coefficients(matrix, slopes, second=given, second_limit=0.1).values[1] == -3
    beside = solve_coefficients(matrix, slopes, first=given, second_limit=1e-3).values
    assert beside[0] == -3
    assert beside[1].abs() == 1e-3
    still = torch.tensor([[0.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    slope = torch.tensor([0.0, 5.0], dtype=torch.float64)
    found = solve_coefficients(still, slope, second_limit=0.5)
    assert found.found
    assert found.values.tolist() == [0.0, -0.5]


@pytest.mark.parametrize("factor", [0.0, 1.0, -2.5, 1e-4, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parallel_directions(factor: float, dtype: torch.dtype) -> None:
    """The second direction is a multiple of the first, or zero: it is left alone."""
    v = torch.tensor([1.0, factor], dtype=torch.float64)
    matrix, slopes = (0.7 * torch.outer(v, v)).to(dtype), (1.3 * v).to(dtype)
    found = solve_coefficients(matrix, slopes)
    assert found.found
    expected = torch.tensor([-1.3 / 0.7, 0.0], dtype=dtype)
    torch.testing.assert_close(found.values, expected)


def test_no_second_direction_and_a_given_rate() -> None:
    matrix = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    found = solve_coefficients(matrix, torch.tensor([1.0, 0.0]), first=torch.tensor(-0.1))
    assert found.found
    torch.testing.assert_close(found.values, torch.tensor([-0.1, 0.0]))


@pytest.mark.parametrize("curvature", [0.0, -1.0, float("nan"), float("inf")])
def test_unusable_models_are_told(curvature: float) -> None:
    matrix = torch.tensor([[curvature, 0.0], [0.0, 1.0]])
    found = solve_coefficients(matrix, torch.tensor([1.0, 1.0]))
    assert found.values.isfinite().all()
    if curvature != float("inf"):
        assert not found.found
        assert not found.values.any()


def test_unusable_slopes_are_told() -> None:
    matrix, slopes = model(0)
    slopes[1] = torch.nan
    found = solve_coefficients(matrix, slopes)
    assert not found.found
    assert not found.values.any()


def test_change_without_damping() -> None:
    matrix, slopes = model(1)
    w = torch.tensor([-0.2, 0.4], dtype=torch.float64)
    damped = matrix + 0.5 * torch.eye(2, dtype=torch.float64)
    difference = quadratic_change(w, damped, slopes) - quadratic_change(w, matrix, slopes)
    torch.testing.assert_close(difference, 0.25 * w @ w)
