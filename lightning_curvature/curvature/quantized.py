"""Weights stored in few bits, of which some entries stay floats and can be trained.

A dense-and-sparse split: what is trained is a vector of values, whose places in the weight are
fixed; all other entries are 8-bit or 4-bit integers with a scale per row or group of a row, and
never change. The layer stays what it is and its parameter the same object, so optimizers keep it;
the whole weight is made anew in every forward and lives as long as the layer needs it.

torchao serves less well here: its 8-bit layers make the whole weight anew, too, its 4-bit layers
need kernels of some GPUs in bfloat16, neither knows entries that stay floats, and the tensor
subclasses of both would stand in the checkpoints.
"""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.utils.parametrize as parametrization
from torch import Tensor, nn

from lightning_curvature.checks import check_count

__all__ = ["Bits", "QuantizedWeight", "dense_state", "quantize_rest", "restore_rest"]

Bits = Literal[4, 8]

# Largest code of each number of bits; codes are symmetric about zero.
_LARGEST = {8: 127, 4: 7}
_HALF_BYTE: Bits = 4
# What is quantized, and the names of its weights. Recurrent layers keep lists of their own.
_WEIGHTS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("weight",),
    nn.Embedding: ("weight",),
    nn.modules.conv._ConvNd: ("weight",),
    nn.MultiheadAttention: ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
}


class QuantizedWeight(nn.Module):
    """Makes a weight out of stored integers and the values of some entries.

    Args:
        weight: The weight, of two or more dimensions.
        positions: Entries that stay floats: positions in the flattened weight, int64.
        bits: Bits per entry: 8 with one scale per row, 4 with one per group.
        group_size: Entries of a row that share a scale; for 4 bits.
        scale: The scales, where they are known already.

    Attributes:
        codes: The integers, ``[rows, groups, group_size]``; two per byte for 4 bits.
        scale: The scales, ``[rows, groups, 1]``, float32.
        positions: See above.
    """

    codes: Tensor
    scale: Tensor
    positions: Tensor
    like: Tensor

    # Passes need not copy them.
    fixed_buffers: ClassVar[tuple[str, ...]] = ("codes", "scale", "positions")

    def __init__(
        self,
        weight: Tensor,
        positions: Tensor,
        bits: Bits = 8,
        group_size: int = 64,
        scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.shape = weight.shape
        self.bits = bits
        columns = weight[0].numel()
        # Two codes share a byte.
        self._group = min(group_size, columns + columns % 2) if bits == _HALF_BYTE else columns
        rows = weight.detach().flatten(1).float()
        if positions.numel():
            rows = rows.clone()
            rows.view(-1)[positions] = 0  # large ones need not fit into the range of the others
        grouped = nn.functional.pad(rows, (0, -columns % self._group))
        grouped = grouped.view(len(rows), -1, self._group)
        if scale is None:
            scale = grouped.abs().amax(dim=2, keepdim=True) / _LARGEST[bits]
            scale.masked_fill_(scale == 0, 1.0)
        scale = scale.to(grouped)
        largest = _LARGEST[bits]
        codes = (grouped / scale).round_().clamp_(-largest, largest).to(torch.int8)
        self.register_buffer("codes", _packed(codes) if bits == _HALF_BYTE else codes)
        self.register_buffer("scale", scale)
        self.register_buffer("positions", positions.to(weight.device))
        # Follows the module to another dtype.
        self.register_buffer("like", weight.new_empty(0), persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        """Return the weight.

        Args:
            values: Values of the entries that stay floats, ``[k]``.
        """
        codes = _unpacked(self.codes) if self.bits == _HALF_BYTE else self.codes
        columns = self.shape[1:].numel()
        rows = (codes * self.scale).flatten(1)[:, :columns]
        weight = rows.to(self.like.dtype).reshape(self.shape).contiguous()
        if self.positions.numel():
            weight.view(-1).index_copy_(0, self.positions, values.to(weight.dtype))
        return weight

    def _apply(self, *args: Any, **kwargs: Any) -> "QuantizedWeight":
        """Convert and move, but leave the scales float32: codes are exact multiples of them."""
        scale = self.scale
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        self.scale = scale.to(self.scale.device)
        return self

    def extra_repr(self) -> str:
        """Return what is shown of it."""
        return f"{tuple(self.shape)}, bits={self.bits}, values={self.positions.numel()}"


def _packed(codes: Tensor) -> Tensor:
    """Put two 4-bit codes into every byte."""
    shifted = (codes + 8).to(torch.uint8)
    return shifted[..., ::2] | (shifted[..., 1::2] << 4)


def _unpacked(packed: Tensor) -> Tensor:
    halves = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
    return halves.to(torch.int8).sub_(8)


def _slots(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yield the weights that can be quantized: the layer and the name within it."""
    for layer in module.modules():
        for kind, names in _WEIGHTS.items():
            if not isinstance(layer, kind):
                continue
            for name in names:
                # An embedding with a limit writes into its weight.
                writes = getattr(layer, "max_norm", None) is not None
                if layer._parameters.get(name) is not None and not writes:
                    yield layer, name


def quantize_rest(
    module: nn.Module,
    masks: Mapping[str, Tensor],
    bits: Bits = 8,
    group_size: int = 64,
    scales: Mapping[str, Tensor] | None = None,
) -> dict[str, QuantizedWeight]:
    """Quantize weights but for a few entries, which become all that is left of the parameters.

    Looks at weights of `torch.nn.Linear`, `torch.nn.Embedding`, `torch.nn.MultiheadAttention` and
    convolutions. A parameter keeps its identity and becomes a vector of its values at the
    positions, in float32 if it was of half precision; so optimizers need not be told, except that
    what they keep per entry has its shape. `restore_rest` is the way back.

    Args:
        module: The module; changed in place.
        masks: Positions in the flattened parameter that stay floats, int64, by name of the
            parameter; perhaps none. Parameters that are not named stay as they are.
        bits: Bits per entry: 8 with one scale per row, or 4 with one per group.
        group_size: Entries of a row that share a scale; even, for 4 bits.
        scales: Scales by name, from an earlier call.

    Returns:
        What was quantized, by name of the parameter.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> layer = torch.nn.Linear(64, 4)
        >>> quantized = quantize_rest(layer, {"weight": torch.tensor([7, 70])})
        >>> [tuple(p.shape) for p in layer.parameters()]
        [(4,), (2,)]
        >>> layer.weight.shape
        torch.Size([4, 64])
    """
    if bits not in _LARGEST:
        raise ValueError(f"Invalid bits={bits!r}: must be 8 or 4.")
    check_count("group_size", group_size)
    if group_size % 2:
        raise ValueError(f"Invalid group_size={group_size!r}: must be even.")
    names = {id(p): name for name, p in module.named_parameters() if name in masks}
    made: dict[int, QuantizedWeight] = {}
    for layer, attribute in list(_slots(module)):
        p = layer._parameters[attribute]
        if p is None or id(p) not in names:
            continue
        name = names[id(p)]
        if id(p) not in made:
            scale = None if scales is None else scales.get(name)
            weight = p.detach()
            made[id(p)] = QuantizedWeight(weight, masks[name], bits, group_size, scale)
            kept = weight.reshape(-1)[made[id(p)].positions]
            p.data = kept if kept.dtype == torch.float64 else kept.float()
        _parametrize(layer, attribute, made[id(p)])
    return {names[key]: quantized for key, quantized in made.items()}


def _parametrize(layer: nn.Module, name: str, quantized: QuantizedWeight) -> None:
    order = list(layer._parameters)
    parametrization.register_parametrization(layer, name, quantized, unsafe=True)
    # Parametrizations give a parameter back at the end, which would change the order of all.
    layer.__dict__.setdefault("_parameter_order", order)


def _quantized_slots(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, QuantizedWeight]]:
    """Yield quantized weights: name of the layer, the layer, name within it, what makes it."""
    for path, layer in module.named_modules():
        if not parametrization.is_parametrized(layer):
            continue
        lists: Any = layer.parametrizations
        for name, parts in list(lists.items()):
            if isinstance(parts[0], QuantizedWeight):
                yield path, layer, name, parts[0]


def restore_rest(module: nn.Module) -> dict[str, Tensor]:
    """Undo `quantize_rest`: parameters get whole weights, as the forward passes have seen them.

    Args:
        module: The module; changed in place.

    Returns:
        Positions of the entries that stayed floats, by name of the parameter.
    """
    positions, whole = {}, set()
    for path, layer, name, quantized in list(_quantized_slots(module)):
        p = layer.parametrizations[name].original  # type: ignore[index,union-attr]
        if id(p) not in whole:
            whole.add(id(p))
            p.data = quantized(p.detach())
            positions[f"{path}.{name}" if path else name] = quantized.positions
        parametrization.remove_parametrizations(layer, name, leave_parametrized=False)
        if not parametrization.is_parametrized(layer):
            order = layer.__dict__.pop("_parameter_order")
            layer._parameters = {key: layer._parameters[key] for key in order}
    return positions


def dense_state(module: nn.Module, state: dict[str, Any], prefix: str = "") -> None:
    """Replace what is quantized in a state dict by whole weights, on the CPU.

    Args:
        module: The module with quantized weights.
        state: What its ``state_dict`` returned; changed in place.
        prefix: What its keys begin with.
    """
    whole: dict[int, Tensor] = {}
    for path, layer, name, quantized in _quantized_slots(module):
        layer_prefix = f"{prefix}{path}." if path else prefix
        own = f"{layer_prefix}parametrizations.{name}."
        for key in [key for key in state if key.startswith(own)]:
            del state[key]
        if id(quantized) not in whole:
            p: Tensor = layer.parametrizations[name].original  # type: ignore[index,union-attr]
            whole[id(quantized)] = quantized(p.detach()).cpu()
        state[f"{layer_prefix}{name}"] = whole[id(quantized)]
