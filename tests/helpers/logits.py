"""Losses of logits that are parameters themselves, and what a root of a loss is at them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_curvature.oracle.capture import LossCapture
from lightning_curvature.oracle.record import LossTerm, loss_terms
from lightning_curvature.oracle.roots import Root
from tests.helpers.losses import CLASSES


class Logits(nn.Module):
    """A model whose outputs are its parameters."""

    def __init__(self, rows: int = 6, outputs: int = CLASSES) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        z = torch.randn(rows, outputs, generator=generator, dtype=torch.float64)
        self.z = nn.Parameter(z)

    def forward(self) -> Tensor:
        """Return the logits."""
        return self.z


def term_of(total: Callable[[], Tensor]) -> LossTerm:
    """Return the only loss a total consists of, connected to its graph."""
    with LossCapture() as capture:
        loss = total()
    (term,) = loss_terms(loss, capture.calls)
    return term


def at_logits(term: LossTerm, root: Root, z: Tensor) -> Tensor:
    """Propagate a root back to the logits, shape ``[rows, outputs]``."""
    assert root.partners is None
    outputs = [term.loss.arguments[name] for name in root.values]
    return torch.autograd.grad(outputs, z, list(root.values.values()), retain_graph=True)[0]


def logcosh(z: Tensor, y: Tensor) -> Tensor:
    """Return a mean in which the outputs of an example are not independent."""
    return rows_of_logcosh(z, y).mean()


def rows_of_logcosh(z: Tensor, y: Tensor) -> Tensor:
    """Return one loss per example."""
    return (z - y).square().sum(1).cosh().log()


def positions(z: Tensor) -> Tensor:
    """Read six rows of logits as three examples of two positions, shape ``[3, 4, 2]``."""
    return z.view(3, 2, CLASSES).transpose(1, 2)
