"""CurvatureMixin: makes a Lightning strategy record for a curvature optimizer."""

import errno
import os
import zipfile
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.types import STEP_OUTPUT
from typing_extensions import override

from lightning_curvature.oracle.window import DirectionalMethod
from lightning_curvature.strategies.recorder import StepRecorder, Window

__all__ = ["CurvatureMixin"]


class CurvatureMixin(Strategy):
    """Adds a `StepRecorder` to a strategy; put it before the strategy in the bases.

    Attributes:
        directional: See `WindowOracle`.
        window: See `StepRecorder`.
    """

    directional: DirectionalMethod = "auto"
    window: Window = "all"
    _own_recorder: StepRecorder | None = None

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        """Set up the strategy, then attach to the optimizer it has made."""
        super().setup(trainer)
        self._detach()
        if trainer.state.fn == "fit":
            self._own_recorder = StepRecorder.attach(
                trainer, directional=self.directional, window=self.window
            )

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Run the training step, watched on the steps where the optimizer will ask."""
        step = super().training_step
        if self._own_recorder is None:
            return step(*args, **kwargs)
        return self._own_recorder.around(step, *args, **kwargs)

    @override
    def load_checkpoint(
        self, checkpoint_path: _PATH, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint.

        Args:
            checkpoint_path: Path or address of the file.
            weights_only: See `torch.load`.

        Raises:
            RuntimeError: If the file is damaged.
        """
        try:
            return super().load_checkpoint(checkpoint_path, weights_only)
        except Exception as error:
            if not _is_damaged(checkpoint_path, error):
                raise
            raise RuntimeError(
                f"Cannot read the checkpoint {checkpoint_path}: the file is damaged, or was cut "
                f"off while it was written ({type(error).__name__}: {error}). Resume from an "
                "older one."
            ) from error

    @override
    def teardown(self) -> None:
        """Detach from the optimizer, then tear the strategy down."""
        self._detach()
        super().teardown()

    def _detach(self) -> None:
        if self._own_recorder is not None:
            self._own_recorder.detach()
            self._own_recorder = None


def _is_damaged(path: _PATH, error: Exception) -> bool:
    """Tell a damaged file from one that is missing, or that torch refuses for its contents."""
    if isinstance(error, (FileNotFoundError, IsADirectoryError, PermissionError)):
        return False
    if os.path.isfile(path) and not zipfile.is_zipfile(path):
        return True
    # Of a cut file torch looks for the end before the beginning.
    cut = isinstance(error, OSError) and error.errno == errno.EINVAL
    return cut or isinstance(error, EOFError) or "PytorchStreamReader" in str(error)
