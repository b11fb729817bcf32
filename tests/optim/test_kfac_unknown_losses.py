"""K-FAC where a part of the loss is not known: its curvature is zero, the damping scales it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature import EKFAC, KFAC, CurvatureOptimizer


class TwoHeads(nn.Module):
    """The loss of the second head is written by hand, and so is a learned weight of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.known, self.unknown = nn.Linear(5, 8), nn.Linear(8, 3), nn.Linear(8, 2)
        self.log_weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return both outputs."""
        hidden = torch.tanh(self.body(x))
        return self.known(hidden), self.unknown(hidden)


@pytest.mark.filterwarnings("ignore:.*of the loss does not come from a captured loss")
@pytest.mark.parametrize("cls", [KFAC, EKFAC])
def test_everything_moves(cls: type[CurvatureOptimizer]) -> None:
    torch.manual_seed(0)
    model = TwoHeads()
    optimizer = cls(model.parameters())
    before = [p.detach().clone() for p in model.parameters()]

    def loss(outputs: tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
        weight = torch.exp(-model.log_weight[0])
        known = F.cross_entropy(outputs[0], labels) * weight + 0.5 * model.log_weight[0]
        return known + 0.05 * (outputs[1] - 3).square().mean()

    criterion = optimizer.attach_model(model, loss)
    x, labels = torch.randn(32, 5), torch.randint(3, (32,))
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        value = criterion(model(x), labels)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.6 * losses[0]
    for old, (name, p) in zip(before, model.named_parameters(), strict=True):
        assert (p.detach() - old).norm() > 1e-2, name
