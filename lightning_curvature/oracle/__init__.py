"""The oracle: what may be asked of a mini-batch loss."""

from lightning_curvature.oracle.capture import LossCapture, declare_loss
from lightning_curvature.oracle.closure import ClosureOracle
from lightning_curvature.oracle.extra_pass import Environment, extra_pass, in_extra_pass
from lightning_curvature.oracle.plain import ModelOracle
from lightning_curvature.oracle.protocol import (
    Directional,
    MissingCapabilityError,
    NoLossCapturedError,
    Oracle,
    Quadratic,
)
from lightning_curvature.oracle.record import PassRecord
from lightning_curvature.oracle.window import WindowOracle

__all__ = [
    "ClosureOracle",
    "Directional",
    "Environment",
    "LossCapture",
    "MissingCapabilityError",
    "ModelOracle",
    "NoLossCapturedError",
    "Oracle",
    "PassRecord",
    "Quadratic",
    "WindowOracle",
    "declare_loss",
    "extra_pass",
    "in_extra_pass",
]
