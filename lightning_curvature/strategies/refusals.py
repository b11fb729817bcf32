"""Configurations that cannot work, refused by name before the first batch."""

import inspect
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import (
    BitsandbytesPrecision,
    MixedPrecision,
    Precision,
    TransformerEnginePrecision,
)
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
)
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
from lightning.pytorch.strategies.xla import XLAStrategy

from lightning_curvature.optim.base import CurvatureOptimizer
from lightning_curvature.registry import list_optimizers

__all__ = [
    "refuse_module",
    "refuse_parts_of_state",
    "refuse_precision",
    "refuse_several_optimizers",
    "refuse_strategy",
    "refuse_window",
]

_UNSUPPORTED: dict[type[Strategy], str] = {
    FSDPStrategy: "shards them",
    ModelParallelStrategy: "shards them",
    DeepSpeedStrategy: "runs backward and the optimizer itself",
    XLAStrategy: "compiles the whole step",
    SingleDeviceXLAStrategy: "compiles the whole step",
}
_UNSUPPORTED_PRECISION: dict[type[Precision], str] = {
    TransformerEnginePrecision: "scales by statistics that an extra pass would change",
    BitsandbytesPrecision: "quantizes the weights that an extra pass would move",
}


def refuse_strategy(strategy: Strategy, optimizer: CurvatureOptimizer) -> None:
    """Refuse strategies under which the loss cannot be evaluated again, or parameters are cut.

    Args:
        strategy: Strategy of the Trainer.
        optimizer: Optimizer that asks its oracle something, or needs whole parameters.

    Raises:
        MisconfigurationException: If the strategy is one of them.
    """
    for kind, reason in _UNSUPPORTED.items():
        if isinstance(strategy, kind):
            # Not an inherited name, which is that of another strategy.
            word = vars(kind).get("strategy_name", kind.__name__)
            elementwise = [
                info.cls.__name__
                for info in list_optimizers()
                if not (info.asks or info.cls.needs_whole_params)
            ]
            others = (
                f", or one of the elementwise optimizers that need no extra passes: "
                f"{', '.join(elementwise)}"
                if elementwise
                else ""
            )
            raise MisconfigurationException(
                f"{type(optimizer).__name__} needs whole parameters on every rank; strategy "
                f"'{word}' {reason}. Use strategy='ddp_curvature' (or 'ddp'){others}."
            )
    period = getattr(strategy, "_model_averaging_period", None)
    if period is not None:
        raise MisconfigurationException(
            f"{type(optimizer).__name__} needs the same weights on every rank; with "
            f"model_averaging_period={period!r} each rank takes steps of its own in between. Leave "
            "it out."
        )


def refuse_parts_of_state(num_ranks: int, optimizer: CurvatureOptimizer) -> None:
    """Refuse to keep from rank 0, which alone writes checkpoints, what the other ranks have.

    Args:
        num_ranks: Number of ranks.
        optimizer: Optimizer that may deal its state out over them.

    Raises:
        MisconfigurationException: If checkpoints would hold a part of the state only.
    """
    if num_ranks > 1 and not optimizer.param_groups[0].get("gather_state", True):
        raise MisconfigurationException(
            f"{type(optimizer).__name__}(gather_state=False) leaves every rank its part of the "
            "state, but a Trainer saves that of rank 0 only. Use gather_state=True."
        )


def refuse_precision(
    plugin: Precision, module: LightningModule, optimizer: CurvatureOptimizer
) -> None:
    """Refuse precision plugins under which the loss cannot be evaluated again.

    Args:
        plugin: Precision plugin of the Trainer.
        module: The user's module.
        optimizer: Optimizer that asks its oracle something.

    Raises:
        MisconfigurationException: If the plugin is one of them.
    """
    name = type(optimizer).__name__
    for kind, reason in _UNSUPPORTED_PRECISION.items():
        if isinstance(plugin, kind):
            raise MisconfigurationException(
                f"{name} evaluates the loss again; precision plugin {type(plugin).__name__} "
                f"{reason}. Use precision='32-true', '64-true', 'bf16-mixed', 'bf16-true' or "
                "'16-mixed'."
            )
    scaled = isinstance(plugin, MixedPrecision) and plugin.scaler is not None
    if scaled and "forward" in optimizer.asks:
        raise MisconfigurationException(
            f"{name} re-evaluates the loss, which {plugin.precision} precision cannot do. Use "
            "bf16-mixed or 32-true."
        )
    if scaled and not module.automatic_optimization:
        raise MisconfigurationException(
            f"{name} runs the closure of manual optimization again; precision "
            f"'{plugin.precision}' runs it before the optimizer sees it. Use "
            "precision='bf16-mixed', or automatic optimization."
        )


def refuse_several_optimizers(found: list[CurvatureOptimizer]) -> None:
    """Refuse more than one optimizer that asks.

    Args:
        found: Optimizers of the Trainer that ask their oracle something.

    Raises:
        MisconfigurationException: If there are several.
    """
    if len(found) > 1:
        names = ", ".join(type(optimizer).__name__ for optimizer in found)
        raise MisconfigurationException(
            f"One curvature optimizer per Trainer is supported, got {len(found)}: {names}. Put the "
            "parameters into groups of one optimizer."
        )


def refuse_module(module: LightningModule, optimizer: CurvatureOptimizer) -> None:
    """Refuse training steps that cannot be run again.

    Args:
        module: The user's module.
        optimizer: Optimizer that asks its oracle something.

    Raises:
        MisconfigurationException: If the training step takes an iterator.
    """
    step: Any = module.training_step
    if "dataloader_iter" in inspect.signature(step).parameters:
        raise MisconfigurationException(
            f"{type(optimizer).__name__} runs training_step again on the same batch, but "
            "training_step(dataloader_iter) takes its batches itself and would lose some. Use "
            "training_step(batch, batch_idx)."
        )


def refuse_window(window: str, optimizer: CurvatureOptimizer) -> None:
    """Refuse to look at a part of the data where there is no gradient of all of it.

    Args:
        window: "all" or "last", see `StepRecorder`.
        optimizer: Optimizer that asks its oracle something.

    Raises:
        MisconfigurationException: If the optimizer has nothing but what it asks.
    """
    if window == "last" and "forward" in optimizer.asks:
        raise MisconfigurationException(
            f"{type(optimizer).__name__} knows of the data only what it asks: with window='last' "
            "the other micro-batches would be left out. Use window='all'."
        )
