"""Callbacks."""

from lightning_curvature.callbacks.curvature_callback import CurvatureCallback
from lightning_curvature.callbacks.curvature_monitor import CurvatureMonitor

__all__ = ["CurvatureCallback", "CurvatureMonitor"]
