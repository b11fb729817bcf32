"""Averages over the ranks of a distributed run."""

import torch
from torch import Tensor

__all__ = ["mean_over_ranks", "rank", "world_size"]


def world_size() -> int:
    """Return the number of processes, 1 without a process group."""
    distributed = torch.distributed
    grouped = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if grouped else 1


def rank() -> int:
    """Return the number of this process, 0 without a process group."""
    return torch.distributed.get_rank() if world_size() > 1 else 0


def mean_over_ranks(packed: Tensor) -> Tensor:
    """Average a tensor over the ranks, in one collective; the identity in one process.

    Args:
        packed: Scalars packed into one tensor; changed in place.
    """
    size = world_size()
    if size == 1:
        return packed
    torch.distributed.all_reduce(packed)
    return packed / size
