r"""What one micro-batch says about a block: sums over the rows of its calls.

With the gradients dy that roots of the losses' curvature leave at the outputs of a layer (every
weight of the loss is inside of them), and w the weights of the examples,

    G = sum dy dy^T,    A = sum w x x^T,    M = sum w        over rows: examples and positions,

the block of the layer is approximately (A / M) (x) G (Martens and Grosse, arXiv:1503.05671; Grosse
and Martens, arXiv:1602.01407; Eschenhagen et al., arXiv:2311.00636). M is the number of positions
per example of a mean loss. All three add up over calls, micro-batches and ranks.

Where a loss leaves examples out their weight is 0. Where it leaves positions out, or has other
examples than the layer, rows without any gradient are left out of A and M.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_curvature.curvature.gram import gram
from lightning_curvature.curvature.kronecker_blocks import BlockInfo, Side
from lightning_curvature.curvature.layer_rows import (
    KfacApprox,
    Rows,
    embedding_counts,
    layer_rows,
)
from lightning_curvature.curvature.layer_tape import LayerCall

__all__ = ["Basis", "BlockSums", "ExampleWeights", "block_sums", "joined", "rotated", "split"]

# Entries of the per-example gradients of a layer that are there at the same time.
_MAX_GRADIENTS = 1 << 24


class ExampleWeights(NamedTuple):
    """Weights of the examples of a micro-batch.

    Attributes:
        each: One per example, None if the losses do not agree on what an example is, or all are
            alike.
        total: Their sum, a 0-dim tensor.
        masked: Boolean 0-dim tensor: whether anything has weight 0. None for certainly not.
        by_position: Whether positions within an example have weights of their own.
    """

    each: Tensor | None
    total: Tensor
    masked: Tensor | None
    by_position: bool = False

    @classmethod
    def of(cls, weights: Sequence[Tensor]) -> "ExampleWeights":
        """Summarize the weights of examples (and positions) in each loss."""
        summed = [w.flatten(1).sum(1) if w.dim() > 1 else w.reshape(-1) for w in weights]
        total = torch.stack([w.sum() for w in summed]).sum()
        masked = torch.stack([(w == 0).any() for w in weights]).any()
        each = None
        if all(len(w) == len(summed[0]) for w in summed):
            each = torch.stack(summed).sum(0)
        # Where looking costs nothing.
        if total.device.type == "cpu" and not masked:
            return cls(None if each is None or _is_even(each) else each, total, None)
        return cls(each, total, masked, any(w.dim() > 1 for w in weights))

    def hide_rows(self, examples: int) -> bool:
        """Tell whether rows may be left out that the weights of examples do not tell."""
        known = self.each is not None and len(self.each) == examples and not self.by_position
        return self.masked is not None and not known

    def of_rows(self, examples: int, rows: Rows) -> Tensor | None:
        """Return the weights of rows, None if all have ``total / examples``."""
        if self.each is None or len(self.each) != examples:
            return None
        positions = rows.outputs.shape[1] // rows.count
        part = self.each[rows.first : rows.first + rows.count]
        return part.repeat_interleave(positions) if positions > 1 else part


def _is_even(weights: Tensor) -> bool:
    return bool((weights == weights[:1]).all())


class Basis(NamedTuple):
    """Eigenvectors of the two factors, ``[groups, cuts, width, width]``; None for the identity."""

    input: Tensor | None
    output: Tensor | None


class BlockSums(NamedTuple):
    """Sums over rows; those of calls, micro-batches and ranks can be added.

    Attributes:
        a_sum: Sum of w x x^T, ``[groups, cuts, width, width]``.
        g_sum: Sum of dy dy^T, likewise.
        positions: Sum of w, a 0-dim tensor.
        squares: Sum over examples of the squared gradient in a `Basis`, ``[groups, output,
            input]`` with sides filled up; None if there is no basis.
    """

    a_sum: Tensor
    g_sum: Tensor
    positions: Tensor
    squares: Tensor | None

    def plus(self, other: "BlockSums") -> "BlockSums":
        """Return the sum."""
        return BlockSums(
            self.a_sum + other.a_sum,
            self.g_sum + other.g_sum,
            self.positions + other.positions,
            self.squares if other.squares is None else _added(self.squares, other.squares),
        )

    def times(self, factor: float | Tensor) -> "BlockSums":
        """Return a multiple."""
        return BlockSums(
            self.a_sum * factor,
            self.g_sum * factor,
            self.positions * factor,
            None if self.squares is None else self.squares * factor,
        )


def _added(one: Tensor | None, other: Tensor) -> Tensor:
    return other if one is None else one + other


def split(x: Tensor, side: Side) -> Tensor:
    """Cut the last axis of ``[groups, rows, size]`` as a side is: ``[groups, cuts, rows, width]``.

    The last part is filled up with zeros.
    """
    missing = side.cuts * side.width - side.size
    if missing:
        x = torch.nn.functional.pad(x, (0, missing))
    return x.reshape(*x.shape[:-1], side.cuts, side.width).movedim(-2, 1)


def joined(x: Tensor, side: Side) -> Tensor:
    """Undo `split`: ``[groups, cuts, rows, width]`` to ``[groups, rows, size]``."""
    return x.movedim(1, -2).flatten(-2)[..., : side.size]


@torch.no_grad()
def block_sums(
    info: BlockInfo,
    call: LayerCall,
    gradients: Sequence[Tensor],
    weights: ExampleWeights,
    *,
    kfac_approx: KfacApprox = "expand",
    basis: Basis | None = None,
    factor_dtype: torch.dtype | None = None,
) -> BlockSums:
    """Return the sums over one call of a layer.

    Args:
        info: The block of the layer.
        call: The call.
        gradients: Gradients of the output, one per root.
        weights: Weights of the examples.
        kfac_approx: "expand" takes every position for an example of its own, "reduce" takes the
            mean input and the summed gradient over the positions of an example.
        basis: Where to sum squared gradients, None for nowhere.
        factor_dtype: Precision of the products, None for that of the rows.
    """
    given = call.given.movedim(call.batch_axis, 0)
    grads = [grad.movedim(call.batch_axis, 0) for grad in gradients]
    examples = len(given)
    sums: BlockSums | None = None
    for number, grad in enumerate(grads):
        # Of several roots each may reach other rows.
        signal = _signal(grads) if number == 0 and weights.hide_rows(examples) else grad
        chunks = layer_rows(
            info.layer, given, grad, has_bias=info.bias is not None, kfac_approx=kfac_approx
        )
        signals: Iterator[Rows | None] = iter(())
        if signal is not grad:
            signals = iter(
                layer_rows(
                    info.layer,
                    given,
                    signal,
                    has_bias=info.bias is not None,
                    kfac_approx=kfac_approx,
                )
            )
        for rows in chunks:
            marks = next(signals, None) or rows
            inputs = None
            if number == 0:
                inputs = _input_sums(info, rows, marks.outputs, examples, weights, factor_dtype)
            part = _sums(info, rows, inputs, basis, factor_dtype)
            sums = part if sums is None else sums.plus(part)
    assert sums is not None
    return sums


def _signal(grads: Sequence[Tensor]) -> Tensor:
    """Return what is zero where all gradients are."""
    return grads[0] if len(grads) == 1 else torch.stack([g.abs() for g in grads]).sum(0)


def _input_sums(
    info: BlockInfo,
    rows: Rows,
    marks: Tensor,
    examples: int,
    weights: ExampleWeights,
    factor_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """Return A and M of some rows."""
    dtype = rows.outputs.dtype
    count = rows.outputs.shape[1]
    each = weights.of_rows(examples, rows)
    even = (weights.total / max(examples, 1)).to(dtype)
    if weights.hide_rows(examples):
        assert weights.masked is not None
        present = (marks != 0).any(-1).any(0) | ~weights.masked
        if each is None:
            each = present.to(dtype) * even
        else:
            each = _spread(present, rows.count, dtype) * each.to(dtype)
    if info.is_embedding:
        each = even.expand(count) if each is None else each.to(dtype)
        assert isinstance(info.layer, nn.Embedding)
        counts = embedding_counts(info.layer, rows.inputs[0], each)
        # The padding index counts in neither.
        return counts.view(1, info.input.size, 1, 1).to(dtype), counts.sum().to(dtype)
    inputs = rows.inputs
    if each is not None:
        each = each.to(dtype)
        inputs = inputs * each.sqrt()[:, None]
    total = _grams(inputs, info.input, factor_dtype)
    return (total * even, even * count) if each is None else (total, each.sum())


def _spread(present: Tensor, examples: int, dtype: torch.dtype) -> Tensor:
    """Give what rows weigh that are left out to the others of the same example."""
    marks = present.view(examples, -1).to(dtype)
    return (marks * (marks.shape[1] / marks.sum(1, keepdim=True).clamp_min(1))).flatten()


def _grams(x: Tensor, side: Side, dtype: torch.dtype | None) -> Tensor:
    """Return the products of the columns of ``[groups, rows, size]`` as far as they are kept."""
    if side.kind == "diagonal":
        return x.square().sum(1)[..., None, None]
    if dtype is not None and dtype != x.dtype:
        # Where factors are kept in low precision anyway, products in it are much faster.
        return _grams(x.to(dtype), side, None).to(x.dtype)
    parts = split(x, side)
    groups, cuts, rows, width = parts.shape
    return gram(parts.reshape(groups * cuts, rows, width)).view(groups, cuts, width, width)


def _sums(
    info: BlockInfo,
    rows: Rows,
    inputs: tuple[Tensor, Tensor] | None,
    basis: Basis | None,
    factor_dtype: torch.dtype | None,
) -> BlockSums:
    outputs = rows.outputs
    if inputs is None:
        side = info.input
        a_sum = outputs.new_zeros(info.groups, side.cuts, side.width, side.width)
        inputs = a_sum, outputs.new_zeros(())
    squares = None if basis is None else _squares(info, rows, basis)
    return BlockSums(inputs[0], _grams(outputs, info.output, factor_dtype), inputs[1], squares)


def rotated(x: Tensor, side: Side, vectors: Tensor | None) -> Tensor:
    """Return the rows of ``[groups, rows, size]`` in the basis of a side, filled up with zeros."""
    if vectors is None:
        return x
    if side.cuts == 1:
        return (x.to(vectors.dtype) @ vectors[:, 0]).to(x.dtype)
    return (split(x, side) @ vectors.to(x.dtype)).movedim(1, -2).flatten(-2)


def _squares(info: BlockInfo, rows: Rows, basis: Basis) -> Tensor:
    """Return the sum over examples of the squared gradient in a basis."""
    y = rotated(rows.outputs, info.output, basis.output)
    if info.is_embedding:
        # Every position for itself: an example that has a word twice counts both.
        total = y.new_zeros(info.input.size, y.shape[-1])
        total.index_add_(0, rows.inputs.reshape(-1), y[0].square())
        return total.T[None]
    x = rotated(rows.inputs, info.input, basis.input)
    positions = y.shape[1] // max(rows.count, 1)
    if positions <= 1:
        return y.square().mT @ x.square()
    y = y.reshape(len(y), rows.count, positions, -1)
    x = x.reshape(len(x), rows.count, positions, -1)
    total = y.new_zeros(info.groups, y.shape[-1], x.shape[-1])
    # Few positions: sum_st (y_s y_t)(x_s x_t), all pairs. Else the gradients themselves.
    pairs = positions**2 * (info.output.size + info.input.size)
    in_pairs = pairs < info.output.size * info.input.size
    entries = info.groups * min(pairs, info.output.size * info.input.size)
    step = max(1, _MAX_GRADIENTS // max(entries, 1))
    for start in range(0, rows.count, step):
        ys, xs = y[:, start : start + step], x[:, start : start + step]
        if in_pairs:
            yy = (ys[:, :, :, None] * ys[:, :, None]).flatten(1, 3)
            xx = (xs[:, :, :, None] * xs[:, :, None]).flatten(1, 3)
            # A square, but for rounding.
            total += (yy.mT @ xx).clamp_min_(0.0)
        else:
            total += (ys.mT @ xs).square_().sum(1)
    return total
