"""Updates with a number of its own for every tensor."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_curvature.vectors import flattened

__all__ = ["advance_", "can_split", "discounted_count", "split", "whole_norms"]

# Entries of a part, per thread: some of them together should fit into a second-level cache.
_PART = 1 << 16


def can_split(tensors: Sequence[Tensor]) -> bool:
    """Tell whether `split` makes sense: on a CPU, and not for sharded tensors."""
    plain = (Tensor, torch.nn.Parameter)
    return all(type(x) in plain and x.is_cpu for x in tensors)


def split(tensors: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """Cut tensors of one shape into parts, all alike, that are best worked on one after the other.

    Args:
        tensors: Tensors; where their layouts differ they stay whole.
    """
    flat = flattened(tensors)
    if flat is None:
        return [tuple(tensors)]
    size = _PART * torch.get_num_threads()
    return list(zip(*(torch.split(x, size) for x in flat), strict=True))


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
        steps: Numbers of steps t, of any shape; 0 counts as 1.
        beta: Discount factor, in [0, 1].
    """
    steps = steps.clamp_min(1)
    if beta == 1:
        return steps
    # Not as 1 - beta^t: near 1 the difference would lose most digits in float32.
    log = math.log(beta) if beta > 0 else -math.inf
    return torch.expm1(steps * log) / (beta - 1)


def whole_norms(norms: Sequence[Tensor]) -> list[Tensor]:
    """Return norms that may be those of sharded tensors as ordinary 0-dim tensors.

    Args:
        norms: What ``torch._foreach_norm`` returned.
    """
    whole: list[Any] = list(norms)
    alike: dict[Any, list[int]] = {}
    for row, norm in enumerate(whole):
        if hasattr(norm, "full_tensor"):
            alike.setdefault((norm.device_mesh, norm.placements), []).append(row)
    for (mesh, placements), rows in alike.items():
        # One collective for all of them.
        local = torch.stack([whole[row].to_local() for row in rows])
        together = type(whole[rows[0]]).from_local(local, mesh, placements).full_tensor()
        for row, norm in zip(rows, together.unbind(), strict=True):
            whole[row] = norm
    return whole
