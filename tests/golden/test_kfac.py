"""K-FAC against trajectories of kfac-jax (arXiv:1503.05671)."""

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.utils.data import DataLoader

from lightning_curvature import vectors
from lightning_curvature.optim.kfac import KFAC
from lightning_curvature.oracle.replay import load_forward_mode
from tests.golden.kfac_files import Trajectory, close, compare_factors, run_on_files

TIGHT_STEPS = 5
TIGHT, LOOSE = 1e-8, 1e-6
EPSILON = float(np.finfo(np.float64).eps)

# Recorded name -> our name in optimizer.stats.
SCALARS = {
    "loss": "loss",
    "new_loss": "new_loss",
    "damping_after": "damping",
    "rho": "reduction_ratio",
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    run_on_files(metafunc, "trajectory_file", trajectories=True)


def tolerance(step: int) -> float:
    """Relative tolerance after a number of steps."""
    return TIGHT if step <= TIGHT_STEPS else LOOSE


def compare_scalars(trajectory: Trajectory, step: int, stats: dict[str, Tensor]) -> None:
    """Compare the numbers of one step (counted from 1) with the recording."""
    rtol = tolerance(step)
    arrays = trajectory.arrays
    names = dict(SCALARS)
    if trajectory.arguments["adaptive_lr"] or trajectory.arguments["norm_constraint"] is None:
        names["learning_rate"] = "lr"
    names["momentum"] = "momentum"
    if not np.isnan(arrays["rho"][step - 1]):
        names["quad_model_change"] = "quad_model_change"
    compared = set()
    for theirs, ours in names.items():
        expected = float(arrays[theirs][step - 1])
        if np.isnan(expected):
            continue
        compared.add(theirs)
        # Some pass through zero, and losses go down to the rounding of their logits.
        scale = 1.0 if theirs in ("rho", "momentum") else float(np.nanmax(abs(arrays[theirs])))
        atol = rtol * scale * (1 if theirs in ("rho", "momentum", "quad_model_change") else 1e-6)
        assert float(stats[ours]) == pytest.approx(expected, rel=rtol, abs=atol), (theirs, step)
    assert {"loss", "damping_after", "momentum"} <= compared


def compare_lists(ours: list[Tensor], expected: list[Tensor], rtol: float) -> None:
    for x, value in zip(ours, expected, strict=True):
        close(x, value, rtol)


def compare_parameters(trajectory: Trajectory, step: int, model: nn.Module) -> None:
    expected = trajectory.all_tensors(f"params/step_{step}")
    if expected is not None:
        compare_lists(list(model.parameters()), expected, tolerance(step))


class Step(NamedTuple):
    """What one step did: delta = -alpha Delta + beta v.

    Attributes:
        before: Parameters before the step.
        direction: Delta.
        velocity: v.
        grads: Gradient.
        x: Inputs of the batch.
        coefficients: -alpha and beta.
    """

    before: list[Tensor]
    direction: list[Tensor]
    velocity: list[Tensor]
    grads: list[Tensor]
    x: Tensor
    coefficients: Tensor

    @property
    def pair(self) -> tuple[list[Tensor], list[Tensor]]:
        return self.direction, self.velocity

    def gram(self) -> Tensor:
        return torch.tensor([[vectors.dot(u, v) for v in self.pair] for u in self.pair])

    def slopes(self) -> Tensor:
        return torch.tensor([vectors.dot(u, self.grads) for u in self.pair])

    def curvature(self, trajectory: Trajectory, model: nn.Module) -> Tensor:
        """Return V^T C V from the definition of the Gauss-Newton matrix."""
        names = [name for name, _ in model.named_parameters()]
        point = dict(zip(names, self.before, strict=True))

        def outputs(values: dict[str, Tensor]) -> Tensor:
            return functional_call(model, values, (self.x,))

        load_forward_mode()
        changes = []
        for tangent in self.pair:
            z, u = jvp(outputs, (point,), (dict(zip(names, tangent, strict=True)),))
            if trajectory.is_classification:
                p = torch.softmax(z, 1)
                u = p.sqrt() * (u - (p * u).sum(1, keepdim=True))
            changes.append(u.flatten() / len(self.x) ** 0.5)
        matrix = torch.stack(changes)
        return matrix @ matrix.mT


def taken(model: nn.Module, optimizer: KFAC, rate: float | None, x: Tensor) -> Step:
    """Take a step.

    Args:
        model: The model.
        optimizer: The optimizer.
        rate: The learning rate if it is given.
        x: Inputs of the batch.
    """
    params = list(model.parameters())
    before = [p.detach().clone() for p in params]
    velocity = [
        optimizer.state[p].get("velocity", torch.zeros_like(p)).detach().clone() for p in params
    ]
    optimizer.step()
    alpha = float(optimizer.stats["lr"]) if rate is None else rate
    beta = float(optimizer.stats["momentum"])
    direction = [
        (beta * v - (p.detach() - old)) / alpha
        for p, old, v in zip(params, before, velocity, strict=True)
    ]
    grads = [p.grad.clone() for p in params]
    w = torch.tensor([-alpha, beta], dtype=torch.float64)
    return Step(before, direction, velocity, grads, x, w)


def compare_model(
    trajectory: Trajectory, number: int, step: Step, model: nn.Module, measured: list[Any]
) -> None:
    """Compare the quadratic model of a step that was not undone."""
    rtol, index = tolerance(number), number - 1
    matrix, squares, slopes = step.curvature(trajectory, model), step.gram(), step.slopes()
    expected = {n: torch.from_numpy(trajectory.arrays[f"quad_{n}"][index]) for n in "ADb"}
    # Delta comes from the change of the parameters, here and there: no better than their rounding.
    least = 10 * EPSILON * float(vectors.norm(step.before) / step.coefficients[0].abs()) / rtol
    lengths = expected["D"].diagonal().sqrt().clamp_min(least)
    recorded = [np.diagonal(trajectory.arrays[f"quad_{n}"], 0, 1, 2) for n in "AD"]
    with np.errstate(invalid="ignore"):
        steepest = float(np.nanmax(recorded[0] / recorded[1]))
    sizes = expected["A"].diagonal().sqrt().clamp_min(least * steepest**0.5)
    # Entries off the diagonal may be near zero.
    assert ((matrix - expected["A"]).abs() <= rtol * sizes[:, None] * sizes).all(), number
    assert ((squares - expected["D"]).abs() <= rtol * lengths[:, None] * lengths).all(), number
    scale = lengths * vectors.norm(step.grads)
    assert ((slopes - expected["b"]).abs() <= rtol * scale).all(), number
    for answer in measured:
        error = (answer.matrix - expected["A"]).abs()
        assert (error <= rtol * sizes[:, None] * sizes).all(), number
    assert len(measured) == int(trajectory.is_adaptive)
    change = trajectory.arrays["quad_model_change"][index]
    if trajectory.is_adaptive and not np.isnan(change):
        matrix = matrix + trajectory.l2_reg * squares
        if trajectory.arguments.get("include_damping_in_quad_change"):
            matrix = matrix + float(trajectory.arrays["damping_used"][index]) * squares
        w = step.coefficients
        assert float(w @ matrix @ w / 2 + w @ slopes) == pytest.approx(change, rel=rtol), number


def compare_step_length(
    trajectory: Trajectory, number: int, step: Step, stats: dict[str, Tensor]
) -> None:
    """Compare Delta with the recording, and its size."""
    rtol = tolerance(number)
    expected = trajectory.all_tensors(f"precond_grad/step_{number}")
    if expected is not None:
        compare_lists(step.direction, expected, rtol)
    size = float(trajectory.arrays["scaled_grad_norm_sq"][number - 1])
    if not np.isnan(size):
        limit = trajectory.arguments["norm_constraint"]
        rate = trajectory.arguments["lr"]
        largest = float(np.nanmax(trajectory.arrays["scaled_grad_norm_sq"]))
        assert float(stats["scaled_grad_norm_sq"]) == pytest.approx(
            size, rel=rtol, abs=1e-6 * rtol * largest
        )
        used = rate * min(1.0, (limit / size) ** 0.5)
        assert float(stats["lr"]) == pytest.approx(used, rel=rtol)


def test_attached_model(trajectory_file: Path) -> None:
    trajectory = Trajectory(trajectory_file)
    arrays = trajectory.arrays
    model = trajectory.model()
    optimizer = trajectory.optimizer(model.parameters())
    criterion = optimizer.attach_model(model, trajectory.loss_fn(model), directional="jvp")
    oracle = optimizer.oracle
    measured: list[Any] = []
    quadratic = oracle.quadratic
    oracle.quadratic = lambda *a, **k: measured.append(quadratic(*a, **k)) or measured[-1]
    rate = None if trajectory.arguments["adaptive_lr"] else trajectory.arguments["lr"]
    stored = dict.fromkeys(("params", "factors", "precond_grad"), 0)
    for number, (x, y) in enumerate(trajectory.epochs(), start=1):
        measured.clear()
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        used = float(arrays["damping_used"][number - 1])
        assert optimizer.damping == pytest.approx(used, rel=tolerance(number))
        step = taken(model, optimizer, rate, x)
        compare_scalars(trajectory, number, optimizer.stats)
        compare_parameters(trajectory, number, model)
        if float(arrays["step_rejected"][number - 1]) == 1.0:
            assert float(optimizer.stats["step_rejected"]) == 1.0
            compare_lists(list(model.parameters()), step.before, 0.0)
        else:
            assert float(optimizer.stats.get("step_rejected", 0.0)) == 0.0
            compare_model(trajectory, number, step, model, measured)
            compare_step_length(trajectory, number, step, optimizer.stats)
        *_, (_, last, _) = trajectory.named_layers(model)
        total = float(optimizer._states[last]["positions"])
        for theirs, ours, layer in trajectory.named_layers(model):
            if f"factors/step_{number}/{theirs}/A" in arrays:
                found = tuple(arrays[f"factors/step_{number}/{theirs}/{f}"] for f in "AG")
                state, rtol = optimizer._states[ours], tolerance(number)
                compare_factors(state, layer, found, rtol=rtol, total=total)
        for kind in stored:
            prefix = f"{kind}/step_{number}/"
            stored[kind] += any(key.startswith(prefix) for key in arrays)
    for kind, count in stored.items():
        recorded = {key.split("/")[1] for key in arrays if key.startswith(f"{kind}/")}
        assert count == len(recorded) > 0


class StockModule(L.LightningModule):
    """A module that knows nothing of curvature."""

    def __init__(self, trajectory: Trajectory) -> None:
        super().__init__()
        self.net = trajectory.model()
        self.trajectory = trajectory

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return self.trajectory.loss_fn(self.net)(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.trajectory.optimizer(self.parameters())


class Comparison(L.Callback):
    """Compares after every optimizer step."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        step = trainer.global_step
        compare_scalars(pl_module.trajectory, step, trainer.optimizers[0].stats)
        compare_parameters(pl_module.trajectory, step, pl_module.net)


@pytest.mark.parametrize("route", ["strategy", "callback"])
def test_trainer(trajectory_file: Path, route: str, tmp_path: Path) -> None:
    from lightning_curvature import CurvatureCallback, SingleDeviceCurvatureStrategy

    trajectory = Trajectory(trajectory_file)
    callbacks: list[L.Callback] = [Comparison()]
    strategy: Any = "auto"
    if route == "strategy":
        strategy = SingleDeviceCurvatureStrategy(directional="jvp")
    else:
        callbacks.append(CurvatureCallback(directional="jvp"))
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=strategy,
        precision="64-true",
        max_epochs=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        trainer.fit(StockModule(trajectory), DataLoader(list(trajectory.epochs()), batch_size=None))
    assert trainer.global_step == trajectory.steps
