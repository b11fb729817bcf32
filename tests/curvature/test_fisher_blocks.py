"""Tests of lightning_curvature/curvature/fisher_blocks.py."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_curvature.curvature import column_blocks
from lightning_curvature.curvature.fisher_blocks import FisherBlocks
from lightning_curvature.curvature.inverse_fisher import InverseFisher


def filled(gradients: Tensor, block_size: int, **options: torch.dtype) -> FisherBlocks:
    """Return blocks of gradients."""
    blocks = FisherBlocks(gradients.shape[1], block_size, **options)
    for gradient in gradients:
        blocks.add(gradient)
    return blocks


def padded_blocks(matrix: Tensor, size: int) -> Tensor:
    """Return the diagonal blocks of a matrix; the last one is filled up with zeros."""
    count = -(-len(matrix) // size)
    found = matrix.new_zeros(count, size, size)
    for block, start in zip(found, range(0, len(matrix), size), strict=True):
        part = matrix[start : start + size, start : start + size]
        block[: len(part), : len(part)] = part
    return found


@pytest.mark.parametrize("entries", [1, 100, None])
@pytest.mark.parametrize("block_size", [1, 3, 5, 10, 64])
@pytest.mark.parametrize("num_grads", [1, 31, 32, 33, 70])
def test_sums(
    num_grads: int, block_size: int, entries: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if entries is not None:
        monkeypatch.setattr(column_blocks, "TILE_ENTRIES", entries)
    gradients = torch.randn(num_grads, 10, dtype=torch.float64)
    blocks = filled(gradients, block_size)
    size = min(block_size, 10)
    assert (blocks.num_columns, blocks.block_size, blocks.num_grads) == (10, size, num_grads)
    expected = padded_blocks(gradients.T @ gradients, size)
    torch.testing.assert_close(blocks.sums(), expected)
    # Looking changes nothing, and more can be added.
    blocks.add(gradients[0])
    expected += padded_blocks(torch.outer(gradients[0], gradients[0]), size)
    torch.testing.assert_close(blocks.sums(), expected)
    assert blocks.num_grads == num_grads + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
def test_precision(dtype: torch.dtype, kind: torch.dtype) -> None:
    gradients = torch.randn(40, 7).to(kind)
    blocks = filled(gradients, 4, dtype=dtype)
    assert blocks.sums().dtype == dtype
    wide = gradients.double()
    expected = padded_blocks(wide.T @ wide, 4)
    error = float((blocks.sums() - expected).abs().max())
    assert error <= (1e-12 if dtype == torch.float64 else 1e-4)


def test_a_gradient_is_copied() -> None:
    blocks = FisherBlocks(2, 2)
    gradient = torch.tensor([1.0, 2.0], requires_grad=True)
    blocks.add(gradient)
    with torch.no_grad():
        gradient.zero_()
    assert blocks.sums().tolist() == [[[1.0, 2.0], [2.0, 4.0]]]
    assert not blocks.sums().requires_grad


def test_merged_blocks_are_those_of_all_gradients() -> None:
    gradients = torch.randn(37, 9, dtype=torch.float64)
    whole, part, other = (filled(rows, 4) for rows in (gradients, gradients[:5], gradients[5:]))
    before = other.sums().clone()
    part.merge(other)
    torch.testing.assert_close(part.sums(), whole.sums())
    assert part.num_grads == 37
    assert torch.equal(other.sums(), before)


@pytest.mark.parametrize("in_place", [True, False])
def test_sum_over_ranks(in_place: bool) -> None:
    gradients = torch.randn(8, 9, dtype=torch.float64)
    mine, others = filled(gradients[:3], 4), filled(gradients[3:], 4)
    there = [others.sums(), torch.tensor([5.0], dtype=torch.float64)]

    def add_up(x: Tensor) -> Tensor:
        other = there.pop(0)
        return x.add_(other) if in_place else x + other

    mine.sum_over_ranks(add_up)
    torch.testing.assert_close(mine.sums(), filled(gradients, 4).sums())
    assert mine.num_grads == 8


@pytest.mark.parametrize("num_grads", [None, 11])
@pytest.mark.parametrize("rows", [3, 20])
def test_inverse_of_blocks(rows: int, num_grads: int | None) -> None:
    gradients = torch.randn(rows, 14, dtype=torch.float64)
    blocks = filled(gradients, 4)
    inverse = InverseFisher.from_blocks(blocks, 0.01, num_grads=num_grads)
    direct = InverseFisher(gradients, 0.01, block_size=4, form="dual", num_grads=num_grads)
    assert (inverse.form, direct.form) == ("primal", "dual")
    assert (inverse.shape, inverse.block_size) == ((14, 14), 4)
    assert inverse.num_grads == (num_grads or rows)
    x = torch.randn(14, dtype=torch.float64)
    torch.testing.assert_close(inverse @ x, direct @ x)
    torch.testing.assert_close(inverse.diagonal(), direct.diagonal())
    torch.testing.assert_close(inverse.logdet(), direct.logdet())
    pruned = x > 0
    torch.testing.assert_close(inverse.joint_update(x, pruned), direct.joint_update(x, pruned))
    # The sums are as they were.
    torch.testing.assert_close(blocks.sums(), filled(gradients, 4).sums(), rtol=0, atol=0)


def test_blocks_in_float32_are_factorized_in_float64() -> None:
    # The damping is below the last bit of the sums.
    gradients = torch.ones(2, 3)
    inverse = InverseFisher.from_blocks(filled(gradients, 3, dtype=torch.float32), 1e-9)
    expected = torch.linalg.inv(torch.ones(3, 3).double() + 1e-9 * torch.eye(3))
    torch.testing.assert_close(inverse.diagonal(), expected.diagonal(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: FisherBlocks(0, 1), ValueError, "Invalid num_columns=0: must be an integer >= 1."),
        (lambda: FisherBlocks(3, 0), ValueError, "Invalid block_size=0: must be an integer >= 1."),
        (
            lambda: FisherBlocks(3, 2, dtype=torch.bfloat16),
            ValueError,
            "Invalid dtype=torch.bfloat16: must be torch.float64 or torch.float32.",
        ),
        (
            lambda: FisherBlocks(3, 2).add(torch.ones(4)),
            ValueError,
            r"Invalid gradient of shape \[4\]: must be \[3\].",
        ),
        (
            lambda: FisherBlocks(3, 2).merge(FisherBlocks(3, 3)),
            ValueError,
            "Blocks of 3 of 3 columns cannot be merged with blocks of 2 of 3.",
        ),
        (
            lambda: InverseFisher.from_blocks(FisherBlocks(3, 2), 1.0),
            RuntimeError,
            "There is no Fisher matrix yet: no gradient was added.",
        ),
        (
            lambda: InverseFisher.from_blocks(filled(torch.tensor([[1.0, torch.inf]]), 1), 1.0),
            ValueError,
            "Invalid blocks: a gradient that was added is not finite.",
        ),
        (
            lambda: InverseFisher.from_blocks(filled(torch.ones(1, 2), 1), 0.0),
            ValueError,
            "Invalid damping=0.0: must be > 0.",
        ),
    ],
)
def test_errors(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
