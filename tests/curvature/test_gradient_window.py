"""Tests of lightning_curvature/curvature/gradient_window.py; digits: test_window_stability.py."""

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_curvature import GradientWindow
from lightning_curvature.curvature import gradient_window, window_rows

EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}
# More columns than rows; fewer; as many; one of either.
SIZES = [(4, 11), (9, 5), (6, 6), (1, 7), (3, 1), (1, 1)]
DAMPINGS = [1e-8, 1e-5, 1e-2, 1.0]

sizes = pytest.mark.parametrize(("m", "d"), SIZES)
dampings = pytest.mark.parametrize("damping", DAMPINGS)


@pytest.fixture(params=["numbers", "tensors"])
def slots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Look at the number of the slot, or do as where that would wait for the device."""
    kind: str = request.param
    if kind == "tensors":
        monkeypatch.setattr(gradient_window, "_can_look", lambda _: False)
    return kind


def drawn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def filled(gradients: Tensor, m: int | None = None, **options: Any) -> GradientWindow:
    """Insert gradients, from the first to the last."""
    m = len(gradients) if m is None else m
    window = GradientWindow(m, gradients.shape[1], **{"dtype": gradients.dtype, **options})
    for gradient in gradients:
        window.insert(gradient)
    return window


def solved(gradients: Tensor, damping: float, size: int, x: Tensor) -> Tensor:
    """Return H^{-1} x by singular values: a dense solver has fewer digits where H is singular."""
    _, s, v = torch.linalg.svd(gradients.double(), full_matrices=True)
    values = torch.full((len(v),), damping, dtype=torch.float64)
    values[: len(s)] += s.square() / size
    inverse: Tensor = v.T @ (v / values.unsqueeze(1))
    return inverse @ x.double()


# Exact


@sizes
@dampings
@pytest.mark.usefixtures("slots")
def test_dense(m: int, d: int, damping: float) -> None:
    """All products, while the window fills and after it has come around."""
    gradients = drawn(2 * m + 1, d)
    window = GradientWindow(m, d, dtype=torch.float64)
    x, several = drawn(d, seed=1), drawn(d, 3, seed=2)
    for number, gradient in enumerate(gradients, start=1):
        window.insert(gradient)
        there = gradients[max(number - m, 0) : number]
        # The inverse is a difference of what 1 / damping is the size of.
        close: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-12 / damping}
        inverse = window.inverse(damping)
        assert inverse.good
        for found, vector in (
            (window.newest_direction(damping), gradient),
            (inverse.newest_direction(), gradient),
            (inverse.newest_direction_and(x), gradient + x),
            (window.inverse_product(x, damping), x),
            (inverse @ several, several),
        ):
            expected = solved(there, damping, m, vector)
            torch.testing.assert_close(found, expected, **close)


def test_the_size_of_the_newest_direction() -> None:
    """It is right in each digit also where H is nearly singular: no difference is taken."""
    gradients = drawn(5, 40)
    window = filled(gradients)
    u, s, v = torch.linalg.svd(gradients, full_matrices=False)
    for damping in (1e-14, 1e-8, 1e-2, 1e4):
        exact = v.T @ (u[-1] * s / (damping + s.square() / 5))
        torch.testing.assert_close(window.newest_direction(damping), exact, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("normalization", ["capacity", "count"])
@dampings
def test_a_first_gradient(normalization: Any, damping: float) -> None:
    """The rank-one formula, with the m of the formula or that of the gradients there are."""
    (g,) = drawn(1, 9)
    m = 7 if normalization == "capacity" else 1
    window = GradientWindow(7, 9, window_normalization=normalization, dtype=torch.float64)
    window.insert(g)
    expected = g / (damping + g.dot(g) / m)
    torch.testing.assert_close(window.newest_direction(damping), expected, rtol=1e-13, atol=0.0)


def test_one_gradient_is_a_window() -> None:
    for g in drawn(3, 9):
        window = filled(torch.stack([drawn(9, seed=5), g]), m=1)
        expected = g / (0.1 + g.dot(g))
        torch.testing.assert_close(window.newest_direction(0.1), expected, rtol=1e-13, atol=0.0)


@pytest.mark.parametrize("damping", [1e-3, 0.5])
def test_divided_by_the_number_of_gradients(damping: float) -> None:
    gradients, x = drawn(12, 6), drawn(6, seed=1)
    window = GradientWindow(5, 6, window_normalization="count", dtype=torch.float64)
    torch.testing.assert_close(window.inverse_product(x, damping), x / damping)
    for number, gradient in enumerate(gradients, start=1):
        window.insert(gradient)
        there = gradients[max(number - 5, 0) : number]
        found = window.newest_direction(damping)
        expected = solved(there, damping, len(there), gradient)
        torch.testing.assert_close(found, expected, **EXACT)
        expected = solved(there, damping, len(there), x)
        torch.testing.assert_close(window.inverse_product(x, damping), expected, **EXACT)


def test_the_example_of_an_empty_window() -> None:
    """Rows of zeros are no gradients: H is the damping alone."""
    x = drawn(6, 2)
    window = GradientWindow(4, 6, dtype=torch.float64)
    torch.testing.assert_close(window.inverse(0.25) @ x, 4 * x, rtol=1e-15, atol=0.0)
    assert torch.equal(window.newest_direction(0.25), torch.zeros(6, dtype=torch.float64))
    assert [int(window.inserted), int(window.count), int(window.position)] == [0, 0, 0]


@dampings
def test_gradients_that_are_the_same_and_gradients_of_zeros(damping: float) -> None:
    """G G^T is singular, its core is not."""
    first, second = drawn(2, 8)
    zeros = torch.zeros_like(first)
    for rows in ([first] * 4, [first, second, first, first], [zeros, second, zeros, first]):
        gradients = torch.stack(rows)
        window = filled(gradients)
        assert window.inverse(damping).good
        exact = solved(gradients, damping, 4, gradients[-1])
        close: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-14 / damping}
        torch.testing.assert_close(window.newest_direction(damping), exact, **close)
    window.insert(zeros)
    assert torch.equal(window.newest_direction(damping), zeros)


# The ring


@sizes
def test_only_the_last_gradients_count(m: int, d: int) -> None:
    gradients, x = drawn(3 * m + 2, d), drawn(d, seed=1)
    window, fresh = filled(gradients, m), filled(gradients[-m:])
    torch.testing.assert_close(window.newest_direction(0.1), fresh.newest_direction(0.1), **EXACT)
    products = [w.inverse_product(x, 0.1) for w in (window, fresh)]
    torch.testing.assert_close(products[0], products[1], **EXACT)
    shift = (3 * m + 2) % m
    assert torch.equal(window.rows().roll(-shift, 0), gradients[-m:])
    assert [int(window.inserted), int(window.count)] == [3 * m + 2, m]
    assert int(window.position) == shift


def test_the_order_of_older_gradients_does_not_matter() -> None:
    gradients, x = drawn(6, 9), drawn(9, seed=1)
    for order in ([3, 1, 0, 4, 2, 5], [4, 3, 2, 1, 0, 5]):
        one, other = filled(gradients), filled(gradients[order])
        torch.testing.assert_close(one.newest_direction(0.1), other.newest_direction(0.1), **EXACT)
        products = [w.inverse_product(x, 0.1) for w in (one, other)]
        torch.testing.assert_close(products[0], products[1], **EXACT)


@pytest.mark.parametrize("row_dtype", ["auto", "bfloat16", "float16"])
@pytest.mark.parametrize("width", [4096, 7])
def test_inner_products_do_not_drift(
    row_dtype: Any, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After ten times around they are those of the rows as they are kept."""
    monkeypatch.setattr(window_rows, "_CPU_WIDTHS", (width, width))
    gradients = drawn(83, 50, dtype=torch.float32)
    gradients *= 10.0 ** (torch.arange(83) % 7 - 3).unsqueeze(1)
    window = filled(gradients, m=8, row_dtype=row_dtype)
    rows = window.rows().double()
    expected = rows @ rows.T
    assert window.gram.dtype == torch.float64
    assert torch.equal(window.gram, window.gram.T)
    scale = expected.diagonal().sqrt()
    error = (window.gram - expected).abs() / (scale * scale.unsqueeze(1))
    assert error.max() < 1e-14


def test_inner_products_in_float32() -> None:
    """They are near, and are what makes `gram_dtype` a choice."""
    gradients = 1 + 0.1 * drawn(8, 30_000, dtype=torch.float32)
    exact = gradients.double() @ gradients.double().T
    errors = {}
    for kind in ("float64", "float32"):
        found = filled(gradients, gram_dtype=kind).gram
        errors[kind] = float(((found - exact) / exact).abs().max())
    assert errors["float64"] < 1e-13
    assert 1e-9 < errors["float32"] < 1e-6


@pytest.mark.usefixtures("slots")
@pytest.mark.parametrize("row_dtype", ["auto", "bfloat16", "float16"])
@pytest.mark.parametrize("gram_dtype", ["float64", "float32"])
@pytest.mark.parametrize("count", [0, 2, 5, 13])
def test_a_gradient_that_is_not_usable_changes_nothing(
    row_dtype: Any, gram_dtype: Any, count: int
) -> None:
    """Bit for bit; a usable one is as if nobody had asked."""
    gradients = drawn(16, 3000, dtype=torch.float32)
    options = {"row_dtype": row_dtype, "gram_dtype": gram_dtype}
    window = filled(gradients[:count], m=5, **options)
    before = copy.deepcopy(window.state())
    window.insert(1e3 * gradients[15], torch.tensor(False))
    after = window.state()
    assert all(torch.equal(after[key], before[key]) for key in before)
    window.insert(gradients[14], torch.tensor(True))
    other = filled(torch.cat([gradients[:count], gradients[14:15]]), m=5, **options)
    assert all(torch.equal(window.state()[key], x) for key, x in other.state().items())


@pytest.mark.parametrize("row_dtype", ["auto", "bfloat16", "float16"])
@pytest.mark.parametrize("m", [1, 5])
def test_slots_that_nobody_looks_at(
    row_dtype: Any, m: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where reading the number would wait for the device: the same bits."""
    gradients, x = drawn(13, 300, dtype=torch.float32), drawn(300, dtype=torch.float32, seed=1)
    found = []
    for look in (True, False):
        monkeypatch.setattr(gradient_window, "_can_look", lambda _, look=look: look)
        window = filled(gradients, m, row_dtype=row_dtype)
        inverse = window.inverse(torch.tensor(0.1))
        both = inverse.newest_direction_and(x)
        found.append([window.newest_direction(0.1), inverse @ x, both, *window.state().values()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("width", [1, 3, 64])
def test_chunks_of_columns(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    gradients, x = drawn(7, 20), drawn(20, 2, seed=1)
    whole = filled(gradients, m=4)
    monkeypatch.setattr(window_rows, "_CPU_WIDTHS", (width, width))
    parts = filled(gradients, m=4)
    assert torch.equal(parts.rows(), whole.rows())
    torch.testing.assert_close(parts.newest_direction(0.1), whole.newest_direction(0.1), **EXACT)
    products = [w.inverse_product(x, 0.1) for w in (parts, whole)]
    torch.testing.assert_close(products[0], products[1], **EXACT)


def test_many_columns() -> None:
    """More than a chunk has, and a number that no width divides."""
    gradients, x = drawn(4, 20_011), drawn(20_011, seed=1)
    window = filled(gradients, m=3)
    kept = gradients[1:]
    core = 3 * 1e-3 * torch.eye(3, dtype=torch.float64) + kept @ kept.T
    expected = 3 * kept.T @ torch.linalg.inv(core)[:, 2]
    torch.testing.assert_close(window.newest_direction(1e-3), expected, rtol=1e-9, atol=1e-12)
    expected = (x - kept.T @ torch.linalg.solve(core, kept @ x)) / 1e-3
    torch.testing.assert_close(window.inverse_product(x, 1e-3), expected, rtol=1e-9, atol=1e-7)


# Refused


def test_refused() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"num_grads": 0}, "Invalid num_grads=0"),
        ({"num_columns": 0}, "Invalid num_columns=0"),
        ({"window_normalization": "size"}, "Invalid window_normalization='size'"),
        ({"row_dtype": "float64"}, "Invalid row_dtype='float64'"),
        ({"gram_dtype": "bfloat16"}, "Invalid gram_dtype='bfloat16'"),
        ({"placement": "disk"}, "Invalid placement='disk'"),
    ]
    for options, text in cases:
        with pytest.raises(ValueError, match=text):
            GradientWindow(**{"num_grads": 2, "num_columns": 3, **options})
    window = GradientWindow(2, 3)
    with pytest.raises(ValueError, match=r"gradient of shape \[4\]: must be \[3\]"):
        window.insert(torch.ones(4))
    for damping in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="Invalid damping="):
            window.inverse(damping)
    with pytest.raises(TypeError, match="damping"):
        window.inverse("1e-5")  # type: ignore[arg-type]


def test_nothing_is_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        filled(drawn(3, 4)).newest_direction(1e-300)
