"""A loader that a checkpoint can hold, so that a run resumes in the middle of an epoch."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from tests.helpers.ranks import world


class StatefulLoader:
    """Shuffled batches whose place is saved and loaded; Lightning asks for no more than this.

    On several ranks each takes its part of every batch, so that all parts together are the batch
    that one process would see.

    Args:
        data: The rows.
        batch_size: Rows per batch over all ranks; it divides the number of rows.
        seed: Seed of the order of the first epoch.
    """

    def __init__(self, data: TensorDataset, batch_size: int = 4, seed: int = 7) -> None:
        assert len(data) % batch_size == 0
        self.data = data
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0
        self.position = 0
        # Where Lightning looks for `set_epoch`.
        self.sampler = self

    def __len__(self) -> int:
        """Return the number of batches of a whole epoch."""
        return len(self.data) // self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of another epoch; after a checkpoint of an epoch's end only this is told.

        Args:
            epoch: Number of the epoch.
        """
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    def __iter__(self) -> Iterator[list[Tensor]]:
        """Go on from the present place."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.data), generator=generator).view(len(self), -1)
        rank, ranks = world()
        while self.position < len(self):
            rows = order[self.position].chunk(ranks)[rank]
            self.position += 1
            yield [tensor[rows] for tensor in self.data.tensors]

    def state_dict(self) -> dict[str, Any]:
        """Return the place of the next batch; the same on all ranks."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a place."""
        self.epoch, self.position = state["epoch"], state["position"]
