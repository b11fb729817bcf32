"""Tests of lightning_curvature/curvature/column_blocks.py."""

import pytest
import torch

from lightning_curvature.curvature import column_blocks
from lightning_curvature.curvature.column_blocks import ColumnBlocks, Piece, Tile


@pytest.mark.parametrize(
    ("num_columns", "block_size", "size", "count"),
    [(10, 4, 4, 3), (8, 4, 4, 2), (3, 100, 3, 1), (3, None, 3, 1), (1, 1, 1, 1), (0, None, 1, 0)],
)
def test_no_block_is_empty(num_columns: int, block_size: int | None, size: int, count: int) -> None:
    columns = ColumnBlocks.of(num_columns, block_size)
    assert (columns.block_size, columns.num_blocks) == (size, count)
    tiles = list(columns.tiles(size))
    assert tiles == ([Tile(0, count)] if count else [])


def test_tiles_and_pieces_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(column_blocks, "TILE_ENTRIES", 24)
    columns = ColumnBlocks(22, 4)
    assert list(columns.tiles(12)) == [(0, 2), (2, 4), (4, 6)]
    assert list(columns.tiles(25)) == [(n, n + 1) for n in range(6)]
    assert columns.pieces(Tile(4, 6), rows=3) == [Piece(16, 22, blocks=2, width=4)]
    # A part of a block has no padding.
    parts = columns.pieces(Tile(1, 2), rows=8)
    assert parts == [Piece(4, 7, blocks=1, width=3), Piece(7, 8, blocks=1, width=1)]


@pytest.mark.parametrize("num_columns", [5, 8, 10])
def test_split_and_join(num_columns: int) -> None:
    columns = ColumnBlocks.of(num_columns, 4)
    matrix = torch.arange(3.0 * num_columns).view(3, num_columns)
    piece = columns.whole(Tile(0, columns.num_blocks))
    split = columns.split_rows(matrix, piece, torch.device("cpu"))
    assert split.shape == (columns.num_blocks, 3, 4)
    assert split.dtype == torch.float64
    assert split.sum() == matrix.sum()  # zeros after the last column
    assert torch.equal(split.mT, columns.split(matrix.T, piece).double())
    some = columns.split_rows(matrix, piece, torch.device("cpu"), slice(1, 3))
    assert torch.equal(some, split[:, 1:])
    out = torch.full((num_columns, 3), -1.0)
    columns.join(split.mT, piece, out)
    assert torch.equal(out, matrix.T)
