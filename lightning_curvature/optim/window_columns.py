"""Which number of which parameter is which column of a window of gradients."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Share", "WindowColumns"]


class Share(NamedTuple):
    """The columns that one rank keeps: as many as all others, the last ones may not exist.

    Attributes:
        start: First column.
        width: Number of columns.
    """

    start: int
    width: int


class WindowColumns:
    """Parameters one after the other as one vector, without what is left out.

    Args:
        params: The parameters.
        numbers: Their numbers among all parameters of the optimizer.
        kept: Boolean vector over all their entries: which have a column; None for all.
    """

    def __init__(
        self, params: Sequence[Tensor], numbers: Sequence[int], kept: Tensor | None = None
    ) -> None:
        self.params = list(params)
        self.numbers = list(numbers)
        self.kept = kept
        sizes = [p.numel() for p in self.params]
        ends = list(itertools.accumulate(sizes, initial=0))
        self._spans = list(itertools.pairwise(ends))
        self._entries: int = ends[-1]
        self._positions = None if kept is None else kept.nonzero().view(-1)
        self.size = self._entries if self._positions is None else len(self._positions)

    def share(self, rank: int, num_ranks: int) -> Share:
        """Return the columns of a rank.

        Args:
            rank: Number of the rank.
            num_ranks: Number of ranks that the columns are dealt out over.
        """
        width = max(-(-self.size // num_ranks), 1)
        return Share(rank * width, width)

    def vector(self, values: Sequence[Tensor | None], dtype: torch.dtype, size: int) -> Tensor:
        """Return values of the parameters as one vector, with zeros at the end.

        Args:
            values: One tensor per parameter; None stands for zeros.
            dtype: Of the vector.
            size: Its length, at least that of all columns.
        """
        length = max(size, self._entries)
        flat = torch.zeros(length, dtype=dtype, device=self.params[0].device)
        targets, sources = [], []
        for (start, end), value in zip(self._spans, values, strict=True):
            if value is not None:
                targets.append(flat[start:end].view(value.shape))
                sources.append(value)
        if targets:
            torch._foreach_copy_(targets, sources)
        if self._positions is None:
            return flat[:size]
        found = flat.new_zeros(size)
        found[: self.size] = flat[self._positions]
        return found

    def tensors(self, vector: Tensor) -> list[Tensor]:
        """Return the parts of a vector in the shapes of the parameters.

        Args:
            vector: What `vector` returned, or something of its length.
        """
        flat = vector[: self.size]
        if self._positions is not None:
            flat = vector.new_zeros(self._entries).index_copy_(0, self._positions, flat)
        parts = zip(self.params, self._spans, strict=True)
        return [flat[start:end].view(p.shape) for p, (start, end) in parts]
