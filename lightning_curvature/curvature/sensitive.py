"""Chooses the few entries of many tensors that are worth training.

Guo, Long, Zhao et al., "Zeroth-order fine-tuning of LLMs with extreme sparsity", 2024,
arXiv:2406.02913: the 0.1 % of the weights with the largest squared gradients carry about half of
all squared gradient, and training them alone does as well as training all. Scores are compared
over all tensors together.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Literal, TypeVar

import torch
from torch import Tensor

from lightning_curvature.checks import check_in_range
from lightning_curvature.oracle.streams import stream

__all__ = ["Criterion", "captured_share", "largest_entries", "num_chosen", "random_entries"]

Criterion = Literal["fisher", "magnitude", "random"]
Key = TypeVar("Key", bound=Hashable)

# Entries looked at together: temporary memory stays small beside the tensors.
_CHUNK = 1 << 22
_HALF_BITS = 16
_LOW = (1 << _HALF_BITS) - 1
_MAGNITUDE = (1 << 31) - 1
# Upper half of infinity; that of NaN is as large.
_NOT_FINITE = 0x7F80


def num_chosen(size: int, fraction: float) -> int:
    """Return how many of ``size`` entries a fraction is, at least 1.

    Args:
        size: Number of entries.
        fraction: In (0, 1].

    Raises:
        TypeError: If ``fraction`` is not a number.
        ValueError: If there is no entry, or ``fraction`` is out of range.

    Examples:
        >>> num_chosen(2000, 0.001), num_chosen(10, 0.001)
        (2, 1)
    """
    check_in_range("fraction", fraction, 0, 1, include_low=False, include_high=True)
    if size < 1:
        raise ValueError("There is no entry to choose from.")
    return min(max(round(fraction * size), 1), size)


def largest_entries(scores: Mapping[Key, Tensor], fraction: float) -> dict[Key, Tensor]:
    """Return where the entries of largest absolute value are, over all tensors.

    They are compared in float32. Of equal ones the first are taken, in the order of the tensors.

    Args:
        scores: The tensors: scores >= 0, or the weights themselves.
        fraction: Part of all entries to choose, in (0, 1]; at least one is.

    Returns:
        Positions in the flattened tensors, int64, ascending, on the device of each tensor.

    Raises:
        TypeError: If ``fraction`` is not a number.
        ValueError: If there is no entry, ``fraction`` is out of range, or a score is not finite.

    Examples:
        >>> largest_entries({"a": torch.tensor([1.0, 5.0]), "b": torch.tensor([-7.0])}, 0.6)
        {'a': tensor([1]), 'b': tensor([0])}
    """
    count = num_chosen(sum(x.numel() for x in scores.values()), fraction)
    least, ties = _least_chosen(scores, count)
    chosen: dict[Key, Tensor] = {}
    for key, tensor in scores.items():
        parts = [torch.empty(0, dtype=torch.int64, device=tensor.device)]
        for start, bits in _bits(tensor):
            above = bits > least
            if ties > 0:
                equal = (bits == least).nonzero().view(-1)[:ties]
                ties -= equal.numel()
                above[equal] = True
            parts.append(above.nonzero().view(-1) + start)
        chosen[key] = torch.cat(parts)
    return chosen


def _least_chosen(scores: Mapping[Key, Tensor], count: int) -> tuple[int, int]:
    """Return the bits of the smallest score that is chosen, and how many of its like are.

    Bit patterns of floats that are not negative are ordered as the floats are, so two histograms of
    half a pattern each find it, without sorting and without a copy of the scores.
    """
    upper = _histogram(scores, lambda bits: bits >> _HALF_BITS)
    if int(upper[_NOT_FINITE:].sum()) > 0:
        raise ValueError("Entries cannot be chosen by scores that are not all finite.")
    high, count = _bin_from_above(upper, count)
    lower = _histogram(scores, lambda bits: bits[(bits >> _HALF_BITS) == high] & _LOW)
    low, count = _bin_from_above(lower, count)
    return (high << _HALF_BITS) | low, count


def _bits(tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield the bits of absolute values in float32, part by part, and where the parts start."""
    flat = tensor.detach().reshape(-1)
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start : start + _CHUNK]
        yield start, part.float().contiguous().view(torch.int32) & _MAGNITUDE


def _histogram(scores: Mapping[Key, Tensor], of: Callable[[Tensor], Tensor]) -> Tensor:
    counts = torch.zeros(1 << _HALF_BITS, dtype=torch.int64)
    for tensor in scores.values():
        for _, bits in _bits(tensor):
            counts += torch.bincount(of(bits), minlength=len(counts)).cpu()
    return counts


def _bin_from_above(counts: Tensor, wanted: int) -> tuple[int, int]:
    """Return the bin that the entry ``wanted``, counted from the top, is in, and its place there.

    Args:
        counts: Entries per bin.
        wanted: From 1.
    """
    above = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(above, wanted))
    before = int(above[place - 1]) if place else 0
    return len(counts) - 1 - place, wanted - before


def random_entries(
    sizes: Mapping[Key, int], fraction: float, seed: int, *key: int
) -> dict[Key, Tensor]:
    """Return random positions, the same on every device.

    Args:
        sizes: Number of entries of each tensor.
        fraction: Part of all entries to choose, in (0, 1]; at least one is.
        seed: Seed of the choice.
        *key: What else the choice depends on, such as the step.

    Returns:
        Positions in the flattened tensors, int64, ascending, on the CPU.

    Raises:
        TypeError: If ``fraction`` is not a number.
        ValueError: If there is no entry, or ``fraction`` is out of range.

    Examples:
        >>> {name: len(x) for name, x in random_entries({"a": 4, "b": 4}, 1.0, 0).items()}
        {'a': 4, 'b': 4}
    """
    size = sum(sizes.values())
    count = num_chosen(size, fraction)
    generator = stream(torch.device("cpu"), "sensitive entries", seed, *key)
    if count <= size // 2:
        drawn = _distinct(size, count, generator)
    else:
        kept = torch.ones(size, dtype=torch.bool)
        kept[_distinct(size, size - count, generator)] = False
        drawn = kept.nonzero().view(-1)
    chosen, start = {}, 0
    for name, length in sizes.items():
        edges = torch.tensor([start, start + length])
        first, last = torch.searchsorted(drawn, edges).tolist()
        chosen[name] = drawn[first:last] - start
        start += length
    return chosen


def _distinct(size: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw until there are ``count`` different numbers below ``size``; return them sorted."""
    drawn = torch.empty(0, dtype=torch.int64)
    while len(drawn) < count:
        more = torch.randint(size, (count - len(drawn),), generator=generator)
        drawn = torch.unique(torch.cat([drawn, more]))
    return drawn


def captured_share(scores: Mapping[Key, Tensor], chosen: Mapping[Key, Tensor]) -> float:
    """Return which part of the sum of all scores is in the chosen entries, in [0, 1].

    Args:
        scores: Scores >= 0.
        chosen: Positions in the flattened tensors.

    Examples:
        >>> captured_share({"a": torch.tensor([1.0, 3.0])}, {"a": torch.tensor([1])})
        0.75
    """
    kept = sum(_sum(scores[key].reshape(-1)[positions]) for key, positions in chosen.items())
    total = sum(_sum(score) for score in scores.values())
    return kept / total if total > 0 else 0.0


def _sum(values: Tensor) -> float:
    # Of small chunks in float32, which every device has: their sum is a Python float.
    parts = torch.split(values.reshape(-1), 1 << 16)
    sums: list[float] = torch.stack([part.sum(dtype=torch.float32) for part in parts]).tolist()
    return sum(sums)
