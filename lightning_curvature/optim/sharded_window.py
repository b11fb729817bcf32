"""A window of the gradients of parameters, whose columns the ranks of a run deal out among them.

Every rank has the whole gradient after it was averaged. It keeps its part of the columns, so

    s = G g          is a sum of m numbers over the ranks, in float64
    K = ...          is the same on all ranks, and so is its factor
    u = G^T c        is computed in parts, which are then gathered

As every part of u is computed on one rank only, all ranks have the same numbers bit for bit.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_curvature import vectors
from lightning_curvature.curvature.gradient_window import GradientWindow, WindowInverse
from lightning_curvature.curvature.window_memory import check_window_fits
from lightning_curvature.curvature.window_rows import row_dtype_of
from lightning_curvature.optim.saved_window import part_of_window
from lightning_curvature.optim.window_columns import WindowColumns
from lightning_curvature.oracle.ranks import rank, world_size

__all__ = [
    "ShardedWindow",
    "check_device",
    "check_window_memory",
    "check_window_memory_of_ranks",
    "num_columns",
    "num_shards",
]


def num_shards(settings: Mapping[str, Any]) -> int:
    """Return the number of ranks that share a window.

    Args:
        settings: Hyper-parameters.
    """
    return world_size() if settings["shard_window"] else 1


def num_columns(params: Sequence[Tensor], settings: Mapping[str, Any]) -> int:
    """Return how many columns parameters have at their present values.

    Args:
        params: The parameters.
        settings: Hyper-parameters.
    """
    if settings["sparse"]:
        return sum(int(p.detach().count_nonzero()) for p in params)
    return sum(p.numel() for p in params)


def check_window_memory(params: Sequence[Tensor], settings: Mapping[str, Any]) -> None:
    """Refuse a window that does not fit.

    Args:
        params: The parameters that get columns.
        settings: Hyper-parameters.

    Raises:
        ValueError: If it is larger than the free memory.
    """
    if params:
        check_window_fits(
            int(settings["num_grads"]),
            num_columns(params, settings),
            row_dtype_of(settings["row_dtype"], vectors.scalar_dtype(params)),
            params[0].device,
            placement=settings["placement"],
            num_ranks=num_shards(settings),
        )


def check_window_memory_of_ranks(params: Sequence[Tensor], settings: Mapping[str, Any]) -> None:
    """Refuse a window that does not fit on some rank; all of them must call it.

    Args:
        params: The parameters that get columns.
        settings: Hyper-parameters.

    Raises:
        ValueError: If it is larger than the free memory, on this rank or another one.
    """
    error: ValueError | None = None
    try:
        check_window_memory(params, settings)
    except ValueError as found:
        error = found
    if num_shards(settings) > 1:
        # Otherwise the other ranks would wait for this one in the next collective.
        failed = torch.full((1,), float(error is not None), device=params[0].device)
        torch.distributed.all_reduce(failed)
        if error is None and float(failed) > 0:
            error = ValueError("The window of gradients does not fit into the memory of a rank.")
    if error is not None:
        raise error


def check_device(params: Sequence[Tensor]) -> None:
    """Refuse parameters on several devices.

    Args:
        params: The parameters.

    Raises:
        ValueError: If they are.
    """
    devices = sorted({str(p.device) for p in params})
    if len(devices) > 1:
        raise ValueError(
            f"MFAC needs all parameters on one device, got {', '.join(devices)}. Give it the "
            "parameters of one of them."
        )


class ShardedWindow:
    """The gradients of parameters, in a window of which this rank has its part of the columns.

    Args:
        params: Parameters that have columns.
        numbers: Their numbers among all parameters of the optimizer.
        settings: Hyper-parameters of the optimizer.
        kept: Boolean vector over all entries: which have a column; None for all.

    Attributes:
        columns: Which number of which parameter is which column.
        window: The columns of this rank.

    Raises:
        ValueError: If the parameters are on several devices, or are sharded themselves.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        numbers: Sequence[int],
        settings: Mapping[str, Any],
        kept: Tensor | None = None,
    ) -> None:
        check_device(params)
        # Not when the optimizer is made: a strategy that shards has a better text.
        if any(hasattr(p, "full_tensor") for p in params):
            raise ValueError(
                "MFAC needs whole parameters on every rank, got sharded ones. Use DDP: the window "
                "is then dealt out over the ranks."
            )
        self._num_ranks = num_shards(settings)
        self._compared = self._num_ranks == 1
        self._sparse = bool(settings["sparse"])
        if self._sparse and kept is None:
            kept = _nonzero(params)
        self.columns = WindowColumns(params, numbers, kept)
        self._share = self.columns.share(rank() if self._num_ranks > 1 else 0, self._num_ranks)
        self.window = GradientWindow(
            int(settings["num_grads"]),
            self._share.width,
            window_normalization=settings["window_normalization"],
            row_dtype=settings["row_dtype"],
            gram_dtype=settings["gram_dtype"],
            placement=settings["placement"],
            device=params[0].device,
            dtype=vectors.scalar_dtype(params),
            sum_over_ranks=_sum_over_ranks if self._num_ranks > 1 else None,
        )

    @property
    def num_ranks(self) -> int:
        """Number of ranks that its columns were dealt out over."""
        return self._num_ranks

    # One step

    def vector(self, values: Sequence[Tensor | None]) -> Tensor:
        """Return values of the parameters as a vector of the columns of all ranks.

        Args:
            values: One tensor per parameter; None stands for zeros.
        """
        size = self._share.width * self._num_ranks
        return self.columns.vector(values, self.window.dtype, size)

    def insert(self, vector: Tensor, usable: Tensor | None) -> None:
        """Put a gradient into the window.

        Args:
            vector: What `vector` returned.
            usable: Boolean 0-dim tensor: if False nothing changes. None for True.

        Raises:
            RuntimeError: If the first gradient is not the same on all ranks.
        """
        several = self._num_ranks > 1
        if not self._compared:
            self._compare(vector)
        largest = torch.linalg.vector_norm(vector, float("inf")) if several else None
        self.window.insert(self._own(vector), usable, largest=largest)

    def _compare(self, vector: Tensor) -> None:
        own = torch.stack([torch.linalg.vector_norm(vector, p) for p in (2, float("inf"))])
        own = own.nan_to_num()
        found = [torch.empty_like(own) for _ in range(self._num_ranks)]
        torch.distributed.all_gather(found, own)
        self._compared = True
        # GPUs of two kinds may find other last digits.
        if not all(torch.allclose(found[0], other, rtol=1e-4, atol=0.0) for other in found[1:]):
            raise RuntimeError(
                "MFAC got another gradient on every rank, but its window is shared by the ranks of "
                "a data-parallel run, which average them. Use DDP, or shard_window=False where "
                "each rank trains a model of its own."
            )

    def direction(self, inverse: WindowInverse, other: Tensor | None = None) -> Tensor:
        """Return the product of the inverse and the newest gradient, plus another vector.

        Args:
            inverse: That of `window`.
            other: What `vector` returned, None for zero.
        """
        if other is None:
            part = inverse.newest_direction()
        else:
            part = inverse.newest_direction_and(self._own(other))
        if self._num_ranks == 1:
            return part
        whole = part.new_empty(self._num_ranks * len(part))
        torch.distributed.all_gather(list(whole.chunk(self._num_ranks)), part)
        return whole

    def _own(self, vector: Tensor) -> Tensor:
        start, width = self._share
        return vector[start : start + width]

    # State

    def grown(
        self,
        params: Sequence[Tensor],
        numbers: Sequence[int],
        settings: Mapping[str, Any],
        saved: Mapping[str, Any],
    ) -> "ShardedWindow":
        """Return a window with more columns, in which past gradients are zero.

        Args:
            params: The new parameters.
            numbers: Their numbers.
            settings: Hyper-parameters of the optimizer.
            saved: The state of this window with the columns of all ranks.
        """
        old = self.columns
        kept = None if old.kept is None else torch.cat([old.kept, _nonzero(params)])
        both = ([*old.params, *params], [*old.numbers, *numbers])
        found = ShardedWindow(*both, settings, kept)
        size = found.columns.size
        # Of new columns there are no rows: they stay zero.
        found._load({**saved, "num_columns": size, "columns": [0, size]})
        return found

    def state(self) -> dict[str, Any]:
        """Return the state of the columns of this rank, see `saved_window.py`."""
        size = self.columns.size
        start, width = self._share
        first, last = min(start, size), min(start + width, size)
        state = self.window.state()
        return {
            "parameters": list(self.columns.numbers),
            "sizes": [p.numel() for p in self.columns.params],
            "kept": None if self.columns.kept is None else self.columns.kept.clone(),
            "columns": [first, last],
            "num_columns": size,
            **state,
            "rows": state["rows"][:, : last - first],
        }

    @classmethod
    def restored(
        cls, saved: Mapping[str, Any], params: Sequence[Tensor], settings: Mapping[str, Any]
    ) -> "ShardedWindow":
        """Return the window that was saved, on any number of ranks.

        Args:
            saved: The columns of all ranks, or those of this one.
            params: All parameters of the optimizer.
            settings: Its hyper-parameters.
        """
        members = [params[number] for number in saved["parameters"]]
        kept = saved["kept"]
        kept = None if kept is None else kept.to(members[0].device, copy=True)
        check_window_memory(members, settings)
        found = cls(members, saved["parameters"], settings, kept)
        found._load(saved)
        return found

    def _load(self, saved: Mapping[str, Any]) -> None:
        self.window.load_state(part_of_window(saved, *self._share))


def _nonzero(params: Sequence[Tensor]) -> Tensor:
    return torch.cat([p.detach().ne(0).reshape(-1) for p in params])


def _sum_over_ranks(x: Tensor) -> Tensor:
    torch.distributed.all_reduce(x)
    return x
