"""Tests of lightning_curvature/curvature/kronecker_sums.py: factors of single calls, by hand."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_curvature.curvature import kronecker_sums
from lightning_curvature.curvature.kronecker_blocks import BlockInfo, Side, find_blocks
from lightning_curvature.curvature.kronecker_sums import (
    Basis,
    BlockSums,
    ExampleWeights,
    block_sums,
    joined,
    rotated,
    split,
)
from lightning_curvature.curvature.layer_rows import layer_rows
from lightning_curvature.curvature.layer_tape import LayerCall

EXACT = {"rtol": 1e-11, "atol": 1e-12}


def info_of(layer: nn.Module, limit: int = 100) -> BlockInfo:
    """Return the block of a layer."""
    return find_blocks(layer, list(layer.parameters()), max_factor_dim=limit).blocks[""]


def call_of(x: Tensor, batch_axis: int = 0) -> LayerCall:
    """Return a call with an input; its place in the graph is not needed here."""
    return LayerCall("", x, 0, None, batch_axis)  # type: ignore[arg-type]


def sums(
    layer: nn.Module, x: Tensor, grads: list[Tensor], weights: list[Tensor], **options: Any
) -> BlockSums:
    """Return the sums of one call."""
    info = info_of(layer, options.pop("limit", 100))
    call = call_of(x, options.pop("batch_axis", 0))
    return block_sums(info, call, grads, ExampleWeights.of(weights), **options)


def draw(*shape: int) -> Tensor:
    """Draw normal numbers."""
    return torch.randn(shape, dtype=torch.float64)


def with_one(x: Tensor) -> Tensor:
    """Append the input of the bias."""
    return torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)


def positive(*shape: int) -> Tensor:
    """Draw weights."""
    return torch.rand(shape, dtype=torch.float64) + 0.1


@pytest.mark.parametrize("positions", [(), (3,), (2, 2)])
def test_weighted_sums(positions: tuple[int, ...]) -> None:
    layer = nn.Linear(3, 2).double()
    x, dy, a = draw(4, *positions, 3), draw(4, *positions, 2), positive(4)
    found = sums(layer, x, [dy], [a])
    rows, ys = with_one(x).view(4, -1, 4), dy.view(4, -1, 2)
    torch.testing.assert_close(
        found.a_sum[0, 0], torch.einsum("n,npi,npj->ij", a, rows, rows), **EXACT
    )
    torch.testing.assert_close(found.g_sum[0, 0], torch.einsum("npi,npj->ij", ys, ys), **EXACT)
    torch.testing.assert_close(found.positions, a.sum() * rows.shape[1])


def test_batch_axis_and_several_roots() -> None:
    layer = nn.Linear(3, 2).double()
    x, dys, a = draw(5, 4, 3), [draw(5, 4, 2) for _ in range(3)], positive(4)
    found = sums(layer, x, dys, [a], batch_axis=1)
    rows = with_one(x)
    torch.testing.assert_close(
        found.a_sum[0, 0], torch.einsum("n,pni,pnj->ij", a, rows, rows), **EXACT
    )
    expected = sum(torch.einsum("pni,pnj->ij", dy, dy) for dy in dys)
    torch.testing.assert_close(found.g_sum[0, 0], expected, **EXACT)
    torch.testing.assert_close(found.positions, 5 * a.sum())


def test_weights_of_several_losses_and_of_positions() -> None:
    layer = nn.Linear(3, 2, bias=False).double()
    x, dy, a, b = draw(4, 3), draw(4, 2), positive(4), positive(4, 5)
    found = sums(layer, x, [dy], [a, b])
    w = a + b.sum(1)
    torch.testing.assert_close(found.a_sum[0, 0], (x.T * w) @ x, **EXACT)
    torch.testing.assert_close(found.positions, w.sum())


@pytest.mark.parametrize("even", [True, False])
def test_weights_of_other_examples(even: bool) -> None:
    """Where the loss has taken the axes apart, all rows have the mean weight."""
    layer = nn.Linear(3, 2).double()
    x, dy = draw(4, 3, 3), draw(4, 3, 2)
    a = torch.full((12,), 0.1, dtype=torch.float64) if even else positive(12)
    found = sums(layer, x, [dy], [a])
    rows = with_one(x).view(-1, 4)
    torch.testing.assert_close(found.a_sum[0, 0], rows.T @ rows * a.sum() / 4, **EXACT)
    torch.testing.assert_close(found.positions, 3 * a.sum())


def test_masked_rows_are_left_out() -> None:
    """As a whole, with the 1 of their bias."""
    layer = nn.Linear(3, 2).double()
    x, dy = draw(4, 3, 3), draw(4, 3, 2)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0]]).bool()
    dy = dy * mask[..., None]
    a = torch.full((12,), 1 / 6, dtype=torch.float64) * mask.flatten()
    found = sums(layer, x, [dy], [a])
    rows = with_one(x)[mask]
    torch.testing.assert_close(found.a_sum[0, 0] / found.positions, rows.T @ rows / 6, **EXACT)
    torch.testing.assert_close(found.positions, torch.tensor(6 / 4, dtype=torch.float64))
    torch.testing.assert_close(found.a_sum[0, 0, 3, 3], found.positions)


def test_masked_rows_that_only_some_roots_reach() -> None:
    layer = nn.Linear(3, 2).double()
    x = draw(4, 3)
    dys = [torch.zeros(4, 2, dtype=torch.float64) for _ in range(2)]
    dys[0][0], dys[1][1] = 1.0, -2.0
    a = torch.tensor([0.5, 0.5, 0.0, 0.0], dtype=torch.float64)
    found = sums(layer, x, dys, [a])
    rows = with_one(x[:2])
    torch.testing.assert_close(found.a_sum[0, 0], 0.5 * rows.T @ rows, **EXACT)
    torch.testing.assert_close(found.positions, a.sum())


def test_rows_without_gradient_count_if_nothing_is_masked() -> None:
    layer = nn.Linear(3, 2).double()
    x, dy = draw(4, 3), draw(4, 2)
    dy[1] = 0
    a = torch.full((4,), 0.25, dtype=torch.float64)
    torch.testing.assert_close(
        sums(layer, x, [dy], [a]).positions, torch.ones((), dtype=torch.float64)
    )


@pytest.mark.parametrize("bias", [True, False])
def test_grouped_convolution(bias: bool) -> None:
    layer = nn.Conv2d(4, 6, 2, groups=2, stride=2, bias=bias).double()
    x, dy, a = draw(3, 4, 5, 4), draw(3, 6, 2, 2), positive(3)
    found = sums(layer, x, [dy], [a])
    patches = nn.functional.unfold(x, 2, stride=2).view(3, 2, 8, 4).permute(1, 0, 3, 2)
    rows = with_one(patches) if bias else patches
    expected = torch.einsum("n,gnpi,gnpj->gij", a, rows, rows)
    torch.testing.assert_close(found.a_sum[:, 0], expected, **EXACT)
    ys = dy.view(3, 2, 3, 4)
    torch.testing.assert_close(found.g_sum[:, 0], torch.einsum("ngip,ngjp->gij", ys, ys), **EXACT)
    torch.testing.assert_close(found.positions, 4 * a.sum())


def test_reduced_positions() -> None:
    layer = nn.Linear(3, 2).double()
    x, dy, a = draw(4, 5, 3), draw(4, 5, 2), positive(4)
    found = sums(layer, x, [dy], [a], kfac_approx="reduce")
    rows, ys = with_one(x).mean(1), dy.sum(1)
    torch.testing.assert_close(found.a_sum[0, 0], (rows.T * a) @ rows, **EXACT)
    torch.testing.assert_close(found.g_sum[0, 0], ys.T @ ys, **EXACT)
    torch.testing.assert_close(found.positions, a.sum())


@pytest.mark.parametrize("padding", [None, 1])
@pytest.mark.parametrize("masked", [True, False])
def test_embedding(padding: int | None, masked: bool) -> None:
    """The same as a linear layer of one-hot inputs; the padding index has no row."""
    layer = nn.Embedding(5, 2, padding_idx=padding).double()
    x = torch.tensor([[0, 1, 1], [4, 2, 1], [2, 2, 3]])
    dy, a = draw(3, 3, 2), positive(3)
    if masked:
        a[2], dy[2] = 0, 0
    found = sums(layer, x, [dy], [a])
    keep = (x != padding) if padding is not None else torch.ones_like(x).bool()
    w = (a[:, None] * torch.ones(3, dtype=torch.float64))[keep]
    if masked:  # only rows with gradient
        w = (a[:, None].expand(3, 3) * (dy != 0).any(-1))[keep]
    one_hot = nn.functional.one_hot(x, 5).double()[keep]
    torch.testing.assert_close(found.a_sum.flatten(), (one_hot * w[:, None]).sum(0), **EXACT)
    torch.testing.assert_close(found.positions, w.sum())
    torch.testing.assert_close(found.g_sum[0, 0], dy[keep].T @ dy[keep], **EXACT)


@pytest.mark.parametrize("limit", [1, 2, 3, 5])
def test_cut_factors(limit: int) -> None:
    """Blocks on the diagonal of the whole factor, the last one filled up with zeros."""
    layer = nn.Linear(7, 5).double()
    x, dy, a = draw(4, 7), draw(4, 5), positive(4)
    whole = sums(layer, x, [dy], [a])
    info = info_of(layer, limit)
    cut = sums(layer, x, [dy], [a], limit=limit)
    for found, full, side in (
        (cut.a_sum, whole.a_sum[0, 0], info.input),
        (cut.g_sum, whole.g_sum[0, 0], info.output),
    ):
        filled = torch.zeros(side.filled, side.filled, dtype=torch.float64)
        filled[: side.size, : side.size] = full
        w = side.width
        for index, part in enumerate(found[0]):
            start = index * w
            expected = filled[start : start + w, start : start + w]
            torch.testing.assert_close(part, expected, **EXACT)


@pytest.mark.parametrize("limit", [100, 3, 1])
@pytest.mark.parametrize("pairs", [True, False])
def test_squares_in_a_basis(limit: int, pairs: bool) -> None:
    """Per example over all its positions, both ways to compute them, in parts."""
    layer = nn.Linear(7, 5).double()
    positions = 2 if pairs else 6
    x, dy, a = draw(4, positions, 7), draw(4, positions, 5), positive(4)
    info = info_of(layer, limit)
    basis, dense = random_basis(info)
    found = sums(layer, x, [dy, 2 * dy], [a], limit=limit, basis=basis).squares
    assert found is not None
    gradients = torch.einsum("npi,npj->nij", dy, with_one(x))
    expected = 5 * (dense[1].T @ gradients @ dense[0]).square().sum(0)
    torch.testing.assert_close(found[0], expected, **EXACT)


def random_basis(info: BlockInfo) -> tuple[Basis, list[Tensor]]:
    """Draw orthogonal matrices for both sides; also as dense matrices with rows filled up."""
    vectors, dense = [], []
    for side in (info.input, info.output):
        q = torch.linalg.qr(draw(info.groups, side.cuts, side.width, side.width)).Q
        diagonal = side.kind == "diagonal"
        vectors.append(None if diagonal else q)
        whole = torch.eye(side.size, dtype=torch.float64)
        if not diagonal:
            whole = torch.block_diag(*q[0])[: side.size]
        dense.append(whole)
    return Basis(*vectors), dense


def test_squares_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Conv1d(2, 2, 2, groups=2).double()
    basis, _ = random_basis(info_of(layer))
    x, dy, a = draw(5, 2, 4), draw(5, 2, 3), positive(5)
    whole = sums(layer, x, [dy], [a], basis=basis).squares
    monkeypatch.setattr(kronecker_sums, "_MAX_GRADIENTS", 1)
    torch.testing.assert_close(sums(layer, x, [dy], [a], basis=basis).squares, whole, **EXACT)


@pytest.mark.parametrize("limit", [100, 3])
def test_squares_of_an_embedding(limit: int) -> None:
    layer = nn.Embedding(6, 5).double()
    info = info_of(layer, limit)
    basis, dense = random_basis(info)
    basis = basis._replace(input=None)
    x, dy, a = torch.tensor([[0, 2], [2, 5]]), draw(2, 2, 5), positive(2)
    found = sums(layer, x, [dy], [a], limit=limit, basis=basis).squares
    assert found is not None
    expected = torch.zeros(info.output.filled, 6, dtype=torch.float64)
    for n, p in itertools.product(range(2), range(2)):
        expected[:, x[n, p]] += (dense[1].T @ dy[n, p]).square()
    torch.testing.assert_close(found[0], expected, **EXACT)


def test_squares_are_never_negative() -> None:
    """Large terms of positions that cancel leave a rounding error of either sign."""
    layer = nn.Linear(40, 40, bias=False)
    basis, _ = random_basis(info_of(layer))
    x, dy = torch.randn(3, 1, 40), torch.randn(3, 1, 40) * 100
    x, dy = torch.cat([x, x], 1), torch.cat([dy, -dy], 1)
    found = sums(layer, x, [dy], [torch.ones(3)], basis=basis).squares
    assert found is not None
    assert (found >= 0).all()


def test_sums_add_up() -> None:
    layer = nn.Linear(3, 2).double()
    x, dy = draw(6, 3), draw(6, 2)
    a = positive(6)
    basis, _ = random_basis(info_of(layer))
    whole = sums(layer, x, [dy], [a], basis=basis)
    parts = [sums(layer, x[i], [dy[i]], [a[i]], basis=basis) for i in (slice(0, 2), slice(2, 6))]
    added = parts[0].plus(parts[1]).times(2.0)
    for one, other in zip(added, whole.times(torch.tensor(2.0)), strict=True):
        torch.testing.assert_close(one, other, **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    layer = nn.Linear(3, 2).to(dtype)
    found = sums(
        layer,
        torch.ones(3000, 3, dtype=dtype),
        [torch.ones(3000, 2, dtype=dtype)],
        [torch.ones(3000)],
    )
    assert found.a_sum.dtype == found.g_sum.dtype == torch.float32
    assert (found.a_sum == 3000).all()
    assert (found.g_sum == 3000).all()


def test_without_examples() -> None:
    layer = nn.Linear(3, 2).double()
    found = sums(layer, draw(0, 3), [draw(0, 2)], [positive(0)])
    assert not found.a_sum.any()
    assert not found.g_sum.any()
    assert found.positions == 0


@pytest.mark.parametrize("positions", [(), (4,)])
def test_without_examples_in_a_basis(positions: tuple[int, ...]) -> None:
    layer = nn.Linear(3, 2).double()
    basis, _ = random_basis(info_of(layer))
    found = sums(
        layer, draw(0, *positions, 3), [draw(0, *positions, 2)], [positive(0)], basis=basis
    )
    assert found.squares is not None
    assert not found.squares.any()


@pytest.mark.parametrize(("size", "cuts"), [(7, 1), (7, 3), (8, 4), (5, 5)])
def test_split_and_rotated(size: int, cuts: int) -> None:
    side = Side(size, cuts)
    x = draw(2, 4, size)
    parts = split(x, side)
    assert parts.shape == (2, cuts, 4, side.width)
    assert torch.equal(joined(parts, side), x)
    assert torch.equal(rotated(x, side, None), x)
    q = torch.linalg.qr(draw(2, cuts, side.width, side.width)).Q
    expected = torch.stack([one @ torch.block_diag(*b)[:size] for one, b in zip(x, q, strict=True)])
    torch.testing.assert_close(rotated(x, side, q), expected, **EXACT)


def test_rows_are_those_of_the_layer() -> None:
    """The sums agree with the layer's own rows for a geometry that has everything."""
    layer = nn.ConvTranspose2d(4, 2, (2, 3), 2, 1, 1, groups=2, bias=False, dilation=2).double()
    x = draw(3, 4, 3, 3)
    dy, a = torch.randn_like(layer(x)), positive(3)
    (rows,) = layer_rows(layer, x, dy, has_bias=False)
    found = sums(layer, x, [dy], [a])
    w = a.repeat_interleave(9)
    torch.testing.assert_close(
        found.a_sum[:, 0], torch.einsum("r,gri,grj->gij", w, rows.inputs, rows.inputs), **EXACT
    )
    torch.testing.assert_close(found.g_sum[:, 0], rows.outputs.mT @ rows.outputs, **EXACT)
