"""Oracles with a plan, and their estimates as vectors."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature.oracle import ModelOracle
from lightning_curvature.oracle.labels import LabelSampler
from lightning_curvature.oracle.plans import Plan, SamplePlan


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Return tensors as one vector."""
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def watched(
    model: nn.Module,
    plan: Plan | None,
    loss: Callable[..., Tensor] = F.cross_entropy,
    **options: Any,
) -> ModelOracle:
    """Return an oracle over all parameters of a model, with a plan for every step.

    Args:
        model: The model.
        plan: The plan.
        loss: The loss function.
        **options: Of the oracle.
    """
    oracle = ModelOracle(
        list(model.parameters()), model, loss, wanted=lambda: True, directional="jvp", **options
    )
    oracle.plan = lambda: plan
    return oracle


def backward(oracle: ModelOracle, *batches: tuple[Any, ...]) -> None:
    """Run the main passes of a step: batches of input, target and, perhaps, weight."""
    oracle.clear()
    for p in oracle.params:
        p.grad = None
    for x, y, *weight in batches:
        (oracle.criterion(oracle._model(x), y) * (weight[0] if weight else 1.0)).backward()
    oracle.select([p for p in oracle.params if p.grad is not None])


def squares(oracle: ModelOracle, *batches: tuple[Any, ...]) -> Tensor:
    """Return the estimate from sampled labels of one step."""
    backward(oracle, *batches)
    return flat(oracle.sampled_squares())


class Spy(LabelSampler):
    """Notes the keys it is made with."""

    keys: list[tuple[int | str, ...]]

    def __init__(self, *key: int | str) -> None:
        super().__init__(*key)
        type(self).keys.append(key)


def spy() -> type[Spy]:
    """Return a new class of spies."""
    return type("OwnSpy", (Spy,), {"keys": []})


def sampling(**options: Any) -> SamplePlan:
    """Return a plan for samples; the seed and the step need not be given."""
    return SamplePlan(**{"seed": 0, "step": 0, **options})
