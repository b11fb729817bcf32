"""Strategies; importing this registers their names with Lightning."""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_curvature.strategies.ddp import DDPCurvatureStrategy
from lightning_curvature.strategies.recorder import StepRecorder
from lightning_curvature.strategies.single_device import SingleDeviceCurvatureStrategy

__all__ = ["DDPCurvatureStrategy", "SingleDeviceCurvatureStrategy", "StepRecorder"]

for _strategy in (SingleDeviceCurvatureStrategy, DDPCurvatureStrategy):
    _strategy.register_strategies(StrategyRegistry)
