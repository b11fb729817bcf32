"""ColumnBlocks: consecutive blocks of columns, worked through in tiles that bound the memory."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["TILE_ENTRIES", "ColumnBlocks", "Piece", "Tile"]

# Numbers of a temporary tensor in float64: 8 MiB. More is slower on a CPU, whose caches it leaves.
TILE_ENTRIES = 1 << 20


class Tile(NamedTuple):
    """Blocks that are worked on at a time.

    Attributes:
        first: Number of the first block.
        last: Number of the block after the last one.
    """

    first: int
    last: int


class Piece(NamedTuple):
    """Columns of a tile that are worked on at a time: whole blocks, or a part of a single one.

    Attributes:
        start: First column.
        stop: Column after the last one.
        blocks: Number of blocks.
        width: Columns per block; those from ``stop`` on are filled with zeros.
    """

    start: int
    stop: int
    blocks: int
    width: int


@dataclass(frozen=True)
class ColumnBlocks:
    """Consecutive blocks of columns, all of one size but for the last, which may be smaller.

    There is no empty block: not where the size divides the number of columns, either.

    Args:
        num_columns: Number of columns.
        block_size: Columns of a block, from 1 to the number of columns.

    Examples:
        >>> blocks = ColumnBlocks(num_columns=10, block_size=4)
        >>> blocks.num_blocks
        3
        >>> blocks.split(torch.arange(10.0), Piece(4, 10, blocks=2, width=4))
        tensor([[4., 5., 6., 7.],
                [8., 9., 0., 0.]])
    """

    num_columns: int
    block_size: int

    @classmethod
    def of(cls, num_columns: int, block_size: int | None) -> "ColumnBlocks":
        """Return blocks of a size that may be larger than all columns, or None for one block."""
        whole = max(num_columns, 1)
        return cls(num_columns, whole if block_size is None else min(block_size, whole))

    @property
    def num_blocks(self) -> int:
        """Number of blocks, none of them empty."""
        return -(-self.num_columns // self.block_size)

    def tiles(self, entries: int) -> Iterator[Tile]:
        """Yield all blocks in tiles.

        Args:
            entries: Numbers that the work on one block takes.
        """
        count = max(TILE_ENTRIES // max(entries, 1), 1)
        for first in range(0, self.num_blocks, count):
            yield Tile(first, min(first + count, self.num_blocks))

    def whole(self, tile: Tile) -> Piece:
        """Return the columns of a tile as one piece."""
        start = tile.first * self.block_size
        stop = min(tile.last * self.block_size, self.num_columns)
        return Piece(start, stop, tile.last - tile.first, self.block_size)

    def pieces(self, tile: Tile, rows: int) -> list[Piece]:
        """Return the columns of a tile as pieces.

        Args:
            tile: The tile: more than one piece only if it has a single block.
            rows: Numbers per column.
        """
        whole = self.whole(tile)
        width = max(TILE_ENTRIES // max(rows, 1), 1)
        if whole.blocks > 1 or whole.stop - whole.start <= width:
            return [whole]
        starts = range(whole.start, whole.stop, width)
        stops = [min(start + width, whole.stop) for start in starts]
        return [
            Piece(start, stop, 1, stop - start) for start, stop in zip(starts, stops, strict=True)
        ]

    def split(self, x: Tensor, piece: Piece) -> Tensor:
        """Return a piece of a vector or of several, by block.

        Args:
            x: ``[d, ...]``.
            piece: The piece.

        Returns:
            ``[blocks, width, ...]``.
        """
        part = x[piece.start : piece.stop]
        missing = piece.blocks * piece.width - len(part)
        if missing:
            part = torch.cat([part, part.new_zeros((missing, *x.shape[1:]))])
        return part.reshape(piece.blocks, piece.width, *x.shape[1:])

    def split_rows(
        self, matrix: Tensor, piece: Piece, device: torch.device, rows: slice = slice(None)
    ) -> Tensor:
        """Return a piece of the columns of a matrix in float64, by block.

        Args:
            matrix: ``[m, d]``.
            piece: The piece.
            device: Where the answer is wanted.
            rows: Which rows.

        Returns:
            ``[blocks, m, width]``, a copy.
        """
        part = matrix[rows, piece.start : piece.stop].to(device)
        split = torch.zeros(
            (piece.blocks, len(part), piece.width), dtype=torch.float64, device=device
        )
        full = part.shape[1] // piece.width
        columns = full * piece.width
        split[:full] = part[:, :columns].reshape(len(part), full, piece.width).transpose(0, 1)
        if columns < part.shape[1]:
            split[full, :, : part.shape[1] - columns] = part[:, columns:]
        return split

    def join(self, split: Tensor, piece: Piece, out: Tensor) -> None:
        """Write a piece by block to its place.

        Args:
            split: ``[blocks, width, ...]``.
            piece: The piece.
            out: ``[d, ...]``, of any dtype and on any device.
        """
        out[piece.start : piece.stop] = split.flatten(0, 1)[: piece.stop - piece.start]
