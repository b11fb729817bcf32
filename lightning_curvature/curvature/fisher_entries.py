"""Entries of an inverse Fisher matrix within groups of columns, found tile by tile."""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from lightning_curvature.curvature.column_blocks import TILE_ENTRIES, ColumnBlocks, Tile

__all__ = ["FisherFactors", "check_columns", "submatrices_of"]


class FisherFactors(Protocol):
    """Factorized blocks, in the primal or the dual form.

    Attributes:
        columns: The blocks.
    """

    columns: ColumnBlocks

    @property
    def rank(self) -> int:
        """Length of the vectors that a `reader` finds."""

    def tiles(self) -> list[Tile]:
        """Return all blocks, by tile."""

    def reader(self, tile: Tile) -> Callable[[Tensor], Tensor]:
        """Return what finds a vector per column of a tile, see `entries`.

        Args:
            tile: The tile.

        Returns:
            A function of numbers of columns, counted from the first of the tile, ``[n]``; it
            returns ``[n, r]``.
        """

    def entries(self, dots: Tensor, same: Tensor) -> Tensor:
        """Return entries of H^{-1} from inner products of the vectors of their columns.

        Args:
            dots: The inner products.
            same: Whether row and column are the same.
        """


def check_columns(groups: Tensor, num_columns: int) -> None:
    """Check numbers of columns.

    Args:
        groups: The numbers, ``[n, k]``.
        num_columns: How many columns there are.

    Raises:
        ValueError: If the shape is another one, or a number is out of range.
        TypeError: If they are not int64.
    """
    if groups.dtype != torch.int64:
        raise TypeError(f"Invalid columns of dtype {groups.dtype}: must be torch.int64.")
    if groups.ndim != 2:  # noqa: PLR2004
        raise ValueError(f"Invalid groups of shape {list(groups.shape)}: must be [n, k].")
    if groups.numel() == 0:
        return
    low, high = (int(edge) for edge in groups.aminmax())
    if low < 0 or high >= num_columns:
        raise ValueError(
            f"Invalid columns from {low} to {high}: must be from 0 to {num_columns - 1}."
        )


def submatrices_of(factors: FisherFactors, groups: Tensor) -> Tensor:
    """Return the entries of H^{-1} within groups of columns.

    Args:
        factors: The blocks.
        groups: Numbers of the columns of each group, int64 ``[n, k]``, on the blocks' device.

    Returns:
        ``[n, k, k]`` in float64; zeros between columns of two blocks.
    """
    count, size = groups.shape
    blocks = groups // factors.columns.block_size
    found = torch.zeros((count, size, size), dtype=torch.float64, device=groups.device)
    at_a_time = max(TILE_ENTRIES // max(size * max(factors.rank, size), 1), 1)
    for tile, chosen in _groups_by_tile(factors.tiles(), blocks):
        read = factors.reader(tile)
        start = tile.first * factors.columns.block_size
        for first in range(0, len(chosen), at_a_time):
            part = chosen[first : first + at_a_time]
            group, block = groups[part], blocks[part]
            # Of a group that goes on in another tile only a part is here.
            here = (block >= tile.first) & (block < tile.last)
            vectors = read(torch.where(here, group - start, 0).view(-1))
            vectors = vectors.view(len(part), size, -1)
            same = group.unsqueeze(2) == group.unsqueeze(1)
            together = (block.unsqueeze(2) == block.unsqueeze(1)) & here.unsqueeze(2)
            values = factors.entries(vectors @ vectors.mT, same)
            found[part] += torch.where(together, values, 0.0)
    return found


def _groups_by_tile(tiles: list[Tile], blocks: Tensor) -> Iterator[tuple[Tile, Tensor]]:
    """Yield tiles, and which groups have columns there.

    Args:
        tiles: All blocks.
        blocks: Block of each column of each group, ``[n, k]``.
    """
    if blocks.numel() == 0:
        return
    low, high = blocks.amin(1), blocks.amax(1)
    order = low.argsort(stable=True)
    lowest = low[order]
    crossing = order[high[order] > lowest]
    for tile in tiles:
        begin, end = (int(torch.searchsorted(lowest, edge)) for edge in tile)
        going_on = (low[crossing] < tile.first) & (high[crossing] >= tile.first)
        chosen = torch.cat([order[begin:end], crossing[going_on]])
        if len(chosen):
            yield tile, chosen
