"""Gram matrices X^T X, the sums of outer products that Kronecker factors are made of.

A Gram matrix is symmetric, so a matrix product computes nearly everything twice. On a CPU the upper
triangle is computed in strips of rows, by products of decreasing width, and mirrored: half to three
quarters of the time of one product from 500 columns on. On other devices one product is faster.
"""

import torch
from torch import Tensor

__all__ = ["gram"]

# Below two strips of this width one product is as fast.
_STRIP_WIDTH = 256
_MAX_STRIPS = 8


def gram(x: Tensor) -> Tensor:
    """Return X^T X for each matrix of a batch, exactly symmetric, without a graph.

    Args:
        x: Matrices ``[b, rows, n]`` in float32 or float64.

    Returns:
        The products, ``[b, n, n]``.

    Examples:
        >>> gram(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]))
        tensor([[[10., 14.],
                 [14., 20.]]])
    """
    x = x.detach()
    n = x.shape[-1]
    strips = min(n // _STRIP_WIDTH, _MAX_STRIPS)
    if x.device.type != "cpu" or strips < 2:  # noqa: PLR2004
        return _mirrored(torch.bmm(x.mT, x))
    products = x.new_empty(x.shape[0], n, n)
    for rows, product in zip(x, products, strict=True):
        _fill(product, rows, -(-n // strips))
    return products


def _fill(product: Tensor, rows: Tensor, width: int) -> None:
    n = rows.shape[1]
    for start in range(0, n, width):
        end = min(start + width, n)
        torch.mm(rows[:, start:end].T, rows[:, start:], out=product[start:end, start:])
        # Which order of summation BLAS takes may differ between an entry and its mirror image.
        square = product[start:end, start:end]
        square.copy_(_mirrored(square))
        product[end:, start:end] = product[start:end, end:].T


def _mirrored(products: Tensor) -> Tensor:
    """Return the average with the transpose: exactly symmetric, and the same if it was already."""
    return (products + products.mT).mul_(0.5)
