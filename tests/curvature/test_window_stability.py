"""Digits that GradientWindow (curvature/gradient_window.py) keeps where a recursion loses them."""

import pytest
import torch
from torch import Tensor

from lightning_curvature.curvature.gradient_window import GradientWindow
from tests.helpers.mfac_recursion import dynamic_product

COLUMNS = 5000
TOLERANCE = 1e-5


def gradients_of(kind: str, m: int) -> Tensor:
    """Return gradients of length about 1 in float32; correlated ones differ by little."""
    generator = torch.Generator().manual_seed(11)
    rows = torch.randn(m, COLUMNS, generator=generator, dtype=torch.float64)
    if kind == "correlated":
        common = torch.randn(COLUMNS, generator=generator, dtype=torch.float64)
        rows = common + 0.1 * rows
    return (rows / rows.norm(dim=1, keepdim=True)).float()


def exact_direction(rows: Tensor, damping: float) -> Tensor:
    """Return H^{-1} g of the last row by singular values, none of which is a difference."""
    u, s, v = torch.linalg.svd(rows.double(), full_matrices=False)
    return v.T @ (u[-1] * s / (damping + s.square() / len(rows)))


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("m", [64, 256])
@pytest.mark.parametrize("kind", ["independent", "correlated"])
def test_the_newest_direction_keeps_its_digits(kind: str, m: int) -> None:
    rows = gradients_of(kind, m)
    # The ring has wrapped: the newest gradient is not in the last slot.
    window = GradientWindow(m, COLUMNS, row_dtype="float32", gram_dtype="float64")
    for row in torch.cat([torch.ones(m // 2, COLUMNS), rows]):
        window.insert(row)
    for damping in (1e-5, 1e-6, 1e-7, 1e-8):
        exact = exact_direction(rows, damping)
        ours = error(window.newest_direction(damping), exact)
        recursion = error(dynamic_product(rows, rows[-1], damping), exact)
        assert ours <= TOLERANCE
        # A few digits at the published dampings, none at the smallest.
        assert recursion > 10 * ours
        if damping == 1e-8:
            assert recursion > (0.5 if kind == "correlated" else 0.05)


@pytest.mark.parametrize("m", [64, 256])
def test_inner_products_in_float32_cost_digits(m: int) -> None:
    """So the argument ``gram_dtype`` does something, and its default is the better one."""
    rows = gradients_of("correlated", m)
    exact = exact_direction(rows, 1e-8)
    errors = {}
    for gram_dtype in ("float64", "float32"):
        window = GradientWindow(m, COLUMNS, gram_dtype=gram_dtype)
        for row in rows:
            window.insert(row)
        errors[gram_dtype] = error(window.newest_direction(1e-8), exact)
    assert errors["float64"] <= TOLERANCE < errors["float32"] < 1e-2


def test_in_float64_both_agree() -> None:
    """The recursion that fails above is the right one: with enough digits it is exact."""
    rows = gradients_of("correlated", 64).double()
    exact = exact_direction(rows, 1e-5)
    window = GradientWindow(64, COLUMNS, dtype=torch.float64)
    for row in rows:
        window.insert(row)
    assert error(window.newest_direction(1e-5), exact) < 1e-11
    assert error(dynamic_product(rows, rows[-1], 1e-5), exact) < 1e-9
