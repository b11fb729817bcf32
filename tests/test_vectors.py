"""Tests of lightning_curvature/vectors.py."""

import pytest
import torch
from torch import Tensor

from lightning_curvature import vectors

SHAPES = [(3, 4), (5,), (), (2, 1, 3)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def draw(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Draw one vector."""
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in SHAPES]


def flat(xs: list[Tensor]) -> Tensor:
    """Concatenate in float64."""
    return torch.cat([x.double().reshape(-1) for x in xs])


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ([torch.float32], torch.float32),
        ([torch.bfloat16, torch.float16], torch.float32),
        ([torch.float32, torch.float64], torch.float64),
    ],
)
def test_scalar_dtype(dtypes: list[torch.dtype], expected: torch.dtype) -> None:
    assert vectors.scalar_dtype([torch.zeros(2, dtype=dtype) for dtype in dtypes]) is expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_dot_and_norm(dtype: torch.dtype) -> None:
    """Half-precision vectors are multiplied and summed in float32."""
    xs, ys = draw(dtype), draw(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rtol = 1e-14 if dtype == torch.float64 else 2e-6
    product, size = vectors.dot(xs, ys), vectors.norm(xs)
    assert product.shape == size.shape == ()
    assert product.dtype is size.dtype is wide
    torch.testing.assert_close(product.double(), flat(xs) @ flat(ys), rtol=rtol, atol=rtol)
    torch.testing.assert_close(size.double(), flat(xs).norm(), rtol=rtol, atol=0.0)


def test_dot_of_half_precision_does_not_overflow() -> None:
    xs = [torch.full((1000,), 200.0, dtype=torch.float16)]
    assert vectors.dot(xs, xs).item() == 4e7
    assert vectors.norm(xs).item() == pytest.approx(4e7**0.5)


def test_dot_of_one_tensor_and_of_a_transposed_one() -> None:
    x = torch.arange(6.0, dtype=torch.float64).view(2, 3)
    y = torch.randn(3, 2, dtype=torch.float64)
    torch.testing.assert_close(vectors.dot([x.T], [y]), (x.T * y).sum(), rtol=1e-14, atol=1e-14)


def test_results_are_detached() -> None:
    x = torch.ones(3, requires_grad=True)
    assert not vectors.dot([x], [x]).requires_grad
    assert not vectors.norm([x]).requires_grad
    assert not vectors.clone([x])[0].requires_grad


def test_different_lengths() -> None:
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        vectors.dot(draw(), draw()[:2])


def test_clone_keeps_the_memory_format_and_copy_writes_through() -> None:
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    (copy,) = vectors.clone([x])
    assert copy.data_ptr() != x.data_ptr()
    assert copy.is_contiguous(memory_format=torch.channels_last)
    copy.zero_()
    vectors.copy_([copy], [x])
    assert torch.equal(copy, x)
    vectors.copy_([], [])


@pytest.mark.parametrize("as_tensor", [False, True])
def test_scale(as_tensor: bool) -> None:
    xs = draw()
    expected = 0.3 * flat(xs)
    vectors.scale_(xs, torch.tensor(0.3, dtype=torch.float64) if as_tensor else 0.3)
    assert torch.equal(flat(xs), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_scaled(dtype: torch.dtype) -> None:
    """The factor has the wide precision of `dot`, also beside half-precision vectors."""
    xs, ys = draw(dtype), draw(dtype)
    wide = vectors.scalar_dtype(xs)
    expected = flat(xs) - 0.3 * flat(ys)
    before = flat(ys)
    vectors.add_scaled_(xs, ys, torch.tensor(-0.3, dtype=wide))
    assert all(x.dtype is dtype for x in xs)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(flat(xs), expected, rtol=4 * eps, atol=4 * eps)
    assert torch.equal(flat(ys), before)


def test_add_scaled_accepts_vectors_of_mixed_precision() -> None:
    xs = [torch.zeros(2, dtype=torch.bfloat16), torch.zeros(3)]
    ys = [torch.ones(2), torch.ones(3)]
    vectors.add_scaled_(xs, ys, torch.tensor(0.5))
    assert [x.dtype for x in xs] == [torch.bfloat16, torch.float32]
    assert torch.equal(flat(xs), torch.full((5,), 0.5, dtype=torch.float64))


@pytest.mark.parametrize(
    ("foreach", "expected"), [(None, [[0, 1, 2]]), (True, [[0, 1, 2]]), (False, [[0], [1], [2]])]
)
def test_chunks(foreach: bool | None, expected: list[list[int]]) -> None:
    items = [0, 1, 2]
    assert [items[part] for part in vectors.chunks(3, foreach)] == expected
