"""Vectors that are lists of tensors, one per parameter: inner products, norms, updates.

Scalars come back as 0-dim tensors on the device of the vectors and are never read here, so nothing
in this file waits for a device. Products of half-precision tensors are summed in float32.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

__all__ = [
    "add_scaled_",
    "blocks",
    "chunks",
    "clone",
    "copy_",
    "dot",
    "ema_",
    "ema_squares_",
    "flattened",
    "move_",
    "norm",
    "scalar_dtype",
    "scale_",
    "shrink_",
]

Vector = Sequence[Tensor]

# Of these, parts can be taken; sharded tensors cannot be cut like that.
_PLAIN = (Tensor, nn.Parameter)
# Entries per thread that one pass over several vectors works on, so that they stay in its cache.
_BLOCK = 1 << 15


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


def blocks(*columns: Vector, foreach: bool | None = None) -> Iterator[tuple[list[Tensor], ...]]:
    """Cut several vectors into parts, all alike, that are best worked on one after the other.

    On a CPU an update of a dozen operations is bound by memory: on parts that stay in the cache
    only the first of them waits for it. On other devices everything is one part, so that each
    operation is one kernel.

    Args:
        *columns: Vectors whose tensors have the same shapes.
        foreach: ``False`` for one tensor at a time.

    Yields:
        One list of tensors per vector; some are views of parts of the tensors.
    """
    if foreach is False:
        for row in zip(*columns, strict=True):
            yield tuple([x] for x in row)
        return
    if any(type(x) not in _PLAIN or x.device.type != "cpu" for column in columns for x in column):
        yield tuple(list(column) for column in columns)
        return
    limit = _BLOCK * torch.get_num_threads()
    waiting: list[tuple[Tensor, ...]] = []
    size = 0
    for row in zip(*columns, strict=True):
        flat = flattened(row) if row[0].numel() > limit else None
        if flat is None:
            waiting.append(row)
            size += row[0].numel()
            if size >= limit:
                yield tuple(list(column) for column in zip(*waiting, strict=True))
                waiting, size = [], 0
            continue
        for start in range(0, row[0].numel(), limit):
            yield tuple([x[start : start + limit]] for x in flat)
    if waiting:
        yield tuple(list(column) for column in zip(*waiting, strict=True))


def flattened(row: Vector) -> list[Tensor] | None:
    """Return one-dimensional views in the order of the memory, None if there are none in common."""
    if all(x.is_contiguous() for x in row):
        return [x.view(-1) for x in row]
    if all(x.is_contiguous(memory_format=torch.channels_last) for x in row):
        return [x.permute(0, 2, 3, 1).view(-1) for x in row]
    return None


def ema_(averages: Vector, values: Vector, decay: float, usable: Tensor | None = None) -> None:
    """Set ``averages`` to ``decay * averages + (1 - decay) * values`` in place.

    Args:
        averages: Running averages.
        values: New values, of the same shapes; zero if not ``usable``.
        decay: Weight of the old average, in [0, 1].
        usable: Boolean 0-dim tensor: if False nothing changes. None for True.
    """
    if usable is None:
        torch._foreach_lerp_(list(averages), list(values), 1 - decay)
        return
    torch._foreach_mul_(list(averages), 1 - usable.to(averages[0].dtype) * (1 - decay))
    torch._foreach_add_(list(averages), list(values), alpha=1 - decay)


def ema_squares_(
    averages: Vector, values: Vector, decay: float, usable: Tensor | None = None
) -> None:
    """Set ``averages`` to ``decay * averages + (1 - decay) * values**2`` in place.

    Args:
        averages: Running averages.
        values: Roots of the new values, of the same shapes; zero if not ``usable``.
        decay: Weight of the old average, in [0, 1].
        usable: Boolean 0-dim tensor: if False nothing changes. None for True.
    """
    kept: float | Tensor = decay
    if usable is not None:
        kept = 1 - usable.to(averages[0].dtype) * (1 - decay)
    torch._foreach_mul_(list(averages), kept)
    torch._foreach_addcmul_(list(averages), list(values), list(values), value=1 - decay)


def shrink_(xs: Vector, rate: float, usable: Tensor | None = None) -> None:
    """Multiply a vector by ``1 - rate`` in place, as decoupled weight decay does.

    Args:
        xs: Tensors to change.
        rate: Learning rate times weight decay.
        usable: Boolean 0-dim tensor: if False nothing changes. None for True.
    """
    if rate != 0:
        scale_(xs, 1 - rate if usable is None else 1 - rate * usable.to(scalar_dtype(xs)))


def move_(xs: Vector, updates: Vector, length: float, usable: Tensor | None = None) -> None:
    """Add ``length * updates`` to ``xs`` in place.

    Args:
        xs: Tensors to change.
        updates: Tensors of the same shapes, finite; may be changed.
        length: Factor.
        usable: Boolean 0-dim tensor: if False nothing changes. None for True.
    """
    if usable is not None:
        torch._foreach_mul_(list(updates), usable.to(updates[0].dtype))
    torch._foreach_add_(list(xs), list(updates), alpha=length)
