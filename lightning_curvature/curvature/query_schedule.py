"""Number of directions of a zeroth-order step as a function of epoch or step."""

import math

from lightning_curvature.checks import check_count, check_positive

__all__ = ["adazeta_num_samples", "linear_num_samples"]


def adazeta_num_samples(
    epoch: int, num_epochs: int, nominal: int = 20, shrink: float = 0.85, largest: int = 15
) -> int:
    """Return the number of directions in an epoch by AdaZeta's rule.

    It is ``shrink * epoch ** b`` rounded down, at least 1 and at most ``largest``; b is such that
    the number would be ``nominal`` after the last epoch. Yang et al., 2024, arXiv:2406.18060.

    Args:
        epoch: Number of the epoch, from 0.
        num_epochs: Number of epochs in all.
        nominal: Number that is aimed at; above ``shrink``.
        shrink: Factor; larger ones raise the number earlier.
        largest: Largest number.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> [adazeta_num_samples(epoch, 10) for epoch in range(10)]
        [1, 1, 2, 3, 5, 7, 9, 12, 14, 15]
    """
    _check_number("epoch", epoch)
    check_count("num_epochs", num_epochs)
    check_count("nominal", nominal)
    check_positive("shrink", shrink)
    check_count("largest", largest)
    if not shrink < nominal:
        raise ValueError(f"Invalid shrink={shrink!r}: must be below nominal={nominal}.")
    if epoch == 0:
        wanted = 1
    elif epoch >= num_epochs:  # exactly, without round-off; and with one epoch b is not defined
        wanted = nominal
    else:
        wanted = math.floor(shrink * epoch ** (math.log(nominal / shrink) / math.log(num_epochs)))
    return min(max(wanted, 1), largest)


def linear_num_samples(step: int, num_steps: int, largest: int) -> int:
    """Return the number of directions of a step where it grows evenly.

    It is ``largest * step / num_steps`` rounded down, at least 1. Malladi et al., 2023,
    arXiv:2305.17333.

    Args:
        step: Number of the step, from 0.
        num_steps: Steps until the largest number.
        largest: Largest number.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> [linear_num_samples(step, 8, 4) for step in range(10)]
        [1, 1, 1, 1, 2, 2, 3, 3, 4, 4]
    """
    _check_number("step", step)
    check_count("num_steps", num_steps)
    check_count("largest", largest)
    return max(largest * min(step, num_steps) // num_steps, 1)


def _check_number(name: str, value: int) -> None:
    if value < 0:
        raise ValueError(f"Invalid {name}={value!r}: must be >= 0.")
