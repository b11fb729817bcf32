"""Log, show and draw what a curvature optimizer did: loss, learning rate, damping, trust, cost."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities import rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_curvature.callbacks.curvature_cost import CurvatureCost
from lightning_curvature.callbacks.curvature_plot import is_series, plot_history
from lightning_curvature.callbacks.history import History
from lightning_curvature.callbacks.layer_norms import curvature_of_layers, layer_of_parameters
from lightning_curvature.callbacks.pictures import require_matplotlib, write_picture
from lightning_curvature.checks import check_in_range, check_interval

__all__ = ["CurvatureMonitor", "plot_history"]

# Shown in the progress bar, in this order.
_PROGRESS_BAR = ("lr", "damping", "reduction_ratio", "win_rate")


class CurvatureMonitor(Callback):
    """Log the ``stats`` of curvature optimizers, show and draw them.

    Every entry of ``optimizer.stats`` is logged to all loggers as ``curvature/<name>``; several
    optimizers add ``/opt0``, ``/opt1``, ... An optimizer offers those of these it has:

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
    | `curvature/win_rate` | share of the updates that were not clipped | 0 to 1 |
    | `curvature/curvature_drift` | change of the diagonal since the last estimate | relative |
    | `curvature/grad_norm` | norm of the gradient | loss / weight |
    | `curvature/update_norm` | norm of the update | weight |
    | `curvature/hess_diag_norm` | norm of the estimated diagonal | curvature |
    | `curvature/skipped_steps` | steps skipped by the guards so far | steps |
    | `curvature/skipped_refreshes` | estimates of curvature skipped so far | estimates |

    The callback adds, where it can be told:

    | key | meaning | unit |
    | --- | --- | --- |
    | `curvature/cost_percent` | extra time for curvature, spread over all steps | % of a step |
    | `curvature/<state>_norm/<layer>` | norm of, say, `hess_diag` in a layer | its own |
    | `curvature/<state>_sparsity/<layer>` | share of its entries that are zero | 0 to 1 |

    The last two come with ``per_layer``; ``<state>`` is what the optimizer keeps per parameter,
    other than averages of gradients. The picture has a panel for each of loss, learning rate,
    damping, reduction ratio, win rate, norms, drift and cost that has values. It is written by rank
    zero when fit ends, also when it ends with an exception.

    Cost of curvature: the time of the steps that ask the oracle against that of the others around
    them, by medians, times the share of the former. Where every step asks it is the time spent
    inside the oracle, against the rest of the step. There is no number where neither can be told:
    an optimizer that never asks, or a device without a clock of its own (other than CPU and CUDA).

    Cost of the callback: below one percent of a step. Values are read from the device once per
    logged step, all together; nothing waits for it on other steps. A picture takes about a second.
    The callback holds no state that training depends on: resume a run with or without it.

    Args:
        every_n_steps: Log every this many optimizer steps. ``None`` follows the Trainer's
            ``log_every_n_steps``.
        plot: Draw the dashboard when fit ends. Needs matplotlib (the extra ``demo``).
        filename: Name of the picture inside ``trainer.log_dir``. Its ending picks the format.
        prog_bar: Show learning rate, damping, reduction ratio and win rate in the progress bar.
        max_points: Most points kept per curve, at least 2. A longer run is thinned out evenly.
        per_layer: Log the curvature that the optimizer keeps in every layer.
        plot_every_n_epochs: Draw after every this many epochs, too. ``None`` draws at the end only.

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
        per_layer: bool = False,
        plot_every_n_epochs: int | None = None,
    ) -> None:
        super().__init__()
        if every_n_steps is not None:
            check_interval("every_n_steps", every_n_steps)
        if not filename:
            raise ValueError(f"Invalid filename={filename!r}: must not be empty.")
        check_in_range("max_points", max_points, 2, math.inf)
        if plot_every_n_epochs is not None:
            check_in_range("plot_every_n_epochs", plot_every_n_epochs, 1, math.inf)
        self.every_n_steps = every_n_steps
        self.plot = plot
        self.filename = filename
        self.prog_bar = prog_bar
        self.max_points = max_points
        self.per_layer = per_layer
        self.plot_every_n_epochs = plot_every_n_epochs
        self._history = History(max_points)
        self._cost: CurvatureCost | None = None
        self._last_step = 0
        self._log_dir: str | None = None

    @property
    def history(self) -> dict[str, list[float]]:
        """Logged values by name, but those of layers, with the steps as ``"step"``; a copy."""
        return self._history.as_dict()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the picture can be drawn and note where it goes, on every rank."""
        if stage != "fit" or not self.plot:
            return
        require_matplotlib("CurvatureMonitor")
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
            self._history = History(self.max_points)
        optimizers = [trainer.optimizers[index] for index in _monitored(trainer)]
        self._forget_cost()
        self._cost = CurvatureCost(optimizers, trainer.strategy.root_device)
        self._cost.watch()

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock."""
        if self._cost is not None:
            self._cost.batch_starts()

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
        if self._cost is not None:
            self._cost.batch_ends(stepped=trainer.global_step != self._last_step)
        if self._is_due(trainer):
            self._log(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw what there is so far, where that is due."""
        every = self.plot_every_n_epochs
        if every is not None and (trainer.current_epoch + 1) % every == 0:
            self._try_to_plot(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the oracle alone again."""
        self._forget_cost()

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the dashboard."""
        self._write_plot(trainer)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Draw what there is; a failure to do so must not hide the exception."""
        self._forget_cost()
        self._try_to_plot(trainer)

    def _forget_cost(self) -> None:
        if self._cost is not None:
            self._cost.unwatch()
            self._cost = None

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
        values, of_layers = self._read(trainer, pl_module)
        if not values:
            return
        cost = self._cost.percent() if self._cost is not None else None
        if cost is not None:
            values["cost_percent"] = cost
        self._history.append(trainer.global_step, values)
        metrics = {f"curvature/{name}": value for name, value in (values | of_layers).items()}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        if self.prog_bar and trainer.progress_bar_callback is not None:
            # As tensors on the CPU: the progress bar reads them again and again.
            shown = {
                name: torch.tensor(value)
                for key in _PROGRESS_BAR
                for name, value in values.items()
                if is_series(name, key)
            }
            pl_module.log_dict(
                shown, prog_bar=True, logger=False, on_step=True, on_epoch=False, batch_size=1
            )

    def _read(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Read the stats of all optimizers, and what they keep per layer."""
        stats: dict[str, Any] = {}
        of_layers: dict[str, Any] = {}
        layers = layer_of_parameters(pl_module) if self.per_layer else {}
        for index, found in _monitored(trainer).items():
            suffix = f"/opt{index}" if len(trainer.optimizers) > 1 else ""
            stats |= {name + suffix: value for name, value in found.items()}
            if self.per_layer:
                kept = curvature_of_layers(trainer.optimizers[index], layers)
                of_layers |= {name + suffix: value for name, value in kept.items()}
        values = _read_all(stats | of_layers)
        return {name: values[name] for name in stats}, {name: values[name] for name in of_layers}

    def _try_to_plot(self, trainer: Trainer) -> None:
        """Draw; training, or an exception from it, is worth more than a picture."""
        try:
            self._write_plot(trainer)
        except Exception as error:  # whatever drawing raises
            rank_zero_warn(f"CurvatureMonitor could not write {self.filename}: {error}")

    def _write_plot(self, trainer: Trainer) -> None:
        if self._log_dir is None or not trainer.is_global_zero or _is_dev_run(trainer):
            return
        if self._history.last_step < 0:  # nothing was logged
            return
        figure, _ = plot_history(self.history)
        write_picture(figure, self._log_dir, self.filename)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the clock out of pickles: it belongs to one run."""
        return {**self.__dict__, "_cost": None}


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


def _read_all(stats: Mapping[str, Any]) -> dict[str, float]:
    """Read all 0-dim tensors in one transfer from the device."""
    tensors = {name: value for name, value in stats.items() if isinstance(value, Tensor)}
    if not tensors:
        return {name: float(value) for name, value in stats.items()}
    # Counts of several devices or dtypes may be among them.
    some = next(iter(tensors.values()))
    dtype = torch.float64 if some.device.type != "mps" else torch.float32
    stacked = torch.stack([x.detach().reshape(()).to(some.device, dtype) for x in tensors.values()])
    read = dict(zip(tensors, stacked.tolist(), strict=True))
    return {name: float(read.get(name, value)) for name, value in stats.items()}
