"""Runs of zeroth-order optimizers that are recorded and replayed."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature.optim.trajectory import Trajectory
from lightning_curvature.optim.trajectory_replay import replay_trajectory
from lightning_curvature.optim.zeroth_order import ZerothOrderOptimizer
from tests.helpers.optimizer_db import identical


def two_groups(module: nn.Module) -> list[dict[str, Any]]:
    return [{"params": list(part.parameters())} for part in (module[0], module[2])]


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Build a small network, always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(5, 24), nn.Tanh(), nn.Linear(24, 4)).to(dtype)


def batches(count: int, seed: int = 4) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.randn(6, 5, generator=generator)
        yield x, torch.randint(4, (6,), generator=generator)


def state_of(optimizer: ZerothOrderOptimizer) -> dict[str, Any]:
    """Return what a replay must end at: all but what the oracle keeps."""
    state = copy.deepcopy(optimizer.state_dict())
    del state["curvature"]["oracle"]
    return state


class Run:
    """A run that is recorded.

    Args:
        cls: The optimizer.
        groups: Makes the parameter groups.
        dtype: Of the parameters.
        settings: Arguments of the optimizer.
    """

    def __init__(
        self,
        cls: Any,
        *,
        dtype: torch.dtype = torch.float32,
        groups: Callable[[nn.Module], Any] = lambda module: module.parameters(),
        **settings: Any,
    ) -> None:
        self.make = lambda module: cls(groups(module), **{"lr": 1e-2, "seed": 7, **settings})
        self.dtype = dtype
        self.module = net(dtype)
        self.optimizer = self.make(self.module)
        self.criterion = self.optimizer.attach_model(self.module, F.cross_entropy)
        self.trajectory = Trajectory()
        self.trajectory.record(self.optimizer)

    def train(
        self,
        count: int = 4,
        before: Callable[[int, Any], None] = lambda step, optimizer: None,
        seed: int = 4,
    ) -> None:
        """Take steps."""
        for step, (x, y) in enumerate(batches(count, seed)):
            before(step, self.optimizer)
            given = x.to(self.dtype)
            self.optimizer.step(lambda given=given, y=y: self.criterion(self.module(given), y))

    def check(
        self,
        trajectory: Trajectory | None = None,
        prepare: Callable[[Any, nn.Module], None] = lambda optimizer, module: None,
    ) -> None:
        """Replay into a fresh model and compare every bit."""
        module = net(self.dtype)
        optimizer = self.make(module)
        prepare(optimizer, module)
        replay_trajectory(module, optimizer, trajectory or self.trajectory)
        assert identical(module.state_dict(), self.module.state_dict())
        assert identical(state_of(optimizer), state_of(self.optimizer))
