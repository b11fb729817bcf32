"""Layers as rows: pairs of an input and an output gradient whose products make up a gradient.

The parameters of a layer are seen as one matrix per group, ``[groups, d_out, d_in (+1)]``, the bias
its last column. Every example, and every position within it (token, pixel), then has an input row x
with a last 1 for the bias, and a row s of output gradients, such that

    gradient of the matrix = sum over rows of s x^T.

    kind          d_out                   d_in                    positions
    linear        outputs                 inputs                  axes in between
    convolution   channels per group      channels * kernel       pixels of the output
    transposed    channels * kernel       channels per group      pixels of the input
    embedding     size of an embedding    number of embeddings    indices

A transposed convolution has no column for its bias, because the patches of its output overlap:
every row would have to share it out. `shift_squares` is for that bias, `scale_squares` for
layers that scale and shift. The first axis of an input is that of the examples, if it has one.
"""

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from lightning_curvature.checks import check_choice, check_count
from lightning_curvature.curvature.patches import (
    CONVOLUTIONS,
    TRANSPOSED,
    input_patches,
    output_patches,
)
from lightning_curvature.curvature.scales import (
    SCALE_LAYERS,
    at_least_float32,
    scale_squares,
    shift_squares,
    unknown_layer,
)

__all__ = [
    "KRONECKER_LAYERS",
    "SCALE_LAYERS",
    "KfacApprox",
    "Rows",
    "embedding_counts",
    "from_matrix",
    "layer_rows",
    "matrix_shape",
    "scale_squares",
    "shift_squares",
    "to_matrix",
]

KfacApprox = Literal["expand", "reduce"]

KRONECKER_LAYERS: tuple[type[nn.Module], ...] = (
    nn.Linear,
    *CONVOLUTIONS,
    *TRANSPOSED,
    nn.Embedding,
)


class Rows(NamedTuple):
    """Rows of some examples, in order: all positions of the first one, then those of the next.

    Attributes:
        inputs: x, ``[groups, rows, d_in (+1)]``; of an embedding the indices, ``[1, rows]``.
        outputs: s, ``[groups, rows, d_out]``.
        first: Number of the first of these examples.
        count: How many examples they belong to.
    """

    inputs: Tensor
    outputs: Tensor
    first: int
    count: int  # type: ignore[assignment]


# Parameters as a matrix


def matrix_shape(layer: nn.Module) -> tuple[int, int, int]:
    """Return the number of groups, d_out and d_in, the bias not counted.

    Args:
        layer: One of `KRONECKER_LAYERS`.

    Raises:
        TypeError: If it is another layer.

    Examples:
        >>> matrix_shape(nn.Conv2d(4, 6, 3, groups=2))
        (2, 3, 18)
    """
    if isinstance(layer, nn.Linear):
        return 1, layer.out_features, layer.in_features
    if isinstance(layer, nn.Embedding):
        return 1, layer.embedding_dim, layer.num_embeddings
    if isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED)):
        groups, patch = layer.groups, math.prod(layer.kernel_size)
        given, output = layer.in_channels // groups, layer.out_channels // groups
        if isinstance(layer, TRANSPOSED):
            return groups, output * patch, given
        return groups, output, given * patch
    raise unknown_layer(layer, KRONECKER_LAYERS)


def _check_bias(layer: nn.Module, has_bias: bool) -> None:
    if not has_bias or isinstance(layer, (nn.Linear, *CONVOLUTIONS)):
        return
    hint = " Use shift_squares for its bias." if isinstance(layer, TRANSPOSED) else ""
    raise ValueError(
        f"Invalid bias: the matrix of a layer of type {type(layer).__name__} has no column for it."
        + hint
    )


def to_matrix(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the matrix of parameters, or of anything that has their shapes.

    Args:
        layer: One of `KRONECKER_LAYERS`.
        weight: Tensor of the shape of its weight.
        bias: Tensor of the shape of its bias. None without one, and for transposed convolutions.

    Returns:
        ``[groups, d_out, d_in (+1)]``, a view of ``weight`` where that is possible.

    Raises:
        TypeError: If the layer is none of these.
        ValueError: If a bias is given that has no place in the matrix.
    """
    groups, output, given = matrix_shape(layer)
    _check_bias(layer, bias is not None)
    weight = weight.to_dense() if weight.is_sparse else weight
    if isinstance(layer, (nn.Embedding, *TRANSPOSED)):
        return weight.reshape(groups, given, output).mT
    weight = weight.reshape(groups, output, given)
    return weight if bias is None else torch.cat([weight, bias.reshape(groups, output, 1)], dim=-1)


def from_matrix(
    layer: nn.Module, matrix: Tensor, *, has_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """Return what `to_matrix` was given: tensors of the shapes of weight and bias.

    Args:
        layer: One of `KRONECKER_LAYERS`.
        matrix: ``[groups, d_out, d_in (+1)]``.
        has_bias: Whether the last column is a bias.

    Raises:
        TypeError: If the layer is none of these.
        ValueError: If the matrix of this layer has no column for a bias.
    """
    groups, output, _ = matrix_shape(layer)
    _check_bias(layer, has_bias)
    if isinstance(layer, nn.Embedding):
        return matrix[0].mT, None
    shape: tuple[int, ...]
    if isinstance(layer, nn.Linear):
        shape = (layer.out_features, layer.in_features)
    else:
        assert isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED))
        channels = (layer.out_channels, layer.in_channels // groups)
        if isinstance(layer, TRANSPOSED):
            channels = (layer.in_channels, layer.out_channels // groups)
            matrix = matrix.mT
        shape = (*channels, *layer.kernel_size)
    if not has_bias:
        return matrix.reshape(shape), None
    return matrix[..., :-1].reshape(shape), matrix[..., -1].reshape(groups * output)


# Rows


def layer_rows(
    layer: nn.Module,
    given: Tensor,
    grad: Tensor,
    *,
    has_bias: bool,
    kfac_approx: KfacApprox = "expand",
    max_entries: int = 1 << 25,
) -> Iterator[Rows]:
    """Return the rows of one call of a layer, some examples at a time, in at least float32.

    With ``kfac_approx="reduce"`` an example has one row, of the mean input and the summed output
    gradient of its positions (arXiv:2311.00636): their product is the example's gradient only where
    all its inputs, or all its output gradients, are the same. Embeddings are always expanded; the
    rows of a padding index are zero.

    Args:
        layer: One of `KRONECKER_LAYERS`.
        given: Its input.
        grad: The gradient of its output.
        has_bias: Whether inputs have a last entry, 1, for the bias.
        kfac_approx: How positions are treated: a row each, or one row for all of an example.
        max_entries: How many entries of patches are copied at a time, at least those of one
            example. Layers without patches come in one piece.

    Raises:
        TypeError: If the layer is none of these.
        ValueError: If an argument is out of range, or the matrix has no column for a bias.
    """
    _, output, inputs = matrix_shape(layer)
    _check_bias(layer, has_bias)
    check_choice("kfac_approx", kfac_approx, get_args(KfacApprox))
    check_count("max_entries", max_entries)
    grad = at_least_float32(grad.detach())
    if isinstance(layer, nn.Embedding):
        return iter([_embedding_rows(layer, given, grad)])
    given = given.detach().to(grad.dtype)
    reduce = kfac_approx == "reduce"
    if isinstance(layer, nn.Linear):
        given, grad = (x[None] if x.ndim == 1 else x for x in (given, grad))
        axes = given.ndim - 2
        return iter([_rows(given[None], grad[None], 0, axes, has_bias=has_bias, reduce=reduce)])
    assert isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED))
    axes = len(layer.kernel_size)
    if given.ndim == axes + 1:
        given, grad = given[None], grad[None]
    if isinstance(layer, TRANSPOSED):
        per_example = given[:1, 0].numel() * layer.groups * output
    else:
        per_example = grad[:1, 0].numel() * layer.groups * (inputs + has_bias)
    chunk = max(1, max_entries // max(1, per_example))
    return _conv_rows(layer, given, grad, chunk, has_bias=has_bias, reduce=reduce)


def _embedding_rows(layer: nn.Embedding, given: Tensor, grad: Tensor) -> Rows:
    indices, grad = given.reshape(1, -1), grad.reshape(1, -1, grad.shape[-1])
    if layer.padding_idx is not None:
        grad = grad.masked_fill((indices == layer.padding_idx)[..., None], 0.0)
    return Rows(indices, grad, 0, len(given) if given.ndim else 1)


def _conv_rows(
    layer: nn.Module, given: Tensor, grad: Tensor, chunk: int, *, has_bias: bool, reduce: bool
) -> Iterator[Rows]:
    groups, _, _ = matrix_shape(layer)
    # An empty batch has rows too: none of them, of the right width.
    for first in range(0, max(1, len(given)), chunk):
        x, dy = given[first : first + chunk], grad[first : first + chunk]
        if isinstance(layer, TRANSPOSED):
            dy = output_patches(layer, dy, x.shape[2:])
            x = _pixels(x, groups)
        else:
            assert isinstance(layer, CONVOLUTIONS)
            x = input_patches(layer, x)
            dy = _pixels(dy, groups)
        yield _rows(x, dy, first, given.ndim - 2, has_bias=has_bias, reduce=reduce)


def _pixels(image: Tensor, groups: int) -> Tensor:
    """Return ``[groups, n, *positions, channels per group]`` of an image."""
    n, channels, *size = image.shape
    image = image.reshape(n, groups, channels // groups, *size)
    return image.movedim(1, 0).movedim(2, -1)


def _rows(x: Tensor, dy: Tensor, first: int, axes: int, *, has_bias: bool, reduce: bool) -> Rows:
    """Return rows of ``[groups, n, *positions, *entries]``, positions along so many axes."""
    if reduce and axes:
        positions = tuple(range(2, 2 + axes))
        x, dy, axes = x.mean(positions), dy.sum(positions), 0
    groups, count = x.shape[:2]
    rows = count * math.prod(x.shape[2 : 2 + axes])
    width = math.prod(x.shape[2 + axes :])
    dy = dy.reshape(groups, rows, math.prod(dy.shape[2 + axes :]))
    if not has_bias:
        return Rows(x.reshape(groups, rows, width), dy, first, count)
    # Patches are copied once, into their place beside the bias.
    inputs = x.new_empty(groups, rows, width + 1)
    inputs[..., :width].view(x.shape).copy_(x)
    inputs[..., width] = 1.0
    return Rows(inputs, dy, first, count)


def embedding_counts(layer: nn.Embedding, given: Tensor, row_weights: Tensor) -> Tensor:
    """Return the diagonal of the input factor of an embedding: weighted counts of its indices.

    The inputs are one-hot vectors, so the factor has no other entries. The padding index, which has
    no gradient, is not counted.

    Args:
        layer: The embedding.
        given: Its input.
        row_weights: Weights of the examples, ``[n]``, or of any number of leading axes of
            ``given``.

    Returns:
        ``[1, num_embeddings]``, in at least float32.
    """
    weights = at_least_float32(row_weights.detach())
    # A single index is one example.
    given = given if given.ndim else given[None]
    weights = weights.reshape(*weights.shape, *[1] * (given.ndim - weights.ndim))
    weights = weights.expand(given.shape)
    if layer.padding_idx is not None:
        weights = weights.masked_fill(given == layer.padding_idx, 0.0)
    counts = weights.new_zeros(layer.num_embeddings)
    return counts.index_add_(0, given.reshape(-1), weights.reshape(-1))[None]
