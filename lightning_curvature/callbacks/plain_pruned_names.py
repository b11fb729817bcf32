"""Ordinary names in the state dicts of layers that `torch.nn.utils.prune` has put masks on.

A checkpoint of a run with masks is then one of the plain model, and can be loaded in the middle of
the run. A hook of the module itself does it, since Lightning does not ask callbacks about
checkpoints that hold weights only.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

__all__ = ["with_plain_names"]

_ORIG, _MASK = "_orig", "_mask"


def with_plain_names(
    layers: Iterable[nn.Module],
) -> tuple[list[RemovableHandle], list[RemovableHandle]]:
    """Let state dicts hold ``weight``, with zeros, instead of ``weight_orig`` and ``weight_mask``.

    Loading such a state dict keeps the masks.

    Args:
        layers: Layers that have masks, or will have.

    Returns:
        Handles that end it, of saving and of loading.
    """
    saving, loading = [], []
    for layer in dict.fromkeys(layers):
        save: Callable[..., RemovableHandle] = layer.register_state_dict_post_hook
        load: Callable[..., RemovableHandle] = layer.register_load_state_dict_pre_hook
        saving.append(save(_save_plain))
        loading.append(load(_load_plain))
    return saving, loading


def _pruned(layer: nn.Module) -> list[str]:
    """Return the ordinary names of the parameters that have a mask."""
    names = [name.removesuffix(_ORIG) for name in layer._parameters if name.endswith(_ORIG)]
    return [name for name in names if name + _MASK in layer._buffers]


def _save_plain(layer: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    names = {prefix + name for name in _pruned(layer)}
    if not any(name + _ORIG in state for name in names):
        return
    # In the order of the parameters: what is renamed would go to the end.
    own = {key: state.pop(key) for key in list(state) if key.startswith(prefix)}
    for key, value in own.items():
        if key.removesuffix(_MASK) in names:
            continue
        plain = key.removesuffix(_ORIG)
        state[plain if plain in names else key] = value


def _load_plain(layer: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in _pruned(layer):
        value = state.pop(prefix + name, None)
        if value is None:
            continue
        mask = layer._buffers[name + _MASK]
        assert mask is not None
        state[prefix + name + _MASK] = mask
        pruned = (mask == 0).to(value.device)
        # Of another shape it is for torch to say so.
        fits = value.shape == mask.shape
        state[prefix + name + _ORIG] = torch.where(pruned, 0, value) if fits else value
