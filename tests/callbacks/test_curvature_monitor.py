"""Tests of lightning_curvature/callbacks/curvature_monitor.py."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, TensorDataset

from lightning_curvature import AdamQLR, CurvatureMonitor
from lightning_curvature.callbacks import curvature_monitor
from lightning_curvature.callbacks.curvature_monitor import plot_history
from tests.helpers.monitoring import (
    PNG_SIGNATURE,
    Model,
    RecordingLogger,
    StatsSGD,
    TwoOptimizers,
    fit,
)


@pytest.mark.parametrize(
    ("log_every_n_steps", "every_n_steps", "expected"),
    [
        (1, None, [1, 2, 3, 4, 5, 6, 7, 8]),
        (4, None, [4, 8]),
        (4, 3, [3, 6]),
        (50, 1, [*range(1, 9)]),
    ],
)
def test_steps_logged(
    tmp_path: Path, log_every_n_steps: int, every_n_steps: int | None, expected: list[int]
) -> None:
    loggers = [RecordingLogger(), RecordingLogger()]
    model = Model()
    monitor = CurvatureMonitor(every_n_steps, plot=False)
    trainer = fit(tmp_path, monitor, model, logger=loggers, log_every_n_steps=log_every_n_steps)
    assert loggers[0].steps == expected
    assert loggers[0].rows == loggers[1].rows
    assert monitor.history["step"] == expected
    assert monitor.history["loss"] == expected  # the stand-in reports its step number
    assert trainer.optimizers[0].stats.read_at == set(expected)  # nothing read on other steps


def test_keys_and_values(tmp_path: Path) -> None:
    logger = RecordingLogger()
    fit(tmp_path, CurvatureMonitor(plot=False), logger=logger, limit_train_batches=2)
    (_, first), (_, second) = logger.rows
    assert first == {
        "curvature/loss": 1.0,
        "curvature/lr": pytest.approx(0.01),
        "curvature/damping": pytest.approx(1e-3),
        "curvature/skipped_steps": 0.0,
    }
    assert second["curvature/reduction_ratio"] == 0.5
    assert all(type(value) is float for value in second.values())


def test_accumulation_logs_once_per_optimizer_step(tmp_path: Path) -> None:
    logger = RecordingLogger()
    monitor = CurvatureMonitor(plot=False)
    fit(tmp_path, monitor, logger=logger, accumulate_grad_batches=3)
    assert logger.steps == [1, 2, 3]  # 8 micro-batches: the last window is short


def test_several_optimizers_get_suffixes(tmp_path: Path) -> None:
    logger = RecordingLogger()
    monitor = CurvatureMonitor()
    fit(tmp_path, monitor, TwoOptimizers(), logger=logger, log_every_n_steps=3)
    # global_step is 2, 4, ...: logged whenever a multiple of 3 was passed
    assert logger.steps == [4, 6, 10, 12, 16]
    assert {"curvature/damping/opt0", "curvature/damping/opt1"} <= set(logger.rows[0][1])
    _, axes = plot_history(monitor.history)
    assert len(axes[0].get_lines()) == 2


def test_only_optimizers_with_stats_are_logged(tmp_path: Path) -> None:
    logger = RecordingLogger()
    monitor = CurvatureMonitor(plot=False)
    fit(tmp_path, monitor, TwoOptimizers(plain_first=True), logger=logger)
    assert all(key.endswith("/opt1") for key in logger.rows[0][1])


def test_progress_bar(tmp_path: Path) -> None:
    trainer = fit(
        tmp_path, CurvatureMonitor(plot=False), callbacks=[TQDMProgressBar()],
        enable_progress_bar=True,
    )  # fmt: skip
    shown = trainer.progress_bar_metrics
    assert shown["damping"] == pytest.approx(1e-3)
    assert shown["reduction_ratio"] == 0.5
    assert shown["lr"] == pytest.approx(0.01)
    assert "loss" not in shown


class Clipping(StatsSGD):
    """Reports a win rate too, as Sophia does."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self.stats["win_rate"] = torch.tensor(0.25)
        return loss


def test_progress_bar_shows_the_win_rate(tmp_path: Path) -> None:
    trainer = fit(
        tmp_path, CurvatureMonitor(plot=False), Model(Clipping), callbacks=[TQDMProgressBar()],
        enable_progress_bar=True,
    )  # fmt: skip
    assert trainer.progress_bar_metrics["win_rate"] == 0.25


def test_progress_bar_can_be_left_alone(tmp_path: Path) -> None:
    monitor = CurvatureMonitor(plot=False, prog_bar=False)
    trainer = fit(tmp_path, monitor, callbacks=[TQDMProgressBar()], enable_progress_bar=True)
    assert "damping" not in trainer.progress_bar_metrics


def test_picture_in_log_dir(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="csv")
    trainer = fit(tmp_path, CurvatureMonitor(), logger=logger)
    assert trainer.log_dir is not None
    assert Path(trainer.log_dir, "curvature.png").read_bytes().startswith(PNG_SIGNATURE)


@pytest.mark.parametrize(
    ("filename", "start"), [("sub/curves.pdf", b"%PDF"), ("curves", PNG_SIGNATURE)]
)
def test_filename(tmp_path: Path, filename: str, start: bytes) -> None:
    fit(tmp_path, CurvatureMonitor(filename=filename))
    assert (tmp_path / filename).read_bytes().startswith(start)


def test_no_logger_still_collects_and_draws(tmp_path: Path) -> None:
    monitor = CurvatureMonitor()
    fit(tmp_path, monitor)
    assert len(monitor.history["step"]) == 8
    assert (tmp_path / "curvature.png").exists()


@pytest.mark.parametrize("kwargs", [{"plot": False}, {"every_n_steps": 100}])
def test_no_picture(tmp_path: Path, kwargs: dict[str, Any]) -> None:
    fit(tmp_path, CurvatureMonitor(**kwargs))
    assert not list(tmp_path.iterdir())


def test_fast_dev_run_leaves_no_file(tmp_path: Path) -> None:
    monitor = CurvatureMonitor()
    fit(tmp_path, monitor, fast_dev_run=2, log_every_n_steps=50)
    assert monitor.history["step"] == [1, 2]
    assert not list(tmp_path.iterdir())


def test_barebones_trainer(tmp_path: Path) -> None:
    monitor = CurvatureMonitor()
    trainer = Trainer(
        barebones=True, accelerator="cpu", max_steps=2, callbacks=[monitor],
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Model())
    assert monitor.history == {"step": []}


class Fails(Model):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 5:
            raise RuntimeError("the sixth batch is broken")
        return super().training_step(batch, batch_idx)


def test_exception_still_draws(tmp_path: Path) -> None:
    monitor = CurvatureMonitor()
    with pytest.raises(RuntimeError, match="the sixth batch is broken"):
        fit(tmp_path, monitor, Fails())
    assert len(monitor.history["step"]) == 5
    assert (tmp_path / "curvature.png").exists()


def test_exception_is_not_hidden_by_a_failing_picture(tmp_path: Path) -> None:
    monitor = CurvatureMonitor(filename="curvature.nonsense")
    with (
        pytest.warns(UserWarning, match="CurvatureMonitor could not write curvature.nonsense"),
        pytest.raises(RuntimeError, match="the sixth batch is broken"),
    ):
        fit(tmp_path, monitor, Fails())


@pytest.mark.parametrize(("every", "expected"), [(None, [6]), (1, [2, 4, 6, 6]), (2, [4, 6])])
def test_pictures_between_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int | None, expected: list[int]
) -> None:
    drawn: list[int] = []

    def note(figure: Any, folder: str, filename: str) -> None:
        assert (folder, filename) == (str(tmp_path), "curvature.png")
        drawn.append(int(monitor.history["step"][-1]))

    monkeypatch.setattr(curvature_monitor, "write_picture", note)
    monitor = CurvatureMonitor(plot_every_n_epochs=every)
    fit(tmp_path, monitor, max_epochs=3, limit_train_batches=2)
    assert drawn == expected


def test_training_survives_a_failing_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        if len(monitor.history["step"]) < 4:
            raise OSError("no room")

    monkeypatch.setattr(curvature_monitor, "write_picture", fail)
    monitor = CurvatureMonitor(plot_every_n_epochs=1)
    with pytest.warns(UserWarning, match="could not write curvature.png: no room"):
        fit(tmp_path, monitor, max_epochs=2, limit_train_batches=2)
    assert len(monitor.history["step"]) == 4


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "is_global_zero", False)
    monitor = CurvatureMonitor()
    fit(tmp_path, monitor)
    assert not (tmp_path / "curvature.png").exists()


def test_optimizer_without_stats(tmp_path: Path) -> None:
    def sgd(params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.1)

    with pytest.raises(
        MisconfigurationException,
        match=r"found no optimizer with `stats`\. Got: SGD\. Use an optimizer of .* AdamQLR",
    ):
        fit(tmp_path, CurvatureMonitor(), Model(sgd))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"every_n_steps": 0}, ValueError, r"Invalid every_n_steps=0: must be an integer >= 1"),
        ({"every_n_steps": 1.5}, TypeError, r"Invalid every_n_steps=1\.5: must be an integer"),
        ({"filename": ""}, ValueError, r"Invalid filename='': must not be empty\."),
        (
            {"plot_every_n_epochs": 0},
            ValueError,
            r"Invalid plot_every_n_epochs=0: must be in \[1, inf\)\.",
        ),
        ({"max_points": 1}, ValueError, r"Invalid max_points=1: must be in \[2, inf\)\."),
    ],
)
def test_argument_errors(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CurvatureMonitor(**kwargs)


def test_matplotlib_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lightning-curvature\[demo\]"'):
        fit(tmp_path, CurvatureMonitor())
    fit(tmp_path, CurvatureMonitor(plot=False))


def test_pyplot_is_not_touched(tmp_path: Path) -> None:
    loaded = "matplotlib.pyplot" in sys.modules
    fit(tmp_path, CurvatureMonitor())
    assert ("matplotlib.pyplot" in sys.modules) == loaded


def test_max_points_in_a_run(tmp_path: Path) -> None:
    monitor = CurvatureMonitor(max_points=4)
    fit(tmp_path, monitor)
    assert monitor.history["step"] == [1, 3, 5, 7]


def test_resume_continues_where_training_does(tmp_path: Path) -> None:
    data = DataLoader(TensorDataset(torch.randn(8, 32)), collate_fn=lambda rows: rows[0][0])
    logger = RecordingLogger()
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "default_root_dir": tmp_path,
        "log_every_n_steps": 5,
        "limit_val_batches": 0,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = Trainer(max_epochs=1, logger=False, callbacks=[CurvatureMonitor()], **settings)
    trainer.fit(Model(), data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    monitor = CurvatureMonitor(plot=False)
    trainer = Trainer(max_epochs=2, logger=logger, callbacks=[monitor], **settings)
    trainer.fit(Model(), data, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert logger.steps == [10, 15]


def test_second_run_starts_a_new_history(tmp_path: Path) -> None:
    monitor = CurvatureMonitor(plot=False)
    fit(tmp_path, monitor)
    fit(tmp_path, monitor, limit_train_batches=3)
    assert monitor.history["step"] == [1, 2, 3]


def test_real_optimizer(tmp_path: Path) -> None:
    class Regression(BoringModel):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return torch.nn.functional.mse_loss(self.layer(batch), torch.ones(1, 2))

        def configure_optimizers(self) -> Any:
            return AdamQLR(self.parameters())

    logger = RecordingLogger()
    fit(
        tmp_path, CurvatureMonitor(), Regression(), logger=logger, limit_train_batches=3,
        strategy="single_device_curvature",
    )  # fmt: skip
    expected = ["loss", "new_loss", "lr", "damping", "reduction_ratio", "quad_model_change"]
    expected += ["slope", "curvature", "grad_norm", "update_norm", "skipped_steps"]
    assert set(logger.rows[-1][1]) >= {f"curvature/{name}" for name in expected}
