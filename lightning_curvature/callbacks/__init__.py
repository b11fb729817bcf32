"""Callbacks."""

from lightning_curvature.callbacks.curvature_callback import CurvatureCallback
from lightning_curvature.callbacks.curvature_monitor import CurvatureMonitor
from lightning_curvature.callbacks.damping_schedule import DampingSchedule
from lightning_curvature.callbacks.hessian_schedule import HessianSchedule
from lightning_curvature.callbacks.layer_statistics import LayerStatistics

__all__ = [
    "CurvatureCallback",
    "CurvatureMonitor",
    "DampingSchedule",
    "HessianSchedule",
    "LayerStatistics",
]
