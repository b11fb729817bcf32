"""What one pruning event did."""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["PruningReport", "SaliencySummary"]

_BINS = 50


@dataclass(frozen=True)
class SaliencySummary:
    """Saliency of the groups that could be pruned, on the CPU.

    Attributes:
        smallest: The least of all.
        median: The median (the lower one of two).
        largest: The largest of all.
        threshold: The largest of what was pruned.
        edges: Edges of the bins of the histograms, ascending, ``[bins + 1]``. They are as far apart
            on a logarithmic scale; zeros are counted in the first bin.
        kept: Groups per bin that were kept, int64 ``[bins]``.
        pruned: Groups per bin that were pruned, int64 ``[bins]``.
    """

    smallest: float
    median: float
    largest: float
    threshold: float
    edges: Tensor
    kept: Tensor
    pruned: Tensor

    @classmethod
    def of(cls, scores: Tensor, pruned: Tensor) -> "SaliencySummary":
        """Summarize scores.

        Args:
            scores: Saliency per group ``[n]``, not negative; at least one.
            pruned: Which groups were pruned, bool ``[n]``; at least one.
        """
        scores, pruned = scores.cpu(), pruned.cpu()
        positive = scores[scores > 0]
        low, high = (float(x) for x in positive.aminmax()) if len(positive) else (1.0, 1.0)
        ends = torch.tensor([low, high], dtype=torch.float64).log10()
        edges = torch.logspace(float(ends[0]), float(ends[1]), _BINS + 1, dtype=torch.float64)
        bins = torch.bucketize(scores, edges[1:-1], right=True)
        return cls(
            smallest=float(scores.min()),
            median=float(scores.median()),
            largest=float(scores.max()),
            threshold=float(scores[pruned].max()),
            edges=edges,
            kept=torch.bincount(bins[~pruned], minlength=_BINS),
            pruned=torch.bincount(bins[pruned], minlength=_BINS),
        )


@dataclass(frozen=True)
class PruningReport:
    """What one pruning event did.

    Attributes:
        sparsity: Fraction of the prunable weights that is gone now.
        layer_sparsities: The same of each parameter, by its name.
        num_pruned: How many weights this event pruned.
        empty_layers: Names of the parameters of which nothing is left.
        saliency: Saliency of what could be pruned; None if nothing was.
        quad_model_change: Change of the loss that the damped Fisher matrix predicts, for weights
            at a minimum, whichever way they were chosen and updated: ``dw^T H dw / 2``. None
            without gradients.
    """

    sparsity: float
    layer_sparsities: dict[str, float]
    num_pruned: int
    empty_layers: tuple[str, ...]
    saliency: SaliencySummary | None
    quad_model_change: float | None
