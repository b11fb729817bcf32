"""Kronecker-factored blocks of small models, as dense matrices over the parameters."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature.curvature.factor_window import FactorWindow, WindowSums
from lightning_curvature.curvature.kronecker import State, averaged, multiplied
from lightning_curvature.curvature.kronecker_blocks import BlockInfo
from lightning_curvature.curvature.layer_rows import from_matrix, to_matrix
from lightning_curvature.oracle import ModelOracle
from lightning_curvature.oracle.plans import LayerPlan

Batch = tuple[Any, ...]


def half_squared(z: Tensor, y: Tensor) -> Tensor:
    """Return half the squared error, summed over outputs, averaged over examples."""
    return 0.5 * F.mse_loss(z, y, reduction="sum") / len(z)


def watched_layers(
    model: nn.Module, loss: Callable[..., Tensor], fisher_type: Any = "type-2", **options: Any
) -> tuple[ModelOracle, FactorWindow]:
    """Return an oracle whose plan looks at the layers, and the window that sums it up.

    Args:
        model: The model.
        loss: The loss function.
        fisher_type: Of the plan.
        **options: Of the window.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    oracle = ModelOracle(params, model, loss, wanted=lambda: True, directional="jvp")
    window = FactorWindow(model, params, lambda: True, **options)
    oracle.attachments.append(window)
    plan = LayerPlan(seed=0, step=0, observer=window, fisher_type=fisher_type)
    oracle.plan = lambda: plan
    return oracle, window


def window_sums(oracle: ModelOracle, window: FactorWindow, *batches: Batch) -> WindowSums:
    """Run the main passes of a step and return its sums.

    Args:
        oracle: The oracle.
        window: Its window.
        *batches: Input, targets, and perhaps the weight of the micro-batch, a float.
    """
    oracle.clear()
    for p in oracle.params:
        p.grad = None
    for x, *rest in batches:
        weight = rest.pop() if isinstance(rest[-1], float) else 1.0
        (oracle.criterion(oracle._model(x), *rest) * weight).backward()
    oracle.select([p for p in oracle.params if p.grad is not None])
    oracle.see_layers()
    return window.collect(oracle)


def sums_of(
    model: nn.Module, loss: Callable[..., Tensor], *batches: Batch, **options: Any
) -> tuple[FactorWindow, WindowSums]:
    """Return the window of a model and the sums of one step; see `watched_layers`."""
    oracle, window = watched_layers(model, loss, **options)
    sums = window_sums(oracle, window, *batches)
    oracle.close()
    return window, sums


def state_of(sums: Any) -> State:
    """Return the state of a block after one observation."""
    return averaged({}, sums, 0.95, None, torch.float64)


def places(window: FactorWindow, info: BlockInfo) -> Tensor:
    """Return where the entries of a block are in the vector of all parameters."""
    sizes = [p.numel() for p in window.params]
    starts = [sum(sizes[:n]) for n in range(len(sizes))]
    index = [
        (torch.arange(n) + start).view(p.shape).double()
        for n, start, p in zip(sizes, starts, window.params, strict=True)
    ]
    weight = info.weight.of(index[info.weight.number])
    bias = None if info.bias is None else info.bias.of(index[info.bias.number])
    return to_matrix(info.layer, weight, bias).flatten().long()


def matrix_of(info: BlockInfo, apply: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the dense matrix of a linear map of matrices of a block."""
    shape = (info.groups, info.output.size, info.input.size)
    size = shape[0] * shape[1] * shape[2]
    units = torch.eye(size, dtype=torch.float64).view(size, *shape)
    return torch.stack([apply(unit).flatten() for unit in units], dim=1)


def block_matrix(info: BlockInfo, state: State) -> Tensor:
    """Return a block, without damping, as a dense matrix."""
    return matrix_of(info, lambda unit: multiplied(info, state, unit))


def gradient_matrix(window: FactorWindow, info: BlockInfo) -> Tensor:
    """Return the gradient of a block as its matrix."""
    grads = [p.grad for p in window.params]
    weight = grads[info.weight.number]
    assert weight is not None
    bias = None
    if info.bias is not None:
        whole = grads[info.bias.number]
        assert whole is not None
        bias = info.bias.of(whole)
    return to_matrix(info.layer, info.weight.of(weight), bias)


def parameters_of(info: BlockInfo, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of a matrix of a block."""
    return from_matrix(info.layer, matrix, has_bias=info.bias is not None)
