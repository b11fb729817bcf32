"""Symmetric matrices without their redundant half, for a collective or a checkpoint.

A symmetric matrix of n rows is cut into blocks of k = ceil(n / 2) and h = floor(n / 2) rows,

    [ P    Q ]
    [ Q^T  S ],

and its n (n + 1) / 2 numbers are laid out as a rectangle of k rows and 2 h + 1 columns: Q fills the
last h columns, the lower triangle of P and the upper triangle of S share the others, S one column
to the right. (The idea is the rectangular full packed format of LAPACK: F. G. Gustavson and others,
2010.) Only copies of blocks are needed: no lists of indices, no loop over rows.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["pack_symmetric", "unpack_symmetric"]


def pack_symmetric(matrices: Sequence[Tensor]) -> Tensor:
    """Put the halves of symmetric matrices into one flat tensor.

    Args:
        matrices: Tensors ``[..., n, n]`` on one device, each symmetric: of two mirrored entries
            only one is read.

    Returns:
        A new tensor of one axis, in the widest of their dtypes.

    Raises:
        ValueError: If a tensor is no batch of square matrices.

    Examples:
        >>> pack_symmetric([torch.tensor([[1.0, 2.0], [2.0, 3.0]]), torch.tensor([[4.0]])])
        tensor([1., 3., 2., 4.])
    """
    dtype = torch.float32 if not matrices else matrices[0].dtype
    for matrix in matrices:
        dtype = torch.promote_types(dtype, matrix.dtype)
    flat = torch.empty(
        sum(_packed_size(matrix) for matrix in matrices),
        dtype=dtype,
        device=matrices[0].device if matrices else None,
    )
    for matrix, packed in _segments(flat, matrices):
        h = matrix.shape[-1] // 2
        k = matrix.shape[-1] - h
        packed[..., h + 1 :] = matrix[..., :k, k:]
        shared = packed[..., : h + 1]
        if k > h:
            shared.copy_(matrix[..., :k, :k].tril())
        else:
            shared[..., :h] = matrix[..., :k, :k].tril()
            shared[..., h].zero_()
        shared[..., :h, 1:].add_(matrix[..., k:, k:].triu())
    return flat


def unpack_symmetric(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return the matrices that `pack_symmetric` packed, exactly symmetric.

    Args:
        flat: What it returned, or sums and averages of such tensors.
        like: Tensors with the shapes and dtypes of the matrices, in the same order.

    Raises:
        ValueError: If the sizes do not fit, or a tensor of ``like`` is no batch of square matrices.

    Examples:
        >>> unpack_symmetric(torch.tensor([1.0, 3.0, 2.0]), [torch.empty(2, 2)])
        [tensor([[1., 2.],
                [2., 3.]])]
    """
    size = sum(_packed_size(matrix) for matrix in like)
    if flat.shape != (size,):
        raise ValueError(
            f"Invalid flat of shape {list(flat.shape)}: must be [{size}] for these matrices. Pass "
            "the tensors that were packed, in the same order."
        )
    matrices = []
    for pattern, packed in _segments(flat, like):
        matrix = torch.empty(pattern.shape, dtype=pattern.dtype, device=flat.device)
        h = matrix.shape[-1] // 2
        k = matrix.shape[-1] - h
        matrix[..., :k, k:] = packed[..., h + 1 :]
        matrix[..., k:, :k] = packed[..., h + 1 :].mT
        lower = packed[..., :k].tril()
        matrix[..., :k, :k] = lower.add_(packed[..., :k].tril(-1).mT)
        upper = packed[..., :h, 1 : h + 1].triu()
        matrix[..., k:, k:] = upper.add_(packed[..., :h, 1 : h + 1].triu(1).mT)
        matrices.append(matrix)
    return matrices


def _packed_size(matrix: Tensor) -> int:
    if matrix.dim() < 2 or matrix.shape[-1] != matrix.shape[-2]:  # noqa: PLR2004
        raise ValueError(
            f"Invalid matrix of shape {list(matrix.shape)}: must be square, [..., n, n]."
        )
    n = matrix.shape[-1]
    return math.prod(matrix.shape[:-2]) * (n * (n + 1) // 2)


def _segments(flat: Tensor, matrices: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each matrix with the view of the flat tensor that is its rectangle."""
    start = 0
    for matrix in matrices:
        end = start + _packed_size(matrix)
        n = matrix.shape[-1]
        yield matrix, flat[start:end].view(*matrix.shape[:-2], n - n // 2, 2 * (n // 2) + 1)
        start = end
