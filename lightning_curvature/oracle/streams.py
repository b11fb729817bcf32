"""Random streams of our own: keyed by what they are for, so that nothing of them must be saved."""

import hashlib

import torch

__all__ = ["stream"]


def stream(device: torch.device, *key: int | str) -> torch.Generator:
    """Return a generator that depends on a key only; the global ones are left alone.

    Args:
        device: Device to draw on.
        *key: What the stream is for: a name, a seed, the step, the rank, an index.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    generator = torch.Generator(device)
    generator.manual_seed(int.from_bytes(digest, "big") >> 1)
    return generator
