"""FisherBlocks: blocks of the empirical Fisher matrix, summed up gradient by gradient."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_curvature.checks import check_count
from lightning_curvature.curvature.column_blocks import ColumnBlocks
from lightning_curvature.curvature.gram import gram

__all__ = ["FisherBlocks"]

# One product of several gradients passes over the sums once: they are the larger part.
_BUFFERED = 32


class FisherBlocks:
    r"""Diagonal blocks of :math:`\sum_i g_i g_i^T`, summed up without keeping the gradients.

    Consecutive blocks of ``block_size`` columns; the last one may be smaller. Memory is
    ``num_columns * block_size`` numbers, and 32 gradients that wait until their products are
    added all at once: less than that of the gradients if there are more of them than columns in a
    block.

    Args:
        num_columns: d, numbers of a gradient.
        block_size: Columns per block, at least 1; may be larger than d.
        device: Where gradients and sums are.
        dtype: Precision of the sums, float64 or float32; `InverseFisher` goes on in float64.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> blocks = FisherBlocks(3, block_size=2)
        >>> blocks.add(torch.tensor([1.0, 2.0, 3.0]))
        >>> blocks.sums()
        tensor([[[1., 2.],
                 [2., 4.]],
        <BLANKLINE>
                [[9., 0.],
                 [0., 0.]]], dtype=torch.float64)
    """

    def __init__(
        self,
        num_columns: int,
        block_size: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float64,
    ) -> None:
        check_count("num_columns", num_columns)
        check_count("block_size", block_size)
        if dtype not in (torch.float64, torch.float32):
            raise ValueError(f"Invalid dtype={dtype}: must be torch.float64 or torch.float32.")
        self.columns = ColumnBlocks.of(num_columns, block_size)
        self.device = torch.device(device)
        size = self.columns.block_size
        self._sums = torch.zeros(
            (self.columns.num_blocks, size, size), dtype=dtype, device=self.device
        )
        self._buffer: Tensor | None = None
        self._waiting = 0
        self._num_grads = 0

    @property
    def num_columns(self) -> int:
        """d, numbers of a gradient."""
        return self.columns.num_columns

    @property
    def block_size(self) -> int:
        """Columns per block, at most d."""
        return self.columns.block_size

    @property
    def num_grads(self) -> int:
        """Number of gradients that were added."""
        return self._num_grads

    @torch.no_grad()
    def add(self, gradient: Tensor) -> None:
        """Add the products of a gradient's entries.

        Args:
            gradient: ``[d]``, of any floating-point dtype; it is copied.

        Raises:
            ValueError: If the gradient has another shape.
        """
        if tuple(gradient.shape) != (self.num_columns,):
            raise ValueError(
                f"Invalid gradient of shape {list(gradient.shape)}: must be [{self.num_columns}]."
            )
        if self._buffer is None:
            self._buffer = self._sums.new_empty((_BUFFERED, self.num_columns))
        self._buffer[self._waiting] = gradient
        self._waiting += 1
        self._num_grads += 1
        if self._waiting == _BUFFERED:
            self._flush()

    def sums(self) -> Tensor:
        """Return the sums, ``[blocks, block_size, block_size]``; zeros after the last column.

        It is no copy: gradients that are added later are added to it.
        """
        self._flush()
        self._buffer = None
        return self._sums

    def merge(self, other: "FisherBlocks") -> None:
        """Add the sums over other gradients.

        Args:
            other: Sums of blocks of the same columns; unchanged.

        Raises:
            ValueError: If its blocks are others.
        """
        if other.columns != self.columns:
            raise ValueError(
                f"Blocks of {other.block_size} of {other.num_columns} columns cannot be merged "
                f"with blocks of {self.block_size} of {self.num_columns}."
            )
        self._flush()
        self._sums += other.sums().to(self._sums)
        self._num_grads += other.num_grads

    def sum_over_ranks(self, add_up: Callable[[Tensor], Tensor]) -> None:
        """Add up the sums of all ranks, each of which has gradients of its own.

        Args:
            add_up: Returns the sum of a tensor over the ranks; may change the tensor in place.
        """
        self._sums = add_up(self.sums())
        count = torch.tensor([self._num_grads], dtype=torch.float64, device=self.device)
        self._num_grads = int(add_up(count))

    @torch.no_grad()
    def _flush(self) -> None:
        if self._buffer is None or self._waiting == 0:
            return
        rows = self._buffer[: self._waiting]
        size = self.block_size
        for tile in self.columns.tiles(size * max(size, _BUFFERED)):
            split = self.columns.split_rows(rows, self.columns.whole(tile), self.device)
            self._sums[tile.first : tile.last] += gram(split)
        self._waiting = 0
