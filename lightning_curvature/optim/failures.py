"""Watches for steps that could not be used, or are too long, without waiting for the device."""

import warnings
from collections import deque
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["FailureCounter"]

# What the error shows of each of the last steps, and of how many.
_SHOWN = (
    *("loss", "new_loss", "grad_norm", "projected_grad", "slope", "curvature", "damping"),
    "step_length",
)
_STEPS_SHOWN = 8


class FailureCounter:
    """Counts unusable steps on the device and reads the counts only when they may be too many.

    After a reading of n failures in a row the limit cannot be reached for ``limit - n`` steps, so
    the next reading comes then: every ``limit`` steps as long as all goes well.

    Args:
        name: Name of the optimizer, for messages.
        limit: Failures in a row after which training stops.
        long_step: Step length above which the user is told; None for never.
        cause: What made a step unusable, in words.
        advice: What the user may try.
        watched: Further counts by name, from which number on the user is told, and what; the text
            may contain ``{name}`` and ``{count}``.
        resumed: Whether the counts come from a checkpoint, so that the first step reads them.
    """

    def __init__(
        self,
        name: str,
        limit: int,
        long_step: float | None = None,
        *,
        cause: str = "gradient or curvature was not finite",
        advice: str = "lower max_lr, or raise min_damping",
        watched: Mapping[str, tuple[int, str]] | None = None,
        resumed: bool = False,
    ) -> None:
        self.name = name
        self.limit = limit
        self.long_step = long_step
        self.cause = cause
        self.advice = advice
        self.watched = dict(watched or {})
        self._warned: set[str] = set()
        self._steps_until_reading = 1 if resumed else limit
        self._history: deque[dict[str, Tensor]] = deque(maxlen=min(limit, _STEPS_SHOWN))

    def update(
        self, counts: dict[str, Tensor], usable: Tensor, measured: Mapping[str, Tensor]
    ) -> None:
        """Count one step.

        Args:
            counts: State with the keys "failures" (in a row), "skipped_steps" (in all) and those
                watched, 0-dim tensors; the first two are replaced.
            usable: Boolean 0-dim tensor: whether the step could be used.
            measured: What this step measured, for the message of `check`.
        """
        self._history.append({key: measured[key] for key in _SHOWN if key in measured})
        bad = (~usable).to(counts["failures"].dtype)
        counts["failures"] = (counts["failures"] + bad) * bad
        counts["skipped_steps"] = counts["skipped_steps"] + bad

    def check(self, counts: Mapping[str, Tensor], step: int, stats: Mapping[str, Tensor]) -> None:
        """Warn of unusable or overlong steps, and stop after too many unusable ones in a row.

        Args:
            counts: See `update`.
            step: Number of the step, from 1.
            stats: Last measurements; "step_length" is checked if it is there.

        Raises:
            RuntimeError: After ``limit`` unusable steps in a row.
        """
        self._steps_until_reading -= 1
        if self._steps_until_reading > 0:
            return
        known = {**counts, **{key: stats[key] for key in ("step_length",) if key in stats}}
        values = torch.stack(list(known.values())).tolist()
        read = dict(zip(known, values, strict=True))
        failures, skipped = read["failures"], read["skipped_steps"]
        length = read.get("step_length", 0.0)
        self._steps_until_reading = max(self.limit - int(failures), 1)
        if failures >= self.limit:
            raise RuntimeError(
                f"{self.name} found no usable step {int(failures)} times in a row: {self.cause}. "
                f"Look for NaN in the data, {self.advice}. The last steps:\n{self._lines(step)}"
            )
        if skipped:
            self._warn(
                "skipped",
                f"{self.name} skipped {int(skipped)} of {step} steps: {self.cause}. "
                "stats['skipped_steps'] goes on counting.",
            )
        for key, (least, text) in self.watched.items():
            if read[key] >= least:
                self._warn(key, text.format(name=self.name, count=int(read[key])))
        if self.long_step is not None and abs(length) > self.long_step:
            self._warn(
                "long",
                f"{self.name} derived a step length of {length:.3g}. Where predictions saturate "
                "the curvature vanishes and nothing else limits the step: set max_lr (0.03 to "
                "0.1), or enlarge the batch.",
            )

    def _lines(self, step: int) -> str:
        first = step - len(self._history) + 1
        return "\n".join(
            f"  step {number}: " + ", ".join(f"{key} {float(x):.3g}" for key, x in measured.items())
            for number, measured in enumerate(self._history, start=first)
        )

    def _warn(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(message, RuntimeWarning, stacklevel=5)
