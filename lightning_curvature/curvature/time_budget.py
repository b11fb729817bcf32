"""A limit on the time that refreshing curvature may cost."""

import math
from collections import deque
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from torch import Tensor

from lightning_curvature.checks import check_in_range
from lightning_curvature.curvature.schedule import RefreshSchedule

__all__ = ["TimeBudget"]

# Steps of each kind that medians are taken over, and that are needed before they are believed.
_KEPT, _NEEDED = 9, 3
# Interval until then: as many plain steps as refreshing ones.
_MEASURING = 2
# Refreshes measured one after the other; after them one in so many, as measuring waits for the
# device.
_ALL, _ONE_IN = 12, 10


class TimeBudget(RefreshSchedule):
    """Postpone the refreshes of a rule where they would cost too much time.

    The cost of a refresh is the time of a step that refreshes minus that of a plain one, both
    running medians. Refreshes then have a distance of at least ``cost / (limit * plain)`` steps.
    The first step of each kind is left out of the medians, since it compiles and allocates; until
    three of each kind are known the distance is at least 2.

    Somebody has to measure: `HessianSchedule` does it in a Trainer; in a plain loop call
    `measured` after each step for which `wants_time` is true.

    Args:
        rule: Decides when a refresh is wanted. One that has to wait is made as soon as it may.
        max_extra_time_percent: Time for refreshing, in percent of the time of the steps without it.
        mean: Averages numbers over the ranks, so that all decide alike; None for one process.

    Raises:
        ValueError: If the limit is not positive.

    Examples:
        >>> from lightning_curvature.curvature.schedule import FixedInterval
        >>> rule = TimeBudget(FixedInterval(1), max_extra_time_percent=25.0)
        >>> refreshes = []
        >>> for step in range(30):
        ...     seconds = 2.0 if rule.due(step) else 1.0  # a refresh costs a second more
        ...     if rule.due(step):
        ...         refreshes.append(step)
        ...         rule.refreshed(step, None)
        ...     rule.measured(step, seconds)
        >>> refreshes
        [0, 2, 4, 6, 8, 12, 16, 20, 24, 28]
    """

    def __init__(
        self,
        rule: RefreshSchedule,
        max_extra_time_percent: float,
        mean: Callable[[Sequence[float]], Sequence[float]] | None = None,
    ) -> None:
        check_in_range(
            "max_extra_time_percent", max_extra_time_percent, 0, math.inf, include_low=False
        )
        self.rule = rule
        self.max_extra_time_percent = max_extra_time_percent
        self._mean = mean
        self._start()

    def _start(self) -> None:
        self._last = -1
        self._distance = _MEASURING
        # Steps that the rule was asked about, and whether it wanted a refresh since the last one.
        self._asked: int | None = None
        self._wanted = False
        # Durations of steps without and with a refresh; the first of each is not kept.
        self._times: tuple[deque[float], deque[float]] = (deque(maxlen=_KEPT), deque(maxlen=_KEPT))
        self._left_out = [False, False]
        self._refreshes = 0

    def __repr__(self) -> str:
        return f"TimeBudget({self.rule!r}, {self.max_extra_time_percent:g})"

    def due(self, step: int) -> bool:
        """Tell whether a step refreshes; see `RefreshSchedule.due`."""
        if step == self._last:
            return True
        # The rule is asked about every step: one that wanted a refresh may have passed.
        first = step if self._asked is None else self._asked + 1
        for number in range(first, step + 1):
            self._wanted = self._wanted or self.rule.due(number)
            self._asked = number
        return self._wanted and (self._last < 0 or step - self._last >= self._distance)

    def refreshed(self, step: int, drift: Tensor | None) -> None:
        """Pass on what the rule wants to know; see `RefreshSchedule.refreshed`."""
        if step != self._last:
            self._refreshes += 1
        self._last = self._asked = step
        self._wanted = False
        self.rule.refreshed(step, drift)

    # Time

    def wants_time(self, step: int) -> bool:
        """Tell whether the duration of a step is of use.

        Args:
            step: Optimizer steps done before it.
        """
        if self.due(step):
            number = self._refreshes - (step == self._last)
        elif step == self._last + 1:
            number = self._refreshes - 1
        else:
            return False
        return number < _ALL or number % _ONE_IN == 0

    def measured(self, step: int, seconds: float, steps: int = 1) -> None:
        """Hear how long something took; at a refresh the ranks exchange two numbers.

        Args:
            step: Optimizer steps done before it.
            seconds: Its duration.
            steps: Optimizer steps that it took, of which at most one refreshed.
        """
        plain, refreshing = self._times
        known = min(len(plain), len(refreshing)) >= _NEEDED
        if steps > 1 and not known:  # some of these must be without a refresh
            self._distance = max(self._distance, _MEASURING * steps)
        if not step <= self._last < step + steps:
            self._keep(0, seconds / steps)
            return
        others = (steps - 1) * median(plain) if plain else (steps - 1) * seconds / steps
        self._keep(1, seconds - others)
        if min(len(plain), len(refreshing)) < _NEEDED:
            return
        medians: Sequence[float] = [median(plain), median(refreshing)]
        plain_time, time = medians if self._mean is None else self._mean(medians)
        if plain_time > 0:
            allowed = self.max_extra_time_percent / 100 * plain_time
            # A little less than exact, or round-off would add a step.
            self._distance = max(math.ceil((time - plain_time) / allowed - 1e-9), 1)

    def _keep(self, kind: int, seconds: float) -> None:
        if self._left_out[kind]:
            self._times[kind].append(seconds)
        self._left_out[kind] = True

    # State

    def state(self) -> dict[str, Any]:
        """Return the last refresh, the distance in force and the state of the rule; no times."""
        return {
            "rule": repr(self),
            "last": self._last,
            "distance": self._distance,
            "wanted": self._wanted,
            **{f"rule_{name}": value for name, value in self.rule.state().items()},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue where a checkpoint was taken, and measure anew: the machine may be another.

        Args:
            state: What `state` returned; empty to start anew. Of a rule with other arguments only
                the last refresh counts.
        """
        self._start()
        self._last = int(state.get("last", -1))
        if state.get("rule") == repr(self):
            self._distance = int(state["distance"])
            self._wanted = bool(state["wanted"])
            self.rule.load_state(
                {
                    name.removeprefix("rule_"): value
                    for name, value in state.items()
                    if name.startswith("rule_")
                }
            )
        else:
            self.rule.load_state({"last": self._last} if state else {})

    @property
    def every_step(self) -> bool:
        """Whether every step refreshes; nobody can promise it."""
        return False

    def interval_at(self, step: int) -> int:
        """Return the interval of the rule, or the distance in force if that is larger."""
        return max(self.rule.interval_at(step), self._distance)
