"""Labels drawn from the model."""

import torch
from torch import Tensor

from lightning_curvature.oracle.streams import stream

__all__ = ["LabelSampler"]


class LabelSampler:
    """Draws labels; every loss call of every micro-batch has a stream of its own.

    Args:
        *key: Seed, step, rank and so on.
    """

    def __init__(self, *key: int | str) -> None:
        self._key = key

    def _stream(self, like: Tensor, *key: int | str) -> torch.Generator:
        return stream(like.device, "labels", *self._key, *key)

    def categorical(self, probabilities: Tensor, dim: int, call: int) -> Tensor:
        """Draw class numbers.

        Args:
            probabilities: They sum to one along ``dim``.
            dim: Axis of the classes.
            call: Number of the loss call.

        Returns:
            Integers, of the shape of ``probabilities`` without ``dim``.
        """
        heights = probabilities.cumsum(dim)
        top = heights.narrow(dim, -1, 1)
        u = torch.rand(
            top.shape, dtype=top.dtype, device=top.device, generator=self._stream(top, call)
        )
        return (heights <= u * top).sum(dim).clamp_max(probabilities.shape[dim] - 1)

    def bernoulli(self, probabilities: Tensor, call: int, name: str = "input") -> Tensor:
        """Draw zeros and ones, of the shape and dtype of ``probabilities``.

        Args:
            probabilities: Those of a one.
            call: Number of the loss call.
            name: Input of the loss they are for.
        """
        u = torch.rand(
            probabilities.shape,
            dtype=probabilities.dtype,
            device=probabilities.device,
            generator=self._stream(probabilities, call, name),
        )
        return (u < probabilities).to(probabilities.dtype)

    def normal(self, mean: Tensor, call: int) -> Tensor:
        """Draw standard normal noise of the shape of ``mean``, the model's prediction."""
        generator = self._stream(mean, call)
        return torch.randn(mean.shape, dtype=mean.dtype, device=mean.device, generator=generator)

    def signs(self, like: Tensor, call: int, name: str) -> Tensor:
        """Draw +1 and -1.

        Args:
            like: Gives the shape.
            call: Number of the loss call.
            name: Input of the loss they are for.
        """
        return 2 * self.bernoulli(torch.full_like(like, 0.5), call, name) - 1
