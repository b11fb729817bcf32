"""Two small optimizers that ask nothing and change every entry by itself, and what trains them."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_curvature import CurvatureOptimizer, OptimizerInfo
from lightning_curvature.oracle import Oracle
from tests.helpers.modules import CLASSES, StockModule
from tests.helpers.optimizer_db import CONTRACTS, Contract
from tests.helpers.ranks import world


class Momentum(CurvatureOptimizer):
    """Gradient descent with momentum.

    Args:
        params: Parameters.
        lr: Learning rate.
        momentum: Share of the old momentum that is kept.
    """

    state_names = ("momentum",)

    def __init__(self, params: Iterable[Any], lr: float = 0.2, momentum: float = 0.5) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    def _update(self, params: list[Tensor], oracle: Oracle | None) -> None:
        assert oracle is None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].mul_(group["momentum"]).add_(p.grad)
                self._move(p, state["momentum"], group["lr"])

    def _move(self, p: Tensor, momentum: Tensor, lr: float) -> None:
        p.add_(momentum, alpha=-lr)


class SignMomentum(Momentum):
    """Descends along the sign of the momentum."""

    def __init__(self, params: Iterable[Any], lr: float = 0.02, momentum: float = 0.5) -> None:
        super().__init__(params, lr, momentum)

    def _move(self, p: Tensor, momentum: Tensor, lr: float) -> None:
        p.add_(momentum.sign(), alpha=-lr)


def _contract(cls: type[CurvatureOptimizer]) -> Contract:
    name = cls.__name__
    return Contract(OptimizerInfo(name.lower(), cls, cls.asks, "none", 1, "", f"{name}."))


# Whatever the registry has of that kind belongs to them.
ELEMENTWISE = [_contract(Momentum), _contract(SignMomentum)]
ELEMENTWISE += [contract for contract in CONTRACTS if contract.elementwise]


def small_network(seed: int = 3) -> nn.Sequential:
    """Build a network whose shapes two ranks cannot divide evenly."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, CLASSES)).double()


class ShardedModule(StockModule):
    """A module that FSDP2 shards if there are several ranks.

    Lightning has no double precision for that strategy, so the module does it itself.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return super().forward(x.double())

    def configure_model(self) -> None:
        """Shard every layer, once."""
        if world()[1] > 1 and not isinstance(next(self.parameters()), _dtensor()):
            from torch.distributed.fsdp import fully_shard

            mesh = self.device_mesh["data_parallel"]
            for layer in self.network:
                if isinstance(layer, nn.Linear):
                    fully_shard(layer, mesh=mesh)
            fully_shard(self.network, mesh=mesh)


def _dtensor() -> type:
    from torch.distributed.tensor import DTensor

    return DTensor


def whole(value: Any) -> Any:
    """Gather the shards of a tensor, or of all tensors in containers."""
    if isinstance(value, _dtensor()):
        value = value.full_tensor()
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: whole(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [whole(part) for part in value]
    return value
