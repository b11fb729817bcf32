"""Rounding to half precision at random, so that small updates are kept on average."""

import torch
from torch import Tensor

__all__ = ["stochastic_round"]

# Of float32 fractions, the bits that the format does not have; and its least normal number.
_DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}
_LEAST_NORMAL_FLOAT16 = 2.0**-14
_LEAST_FLOAT16 = 2.0**-24


def stochastic_round(
    x: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None
) -> Tensor:
    """Round up or down at random, so that the mean of the result is the number itself.

    Args:
        x: Numbers in float32, of any shape.
        dtype: bfloat16 or float16.
        generator: Draws one number per entry.

    Returns:
        A tensor of that dtype. What is not finite stays as it is; what is too large for float16
        becomes its largest number.

    Raises:
        ValueError: If ``dtype`` is another one.

    Examples:
        >>> x = torch.full((10_000,), 1.001)
        >>> plain = x.to(torch.bfloat16).float().mean()
        >>> rounded = stochastic_round(x, torch.bfloat16).float().mean()
        >>> float(plain), abs(float(rounded) - 1.001) < 3e-4
        (1.0, True)
    """
    if dtype not in _DROPPED_BITS:
        raise ValueError(f"Invalid dtype={dtype}: must be torch.bfloat16 or torch.float16.")
    dropped = 1 << _DROPPED_BITS[dtype]
    noise = torch.randint(
        0, dropped, x.shape, dtype=torch.int32, device=x.device, generator=generator
    )
    # Sign and exponent come before the fraction: adding to the bits enlarges the absolute value,
    # also across a power of two; then the bits that the format does not have are cleared.
    bits = x.view(torch.int32).add(noise).bitwise_and_(-dropped)
    rounded = torch.where(x.isfinite(), bits.view(torch.float32), x)
    if dtype == torch.float16:
        # Below its least normal number float16 has an even grid.
        share = noise.to(torch.float32).div_(dropped)
        even = torch.floor(x / _LEAST_FLOAT16 + share) * _LEAST_FLOAT16
        rounded = torch.where(x.abs() < _LEAST_NORMAL_FLOAT16, even, rounded)
        largest = torch.finfo(torch.float16).max
        rounded = torch.where(x.isfinite(), rounded.clamp(-largest, largest), x)
    return rounded.to(dtype)
