"""Curvature-aware training for PyTorch Lightning, without a change to your LightningModule.

Importing the package registers the strategies 'single_device_curvature' and 'ddp_curvature'.
"""

from lightning_curvature.__about__ import __version__
from lightning_curvature.callbacks import (
    CurvatureCallback,
    CurvatureMonitor,
    DampingSchedule,
    HessianSchedule,
    LayerStatistics,
    MFACPruning,
    SampleSchedule,
    SensitiveParameterMask,
    TrajectoryLog,
)
from lightning_curvature.curvature.gradient_window import GradientWindow
from lightning_curvature.curvature.inverse_fisher import InverseFisher
from lightning_curvature.curvature.schedule import (
    DriftInterval,
    FixedInterval,
    RefreshSchedule,
    WarmupInterval,
)
from lightning_curvature.curvature.time_budget import TimeBudget
from lightning_curvature.optim import (
    EKFAC,
    KFAC,
    MFAC,
    SGDQLR,
    AdaFisher,
    AdaFisherW,
    AdaHessian,
    AdamQLR,
    BetaFTRL,
    CurvatureOptimizer,
    FAdam,
    ForwardGradient,
    HiZOO,
    HiZOOL,
    MeZO,
    SophiaG,
    SophiaH,
    ZOAdam,
    ZOConservative,
    ZOMomentum,
    ZOSignSGD,
)
from lightning_curvature.optim.saved_window import join_window_shards
from lightning_curvature.optim.trajectory import Trajectory
from lightning_curvature.optim.trajectory_replay import replay_trajectory
from lightning_curvature.oracle import declare_loss, in_extra_pass
from lightning_curvature.pruning import CubicSparsity, FisherPruner, ListSparsity
from lightning_curvature.registry import OptimizerInfo, get_optimizer_info, list_optimizers
from lightning_curvature.strategies import DDPCurvatureStrategy, SingleDeviceCurvatureStrategy

__all__ = [
    "EKFAC",
    "KFAC",
    "MFAC",
    "SGDQLR",
    "AdaFisher",
    "AdaFisherW",
    "AdaHessian",
    "AdamQLR",
    "BetaFTRL",
    "CubicSparsity",
    "CurvatureCallback",
    "CurvatureMonitor",
    "CurvatureOptimizer",
    "DDPCurvatureStrategy",
    "DampingSchedule",
    "DriftInterval",
    "FAdam",
    "FisherPruner",
    "FixedInterval",
    "ForwardGradient",
    "GradientWindow",
    "HessianSchedule",
    "HiZOO",
    "HiZOOL",
    "InverseFisher",
    "LayerStatistics",
    "ListSparsity",
    "MFACPruning",
    "MeZO",
    "OptimizerInfo",
    "RefreshSchedule",
    "SampleSchedule",
    "SensitiveParameterMask",
    "SingleDeviceCurvatureStrategy",
    "SophiaG",
    "SophiaH",
    "TimeBudget",
    "Trajectory",
    "TrajectoryLog",
    "WarmupInterval",
    "ZOAdam",
    "ZOConservative",
    "ZOMomentum",
    "ZOSignSGD",
    "__version__",
    "declare_loss",
    "get_optimizer_info",
    "in_extra_pass",
    "join_window_shards",
    "list_optimizers",
    "replay_trajectory",
]
