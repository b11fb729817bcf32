"""What the contract tests need to know about each optimizer beyond its registry row."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_curvature import CurvatureOptimizer, OptimizerInfo, list_optimizers


@dataclass(frozen=True)
class Contract:
    """One optimizer as the contract tests use it.

    Attributes:
        info: Its row in the registry.
        options: Arguments under which it must train the small problems.
        quiet: Arguments that postpone everything it may read from the device now and then.
        stochastic: Whether two runs differ unless the global seed is set.
    """

    info: OptimizerInfo
    options: dict[str, Any] = field(default_factory=dict)
    quiet: dict[str, Any] = field(default_factory=dict)
    stochastic: bool = False

    def make(self, params: Iterable[Any], **options: Any) -> CurvatureOptimizer:
        """Build the optimizer."""
        return self.info.cls(params, **{**self.options, **options})

    def making(self, **options: Any) -> Any:
        """Return a function of the parameters."""
        return partial(self.make, **options)


NEVER = 1_000_000

SPECIAL: dict[str, dict[str, Any]] = {
    "adamqlr": {"quiet": {"max_failures": NEVER}},
    "sgdqlr": {"quiet": {"max_failures": NEVER}},
}

CONTRACTS = [Contract(info, **SPECIAL.get(info.name, {})) for info in list_optimizers()]

every_optimizer = pytest.mark.parametrize(
    "contract", CONTRACTS, ids=[contract.info.name for contract in CONTRACTS]
)


def state_tensors(optimizer: CurvatureOptimizer) -> dict[str, Tensor]:
    """List every tensor of the state under a name."""
    found: dict[str, Tensor] = {}

    def walk(name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, dict):
            for key, part in value.items():
                walk(f"{name}/{key}", part)
        elif isinstance(value, (list, tuple)):
            for index, part in enumerate(value):
                walk(f"{name}/{index}", part)

    walk("", optimizer.state_dict())
    return found


def identical(one: Any, other: Any) -> bool:
    """Tell whether two states are the same, tensors bit for bit and of the same dtype."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.dtype is other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(identical(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(identical, one, other))
    return bool(one == other)
