"""What a Trainer does only for a backward, left out where there is none."""

import functools
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_curvature.optim.zeroth_order import ZerothOrderOptimizer

__all__ = ["ForwardOnly"]


class ForwardOnly:
    """Changes a Trainer for an optimizer that needs no backward, until `undo`.

    The backward does nothing, while all hooks around it are called as always. The module is left
    alone: copies of it, such as averages, may be trained by something else. The wrapper for data
    parallel training is taken away, or built anew for what still has a gradient: it keeps buffers
    as large as the parameters, and has no gradients to average.

    Args:
        trainer: The Trainer, after its strategy was set up.
        optimizer: Its optimizer.
    """

    def __init__(self, trainer: pl.Trainer, optimizer: ZerothOrderOptimizer) -> None:
        self._module = trainer.lightning_module
        self._plugin = trainer.strategy.precision_plugin
        self._optimizer = optimizer
        self._strategy: DDPStrategy | None = None
        self._wrapped_for: set[int] | None = None
        if len(trainer.strategy.optimizers) > 1:
            return  # another one has gradients
        is_hybrid = optimizer.has_gradients
        backward = self._plugin.backward

        @functools.wraps(backward)
        def only_if_needed(tensor: Tensor, *args: Any, **kwargs: Any) -> None:
            # Asked every time: a group that has gradients may thaw, or come later.
            # In manual optimization the closure is watched: its backward names the loss.
            if optimizer.has_gradients or not self._module.automatic_optimization:
                backward(tensor, *args, **kwargs)

        self._plugin.__dict__["backward"] = only_if_needed
        if trainer.gradient_clip_val and not is_hybrid:
            rank_zero_warn(
                f"gradient_clip_val={trainer.gradient_clip_val} has no effect: "
                f"{type(optimizer).__name__} has no gradients. Use its max_projected_grad."
            )
        strategy = trainer.strategy
        wrapped = isinstance(strategy, DDPStrategy) and isinstance(
            strategy.model, DistributedDataParallel
        )
        if wrapped and isinstance(strategy, DDPStrategy):
            self._strategy = strategy
            self.refresh()

    def refresh(self) -> None:
        """Wrap what has a gradient now, if that has changed: parameters may thaw, or come later."""
        if self._strategy is None:
            return
        params = {id(p) for p in self._optimizer._trained(first_order=True)}
        if params == self._wrapped_for:
            return
        self._wrapped_for = params
        # Its forward also sends the running statistics of rank 0 to the others.
        if params or not _has_running_statistics(self._module):
            self._strategy.model = self._module
        if params:
            with self._optimizer.only_gradients():
                self._strategy.configure_ddp()

    def undo(self) -> None:
        """Give the precision plugin its ``backward`` back."""
        self._plugin.__dict__.pop("backward", None)


def _has_running_statistics(module: nn.Module) -> bool:
    norms = nn.modules.batchnorm._NormBase
    return any(isinstance(part, norms) and part.track_running_stats for part in module.modules())
