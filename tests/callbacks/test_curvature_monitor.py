"""Tests of lightning_curvature/callbacks/curvature_monitor.py."""

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, TensorDataset

from lightning_curvature import AdamQLR, CurvatureMonitor
from lightning_curvature.callbacks.curvature_monitor import _History, plot_history

PNG_SIGNATURE = b"\x89PNG"
PANELS = ["loss", "learning rate", "damping", "reduction ratio"]


class WatchedStats(dict[str, torch.Tensor]):
    """Remembers the steps on which the values were looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.read_at: set[int] = set()

    def items(self) -> Any:
        self.read_at.add(int(self["loss"]))
        return super().items()


class StatsSGD(torch.optim.SGD):
    """Stand-in for any optimizer that has ``stats``; the loss it reports is its step number."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.01)
        self.stats = WatchedStats()
        self.steps = 0

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self.steps += 1
        self.stats["loss"] = torch.tensor(float(self.steps), dtype=torch.float64)
        self.stats["lr"] = torch.tensor(0.01)
        self.stats["damping"] = torch.tensor(1e-3)
        self.stats["skipped_steps"] = torch.tensor(0)
        if self.steps > 1:  # not there before the first look at the new loss
            self.stats["reduction_ratio"] = torch.tensor(0.5)
        return loss


class Model(BoringModel):
    def __init__(self, optimizer: type[torch.optim.Optimizer] = StatsSGD) -> None:
        super().__init__()
        self.optimizer_class = optimizer

    def configure_optimizers(self) -> Any:
        return self.optimizer_class(self.parameters())


class TwoOptimizers(BoringModel):
    """Manual optimization: ``global_step`` grows by two per batch."""

    def __init__(self, *, plain_first: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.first = torch.optim.SGD if plain_first else StatsSGD

    def configure_optimizers(self) -> Any:
        return [self.first([self.layer.weight]), StatsSGD([self.layer.bias])], []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.step(batch))
            optimizer.step()


class RecordingLogger(Logger):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "recording"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if any(key.startswith("curvature/") for key in metrics):
            self.rows.append((step, dict(metrics)))

    @property
    def steps(self) -> list[int | None]:
        return [step for step, _ in self.rows]


def fit(
    root: Path, monitor: CurvatureMonitor, model: LightningModule | None = None, **kwargs: Any
) -> Trainer:
    defaults: dict[str, Any] = {
        "max_epochs": 1,
        "limit_train_batches": 8,
        "limit_val_batches": 0,
        "log_every_n_steps": 1,
        "logger": False,
    }
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=root,
        callbacks=[monitor, *kwargs.pop("callbacks", [])],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=kwargs.pop("enable_progress_bar", False),
        **{**defaults, **kwargs},
    )
    trainer.fit(model or Model())
    return trainer


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


def test_history_is_thinned_out_evenly() -> None:
    history = _History(max_points=5)
    for step in range(1, 101):
        history.append(step, {"loss": float(step)})
        assert len(history.as_dict()["step"]) <= 5
    columns = history.as_dict()
    gaps = {b - a for a, b in zip(columns["step"], columns["step"][1:], strict=False)}
    assert gaps == {32.0}
    assert columns["step"][0] == 1.0
    assert columns["loss"] == columns["step"]


def test_history_fills_gaps_with_nan() -> None:
    history = _History(max_points=5)
    history.append(1, {"loss": 1.0})
    history.append(2, {"loss": 2.0, "damping": 3.0})
    columns = history.as_dict()
    assert math.isnan(columns["damping"][0])
    assert columns["damping"][1] == 3.0


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


def test_plot_history_panels() -> None:
    history = {
        "step": [1, 2, 3],
        "loss": [2.0, math.inf, 0.5],
        "new_loss": [1.5, 1.0, math.nan],
        "lr": [0.1, 0.1, 0.05],
        "damping": [1e-3, 2e-3, 1e-3],
        "reduction_ratio": [-1e6, 0.5, 0.9],
        "grad_norm": [1.0, 1.0, 1.0],
    }
    figure, axes = plot_history(history)
    assert [panel.get_ylabel() for panel in axes] == PANELS
    assert [panel.get_yscale() for panel in axes] == ["log", "linear", "log", "linear"]
    assert [line.get_label() for line in axes[0].get_lines()] == ["loss", "new_loss"]
    thresholds = {line.get_ydata()[0] for line in axes[3].get_lines()[1:]}
    assert thresholds == {0.25, 0.75}
    low, high = axes[3].get_ylim()
    assert -1 <= low < 0.25
    assert high > 0.75
    figure.canvas.draw()


def test_plot_history_keeps_linear_axis_for_a_negative_loss() -> None:
    _, axes = plot_history({"step": [1, 2], "loss": [1.0, -1.0]})
    assert axes[0].get_yscale() == "linear"


def test_plot_history_draws_into_given_axes() -> None:
    figure, axes = plot_history({"step": [1, 2], "loss": [2.0, 1.0]})
    again, panels = plot_history({"step": [1, 2], "loss": [3.0, 2.0]}, axes)
    assert again is figure
    assert len(panels[0].get_lines()) == 2


def test_plot_history_errors() -> None:
    _, axes = plot_history({"step": [1]})
    with pytest.raises(ValueError, match=r"Invalid history: must have the key 'step', got \['a'\]"):
        plot_history({"a": [1.0]})
    with pytest.raises(ValueError, match=r"Invalid axes: must be 4, got 3\."):
        plot_history({"step": [1]}, axes[:3])


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
