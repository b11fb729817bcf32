"""Strategy 'single_device_curvature': one device, for optimizers that ask their loss more."""

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.strategies.registry import _StrategyRegistry
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.types import _DEVICE
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import SingleDeviceStrategy
from typing_extensions import override

from lightning_curvature.oracle.window import DirectionalMethod
from lightning_curvature.strategies.mixin import CurvatureMixin
from lightning_curvature.strategies.recorder import Window

__all__ = ["SingleDeviceCurvatureStrategy"]


class SingleDeviceCurvatureStrategy(CurvatureMixin, SingleDeviceStrategy):
    """Train on one device with an optimizer that asks its loss for curvature.

    Args:
        device: Device to train on; by default the one the Trainer chooses.
        accelerator: Accelerator that owns the device; by default the Trainer's.
        checkpoint_io: Plugin that reads and writes checkpoints.
        precision_plugin: Plugin for the precision; by default the Trainer's.
        directional: How directional curvature is computed: "fd" for finite differences of the model
            outputs, "jvp" for forward mode, "auto" for what fits the precision.
        window: Micro-batches of an accumulation window that curvature is measured on: "all", or
            only the "last", which costs less.

    Examples:
        >>> import lightning as L
        >>> trainer = L.Trainer(strategy="single_device_curvature", accelerator="cpu", logger=False)
        >>> type(trainer.strategy).__name__
        'SingleDeviceCurvatureStrategy'
    """

    strategy_name = "single_device_curvature"

    def __init__(
        self,
        device: str | torch.device | None = None,
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        directional: DirectionalMethod = "auto",
        window: Window = "all",
    ) -> None:
        chosen: _DEVICE = "cpu" if device is None else device
        super().__init__(chosen, accelerator, checkpoint_io, precision_plugin)
        self.directional = directional
        self.window = window
        self._chosen = device is not None

    # The Trainer assigns its devices to strategies that have this attribute.

    @property
    def parallel_devices(self) -> list[torch.device] | None:
        """The one device, None until it is chosen."""
        return [self.root_device] if self._chosen else None

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device]) -> None:
        if len(devices) > 1:
            raise MisconfigurationException(
                f"strategy='{self.strategy_name}' trains on one device, got {len(devices)}. Use "
                "devices=1, or strategy='ddp_curvature'."
            )
        if devices:
            self._root_device = torch.device(devices[0])
            self._chosen = True

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: _StrategyRegistry) -> None:
        """Register the name of this strategy."""
        strategy_registry.register(cls.strategy_name, cls, description=cls.__name__, override=True)
