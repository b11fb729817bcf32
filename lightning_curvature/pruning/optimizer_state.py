"""What an optimizer remembers of weights that are pruned is forgotten."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_curvature.pruning.parameters import PrunableParameters

__all__ = ["zero_pruned_state"]


@torch.no_grad()
def zero_pruned_state(optimizer: Optimizer, parameters: PrunableParameters) -> None:
    """Set the state of pruned weights to zero, such as their momentum.

    Otherwise momentum goes on moving them, and averages of squared gradients remember what was.
    All tensors of a parameter's state that have its shape are meant, also within lists and
    dictionaries; everything else stays.

    Args:
        optimizer: Optimizer of the pruned parameters; it need not know all of them.
        parameters: The parameters and their masks.
    """
    # Random directions are divided by it: those of pruned weights would be infinite.
    divisors = {"hess_diag"} if "forward" in getattr(optimizer, "asks", ()) else set()
    for parameter, mask in zip(parameters.tensors(), parameters.masks().values(), strict=True):
        if parameter in optimizer.state:
            state = optimizer.state[parameter]
            _zero({key: value for key, value in state.items() if key not in divisors}, ~mask)


def _zero(value: Any, pruned: Tensor) -> None:
    if isinstance(value, Tensor):
        if value.shape == pruned.shape:
            value.masked_fill_(pruned.to(value.device), 0)
    elif isinstance(value, dict):
        for item in value.values():
            _zero(item, pruned)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _zero(item, pruned)
