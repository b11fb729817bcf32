"""Damping as a function of the step: from a start to an end over a number of steps."""

import math
from typing import Literal, get_args

__all__ = ["DAMPING_SHAPES", "DampingShape", "shaped_damping"]

DampingShape = Literal["constant", "linear", "exponential", "cosine"]
DAMPING_SHAPES: tuple[str, ...] = get_args(DampingShape)


def shaped_damping(shape: DampingShape, step: int, start: float, end: float, steps: int) -> float:
    """Return the damping of a step.

    Args:
        shape: "linear" changes by equal amounts, "exponential" by equal factors, "cosine" slowly at
            both ends; "constant" stays at the start.
        step: Optimizer steps done before it.
        start: Damping of the first step.
        end: Damping after ``steps`` steps and from then on.
        steps: Steps from the start to the end; at least 1.

    Examples:
        >>> [shaped_damping("exponential", step, 1.0, 0.01, 2) for step in range(4)]
        [1.0, 0.1, 0.01, 0.01]
    """
    if shape == "constant":
        return start
    done = min(step / steps, 1.0)
    if done == 1.0:  # exactly, without round-off
        return end
    if shape == "exponential":
        return float(start * (end / start) ** done)
    share = done if shape == "linear" else (1 - math.cos(math.pi * done)) / 2
    return start + (end - start) * share
