"""When curvature is refreshed: rules that decide it step by step.

`TimeBudget`, which thins out any of them, is in `time_budget.py`.
"""

import math
import warnings
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from lightning_curvature.checks import check_in_range, check_interval, check_positive

__all__ = ["DriftInterval", "FixedInterval", "RefreshSchedule", "WarmupInterval"]

_ALLOWED_WITHOUT_DRIFT = 3


class RefreshSchedule(ABC):
    """Decides at which optimizer steps something is refreshed.

    Decisions come from the step number and from values that are the same on every rank.
    """

    @abstractmethod
    def due(self, step: int) -> bool:
        """Tell whether a step refreshes; asked any number of times, always with the same answer.

        Args:
            step: Optimizer steps done before it.
        """

    def refreshed(self, step: int, drift: Tensor | None) -> None:  # noqa: B027 - few want to know
        """Hear that a step has refreshed.

        Args:
            step: Optimizer steps done before it.
            drift: Relative change since the last refresh, a 0-dim tensor; None if unknown.
        """

    def state(self) -> dict[str, Any]:
        """Return what must survive a checkpoint, in plain types."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:  # noqa: B027 - most have none
        """Continue where a checkpoint was taken.

        Args:
            state: What `state` returned, perhaps of another rule; empty to start anew.
        """

    @property
    def every_step(self) -> bool:
        """Whether every step refreshes, so that nothing is ever carried over."""
        return False

    def interval_at(self, step: int) -> int:
        """Return the optimizer steps from one refresh to the next around a step; 0 if unknown.

        Args:
            step: Optimizer steps done before it.
        """
        return 0


class FixedInterval(RefreshSchedule):
    """Refresh every k-th step.

    ``FixedInterval(k)`` decides exactly as an ``*_update_interval`` of k does.

    Args:
        interval: Optimizer steps between two refreshes; at least 1.
        phase: Steps before the first refresh; in [0, interval).

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument is no integer.

    Examples:
        >>> rule = FixedInterval(3)
        >>> [step for step in range(10) if rule.due(step)]
        [0, 3, 6, 9]
    """

    def __init__(self, interval: int, phase: int = 0) -> None:
        check_interval("interval", interval)
        if not isinstance(phase, int):
            raise TypeError(f"Invalid phase={phase!r}: must be an integer.")
        check_in_range("phase", phase, 0, interval)
        self.interval = interval
        self.phase = phase

    def __repr__(self) -> str:
        return f"FixedInterval({self.interval}{f', phase={self.phase}' if self.phase else ''})"

    def due(self, step: int) -> bool:
        """Tell whether a step refreshes; see `RefreshSchedule.due`."""
        return step % self.interval == self.phase

    @property
    def every_step(self) -> bool:
        """Whether every step refreshes."""
        return self.interval == 1

    def interval_at(self, step: int) -> int:
        """Return the interval."""
        return self.interval


class WarmupInterval(RefreshSchedule):
    """Refresh often at first, and then by another rule.

    The rule that follows hears of the refreshes of the warm-up, but not of their drift, which
    belongs to another interval.

    Args:
        steps: Optimizer steps of the warm-up; at least 1.
        interval: Steps between two refreshes of the warm-up; at least 1.
        then: Rule after it. If it has an interval in place of a rule, the first refresh after the
            warm-up is at step number ``steps``.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If ``steps`` or ``interval`` is no integer.

    Examples:
        >>> rule = WarmupInterval(6, 2, then=5)
        >>> [step for step in range(20) if rule.due(step)]
        [0, 2, 4, 6, 11, 16]
    """

    def __init__(self, steps: int, interval: int, then: RefreshSchedule | int) -> None:
        check_interval("steps", steps)
        check_interval("interval", interval)
        if isinstance(then, int):
            check_interval("then", then)
            then = FixedInterval(then, steps % then)
        self.steps = steps
        self.interval = interval
        self.then = then

    def __repr__(self) -> str:
        return f"WarmupInterval({self.steps}, {self.interval}, then={self.then!r})"

    def due(self, step: int) -> bool:
        """Tell whether a step refreshes; see `RefreshSchedule.due`."""
        return step % self.interval == 0 if step < self.steps else self.then.due(step)

    def refreshed(self, step: int, drift: Tensor | None) -> None:
        """Tell the rule that follows; see `RefreshSchedule.refreshed`."""
        self.then.refreshed(step, torch.tensor(math.nan) if step < self.steps else drift)

    def state(self) -> dict[str, Any]:
        """Return the state of the rule that follows; the warm-up has none."""
        return self.then.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue where a checkpoint was taken; see `RefreshSchedule.load_state`."""
        self.then.load_state(state)

    @property
    def every_step(self) -> bool:
        """Whether every step refreshes."""
        return self.interval == 1 and self.then.every_step

    def interval_at(self, step: int) -> int:
        """Return the interval of the rule that holds at a step."""
        return self.interval if step < self.steps else self.then.interval_at(step)


class DriftInterval(RefreshSchedule):
    """Refresh seldom while curvature changes little, and often while it changes.

    The drift is the relative change that a refresh made. The interval doubles if it was below
    ``low_drift``, and halves if it was above ``high_drift``; the first refresh has nothing to
    differ from. The drift is read from the device only when the answer depends on it, at least half
    an interval later.

    A due step that could not refresh, because its gradient was not finite, leaves the next one due.
    Whoever refreshes must say the drift; otherwise the interval stays, with a warning.

    Args:
        interval: First interval, in optimizer steps.
        min_interval: Shortest interval; at least 1.
        max_interval: Longest interval; None for 16 times the first.
        low_drift: Drift below which the interval doubles; at least 0.
        high_drift: Drift above which the interval halves; above ``low_drift``.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> import torch
        >>> rule = DriftInterval(2, low_drift=0.1, high_drift=0.5)
        >>> refreshes = []
        >>> for step in range(20):
        ...     if rule.due(step):
        ...         refreshes.append(step)
        ...         rule.refreshed(step, torch.tensor(0.01))
        >>> refreshes
        [0, 2, 6, 14]
    """

    def __init__(
        self,
        interval: int,
        min_interval: int = 1,
        max_interval: int | None = None,
        low_drift: float = 0.05,
        high_drift: float = 0.2,
    ) -> None:
        check_interval("interval", interval)
        check_interval("min_interval", min_interval)
        max_interval = 16 * interval if max_interval is None else max_interval
        check_interval("max_interval", max_interval)
        if not min_interval <= interval <= max_interval:
            raise ValueError(
                f"Invalid interval={interval!r}: must be in [min_interval, max_interval], here "
                f"[{min_interval}, {max_interval}]."
            )
        check_positive("low_drift", low_drift, zero=True)
        check_in_range("high_drift", high_drift, low_drift, math.inf, include_low=False)
        self.interval = interval
        self.min_interval = min_interval
        self.max_interval = max_interval
        self.low_drift = low_drift
        self.high_drift = high_drift
        self._last = -1
        self._present = interval
        self._drift: Tensor | float | None = None
        self._without_drift = 0

    def __repr__(self) -> str:
        return (
            f"DriftInterval({self.interval}, {self.min_interval}, {self.max_interval}, "
            f"{self.low_drift:g}, {self.high_drift:g})"
        )

    def due(self, step: int) -> bool:
        """Tell whether a step refreshes; see `RefreshSchedule.due`."""
        if self._last < 0 or step == self._last:
            return True
        waited = step - self._last
        if self._drift is not None:
            if waited < max(self._present // 2, self.min_interval):
                return False
            self._adapt(float(self._drift))
            self._drift = None
        return waited >= self._present

    def _adapt(self, drift: float) -> None:
        if drift > self.high_drift:
            self._present = max(self._present // 2, self.min_interval)
        elif drift < self.low_drift:  # NaN is neither
            self._present = min(self._present * 2, self.max_interval)

    def refreshed(self, step: int, drift: Tensor | None) -> None:
        """Remember step and drift, unread; see `RefreshSchedule.refreshed`."""
        # The first refresh of all has nothing to differ from.
        self._drift = None if self._last in (-1, step) and self._drift is None else drift
        self._last = step
        self._without_drift = 0 if drift is not None else self._without_drift + 1
        # The first refresh of all has nothing to be compared to, that after a resume perhaps not.
        if self._without_drift == _ALLOWED_WITHOUT_DRIFT:
            warnings.warn(
                f"{self!r} was told no drift at {self._without_drift} refreshes, so the interval "
                "stays as it is. Use a fixed interval for an optimizer that does not measure it.",
                RuntimeWarning,
                stacklevel=2,
            )

    def state(self) -> dict[str, Any]:
        """Return step and drift of the last refresh, and the interval; reads the device."""
        drift = math.nan if self._drift is None else float(self._drift)
        return {
            "rule": repr(self),
            "last": self._last,
            "interval": self._present,
            "drift": drift if math.isfinite(drift) else None,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue where a checkpoint was taken.

        Args:
            state: What `state` returned; empty to start anew. Of a rule with other arguments only
                the last refresh counts.
        """
        self._last = int(state.get("last", -1))
        self._present = self.interval
        self._drift = None
        if state.get("rule") == repr(self):
            self._present = int(state["interval"])
            self._drift = state["drift"]

    def interval_at(self, step: int) -> int:
        """Return the present interval, without waiting for the drift of the last refresh."""
        return self._present
