"""Statistics of the layers over the micro-batches of one step, and their averages over steps."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_curvature import vectors
from lightning_curvature.curvature.layers import (
    REFERENCE_LAYERS,
    Factors,
    Moments,
    factor_shapes,
    layer_inner,
    layer_kind,
    layer_mean,
    layer_moments,
    min_max,
    reference_factors,
)
from lightning_curvature.curvature.statistics import SUPPORTED_LAYERS, LayerHooks
from lightning_curvature.oracle.protocol import Oracle

__all__ = [
    "Average",
    "CorrectedWindow",
    "LayerInfo",
    "LayerWindow",
    "ReferenceWindow",
    "Refresh",
    "layer_info",
]

# Of the authors' code: old * 0.1 gamma + new * 0.01 gamma.
_OLD, _NEW = 0.1, 0.01
_MIN_MAX_EPS = 1e-6


class LayerInfo(NamedTuple):
    """A layer as an optimizer sees it.

    Attributes:
        kind: What `layer_kind` returned.
        has_bias: Whether H has an entry for the bias.
        weight: Number of the weight among the parameters of the optimizer, None if it has not got
            it.
        bias: Likewise.
        shapes: Shapes of H and S.
        like: Empty tensor of the dtype and on the device of the factors.
    """

    kind: str
    has_bias: bool
    weight: int | None
    bias: int | None
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    like: Tensor

    def fresh(self) -> "Average":
        """Return factors of ones: all coordinates count as average until they are known better."""
        inputs, outputs = (self.like.new_ones(shape) for shape in self.shapes)
        return Average(Factors(inputs, outputs), self.like.new_zeros(()))


class Average(NamedTuple):
    """Running averages of a layer.

    Attributes:
        factors: The two factors.
        updates: How often they were refreshed, a 0-dim tensor.
    """

    factors: Factors
    updates: Tensor


class Refresh(NamedTuple):
    """New averages of the layers.

    Attributes:
        averages: By name of the layer.
        drift: Relative change of the diagonals, a 0-dim tensor; NaN where nothing was refreshed.
        failed: 0-dim tensor: 1 if new factors were not finite, so that old ones stay; else 0.
    """

    averages: dict[str, Average]
    drift: Tensor
    failed: Tensor


class _New(NamedTuple):
    """New factors of a layer, their weight in the average, and whether there are any (0-dim)."""

    factors: Factors
    weight: Tensor
    found: Tensor


def layer_info(
    layer: nn.Module, numbers: Mapping[int, int], params: Sequence[Tensor], *, reference: bool
) -> LayerInfo | None:
    """Describe a supported layer; None if the optimizer has none of its parameters.

    Args:
        layer: The layer.
        numbers: Number of each parameter of the optimizer, by ``id``.
        params: These parameters.
        reference: Whether normalization layers have two input entries, as in the authors' code.
    """
    # By identity. What a parametrization computes is nobody's parameter.
    weight, bias = (numbers.get(id(getattr(layer, role, None))) for role in ("weight", "bias"))
    own = next((params[i] for i in (weight, bias) if i is not None), None)
    if own is None:
        return None
    kind, has_bias = layer_kind(layer), getattr(layer, "bias", None) is not None
    inputs, outputs = factor_shapes(layer)
    if reference:
        inputs, outputs = inputs[-1:], (math.prod(outputs),)
        if kind == "norm":
            inputs, has_bias = (2,), True
    like = torch.empty(0, dtype=vectors.scalar_dtype([own]), device=own.device)
    return LayerInfo(kind, has_bias, weight, bias, (inputs, outputs), like)


class LayerWindow(ABC):
    """Watches the layers of a module that belong to an optimizer.

    Args:
        module: The module.
        params: Parameters of the optimizer.
        enabled: Tells whether the coming step will ask for statistics.

    Attributes:
        hooks: The hooks on all layers of the module.
        layers: What there is to know about those that belong to the optimizer, by name.
    """

    reference = False
    kinds: tuple[type[nn.Module], ...] = SUPPORTED_LAYERS

    def __init__(
        self, module: nn.Module, params: Sequence[Tensor], enabled: Callable[[], bool]
    ) -> None:
        self.hooks = LayerHooks(
            module, self._report, kinds=self.kinds, select=self._is_known, enabled=enabled
        )
        self.layers: dict[str, LayerInfo] = {}
        self._ids: list[int] = []
        self.find(params)

    def _is_known(self, name: str, layer: nn.Module) -> bool:
        # The projection of an attention layer: its forward is never called.
        unused = isinstance(layer, NonDynamicallyQuantizableLinear) and not self.reference
        return not unused and any(True for _ in layer.parameters(recurse=False))

    def find(self, params: Sequence[Tensor]) -> bool:
        """Find the layers of the parameters; layers may join the others in the course of training.

        Args:
            params: Parameters of the optimizer.

        Returns:
            Whether they are others than before.
        """
        ids = [id(p) for p in params]
        if ids == self._ids:
            return False
        numbers = {key: number for number, key in enumerate(ids)}
        found = {
            name: layer_info(layer, numbers, params, reference=self.reference)
            for name, layer in self.hooks.layers.items()
        }
        self._ids = ids
        self.layers = {name: info for name, info in found.items() if info is not None}
        return True

    def silent(self) -> list[str]:
        """Name the layers of the optimizer that nothing was ever seen of."""
        return [name for name in self.hooks.silent() if name in self.layers]

    def _report(self, name: str, layer: nn.Module, given: Tensor, grad: Tensor) -> None:
        if name in self.layers:
            self._visit(name, layer, given, grad)

    @abstractmethod
    def _visit(self, name: str, layer: nn.Module, given: Tensor, grad: Tensor) -> None:
        """Take in one call of a layer."""

    @abstractmethod
    def clear(self) -> None:
        """Forget what belongs to the present step."""

    def zeroed(self) -> None:
        """Forget what belongs to a gradient that is gone."""
        self.clear()

    def forward_dropped(self) -> None:  # noqa: B027 - nothing is kept of a forward pass
        """Nothing was kept: layers are seen when their gradient arrives."""

    @abstractmethod
    def _observe(
        self, averages: Mapping[str, Average], decay: float, oracle: Oracle
    ) -> dict[str, _New]:
        """Return what the present step says about each layer, the same on every rank."""

    def close(self) -> None:
        """Remove the hooks."""
        self.hooks.close()
        self.clear()

    def refresh(
        self, averages: Mapping[str, Average], decay: float, oracle: Oracle, usable: Tensor | None
    ) -> Refresh:
        """Return the averages with the present step in them; one collective.

        Args:
            averages: The old averages; they are not changed.
            decay: Weight of the old average.
            oracle: Averages over the ranks.
            usable: Boolean 0-dim tensor: if False nothing changes. None for True.
        """
        averaged = dict(averages)
        changes: list[Tensor] = []
        sizes: list[Tensor] = []
        failures: list[Tensor] = []
        for name, (factors, weight, found) in self._observe(averages, decay, oracle).items():
            old, updates = averages[name]
            finite = torch.isfinite(factors.input.sum() + factors.output.sum())
            good = finite & found
            if usable is not None:
                good = good & usable.to(good.device)
            share = torch.where(good, weight, torch.zeros_like(weight))
            new = Factors(
                *(
                    torch.lerp(a, torch.where(good, b, a), share)
                    for a, b in zip(old, factors, strict=True)
                )
            )
            averaged[name] = Average(new, updates + good.to(updates.dtype))
            change, size = _change(self.layers[name], old, new)
            for one, total in ((change, changes), (size, sizes)):
                total.append(torch.where(good, one, torch.zeros_like(one)))
            failures.append(found & ~finite)
        drift = (_total(changes) / _total(sizes)).clamp_min(0).sqrt()
        failed = (_total([f.to(drift.dtype) for f in failures]) > 0).to(drift.dtype)
        return Refresh(averaged, drift, failed)


def _total(scalars: list[Tensor]) -> Tensor:
    return torch.stack([x.to(scalars[0].device) for x in scalars]).sum()


def _change(info: LayerInfo, old: Factors, new: Factors) -> tuple[Tensor, Tensor]:
    """Return ``|new - old|^2`` and ``|old|^2`` of two diagonals divided by their means."""
    kind, bias = info.kind, info.has_bias
    tiny = torch.finfo(old.input.dtype).tiny
    a, b = (layer_mean(kind, x, has_bias=bias).clamp_min(tiny) for x in (old, new))
    size = layer_inner(kind, old, old, has_bias=bias) / a / a
    other = layer_inner(kind, new, new, has_bias=bias) / b / b
    return size + other - 2 * layer_inner(kind, old, new, has_bias=bias) / a / b, size


class CorrectedWindow(LayerWindow):
    """Averages over all rows of the step, then over steps with weights that sum to one.

    Every row counts the same, in whichever micro-batch or on whichever rank it is, so that
    accumulation and several processes change nothing. S is divided by its sum over all layers:
    the scale of the loss cancels (its reduction, the number of micro-batches, that of a gradient
    scaler, and how far training is), and layers that share a parameter remain comparable.
    """

    def __init__(
        self, module: nn.Module, params: Sequence[Tensor], enabled: Callable[[], bool]
    ) -> None:
        self._sums: dict[str, Moments] = {}
        super().__init__(module, params, enabled)

    def _visit(self, name: str, layer: nn.Module, given: Tensor, grad: Tensor) -> None:
        dtype = self.layers[name].like.dtype
        new = Moments(*(x.to(dtype) for x in layer_moments(layer, given, grad)))
        old = self._sums.get(name)
        if old is not None:
            new = Moments(*(a + b for a, b in zip(old, new, strict=True)))
        self._sums[name] = new

    def clear(self) -> None:
        """Forget what belongs to the present step."""
        self._sums = {}

    def _observe(
        self, averages: Mapping[str, Average], decay: float, oracle: Oracle
    ) -> dict[str, _New]:
        sums = {
            name: self._sums.get(name)
            or Moments(*map(averages[name].updates.new_zeros, (*info.shapes, ())))
            for name, info in self.layers.items()
        }
        inputs, outputs, rows = oracle.mean_vectors(*map(list, zip(*sums.values(), strict=True)))
        total = _total([x.sum() for x in outputs])
        found = {}
        for name, x, s, count in zip(sums, inputs, outputs, rows, strict=True):
            n = averages[name].updates + 1
            # The last of the bias-corrected weights: the first observation counts fully.
            weight = (1 - decay) / (1 - decay**n)
            # A layer without any gradient says nothing about how its coordinates compare.
            present = (count > 0) & (s.sum() != 0)
            factors = Factors(x / count, s / total.to(s.device, s.dtype))
            found[name] = _New(factors, weight, present)
        return found


class ReferenceWindow(LayerWindow):
    """The statistics of the authors' code, defects included.

    Every micro-batch takes part in the decay, and before the first step the last one is all that
    counts. The weights of old and new sum to 0.11 gamma. Factors are normalized before they are
    averaged, by a range to which 1e-6 is added: what is smaller than that vanishes.
    """

    reference = True
    kinds = REFERENCE_LAYERS

    def __init__(
        self, module: nn.Module, params: Sequence[Tensor], enabled: Callable[[], bool]
    ) -> None:
        self._calls: dict[str, list[Factors]] = {}
        super().__init__(module, params, enabled)

    def _visit(self, name: str, layer: nn.Module, given: Tensor, grad: Tensor) -> None:
        dtype = self.layers[name].like.dtype
        factors = reference_factors(layer, given, grad)
        normalized = Factors(*(min_max(x, _MIN_MAX_EPS).to(dtype) for x in factors))
        self._calls.setdefault(name, []).append(normalized)

    def clear(self) -> None:
        """Forget what belongs to the present step."""
        self._calls = {}

    def _observe(
        self, averages: Mapping[str, Average], decay: float, oracle: Oracle
    ) -> dict[str, _New]:
        new = {}
        for name in self.layers:
            calls = self._calls.get(name, [])
            factors, updates = averages[name]
            for call in calls:
                # Before the first step every micro-batch starts from ones again.
                once = Factors(*(torch.where(updates > 0, x, torch.ones_like(x)) for x in factors))
                factors = Factors(
                    *(a * _OLD * decay + b * _NEW * decay for a, b in zip(once, call, strict=True))
                )
            new[name] = (factors, updates.new_full((), float(bool(calls))))
        inputs, outputs, called = oracle.mean_vectors(
            [factors.input for factors, _ in new.values()],
            [factors.output for factors, _ in new.values()],
            [count for _, count in new.values()],
        )
        return {
            name: _New(Factors(x, s), torch.ones_like(count), count > 0)
            for name, x, s, count in zip(new, inputs, outputs, called, strict=True)
        }
