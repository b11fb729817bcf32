"""What curvature costs, in percent of a step, measured without waiting for the device."""

import functools
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from lightning_curvature.oracle.protocol import Oracle

__all__ = ["CurvatureCost"]

# The oracle's work: what it is asked, and what it does in the main pass for that.
_ANSWERS = (
    "observe",
    "loss",
    "directional",
    "quadratic",
    "hvp",
    "products",
    "gradient",
    "sampled_squares",
)
# Questions that are answered by these methods and nowhere else.
_TIMED = frozenset({"loss", "directional", "hvp", "sampled"})
# Steps that ask that medians and sums run over, the steps around each that it is compared with, and
# the steps that tell how often one asks.
_WINDOW = 64
_NEIGHBORS = 9
_SHARE_WINDOW = 1000
# Fewer steps of a kind say nothing.
_LEAST = 5
# Steps that wait to be read; older ones are given up.
_PENDING = 256


@dataclass
class _Step:
    """Times of one optimizer step; an interval is a pair of what `_Clock.now` returned."""

    asks: bool
    intervals: list[tuple[Any, Any]] = field(default_factory=list)
    answers: list[tuple[Any, Any]] = field(default_factory=list)


class _Clock:
    """Takes the time on a device without waiting for it.

    Args:
        device: The device of the parameters.
    """

    def __init__(self, device: torch.device) -> None:
        self._events = device.type == "cuda"
        # Elsewhere the processor only knows when it has handed the work over.
        self.works = device.type in ("cpu", "cuda")

    def now(self) -> Any:
        """Return the present moment of the device."""
        if not self._events:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def seconds(self, intervals: Iterable[tuple[Any, Any]]) -> float | None:
        """Return the length of some intervals, None if the device has not come to their end."""
        total = 0.0
        for start, end in intervals:
            if not self._events:
                total += end - start
            elif not end.query():
                return None
            else:
                total += start.elapsed_time(end) / 1e3
        return total


class CurvatureCost:
    """Measures the time that curvature takes, in percent of the time of a step without it.

    Two ways, the first that is possible:

    1. Some steps ask the oracle, some do not: each of the former is compared with the median of the
       latter just before it, since a machine may be slower later on. The median of these
       differences counts, times the share of the steps that ask.
    2. Every step asks: the time spent in the oracle's answers, against the rest of the step. It
       leaves out what recording the main pass costs.

    Args:
        optimizers: Those that are monitored; others are left out.
        device: The device of the parameters.
    """

    def __init__(self, optimizers: Iterable[Any], device: torch.device) -> None:
        self._asking = [o for o in optimizers if getattr(o, "asks", None)]
        self._clock = _Clock(device)
        self._shadowed: list[tuple[Oracle, str]] = []
        self._pending: deque[_Step] = deque(maxlen=_PENDING)
        self._asked: deque[float] = deque(maxlen=_WINDOW)
        self._plain: deque[float] = deque(maxlen=_NEIGHBORS)
        self._extra: deque[float] = deque(maxlen=_WINDOW)
        self._in_answers: deque[float] = deque(maxlen=_WINDOW)
        self._kinds: deque[bool] = deque(maxlen=_SHARE_WINDOW)
        self._step: _Step | None = None
        self._start: Any = None
        self._depth = 0
        self._first = True

    @property
    def _measures(self) -> bool:
        return bool(self._asking) and self._clock.works

    def watch(self) -> None:
        """Take the time of the oracles' answers from now on."""
        if not self._measures:
            return
        for optimizer in self._asking:
            oracle = optimizer.oracle
            for name in _ANSWERS if oracle is not None else ():
                method = getattr(oracle, name, None)
                if method is not None and name not in vars(oracle):
                    vars(oracle)[name] = self._timed(method)
                    self._shadowed.append((oracle, name))

    def unwatch(self) -> None:
        """Undo `watch`."""
        for oracle, name in self._shadowed:
            vars(oracle).pop(name, None)
        self._shadowed = []

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._depth or self._step is None:  # some answers ask for others
                return method(*args, **kwargs)
            self._depth += 1
            start = self._clock.now()
            try:
                return method(*args, **kwargs)
            finally:
                self._depth -= 1
                self._step.answers.append((start, self._clock.now()))

        return timed

    def batch_starts(self) -> None:
        """Hear that a micro-batch starts."""
        if not self._measures:
            return
        if self._step is None:
            self._step = _Step(asks=any(_refreshes(o) for o in self._asking))
        self._start = self._clock.now()

    def batch_ends(self, *, stepped: bool) -> None:
        """Hear that a micro-batch has ended.

        Args:
            stepped: Whether it ended an optimizer step.
        """
        if self._step is None:
            return
        self._step.intervals.append((self._start, self._clock.now()))
        if stepped:
            if not self._first:  # it allocates, compiles, loads
                self._pending.append(self._step)
            self._first = False
            self._step = None

    def percent(self) -> float | None:
        """Return the cost of curvature in percent of a plain step, None if it cannot be told.

        To be called where the device was waited for anyway.
        """
        self._read()
        if len(self._extra) >= _LEAST:
            share = sum(self._kinds) / len(self._kinds)
            return 100 * share * statistics.median(self._extra)
        timed = all(optimizer.asks <= _TIMED for optimizer in self._asking)
        if timed and all(self._kinds) and len(self._asked) >= _LEAST:
            answers = sum(self._in_answers)
            return 100 * answers / (sum(self._asked) - answers)
        return None

    def _read(self) -> None:
        while self._pending:
            step = self._pending[0]
            seconds = self._clock.seconds(step.intervals)
            answers = self._clock.seconds(step.answers)
            if seconds is None or answers is None:
                return
            self._pending.popleft()
            self._kinds.append(step.asks)
            if step.asks:
                if len(self._plain) >= _LEAST:
                    self._extra.append(seconds / statistics.median(self._plain) - 1)
                self._asked.append(seconds)
                self._in_answers.append(answers)
            else:
                self._plain.append(seconds)


def _refreshes(optimizer: Any) -> bool:
    """Tell whether the coming step asks the oracle, or looks at the layers in the main pass."""
    due = (optimizer._due(name) for name in getattr(optimizer, "intervals", ()))
    return bool(optimizer.wants_record()) or any(due)
