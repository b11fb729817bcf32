"""Values of a run by step, thinned out so that they never take more than a fixed room."""

import math

__all__ = ["History"]


class History:
    """Rows of values by step, thinned out so that it never grows beyond ``max_points`` rows.

    Args:
        max_points: Most rows kept, at least 2.
    """

    def __init__(self, max_points: int) -> None:
        self._max_points = max_points
        self._stride = 1
        self._seen = 0
        self._steps: list[int] = []
        self._rows: list[dict[str, float]] = []

    @property
    def last_step(self) -> int:
        """Step of the newest row, -1 if there is none."""
        return self._steps[-1] if self._steps else -1

    def append(self, step: int, values: dict[str, float]) -> None:
        """Keep one row out of ``stride``; when full, drop every other row and double the stride."""
        due = self._seen % self._stride == 0
        self._seen += 1
        if not due:
            return
        if len(self._steps) >= self._max_points:
            del self._steps[1::2], self._rows[1::2]
            self._stride *= 2
            # The row that did not fit is on the coarser grid only if it continues the pattern.
            if (self._seen - 1) % self._stride:
                return
        self._steps.append(step)
        self._rows.append(values)

    def as_dict(self) -> dict[str, list[float]]:
        """Columns by name, the steps as ``"step"``; NaN where a value was not there yet."""
        names = dict.fromkeys(name for row in self._rows for name in row)
        columns = {name: [row.get(name, math.nan) for row in self._rows] for name in names}
        return {"step": [float(step) for step in self._steps], **columns}
