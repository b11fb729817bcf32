"""Checks of gradients and vectors that a user hands over."""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["check_finite_rows", "check_floating"]


def check_floating(name: str, x: Tensor) -> None:
    """Check that a tensor is of floating-point numbers.

    Args:
        name: Name of the argument, as the user wrote it.
        x: The tensor.

    Raises:
        TypeError: If it is not.

    Examples:
        >>> check_floating("x", torch.tensor([1, 2]))
        Traceback (most recent call last):
            ...
        TypeError: Invalid x of dtype torch.int64: must be floating-point.
    """
    if not x.is_floating_point():
        raise TypeError(f"Invalid {name} of dtype {x.dtype}: must be floating-point.")


def check_finite_rows(
    gradients: Tensor,
    device: torch.device,
    sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Check that gradients are finite; on several ranks, raise on all or on none.

    Args:
        gradients: Gradients, ``[m, d]``.
        device: Where tensors are that ranks sum up.
        sum_over_ranks: Sums a tensor over ranks that have other columns; None for one rank.

    Raises:
        ValueError: If an entry is not finite, here or on another rank.

    Examples:
        >>> check_finite_rows(torch.tensor([[1.0], [torch.inf]]), torch.device("cpu"))
        Traceback (most recent call last):
            ...
        ValueError: Invalid gradients: entries are not finite in rows [1].
    """
    wrong = torch.zeros(len(gradients), dtype=torch.bool, device=gradients.device)
    if gradients.shape[1]:
        # Neither a sum, which may overflow, nor a mask of the size of the gradients.
        wrong = ~torch.linalg.vector_norm(gradients, float("inf"), dim=1).isfinite()
    found = wrong.sum().to(device, torch.float64).view(1)
    if sum_over_ranks is not None:
        found = sum_over_ranks(found)
    if found > 0:
        rows = wrong.nonzero().view(-1).tolist()
        where = f"in rows {rows}" if rows else "on another rank"
        raise ValueError(f"Invalid gradients: entries are not finite {where}.")
