"""Strategy 'ddp_curvature': data parallel, for optimizers that ask their loss more."""

from typing import Any

from lightning.fabric.strategies.registry import _StrategyRegistry
from lightning.pytorch.strategies import DDPStrategy
from typing_extensions import override

from lightning_curvature.oracle.window import DirectionalMethod
from lightning_curvature.strategies.mixin import CurvatureMixin
from lightning_curvature.strategies.recorder import Window

__all__ = ["DDPCurvatureStrategy"]


class DDPCurvatureStrategy(CurvatureMixin, DDPStrategy):
    """Train data parallel with an optimizer that asks its loss for curvature.

    Extra passes run on the inner module; their scalars are averaged over the ranks in one
    collective per question, so all ranks take the same step.

    Args:
        directional: How directional curvature is computed: "fd", "jvp" or "auto".
        window: Micro-batches of an accumulation window that curvature is measured on: "all" or
            "last".
        **kwargs: Arguments of Lightning's ``DDPStrategy``.
    """

    strategy_name = "ddp_curvature"

    def __init__(
        self, directional: DirectionalMethod = "auto", window: Window = "all", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.directional = directional
        self.window = window

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: _StrategyRegistry) -> None:
        """Register the names of this strategy, after those of ``DDPStrategy``."""
        launchers = {"": "popen", "_spawn": "spawn", "_fork": "fork", "_notebook": "fork"}
        for suffix, start_method in launchers.items():
            for unused_suffix, unused in (("", None), ("_find_unused_parameters_true", True)):
                arguments: dict[str, Any] = {"start_method": start_method}
                if unused is not None:
                    arguments["find_unused_parameters"] = unused
                strategy_registry.register(
                    f"{cls.strategy_name}{suffix}{unused_suffix}",
                    cls,
                    description=f"{cls.__name__} started by '{start_method}'",
                    override=True,
                    **arguments,
                )
