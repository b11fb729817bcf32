"""When curvature is refreshed: rules that decide it step by step."""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

__all__ = ["RefreshSchedule"]


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
            state: What `state` returned.
        """
