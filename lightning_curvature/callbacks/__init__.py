"""Callbacks."""

from lightning_curvature.callbacks.curvature_callback import CurvatureCallback
from lightning_curvature.callbacks.curvature_monitor import CurvatureMonitor
from lightning_curvature.callbacks.damping_schedule import DampingSchedule
from lightning_curvature.callbacks.hessian_schedule import HessianSchedule
from lightning_curvature.callbacks.layer_statistics import LayerStatistics
from lightning_curvature.callbacks.mfac_pruning import MFACPruning
from lightning_curvature.callbacks.sample_schedule import SampleSchedule
from lightning_curvature.callbacks.sensitive_parameter_mask import SensitiveParameterMask
from lightning_curvature.callbacks.trajectory_log import TrajectoryLog

__all__ = [
    "CurvatureCallback",
    "CurvatureMonitor",
    "DampingSchedule",
    "HessianSchedule",
    "LayerStatistics",
    "MFACPruning",
    "SampleSchedule",
    "SensitiveParameterMask",
    "TrajectoryLog",
]
