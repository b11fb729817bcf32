"""Blocks of the damped Fisher matrix that are factorized as they are: the primal form.

H_b = damping I + G_b^T G_b / m for the columns G_b of a block, of n x n numbers: the smaller matrix
where a block has no more columns than there are gradients, and the one without a difference of
nearly equal numbers.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_curvature.curvature.column_blocks import TILE_ENTRIES, ColumnBlocks, Tile
from lightning_curvature.curvature.fisher_blocks import FisherBlocks
from lightning_curvature.curvature.gram import gram

__all__ = ["PrimalFisher"]


class PrimalFisher:
    """Cholesky factors of the blocks.

    Args:
        columns: The blocks.
        sums: Returns the sums of outer products of a tile's blocks, ``[blocks, n, n]`` in float64.
        num_grads: m.
        damping: Damping.
        device: Where the factors are kept.
        factorize: Returns Cholesky factors, or raises; takes the first block's number, too.
    """

    def __init__(
        self,
        columns: ColumnBlocks,
        sums: Callable[[Tile], Tensor],
        num_grads: int,
        damping: float,
        device: torch.device,
        factorize: Callable[[Tensor, int], Tensor],
    ) -> None:
        self.columns = columns
        self._damping = damping
        self._device = device
        self._factorize = factorize
        n = columns.block_size
        self._factors = torch.empty((columns.num_blocks, n, n), dtype=torch.float64, device=device)
        for tile in self.tiles():
            matrix = sums(tile).to(device) / num_grads
            matrix.diagonal(dim1=-2, dim2=-1).add_(damping)
            self._factors[tile.first : tile.last] = factorize(matrix, tile.first)

    @staticmethod
    def sums_of_gradients(
        columns: ColumnBlocks, gradients: Tensor, device: torch.device
    ) -> Callable[[Tile], Tensor]:
        """Return what sums up the outer products of gradients, a few of them at a time."""

        def sums(tile: Tile) -> Tensor:
            piece = columns.whole(tile)
            count = max(TILE_ENTRIES // (piece.blocks * piece.width), 1)
            starts = range(0, len(gradients), count)
            parts = (slice(start, start + count) for start in starts)
            total = gram(columns.split_rows(gradients, piece, device, next(parts)))
            for part in parts:
                total += gram(columns.split_rows(gradients, piece, device, part))
            return total

        return sums

    @staticmethod
    def sums_of_blocks(blocks: FisherBlocks) -> Callable[[Tile], Tensor]:
        """Return what reads sums that are there."""
        found = blocks.sums()
        return lambda tile: found[tile.first : tile.last].double()

    @property
    def rank(self) -> int:
        """Length of the vectors that `reader` finds."""
        return self.columns.block_size

    def tiles(self) -> list[Tile]:
        """Return all blocks, by tile."""
        return list(self.columns.tiles(self.columns.block_size**2))

    def product(self, x: Tensor, out: Tensor) -> None:
        """Write H^{-1} x, ``[d, k]``."""
        for tile in self.tiles():
            piece = self.columns.whole(tile)
            vectors = self.columns.split(x, piece).to(self._device, torch.float64)
            solved = torch.cholesky_solve(vectors, self._factors[tile.first : tile.last])
            self.columns.join(solved, piece, out)

    def diagonal(self, out: Tensor) -> None:
        """Write the diagonal of H^{-1}: sums of squares, never negative."""
        for tile in self.tiles():
            squares = self._halves(tile).square().sum(-1)
            self.columns.join(squares, self.columns.whole(tile), out)

    def reader(self, tile: Tile) -> Callable[[Tensor], Tensor]:
        """Return what finds a vector per column of a tile, see `FisherFactors.reader`."""
        halves = self._halves(tile).flatten(0, 1)
        return lambda columns: halves[columns]

    @staticmethod
    def entries(dots: Tensor, same: Tensor) -> Tensor:
        """Return entries of H^{-1}: the inner products themselves."""
        return dots

    def joint_update(self, weights: Tensor, pruned: Tensor, out: Tensor) -> None:
        """Write the changes of weights that stay: H_SS dw_S = H_SQ w_Q."""
        for tile in self.tiles():
            piece = self.columns.whole(tile)
            removed = self.columns.split(pruned, piece).to(self._device)
            removed_weights = self.columns.split(weights * pruned, piece)
            removed_weights = removed_weights.to(self._device, torch.float64).unsqueeze(-1)
            factors = self._factors[tile.first : tile.last]
            kept = (~removed).double().unsqueeze(-1)
            right = kept * (factors @ (factors.mT @ removed_weights))
            # The blocks again, with rows and columns of the identity where weights go.
            matrix = (factors @ factors.mT) * kept * kept.mT
            matrix.diagonal(dim1=-2, dim2=-1).add_(removed)
            solved = torch.cholesky_solve(right, self._factorize(matrix, tile.first))
            self.columns.join(solved.squeeze(-1), piece, out)

    def logdet(self) -> Tensor:
        """Return log det H."""
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for tile in self.tiles():
            diagonals = self._factors[tile.first : tile.last].diagonal(dim1=-2, dim2=-1)
            total += 2 * diagonals.log().sum()
        padding = self.columns.num_blocks * self.columns.block_size - self.columns.num_columns
        return total - padding * math.log(self._damping)

    def _halves(self, tile: Tile) -> Tensor:
        """Return the transposes of the inverse factors: by block a row per column."""
        factors = self._factors[tile.first : tile.last]
        identity = torch.eye(factors.shape[-1], dtype=torch.float64, device=self._device)
        inverses: Tensor = torch.linalg.solve_triangular(
            factors, identity.expand_as(factors), upper=False
        )
        return inverses.mT.contiguous()
