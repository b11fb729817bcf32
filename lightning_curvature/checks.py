"""Argument checks with one wording: what is wrong, the value, what is allowed."""

from collections.abc import Iterable
from numbers import Real
from typing import Any

__all__ = [
    "check_betas",
    "check_choice",
    "check_count",
    "check_in_range",
    "check_interval",
    "check_positive",
]


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def check_positive(name: str, value: Any, *, zero: bool = False) -> None:
    """Check that a number is positive.

    Args:
        name: Name of the argument, as the user wrote it.
        value: Value to check; NaN is refused.
        zero: Whether zero is allowed too.

    Raises:
        TypeError: If ``value`` is not a number.
        ValueError: If ``value`` is out of range.

    Examples:
        >>> check_positive("damping", -0.1)
        Traceback (most recent call last):
            ...
        ValueError: Invalid damping=-0.1: must be > 0.
    """
    if not _is_number(value):
        raise TypeError(f"Invalid {name}={value!r}: must be a number, got {type(value).__name__}.")
    if not (value >= 0 if zero else value > 0):
        raise ValueError(f"Invalid {name}={value!r}: must be {'>=' if zero else '>'} 0.")


def check_in_range(
    name: str,
    value: Any,
    low: float,
    high: float,
    *,
    include_low: bool = True,
    include_high: bool = False,
) -> None:
    """Check that a number lies in an interval.

    Args:
        name: Name of the argument, as the user wrote it.
        value: Value to check; NaN is refused.
        low: Lower end of the interval.
        high: Upper end of the interval.
        include_low: Whether ``low`` itself is allowed.
        include_high: Whether ``high`` itself is allowed.

    Raises:
        TypeError: If ``value`` is not a number.
        ValueError: If ``value`` is out of range.

    Examples:
        >>> check_in_range("betas[0]", 1.0, 0, 1)
        Traceback (most recent call last):
            ...
        ValueError: Invalid betas[0]=1.0: must be in [0, 1).
    """
    if not _is_number(value):
        raise TypeError(f"Invalid {name}={value!r}: must be a number, got {type(value).__name__}.")
    above = value >= low if include_low else value > low
    below = value <= high if include_high else value < high
    if not (above and below):
        interval = f"{'[' if include_low else '('}{low}, {high}{']' if include_high else ')'}"
        raise ValueError(f"Invalid {name}={value!r}: must be in {interval}.")


def check_betas(betas: Any) -> None:
    """Check two decay rates.

    Args:
        betas: What the user gave.

    Raises:
        TypeError: If one is not a number.
        ValueError: If they are not two numbers in [0, 1).

    Examples:
        >>> check_betas((0.9,))
        Traceback (most recent call last):
            ...
        ValueError: Invalid betas=(0.9,): must be two numbers in [0, 1).
    """
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:  # noqa: PLR2004
        raise ValueError(f"Invalid betas={betas!r}: must be two numbers in [0, 1).")
    for number, beta in enumerate(betas):
        check_in_range(f"betas[{number}]", beta, 0, 1)


def check_interval(name: str, value: Any) -> None:
    """Check a number of optimizer steps: an integer of at least 1.

    Args:
        name: Name of the argument, as the user wrote it.
        value: Value to check.

    Raises:
        TypeError: If ``value`` is not an integer.
        ValueError: If ``value`` is below 1.

    Examples:
        >>> check_interval("damping_update_interval", 0)
        Traceback (most recent call last):
            ...
        ValueError: Invalid damping_update_interval=0: must be an integer >= 1, in optimizer steps.
    """
    _check_count(name, value, ", in optimizer steps")


def check_count(name: str, value: Any) -> None:
    """Check a number of things: an integer of at least 1.

    Args:
        name: Name of the argument, as the user wrote it.
        value: Value to check.

    Raises:
        TypeError: If ``value`` is not an integer.
        ValueError: If ``value`` is below 1.

    Examples:
        >>> check_count("num_probes", 0)
        Traceback (most recent call last):
            ...
        ValueError: Invalid num_probes=0: must be an integer >= 1.
    """
    _check_count(name, value, "")


def _check_count(name: str, value: Any, unit: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(
            f"Invalid {name}={value!r}: must be an integer >= 1{unit}, got {type(value).__name__}."
        )
    if value < 1:
        raise ValueError(f"Invalid {name}={value!r}: must be an integer >= 1{unit}.")


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Check that a value is one of a few words.

    Args:
        name: Name of the argument, as the user wrote it.
        value: Value to check.
        choices: The words allowed.

    Raises:
        ValueError: If ``value`` is none of them.

    Examples:
        >>> check_choice("curvature", "fischer", ("fisher", "hessian"))
        Traceback (most recent call last):
            ...
        ValueError: Invalid curvature='fischer': must be one of 'fisher', 'hessian'.
    """
    allowed = tuple(choices)
    if value not in allowed:
        words = ", ".join(repr(choice) for choice in allowed)
        raise ValueError(f"Invalid {name}={value!r}: must be one of {words}.")
