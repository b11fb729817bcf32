"""Estimates of the diagonal of the Hessian from products with random vectors.

Hutchinson 1990; Bekas, Kokiopoulou and Saad 2007: for a random vector z of independent entries with
mean 0 and variance 1, z * (H z) has the expectation diag(H).
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_curvature import vectors
from lightning_curvature.oracle.protocol import Oracle
from lightning_curvature.oracle.streams import stream

__all__ = ["Distribution", "ProbeSampler", "hutchinson"]

Distribution = Literal["rademacher", "normal"]


class ProbeSampler:
    """Draws probes; they are the same on every rank, so that products can be averaged.

    Args:
        distribution: "rademacher" (signs: the diagonal itself adds no variance) or "normal".
        seed: Seed.
        step: Number of the step.
    """

    def __init__(self, distribution: Distribution, seed: int, step: int) -> None:
        self._distribution = distribution
        self._seed = seed
        self._step = step

    def draw(self, params: Sequence[Tensor], index: int) -> list[Tensor]:
        """Draw a probe, one tensor per parameter, in at least float32.

        Args:
            params: The parameters.
            index: Number of the probe in its step.
        """
        generator = stream(params[0].device, "probes", self._seed, self._step, index)
        probe = []
        for p in params:
            dtype = vectors.scalar_dtype([p])
            if self._distribution == "normal":
                probe.append(torch.empty_like(p, dtype=dtype).normal_(generator=generator))
            else:
                probe.append(_random_signs(p, dtype, generator))
        return probe


def hutchinson(oracle: Oracle) -> list[Tensor]:
    """Return z * (H z), averaged over probes, micro-batches and ranks; entries have either sign.

    Args:
        oracle: Answers about the loss of the present step; its plan names the probes.

    Returns:
        One tensor per parameter that has a gradient.
    """
    total: list[Tensor] = []
    pairs = oracle.products()
    for z, product in pairs:
        # Not in place: parameters that are added up share one product.
        part = [h.to(x.dtype) * x for x, h in zip(z, product, strict=True)]
        if total:
            torch._foreach_add_(total, part)
        else:
            total = part
    if len(pairs) > 1:
        torch._foreach_div_(total, float(len(pairs)))
    return oracle.mean_vectors(total)[0]


# Row i holds the bits of i as +1 and -1.
_SIGNS = torch.tensor([[1.0 if i >> bit & 1 else -1.0 for bit in range(8)] for i in range(256)])


def _random_signs(p: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Return +1 and -1 of the shape of a tensor.

    One random byte gives eight: on a CPU drawing each by itself would cost as much as a backward.
    """
    count = -(-p.numel() // 8)
    numbers = torch.randint(0, 256, (count,), generator=generator, device=p.device)
    table = _SIGNS.to(device=p.device, dtype=dtype)
    return table[numbers].view(-1)[: p.numel()].view(p.shape)
