"""Vectors that are lists of tensors, one per parameter: inner products, norms, updates.

Scalars come back as 0-dim tensors on the device of the vectors and are never read here, so nothing
in this file waits for a device. Products of half-precision tensors are summed in float32.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["add_scaled_", "chunks", "clone", "copy_", "dot", "norm", "scalar_dtype", "scale_"]

Vector = Sequence[Tensor]


def scalar_dtype(xs: Vector) -> torch.dtype:
    """Return the dtype for scalars of a vector: float64 if any tensor has it, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in xs) else torch.float32


@torch.no_grad()
def dot(xs: Vector, ys: Vector) -> Tensor:
    """Return the inner product of two vectors, a 0-dim tensor.

    Args:
        xs: Tensors of any shapes, at least one.
        ys: Tensors of the same shapes.
    """
    dtype = scalar_dtype(xs)
    parts = [torch.dot(_flat(x, dtype), _flat(y, dtype)) for x, y in zip(xs, ys, strict=True)]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()


def _flat(x: Tensor, dtype: torch.dtype) -> Tensor:
    flat = x.reshape(-1)
    return flat if flat.dtype == dtype else flat.to(dtype)


@torch.no_grad()
def norm(xs: Vector) -> Tensor:
    """Return the Euclidean norm of a vector, a 0-dim tensor."""
    dtype = scalar_dtype(xs)
    parts = torch._foreach_norm(list(xs), 2, dtype=dtype)
    total: Tensor = torch.linalg.vector_norm(torch.stack(parts))
    return total


def clone(xs: Vector) -> list[Tensor]:
    """Return detached copies that keep the memory formats."""
    return [x.detach().clone() for x in xs]


def copy_(xs: Vector, ys: Vector) -> None:
    """Copy the values of ``ys`` into ``xs``."""
    if xs:
        torch._foreach_copy_(list(xs), list(ys))


def scale_(xs: Vector, factor: Tensor | float) -> None:
    """Multiply a vector by a number or 0-dim tensor in place."""
    torch._foreach_mul_(list(xs), factor)


def add_scaled_(xs: Vector, ys: Vector, factor: Tensor) -> None:
    """Add ``factor * ys`` to ``xs`` in place.

    Args:
        xs: Tensors to change.
        ys: Tensors of the same shapes.
        factor: 0-dim tensor.
    """
    if xs[0].device.type == "cpu":
        # One sweep through memory; on a GPU the two fused kernels below are the faster choice.
        torch._foreach_addcmul_(list(xs), list(ys), [factor] * len(xs))
    else:
        torch._foreach_add_(list(xs), torch._foreach_mul(list(ys), factor))


def chunks(count: int, foreach: bool | None) -> list[slice]:
    """Return the slices of a vector that one fused call works on.

    Args:
        count: Number of tensors in the vector.
        foreach: ``False`` for one tensor at a time, which needs the least temporary memory;
            otherwise all at once, which needs the fewest kernel launches.
    """
    if foreach is False:
        return [slice(i, i + 1) for i in range(count)]
    return [slice(0, count)]
