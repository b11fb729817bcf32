"""What AdaFisher knows of the layers: who owns which parameter, and statistics of the present step.

The averages over steps belong to the optimizer, as plain dictionaries of tensors that checkpoints
hold:

    name of the layer -> {"kind", "weight", "bias", "input", "output", "updates"}

"weight" and "bias" are numbers of parameters in the order of the optimizer (None for one it does
not train), by which a saved layer finds its place again under another name; "input" and "output"
are H and S of `curvature/layers.py`; "updates" counts how often they were refreshed.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_curvature import vectors
from lightning_curvature.curvature.layers import (
    REFERENCE_LAYERS,
    Factors,
    factor_shapes,
    layer_inner,
    layer_kind,
    layer_mean,
    layer_moments,
    min_max,
    reference_factors,
    weight_factors,
)
from lightning_curvature.curvature.statistics import SUPPORTED_LAYERS, LayerHooks
from lightning_curvature.oracle.protocol import Oracle

__all__ = [
    "CorrectedWindow",
    "Entry",
    "Refresh",
    "ReferenceWindow",
    "Window",
    "entry_factors",
    "has_bias",
    "layer_entries",
    "paired_in_parallel",
    "sample_of_diagonal",
]

Entry = dict[str, Any]

# Of the authors' code: old * 0.1 gamma + new * 0.01 gamma.
_OLD, _NEW = 0.1, 0.01
_MIN_MAX_EPS = 1e-6
# Points per factor at which the distribution of a diagonal is sampled.
_POINTS = 32


def layer_entries(
    layers: Mapping[str, nn.Module], params: Sequence[Tensor], *, reference: bool
) -> dict[str, Entry]:
    """Return fresh entries of the layers that have a parameter of the optimizer.

    Their factors are all ones: every coordinate counts as average until it is known better.

    Args:
        layers: Supported layers by name.
        params: Parameters of the optimizer, in its order.
        reference: Whether normalization layers have two input entries, as in the authors' code.
    """
    numbers = {id(p): number for number, p in enumerate(params)}
    entries = {}
    for name, layer in layers.items():
        # By identity. What a parametrization computes is no parameter and belongs to nobody.
        weight, bias = (
            numbers.get(id(getattr(layer, role, None))) for role in ("weight", "bias")
        )
        own = next((params[i] for i in (weight, bias) if i is not None), None)
        if own is None:
            continue
        kind = layer_kind(layer)
        shapes = factor_shapes(layer)
        if reference:
            inputs = shapes[0][-1:] if kind != "norm" else (2,)
            shapes = (inputs, (math.prod(shapes[1]),))
        dtype = vectors.scalar_dtype([own])
        factors = [torch.ones(shape, dtype=dtype, device=own.device) for shape in shapes]
        entries[name] = {
            "kind": kind,
            "weight": weight,
            "bias": bias,
            "input": factors[0],
            "output": factors[1],
            "updates": torch.zeros((), dtype=dtype, device=own.device),
        }
    return entries


def entry_factors(entry: Entry) -> Factors:
    """Return the factors of an entry."""
    return Factors(entry["input"], entry["output"])


def has_bias(entry: Entry, layer: nn.Module) -> bool:
    """Tell whether H of a layer has an entry for the bias; the authors' norms always have one.

    Args:
        entry: The layer's entry.
        layer: The layer.
    """
    reference_norm = entry["kind"] == "norm" and entry["input"].shape != entry["output"].shape
    return getattr(layer, "bias", None) is not None or reference_norm


def paired_in_parallel(
    entries: Mapping[str, Entry], params: Sequence[Tensor]
) -> tuple[dict[int, tuple[str, str]], set[int]]:
    """Pair parameters with layers as the authors' code does: both lists in parallel, by shape.

    It takes as many turns as there are layers. A parameter of another shape than the next layer's
    weight uses up a turn without a layer, so that as many layers at the end get none.

    Args:
        entries: Entries of the layers, in the order of the model.
        params: Parameters of the optimizer.

    Returns:
        The layer and the role ("weight" or "bias") of the parameters that have one, by number, and
        the numbers of the parameters that no turn is left for.
    """
    pairs: dict[int, tuple[str, str]] = {}
    waiting = list(entries.items())
    number = 0
    for _ in range(len(entries)):
        if number >= len(params):
            break
        name, entry = waiting[0]
        weight = entry["weight"]
        if weight is None or params[number].shape != params[weight].shape:
            number += 1
            continue
        pairs[number] = (name, "weight")
        number += 1
        bias = entry["bias"]
        if bias is not None and number < len(params) and params[number].shape == params[bias].shape:
            pairs[number] = (name, "bias")
            number += 1
        waiting.pop(0)
    return pairs, set(range(number, len(params)))


class Refresh(NamedTuple):
    """New factors of the layers.

    Attributes:
        entries: The new entries by name.
        drift: Relative change of the diagonals, a 0-dim tensor; NaN where nothing was refreshed.
        failed: 0-dim tensor: 1 if factors of a layer were not finite and the old ones stay.
    """

    entries: dict[str, Entry]
    drift: Tensor
    failed: Tensor


class Window(ABC):
    """Statistics of the layers over the micro-batches of one step.

    Args:
        module: Module whose layers are watched.
        params: Parameters of the optimizer; layers without one of them are left alone.
        enabled: Tells whether the coming step will ask for the statistics.
    """

    def __init__(
        self, module: nn.Module, params: Sequence[Tensor], enabled: Callable[[], bool]
    ) -> None:
        ids = {id(p) for p in params}

        def has_parameter(name: str, layer: nn.Module) -> bool:
            return any(id(p) in ids for p in layer.parameters(recurse=False))

        self.hooks = LayerHooks(
            module, self._visit, kinds=self._kinds(), select=has_parameter, enabled=enabled
        )

    @staticmethod
    @abstractmethod
    def _kinds() -> tuple[type[nn.Module], ...]:
        """Return the classes of layers that are watched."""

    @abstractmethod
    def _visit(self, name: str, layer: nn.Module, given: Tensor, grad: Tensor) -> None:
        """Take in one call of a layer."""

    @abstractmethod
    def clear(self) -> None:
        """Forget the present step."""

    def close(self) -> None:
        """Remove the hooks."""
        self.hooks.close()
        self.clear()

    def refresh(
        self, entries: Mapping[str, Entry], decay: float, oracle: Oracle, usable: Tensor | None
    ) -> Refresh:
        """Return the averages with the present step in them; one collective.

        Args:
            entries: The old averages; they are not changed.
            decay: Weight of the old average.
            oracle: Averages over the ranks.
            usable: Boolean 0-dim tensor: if False nothing changes. None for True.
        """
        fresh = self._observe(entries, decay, oracle)
        new, change, size, failed = dict(entries), [], [], []
        for name, (factors, weight, found) in fresh.items():
            entry, bias = entries[name], has_bias(entries[name], self.hooks.layers[name])
            finite = torch.isfinite(factors.input.sum() + factors.output.sum())
            good = finite & found if usable is None else finite & found & usable
            old = entry_factors(entry)
            now = Factors(
                *(
                    torch.where(good, torch.lerp(a, torch.where(good, b, a), weight), a)
                    for a, b in zip(old, factors, strict=True)
                )
            )
            new[name] = {
                **entry,
                "input": now.input,
                "output": now.output,
                "updates": entry["updates"] + good.to(entry["updates"].dtype),
            }
            one, two = (
                layer_inner(entry["kind"], x, x, has_bias=bias) / self._squared_mean(entry, x, bias)
                for x in (old, now)
            )
            both = layer_inner(entry["kind"], old, now, has_bias=bias)
            means = [self._squared_mean(entry, x, bias) for x in (old, now)]
            both = both / (means[0] * means[1]).sqrt()
            change.append(torch.where(good, one + two - 2 * both, torch.nan))
            size.append(torch.where(good, one, torch.nan))
            failed.append(found & ~finite)
        return Refresh(new, _relative(change, size), _any(failed))

    @staticmethod
    def _squared_mean(entry: Entry, factors: Factors, bias: bool) -> Tensor:
        """Return the square of what a diagonal is divided by before it is used."""
        return layer_mean(entry["kind"], factors, has_bias=bias).square()

    @abstractmethod
    def _observe(
        self, entries: Mapping[str, Entry], decay: float, oracle: Oracle
    ) -> dict[str, tuple[Factors, Tensor, Tensor]]:
        """Return per layer the new factors, their weight in the average, and if there are any."""
