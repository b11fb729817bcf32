"""Values by step of which only the changes are kept."""

from bisect import bisect_right
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

__all__ = ["Changes", "checksum"]


def checksum(tensor: Tensor) -> Tensor:
    """Add up the bits of a tensor as integers: any one value that differs is noticed.

    Args:
        tensor: Any numbers.

    Returns:
        A 0-dim int64 tensor on its device.
    """
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().view(kinds[tensor.element_size()]).sum(dtype=torch.int64)


class Changes:
    """Values by name and step; a step without a new value has that of the step before.

    Values are numbers, strings, None, tensors, and tuples of these.
    """

    def __init__(self) -> None:
        self._steps: dict[str, list[int]] = {}
        self._values: dict[str, list[Any]] = {}

    @property
    def names(self) -> list[str]:
        """Names of the values there are."""
        return list(self._steps)

    def set(self, step: int, values: dict[str, Any]) -> None:
        """Note the values of a step, which comes after all others.

        Args:
            step: Number of the step.
            values: Values by name.
        """
        for name, value in values.items():
            known = self._values.get(name)
            if known is None:
                self._steps[name], self._values[name] = [step], [value]
            elif not _same(known[-1], value):
                self._steps[name].append(step)
                known.append(value)

    def at(self, step: int) -> dict[str, Any]:
        """Return the values of a step by name.

        Args:
            step: Number of the step.
        """
        found = {name: bisect_right(steps, step) for name, steps in self._steps.items()}
        return {name: self._values[name][i - 1] for name, i in found.items() if i}

    def runs(self, name: str, end: int) -> list[tuple[int, Any]]:
        """Return how many steps in a row had which value.

        Args:
            name: Name of the value.
            end: Number of steps in all.
        """
        steps = self._steps.get(name, [])
        lengths = [after - step for step, after in zip(steps, [*steps[1:], end], strict=True)]
        return list(zip(lengths, self._values.get(name, []), strict=True))

    def truncate(self, end: int) -> None:
        """Forget the values of later steps.

        Args:
            end: The first step to forget.
        """
        for name in list(self._steps):
            kept = sum(step < end for step in self._steps[name])
            del self._steps[name][kept:], self._values[name][kept:]
            if not kept:
                del self._steps[name], self._values[name]

    def state_dict(self) -> dict[str, Any]:
        """Return the columns as plain values; numbers are packed."""
        state = {}
        for name, found in self._values.items():
            values = [x.cpu() if isinstance(x, Tensor) else x for x in found]
            steps = torch.tensor(self._steps[name], dtype=torch.int32)
            is_column = len(values) > 1 and all(isinstance(value, float) for value in values)
            packed = torch.tensor(values, dtype=torch.float64) if is_column else values
            state[name] = (steps, packed) if len(values) > 1 else (self._steps[name][0], values[0])
        return state

    @classmethod
    def from_state_dict(cls, state: Any, end: int) -> "Changes":
        """Read what `state_dict` returned.

        Args:
            state: Its result.
            end: Number of steps in all.

        Raises:
            ValueError: If it is damaged.
        """
        changes = cls()
        for name, column in state.items():
            steps, values = column
            if not isinstance(steps, Tensor):
                steps, values = torch.tensor([steps]), [values]
            at = [int(step) for step in steps.tolist()]
            grows = all(one < other for one, other in pairwise(at))
            if not grows or len(at) != len(values) or at[0] < 0 or at[-1] >= end:
                raise ValueError(f"the steps of {name!r} are not in order")
            changes._steps[name] = at
            is_column = isinstance(values, Tensor)
            changes._values[name] = values.tolist() if is_column else list(values)
        return changes


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        both = isinstance(one, Tensor) and isinstance(other, Tensor)
        return one is other or (both and torch.equal(one, other))
    return type(one) is type(other) and bool(one == other)
