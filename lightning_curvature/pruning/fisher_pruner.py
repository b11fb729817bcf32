"""Prunes weights of a model by what their loss costs, and lets the others make up for it.

Frantar, Kurtic & Alistarh, "M-FAC: efficient matrix-free approximations of second-order
information", 2021, arXiv:2107.03356 (static algorithm). Numbers A10 and A11 below are the saliency
and the weight update of that paper and of WoodFisher (arXiv:2004.14340).

Where we differ: the inverse comes from Cholesky factors in float64, of whichever of two forms is
the smaller, not from a recursion in float32, which loses the sign of small saliencies; by default
the update takes the interactions of all that is pruned in one block into account; exactly
``num_grads`` gradients are collected, on all ranks together.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_curvature.checks import (
    check_choice,
    check_count,
    check_in_range,
    check_positive,
)
from lightning_curvature.curvature.sensitive import Criterion
from lightning_curvature.oracle.ranks import rank, world_size
from lightning_curvature.pruning.event import PruningEvent, WeightUpdate
from lightning_curvature.pruning.exchange import check_on_all_ranks, counts_of_ranks
from lightning_curvature.pruning.parameters import PrunableParameters, prunable_weights
from lightning_curvature.pruning.patterns import Layout, Pattern, layout_of
from lightning_curvature.pruning.report import PruningReport, SaliencySummary
from lightning_curvature.pruning.saliency import GroupScores
from lightning_curvature.pruning.selection import Scope, num_dropped, select

__all__ = ["FisherPruner"]


class FisherPruner:
    """Prune the weights that the loss needs least, and change the others so that it rises least.

    ``H = damping * I + G^T G / m`` is the damped empirical Fisher matrix of ``m`` gradients. A
    weight costs ``w_q^2 / (2 [H^-1]_qq)``; those of least cost are pruned, over all layers
    together, and the weights that stay are changed by what minimizes the predicted loss.

    Ask for a sparsity in several events with gradients of their own (`recomputation_targets`):
    costs are predictions for small changes. Weights that are pruned stay so. After an event call
    `zero_pruned_state` with the optimizer, and ``parameters.zero_pruned()`` after each of its
    steps, or make a new optimizer; with a Trainer, the callback `MFACPruning` does all of this.

    On several ranks each rank brings gradients of its own examples, and all end with the same masks
    and weights, those of one process with all the gradients. Every rank must call `prune`.

    Time is that of ``m`` gradients, plus ``O(d m B)`` or ``O(d m^2)`` for blocks of size ``B``,
    whichever is less; memory is ``m d`` numbers.

    Args:
        parameters: The weights, or a model whose linear and convolution weights are meant.
        num_grads: Number of gradients ``m`` that `collect` collects, on all ranks together. Have no
            fewer than ``block_size``: of what no gradient has seen in a block the matrix only knows
            the damping, and weights that others make up for run away. Published settings have 64.
        damping: Added to the diagonal of the Fisher matrix, > 0. Gradients of whole batches are
            smaller than those of single examples, by about the root of the batch size, so that a
            damping belongs to a batch size. Published settings have 1e-5 and 1e-7; 1e-4 has
            done as well or better in what we have measured.
        block_size: Neighboring coordinates whose interactions are looked at; None for all of them.
            Rounded up to a multiple of the size of the pattern's groups.
        criterion: What is compared: "fisher" for the costs above, "magnitude" for the weights
            themselves, "random" for nothing. The last two need no gradients; without any, pruned
            weights are set to 0 and the others stay as they are.
        pattern: "unstructured"; "N:M", such as "2:4", keeps N of M consecutive inputs; "RxC", such
            as "4x1", prunes blocks of R outputs and C inputs. Groups with the least cost go first.
        scope: Whether the sparsity is that of all layers together ("global") or of each ("layer").
        weight_update: How the weights that stay are changed: "joint" by the minimizer, exact within
            blocks; "sum" by the sum of the minimizers for each group alone, as the paper does;
            "none" not at all.
        seed: Seed of random choices.
        device: Where to compute; None for where the weights are.

    Attributes:
        parameters: The `PrunableParameters`.
        needs_gradients: Whether `prune` cannot do without gradients.

    Raises:
        ValueError: If an argument is out of range, or there is nothing to prune.
        TypeError: If an argument has the wrong type.

    Examples:
        Prune half of the weights of a trained model, in four events:

        >>> from lightning_curvature.pruning import recomputation_targets
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
        >>> x, y = torch.randn(64, 32, 8), torch.randn(64, 32, 1)
        >>> pruner = FisherPruner(model, num_grads=64)
        >>> for sparsity in recomputation_targets(0.0, 0.5, 4):
        ...     gradients = pruner.collect(
        ...         lambda batch: nn.functional.mse_loss(model(x[batch]), y[batch])
        ...     )
        ...     report = pruner.prune(sparsity, gradients)
        >>> report.sparsity
        0.5

    References:
        Frantar et al., 2021, arXiv:2107.03356; Kurtic et al., 2022, arXiv:2203.07259 (groups).
    """

    def __init__(
        self,
        parameters: PrunableParameters | nn.Module,
        *,
        num_grads: int = 256,
        damping: float = 1e-4,
        block_size: int | None = 128,
        criterion: Criterion = "fisher",
        pattern: str = "unstructured",
        scope: Scope = "global",
        weight_update: WeightUpdate = "joint",
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        if isinstance(parameters, nn.Module):
            parameters = PrunableParameters(prunable_weights(parameters), model=parameters)
        check_count("num_grads", num_grads)
        check_positive("damping", damping)
        if block_size is not None:
            check_count("block_size", block_size)
        check_choice("criterion", criterion, ("fisher", "magnitude", "random"))
        check_choice("scope", scope, ("global", "layer"))
        check_choice("weight_update", weight_update, ("joint", "sum", "none"))
        self.parameters = parameters
        self.num_grads = num_grads
        self.damping = damping
        self.criterion: Criterion = criterion
        self.pattern = Pattern.parse(pattern)
        self.scope: Scope = scope
        self.weight_update: WeightUpdate = weight_update
        self.seed = seed
        self.device = None if device is None else torch.device(device)
        size = self.pattern.size
        self.block_size = None if block_size is None else -(-block_size // size) * size
        self._warned: set[str] = set()

    @property
    def needs_gradients(self) -> bool:
        """Whether `prune` cannot do without gradients."""
        return self.criterion == "fisher"

    def has_reached(self, sparsity: float) -> bool:
        """Tell whether `prune` would prune nothing more, since only whole groups are pruned.

        Args:
            sparsity: What it would be asked for.
        """
        layout = layout_of(self.parameters, self.pattern)
        budgets = self._budgets(sparsity)
        losses = (layout.positions[layout.groups()] >= 0).sum(1) - self.pattern.num_kept
        for number, budget in enumerate(budgets):
            own = losses if self.scope == "global" else losses[layout.layer == number]
            if len(own) > 0 and int(own.min()) <= budget:
                return False
        return True

    def collect(self, loss: Callable[[int], Tensor]) -> Tensor:
        """Return gradients of losses, as `prune` takes them.

        The model should be in evaluation mode. On several ranks use the model itself, not what
        averages its gradients over the ranks.

        Args:
            loss: Returns the mean loss of a batch. It is called with numbers that no other rank is
                called with: of ``num_grads`` divided by the ranks, rounded up, per rank.

        Returns:
            Gradients on the weights that are left, ``[m_local, n_survivors]``.
        """
        count = -(-self.num_grads // world_size())
        survivors = self.parameters.survivors()
        tensors = self.parameters.tensors()
        rows = self.parameters.weights().new_empty(count, len(survivors))
        for number in range(count):
            with torch.enable_grad():
                value = loss(rank() * count + number)
                gradients = torch.autograd.grad(value, tensors, allow_unused=True)
            rows[number] = self.parameters.gather(gradients, survivors)
        return rows

    @torch.no_grad()
    def prune(self, sparsity: float, gradients: Tensor | None = None) -> PruningReport:
        """Prune to a sparsity; nothing happens if it has been reached.

        Args:
            sparsity: Fraction of the prunable weights that is gone afterwards, in [0, 1), rounded
                down to whole weights and groups. Where weights do not fill groups and stay
                dense, as many as possible.
            gradients: This rank's gradients at the present weights, on the weights that are left
                (``parameters.survivors()``), ``[m_local, n_survivors]``, on any device. ``m`` is
                the number of rows of all ranks.

        Raises:
            ValueError: If the sparsity is out of range or the pattern cannot reach it, or
                gradients are missing, not finite, or of another shape.
            RuntimeError: If the Fisher matrix cannot be inverted, or a saliency or an updated
                weight is not finite. Nothing has changed then.
        """
        check_in_range("sparsity", sparsity, 0, 1)
        if self.pattern.size > 1 and sparsity > self.pattern.max_sparsity:
            raise ValueError(
                f"Invalid sparsity={sparsity!r}: pattern {self.pattern.name!r} ends at "
                f"{self.pattern.max_sparsity}."
            )
        layout = layout_of(self.parameters, self.pattern)
        self._warn_of_dense(layout)
        check_on_all_ranks(self._problem(gradients))
        counts = counts_of_ranks(-1 if gradients is None else len(gradients))
        if max(counts) == 0 or (min(counts) < 0 <= max(counts)):
            raise ValueError(f"Nothing was pruned: no gradients, on ranks {counts} (-1: none).")
        budgets = self._budgets(sparsity)
        if not any(budgets) or len(layout.first) == 0:
            return self._report(0, None, None)

        event = PruningEvent(
            self.parameters,
            layout,
            None if gradients is None else gradients.detach(),
            num_kept=self.pattern.num_kept,
            damping=self.damping,
            block_size=self.block_size,
            device=self.device or self.parameters.device,
        )
        scores = event.scores(self.criterion, self.seed)
        if not bool(scores.scores.isfinite().all()):
            raise RuntimeError(
                "Nothing was pruned: saliencies are not all finite. Enlarge damping."
            )
        chosen = self._choose(scores, layout, budgets)
        if not bool(chosen.any()):
            return self._report(0, None, None)
        outcome = event.outcome(scores.pruned & chosen[:, None], self.weight_update)
        if not bool(outcome.weights.isfinite().all()):
            raise RuntimeError(
                "Nothing was pruned: updated weights are not finite. Enlarge damping."
            )
        self.parameters.apply(outcome.weights, outcome.keep)
        return self._report(
            int(scores.pruned[chosen].sum()),
            SaliencySummary.of(scores.scores, chosen),
            outcome.quad_model_change,
        )

    def _problem(self, gradients: Tensor | None) -> Exception | None:
        """Return what is wrong with weights and gradients of this rank."""
        problem = None
        count = len(self.parameters.survivors())
        if not bool(self.parameters.weights().isfinite().all()):
            problem = "weights are not all finite."
        elif gradients is None:
            if self.needs_gradients:
                problem = f"criterion={self.criterion!r} needs gradients, got none."
        elif gradients.ndim != 2 or gradients.shape[1] != count:  # noqa: PLR2004 - a matrix
            problem = (
                f"expected gradients [m, {count}], one column per weight that is left, got "
                f"{list(gradients.shape)}."
            )
        elif not gradients.is_floating_point():
            problem = f"gradients must be floating point, got {gradients.dtype}."
        else:
            bad = [number for number, row in enumerate(gradients) if not row.isfinite().all()]
            if bad:
                problem = f"gradients {bad[:8]} are not finite."
        return None if problem is None else ValueError(f"Nothing was pruned: {problem}")

    def _budgets(self, sparsity: float) -> list[int]:
        """Return how many weights may be pruned: of all parameters, or of each."""
        keep = self.parameters.keep()
        if sparsity >= self.pattern.max_sparsity:
            # No group may be left over to rounding: hardware that knows the pattern needs them all.
            return [len(keep)] * (1 if self.scope == "global" else len(self.parameters))
        parts = [keep] if self.scope == "global" else torch.split(keep, self.parameters.sizes())
        return [num_dropped(len(part), len(part) - int(part.sum()), sparsity) for part in parts]

    def _choose(self, scores: GroupScores, layout: Layout, budgets: list[int]) -> Tensor:
        """Return which groups are pruned."""
        sizes = scores.pruned.sum(1)
        layer = layout.layer.to(sizes.device)
        chosen = torch.zeros_like(sizes, dtype=torch.bool)
        for number, budget in enumerate(budgets):
            members = (layer == number) if self.scope == "layer" else torch.ones_like(chosen)
            chosen[members] = select(scores.scores[members], sizes[members], budget)
        return chosen

    def _report(
        self, num_pruned: int, saliency: SaliencySummary | None, change: float | None
    ) -> PruningReport:
        layers = self.parameters.layer_sparsities()
        empty = tuple(name for name, sparsity in layers.items() if sparsity == 1)
        for name in empty:
            self._warn(
                f"empty {name}",
                f"No weight of {name} is left, so nothing passes through it. Prune less, or use "
                "scope='layer'.",
            )
        return PruningReport(
            self.parameters.sparsity(), layers, num_pruned, empty, saliency, change
        )

    def _warn_of_dense(self, layout: Layout) -> None:
        dense = {
            name: f"{name} ({count} of {size})"
            for name, count, size in zip(
                self.parameters.names, layout.dense, self.parameters.sizes(), strict=True
            )
            if count
        }
        if dense:
            self._warn(
                "dense",
                f"Weights that do not fill a group of pattern {self.pattern.name!r} stay dense, at "
                f"the end of a row or column: {', '.join(dense.values())}.",
            )

    def _warn(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            if rank() == 0:
                warnings.warn(message, RuntimeWarning, stacklevel=4)
