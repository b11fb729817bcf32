"""CurvatureMixin: makes a Lightning strategy record for a curvature optimizer."""

from typing import Any

import lightning.pytorch as pl
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
    def teardown(self) -> None:
        """Detach from the optimizer, then tear the strategy down."""
        self._detach()
        super().teardown()

    def _detach(self) -> None:
        if self._own_recorder is not None:
            self._own_recorder.detach()
            self._own_recorder = None
