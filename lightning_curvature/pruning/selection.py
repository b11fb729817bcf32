"""Which groups are pruned: those of the smallest scores, in exact numbers."""

from typing import Literal

import torch
from torch import Tensor

__all__ = ["Scope", "num_dropped", "select", "smallest"]

Scope = Literal["global", "layer"]

# Of numbers that are whole but for rounding in float64, relative to the number of weights.
_ROUNDING = 1e-14


def num_dropped(total: int, num_pruned: int, sparsity: float) -> int:
    """Return how many more weights are pruned to reach a sparsity, at least 0.

    It is the floor of ``total * (sparsity - present sparsity)``, where the present sparsity is
    rounded to float32 as in the code of the M-FAC authors. We differ where the exact number is
    whole, which rounding may turn into one less: half of 144 weights are 72, in any events.

    Args:
        total: Number of prunable weights.
        num_pruned: How many of them are pruned.
        sparsity: Fraction to reach, in [0, 1).

    Examples:
        >>> num_dropped(1232, 499, 0.5), num_dropped(144, 58, 0.5)
        (117, 14)
    """
    exact = total * sparsity - num_pruned
    if abs(exact - round(exact)) <= _ROUNDING * total:
        return max(round(exact), 0)
    present = torch.tensor(num_pruned, dtype=torch.float32) / max(total, 1)
    return max(int(total * (sparsity - float(present))), 0)


def smallest(scores: Tensor, count: int) -> Tensor:
    """Return where the smallest scores are, as flags; of equal ones the first are taken.

    Args:
        scores: Finite numbers ``[n]``.
        count: How many to take, at most ``n``.

    Examples:
        >>> smallest(torch.tensor([2.0, 1.0, 2.0, 3.0]), 2)
        tensor([ True,  True, False, False])
    """
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    largest = scores.kthvalue(count).values
    taken = scores < largest
    ties = (scores == largest).nonzero().view(-1)
    taken[ties[: count - int(taken.sum())]] = True
    return taken


def select(scores: Tensor, sizes: Tensor, budget: int) -> Tensor:
    """Return which groups to prune: in the order of their scores as many as the budget allows.

    Args:
        scores: Finite number per group ``[n]``.
        sizes: How many weights each group loses when it is pruned, at least 1, int64 ``[n]``.
        budget: How many weights may be lost.

    Returns:
        Flags ``[n]``.

    Examples:
        >>> select(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([2, 2, 2]), 5)
        tensor([False,  True,  True])
    """
    if len(scores) == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    least, most = (int(x) for x in sizes.aminmax())
    if least == most:
        return smallest(scores, min(budget // most, len(scores)))
    order = scores.argsort(stable=True)
    fits = sizes[order].cumsum(0) <= budget
    taken = torch.zeros_like(fits)
    taken[order] = fits
    return taken
