"""What `LayerStatistics` gathers: moments of activations and output gradients, layer by layer."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["SIDES", "STATISTICS", "LayerMoments", "effective_rank"]

# What went into a layer, and the gradient of what came out of it.
SIDES = ("activation", "output_grad")
STATISTICS = ("mean", "std", "sparsity", "dead_fraction", "norm", "effective_rank")
# In a packed part, before flags and rows: number of rows, mean, sum of squared deviations, zeros.
_HEAD = 4
# Its multiples have fractional parts that are spread as evenly as can be.
_GOLDEN = (math.sqrt(5) - 1) / 2


def _feature_axis(layer: nn.Module) -> int:
    """Return the axis of the features, counted from the end; after it come positions."""
    if isinstance(layer, nn.Conv1d):
        return -2
    if isinstance(layer, nn.Conv2d):
        return -3
    return 1 if isinstance(layer, (_BatchNorm, nn.GroupNorm)) else -1


def _sizes(layer: nn.Module) -> tuple[int, int]:
    """Return the numbers of features that go in and out; 0 where they are no numbers."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        return layer.in_channels, layer.out_channels
    if isinstance(layer, nn.Embedding):
        return 0, layer.embedding_dim
    if isinstance(layer, _BatchNorm):
        return layer.num_features, layer.num_features
    if isinstance(layer, nn.GroupNorm):
        return layer.num_channels, layer.num_channels
    if isinstance(layer, nn.LayerNorm):
        size = math.prod(layer.normalized_shape)
        return size, size
    raise TypeError(f"LayerStatistics does not know the features of {type(layer).__name__}.")


def _by_features(layer: nn.Module, x: Tensor) -> Tensor:
    """Return a view ``[N, features, positions]``; the rows are the examples at all positions."""
    if isinstance(layer, nn.LayerNorm):
        return x.reshape(-1, math.prod(layer.normalized_shape), 1)
    axis = _feature_axis(layer) % x.dim()
    features = x.shape[axis]
    examples = math.prod(x.shape[:axis])
    return x.reshape(examples, features, math.prod(x.shape[axis + 1 :]))


def effective_rank(rows: Tensor) -> Tensor:
    """Return the effective rank of a second moment: (tr A)^2 / tr(A^2), from 1 to its rank.

    A is the mean of x x^T over the rows x; the traces come from the smaller of the two Gram
    matrices. Rows of zeros change nothing, and zeros only have rank 0.

    Args:
        rows: The rows, ``[n, d]``.

    Examples:
        >>> effective_rank(torch.eye(3))
        tensor(3.)
        >>> effective_rank(torch.ones(5, 2))
        tensor(1.)
    """
    # The result does not depend on the scale; squares of squares of small gradients vanish.
    rows = rows / rows.abs().amax().clamp_min(torch.finfo(rows.dtype).tiny)
    gram = rows @ rows.T if rows.shape[0] < rows.shape[1] else rows.T @ rows
    squared = gram.square().sum()
    return gram.trace().square() / squared.clamp_min(torch.finfo(rows.dtype).tiny)


@dataclass
class _Part:
    """Moments of one side of one layer."""

    size: int
    count: int = 0  # rows
    mean: Tensor | None = None
    deviations: Tensor | None = None  # sum of squared differences from the mean
    zeros: Tensor | None = None
    alive: Tensor | None = None
    rows: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor, factor: float, quota: int) -> None:
        """Add the values of one call, ``[N, features, positions]``."""
        count = x.shape[0] * x.shape[2]
        if count == 0:
            return
        if x.dtype in (torch.float16, torch.bfloat16):
            x = x.float()
        mean = x.mean()
        deviations = (x - mean).square_().sum() * (factor * factor)
        mean = mean * factor
        # Faster on a CPU than counting.
        zeros = x.numel() - x.sign().abs_().sum()
        alive = x.abs().amax((0, 2)) != 0
        self.rows.append(_some_rows(x, quota))
        if self.mean is None or self.deviations is None:
            self.mean, self.deviations, self.zeros, self.alive = mean, deviations, zeros, alive
        else:
            step = mean - self.mean
            share = count / (self.count + count)
            self.deviations = (
                self.deviations + deviations + step.square() * (self.count * share * self.size)
            )
            self.mean = self.mean + step * share
            self.zeros = zeros if self.zeros is None else self.zeros + zeros
            self.alive = alive if self.alive is None else self.alive | alive
        self.count += count

    def pack_into(self, out: Tensor, limit: int) -> None:
        """Write everything into a part of the tensor that goes to the other ranks."""
        if self.mean is None or self.deviations is None:
            return
        assert self.zeros is not None
        assert self.alive is not None
        out[0] = self.count
        out[1:_HEAD] = torch.stack(
            [x.to(out.dtype) for x in (self.mean, self.deviations, self.zeros)]
        )
        out[_HEAD : _HEAD + self.size] = self.alive
        rows = torch.cat(self.rows)
        rows = rows[_evenly(rows.shape[0], limit, rows.device)]
        start = _HEAD + self.size
        out[start : start + rows.numel()] = rows.reshape(-1)


def _some_rows(x: Tensor, quota: int) -> Tensor:
    """Return at most ``quota`` rows of ``[N, features, positions]``, evenly spread."""
    positions = x.shape[2]
    index = _evenly(x.shape[0] * positions, quota, x.device)
    return x[index // positions, :, index % positions]


def _evenly(count: int, limit: int, device: torch.device) -> Tensor:
    """Return at most ``limit`` of the numbers below ``count``: one out of each of as many parts.

    Not the same place of every part: it might be the same place of every image.
    """
    if count <= limit:
        return torch.arange(count, device=device)
    parts = torch.arange(limit, dtype=torch.float64)
    places = (parts * _GOLDEN).frac()
    return ((parts + places) * (count / limit)).long().clamp_max(count - 1).to(device)


class LayerMoments:
    """Moments of the layers over the micro-batches and ranks of one optimizer step.

    They are sums and counts, so that several micro-batches and ranks say exactly what one batch of
    all their examples says. Only the effective rank is of a sample of the rows.

    Args:
        layers: The layers by name.
        max_rows: Most rows of a layer that the effective rank is of, on this rank.
        micro_batches: Micro-batches that share them.
    """

    def __init__(
        self, layers: Mapping[str, nn.Module], *, max_rows: int, micro_batches: int = 1
    ) -> None:
        self._limit = max(max_rows, 1)
        self._quota = max(max_rows // micro_batches, 1)
        self._layers = dict(layers)
        self._parts = {
            (name, side): _Part(size)
            for name, layer in layers.items()
            for side, size in zip(SIDES, _sizes(layer), strict=True)
            if size
        }

    @torch.no_grad()
    def add(self, name: str, activation: Tensor, output_grad: Tensor, factor: float) -> None:
        """Add one call of a layer.

        Args:
            name: Name of the layer.
            activation: What went in.
            output_grad: Gradient of what came out.
            factor: What to multiply the gradient with.
        """
        layer = self._layers[name]
        if (name, "activation") in self._parts and activation.is_floating_point():
            part = self._parts[name, "activation"]
            part.add(_by_features(layer, activation), 1.0, self._quota)
        self._parts[name, "output_grad"].add(_by_features(layer, output_grad), factor, self._quota)

    def packed(self, like: Tensor) -> Tensor:
        """Return everything as one flat tensor, as long on every rank.

        Args:
            like: A tensor with dtype and device of the result.
        """
        sizes = [self._length(part) for part in self._parts.values()]
        packed = like.new_zeros(sum(sizes))
        for part, out in zip(self._parts.values(), torch.split(packed, sizes), strict=True):
            part.pack_into(out, self._limit)
        return packed

    def _length(self, part: _Part) -> int:
        return _HEAD + part.size * (1 + self._limit)

    @torch.no_grad()
    def statistics(self, gathered: Tensor) -> dict[str, dict[str, float]]:
        """Return the statistics, read from the device in one transfer.

        Args:
            gathered: What `packed` returned on every rank, ``[ranks, length]``.

        Returns:
            Values by ``<side>_<statistic>`` and layer. A layer that did not run is not there.
        """
        sizes = [self._length(part) for part in self._parts.values()]
        parts = torch.split(gathered, sizes, dim=1)
        rows = [
            _summary(part, one.size) for part, one in zip(parts, self._parts.values(), strict=True)
        ]
        values: dict[str, dict[str, float]] = {
            f"{side}_{statistic}": {} for side in SIDES for statistic in STATISTICS
        }
        read = torch.stack(rows).tolist() if rows else []
        for (name, side), (count, *found) in zip(self._parts, read, strict=True):
            for statistic, value in zip(STATISTICS, found if count else [], strict=False):
                values[f"{side}_{statistic}"][name] = value
        return values


def _summary(part: Tensor, size: int) -> Tensor:
    """Return the number of rows and the statistics, from the parts of all ranks."""
    counts, means, deviations, zeros = part[:, :_HEAD].unbind(1)
    alive = part[:, _HEAD : _HEAD + size].amax(0)
    rows = part[:, _HEAD + size :].reshape(-1, size)
    count = counts.sum()
    safe = count.clamp_min(1.0)
    mean = (counts * means).sum() / safe
    variance = (deviations.sum() / size + (counts * (means - mean).square()).sum()) / safe
    statistics: Sequence[Tensor] = (
        count,
        mean,
        variance.sqrt(),
        zeros.sum() / (safe * size),
        1 - alive.mean(),
        (size * (variance + mean.square())).sqrt(),
        effective_rank(rows),
    )
    return torch.stack(list(statistics))
