"""Pruning by curvature: which weights go, and how the others make up for them. Plain torch."""

from lightning_curvature.pruning.fisher_pruner import FisherPruner
from lightning_curvature.pruning.optimizer_state import zero_pruned_state
from lightning_curvature.pruning.parameters import PrunableParameters, prunable_weights
from lightning_curvature.pruning.report import PruningReport, SaliencySummary
from lightning_curvature.pruning.schedule import (
    CubicSparsity,
    ListSparsity,
    SparsitySchedule,
    recomputation_targets,
)

__all__ = [
    "CubicSparsity",
    "FisherPruner",
    "ListSparsity",
    "PrunableParameters",
    "PruningReport",
    "SaliencySummary",
    "SparsitySchedule",
    "prunable_weights",
    "recomputation_targets",
    "zero_pruned_state",
]
