"""Which rank inverts what: pure arithmetic, the same on every rank.

Jobs of known cost are given to ranks longest first, each to the rank with the least load so far.
The largest load is then at most 4/3 of the best possible one. (R. L. Graham, "Bounds on
multiprocessing timing anomalies", 1969. K-FAC distributes inverses like this in J. G. Pauloski and
others, "KAISA: an adaptive second-order optimizer framework for deep neural networks", 2021,
arXiv:2107.01739.)
"""

import heapq
import math
from collections.abc import Sequence

from lightning_curvature.checks import check_count

__all__ = ["assign", "balance", "inverse_cost"]


def inverse_cost(size: int, count: int = 1) -> int:
    """Return the relative cost to invert matrices or to find their eigenvectors.

    Args:
        size: Rows n of a matrix.
        count: Number of matrices, such as the groups of a convolution.
    """
    return count * size**3


def assign(costs: Sequence[float], ranks: int) -> list[int]:
    """Distribute jobs over ranks so that the largest load is small.

    Jobs of equal cost go in the order given, and among ranks of equal load the one with the fewest
    jobs is served first, then the lowest: every rank finds the same answer.

    Args:
        costs: Cost of each job; finite, at least 0.
        ranks: Number of ranks; at least 1.

    Returns:
        The rank of each job.

    Raises:
        ValueError: If a cost or the number of ranks is out of range.
        TypeError: If the number of ranks is no integer.

    Examples:
        >>> assign([1, 8, 27, 8, 1], ranks=2)
        [1, 1, 0, 1, 1]
    """
    check_count("ranks", ranks)
    _check_costs(costs)
    loads: list[tuple[float, int, int]] = [(0, 0, rank) for rank in range(ranks)]
    owners = [0] * len(costs)
    for job in sorted(range(len(costs)), key=lambda job: (-costs[job], job)):
        load, jobs, rank = loads[0]
        owners[job] = rank
        heapq.heapreplace(loads, (load + costs[job], jobs + 1, rank))
    return owners


def balance(costs: Sequence[float], owners: Sequence[int], ranks: int) -> float:
    """Return the largest load over the mean load: 1 at best, ``ranks`` if one rank does all.

    Args:
        costs: Cost of each job; finite, at least 0.
        owners: Rank of each job, as `assign` returns them.
        ranks: Number of ranks; at least 1.

    Raises:
        ValueError: If the lengths differ or a value is out of range.
        TypeError: If the number of ranks is no integer.

    Examples:
        >>> balance([1, 8, 27, 8, 1], [1, 1, 0, 1, 1], ranks=2)
        1.2
    """
    check_count("ranks", ranks)
    _check_costs(costs)
    if len(owners) != len(costs):
        raise ValueError(
            f"Invalid owners={list(owners)!r}: must have one rank per cost, here {len(costs)}."
        )
    loads = [0.0] * ranks
    for cost, owner in zip(costs, owners, strict=True):
        if not 0 <= owner < ranks:
            raise ValueError(f"Invalid owner {owner!r}: must be in [0, {ranks}).")
        loads[owner] += cost
    total = sum(loads)
    return max(loads) * ranks / total if total > 0 else 1.0


def _check_costs(costs: Sequence[float]) -> None:
    for number, cost in enumerate(costs):
        if not (math.isfinite(cost) and cost >= 0):
            raise ValueError(f"Invalid costs[{number}]={cost!r}: must be finite and >= 0.")
