"""The gradient of one step: clipped, turned around to climb, and zero if it is not finite."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_curvature import vectors

__all__ = ["Gradient", "clip_factor"]


class Gradient(NamedTuple):
    """The gradient of one step.

    Attributes:
        values: The gradient to use, one tensor per parameter.
        norm: Norm of the gradient as found.
        finite: Boolean 0-dim tensor: whether it was finite.
        factor: values / gradient as found.
    """

    values: list[Tensor]
    norm: Tensor
    finite: Tensor
    factor: Tensor

    @classmethod
    def read(
        cls, params: list[Tensor], clip_norm: float | None = None, *, maximize: bool = False
    ) -> "Gradient":
        """Take the gradient of parameters.

        Args:
            params: Parameters that have a gradient. One that is not finite is replaced by zeros in
                place; nothing else is changed.
            clip_norm: Largest norm, None for any.
            maximize: Whether to turn it around.
        """
        grads = [p.grad for p in params if p.grad is not None]
        squared = vectors.dot(grads, grads)
        norm, finite = squared.sqrt(), torch.isfinite(squared)
        broken = ~finite
        for grad in grads:
            grad.masked_fill_(broken, 0.0)
        factor = clip_factor(norm, clip_norm)
        if maximize:
            factor = -factor
        if maximize or clip_norm is not None:
            grads = list(torch._foreach_mul(grads, factor))
        return cls(grads, norm, finite, factor)


def clip_factor(size: Tensor, limit: float | None) -> Tensor:
    """Return what brings a size down to a limit: 1 if it is not above.

    Args:
        size: A norm, 0-dim tensor.
        limit: Largest norm, None for any.
    """
    if limit is None:
        return torch.ones_like(size)
    return (limit / size).nan_to_num(1.0, posinf=1.0).clamp_max(1.0)
