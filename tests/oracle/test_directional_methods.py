"""Finite differences against forward mode (oracle/directional.py), in plain PyTorch."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.modules import ConvNet, Transformer, images, sequences, token_loss
from tests.helpers.probing import Probe

METHODS = ("fd", "jvp")
WITHIN = 0.01  # finite differences in float32 against forward mode
SEED = 6

Task = tuple[nn.Module, Callable[[Tensor, Tensor], Tensor], Tensor, Tensor]


def _mlp_task() -> Task:
    generator = torch.Generator().manual_seed(41)
    x = torch.randn(64, 20, generator=generator)
    y = torch.randint(5, (64,), generator=generator)
    network = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
    return nn.Sequential(network, nn.Linear(32, 5)), F.cross_entropy, x, y


def _conv_task() -> Task:
    return ConvNet(), F.cross_entropy, *images(32).tensors


def _transformer_task() -> Task:
    return Transformer(), token_loss, *sequences(16).tensors


class Recurrent(nn.Module):
    """Two-layer LSTM with dropout; it keeps references to its weights outside ``_parameters``."""

    def __init__(self, vocabulary: int = 11) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 6)
        self.lstm = nn.LSTM(6, 8, num_layers=2, batch_first=True, dropout=0.2)
        self.out = nn.Linear(8, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits, shape ``[batch, position, vocabulary]``."""
        return self.out(self.lstm(self.embed(tokens))[0])


def _recurrent_task() -> Task:
    return Recurrent(), token_loss, *sequences(16).tensors


TASKS = {
    "mlp": _mlp_task,
    "conv-norm-dropout": _conv_task,
    "transformer": _transformer_task,
    "lstm": _recurrent_task,
}


def trained(task: str, dtype: torch.dtype = torch.float32) -> tuple[Task, list[Tensor]]:
    """Train a task for ten Adam steps and return it with Adam's next direction."""
    torch.manual_seed(SEED)
    model, loss_fn, x, y = TASKS[task]()
    adam = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(10):
        adam.zero_grad()
        loss_fn(model(x), y).backward()
        adam.step()
    direction = [
        (adam.state[p]["exp_avg"] / (adam.state[p]["exp_avg_sq"].sqrt() + 1e-8)).to(dtype)
        for p in model.parameters()
    ]
    x = x.to(dtype) if x.is_floating_point() else x
    return (model.to(dtype), loss_fn, x, y), direction


def measure(
    task: Task, direction: list[Tensor], method: str, curvature: str = "fisher"
) -> tuple[float, float, float]:
    """Return measured slope, slope from the gradient, and curvature."""
    model, loss_fn, x, y = task
    model = copy.deepcopy(model)
    optimizer = Probe(model.parameters())
    criterion = optimizer.attach_model(model, loss_fn, directional=method)
    optimizer.zero_grad()
    torch.manual_seed(SEED)
    criterion(model(x), y).backward()
    expected = sum((p.grad * d).sum() for p, d in zip(model.parameters(), direction, strict=True))
    answer = optimizer.oracle.directional(direction, grad_slope=expected, curvature=curvature)
    assert optimizer.oracle.method == method
    return answer.slope.item(), expected.item(), answer.curvature.item()


@pytest.mark.parametrize("name", TASKS)
def test_finite_differences_against_forward_mode(name: str) -> None:
    """Within one percent in float32, slope and curvature, along Adam's direction."""
    task, direction = trained(name)
    slope, expected, curvature = measure(task, direction, "fd")
    slope_jvp, expected_jvp, curvature_jvp = measure(task, direction, "jvp")
    assert expected == expected_jvp
    assert slope_jvp == pytest.approx(expected, rel=1e-5)
    assert slope == pytest.approx(expected, rel=WITHIN)
    assert curvature == pytest.approx(curvature_jvp, rel=WITHIN)
    assert curvature_jvp > 0


@pytest.mark.parametrize("name", TASKS)
def test_forward_mode_in_float32_against_float64(name: str) -> None:
    """Forward mode loses nothing to finite differences: float32 agrees to single precision."""
    task, direction = trained(name)
    model, loss_fn, x, y = task
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, (nn.MultiheadAttention, nn.LSTM)):
            module.dropout = 0.0
    _, _, single = measure(task, direction, "jvp")
    x = x.double() if x.is_floating_point() else x
    wide = (copy.deepcopy(model).double(), loss_fn, x, y)
    _, _, double = measure(wide, [d.double() for d in direction], "jvp")
    assert single == pytest.approx(double, rel=1e-5)


@pytest.mark.parametrize("name", TASKS)
def test_self_check_to_machine_precision(name: str) -> None:
    """|<g, d> - slope| <= 1e-12 |<g, d>| in float64 with dropout and batch norm."""
    task, direction = trained(name, torch.float64)
    slope, expected, _ = measure(task, direction, "jvp")
    assert abs(slope - expected) <= 1e-12 * abs(expected)
    slope, expected, _ = measure(task, direction, "fd")
    assert abs(slope - expected) <= 1e-4 * abs(expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_quadratic_in_the_direction(method: str, scale: float) -> None:
    """The length of the direction is irrelevant to the accuracy of finite differences."""
    task, direction = trained("mlp")
    slope, _, curvature = measure(task, direction, method)
    scaled = [scale * d for d in direction]
    slope_scaled, _, curvature_scaled = measure(task, scaled, method)
    assert slope_scaled == pytest.approx(scale * slope, rel=1e-3)
    assert curvature_scaled == pytest.approx(scale**2 * curvature, rel=1e-3)
