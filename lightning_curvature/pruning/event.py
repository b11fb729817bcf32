"""One pruning event: scores and updates on this rank's coordinates, put together on all ranks."""

import itertools
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from lightning_curvature.curvature.inverse_fisher import InverseFisher
from lightning_curvature.curvature.sensitive import Criterion
from lightning_curvature.oracle.ranks import rank, world_size
from lightning_curvature.pruning.exchange import Columns, check_on_all_ranks, sum_over_ranks
from lightning_curvature.pruning.parameters import PrunableParameters
from lightning_curvature.pruning.patterns import Layout
from lightning_curvature.pruning.saliency import (
    GroupScores,
    fisher_scores,
    group_updates,
    magnitude_scores,
    products,
    random_scores,
)

__all__ = ["Outcome", "PruningEvent", "WeightUpdate"]

WeightUpdate = Literal["joint", "sum", "none"]
T = TypeVar("T")


class Outcome(NamedTuple):
    """What is left after an event.

    Attributes:
        weights: All weights, float64 ``[total]``.
        keep: Which of them are not pruned, bool ``[total]``.
        quad_model_change: Predicted change of the loss; None without gradients.
    """

    weights: Tensor
    keep: Tensor
    quad_model_change: float | None


class PruningEvent:
    """Scores and updates of one event; it changes nothing itself.

    Args:
        parameters: The weights before the event.
        layout: Coordinates and groups.
        gradients: This rank's gradients on the survivors, or None.
        num_kept: How many weights of a group stay when it is pruned.
        damping: Added to the diagonal of the Fisher matrix.
        block_size: Coordinates per block, a multiple of the group size; None for one block.
        device: Where to compute.

    Raises:
        ValueError: If the Fisher matrix cannot be inverted.
        RuntimeError: Likewise, or on another rank.
    """

    def __init__(
        self,
        parameters: PrunableParameters,
        layout: Layout,
        gradients: Tensor | None,
        *,
        num_kept: int,
        damping: float,
        block_size: int | None,
        device: torch.device,
    ) -> None:
        unit = block_size or layout.size
        layout = layout.filled(Columns.least(unit))
        self._columns = Columns(len(layout.positions), unit)
        self._parameters = parameters
        self._num_kept = num_kept
        self._damping = damping
        self._block_size = block_size
        self._positions = layout.positions.to(device)
        self._groups = layout.groups().to(device)
        filled = self._positions >= 0
        self._present = filled[self._groups]
        weights = parameters.weights().to(device, torch.float64)
        self._weights = weights[self._positions.clamp(min=0)].masked_fill(~filled, 0)
        edges = torch.tensor(self._columns.edges, device=device)
        self._group_edges: list[int] = torch.searchsorted(layout.first.to(device), edges).tolist()
        self._rows: Tensor | None = None
        self._inverse: InverseFisher | None = None
        if gradients is not None:
            self._rows = self._exchanged(gradients)
            self._inverse = _on_all_ranks(self._inverted)

    def _exchanged(self, gradients: Tensor) -> Tensor:
        """Return all gradients on this rank's coordinates."""
        survivors = self._parameters.survivors().to(self._positions.device)
        source = None
        if not torch.equal(survivors, self._positions):
            source = torch.searchsorted(survivors, self._positions)
            source[self._positions < 0] = -1
        return self._columns.exchange(gradients, source)

    def _inverted(self) -> InverseFisher:
        assert self._rows is not None
        shared = self._block_size is None and world_size() > 1
        return InverseFisher(
            self._rows,
            self._damping,
            block_size=self._block_size,
            form="dual" if shared else "auto",
            device=self._positions.device,
            sum_over_ranks=sum_over_ranks if shared else None,
        )

    # Scores

    def scores(self, criterion: Criterion, seed: int) -> GroupScores:
        """Return how much each group matters, the same on all ranks.

        Args:
            criterion: What is compared.
            seed: Seed of random scores. They also depend on how many weights are left, so that
                each event has its own.
        """
        if criterion == "magnitude":
            return magnitude_scores(self._weights[self._groups], self._present, self._num_kept)
        if criterion == "random":
            left = int((self._positions >= 0).sum())
            places, total = self._positions[self._groups], self._parameters.total
            return random_scores(places, self._present, self._num_kept, total, seed, left)
        own = slice(*self._group_edges[rank() : rank() + 2])
        local = _on_all_ranks(lambda: self._fisher_scores(own))
        counts = _differences(self._group_edges)
        pruned = self._columns.gather(local.pruned.to(torch.uint8), counts)
        return GroupScores(self._columns.gather(local.scores, counts), pruned != 0)

    def _fisher_scores(self, own: slice) -> GroupScores:
        assert self._inverse is not None
        columns = self._columns.own
        return fisher_scores(
            self._inverse,
            self._weights[columns],
            self._groups[own] - columns.start,
            self._present[own],
            self._num_kept,
        )

    # Updates

    def outcome(self, pruned: Tensor, weight_update: WeightUpdate) -> Outcome:
        """Return the weights after pruning, the same on all ranks.

        Args:
            pruned: Which weights of each group go, bool ``[n, size]``.
            weight_update: How the others are changed.
        """
        gone = torch.zeros_like(self._weights, dtype=torch.bool)
        gone[self._groups[pruned]] = True
        change = torch.zeros_like(self._weights)
        if self._inverse is not None and weight_update != "none":
            local = _on_all_ranks(lambda: self._change(pruned, gone, weight_update))
            change = self._columns.gather(local, _differences(self._columns.edges))
        change[gone] = -self._weights[gone]

        filled = self._positions >= 0
        places = self._positions[filled]
        weights = self._parameters.weights().to(change)
        weights[places] += change[filled]
        keep = self._parameters.keep().to(change.device)
        keep[self._positions[gone]] = False
        return Outcome(weights, keep, self._quad_model_change(change))

    def _change(self, pruned: Tensor, gone: Tensor, weight_update: WeightUpdate) -> Tensor:
        """Return the change of this rank's weights."""
        assert self._inverse is not None
        columns = self._columns.own
        weights = self._weights[columns]
        if weight_update == "joint":
            return self._inverse.joint_update(weights, gone[columns])
        own = slice(*self._group_edges[rank() : rank() + 2])
        groups, going = self._groups[own], pruned[own]
        chosen = going.any(1)
        return group_updates(self._inverse, weights, groups[chosen] - columns.start, going[chosen])

    def _quad_model_change(self, change: Tensor) -> float | None:
        if self._rows is None:
            return None
        terms = products(self._rows, change[self._columns.own], self._block_size)
        if self._block_size is None:
            squares = sum_over_ranks(terms).square().sum()
        else:
            squares = sum_over_ranks(terms.square().sum())
        damped = self._damping * change.square().sum()
        return float(0.5 * (damped + squares / len(self._rows)))


def _on_all_ranks(work: Callable[[], T]) -> T:
    """Return what a function returns; raise on all ranks if it raises on one."""
    result: T | None = None
    error: Exception | None = None
    try:
        result = work()
    except (RuntimeError, ValueError) as raised:
        error = raised
    check_on_all_ranks(error)
    assert result is not None
    return result


def _differences(edges: list[int]) -> list[int]:
    return [stop - start for start, stop in itertools.pairwise(edges)]
