"""Tests of lightning_curvature/curvature/packing.py."""

import re

import pytest
import torch
from torch import Tensor

from lightning_curvature.curvature.packing import pack_symmetric, unpack_symmetric


def symmetric(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return random symmetric matrices ``[*shape, shape[-1]]``."""
    x = torch.randn(*shape, shape[-1], dtype=dtype)
    return x + x.mT


@pytest.mark.parametrize("shape", [(0,), (1,), (2,), (3,), (8,), (9,), (3, 1), (2, 4), (2, 3, 5)])
def test_round_trip(shape: tuple[int, ...]) -> None:
    matrix = symmetric(*shape)
    packed = pack_symmetric([matrix])
    n = shape[-1]
    batch = matrix.numel() // max(n * n, 1)
    assert packed.shape == (batch * n * (n + 1) // 2,)
    (back,) = unpack_symmetric(packed, [matrix])
    assert torch.equal(back, matrix)
    assert back.is_contiguous()


@pytest.mark.parametrize("n", [4, 5])
def test_every_entry_is_packed_once(n: int) -> None:
    i, j = torch.tril_indices(n, n)
    matrix = torch.zeros(n, n)
    matrix[i, j] = matrix[j, i] = torch.arange(1.0, len(i) + 1)
    assert pack_symmetric([matrix]).sort().values.tolist() == list(range(1, len(i) + 1))


def test_many_matrices_of_several_dtypes() -> None:
    matrices = [
        symmetric(3),
        symmetric(2, 4, dtype=torch.float64),
        symmetric(1),
        symmetric(6).mT,  # not contiguous
    ]
    packed = pack_symmetric(matrices)
    assert packed.dtype == torch.float64
    back = unpack_symmetric(packed, matrices)
    for one, other in zip(matrices, back, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    # Packing is linear: averages of what is packed are averages of the matrices.
    doubled = unpack_symmetric(2 * packed, matrices)
    assert torch.equal(doubled[1], 2 * matrices[1])


@pytest.mark.parametrize("n", [4, 5])
def test_asymmetric_rounding_comes_back_symmetric(n: int) -> None:
    matrix = torch.randn(n, n)
    (back,) = unpack_symmetric(pack_symmetric([matrix]), [matrix])
    assert torch.equal(back, back.mT)
    assert ((back == matrix) | (back == matrix.mT)).all()


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("n", [4, 5])
def test_what_is_not_finite_stays_in_its_place(value: float, n: int) -> None:
    for i in range(n):
        for j in range(i + 1):
            matrix = torch.ones(n, n)
            matrix[i, j] = matrix[j, i] = value
            (back,) = unpack_symmetric(pack_symmetric([matrix]), [matrix])
            torch.testing.assert_close(back, matrix, rtol=0, atol=0, equal_nan=True)


def test_nothing_to_pack() -> None:
    packed = pack_symmetric([])
    assert packed.shape == (0,)
    assert unpack_symmetric(packed, []) == []


def test_errors() -> None:
    text = "Invalid matrix of shape [2, 3]: must be square, [..., n, n]."
    with pytest.raises(ValueError, match=re.escape(text)):
        pack_symmetric([torch.ones(2, 3)])
    with pytest.raises(ValueError, match=re.escape("Invalid matrix of shape [2]")):
        unpack_symmetric(torch.ones(2), [torch.ones(2)])
    text = (
        "Invalid flat of shape [4]: must be [3] for these matrices. Pass the tensors that were "
        "packed, in the same order."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        unpack_symmetric(torch.ones(4), [torch.ones(2, 2)])
