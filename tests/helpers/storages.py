"""Counts the bytes of all tensors that operators make, from outside: alive now, and at most."""

import weakref
from typing import Any

from torch import UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.resuming import tensors_in


class Storages(TorchDispatchMode):
    """Watches the storages of what operators return, while it is entered.

    A storage counts from the operator that made it until nothing holds it: no tensor, no graph of
    the backward, nobody in Python. Scratch memory inside of operators is not seen.

    Attributes:
        peak: Most bytes alive since `next_step`.
        peaks: Peaks of the steps so far.
        levels: Bytes alive at the end of each step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.peaks: list[int] = []
        self.levels: list[int] = []
        self._alive: dict[int, int] = {}
        self._total = 0
        # Threads of others may let go of a storage at any time, so that is only noted.
        self._gone: list[int] = []

    @property
    def present(self) -> int:
        """Bytes alive."""
        while self._gone:
            self._total -= self._alive.pop(self._gone.pop())
        return self._total

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: UntypedStorage) -> None:
        key, present = storage._cdata, self.present
        if key not in self._alive:
            self._alive[key] = storage.nbytes()
            self._total = present + storage.nbytes()
            self.peak = max(self.peak, self._total)
            # Python's object for a storage lives as long as the storage itself.
            weakref.finalize(storage, self._gone.append, key).atexit = False

    def next_step(self) -> None:
        """End a step."""
        self.peaks.append(self.peak)
        self.levels.append(self.present)
        self.peak = self.present
