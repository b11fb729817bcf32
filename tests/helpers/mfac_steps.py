"""Steps of MFAC with gradients that a test draws."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_curvature import MFAC
from lightning_curvature.curvature import gradient_window
from lightning_curvature.optim.diagonal import DiagonalOptimizer

SHAPES = ((3, 2), (4,), ())
# Away from the defaults, so that every argument shows.
USUAL: dict[str, Any] = {"lr": 0.3, "num_grads": 4, "damping": 0.05}

Row = Sequence[Tensor | None]
both_routes = pytest.mark.parametrize("route", ["looking", "branch-free"])


def draw(steps: int, *shapes: tuple[int, ...], seed: int = 0) -> list[list[Tensor]]:
    """Draw gradients of parameters, for several steps, float64."""
    generator = torch.Generator().manual_seed(seed)
    kinds: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    return [[torch.randn(shape, **kinds) for shape in shapes or SHAPES] for _ in range(steps)]


def start(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    """Make parameters, the same ones at every call."""
    return [nn.Parameter(value.to(dtype)) for value in draw(1, *shapes, seed=9)[0]]


def step(optimizer: MFAC, params: Sequence[Tensor], row: Row) -> None:
    """Take a step; None is no gradient."""
    for p, grad in zip(params, row, strict=True):
        p.grad = None if grad is None else grad.to(p.dtype, copy=True)
    optimizer.step()


def trained(rows: Sequence[Row], params: Any = None, **options: Any) -> tuple[MFAC, list[Tensor]]:
    """Take a step per row; return the optimizer and its parameters."""
    params = start() if params is None else params
    optimizer = MFAC(params, **{**USUAL, **options})
    for row in rows:
        step(optimizer, params, row)
    return optimizer, params


def train(rows: Sequence[Row], params: Any = None, **options: Any) -> list[Tensor]:
    """Take a step per row; return the weights."""
    return [p.detach() for p in trained(rows, params, **options)[1]]


def window_of(optimizer: Any) -> dict[str, Any]:
    """Return the window in the state of an optimizer."""
    found: dict[str, Any] = optimizer.state_dict()["curvature"]["window"]
    return found


def force(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the optimizer look at numbers, or do as on devices where that means waiting."""
    if route == "branch-free":
        monkeypatch.setattr(DiagonalOptimizer, "_can_look", lambda *_: False)
        monkeypatch.setattr(gradient_window, "_can_look", lambda _: False)
