"""Layers seen through two diagonals: of what goes in, and of the gradients that come back.

The Fisher matrix of a layer with inputs x (one more, constant 1, for the bias) and output gradients
s is approximated by a Kronecker product, and of its two factors only the diagonals are kept,

    F_ij ~ S_i H_j,    H_j = mean of x_j^2,    S_i = mean of s_i^2,

over all rows: examples, tokens, positions of an image, one pixel of the output each. This is exact
where the squares of x and s are independent. Layouts, with a bias as last entry of H:

    kind        H                          S                        weight
    linear      [d_in (+1)]                [d_out]                  S_i H_j
    conv        [groups, patch (+1)]       [groups, d_out/groups]   S_gi H_gj, per group
    embedding   [num_embeddings]           [dim]                    H_i S_j, H_i how often i came up
    norm        [channels (+1)]            [channels]               S_c H_c, x after normalization

A convolution of one group has no first axis. `reference_factors` are those of arXiv:2405.16397 as
its authors compute them, with H of two entries for normalization layers.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_curvature.curvature.scales import at_least_float32, normalized

__all__ = [
    "REFERENCE_LAYERS",
    "Factors",
    "Moments",
    "bias_diagonal",
    "factor_shapes",
    "layer_inner",
    "layer_kind",
    "layer_mean",
    "layer_moments",
    "min_max",
    "reference_factors",
    "weight_factors",
]

# What the authors' code of AdaFisher knows.
REFERENCE_LAYERS: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Conv2d,
    nn.BatchNorm2d,
    nn.LayerNorm,
)


class Factors(NamedTuple):
    """The two diagonals of a layer; see the head of this file.

    Attributes:
        input: H.
        output: S.
    """

    input: Tensor
    output: Tensor


class Moments(NamedTuple):
    """Sums over rows; those of several calls, batches or ranks can be added.

    Attributes:
        input: Sum of the squares of the inputs, in the layout of H.
        output: Sum of the squares of the output gradients, in the layout of S.
        rows: Number of rows, a 0-dim tensor.
    """

    input: Tensor
    output: Tensor
    rows: Tensor


def layer_kind(layer: nn.Module) -> str:
    """Return the kind of a supported layer: "linear", "conv", "embedding" or "norm"."""
    if isinstance(layer, nn.Linear):
        return "linear"
    if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        return "conv"
    return "embedding" if isinstance(layer, nn.Embedding) else "norm"


def factor_shapes(layer: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of H and S of a supported layer with parameters."""
    bias = int(getattr(layer, "bias", None) is not None)
    if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        patch = layer.in_channels // layer.groups * math.prod(layer.kernel_size) + bias
        if layer.groups == 1:
            return (patch,), (layer.out_channels,)
        return (layer.groups, patch), (layer.groups, layer.out_channels // layer.groups)
    if isinstance(layer, nn.Linear):
        return (layer.in_features + bias,), (layer.out_features,)
    if isinstance(layer, nn.Embedding):
        return (layer.num_embeddings,), (layer.embedding_dim,)
    channels = math.prod(_normalized_shape(layer))
    return (channels + bias,), (channels,)


def _normalized_shape(layer: nn.Module) -> tuple[int, ...]:
    if isinstance(layer, nn.LayerNorm):
        return tuple(layer.normalized_shape)
    if isinstance(layer, nn.GroupNorm):
        return (layer.num_channels,)
    assert isinstance(layer, _BatchNorm)
    return (layer.num_features,)


# Sums over rows


@torch.no_grad()
def layer_moments(layer: nn.Module, given: Tensor, grad: Tensor) -> Moments:
    """Return the sums over the rows of one call, in at least float32.

    Args:
        layer: A supported layer.
        given: Its input.
        grad: The gradient of its output.
    """
    grad = at_least_float32(grad)
    if isinstance(layer, nn.Embedding):
        return _embedding_moments(layer, given, grad)
    given = at_least_float32(given).to(grad.dtype)
    if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        squares, output, rows = _conv_moments(layer, given, grad)
    else:
        if not isinstance(layer, nn.Linear):
            given, grad = normalized(layer, given, grad)
        grad = grad.reshape(-1, grad.shape[-1])
        squares = given.reshape(-1, given.shape[-1]).square().sum(0)
        output, rows = grad.square().sum(0), len(grad)
    count = torch.full((), float(rows), dtype=grad.dtype, device=grad.device)
    if layer.bias is not None:
        squares = torch.cat([squares, count.expand(*squares.shape[:-1], 1)], dim=-1)
    return Moments(squares, output, count)


def _embedding_moments(layer: nn.Embedding, given: Tensor, grad: Tensor) -> Moments:
    indices, grad = given.reshape(-1), grad.reshape(-1, grad.shape[-1])
    present = torch.ones_like(indices, dtype=grad.dtype)
    if layer.padding_idx is not None:
        present = (indices != layer.padding_idx).to(grad.dtype)
    counts = grad.new_zeros(layer.num_embeddings).index_add_(0, indices, present)
    return Moments(counts, (grad.square() * present[:, None]).sum(0), present.sum())


def _conv_moments(
    layer: nn.Conv1d | nn.Conv2d, given: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, int]:
    """Return the sums of squares over examples and positions, and the number of those."""
    if given.ndim == len(layer.kernel_size) + 1:
        given, grad = given.unsqueeze(0), grad.unsqueeze(0)
    rows = grad.numel() // grad.shape[1]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(given, layer._reversed_padding_repeated_twice, mode=mode)
    # Every example is cut into the same patches, so their sum is cut instead of each.
    squares = _patch_sums(padded.square().sum(0), layer)
    output = grad.square().flatten(2).sum((0, 2))
    if layer.groups > 1:
        squares, output = squares.view(layer.groups, -1), output.view(layer.groups, -1)
    return squares, output, rows


def _patch_sums(image: Tensor, layer: nn.Conv1d | nn.Conv2d) -> Tensor:
    """Return the sum over positions of every entry of a patch of ``[channels, *size]``."""
    if len(layer.kernel_size) == 1:
        kernel, stride, dilation = (
            (1, *pair) for pair in (layer.kernel_size, layer.stride, layer.dilation)
        )
        image = image.unsqueeze(1)
    else:
        kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    patches = F.unfold(image.unsqueeze(0), kernel, dilation=dilation, stride=stride)
    return patches.sum((0, 2))


# The diagonal of the Fisher matrix


def weight_factors(kind: str, factors: Factors, *, has_bias: bool) -> tuple[Tensor, Tensor]:
    """Return rows R and columns C: the weight's diagonal is ``R[..., :, None] * C[..., None, :]``.

    The product has as many entries as the weight, in its order.

    Args:
        kind: What `layer_kind` returned.
        factors: The factors.
        has_bias: Whether H has an entry for the bias.
    """
    if kind == "embedding":
        return factors.input, factors.output
    columns = factors.input[..., :-1] if has_bias else factors.input
    if kind == "norm":
        return factors.output * columns, columns.new_ones(1)
    return factors.output, columns


def bias_diagonal(factors: Factors) -> Tensor:
    """Return the diagonal of the bias, flat.

    Args:
        factors: Factors of a layer with a bias.
    """
    return (factors.output * factors.input[..., -1:]).flatten()


def layer_inner(kind: str, one: Factors, other: Factors, *, has_bias: bool) -> Tensor:
    """Return the inner product of two diagonals of a layer, bias included, without forming them.

    Args:
        kind: What `layer_kind` returned.
        one: Factors.
        other: Factors of the same layer.
        has_bias: Whether H has an entry for the bias.
    """
    if kind != "norm":
        inputs, outputs = (one.input * other.input).sum(-1), (one.output * other.output).sum(-1)
        return (inputs * outputs).sum()
    (a, _), (b, _) = (weight_factors(kind, f, has_bias=has_bias) for f in (one, other))
    total = (a * b).sum()
    return total + (bias_diagonal(one) * bias_diagonal(other)).sum() if has_bias else total


def layer_mean(kind: str, factors: Factors, *, has_bias: bool) -> Tensor:
    """Return the mean of the diagonal of a layer, bias included.

    Args:
        kind: What `layer_kind` returned.
        factors: The factors.
        has_bias: Whether H has an entry for the bias.
    """
    if kind != "norm":
        return (factors.input.mean(-1) * factors.output.mean(-1)).mean()
    rows, _ = weight_factors(kind, factors, has_bias=has_bias)
    return torch.cat([rows, bias_diagonal(factors)]).mean() if has_bias else rows.mean()


def min_max(values: Tensor, eps: float | None = None) -> Tensor:
    """Map the values of each row, along the last axis, to [0, 1].

    Args:
        values: Vector, or vectors.
        eps: Added to the range, as in the authors' code: values that lie closer together than this
            all vanish. None for a division by the range itself; values without one become 1.
    """
    if eps is not None:
        # NaN stays: whoever averages these must see it.
        values = torch.where(values.isinf(), (values > 0).to(values.dtype), values)
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    if eps is not None:
        return (values - low) / (high - low + eps)
    spread = high - low
    return torch.where(spread > 0, (values - low) / spread, torch.ones_like(values))


# The authors' formulas


@torch.no_grad()
def reference_factors(layer: nn.Module, given: Tensor, grad: Tensor) -> Factors:
    """Return H and S of one call as the authors' code computes them, before normalization.

    Artefacts included: a convolution divides H by the size of a patch once more, groups are pooled,
    dilation is ignored; the entries of normalization layers, of which H has two (scale and shift),
    are squares of sums over examples instead of sums of squares.

    Args:
        layer: One of `REFERENCE_LAYERS`.
        given: Its input.
        grad: The gradient of its output.
    """
    given, grad = at_least_float32(given), at_least_float32(grad)
    if isinstance(layer, nn.Linear):
        given, grad = given.reshape(-1, given.shape[-1]), grad.reshape(-1, grad.shape[-1])
        squares = given.square().mean(0)
        if layer.bias is not None:
            squares = torch.cat([squares, squares.new_ones(1)])
        return Factors(squares, grad.square().mean(0))
    if isinstance(layer, nn.Conv2d):
        return _reference_conv(layer, given, grad)
    examples = len(given)
    if isinstance(layer, nn.BatchNorm2d):
        summed = given.sum((0, 2, 3)) / math.prod(given.shape[2:]) ** 2
        total = grad.sum((0, 2, 3))
    else:
        axes = [axis for axis in range(given.ndim) if axis != 1]
        count = math.prod(given.shape[axis] for axis in axes[1:])
        summed = given.sum(axes) / count**2
        total = grad.sum(tuple(range(grad.ndim - 1)))
        total = total.expand(_normalized_shape(layer)).flatten()
    scale = summed.square().sum()
    entries = torch.stack([scale, torch.full_like(scale, len(summed))]) / examples**2
    return Factors(entries, total.square() / examples)


def _reference_conv(layer: nn.Conv2d, given: Tensor, grad: Tensor) -> Factors:
    if given.ndim == len(layer.kernel_size) + 1:
        given, grad = given.unsqueeze(0), grad.unsqueeze(0)
    padded = F.pad(given, layer._reversed_padding_repeated_twice)
    patches = F.unfold(padded.square().sum(0, keepdim=True), layer.kernel_size, stride=layer.stride)
    size = patches.shape[1] // layer.groups
    squares = patches.view(layer.groups, size, -1).sum((0, 2))
    squares = squares / (len(given) * layer.groups * patches.shape[-1] * size)
    if layer.bias is not None:
        squares = torch.cat([squares, squares.new_full((1,), 1 / size)])
    return Factors(squares, grad.square().sum((0, 2, 3)) * (grad.shape[1] / grad.numel()))
