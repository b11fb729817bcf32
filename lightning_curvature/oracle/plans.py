"""What an optimizer wants of the main passes of a step, told before they run.

Their graphs are there for a moment only, and whatever is computed on them needs no forward pass.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor
from torch.autograd.graph import GradientEdge

from lightning_curvature.oracle.labels import LabelSampler

__all__ = [
    "FisherType",
    "HvpMethod",
    "LayerObserver",
    "LayerPlan",
    "Plan",
    "ProbePlan",
    "SamplePlan",
    "Squared",
]

Squared = Literal["micro_batch", "window"]
HvpMethod = Literal["double-backward", "fd"]
FisherType = Literal["mc", "curvature-propagation", "type-2", "empirical"]


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


class LayerObserver(Protocol):
    """What learns about layers; it lives as long as the oracle and is told of every micro-batch."""

    @property
    def has_blocks(self) -> bool:
        """Whether there are layers that a pass should call."""

    def edges(self) -> tuple[list[GradientEdge], list[Tensor]]:
        """Return the places whose gradients are wanted: outputs of layers, and parameters."""

    def observe(
        self,
        record: Any,
        gradients: Sequence[tuple[list[Tensor | None], list[Tensor | None]]],
        weights: Sequence[Tensor],
        behind: Sequence[tuple[int, ...]] | None = None,
    ) -> None:
        """Take in one micro-batch.

        Args:
            record: The `PassRecord` it belongs to; its weight may not be known yet.
            gradients: For every root the gradients of what `edges` returned, None where the losses
                do not depend on it. The sum of their outer products is the curvature.
            weights: Weights of the examples (and positions) in each loss.
            behind: For every output the numbers of the losses that lead to it; None for all.
        """

    def drop_finished(self, kept: Sequence[Any]) -> None:
        """Forget the micro-batches whose gradient is gone.

        Args:
            kept: The records of those whose gradient is not.
        """

    def during_extra_pass(self) -> AbstractContextManager[None]:
        """Watch the extra passes made inside, and nothing else."""


@dataclass(frozen=True)
class LayerPlan:
    """Gradients of the outputs of layers under roots of the losses' curvature.

    Attributes:
        seed: Seed of labels and probes.
        step: Number of the step.
        observer: Names the layers, and takes their gradients in.
        fisher_type: What the losses send back, see `layer_roots`.
        num_samples: How many labels to draw per example; each costs one backward.
        official_empirical_scaling: See `layer_roots`.
        sampler: Class that draws.
        again: Always on the graph of the main pass, where that can be.
    """

    again: ClassVar[bool] = False

    seed: int
    step: int
    observer: LayerObserver
    fisher_type: FisherType = "mc"
    num_samples: int = 1
    official_empirical_scaling: bool = False
    sampler: type[LabelSampler] = LabelSampler


Plan = SamplePlan | ProbePlan | LayerPlan
