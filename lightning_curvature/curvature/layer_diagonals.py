"""The diagonal of the Fisher matrix per parameter, put together from the factors of its layers."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_curvature.curvature.layer_windows import Average, LayerInfo
from lightning_curvature.curvature.layers import (
    Factors,
    bias_diagonal,
    layer_mean,
    min_max,
    weight_factors,
)

__all__ = [
    "Diagonal",
    "Normalization",
    "Pairs",
    "RankOne",
    "damping_stats",
    "paired_by_identity",
    "paired_in_parallel",
    "parameter_diagonals",
]

Normalization = Literal["mean", "min-max"]
# Number of a parameter -> names of its layers, each with its role there ("weight" or "bias").
Pairs = dict[int, list[tuple[str, str]]]

# Quantiles per factor from which the distribution of a diagonal is judged.
_POINTS = 32


class RankOne(NamedTuple):
    """A diagonal with the entries ``rows[:, None] * columns``, in the order of the parameter.

    Attributes:
        rows: ``[rows]``.
        columns: ``[columns]``.
    """

    rows: Tensor
    columns: Tensor

    def part(self, start: int, stop: int, factor: Tensor) -> Tensor:
        """Return some of the rows times a number.

        Args:
            start: First row.
            stop: The row after the last one.
            factor: 0-dim tensor.
        """
        return (self.rows[start:stop, None] * factor) * self.columns


Diagonal = RankOne | Tensor


def paired_by_identity(layers: Mapping[str, LayerInfo]) -> Pairs:
    """Return the layers of every parameter that has any.

    Args:
        layers: The layers.
    """
    pairs: Pairs = {}
    for name, info in layers.items():
        for number, role in ((info.weight, "weight"), (info.bias, "bias")):
            if number is not None:
                pairs.setdefault(number, []).append((name, role))
    return pairs


def paired_in_parallel(
    layers: Mapping[str, LayerInfo], params: Sequence[Tensor]
) -> tuple[Pairs, frozenset[int]]:
    """Pair parameters with layers as the authors' code does: both lists in parallel, by shape.

    It takes as many turns as there are layers. A parameter of another shape than the weight of the
    layer whose turn it is uses up the turn, so that nothing is left for the last layers.

    Args:
        layers: The layers, in the order of the model.
        params: Parameters of the optimizer.

    Returns:
        The pairs, and the numbers of the parameters that no turn was left for.
    """
    pairs: Pairs = {}
    waiting = list(layers.items())
    number = 0
    for _ in range(len(layers)):
        if number >= len(params):
            break
        name, info = waiting[0]
        if info.weight is None or params[number].shape != params[info.weight].shape:
            number += 1
            continue
        waiting.pop(0)
        pairs[number] = [(name, "weight")]
        number += 1
        shape = None if info.bias is None else params[info.bias].shape
        if number < len(params) and params[number].shape == shape:
            pairs[number] = [(name, "bias")]
            number += 1
    return pairs, frozenset(range(number, len(params)))


def parameter_diagonals(
    params: Sequence[Tensor],
    pairs: Pairs,
    layers: Mapping[str, LayerInfo],
    averages: Mapping[str, Average],
    normalization: Normalization | None,
) -> dict[int, Diagonal]:
    """Return the diagonal of every parameter that has a layer, by its number.

    Args:
        params: Parameters of the optimizer.
        pairs: Layers of the parameters. Where there are several their diagonals add up.
        layers: The layers.
        averages: Their averages.
        normalization: "mean" divides the diagonal of a layer, bias included, by its mean; "min-max"
            maps both factors to [0, 1] before. None changes nothing.
    """
    normalized: dict[str, tuple[Factors, Tensor]] = {}
    for name, info in layers.items():
        factors = averages[name].factors
        if normalization == "min-max":
            factors = Factors(*map(min_max, factors))
        mean = torch.ones_like(averages[name].updates)
        if normalization is not None:
            mean = layer_mean(info.kind, factors, has_bias=info.has_bias)
            mean = mean.clamp_min(torch.finfo(mean.dtype).tiny)
        normalized[name] = (factors, mean)
    found: dict[int, Diagonal] = {}
    for number, roles in pairs.items():
        mean = torch.stack([normalized[name][1] for name, _ in roles]).sum()
        parts = [_raw(layers[name], normalized[name][0], role) for name, role in roles]
        found[number] = _combined(params[number], parts, mean)
    return found


def _raw(info: LayerInfo, factors: Factors, role: str) -> tuple[Tensor, Tensor]:
    if role == "bias":
        return bias_diagonal(factors), factors.output.new_ones(1)
    return weight_factors(info.kind, factors, has_bias=info.has_bias)


def _combined(p: Tensor, parts: list[tuple[Tensor, Tensor]], mean: Tensor) -> Diagonal:
    rows, columns = parts[0]
    alone = len(parts) == 1 and rows.ndim == columns.ndim == 1 and len(columns) > 1
    if alone and p.is_contiguous():
        return RankOne(rows / mean, columns)
    total = torch.zeros_like(p, dtype=rows.dtype)
    for rows, columns in parts:
        total += (rows.unsqueeze(-1) * columns.unsqueeze(-2)).reshape(p.shape)
    return total.div_(mean)


def damping_stats(
    diagonals: Mapping[int, Diagonal], damping: Mapping[int, float]
) -> dict[str, Tensor]:
    """Compare diagonals with their damping, all coordinates counted alike.

    Median and fraction are read off quantiles of the factors, good to some percent.

    Args:
        diagonals: Diagonals of parameters by number.
        damping: What is added to each.

    Returns:
        "fisher_median" and "fisher_max", in multiples of the damping, and "damped_fraction", the
        fraction of coordinates below their damping; 0-dim tensors. Empty without diagonals.
    """
    if not diagonals:
        return {}
    first = next(iter(diagonals.values()))
    device = first.rows.device if isinstance(first, RankOne) else first.device
    values, weights, largest = [], [], []
    for number, diagonal in diagonals.items():
        scale = 1 / max(damping[number], torch.finfo(torch.float64).tiny)
        if isinstance(diagonal, RankOne):
            rows, columns = (_quantiles(x) for x in diagonal)
            some = (rows[:, None] * columns).flatten()
            top, count = diagonal.rows.amax() * diagonal.columns.amax(), diagonal.rows.numel()
            count *= diagonal.columns.numel()
        else:
            some = _quantiles(diagonal, _POINTS**2)
            top, count = diagonal.amax(), diagonal.numel()
        values.append((some * scale).to(device))
        weights.append(torch.full_like(values[-1], count / len(some)))
        largest.append((top * scale).to(device))
    dtype = values[0].dtype
    order = torch.cat([v.to(dtype) for v in values]).sort()
    counted = torch.cat([w.to(dtype) for w in weights])[order.indices].cumsum(0)
    middle = torch.searchsorted(counted, counted[-1:] / 2)
    below = torch.cat([counted.new_zeros(1), counted])
    edge = torch.searchsorted(order.values, torch.ones_like(order.values[:1]))
    return {
        "fisher_median": order.values[middle][0],
        "fisher_max": torch.stack([x.to(dtype) for x in largest]).amax(),
        "damped_fraction": below[edge][0] / counted[-1],
    }


def _quantiles(x: Tensor, points: int = _POINTS) -> Tensor:
    """Return some values that stand for all, each for as many."""
    ordered = x.flatten().sort().values
    count = min(points, len(ordered))
    middles = (torch.arange(count, device=x.device) + 0.5) * (len(ordered) / count)
    return ordered[middles.long()]
