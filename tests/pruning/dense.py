"""Pruning by definition: dense matrices in float64, and systems written out."""

import itertools

import torch
from torch import Tensor, nn

from lightning_curvature.pruning.parameters import PrunableParameters, prunable_weights


def fisher(gradients: Tensor, damping: float, block_size: int | None = None) -> Tensor:
    """Return ``damping I + G^T G / m`` without what is between blocks."""
    gradients = gradients.double()
    d = gradients.shape[1]
    matrix = gradients.T @ gradients / len(gradients)
    blocks = torch.arange(d) // (block_size or d)
    matrix[blocks[:, None] != blocks] = 0
    return matrix + damping * torch.eye(d, dtype=torch.float64)


def cost(h: Tensor, weights: Tensor, pruned: Tensor) -> Tensor:
    """Return the least of ``dw^T H dw / 2`` with ``dw = -w`` where pruned; not from the inverse."""
    change = joint(h, weights, pruned)
    return 0.5 * (change @ h @ change)


def joint(h: Tensor, weights: Tensor, pruned: Tensor) -> Tensor:
    """Return the change at that minimum."""
    change = torch.zeros_like(weights)
    change[pruned] = -weights[pruned]
    kept = ~pruned
    if kept.any():
        coupling = h[kept][:, pruned] @ weights[pruned]
        change[kept] = torch.linalg.solve(h[kept][:, kept], coupling)
    return change


def flags(size: int, *positions: int) -> Tensor:
    """Return a mask that is True at positions."""
    mask = torch.zeros(size, dtype=torch.bool)
    mask[list(positions)] = True
    return mask


def best_subset(
    h: Tensor, weights: Tensor, group: list[int], num_pruned: int
) -> tuple[float, tuple[int, ...]]:
    """Return the least cost of pruning so many weights of a group, and which those are."""
    return min(
        (float(cost(h, weights, flags(len(weights), *subset))), subset)
        for subset in itertools.combinations(group, num_pruned)
    )


def small_net(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Sequential:
    """Return a net with a convolution, whose widths are divisible by 4, 48 + 72 + 64 weights."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(4, 3, 2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(12, 6),
        nn.Tanh(),
        nn.Linear(6, 4, bias=False),
        nn.Linear(4, 10),
    ).to(dtype)


def parameters_of(model: nn.Module) -> PrunableParameters:
    """Return the weights of linear and convolution layers."""
    return PrunableParameters(prunable_weights(model), model=model)


def rows_for(parameters: PrunableParameters, num: int, seed: int = 1) -> Tensor:
    """Return random gradients with correlations and very different scales, float64."""
    generator = torch.Generator().manual_seed(seed)
    d = len(parameters.survivors())
    shared = torch.randn(3, d, generator=generator, dtype=torch.float64)
    own = torch.randn(num, d, generator=generator, dtype=torch.float64)
    mixing = torch.randn(num, 3, generator=generator, dtype=torch.float64)
    scales = torch.logspace(-2, 0, d, dtype=torch.float64)
    scales = scales[torch.randperm(d, generator=generator)]
    return (own + mixing @ shared) * scales
