"""AutoAttachCallback: what Lightning's entry point adds to every Trainer."""

import lightning.pytorch as pl
from typing_extensions import override

from lightning_curvature.callbacks.curvature_callback import CurvatureCallback

__all__ = ["AutoAttachCallback"]


class AutoAttachCallback(CurvatureCallback):
    """Does what `CurvatureCallback` does, unless a strategy or callback of the user came first.

    A class of its own, so that a user's `CurvatureCallback` stays the only one of its type.
    """

    def __init__(self) -> None:
        super().__init__()

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach unless the user's own callback will, even if it stands further down the list."""
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        theirs = (c for c in callbacks if not isinstance(c, AutoAttachCallback))
        if not any(isinstance(callback, CurvatureCallback) for callback in theirs):
            super().on_fit_start(trainer, pl_module)
