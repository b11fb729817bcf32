"""TrajectoryLog: writes the log of a zeroth-order run, which stands for its checkpoints."""

import os
from typing import Any

import torch
from lightning.fabric.utilities import rank_zero_warn
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_curvature.checks import check_interval
from lightning_curvature.optim.trajectory import Trajectory, write_whole
from lightning_curvature.optim.zeroth_order import ZerothOrderOptimizer

__all__ = ["TrajectoryLog"]


class TrajectoryLog(Callback):
    """Write what a zeroth-order run depends on: 8 bytes per step in the place of checkpoints.

    With the weights that the run started from, the log is all there is to any later weights:
    `replay_trajectory` takes the same steps again, without data and forward passes, and ends at
    the same bits on the same kind of device.

    The file is written when fit ends, also when it ends with an exception, and every
    ``every_n_steps`` optimizer steps, in one go: a crash leaves the file before. Checkpoints carry
    the log as well, so a run that is resumed goes on with what was logged until its checkpoint and
    drops what came after it; on another device a new log begins. A new run does not touch the file
    of an older one: it writes ``trajectory-v1.pt`` and so on.

    The log follows the parameters of the optimizer. Running statistics of batch normalization are
    not in it, and neither are weights that others write, such as averages that are swapped in. All
    ranks hold the same log, rank zero writes it.

    Cost: some microseconds per parameter group and step; a GPU is waited for once in a thousand
    steps, and when a file or checkpoint is written.

    Args:
        filename: Name of the file.
        dirpath: Its folder; None for ``trainer.log_dir``, or the Trainer's ``default_root_dir``
            without a logger.
        save_base: Whether to write the weights that the log starts from, with the state of the
            optimizer, once: as ``trajectory_base.pt``. Not needed for a pretrained model that you
            can load again.
        every_n_steps: Optimizer steps between two files, >= 1; None for one at the end.

    Raises:
        MisconfigurationException: If the Trainer does not have exactly one zeroth-order optimizer,
            or it has groups with gradients (when training starts).
        ValueError: If an argument is out of range.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_curvature import TrajectoryLog
        >>> log = TrajectoryLog(save_base=True, every_n_steps=1000)
        >>> trainer = Trainer(callbacks=[log], accelerator="cpu", logger=False)
    """

    def __init__(
        self,
        filename: str = "trajectory.pt",
        dirpath: str | None = None,
        save_base: bool = False,
        every_n_steps: int | None = 1000,
    ) -> None:
        super().__init__()
        if not filename:
            raise ValueError(f"Invalid filename={filename!r}: must not be empty.")
        if every_n_steps is not None:
            check_interval("every_n_steps", every_n_steps)
        self.filename = filename
        self.dirpath = dirpath
        self.save_base = save_base
        self.every_n_steps = every_n_steps
        self._trajectory = Trajectory()
        # Name of the file of this run, and its folder; empty until it is known.
        self._name = ""
        self._folder = ""
        self._loaded: dict[str, Any] = {}
        self._last_write = 0

    @property
    def trajectory(self) -> Trajectory:
        """The log of the run."""
        return self._trajectory

    @property
    def path(self) -> str:
        """The file, or where it will be; empty before fit."""
        return os.path.join(self._folder, self._name) if self._name else ""

    @property
    def base_path(self) -> str:
        """The file with the first weights; empty before fit."""
        stem, ending = os.path.splitext(self.path)
        return f"{stem}_base{ending}" if stem else ""

    # Hooks of the callback

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Note where files go, on every rank."""
        if stage == "fit":
            # Asked for here because `log_dir` is a collective call.
            log_dir = trainer.log_dir or trainer.default_root_dir
            self._folder = os.fspath(self.dirpath or log_dir)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to record, or to go on; a checkpoint is loaded by now."""
        self._trajectory.stop()
        optimizer = _the_optimizer(trainer)
        loaded, self._loaded = self._loaded, {}
        if loaded:
            self._trajectory = Trajectory.from_state_dict(loaded["trajectory"])
            self._name = loaded["name"]
            if self._trajectory.header and not self._trajectory.is_of_device(optimizer):
                rank_zero_warn(
                    "TrajectoryLog begins a new log with this checkpoint: the old one is of "
                    f"{self._trajectory.header['device']} {self._trajectory.header['device_name']}."
                )
                self._trajectory, self._name = Trajectory(), ""
        elif optimizer._steps_done != self._trajectory.first_step + len(self._trajectory):
            self._trajectory = Trajectory()  # another run: do not mix the two
            self._name = ""
        try:
            self._trajectory.record(optimizer)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
        if not self._name:
            self._name = self._free_name(trainer)
            if self.save_base and self._writes(trainer):
                base = {"state_dict": pl_module.state_dict(), "optimizer": optimizer.state_dict()}
                self._write(base, self.base_path)
        self._last_write = trainer.global_step

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Write the file if that is due."""
        interval = self.every_n_steps
        # Several steps per batch may go past a multiple.
        if interval and trainer.global_step // interval > self._last_write // interval:
            self._last_write = trainer.global_step
            self._write_log(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file."""
        self._write_log(trainer)
        self._trajectory.stop()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Write what there is; a failure must not hide the exception."""
        try:
            self._write_log(trainer)
        except Exception as error:  # whatever writing raises, the training error is the news
            rank_zero_warn(f"TrajectoryLog could not write {self.path}: {error}")
        self._trajectory.stop()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Record no longer."""
        self._trajectory.stop()

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the log, which a resumed run goes on with."""
        if not self._name:
            return {}
        return {"name": self._name, "trajectory": self._trajectory.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the log for when training starts."""
        self._loaded = dict(state_dict)

    # Files

    def _writes(self, trainer: Trainer) -> bool:
        return trainer.is_global_zero and not bool(trainer.fast_dev_run)  # type: ignore[attr-defined]

    def _free_name(self, trainer: Trainer) -> str:
        """Return the name of a file that is not there yet; rank zero decides."""
        stem, ending = os.path.splitext(self.filename)
        name, version = self.filename, 0
        filesystem = get_filesystem(self._folder)
        while trainer.is_global_zero and filesystem.exists(os.path.join(self._folder, name)):
            version += 1
            name = f"{stem}-v{version}{ending}"
        found: str = trainer.strategy.broadcast(name)
        return found

    def _write_log(self, trainer: Trainer) -> None:
        if self._name and len(self._trajectory) and self._writes(trainer):
            self._write(self._trajectory.state_dict(), self.path)

    def _write(self, content: dict[str, Any], path: str) -> None:
        """Write a file, local or not, in one go."""
        if "://" not in path:
            write_whole(content, path)
            return
        filesystem = get_filesystem(path)
        filesystem.makedirs(self._folder, exist_ok=True)
        with filesystem.transaction, filesystem.open(path, "wb") as file:
            torch.save(content, file)

    def __getstate__(self) -> dict[str, Any]:
        """Leave what belongs to one run out of pickles."""
        return {**self.__dict__, "_loaded": {}}


def _the_optimizer(trainer: Trainer) -> ZerothOrderOptimizer:
    found = [x for x in trainer.optimizers if isinstance(x, ZerothOrderOptimizer)]
    if len(found) != 1 or len(trainer.optimizers) != 1:
        names = ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers) or "none"
        raise MisconfigurationException(
            f"TrajectoryLog needs one zeroth-order optimizer such as MeZO, and no other. Got: "
            f"{names}. Use checkpoints in its place."
        )
    return found[0]
