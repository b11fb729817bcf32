"""The ordinary PyTorch loop around an attached optimizer, and data for it."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature import CurvatureOptimizer

FEATURES, HIDDEN, CLASSES, OUTPUTS = 5, 7, 4, 3

Make = Callable[[Iterable[Any]], Any]


def half_mse(output: Tensor, target: Tensor) -> Tensor:
    """Return the mean over all entries of 0.5 (output - target)^2."""
    return 0.5 * F.mse_loss(output, target)


def classification(
    steps: int, batch: int = 8, seed: int = 5, dtype: torch.dtype = torch.float64
) -> list[tuple[Tensor, Tensor]]:
    """Draw batches of vectors with labels that a linear map explains in part."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(steps, batch, FEATURES, generator=generator, dtype=torch.float64)
    teacher = torch.randn(FEATURES, CLASSES, generator=generator, dtype=torch.float64)
    noise = torch.randn(steps, batch, CLASSES, generator=generator, dtype=torch.float64)
    return list(zip(x.to(dtype), (x @ teacher + noise).argmax(dim=2), strict=True))


def regression(
    steps: int, batch: int = 8, seed: int = 6, dtype: torch.dtype = torch.float64
) -> list[tuple[Tensor, Tensor]]:
    """Draw batches of vectors with three real targets each."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(steps, batch, FEATURES, generator=generator, dtype=torch.float64)
    teacher = torch.randn(FEATURES, OUTPUTS, generator=generator, dtype=torch.float64)
    noise = torch.randn(steps, batch, OUTPUTS, generator=generator, dtype=torch.float64)
    return list(zip(x.to(dtype), (x @ teacher + noise).to(dtype), strict=True))


def network(outputs: int = CLASSES, seed: int = 1, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Build a smooth two-layer network with reproducible weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, outputs)]
        return nn.Sequential(*layers).to(dtype)


class Shift(nn.Module):
    """Adds a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.ones(OUTPUTS, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """Return the shifted input."""
        return x + self.shift


class LinearModel(nn.Sequential):
    """A matrix and two biases in two modules; linear in all its parameters."""

    def __init__(self) -> None:
        super().__init__(
            nn.Linear(FEATURES, OUTPUTS, dtype=torch.float64),
            Shift(),
        )


class Loop:
    """A model, a loss and an optimizer attached to both.

    Args:
        model: The model.
        make: Called with the parameters, or with what ``groups`` makes of the model.
        loss: Called as ``loss(output, target)``.
        directional: See `CurvatureOptimizer.attach_model`; "jvp" is exact.
        groups: Makes the parameters or parameter groups; by default all parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        make: Make,
        loss: Callable[..., Tensor] = F.cross_entropy,
        directional: Any = "jvp",
        groups: Callable[[nn.Module], Any] = lambda model: model.parameters(),
    ) -> None:
        self.model = model
        self.optimizer: CurvatureOptimizer = make(groups(model))
        self.criterion = self.optimizer.attach_model(model, loss, directional=directional)

    def backward(self, x: Tensor, y: Tensor) -> float:
        """Compute the loss and its gradient."""
        self.optimizer.zero_grad()
        loss = self.criterion(self.model(x), y)
        loss.backward()
        return loss.item()

    def step(self, x: Tensor, y: Tensor) -> float:
        """Train on a batch and return its loss before the step."""
        loss = self.backward(x, y)
        self.optimizer.step()
        return loss

    def train(self, batches: Iterable[tuple[Tensor, Tensor]]) -> list[float]:
        """Train on batches and return their losses."""
        return [self.step(x, y) for x, y in batches]

    def stat(self, name: str) -> float:
        """Read one of the statistics of the last step."""
        return self.optimizer.stats[name].item()

    def theta(self) -> Tensor:
        """Return all parameters as one vector, float64."""
        return torch.cat([p.detach().double().reshape(-1) for p in self.model.parameters()])

    def is_finite(self) -> bool:
        """Tell whether weights, state and hyper-parameters are finite."""
        tensors = [*self.model.parameters(), *self.optimizer.param_groups[0].values()]
        tensors += [t for state in self.optimizer.state.values() for t in state.values()]
        return all(bool(t.isfinite().all()) for t in tensors if isinstance(t, Tensor))
