"""Saliency: by how much the loss is predicted to rise if a group of weights is pruned.

Hassibi & Stork, "Second order derivatives for network pruning: optimal brain surgeon", 1992, with
the inverse of the empirical Fisher matrix as in M-FAC (arXiv:2107.03356); groups as in Kurtic et
al., "The optimal BERT surgeon", 2022, arXiv:2203.07259. The gradient of the loss is neglected.

    one weight:  rho_q = w_q^2 / (2 [H^-1]_qq)
    a group:     rho_g = w_g^T ([H^-1]_gg)^-1 w_g / 2

Of "N:M" groups the best M - N weights are pruned: all subsets are compared. Magnitude is the same
with the identity for H. Everything is float64.
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_curvature.curvature.inverse_fisher import InverseFisher
from lightning_curvature.oracle.streams import stream

__all__ = [
    "GroupScores",
    "fisher_scores",
    "group_updates",
    "magnitude_scores",
    "products",
    "random_scores",
]

# Entries of the inverse that are looked at together.
_CHUNK = 1 << 22


class GroupScores(NamedTuple):
    """How much each group matters.

    Attributes:
        scores: Saliency of each group, float64 ``[n]``.
        pruned: Which of its weights go if it is pruned, bool ``[n, size]``.
    """

    scores: Tensor
    pruned: Tensor


def fisher_scores(
    inverse: InverseFisher, weights: Tensor, groups: Tensor, present: Tensor, num_kept: int
) -> GroupScores:
    """Return the saliency of groups.

    Args:
        inverse: Inverse of the Fisher matrix.
        weights: All weights it is about, float64 ``[d]``.
        groups: Coordinates of the groups ``[n, size]``.
        present: Which of these are weights, not gaps, bool ``[n, size]``. More than ``num_kept``.
        num_kept: How many weights of a group stay when it is pruned.

    Raises:
        RuntimeError: If part of the inverse is not positive definite.
    """
    size = groups.shape[1]
    if size == 1:
        return GroupScores(
            0.5 * weights[groups[:, 0]].square() / inverse.diagonal()[groups[:, 0]], present
        )
    count = max(_CHUNK // size**2, 1)
    parts = [
        _best(weights[part], inverse.submatrices(part), there, num_kept)
        for part, there in zip(torch.split(groups, count), torch.split(present, count), strict=True)
    ]
    if not parts:
        return GroupScores(weights.new_empty(0), present)
    return GroupScores(
        torch.cat([part.scores for part in parts]), torch.cat([part.pruned for part in parts])
    )


def _best(weights: Tensor, inverses: Tensor, present: Tensor, num_kept: int) -> GroupScores:
    """Return the least saliency of all choices of what is pruned."""
    size = weights.shape[1]
    scores = torch.full_like(weights[:, 0], torch.inf)
    pruned = torch.zeros_like(present)
    for subset in itertools.combinations(range(size), size - num_kept):
        taken = torch.zeros(size, dtype=torch.bool, device=weights.device)
        taken[list(subset)] = True
        # A gap must not stay in place of a weight; it costs nothing to prune.
        allowed = (taken | present).all(1)
        solved = _solved(inverses[:, taken][:, :, taken], weights[:, taken])
        score = 0.5 * (solved * weights[:, taken]).sum(1)
        better = allowed & (score < scores)
        scores = torch.where(better, score, scores)
        pruned = torch.where(better[:, None], taken & present, pruned)
    return GroupScores(scores, pruned)


def _solved(matrices: Tensor, values: Tensor) -> Tensor:
    """Return the solutions of symmetric systems, ``[n, k]``."""
    if matrices.shape[-1] == 1:
        return values / matrices[..., 0]
    factors, info = torch.linalg.cholesky_ex(matrices)
    if bool((info != 0).any()):
        raise RuntimeError(
            "Part of the inverse of the Fisher matrix is not positive definite in float64: the "
            "damping is too small beside the gradients. Enlarge it."
        )
    return torch.cholesky_solve(values[..., None], factors)[..., 0]


def group_updates(
    inverse: InverseFisher, weights: Tensor, groups: Tensor, pruned: Tensor
) -> Tensor:
    """Return the sum of the best changes of all weights for each group alone.

    For single weights it is the update of M-FAC and WoodFisher, ``H^-1 t`` with
    ``t_q = -w_q / [H^-1]_qq``; for groups ``t_g = -([H^-1]_gg)^-1 w_g``. Interactions between the
    groups are neglected, so that the pruned weights are not 0 after it.

    Args:
        inverse: Inverse of the Fisher matrix.
        weights: All weights it is about, float64 ``[d]``.
        groups: Coordinates of the groups that are pruned ``[n, size]``.
        pruned: Which of their weights go, bool ``[n, size]``.

    Returns:
        Changes ``[d]``.
    """
    targets = torch.zeros_like(weights)
    size = groups.shape[1]
    if size == 1:
        taken = groups[:, 0]
        targets[taken] = -weights[taken] / inverse.diagonal()[taken]
        return inverse @ targets
    count = max(_CHUNK // size**2, 1)
    for part, gone in zip(torch.split(groups, count), torch.split(pruned, count), strict=True):
        # What stays is replaced by rows and columns of the identity and a zero.
        both = gone[:, :, None] & gone[:, None, :]
        identity = torch.eye(size, dtype=weights.dtype, device=weights.device)
        matrices = torch.where(both, inverse.submatrices(part), identity)
        targets[part] = -_solved(matrices, weights[part] * gone)
    return inverse @ targets


def magnitude_scores(weights: Tensor, present: Tensor, num_kept: int) -> GroupScores:
    """Return half the sum of squares of what goes.

    Args:
        weights: Weights of the groups, float64 ``[n, size]``.
        present: Which of these are weights, not gaps, bool ``[n, size]``. More than ``num_kept``.
        num_kept: How many weights of a group stay when it is pruned.
    """
    return _separable(0.5 * weights.square(), present, num_kept)


def random_scores(
    positions: Tensor, present: Tensor, num_kept: int, total: int, *key: int
) -> GroupScores:
    """Return random scores, the same on every device and rank.

    Args:
        positions: Positions of the weights of the groups, int64 ``[n, size]``.
        present: Which of these are weights, not gaps, bool ``[n, size]``. More than ``num_kept``.
        num_kept: How many weights of a group stay when it is pruned.
        total: Number of positions.
        *key: What the numbers depend on.
    """
    generator = stream(torch.device("cpu"), "random pruning", *key)
    drawn = torch.rand(total, generator=generator, dtype=torch.float64).to(positions.device)
    return _separable(drawn[positions], present, num_kept)


def _separable(costs: Tensor, present: Tensor, num_kept: int) -> GroupScores:
    """Return scores that are sums over the weights that go: those of the least costs."""
    size = costs.shape[1]
    # Gaps go first: they are none of those that stay.
    order = costs.masked_fill(~present, -1).argsort(dim=1, stable=True)
    pruned = torch.zeros_like(present)
    pruned.scatter_(1, order[:, : size - num_kept], True)
    pruned &= present
    return GroupScores((costs * pruned).sum(1), pruned)


def products(rows: Tensor, change: Tensor, block_size: int | None) -> Tensor:
    """Return the products of gradients and a change of the weights, per block.

    Half their squares, averaged over the gradients and summed over the blocks, is what the Fisher
    matrix predicts that the change does to the loss.

    Args:
        rows: Gradients ``[m, d]``, on any device.
        change: Change of the weights, float64 ``[d]``.
        block_size: Coordinates per block; None for one block.

    Returns:
        Products ``[m, blocks]``, float64, on the device of the change.
    """
    width = len(change)
    size = min(block_size or width, width)
    spare = -width % size
    parts = []
    for part in torch.split(rows, max(_CHUNK // max(width, 1), 1)):
        terms = part.to(change.device, torch.float64) * change
        parts.append(torch.nn.functional.pad(terms, (0, spare)).view(len(part), -1, size).sum(-1))
    return torch.cat(parts)
