"""Averages over the ranks of a distributed run."""

import torch
from torch import Tensor

__all__ = ["mean_over_ranks"]


def mean_over_ranks(packed: Tensor) -> Tensor:
    """Average a tensor over the ranks, in one collective; the identity in one process.

    Args:
        packed: Scalars packed into one tensor; changed in place.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return packed
    world_size = distributed.get_world_size()
    if world_size > 1:
        distributed.all_reduce(packed)
        packed = packed / world_size
    return packed
