"""The self-check, the choice of method and its fall-backs (oracle/window.py, self_check.py)."""

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_curvature.oracle.window import WindowOracle
from tests.helpers.dense import flatten, mlp
from tests.helpers.losses import inputs, labels
from tests.helpers.probing import Probe, assert_bitwise, parameters_and_buffers

SEED = 6


class Rounding(nn.Module):
    """Quantizer with a straight-through gradient: finite differences see a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of rounded activations."""
        hidden = 50 * self.first(x)
        return self.out((hidden + (hidden.round() - hidden).detach()) / 50)


class Reentrant(nn.Module):
    """Reentrant checkpoint: forward mode silently loses its tangent."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(5, 8), nn.Tanh())
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        hidden = checkpoint(self.inner, x.requires_grad_(), use_reentrant=True)
        return self.out(hidden)


def _only_first(model: nn.Module) -> list[Tensor]:
    """Return a direction in the first layer, where the silent failure sits."""
    first = getattr(model, "first", None) or model.inner
    moved = {id(p) for p in first.parameters()}
    return [p.grad.clone() if id(p) in moved else torch.zeros_like(p) for p in model.parameters()]


def test_self_check_finds_straight_through_estimators() -> None:
    """Finite differences give zero; the self-check notices and goes on in forward mode."""
    torch.manual_seed(SEED)
    model = Rounding().double()
    optimizer = Probe(model.parameters())
    criterion = optimizer.attach_model(model, F.cross_entropy)
    criterion(model(inputs()), labels()).backward()
    direction = _only_first(model)
    expected = sum((p.grad * d).sum() for p, d in zip(model.parameters(), direction, strict=True))
    with pytest.warns(RuntimeWarning, match="[Ss]elf-check.*'jvp'"):
        answer = optimizer.oracle.directional(direction, grad_slope=expected)
    assert optimizer.oracle.method == "jvp"
    assert answer.slope.item() == pytest.approx(expected.item(), rel=1e-12)


def test_self_check_finds_lost_tangents() -> None:
    """With forward mode asked for by name, a lost tangent is at least reported."""
    torch.manual_seed(SEED)
    model = Reentrant()
    optimizer = Probe(model.parameters())
    criterion = optimizer.attach_model(model, F.cross_entropy, directional="jvp")
    criterion(model(inputs(torch.float32)), labels()).backward()
    direction = _only_first(model)
    expected = sum((p.grad * d).sum() for p, d in zip(model.parameters(), direction, strict=True))
    with pytest.warns(RuntimeWarning, match="[Ss]elf-check"):
        optimizer.oracle.directional(direction, grad_slope=expected)


class NoForwardMode(nn.Module):
    """Weight norm, which has no forward-mode rule."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.weight_norm(nn.Linear(5, 8))
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.out(torch.tanh(self.first(x)))


def test_auto_falls_back_where_forward_mode_is_impossible() -> None:
    """Under autocast `auto` starts in forward mode; an operator without it ends in differences."""
    torch.manual_seed(SEED)
    model = NoForwardMode()
    optimizer = Probe(model.parameters())
    criterion = optimizer.attach_model(model, F.cross_entropy)
    before = parameters_and_buffers(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = criterion(model(inputs(torch.float32)), labels())
    loss.backward()
    with pytest.warns(RuntimeWarning, match="finite differences"):
        optimizer.oracle.directional(optimizer.direction(list(model.parameters())))
    assert optimizer.oracle.method == "fd"
    assert_bitwise(parameters_and_buffers(model), before)


@pytest.mark.parametrize("share", [0.01, 10.0])
def test_warns_when_much_of_the_loss_has_no_curvature(share: float, recwarn: Any) -> None:
    """A large penalty outside the captured losses is reported once, a small one never."""
    model = mlp()

    def objective(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y) + share * z.square().mean()

    optimizer = Probe(model.parameters(), passes=["directional", "directional"])
    criterion = optimizer.attach_model(model, objective)
    for _ in range(3):
        optimizer.zero_grad()
        criterion(model(inputs(torch.float32)), labels()).backward()
        optimizer.step()
    about = [w for w in recwarn if "does not come from a captured loss" in str(w.message)]
    assert len(about) == (1 if share > 1 else 0)


def test_autocast_region_of_a_plain_loop() -> None:
    """Autocast caches cast weights; the probe must not see the old ones (error of 100 %)."""
    torch.manual_seed(SEED)
    model = nn.Sequential(nn.Linear(5, 32), nn.Tanh(), nn.Linear(32, 4))
    optimizer = Probe(model.parameters())
    criterion = optimizer.attach_model(model, F.cross_entropy, directional="jvp")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = criterion(model(inputs(torch.float32)), labels())
        loss.backward()
        direction = optimizer.direction(list(model.parameters()))
        slope = optimizer.oracle.directional(direction).slope.item()
        base = optimizer.oracle.base_loss().item()
        with torch.no_grad():
            for param, piece in zip(model.parameters(), direction, strict=True):
                param.sub_(0.05 * piece)
        changed = optimizer.oracle.loss().item()
    expected = flatten([p.grad for p in model.parameters()]) @ flatten(direction)
    assert slope == pytest.approx(expected.item(), rel=0.05)
    assert changed - base == pytest.approx(-0.05 * slope, rel=0.5)


class Plateau(nn.Module):
    """Two residuals whose slopes cancel, and one that bends without a slope."""

    def __init__(self) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.tensor([1.001, -1.0, 0.0], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """Return residuals."""
        return torch.stack([self.at[0], self.at[1], 1.0 + 1e4 * self.at[2] ** 2])


def test_a_bias_on_a_plateau_is_no_failure() -> None:
    """A probe sees the bend, the gradient does not; the curvature of both methods is the same."""
    model = Plateau()
    optimizer = Probe(model.parameters())
    criterion = optimizer.attach_model(model, F.mse_loss)
    zeros = torch.zeros(3, dtype=torch.float64)
    criterion(model(zeros), zeros).backward()
    oracle = optimizer.oracle
    assert isinstance(oracle, WindowOracle)
    direction = [torch.ones_like(model.at)]
    oracle.select(list(model.parameters()))
    slope = model.at.grad.sum()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answer = oracle.directional(direction, grad_slope=slope)
    assert oracle.self_check.history[0].deviation > 0.05
    assert oracle.method == "fd"
    torch.testing.assert_close(answer.curvature, torch.tensor(4 / 3, dtype=torch.float64))
    torch.testing.assert_close(answer.slope, slope)
