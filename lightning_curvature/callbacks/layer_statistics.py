"""Log and draw what goes through the layers: activations and the gradients of their outputs."""

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from lightning.fabric.utilities import rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from lightning_curvature.callbacks.history import History
from lightning_curvature.callbacks.layer_moments import LayerMoments
from lightning_curvature.callbacks.layer_norms import plain_name
from lightning_curvature.callbacks.layer_plot import plot_layers
from lightning_curvature.callbacks.pictures import require_matplotlib, write_picture
from lightning_curvature.checks import check_in_range, check_interval
from lightning_curvature.curvature.statistics import SUPPORTED_LAYERS, LayerHooks

__all__ = ["LayerStatistics", "plot_layers"]


class LayerStatistics(Callback):
    """Log and draw statistics of the activations and output gradients of every layer.

    Works with any optimizer and any strategy. Watched are linear, convolutional (1d, 2d), embedding
    and normalization layers. The activation of a layer is what goes into it, so that A and G are
    the factors of Kronecker-factored curvature; the output gradient is that of the loss of the
    whole step (the mean over its micro-batches and ranks). Rows are examples at all positions;
    features are the last axis, or the channels.

    | key | meaning | unit |
    | --- | --- | --- |
    | `layers/activation_mean/<layer>` | mean over rows and features | activation |
    | `layers/activation_std/<layer>` | standard deviation over both | activation |
    | `layers/activation_sparsity/<layer>` | share of entries that are zero | 0 to 1 |
    | `layers/activation_dead_fraction/<layer>` | share of features zero in all rows | 0 to 1 |
    | `layers/activation_norm/<layer>` | root mean square norm of a row, `sqrt(tr A)` | activation |
    | `layers/activation_effective_rank/<layer>` | `(tr A)^2 / tr(A^2)` | 1 to features |
    | `layers/output_grad_<statistic>/<layer>` | the same of output gradient and G | loss / output |

    A is the second moment of the rows, without a bias. An embedding has no activation. A linear
    layer all of whose rectified outputs are zero has a dead fraction of 1 on the side of its
    output gradient, and the layer after it one on the side of its activation. Statistics of all
    ranks and micro-batches are exact, as if it were one batch, but the effective rank is of a
    sample of ``max_rows`` rows.

    The picture is a heat map per statistic, layers over steps, written by rank zero when fit ends,
    also when it ends with an exception. A layer without a gradient in the first step looked at is
    named in a warning: its forward is not called (a module may use the weight only), or it is
    compiled.

    Cost: hooks are there in the steps that are due only. Such a step reads every activation and
    gradient a few times and keeps inputs that checkpointing would have dropped; the ranks exchange
    one tensor of about ``max_rows`` rows per layer, and values are read from the device once.

    Args:
        every_n_steps: Look at every this many optimizer steps.
        layers: Patterns of layer names, as of file names. ``None`` takes all layers.
        max_rows: Most rows per layer and step that the effective rank is of, over all ranks.
        plot: Draw the heat maps when fit ends. Needs matplotlib (the extra ``demo``).
        filename: Name of the picture inside ``trainer.log_dir``. Its ending picks the format.
        max_points: Most steps kept for the picture, at least 2. A longer run is thinned out evenly.

    Raises:
        MisconfigurationException: If the model has no such layer (when fit starts).
        ModuleNotFoundError: If ``plot`` is set and matplotlib is missing (in ``setup``).
        ValueError: If an argument is out of range.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_curvature import LayerStatistics
        >>> statistics = LayerStatistics(every_n_steps=50, layers=["encoder.*", "head"])
        >>> trainer = Trainer(callbacks=[statistics], accelerator="cpu", enable_checkpointing=False)
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        layers: Sequence[str] | None = None,
        max_rows: int = 256,
        plot: bool = True,
        filename: str = "layers.png",
        max_points: int = 200,
    ) -> None:
        super().__init__()
        check_interval("every_n_steps", every_n_steps)
        if isinstance(layers, str):
            raise TypeError(f"Invalid layers={layers!r}: must be a list of patterns, got str.")
        check_in_range("max_rows", max_rows, 1, math.inf)
        if not filename:
            raise ValueError(f"Invalid filename={filename!r}: must not be empty.")
        check_in_range("max_points", max_points, 2, math.inf)
        self.every_n_steps = every_n_steps
        self.layers = None if layers is None else list(layers)
        self.max_rows = int(max_rows)
        self.plot = plot
        self.filename = filename
        self.max_points = max_points
        self._history = History(max_points)
        self._hooks: LayerHooks | None = None
        self._moments: LayerMoments | None = None
        self._in_batch = False
        self._had_backward = False
        self._grad_factor = 1.0
        self._checked = False
        self._last_step = 0
        self._last_logged = 0
        self._log_dir: str | None = None

    @property
    def history(self) -> dict[str, list[float]]:
        """Logged values by name, without "layers/", with the steps as ``"step"``; a copy."""
        return self._history.as_dict()

    # Hooks of the callback

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the picture can be drawn and note where it goes, on every rank."""
        if stage != "fit" or not self.plot:
            return
        require_matplotlib("LayerStatistics")
        # Asked for here because `log_dir` is a collective call.
        self._log_dir = trainer.log_dir or trainer.default_root_dir

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that there is something to watch."""
        kinds = [
            (name, type(layer).__name__)
            for name, layer in pl_module.named_modules()
            if isinstance(layer, SUPPORTED_LAYERS)
        ]
        if any(self._selects(name) for name, _ in kinds):
            return
        among = "" if self.layers is None else f" whose name matches one of {self.layers}"
        names = ", ".join(repr(plain_name(name)) for name, _ in kinds) or "none"
        raise MisconfigurationException(
            f"LayerStatistics found no supported layer{among} (Linear, Conv1d, Conv2d, Embedding, "
            f"normalization). Supported layers of the model: {names}."
        )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting from the step that training (re)starts at."""
        self._close()
        self._last_step = self._last_logged = trainer.global_step
        self._checked = False
        if self._history.last_step > trainer.global_step:  # another run: do not mix the two
            self._history = History(self.max_points)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Install the hooks if the coming optimizer step is due."""
        if self._hooks is None and self._is_due(trainer):
            self._open(trainer, pl_module)
        self._in_batch = True

    @override
    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Learn what the gradients are multiplied with."""
        if self._hooks is not None:
            self._had_backward = True
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            scale = 1.0 if scaler is None else scaler.get_scale()
            # The gradients of the ranks are averaged later.
            self._grad_factor = 1.0 / (scale * trainer.world_size)

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Log when the last micro-batch of a due step is over."""
        self._in_batch = False
        if self._hooks is not None and trainer.global_step != self._last_step:
            self._log(trainer, pl_module)
        self._last_step = trainer.global_step

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give up a step that never came to its end."""
        self._close()

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the heat maps."""
        self._close()
        self._write_plot(trainer)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Remove the hooks, and draw what there is; a failure must not hide the exception."""
        self._close()
        try:
            self._write_plot(trainer)
        except Exception as error:  # whatever drawing raises, the training error is the news
            rank_zero_warn(f"LayerStatistics could not write {self.filename}: {error}")

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the hooks."""
        self._close()

    # One step that is looked at

    def _is_due(self, trainer: Trainer) -> bool:
        if trainer.barebones:
            return False
        # Several optimizers advance `global_step` by more than one: look for a multiple passed.
        coming, interval = trainer.global_step + 1, self.every_n_steps
        return _is_dev_run(trainer) or coming // interval > self._last_logged // interval

    def _selects(self, name: str) -> bool:
        if self.layers is None:
            return True
        return any(fnmatchcase(plain_name(name), pattern) for pattern in self.layers)

    def _open(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._hooks = LayerHooks(
            pl_module,
            self._visit,
            select=lambda name, _: self._selects(name),
            enabled=lambda: self._in_batch,
        )
        self._moments = LayerMoments(
            self._hooks.layers,
            max_rows=self.max_rows // trainer.world_size,
            micro_batches=trainer.accumulate_grad_batches,
        )
        self._had_backward = False
        self._grad_factor = 1.0 / trainer.world_size

    def _visit(self, name: str, layer: nn.Module, given: Tensor, grad_output: Tensor) -> None:
        if self._moments is not None:
            self._had_backward = True
            self._moments.add(name, given, grad_output, self._grad_factor)

    def _close(self) -> None:
        self._in_batch = False
        self._moments = None
        if self._hooks is not None:
            self._hooks.close()
            self._hooks = None

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        moments, hooks = self._moments, self._hooks
        assert moments is not None
        assert hooks is not None
        double = any(p.dtype == torch.float64 for p in pl_module.parameters())
        dtype = torch.float64 if double else torch.float32
        flag = torch.tensor([float(self._had_backward)], dtype=dtype, device=pl_module.device)
        packed = torch.cat([flag, moments.packed(flag)])
        self._close()
        gathered = packed[None]
        if trainer.world_size > 1:
            gathered = trainer.strategy.all_gather(packed).reshape(-1, packed.numel())
        found = moments.statistics(gathered[:, 1:])
        if not bool(gathered[:, 0].any()):  # nothing to step on: no layer is to blame
            return
        self._last_logged = trainer.global_step
        without = [o for o in trainer.optimizers if "forward" in getattr(o, "asks", ())]
        if without and not found["output_grad_mean"]:
            if not self._checked:
                rank_zero_warn(
                    "LayerStatistics has nothing to show: it sees layers in the backward, and "
                    f"{type(without[0]).__name__} runs none."
                )
            self._checked = True
            return
        self._name_silent(list(hooks.layers), found, trainer)
        values = {
            f"{statistic}/{plain_name(name)}": value
            for statistic, of_layers in found.items()
            for name, value in of_layers.items()
        }
        self._history.append(trainer.global_step, values)
        metrics = {f"layers/{name}": value for name, value in values.items()}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)

    def _name_silent(
        self, names: Sequence[str], found: dict[str, dict[str, float]], trainer: Trainer
    ) -> None:
        """Name the layers without a gradient, once per run."""
        if self._checked:
            return
        self._checked = True
        silent = [name for name in names if name not in found["output_grad_mean"]]
        without = [o for o in trainer.optimizers if "forward" in getattr(o, "asks", ())]
        if without and not found["output_grad_mean"]:
            rank_zero_warn(
                f"LayerStatistics sees activations only: {type(without[0]).__name__} runs no "
                "backward, so there are no gradients."
            )
            return
        if silent:
            listed = ", ".join(repr(plain_name(name)) for name in silent)
            rank_zero_warn(
                f"LayerStatistics saw no gradient of {listed} in the first step it looked at. "
                "Usual causes: the forward of the layer is not called (a module uses its weight "
                "directly, as MultiheadAttention does with out_proj), it comes before all trained "
                "parameters, or it is inside a compiled module, where hooks do not run. Leave such "
                "layers out with `layers`."
            )

    # The picture

    def _write_plot(self, trainer: Trainer) -> None:
        if self._log_dir is None or not trainer.is_global_zero or _is_dev_run(trainer):
            return
        if self._history.last_step < 0:  # nothing was logged
            return
        figure, _ = plot_layers(self.history)
        write_picture(figure, self._log_dir, self.filename)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out of pickles what belongs to one step."""
        return {**self.__dict__, "_hooks": None, "_moments": None}


def _is_dev_run(trainer: Trainer) -> bool:
    """Tell whether this is a trial run, which logs every step and leaves no files."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
