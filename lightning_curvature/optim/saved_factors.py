"""Factors of layers in a checkpoint: what they look like, whether they are sound, whose they are.

    name of the layer -> {"weight", "bias", "input", "output", "updates"}

"weight" and "bias" are numbers of parameters in the order of the optimizer, None for one that it
does not train. By them a layer finds its factors again when the model is attached under another
name: as ``net.0`` in a LightningModule and as ``0`` in a plain loop. "input" and "output" are its
two factors, "updates" counts how often they were refreshed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_curvature.curvature.layer_windows import Average, LayerInfo
from lightning_curvature.curvature.layers import Factors

__all__ = [
    "Entry",
    "as_averages",
    "as_entries",
    "check_saved_factors",
    "entries_of",
    "moved",
    "renumbered",
]

Entry = dict[str, Any]

_NUMBERS = ("weight", "bias")
# Of these axes a factor may have that many.
_AXES = {"input": (1, 2), "output": (1, 2), "updates": (0,)}


def as_averages(entries: Mapping[str, Entry]) -> dict[str, Average]:
    """Return the averages that entries hold.

    Args:
        entries: Entries by name of the layer.
    """
    return {
        name: Average(Factors(entry["input"], entry["output"]), entry["updates"])
        for name, entry in entries.items()
    }


def as_entries(
    averages: Mapping[str, Average], layers: Mapping[str, LayerInfo]
) -> dict[str, Entry]:
    """Return averages as entries.

    Args:
        averages: Averages by name of the layer.
        layers: These layers.
    """
    return {
        name: {
            "weight": layers[name].weight,
            "bias": layers[name].bias,
            "input": factors.input,
            "output": factors.output,
            "updates": updates,
        }
        for name, (factors, updates) in averages.items()
    }


def moved(entries: Mapping[str, Entry], params: Sequence[Tensor]) -> dict[str, Entry]:
    """Return entries whose tensors are where their parameters are.

    Args:
        entries: Entries by name of the layer.
        params: Parameters of the optimizer.
    """
    found = {}
    for name, entry in entries.items():
        own = next(params[entry[role]] for role in _NUMBERS if entry[role] is not None)
        found[name] = {
            key: value.to(own.device) if isinstance(value, Tensor) else value
            for key, value in entry.items()
        }
    return found


def renumbered(layers: Mapping[str, LayerInfo], entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Return entries under the present numbers of their parameters, fresh ones for new layers.

    Args:
        layers: The layers.
        entries: Entries of layers of the same model by name.
    """
    found = as_entries({name: info.fresh() for name, info in layers.items()}, layers)
    for name, entry in found.items():
        old = entries.get(name, entry)
        found[name] = {**old, **{role: entry[role] for role in _NUMBERS}}
    return found


def entries_of(
    layers: Mapping[str, LayerInfo], saved: Mapping[str, Entry], *, where: str
) -> dict[str, Entry]:
    """Return the entries of layers, fresh ones if nothing was saved.

    Args:
        layers: The layers.
        saved: What was saved, sound by itself.
        where: Beginning of the message if something does not fit.

    Raises:
        ValueError: If what was saved does not belong to these layers.
    """
    if not saved:
        return as_entries({name: info.fresh() for name, info in layers.items()}, layers)
    left, found, missing = dict(saved), {}, []
    for name, info in layers.items():
        numbers = (info.weight, info.bias)
        # Layers that share a weight have the same numbers: names come first, then the order.
        fitting = [n for n, entry in left.items() if (entry["weight"], entry["bias"]) == numbers]
        if not fitting:
            missing.append(name)
            continue
        chosen = name if name in fitting else fitting[0]
        entry = left.pop(chosen)
        shapes = (tuple(entry["input"].shape), tuple(entry["output"].shape))
        if shapes != info.shapes:
            raise ValueError(
                f"{where}: 'input' and 'output' of layer '{chosen}' must have the shapes "
                f"{list(info.shapes[0])} and {list(info.shapes[1])}, got {list(shapes[0])} and "
                f"{list(shapes[1])}."
            )
        found[name] = {
            key: value.to(info.like) if isinstance(value, Tensor) else value
            for key, value in entry.items()
        }
    if left or missing:
        raise ValueError(
            f"{where}: 'factors' has nothing for the layers {missing}, and {sorted(left)} in it "
            "belong to no layer. The state is that of another model, or of other trained "
            "parameters."
        )
    return found


def check_saved_factors(entries: Any, count: int, *, where: str) -> None:
    """Check factors that are about to be loaded, without knowing the layers.

    Args:
        entries: The entries.
        count: Number of parameters of the optimizer.
        where: Beginning of the message if something is wrong.

    Raises:
        ValueError: If they are not whole and sound.
    """
    if not isinstance(entries, dict):
        raise ValueError(f"{where}: 'factors' must be a dict, got {_short(entries)}.")
    for name, entry in entries.items():
        place = f"{where}: 'factors' of layer {name!r}"
        if not isinstance(entry, dict):
            raise ValueError(f"{place} must be a dict, got {_short(entry)}.")
        missing = [key for key in (*_NUMBERS, *_AXES) if key not in entry]
        if missing:
            raise ValueError(f"{place} have no {', '.join(missing)}.")
        for role in _NUMBERS:
            number = entry[role]
            sound = isinstance(number, int) and not isinstance(number, bool)
            if number is not None and not (sound and 0 <= number < count):
                raise ValueError(
                    f"{place}: '{role}' must be the number of one of {count} parameters, or None, "
                    f"got {_short(number)}."
                )
        if entry["weight"] is None and entry["bias"] is None:
            raise ValueError(f"{place}: 'weight' and 'bias' must not both be None.")
        for key, axes in _AXES.items():
            if not _is_sound(entry[key], axes):
                raise ValueError(
                    f"{place}: '{key}' must be a tensor of finite real numbers >= 0 with "
                    f"{' or '.join(map(str, axes))} axes, got {_short(entry[key])}."
                )


def _is_sound(value: Any, axes: tuple[int, ...]) -> bool:
    return (
        isinstance(value, Tensor)
        and value.dtype.is_floating_point
        and value.layout == torch.strided
        and value.device.type != "meta"
        and value.ndim in axes
        and bool((torch.isfinite(value) & (value >= 0)).all())
    )


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        return f"a {kind} tensor of shape {list(value.shape)} on {value.device}"
    text = repr(value)
    return text if len(text) <= 40 else f"a {type(value).__name__}"  # noqa: PLR2004
