"""Masks as they are saved: one bit per weight."""

import torch
from torch import Tensor

__all__ = ["pack_mask", "unpack_mask"]

_BITS = 8


def pack_mask(mask: Tensor) -> Tensor:
    """Return a mask as bytes on the host, the first flag in the lowest bit of the first byte.

    Args:
        mask: Bool, of any shape.

    Examples:
        >>> pack_mask(torch.tensor([[True, False], [True, True]]))
        tensor([13], dtype=torch.uint8)
    """
    flags = mask.detach().reshape(-1).to(torch.uint8).cpu()
    flags = torch.nn.functional.pad(flags, (0, -len(flags) % _BITS)).view(-1, _BITS)
    return (flags << torch.arange(_BITS, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, shape: torch.Size) -> Tensor:
    """Return the mask that was packed.

    Args:
        packed: What `pack_mask` returned.
        shape: Shape of the mask.

    Raises:
        ValueError: If the mask had another number of entries.

    Examples:
        >>> unpack_mask(torch.tensor([13], dtype=torch.uint8), torch.Size([2, 2]))
        tensor([[ True, False],
                [ True,  True]])
    """
    count = shape.numel()
    if packed.numel() != -(-count // _BITS):
        raise ValueError(
            f"Shape mismatch: a mask of shape {tuple(shape)} has {-(-count // _BITS)} bytes, got "
            f"{packed.numel()}."
        )
    bits = (packed.cpu()[:, None] >> torch.arange(_BITS, dtype=torch.uint8)) & 1
    return bits.reshape(-1)[:count].view(shape) != 0
