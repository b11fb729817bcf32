"""AdamQLR and SGDQLR against trajectories of the authors' own code (arXiv:2310.14963)."""

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.golden.adamqlr_files import Trajectory

FAMILY = "adamqlr"
# The uncapped preset takes such steps, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:AdamQLR derived a step length:RuntimeWarning")
TIGHT_STEPS = 5
TIGHT, LOOSE = 1e-8, 1e-6

# Recorded name -> our name in optimizer.stats.
SCALARS = {
    "loss": "loss",
    "alpha": "step_length",
    "g_dot_d": "slope",
    "dCd": "curvature",
    "damping": "damping",
    "rho": "reduction_ratio",
    "model_change": "quad_model_change",
    "new_loss": "new_loss",
}


def tolerance(step: int) -> float:
    """Relative tolerance after a number of steps."""
    return TIGHT if step <= TIGHT_STEPS else LOOSE


def compare(trajectory: Trajectory, step: int, stats: dict[str, Tensor], model: nn.Module) -> None:
    """Compare one step (counted from 1) with the recording."""
    rtol = tolerance(step)
    compared = 0
    for theirs, ours in SCALARS.items():
        expected = float(trajectory.arrays[theirs][step - 1])
        if np.isnan(expected):
            continue
        compared += 1
        # Slopes and ratios pass through zero: there only the size of their terms is a scale.
        atol = rtol if theirs in ("rho", "g_dot_d") else rtol * 1e-2
        assert float(stats[ours]) == pytest.approx(expected, rel=rtol, abs=atol), (theirs, step)
    assert compared >= 4
    expected_params = trajectory.parameters(step)
    if expected_params is not None:
        for parameter, value in zip(model.parameters(), expected_params, strict=True):
            scale = float(value.abs().max())
            torch.testing.assert_close(parameter.detach(), value, rtol=rtol, atol=rtol * scale)


def test_attached_model(golden_file: Path) -> None:
    trajectory = Trajectory(golden_file)
    model = trajectory.model()
    optimizer = trajectory.optimizer(model.parameters())
    criterion = optimizer.attach_model(model, trajectory.loss_fn, directional="jvp")
    for step, (x, y) in enumerate(trajectory.epochs(), start=1):
        optimizer.param_groups[0]["lr"] = trajectory.envelope(step - 1)
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
        compare(trajectory, step, optimizer.stats, model)
    assert trajectory.stored_steps()[-1] == trajectory.steps


class StockModule(L.LightningModule):
    """A module that knows nothing of curvature."""

    def __init__(self, trajectory: Trajectory) -> None:
        super().__init__()
        self.net = trajectory.model()
        self.trajectory = trajectory
        self.seen: list[dict[str, Tensor]] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = self.trajectory.loss_fn(self.net(x), y)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = self.trajectory.optimizer(self.parameters())
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.trajectory.envelope)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class Comparison(L.Callback):
    """Compares after every optimizer step."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        compare(
            pl_module.trajectory, trainer.global_step, trainer.optimizers[0].stats, pl_module.net
        )


@pytest.mark.parametrize("route", ["strategy", "callback"])
def test_trainer(golden_file: Path, route: str, tmp_path: Path) -> None:
    trajectory = Trajectory(golden_file)
    module = StockModule(trajectory)
    from lightning_curvature import CurvatureCallback, SingleDeviceCurvatureStrategy

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
        trainer.fit(module, DataLoader(list(trajectory.epochs()), batch_size=None))
    assert trainer.global_step == trajectory.steps
