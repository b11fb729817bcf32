"""Modules for two ranks: ranks that do different things, and modules with more than a network.

A module made of `Parts` does in one process, to one half of the batch after the other, what two
ranks do to their halves. So it says what two ranks must come out at, whatever each of them does.
"""

import random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tests.helpers.modules import CLASSES, Everything, MakeOptimizer, StockModule, vectors
from tests.helpers.ranks import world

IGNORED = -100
PARTS = 2


def small_network() -> nn.Sequential:
    """Build the network of the modules here, for `vectors`."""
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, CLASSES))


class Parts(StockModule):
    """Averages the losses of as many parts as there are ranks in the test.

    Attributes:
        seen: What the test wants to know.
    """

    def __init__(self, make_optimizer: MakeOptimizer) -> None:
        super().__init__(small_network(), make_optimizer)
        self.seen: dict[str, Any] = {}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the mean of the parts' losses."""
        x, y = batch
        rank, ranks = world()
        if ranks == PARTS:
            return self.part_loss(x, y, rank, batch_idx)
        parts = zip(x.tensor_split(PARTS), y.tensor_split(PARTS), strict=True)
        losses = [self.part_loss(*part, i, batch_idx) for i, part in enumerate(parts)]
        return torch.stack(losses).mean()

    def part_loss(self, x: Tensor, y: Tensor, part: int, batch_idx: int) -> Tensor:
        """Return the mean loss of one part."""
        return F.cross_entropy(self(x), y)


class UnusedLayer(Parts):
    """A layer that no forward pass uses."""

    def __init__(self, make_optimizer: MakeOptimizer) -> None:
        super().__init__(make_optimizer)
        self.unused = nn.Linear(3, 3)


class LayerOfOnePart(Parts):
    """A layer that only the second part uses, and in the last batches neither."""

    def __init__(self, make_optimizer: MakeOptimizer) -> None:
        super().__init__(make_optimizer)
        self.more = nn.Linear(5, 5)

    def part_loss(self, x: Tensor, y: Tensor, part: int, batch_idx: int) -> Tensor:
        """Send the second part through the layer first."""
        return super().part_loss(self.more(x) if part and batch_idx < 3 else x, y, part, batch_idx)


def with_ignored_targets(empty: bool = False) -> TensorDataset:
    """Take targets away: more of them from the second half of each batch of 8.

    Args:
        empty: Whether the second half of the second batch has none at all.
    """
    data = vectors(40)
    x, y = data.tensors
    y = y.clone()
    y.view(5, 8)[:, 1] = IGNORED
    y.view(5, 8)[:, 5:] = IGNORED
    if empty:
        y.view(5, 8)[1, 4:] = IGNORED
    return TensorDataset(x, y)


class Ignoring(Parts):
    """Averages over the targets that are there; NaN if there is none."""

    def part_loss(self, x: Tensor, y: Tensor, part: int, batch_idx: int) -> Tensor:
        """Return the mean over the targets that are there."""
        return F.cross_entropy(self(x), y, ignore_index=IGNORED)


class NoneIsZero(Ignoring):
    """Likewise, but zero if there is none, as users write it."""

    def part_loss(self, x: Tensor, y: Tensor, part: int, batch_idx: int) -> Tensor:
        """Return zero, with a graph, if no target is there."""
        if (y == IGNORED).all():
            return self(x).sum() * 0.0
        return super().part_loss(x, y, part, batch_idx)


class _NoForwardRule(torch.autograd.Function):
    """Doubles its input; has no rule for forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


class _WrongForwardRule(_NoForwardRule):
    """Doubles its input; forward mode thinks that it turns it around."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return -2 * tangent


class _Branching(Parts):
    """Sends the second part through a custom function."""

    function: type[_NoForwardRule]
    first_batch = 0

    def part_loss(self, x: Tensor, y: Tensor, part: int, batch_idx: int) -> Tensor:
        """Double the logits, one way or the other."""
        logits = self(x)
        special = part == 1 and batch_idx >= self.first_batch
        return F.cross_entropy(self.function.apply(logits) if special else 2 * logits, y)


class NoForwardRule(_Branching):
    """Forward mode fails in the second part."""

    function = _NoForwardRule


class NoForwardRuleLater(NoForwardRule):
    """Forward mode fails in the second part, from the third batch on."""

    first_batch = 2


class WrongForwardRule(_Branching):
    """Forward mode goes wrong in the second part."""

    function = _WrongForwardRule


class Augmented(Everything):
    """Everything of `Everything` that does not make the gradients of the ranks differ."""

    def __init__(self, make_optimizer: MakeOptimizer) -> None:
        super().__init__(make_optimizer, spectral=False)

    def on_after_backward(self) -> None:
        """Draw, as gradient noise does, but leave the gradient as it is."""
        torch.rand(()), random.random(), np.random.rand()  # noqa: NPY002 - the global stream


class Validated(Parts):
    """Validates, with a metric that is averaged over the ranks."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the loss."""
        x, y = batch
        self.log("val/loss", F.cross_entropy(self(x), y), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        """Count."""
        self.seen["validations"] = self.seen.get("validations", 0) + 1


class ManualClosure(Parts):
    """Manual optimization, as Lightning documents it for closures."""

    def __init__(self, make_optimizer: MakeOptimizer) -> None:
        super().__init__(make_optimizer)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Step with a closure."""
        optimizer = self.optimizers()
        losses: list[Tensor] = []

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = Parts.training_step(self, batch, batch_idx)
            losses.append(loss.detach())
            self.manual_backward(loss)
            return loss

        optimizer.step(closure)
        return {"loss": losses[0]}


class ManualLayerOfOnePart(ManualClosure, LayerOfOnePart):
    """Manual optimization of a layer that only the second part uses."""


class Grouped(Parts):
    """Two groups with rates of their own, a tied layer, a frozen one, and a scheduler."""

    def __init__(self, make_optimizer: MakeOptimizer) -> None:
        super().__init__(make_optimizer)
        self.before, self.between = nn.Linear(5, 5), nn.Linear(5, 5)
        self.frozen = nn.Linear(5, 5)
        self.between.weight = self.before.weight
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.network(self.frozen(self.between(torch.tanh(self.before(x)))))

    def configure_optimizers(self) -> Any:
        """Make groups, and a schedule per step."""
        first = [*self.before.parameters(), self.between.bias]
        rate = self.make_optimizer([nn.Parameter(torch.ones(1))]).param_groups[0]["lr"]
        groups = [
            {"params": first, "lr": 0.5 * rate},
            {"params": self.network.parameters(), "weight_decay": 0.01},
        ]
        optimizer = self.make_optimizer(groups)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
