"""Rows of gradients on each rank become all rows of the rank's own columns.

Ranks look at different examples, so each brings some rows of all columns. Blocks of the Fisher
matrix need all rows of their columns. One exchange makes the one from the other; afterwards each
rank works on its own columns, and what it finds is put together on all ranks, bit for bit alike.
"""

import itertools

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_curvature.oracle.ranks import rank, world_size

__all__ = ["Columns", "check_on_all_ranks", "counts_of_ranks", "sum_over_ranks"]

# Bytes of rows that are sent together.
_TILE_BYTES = 1 << 26


class Columns:
    """Which columns each rank works on: consecutive ones, in whole units.

    Args:
        num_columns: Number of all columns, at least one unit per rank.
        unit: Columns that stay together, such as those of a block; only the last rank may have an
            incomplete one.

    Attributes:
        edges: Where the columns of each rank start, and where the last ones end.
        own: The columns of this rank.
    """

    def __init__(self, num_columns: int, unit: int) -> None:
        ranks = world_size()
        units = -(-num_columns // unit)
        if units < ranks:
            raise ValueError(
                f"{num_columns} columns in units of {unit} are too few for {ranks} ranks."
            )
        self.edges = [min(units * r // ranks * unit, num_columns) for r in range(ranks + 1)]
        self.own = slice(self.edges[rank()], self.edges[rank() + 1])

    @staticmethod
    def least(unit: int) -> int:
        """Return the smallest number of columns that is enough for all ranks."""
        return unit * (world_size() - 1) + 1

    def exchange(self, rows: Tensor, source: Tensor | None) -> Tensor:
        """Return all rows of this rank's columns.

        Args:
            rows: Rows of this rank ``[m_local, n]``; ranks may have different numbers of them.
            source: Which of the ``n`` numbers each column is, -1 for a column of zeros; None if
                they are the columns.

        Returns:
            Rows of the first rank, then of the second, ... ``[m, own columns]``, in the dtype and
            on the device of ``rows``.
        """
        if world_size() == 1:
            return rows if source is None else _arranged(rows, source.to(rows.device))
        counts = counts_of_ranks(len(rows))
        width = self.own.stop - self.own.start
        starts = [sum(counts[:r]) for r in range(len(counts))]
        result = rows.new_empty(sum(counts), width)
        tile = max(_TILE_BYTES // max(self.edges[-1] * rows.element_size(), 1), 1)
        order = None if source is None else source.to(rows.device)
        for begin in range(0, max(counts), tile):
            part = rows[begin : begin + tile]
            part = part if order is None else _arranged(part, order)
            received = self._exchange_tile(part, [max(min(c - begin, tile), 0) for c in counts])
            for start, block in zip(starts, received, strict=True):
                result[start + begin : start + begin + len(block)] = block
        return result

    def _exchange_tile(self, rows: Tensor, counts: list[int]) -> list[Tensor]:
        """Send each rank its columns of some rows; return the own columns that each has sent."""
        width = self.own.stop - self.own.start
        device = _wire(rows.device)
        # As bytes, which every backend can send.
        pieces = [
            rows[:, start:stop].flatten().contiguous().view(torch.uint8).to(device)
            for start, stop in itertools.pairwise(self.edges)
        ]
        sizes = [count * width * rows.element_size() for count in counts]
        received = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        sent = [len(piece) for piece in pieces]
        dist.all_to_all_single(received, torch.cat(pieces), sizes, sent)
        return [
            piece.to(rows.device).view(rows.dtype).view(count, width)
            for piece, count in zip(torch.split(received, sizes), counts, strict=True)
        ]

    @staticmethod
    def gather(own: Tensor, sizes: list[int]) -> Tensor:
        """Put what each rank has found together, along the first dimension.

        Args:
            own: Part of this rank, float64.
            sizes: Lengths of the parts of all ranks.
        """
        if world_size() == 1:
            return own
        # Parts of one length, which all backends have a collective for.
        padded = own.new_zeros(max(sizes), *own.shape[1:], device=_wire(own.device))
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        whole = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
        return whole.to(own.device)


def sum_over_ranks(values: Tensor) -> Tensor:
    """Return the sum over the ranks, the same bits on each."""
    if world_size() == 1:
        return values
    # A copy: the collective works in place.
    summed = values.to(_wire(values.device), copy=True).contiguous()
    dist.all_reduce(summed)
    return summed.to(values.device)


def check_on_all_ranks(error: Exception | None) -> None:
    """Raise on every rank if something is wrong on one, so that none waits for it forever.

    Args:
        error: What is wrong on this rank; None for nothing.

    Raises:
        Exception: The error of this rank.
        RuntimeError: If there is an error on another rank only.
    """
    wrong = [number for number, flag in enumerate(counts_of_ranks(int(error is not None))) if flag]
    if error is not None:
        raise error
    if wrong:
        raise RuntimeError(f"Nothing was pruned; see the error of rank {wrong[0]}.")


def counts_of_ranks(count: int) -> list[int]:
    """Return the number that each rank has."""
    if world_size() == 1:
        return [count]
    device = _wire(torch.device("cpu"))
    own = torch.tensor([count], device=device)
    parts = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(parts, own)
    return [int(part) for part in parts]


def _arranged(rows: Tensor, source: Tensor) -> Tensor:
    """Return columns in another order, zeros where there is none."""
    columns = rows[:, source.clamp(min=0)]
    columns[:, source < 0] = 0
    return columns


def _wire(device: torch.device) -> torch.device:
    """Return where tensors must be for a collective."""
    if "nccl" in dist.get_backend():
        if device.type == "cuda":
            return device
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
