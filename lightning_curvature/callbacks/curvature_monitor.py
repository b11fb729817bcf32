"""Log, show and draw what a curvature optimizer did: loss, learning rate, damping, trust."""

import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities import rank_zero_warn
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_curvature.callbacks.curvature_plot import (
    is_series,
    plot_history,
    require_matplotlib,
)
from lightning_curvature.checks import check_in_range, check_interval

__all__ = ["CurvatureMonitor", "plot_history"]

# Shown in the progress bar, in this order.
_PROGRESS_BAR = ("lr", "damping", "reduction_ratio")


class CurvatureMonitor(Callback):
    """Log the ``stats`` of curvature optimizers and draw them when training ends.

    Every entry of ``optimizer.stats`` is logged as ``curvature/<name>``; several optimizers add
    ``/opt0``, ``/opt1``, ... The optimizers of this package offer:

    | key | meaning | unit |
    | --- | --- | --- |
    | `curvature/loss` | loss of the batch before the step | loss |
    | `curvature/new_loss` | loss of the same batch after the step | loss |
    | `curvature/step_length` | learning rate derived, before the schedule | step length |
    | `curvature/lr` | learning rate used, schedule included | step length |
    | `curvature/damping` | damping after this step's adaptation | curvature |
    | `curvature/reduction_ratio` | actual / predicted change of the loss | 1 is perfect |
    | `curvature/quad_model_change` | predicted change of the loss | loss |
    | `curvature/slope` | derivative of the loss along the direction | loss |
    | `curvature/curvature` | quadratic form of the direction, undamped | loss |
    | `curvature/grad_norm` | norm of the gradient | loss / weight |
    | `curvature/update_norm` | norm of the update | weight |
    | `curvature/skipped_steps` | steps skipped by the guards so far | steps |

    The picture has four panels (loss, learning rate, damping, reduction ratio). It is written by
    rank zero when fit ends, also when it ends with an exception.

    Cost: the values are read from the device once per logged step, all together; on other steps
    nothing is read. The callback holds no state that training depends on, so a run may be resumed
    with or without it.

    Args:
        every_n_steps: Log every this many optimizer steps. ``None`` follows the Trainer's
            ``log_every_n_steps``.
        plot: Draw the curves when fit ends. Needs matplotlib (the extra ``demo``).
        filename: Name of the picture inside ``trainer.log_dir``. Its ending picks the format.
        prog_bar: Show learning rate, damping and reduction ratio in the progress bar.
        max_points: Most points kept per curve, at least 2. A longer run is thinned out evenly.

    Raises:
        MisconfigurationException: If no optimizer of the Trainer has ``stats`` (when fit starts).
        ModuleNotFoundError: If ``plot`` is set and matplotlib is missing (in ``setup``).
        ValueError: If an argument is out of range.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_curvature import CurvatureMonitor
        >>> monitor = CurvatureMonitor(every_n_steps=10)
        >>> trainer = Trainer(callbacks=[monitor], accelerator="cpu", enable_checkpointing=False)
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        plot: bool = True,
        filename: str = "curvature.png",
        prog_bar: bool = True,
        max_points: int = 2000,
    ) -> None:
        super().__init__()
        if every_n_steps is not None:
            check_interval("every_n_steps", every_n_steps)
        if not filename:
            raise ValueError(f"Invalid filename={filename!r}: must not be empty.")
        check_in_range("max_points", max_points, 2, math.inf)
        self.every_n_steps = every_n_steps
        self.plot = plot
        self.filename = filename
        self.prog_bar = prog_bar
        self.max_points = max_points
        self._history = _History(max_points)
        self._last_step = 0
        self._log_dir: str | None = None

    @property
    def history(self) -> dict[str, list[float]]:
        """Logged values by name, with the optimizer steps under ``"step"``; a copy."""
        return self._history.as_dict()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the picture can be drawn and note where it goes, on every rank."""
        if stage != "fit" or not self.plot:
            return
        require_matplotlib()
        # Asked for here because `log_dir` is a collective call: at the end only rank zero writes,
        # and after an exception the other ranks may be gone.
        self._log_dir = trainer.log_dir or trainer.default_root_dir

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that there is something to monitor; earlier the optimizers do not exist."""
        if not _monitored(trainer):
            names = ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers)
            raise MisconfigurationException(
                f"CurvatureMonitor found no optimizer with `stats`. Got: {names or 'none'}. Use an "
                "optimizer of lightning_curvature such as AdamQLR, or remove the callback."
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting from the step that training (re)starts at."""
        self._last_step = trainer.global_step
        if self._history.last_step > trainer.global_step:  # another run: do not mix the two
            self._history = _History(self.max_points)

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Log once per optimizer step, where logging is due."""
        if self._is_due(trainer):
            self._log(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the curves."""
        self._write_plot(trainer)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Draw what there is; a failure to do so must not hide the exception."""
        try:
            self._write_plot(trainer)
        except Exception as error:  # whatever drawing raises, the training error is the news
            rank_zero_warn(f"CurvatureMonitor could not write {self.filename}: {error}")

    def _is_due(self, trainer: Trainer) -> bool:
        step, last_step = trainer.global_step, self._last_step
        self._last_step = step
        if step == last_step:  # a micro-batch that did not end its accumulation window
            return False
        interval: int = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
        if interval == 0:  # a barebones Trainer
            return False
        # Several optimizers advance `global_step` by more than one: look for a multiple passed.
        return _is_dev_run(trainer) or step // interval > last_step // interval

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        values: dict[str, float] = {}
        for index, stats in _monitored(trainer).items():
            suffix = f"/opt{index}" if len(trainer.optimizers) > 1 else ""
            values |= {name + suffix: value for name, value in _read(stats).items()}
        if not values:
            return
        self._history.append(trainer.global_step, values)
        metrics = {f"curvature/{name}": value for name, value in values.items()}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        if self.prog_bar and trainer.progress_bar_callback is not None:
            shown = {
                name: value
                for key in _PROGRESS_BAR
                for name, value in values.items()
                if is_series(name, key)
            }
            pl_module.log_dict(
                shown, prog_bar=True, logger=False, on_step=True, on_epoch=False, batch_size=1
            )

    def _write_plot(self, trainer: Trainer) -> None:
        if self._log_dir is None or not trainer.is_global_zero or _is_dev_run(trainer):
            return
        if self._history.last_step < 0:  # nothing was logged
            return
        figure, _ = plot_history(self.history)
        path = os.path.join(self._log_dir, self.filename)
        ending = os.path.splitext(self.filename)[1]
        filesystem = get_filesystem(self._log_dir)
        filesystem.makedirs(os.path.dirname(path), exist_ok=True)
        with filesystem.open(path, "wb") as file:
            figure.savefig(file, format=ending.removeprefix(".") or "png", dpi=120)


class _History:
    """Rows of values by step, thinned out so that it never grows beyond ``max_points`` rows."""

    def __init__(self, max_points: int) -> None:
        self._max_points = max_points
        self._stride = 1
        self._seen = 0
        self._steps: list[int] = []
        self._rows: list[dict[str, float]] = []

    @property
    def last_step(self) -> int:
        """Step of the newest row, -1 if there is none."""
        return self._steps[-1] if self._steps else -1

    def append(self, step: int, values: dict[str, float]) -> None:
        """Keep one row out of ``stride``; when full, drop every other row and double the stride."""
        due = self._seen % self._stride == 0
        self._seen += 1
        if not due:
            return
        if len(self._steps) >= self._max_points:
            del self._steps[1::2], self._rows[1::2]
            self._stride *= 2
            # The row that did not fit is on the coarser grid only if it continues the pattern.
            if (self._seen - 1) % self._stride:
                return
        self._steps.append(step)
        self._rows.append(values)

    def as_dict(self) -> dict[str, list[float]]:
        """Columns by name; NaN where a value was not there yet."""
        names = dict.fromkeys(name for row in self._rows for name in row)
        columns = {name: [row.get(name, math.nan) for row in self._rows] for name in names}
        return {"step": [float(step) for step in self._steps], **columns}


def _is_dev_run(trainer: Trainer) -> bool:
    """Whether this is a trial run, which logs every step and leaves no files."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def _monitored(trainer: Trainer) -> dict[int, Mapping[str, Any]]:
    """Stats of the optimizers that have some, by the optimizer's index in the Trainer."""
    found = {}
    for index, optimizer in enumerate(trainer.optimizers):
        stats = getattr(optimizer, "stats", None)
        if isinstance(stats, Mapping):
            found[index] = stats
    return found


def _read(stats: Mapping[str, Any]) -> dict[str, float]:
    """Read all 0-dim tensors in one transfer from the device."""
    tensors = {name: value for name, value in stats.items() if isinstance(value, Tensor)}
    if not tensors:
        return {name: float(value) for name, value in stats.items()}
    stacked = torch.stack([value.detach().reshape(()) for value in tensors.values()])
    read = dict(zip(tensors, stacked.tolist(), strict=True))
    return {name: float(read.get(name, value)) for name, value in stats.items()}
