"""Optimizers that are told gradients and estimates of the curvature, step by step."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_curvature.oracle import Oracle

Vectors = Sequence[Tensor]


class Scripted(Oracle):
    """Gives prescribed estimates of a diagonal, whatever is asked.

    Args:
        estimates: One list per estimate; a gradient-free parameter has none.

    Attributes:
        asked: Number of estimates given.
    """

    capabilities = frozenset({"sampled", "hvp"})
    ready = True

    def __init__(self, estimates: Iterable[Vectors]) -> None:
        super().__init__()
        self.estimates = iter(estimates)
        self.asked = 0

    def sampled_squares(self) -> list[Tensor]:
        """Give the next estimate."""
        self.asked += 1
        return [x.clone() for x in next(self.estimates)]

    def products(self) -> list[tuple[list[Tensor], list[Tensor]]]:
        """Give the next estimate as a product with ones."""
        found = self.sampled_squares()
        return [([torch.ones_like(x) for x in found], found)]

    def mean_vectors(self, *vectors: Vectors) -> list[list[Tensor]]:
        """There is one rank."""
        return [list(vector) for vector in vectors]

    def base_loss(self) -> Tensor:
        """Give a loss."""
        return torch.zeros(())

    def mean_(self, packed: Tensor) -> Tensor:
        """There is one rank."""
        return packed

    def select(self, params: Vectors) -> None:
        """All is prescribed."""

    def evaluate(self, closure: Any) -> Any: ...
    def loss(self) -> Tensor: ...  # type: ignore[empty-body]
    def directional(self, *args: Any, **kwargs: Any) -> Any: ...
    def hvp(self, *args: Any, **kwargs: Any) -> Any: ...
    def grad_slope(self, slope: Tensor) -> Tensor | None: ...


SHAPES = ((3, 4), (2,), (), (2, 2, 2))


def parameters(
    shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float64, seed: int = 1
) -> list[torch.nn.Parameter]:
    """Draw parameters of several shapes."""
    return [torch.nn.Parameter(x) for x in drawn(shapes, dtype, seed)]


def drawn(
    shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float64, seed: int = 1
) -> list[Tensor]:
    """Draw tensors of several shapes."""
    generator = torch.Generator().manual_seed(seed)
    found = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [x.to(dtype) for x in found]


def script(steps: int, seed: int = 5, scale: float = 1.0, **options: Any) -> list[list[Tensor]]:
    """Draw one list of tensors per step.

    Args:
        steps: Number of steps.
        seed: Seed.
        scale: Their size.
        **options: Of `drawn`.
    """
    return [[scale * x for x in drawn(seed=seed + 100 * i, **options)] for i in range(steps)]


def follow(
    optimizer: Any,
    params: Sequence[torch.nn.Parameter],
    grads: Sequence[Sequence[Tensor | None]],
    after: Callable[[int], None] | None = None,
) -> None:
    """Step with prescribed gradients.

    Args:
        optimizer: Optimizer, attached.
        params: Its parameters.
        grads: One list per step.
        after: Called after every step with its number.
    """
    for step, given in enumerate(grads):
        for p, g in zip(params, given, strict=True):
            p.grad = None if g is None else g.clone().to(p.dtype)
        optimizer.step()
        if after is not None:
            after(step)


def saved_and_loaded(state: Any, path: Path) -> Any:
    """Return what a strict load finds of a saved state."""
    torch.save(state, path)
    return torch.load(path, weights_only=True)
