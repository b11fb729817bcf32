"""CurvatureCallback: attaches a curvature optimizer under any strategy."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightning_curvature.checks import check_choice
from lightning_curvature.oracle.window import DirectionalMethod
from lightning_curvature.strategies.recorder import StepRecorder, Window

__all__ = ["CurvatureCallback"]


class CurvatureCallback(Callback):
    """Let the Trainer's curvature optimizer ask its loss for more than a gradient.

    Works with ``strategy="auto"``, ``"ddp"`` and a strategy you built. With
    ``strategy="single_device_curvature"`` or ``"ddp_curvature"`` it has nothing to do. Runs of the
    learning-rate and batch-size finders drop all callbacks: use a strategy there.

    Args:
        directional: How directional curvature is computed: "fd" for finite differences of the model
            outputs, "jvp" for forward mode, "auto" for what fits the precision.
        window: Micro-batches of an accumulation window that curvature is measured on: "all", or
            only the "last", which costs less.

    Raises:
        ValueError: If an argument is none of the words above.

    Examples:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[CurvatureCallback()], accelerator="cpu", logger=False)
    """

    def __init__(self, directional: DirectionalMethod = "auto", window: Window = "all") -> None:
        check_choice("directional", directional, ("auto", "fd", "jvp"))
        check_choice("window", window, ("all", "last"))
        self.directional = directional
        self.window = window
        self._recorder: StepRecorder | None = None

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach to the optimizer and stand around the strategy's training step."""
        self._detach()
        self._recorder = StepRecorder.attach(
            trainer, directional=self.directional, window=self.window
        )
        if self._recorder is not None:
            self._recorder.stand_around(trainer.strategy)

    @override
    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Detach: Lightning does not call ``teardown`` after an exception."""
        self._detach()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Detach."""
        self._detach()

    def _detach(self) -> None:
        if self._recorder is not None:
            self._recorder.detach()
            self._recorder = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the recorder out of pickles: it belongs to one run."""
        return {**self.__dict__, "_recorder": None}
