"""Training steps with bad batches: what is not finite, and where it comes from."""

import math
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature import in_extra_pass
from tests.helpers.modules import MakeOptimizer, StockModule

# The gradient is of no use: the step is skipped.
BAD_GRADIENTS = ("nan batch", "infinite batch", "infinite loss", "nan loss", "nan gradient")
# Of those, what does not show in the loss: the network saturates, and nothing goes backward.
GOOD_LOSSES = ("infinite batch", "nan gradient")
# Only an extra pass shows it.
BAD_EXTRA = ("nan in the first extra pass", "nan in the last", "infinite in the last")


class Spoiler:
    """Spoils chosen batches.

    Args:
        kind: One of `BAD_GRADIENTS` or `BAD_EXTRA`, "none" for a missing loss, "" for nothing.
        batches: Numbers of the bad batches, counted from 0 over all epochs.

    Attributes:
        number: Number of the last batch of a main pass.
        is_on: Whether the present batch is a bad one.
        extra: Number of the present extra pass of its batch, 0 in the main pass.
    """

    def __init__(self, kind: str, batches: Collection[int]) -> None:
        self.kind = kind
        self.batches = batches
        self.number = -1
        self.is_on = False
        self.extra = 0
        # Whether a batch is bad and how often it was seen again, by the sum of its inputs.
        self._seen: dict[float, list[int]] = {}

    def inputs(self, x: Tensor) -> Tensor:
        """Return the inputs of a batch, the next one unless this is an extra pass."""
        key = x.sum().item()
        if in_extra_pass():
            self._seen[key][1] += 1
        else:
            self.number += 1
            self._seen[key] = [self.number in self.batches, 0]
        self.is_on, self.extra = bool(self._seen[key][0]), self._seen[key][1]
        if self.is_on and self.kind in ("nan batch", "infinite batch"):
            x = x.clone()
            x[0, 0] = math.nan if self.kind == "nan batch" else math.inf
        return x

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """Return the loss of a batch."""
        first, last = self.extra == 1, self.extra == 2
        if self.is_on and self.kind == "nan gradient" and logits.requires_grad:
            logits.register_hook(lambda grad: grad * math.nan)
        if self.is_on and self.kind == "nan in the first extra pass" and first:
            logits = logits * math.nan
        loss = F.cross_entropy(logits, y)
        factors = {
            "infinite loss": math.inf,
            "nan loss": math.nan,
            "nan in the last": math.nan if last else 1.0,
            "infinite in the last": math.inf if last else 1.0,
        }
        return loss * factors.get(self.kind, 1.0) if self.is_on else loss


class SpoiledModule(StockModule):
    """A small network whose bad batches a `Spoiler` chooses.

    Args:
        make_optimizer: Called with the parameters.
        spoiler: Chooses.
    """

    def __init__(self, make_optimizer: MakeOptimizer, spoiler: Spoiler) -> None:
        super().__init__(nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)), make_optimizer)
        self.spoiler = spoiler

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return super().forward(self.spoiler.inputs(x))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Return the loss of a batch, or None."""
        x, y = batch
        loss = self.spoiler.loss(self(x), y)
        return None if self.spoiler.is_on and self.spoiler.kind == "none" else loss


def weights_of(module: nn.Module) -> Tensor:
    """Return all parameters as one vector."""
    return torch.cat([p.detach().double().flatten() for p in module.parameters()])
