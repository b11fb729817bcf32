"""Estimates of the diagonal of the Hessian from products with random vectors.

Hutchinson 1990; Bekas, Kokiopoulou and Saad 2007: for a random vector z of independent entries with
mean 0 and variance 1, z * (H z) has the expectation diag(H).
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_curvature import vectors
from lightning_curvature.oracle.protocol import HvpMethod, Oracle
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
            z = torch.empty_like(p, dtype=vectors.scalar_dtype([p]))
            if self._distribution == "normal":
                z.normal_(generator=generator)
            else:
                z.bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
            probe.append(z)
        return probe


def hutchinson(
    oracle: Oracle,
    params: Sequence[Tensor],
    sampler: ProbeSampler,
    *,
    num_probes: int = 1,
    method: HvpMethod = "auto",
) -> list[Tensor]:
    """Return z * (H z), averaged over probes, micro-batches and ranks; entries have either sign.

    Args:
        oracle: Answers about the loss of the present step.
        params: Parameters that have a gradient, as told to the oracle.
        sampler: Draws the probes.
        num_probes: Number of probes; the variance falls in proportion.
        method: See `Oracle.hvp`.
    """
    total: list[Tensor] = []
    for index in range(num_probes):
        probe = sampler.draw(params, index)
        product = oracle.hvp(probe, method=method)
        part = [z * h.to(z.dtype) for z, h in zip(probe, product, strict=True)]
        if total:
            torch._foreach_add_(total, part)
        else:
            total = part
    if num_probes > 1:
        torch._foreach_div_(total, float(num_probes))
    return oracle.mean_vectors(total)[0]
