"""Foreach updates with a number of its own for every tensor.

The numbers are Python floats where they can be read for nothing and 0-dim tensors elsewhere, so
that nothing here waits for a device.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_curvature import vectors

__all__ = [
    "Numbers",
    "Part",
    "add_quotients_",
    "advance_",
    "bundles",
    "discounted_count",
    "numbers",
    "whole_norms",
]

# Numbers, one per tensor.
Numbers = list[float] | list[Tensor]
# Which tensors of a bundle, and parts of them: one list per vector.
Part = tuple[slice, tuple[list[Tensor], ...]]

# Tensors of up to that many entries share one call; `vectors.blocks` cuts none of them.
_SMALL = 1 << 12


def bundles(
    *columns: Sequence[Tensor], foreach: bool | None = None
) -> Iterator[tuple[list[int], list[Part]]]:
    """Cut vectors into bundles of whole tensors, and these into parts as `vectors.blocks` does.

    Work that needs sums over whole tensors before it can go on goes through a bundle twice. On a
    CPU a large tensor is a bundle by itself, so that much of it is in the cache the second time.

    Args:
        *columns: Vectors whose tensors have the same shapes.
        foreach: ``False`` for one tensor at a time.

    Yields:
        The indices of the tensors in the bundle, and its parts.
    """
    first = columns[0]
    if foreach is False:
        groups = [[row] for row in range(len(first))]
    elif any(x.device.type != "cpu" or _is_sharded(x) for x in first):
        groups = [list(range(len(first)))]
    else:
        small = [row for row, x in enumerate(first) if x.numel() <= _SMALL]
        groups = [[row] for row, x in enumerate(first) if x.numel() > _SMALL]
        groups += [small] if small else []
    for rows in groups:
        parts: list[Part] = []
        seen = 0
        chosen = [[column[row] for row in rows] for column in columns]
        for part in vectors.blocks(*chosen, foreach=foreach):
            parts.append((slice(seen, seen + len(part[0])), part))
            # Several parts of one tensor, or several tensors in a part.
            seen += len(part[0]) if len(rows) > 1 else 0
        yield rows, parts


def _is_sharded(x: Tensor) -> bool:
    return hasattr(x, "full_tensor")


def advance_(steps: list[Tensor], usable: Tensor | None) -> None:
    """Count a step.

    Args:
        steps: Number of updates of each parameter, 0-dim tensors.
        usable: Boolean 0-dim tensor: if False nothing changes. None for True.
    """
    if usable is None:
        torch._foreach_add_(steps, 1)
    else:
        # As a list: a single 0-dim tensor would be read as a number.
        torch._foreach_add_(steps, [usable.to(steps[0].dtype)] * len(steps))


def discounted_count(steps: Tensor, beta: float) -> Tensor:
    r"""Return :math:`\sum_{s=1}^{t} \beta^{t-s}`, the number of steps that a discounted sum holds.

    Args:
        steps: Numbers of steps t, ``[k]``; 0 counts as 1.
        beta: Discount factor, in [0, 1].
    """
    steps = steps.clamp_min(1)
    if beta == 1:
        return steps
    # Not through beta^t: near 1, the difference would lose all digits in float32.
    log = math.log(beta) if beta > 0 else -math.inf
    return torch.expm1(steps * log) / (beta - 1)


def numbers(values: Tensor, usable: Tensor | None) -> Numbers:
    """Return the entries of a vector as what foreach functions take.

    Args:
        values: One number per tensor, ``[k]``.
        usable: None if reading them costs nothing.
    """
    if usable is None:
        floats: list[float] = values.tolist()
        return floats
    return list(values.unbind())


def whole_norms(norms: Sequence[Tensor]) -> list[Tensor]:
    """Return norms that may be those of sharded tensors as ordinary 0-dim tensors.

    Args:
        norms: What ``torch._foreach_norm`` returned.
    """
    whole: list[Any] = list(norms)
    alike: dict[Any, list[int]] = {}
    for row, norm in enumerate(whole):
        if _is_sharded(norm):
            alike.setdefault((norm.device_mesh, norm.placements), []).append(row)
    for (mesh, placements), rows in alike.items():
        # One collective for all of them.
        local = torch.stack([whole[row].to_local() for row in rows])
        together = type(whole[rows[0]]).from_local(local, mesh, placements).full_tensor()
        for row, norm in zip(rows, together.unbind(), strict=True):
            whole[row] = norm
    return whole


def add_quotients_(
    xs: Sequence[Tensor],
    numerators: Sequence[Tensor],
    denominators: Sequence[Tensor],
    factors: Numbers,
) -> None:
    """Add ``factor * numerator / denominator`` to a vector in place.

    Args:
        xs: Tensors to change.
        numerators: Tensors of the same shapes; may be those of ``xs``.
        denominators: Tensors of the same shapes.
        factors: One number per tensor.
    """
    if isinstance(factors[0], float):
        torch._foreach_addcdiv_(list(xs), list(numerators), list(denominators), factors)
        return
    quotients = torch._foreach_div(list(numerators), list(denominators))
    torch._foreach_mul_(quotients, factors)
    torch._foreach_add_(list(xs), quotients)
