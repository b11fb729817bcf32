"""Tests of lightning_curvature/checks.py: one wording for every argument error."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest

from lightning_curvature.checks import (
    check_choice,
    check_in_range,
    check_interval,
    check_positive,
)

GOOD: list[tuple[Callable[..., None], tuple[Any, ...], dict[str, Any]]] = [
    (check_positive, ("x", 1e-300), {}),
    (check_positive, ("x", math.inf), {}),
    (check_positive, ("x", 0), {"zero": True}),
    (check_in_range, ("x", 0, 0, 1), {}),
    (check_in_range, ("x", 1, 0, 1), {"include_low": False, "include_high": True}),
    (check_in_range, ("x", math.inf, 0, math.inf), {"include_high": True}),
    (check_interval, ("x", 1), {}),
    (check_choice, ("x", "a", ["a", "b"]), {}),
    (check_choice, ("x", "b", iter("ab")), {}),
]


@pytest.mark.parametrize(("check", "args", "kwargs"), GOOD)
def test_allowed(check: Callable[..., None], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    check(*args, **kwargs)


BAD: list[tuple[Callable[..., None], tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    (check_positive, ("x", 0), {}, ValueError, "Invalid x=0: must be > 0."),
    (check_positive, ("x", -0.5), {"zero": True}, ValueError, "Invalid x=-0.5: must be >= 0."),
    (check_positive, ("x", math.nan), {}, ValueError, "Invalid x=nan: must be > 0."),
    (check_positive, ("x", math.nan), {"zero": True}, ValueError, "Invalid x=nan: must be >= 0."),
    (check_positive, ("x", "1"), {}, TypeError, "Invalid x='1': must be a number, got str."),
    (check_positive, ("x", True), {}, TypeError, "Invalid x=True: must be a number, got bool."),
    (check_positive, ("x", None), {}, TypeError, "Invalid x=None: must be a number, got NoneType."),
    (check_in_range, ("x", 1, 0, 1), {}, ValueError, "Invalid x=1: must be in [0, 1)."),
    (check_in_range, ("x", -1, 0, 1), {}, ValueError, "Invalid x=-1: must be in [0, 1)."),
    (
        check_in_range,
        ("x", 0, 0, 1),
        {"include_low": False, "include_high": True},
        ValueError,
        "Invalid x=0: must be in (0, 1].",
    ),
    (check_in_range, ("x", math.nan, 0, 1), {}, ValueError, "Invalid x=nan: must be in [0, 1)."),
    (check_in_range, ("x", [], 0, 1), {}, TypeError, "Invalid x=[]: must be a number, got list."),
    (
        check_interval,
        ("x", 0),
        {},
        ValueError,
        "Invalid x=0: must be an integer >= 1, in optimizer steps.",
    ),
    (
        check_interval,
        ("x", 2.0),
        {},
        TypeError,
        "Invalid x=2.0: must be an integer >= 1, in optimizer steps, got float.",
    ),
    (
        check_interval,
        ("x", True),
        {},
        TypeError,
        "Invalid x=True: must be an integer >= 1, in optimizer steps, got bool.",
    ),
    (check_choice, ("x", "c", "ab"), {}, ValueError, "Invalid x='c': must be one of 'a', 'b'."),
    (check_choice, ("x", None, "ab"), {}, ValueError, "Invalid x=None: must be one of 'a', 'b'."),
]


@pytest.mark.parametrize(("check", "args", "kwargs", "error", "text"), BAD)
def test_refused(
    check: Callable[..., None],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    error: type[Exception],
    text: str,
) -> None:
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        check(*args, **kwargs)
