"""Sparsity schedules: when weights are pruned during a fit, and how many are gone afterwards.

Zhu & Gupta, "To prune, or not to prune", 2017, arXiv:1710.01878 (the cubic schedule); Frantar,
Kurtic & Alistarh, "M-FAC", 2021, arXiv:2107.03356 (lists, and one shot with recomputation).
"""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from lightning_curvature.checks import check_count, check_in_range

__all__ = ["CubicSparsity", "ListSparsity", "SparsitySchedule", "recomputation_targets"]


@runtime_checkable
class SparsitySchedule(Protocol):
    """What tells at which epochs weights are pruned."""

    def sparsity(self, epoch: int) -> float | None:
        """Return the sparsity to prune to before the first batch of an epoch.

        The epoch itself is then the first one of fine-tuning.

        Args:
            epoch: Number of the epoch that starts, from 0.

        Returns:
            Fraction of the prunable weights that is gone afterwards, in [0, 1); None if nothing is
            pruned at that epoch.
        """
        ...


class CubicSparsity:
    """Prune much at first and ever less later: ``s(t) = f + (i - f) (1 - (t - t0) / (t1 - t0))^3``.

    The last event is always at ``end_epoch``, also if the interval does not lead there.

    Args:
        final: Sparsity ``f`` from ``end_epoch`` on, in (0, 1).
        start_epoch: Epoch ``t0`` of the first event, from 0. With ``initial=0`` nothing is pruned
            yet at that epoch.
        end_epoch: Epoch ``t1`` of the last event; the same as ``start_epoch`` for one event.
        interval: Epochs from one event to the next.
        initial: Sparsity ``i`` at ``start_epoch``, in [0, 1), at most ``final``.

    Raises:
        ValueError: If a number is out of range.
        TypeError: If a number has the wrong type.

    Examples:
        >>> schedule = CubicSparsity(0.75, start_epoch=0, end_epoch=4, interval=2)
        >>> [schedule.sparsity(epoch) for epoch in range(6)]
        [None, None, 0.65625, None, 0.75, None]

    References:
        Zhu and Gupta, 2017, arXiv:1710.01878, equation 1.
    """

    def __init__(
        self,
        final: float,
        start_epoch: int,
        end_epoch: int,
        interval: int = 1,
        initial: float = 0.0,
    ) -> None:
        check_in_range("final", final, 0, 1, include_low=False)
        _check_epoch("start_epoch", start_epoch)
        _check_epoch("end_epoch", end_epoch)
        if end_epoch < start_epoch:
            raise ValueError(
                f"Invalid end_epoch={end_epoch!r}: must be >= start_epoch={start_epoch!r}."
            )
        check_count("interval", interval)
        check_in_range("initial", initial, 0, final, include_high=True)
        self.final = final
        self.start_epoch = start_epoch
        self.end_epoch = end_epoch
        self.interval = interval
        self.initial = initial

    def sparsity(self, epoch: int) -> float | None:
        """Return the sparsity to prune to before an epoch, None for no event."""
        if epoch == self.end_epoch:
            return self.final
        passed = epoch - self.start_epoch
        if not self.start_epoch <= epoch < self.end_epoch or passed % self.interval:
            return None
        rest = 1 - passed / (self.end_epoch - self.start_epoch)
        target = self.final + (self.initial - self.final) * rest**3
        return target if passed or self.initial > 0 else None

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(final={self.final}, start_epoch={self.start_epoch}, "
            f"end_epoch={self.end_epoch}, interval={self.interval}, initial={self.initial})"
        )


class ListSparsity:
    """Prune to given sparsities at given epochs.

    Args:
        sparsities: Sparsity per epoch, from 0, each in (0, 1) and above the ones before.

    Raises:
        ValueError: If there is none, one is out of range, or they do not increase.
        TypeError: If a number has the wrong type.

    Examples:
        >>> schedule = ListSparsity({0: 0.5, 10: 0.75})
        >>> schedule.sparsity(0), schedule.sparsity(5), schedule.sparsity(10)
        (0.5, None, 0.75)
    """

    def __init__(self, sparsities: Mapping[int, float]) -> None:
        if not sparsities:
            raise ValueError("Invalid sparsities={}: must name at least one epoch.")
        reached = 0.0
        for epoch in sorted(sparsities):
            _check_epoch("epoch", epoch)
            check_in_range(f"sparsities[{epoch}]", sparsities[epoch], 0, 1, include_low=False)
            if sparsities[epoch] <= reached:
                raise ValueError(
                    f"Invalid sparsities[{epoch}]={sparsities[epoch]!r}: must be above {reached}, "
                    "which is reached before; weights that are pruned stay so."
                )
            reached = sparsities[epoch]
        self.sparsities = {epoch: sparsities[epoch] for epoch in sorted(sparsities)}

    def sparsity(self, epoch: int) -> float | None:
        """Return the sparsity to prune to before an epoch, None for no event."""
        return self.sparsities.get(epoch)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.sparsities})"


def recomputation_targets(start: float, final: float, num_recomputations: int) -> list[float]:
    """Return the sparsities on the way from one to another, the last of which is the other.

    Each event leaves the same fraction of the weights that are left. Between two of them the
    gradients are collected anew, at the weights and on the coordinates that are left.

    Args:
        start: Sparsity now, in [0, 1).
        final: Sparsity to reach, in (0, 1), at least ``start``.
        num_recomputations: Number of events.

    Raises:
        ValueError: If a number is out of range.
        TypeError: If a number has the wrong type.

    Examples:
        >>> recomputation_targets(0.0, 0.75, 2)
        [0.5, 0.75]
    """
    check_in_range("start", start, 0, 1)
    check_in_range("final", final, 0, 1, include_low=False)
    if final < start:
        raise ValueError(f"Invalid final={final!r}: must be >= start={start!r}.")
    check_count("num_recomputations", num_recomputations)
    ratio = ((1 - final) / (1 - start)) ** (1 / num_recomputations)
    targets = [1 - (1 - start) * ratio**done for done in range(1, num_recomputations)]
    return [*targets, final]


def _check_epoch(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(
            f"Invalid {name}={value!r}: must be an integer >= 0, got {type(value).__name__}."
        )
    if value < 0:
        raise ValueError(f"Invalid {name}={value!r}: must be an integer >= 0.")
