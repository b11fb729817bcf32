"""The free self-check: an extra pass must find the slope that the gradient promises.

Lost tangents, other dropout masks, stale autocast weights, a batch changed in place, wrong
accumulation weights: each shows as a slope that differs from <grad, d>. Sums are kept on the device
and read only now and then, so that a step never waits for the device.
"""

import math
from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["TOLERANCES", "SelfCheck", "Verdict"]

# Largest relative deviation that is put down to round-off.
TOLERANCES = {"jvp": 0.01, "fd": 0.05, "autocast": 0.05, "half": 0.1}


class Verdict(NamedTuple):
    """What the self-check saw since it was read last.

    Attributes:
        deviation: sqrt(sum (slope - expected)^2 / sum expected^2), where what round-off explains is
            within the tolerance; NaN if nothing was compared.
        unmodeled: Share of the loss that no captured loss accounts for, in [0, 1] or more.
    """

    deviation: float
    unmodeled: float


class SelfCheck:
    """Collects slopes from extra passes and compares them with <grad, d>.

    A sum over several asks is compared, because a single slope may be close to zero.

    Args:
        interval: Number of asks between two readings; the very first ask is read too.

    Attributes:
        asks: Number of asks so far.
        history: The last verdicts, oldest first.
    """

    def __init__(self, interval: int = 50) -> None:
        self.interval = interval
        self.asks = 0
        self.history: deque[Verdict] = deque(maxlen=16)
        self._sums: Tensor | None = None

    def add(
        self, measured: Tensor, expected: Tensor | None, unmodeled: Tensor, roundoff: Tensor
    ) -> None:
        """Add one comparison; nothing is read from the device.

        Args:
            measured: Slope found by the extra pass.
            expected: <grad, d>, or None if it is unknown.
            unmodeled: Share of the loss without curvature.
            roundoff: Deviation that round-off alone may cause.
        """
        if expected is None:
            expected = measured
        dtype = measured.dtype
        expected = expected.to(dtype)
        scale = expected.square() + (roundoff.to(dtype) / TOLERANCES["fd"]).square()
        sums = torch.stack([(measured - expected).square(), scale, unmodeled.to(dtype)])
        # A bad batch proves nothing about the method.
        sums = torch.where(torch.isfinite(sums).all(), sums, torch.zeros_like(sums))
        self._sums = sums if self._sums is None else self._sums + sums
        self.asks += 1

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, so that a resumed run checks when the whole run does."""
        return {"asks": self.asks, "sums": None if self._sums is None else self._sums.clone()}

    def load_state(self, state: dict[str, Any], device: torch.device) -> None:
        """Continue where a checkpoint was taken.

        Args:
            state: What `state` returned.
            device: Device of the slopes to come.
        """
        self.asks = state["asks"]
        self._sums = None if state["sums"] is None else state["sums"].to(device)

    @property
    def due(self) -> bool:
        """Whether the sums should be read now."""
        return self.asks == 1 or self.asks % self.interval == 0

    def read(self) -> Verdict:
        """Read and reset the sums; waits for the device."""
        if self._sums is None:
            return Verdict(math.nan, math.nan)
        asks = 1 if self.asks <= 1 else min(self.interval, self.asks)
        squared_error, squared, unmodeled = self._sums.tolist()
        self._sums = None
        deviation = math.sqrt(squared_error / squared) if squared > 0 else 0.0
        verdict = Verdict(deviation, unmodeled / asks)
        self.history.append(verdict)
        return verdict
