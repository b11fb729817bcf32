"""The curvature that an optimizer keeps per parameter, summed up per layer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_curvature import vectors

__all__ = ["curvature_of_layers", "layer_of_parameters", "plain_name"]

# State that is no curvature: counters and averages of gradients or updates.
_OTHER = frozenset({"step", "exp_avg", "momentum_buffer"})


def layer_of_parameters(module: nn.Module) -> dict[int, str]:
    """Return the qualified name of the layer that holds a parameter, by the parameter's id.

    Args:
        module: The whole model. The names are those it has without `torch.compile`.
    """
    layers: dict[int, str] = {}
    for name, part in module.named_modules():
        for parameter in part.parameters(recurse=False):
            layers.setdefault(id(parameter), plain_name(name) or type(module).__name__)
    return layers


def plain_name(name: str) -> str:
    """Return the qualified name that a module has without `torch.compile`.

    Args:
        name: Its name in the model.
    """
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


@torch.no_grad()
def curvature_of_layers(optimizer: Any, layers: dict[int, str]) -> dict[str, Tensor]:
    """Return norm and share of zeros of an optimizer's curvature in every layer.

    Args:
        optimizer: An optimizer with ``state_names``; others have nothing to tell. What it keeps per
            layer instead of per parameter it gives by a method ``layer_curvature()``: lists of
            tensors by name and layer.
        layers: What `layer_of_parameters` returned.

    Returns:
        0-dim tensors by ``<state>_norm/<layer>`` and ``<state>_sparsity/<layer>``.
    """
    kept: dict[str, dict[str, list[Tensor]]] = {}
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        layer = layers.get(id(parameter), "other")
        for state in getattr(optimizer, "state_names", ()):
            tensor = optimizer.state.get(parameter, {}).get(state)
            # Of another shape are counters.
            known = state not in _OTHER and isinstance(tensor, Tensor)
            if known and tensor.numel() and tensor.shape == parameter.shape:
                kept.setdefault(state, {}).setdefault(layer, []).append(tensor)
    of_layers = getattr(optimizer, "layer_curvature", None)
    for state, by_layer in of_layers().items() if of_layers is not None else ():
        kept[state] = {plain_name(layer): list(tensors) for layer, tensors in by_layer.items()}
    values: dict[str, Tensor] = {}
    for state, of_state in kept.items():
        for layer, tensors in of_state.items():
            values[f"{state}_norm/{layer}"] = _norm(tensors)
            values[f"{state}_sparsity/{layer}"] = _share_of_zeros(tensors)
    return values


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    dtype = vectors.scalar_dtype(tensors)
    parts = [_whole(torch.linalg.vector_norm(x, dtype=dtype)) for x in tensors]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(parts))
    return norm


def _share_of_zeros(tensors: Sequence[Tensor]) -> Tensor:
    counts = [_whole(_count(x)) for (part,) in vectors.blocks(tensors) for x in part]
    size = sum(x.numel() for x in tensors)
    return (size - torch.stack(counts).sum(dtype=torch.int64)) / size


def _count(x: Tensor) -> Tensor:
    """Return the number of entries that are not zero."""
    # Counting is far slower than adding on a CPU; the parts are small enough to be exact.
    if x.device.type == "cpu":
        return x.sign().abs_().nan_to_num_(1.0).sum()
    return torch.count_nonzero(x)


def _whole(scalar: Tensor) -> Tensor:
    """Return a scalar of sharded tensors as an ordinary one; collective if it is one."""
    full = getattr(scalar, "full_tensor", None)
    return scalar if full is None else full()
