"""AutoAttachCallback: what Lightning's entry point adds to every Trainer."""

from lightning_curvature.callbacks.curvature_callback import CurvatureCallback

__all__ = ["AutoAttachCallback"]


class AutoAttachCallback(CurvatureCallback):
    """Does what `CurvatureCallback` does, unless a strategy or callback of the user came first.

    A class of its own, so that a user's `CurvatureCallback` stays the only one of its type.
    """

    def __init__(self) -> None:
        super().__init__()
