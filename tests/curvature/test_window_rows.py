"""Tests of lightning_curvature/curvature/window_rows.py."""

import pytest
import torch
from torch import Tensor

from lightning_curvature.curvature import window_rows
from lightning_curvature.curvature.window_rows import WindowRows, row_dtype_of

# One chunk; two that are full; several that are not; fewer columns than rows; a single number.
SIZES = [(4, 100), (3, 2 * 8192), (5, 20_001), (7, 3), (1, 1)]
HALF = [torch.bfloat16, torch.float16]

sizes = pytest.mark.parametrize(("m", "d"), SIZES)
half = pytest.mark.parametrize("stored", HALF, ids=["bfloat16", "float16"])


def drawn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def filled(matrix: Tensor, stored: torch.dtype | None = None, **options: object) -> WindowRows:
    """Return rows that hold a matrix, row by row."""
    m, d = matrix.shape
    made = {"dtype": matrix.dtype, "stored": stored or matrix.dtype, **options}
    rows = WindowRows(m, d, **made)  # type: ignore[arg-type]
    for index, vector in enumerate(matrix):
        rows.write(index, *rows.rounded(vector))
    return rows


def dense(rows: WindowRows) -> Tensor:
    """Return the numbers that the rows stand for, in float64."""
    return rows.matrix().double() * rows.scales.double().unsqueeze(1)


# Products


@sizes
@pytest.mark.parametrize("k", [None, 1, 3])
def test_products(m: int, d: int, k: int | None) -> None:
    matrix = drawn(m, d)
    rows = filled(matrix)
    x = drawn(d, seed=1) if k is None else drawn(d, k, seed=1)
    torch.testing.assert_close(rows.products(x), matrix @ x, rtol=1e-12, atol=1e-10)
    c = drawn(m, seed=2) if k is None else drawn(m, k, seed=2)
    torch.testing.assert_close(rows.combination(c), matrix.T @ c, rtol=1e-12, atol=1e-12)


@sizes
@pytest.mark.parametrize("stored", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("part", [1 << 19, 1], ids=["many at a time", "row by row"])
def test_products_of_rows_in_fewer_bits(
    m: int, d: int, stored: torch.dtype, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products are those of the numbers that are kept, summed in float64."""
    monkeypatch.setattr(window_rows, "_PART", part)
    matrix = drawn(m, d, dtype=torch.float32)
    rows = filled(matrix, stored)
    x = drawn(d, dtype=torch.float32, seed=1)
    expected = dense(rows) @ x.double()
    assert rows.products(x).dtype == torch.float64
    torch.testing.assert_close(rows.products(x), expected, rtol=1e-12, atol=1e-10)
    c = drawn(m, seed=2)
    found = rows.combination(c)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), dense(rows).T @ c, rtol=1e-5, atol=1e-5)


def test_sums_in_float64_and_float32() -> None:
    """In float32 digits are lost inside of a chunk, but not from chunk to chunk."""
    matrix = 1 + 0.01 * drawn(2, 80_000, dtype=torch.float32)
    exact = matrix.double() @ matrix[0].double()
    errors = {}
    for kind in (torch.float64, torch.float32):
        found = filled(matrix, gram_dtype=kind).products(matrix[0])
        assert found.dtype == torch.float64
        errors[kind] = float(((found - exact) / exact).abs().max())
    assert errors[torch.float64] < 1e-13
    assert 1e-9 < errors[torch.float32] < 1e-6


def test_rows_are_replaced_in_place() -> None:
    """By a number, or by one that only the device knows: the same bits."""
    matrix = drawn(4, 9000, dtype=torch.float32)
    for stored in (torch.float32, *HALF):
        one, other = filled(matrix, stored), filled(matrix, stored)
        row, scale = one.rounded(1e3 * drawn(9000, dtype=torch.float32, seed=3))
        one.write(2, row, scale)
        other.write(torch.tensor(2), row, scale)
        for rows in (one, other):
            for index in (2, torch.tensor(2)):
                found, its_scale = rows.read(index)
                assert torch.equal(found, row)
                assert torch.equal(its_scale, scale)
        assert torch.equal(one.matrix(), other.matrix())
        assert torch.equal(one.scales, other.scales)
        assert torch.equal(dense(one)[[0, 1, 3]], dense(filled(matrix, stored))[[0, 1, 3]])


@pytest.mark.parametrize("index", [1, torch.tensor(1)], ids=["number", "tensor"])
def test_a_row_that_was_read_is_a_copy(index: int | Tensor) -> None:
    rows = filled(drawn(3, 50))
    row, scale = rows.read(index)
    before = row.clone()
    rows.write(1, torch.zeros(50, dtype=torch.float64), 2 * scale)
    assert torch.equal(row, before)
    assert float(scale) == 1


# Rows in half precision


@half
@pytest.mark.parametrize("size", [1e-43, 1e-38, 1e-30, 1e-5, 1.0, 1e5, 1e30, 3.4e38])
def test_rows_of_any_size_keep_their_digits(stored: torch.dtype, size: float) -> None:
    """Each row has a scale, a power of two, so the largest entries lose their last bits only."""
    vector = torch.tensor([1.0, -0.7, 0.013, 0.0]) * size
    rows = filled(torch.stack([vector, torch.ones(4)]), stored)
    assert rows.scales.isfinite().all()
    assert (torch.frexp(rows.scales).mantissa == 0.5).all()
    found = dense(rows)
    epsilon = torch.finfo(stored).eps
    expected = vector.double()
    # Numbers this small have few bits to begin with.
    least = 2e-45 if size < 1e-37 else 0.0
    torch.testing.assert_close(found[0], expected, rtol=epsilon / 2, atol=least)
    assert torch.equal(found[1], torch.ones(4, dtype=torch.float64))


@half
def test_a_row_of_zeros(stored: torch.dtype) -> None:
    rows = filled(torch.zeros(2, 5), stored)
    assert torch.equal(dense(rows), torch.zeros(2, 5, dtype=torch.float64))
    assert torch.equal(rows.products(torch.ones(5)), torch.zeros(2, dtype=torch.float64))


def test_small_entries_beside_large_ones() -> None:
    """With the exponents of float16 pushed to its upper end, entries of 1e-8 are there."""
    vector = torch.tensor([1.0, 1e-3, 1e-6, 1e-8])
    found = dense(filled(vector[None], torch.float16))[0]
    # The last is below the normal numbers of float16.
    error = ((found - vector.double()) / vector.double()).abs()
    assert (error[:3] < 5e-4).all()
    assert error[3] < 0.1


@half
def test_one_scale_for_columns_elsewhere(stored: torch.dtype) -> None:
    """The largest entry of the row may be on another rank."""
    vector = drawn(40, dtype=torch.float32)
    vector[35] = 1000.0
    whole = filled(vector[None], stored)
    rows = WindowRows(1, 20, stored=stored)
    row, scale = rows.rounded(vector[:20], vector.abs().max())
    assert torch.equal(scale, whole.scales[0])
    assert torch.equal(row, whole.matrix()[0, :20])


# All of it


@sizes
@pytest.mark.parametrize("stored", [torch.float32, *HALF], ids=str)
def test_round_trip(m: int, d: int, stored: torch.dtype) -> None:
    rows = filled(drawn(m, d, dtype=torch.float32) * 10.0 ** torch.arange(m).unsqueeze(1), stored)
    matrix = rows.matrix()
    assert matrix.shape == (m, d)
    assert matrix.dtype == stored
    other = WindowRows(m, d, stored=stored)
    other.load(matrix, rows.scales)
    assert torch.equal(other.matrix(), matrix)
    x = drawn(d, dtype=torch.float32, seed=1)
    assert torch.equal(other.products(x), rows.products(x))
    # Neither is the other's memory.
    other.write(0, *other.rounded(torch.zeros(d)))
    assert torch.equal(rows.matrix(), matrix)


def test_bytes() -> None:
    assert WindowRows(8, 1000).nbytes == 8 * 1000 * 4
    assert WindowRows(8, 1000, stored=torch.bfloat16).nbytes == 8 * 1000 * 2
    # Chunks have the same width: less than a number per chunk and row is lost.
    assert WindowRows(8, 20_001).nbytes < 8 * (20_001 + 20) * 4


@pytest.mark.parametrize(
    ("word", "dtype", "expected"),
    [
        ("auto", torch.float32, torch.float32),
        ("auto", torch.float64, torch.float64),
        ("float32", torch.float64, torch.float32),
        ("bfloat16", torch.float32, torch.bfloat16),
        ("float16", torch.float64, torch.float16),
    ],
)
def test_words_for_dtypes(word: str, dtype: torch.dtype, expected: torch.dtype) -> None:
    assert row_dtype_of(word, dtype) is expected  # type: ignore[arg-type]


def test_refused() -> None:
    with pytest.raises(ValueError, match=r"Invalid row_dtype='int8': must be"):
        row_dtype_of("int8", torch.float32)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Invalid num_rows=0"):
        WindowRows(0, 3)
    with pytest.raises(ValueError, match=r"Invalid num_columns=0"):
        WindowRows(3, 0)
