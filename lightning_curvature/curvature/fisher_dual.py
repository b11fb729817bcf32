"""Blocks of the damped Fisher matrix through the inner products of gradients: the dual form.

For the columns G_b of a block, K_b = damping m I + G_b G_b^T has as many rows as there are
gradients: the smaller matrix where a block has more columns than that. The Woodbury identity gives

    H_b^{-1} = (I - G_b^T K_b^{-1} G_b) / damping

The difference loses digits where the Fisher matrix is large beside the damping, so all of it is in
float64. The gradients stay where they are and are read piece by piece, as often as they are needed.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from lightning_curvature.curvature.column_blocks import ColumnBlocks, Piece, Tile
from lightning_curvature.curvature.gram import gram

__all__ = ["DualFisher"]


class DualFisher:
    """Cholesky factors of the cores of the blocks.

    Args:
        columns: The blocks.
        gradients: ``[rows, d]``, not copied.
        num_grads: m.
        damping: Damping.
        device: Where the cores are kept.
        factorize: Returns Cholesky factors, or raises; takes the first block's number, too.
        sum_over_ranks: Sums a tensor over the ranks that have the other columns of the one block.
    """

    def __init__(
        self,
        columns: ColumnBlocks,
        gradients: Tensor,
        num_grads: int,
        damping: float,
        device: torch.device,
        factorize: Callable[[Tensor, int], Tensor],
        sum_over_ranks: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self.columns = columns
        self._gradients = gradients
        self._num_grads = num_grads
        self._damping = damping
        self._device = device
        self._factorize = factorize
        self._sum_over_ranks = sum_over_ranks
        rows = len(gradients)
        # Of the one block of several ranks there is a core also where there is no column.
        count = columns.num_blocks if sum_over_ranks is None else 1
        self._factors = torch.empty((count, rows, rows), dtype=torch.float64, device=device)
        for tile in self.tiles():
            core = self._summed(self._cores(tile))
            core.diagonal(dim1=-2, dim2=-1).add_(damping * num_grads)
            self._factors[tile.first : tile.last] = factorize(core, tile.first)

    @property
    def rank(self) -> int:
        """Length of the vectors that `reader` finds."""
        return len(self._gradients)

    def tiles(self) -> list[Tile]:
        """Return all blocks, by tile."""
        if self._sum_over_ranks is not None:
            return [Tile(0, 1)]
        rows = len(self._gradients)
        return list(self.columns.tiles(rows * max(rows, self.columns.block_size)))

    def product(self, x: Tensor, out: Tensor) -> None:
        """Write H^{-1} x, ``[d, k]``."""
        rows = len(self._gradients)
        for tile in self.tiles():
            read, pieces = self._reads(), self._pieces(tile)
            products = self._zeros(tile, rows, x.shape[1])
            for piece in pieces:
                products += read(piece) @ self._split(x, piece)
            factors = self._factors[tile.first : tile.last]
            solved = torch.cholesky_solve(self._summed(products), factors)
            for piece in pieces:
                rest = self._split(x, piece) - read(piece).mT @ solved
                self.columns.join(rest / self._damping, piece, out)

    def diagonal(self, out: Tensor) -> None:
        """Write the diagonal of H^{-1}, which rounding may have made negative."""
        for tile in self.tiles():
            for piece in self._pieces(tile):
                squares = self._halves(tile, self._read(piece)).square().sum(-1)
                self.columns.join((1 - squares) / self._damping, piece, out)

    def reader(self, tile: Tile) -> Callable[[Tensor], Tensor]:
        """Return what finds a vector per column of a tile, see `FisherFactors.reader`."""
        if tile.last - tile.first > 1:
            halves = self._halves(tile, self._read(self.columns.whole(tile))).flatten(0, 1)
            return lambda columns: halves[columns]
        first = tile.first * self.columns.block_size

        def gather(columns: Tensor) -> Tensor:
            found = self._gradients[:, (columns + first).to(self._gradients.device)]
            return self._halves(tile, found.to(self._device).double().unsqueeze(0)).squeeze(0)

        return gather

    def entries(self, dots: Tensor, same: Tensor) -> Tensor:
        """Return entries of H^{-1} from inner products of what `reader` finds."""
        return (same.double() - dots) / self._damping

    def joint_update(self, weights: Tensor, pruned: Tensor, out: Tensor) -> None:
        """Write the changes of weights that stay: dw_S = G_S^T K_S^{-1} G_Q w_Q.

        It is H_SS dw_S = H_SQ w_Q with the inverse pushed through G_S^T, without a difference.
        """
        rows = len(self._gradients)
        removed_weights, kept = weights * pruned, ~pruned
        for tile in self.tiles():
            read, pieces = self._reads(), self._pieces(tile)
            # Both sums in one tensor: a single collective.
            both = self._zeros(tile, rows, rows + 1)
            for piece in pieces:
                part = read(piece)
                both[..., rows:] += part @ self._split(removed_weights.unsqueeze(-1), piece)
                both[..., :rows] += gram((part * self._split(kept, piece).unsqueeze(1)).mT)
            both = self._summed(both)
            core, right = both[..., :rows], both[..., rows:]
            core.diagonal(dim1=-2, dim2=-1).add_(self._damping * self._num_grads)
            solved = torch.cholesky_solve(right, self._factorize(core, tile.first))
            for piece in pieces:
                changes = (read(piece).mT @ solved).squeeze(-1)
                self.columns.join(changes, piece, out)

    def logdet(self) -> Tensor:
        """Return log det H, of all ranks."""
        rows = len(self._gradients)
        size = torch.tensor([self.columns.num_columns], dtype=torch.float64, device=self._device)
        core_rows = rows * len(self._factors)
        powers = (float(self._summed(size)) - core_rows) * math.log(self._damping)
        cores: Tensor = 2 * self._factors.diagonal(dim1=-2, dim2=-1).log().sum()
        return cores + powers - core_rows * math.log(self._num_grads)

    def _halves(self, tile: Tile, part: Tensor) -> Tensor:
        """Return L^{-1} times columns ``[blocks, rows, width]``: by block a row per column."""
        factors = self._factors[tile.first : tile.last]
        halves: Tensor = torch.linalg.solve_triangular(factors.mT, part.mT, upper=True, left=False)
        return halves

    def _cores(self, tile: Tile) -> Tensor:
        """Return G_b G_b^T of a tile's blocks."""
        cores = self._zeros(tile, len(self._gradients), len(self._gradients))
        for piece in self._pieces(tile):
            cores += gram(self._read(piece).mT)
        return cores

    def _pieces(self, tile: Tile) -> list[Piece]:
        return self.columns.pieces(tile, len(self._gradients))

    def _read(self, piece: Piece) -> Tensor:
        return self.columns.split_rows(self._gradients, piece, self._device)

    def _reads(self) -> Callable[[Piece], Tensor]:
        """Return `_read` that remembers one piece: a tile that is one piece is read once."""
        return lru_cache(maxsize=1)(self._read)

    def _split(self, x: Tensor, piece: Piece) -> Tensor:
        return self.columns.split(x, piece).to(self._device, torch.float64)

    def _zeros(self, tile: Tile, *shape: int) -> Tensor:
        count = tile.last - tile.first
        return torch.zeros((count, *shape), dtype=torch.float64, device=self._device)

    def _summed(self, x: Tensor) -> Tensor:
        return x if self._sum_over_ranks is None else self._sum_over_ranks(x)
