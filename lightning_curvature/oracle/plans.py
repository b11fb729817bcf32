"""What an optimizer wants of the main passes of a step, told before they run.

Their graphs are there for a moment only, and whatever is computed on them needs no forward pass.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lightning_curvature.oracle.labels import LabelSampler

__all__ = ["HvpMethod", "Plan", "ProbePlan", "SamplePlan", "Squared"]

Squared = Literal["micro_batch", "window"]
HvpMethod = Literal["double-backward", "fd"]


@dataclass(frozen=True)
class SamplePlan:
    """What an optimizer wants of the main passes of the coming step.

    Attributes:
        seed: Seed of the labels.
        step: Number of the step.
        squared: "micro_batch" squares the gradient of every micro-batch on every rank and averages
            the squares; "window" adds the gradients up and squares their sum. Both are unbiased;
            the first has the smaller variance, by the number of micro-batches and ranks.
        fraction: Share of the examples of every micro-batch to use, in (0, 1].
        clip_norm: Largest norm of a gradient of the mean loss under drawn labels, None for any.
        again: Whether to sample in a pass of its own, at the parameters after the step.
        sampler: Class that draws.
    """

    seed: int
    step: int
    squared: Squared = "micro_batch"
    fraction: float = 1.0
    clip_norm: float | None = None
    again: bool = False
    sampler: type[LabelSampler] = LabelSampler


@dataclass(frozen=True)
class ProbePlan:
    """Products of the Hessian with given vectors.

    Attributes:
        draw: Gives probe number i, one tensor per parameter; the same on every rank.
        num_probes: How many.
        method: "double-backward" is exact; "fd" takes central differences of gradients.
        again: Whether to compute them in a pass of their own, at the parameters after the step.
    """

    draw: Callable[[Sequence[Tensor], int], list[Tensor]]
    num_probes: int = 1
    method: HvpMethod = "double-backward"
    again: bool = False


Plan = SamplePlan | ProbePlan
