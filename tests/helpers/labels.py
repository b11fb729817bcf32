"""A sampler whose labels depend on each example alone, however a batch is cut and dealt out."""

import torch
from torch import Tensor

from lightning_curvature.oracle.labels import LabelSampler


class ContentSampler(LabelSampler):
    """Draws from the digits of the predictions, so that the same example gets the same label."""

    def _uniform(self, x: Tensor) -> Tensor:
        # The step is the second part of the key; rank and micro-batch follow.
        return (x * 37.713 + 0.618 * float(self._key[1])).frac().abs()

    def categorical(self, probabilities: Tensor, dim: int, call: int) -> Tensor:
        """Draw class numbers."""
        count = probabilities.shape[dim]
        factors = torch.arange(1, count + 1, dtype=probabilities.dtype)
        shape = [1] * probabilities.dim()
        shape[dim] = count
        u = self._uniform((probabilities * factors.view(shape)).sum(dim, keepdim=True))
        return (probabilities.cumsum(dim) <= u).sum(dim).clamp_max(count - 1)

    def bernoulli(self, probabilities: Tensor, call: int) -> Tensor:
        """Draw zeros and ones."""
        return (self._uniform(probabilities) < probabilities).to(probabilities.dtype)

    def normal(self, mean: Tensor, call: int) -> Tensor:
        """Draw +1 and -1, which have the mean and the variance of standard normal noise."""
        return torch.where(self._uniform(mean) < 0.5, -1.0, 1.0).to(mean.dtype)

    def signs(self, like: Tensor, call: int, name: str) -> Tensor:
        """Draw +1 and -1."""
        return self.normal(like, call)
