"""StepRecorder: what the oracle needs of a Trainer's training steps, whatever the strategy."""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.optim import Optimizer

from lightning_curvature import vectors
from lightning_curvature.checks import check_choice
from lightning_curvature.optim.base import CurvatureOptimizer
from lightning_curvature.optim.zeroth_order import ZerothOrderOptimizer
from lightning_curvature.oracle.capture import LossCapture
from lightning_curvature.oracle.closure import ClosureOracle
from lightning_curvature.oracle.extra_pass import Environment
from lightning_curvature.oracle.ranks import mean_over_ranks
from lightning_curvature.oracle.record import (
    PassRecord,
    batch_versions,
    check_batch_unchanged,
    copied_containers,
)
from lightning_curvature.oracle.replay import is_compiled
from lightning_curvature.oracle.window import DirectionalMethod, WindowOracle
from lightning_curvature.strategies.forward_only import ForwardOnly
from lightning_curvature.strategies.refusals import (
    refuse_module,
    refuse_parts_of_state,
    refuse_precision,
    refuse_several_optimizers,
    refuse_strategy,
    refuse_window,
)

__all__ = ["StepRecorder", "Window"]

Window = Literal["all", "last"]

# On the strategy: who records. The first to come stays, the others do nothing.
_MARKER = "_curvature_recorder"


class StepRecorder:
    """Records the main passes of a Trainer for the oracle of its optimizer.

    For the duration of the strategy's ``training_step`` the module's own ``training_step`` is
    replaced by a watched one; nothing else of the module is touched. Use `attach`.

    Args:
        trainer: The Trainer, after its optimizers were set up.
        optimizer: The optimizer that asks.
        directional: See `WindowOracle`.
        window: "all" keeps every micro-batch of an accumulation window, so that gradient and
            curvature belong to the same data; "last" keeps the last one, which costs less.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        optimizer: CurvatureOptimizer,
        *,
        directional: DirectionalMethod = "auto",
        window: Window = "all",
    ) -> None:
        self.trainer = trainer
        self.optimizer = optimizer
        self.window = window
        module = trainer.lightning_module
        params = [p for group in optimizer.param_groups for p in group["params"]]
        self.oracle: WindowOracle
        contexts = (trainer.strategy.precision_plugin.train_step_context, self._silent)
        # A group may exist though this Trainer trains alone: one of several, say, under torchrun.
        mean = mean_over_ranks if trainer.world_size > 1 else None
        if module.automatic_optimization:
            self.oracle = WindowOracle(
                params, module, directional=directional, mean=mean, contexts=contexts
            )
        else:
            self.oracle = ClosureOracle(
                params,
                module,
                directional=directional,
                mean=mean,
                contexts=contexts,
                unwrap=_user_closure,
            )
        self.oracle.partial = window == "last"
        self._compiled = is_compiled(module)
        self._shadowed: Strategy | None = None
        self._forward_only: ForwardOnly | None = None

    @classmethod
    def attach(
        cls, trainer: pl.Trainer, *, directional: DirectionalMethod = "auto", window: Window = "all"
    ) -> "StepRecorder | None":
        """Attach an oracle to the Trainer's optimizer, unless someone did or nothing asks.

        Args:
            trainer: The Trainer, after its optimizers were set up.
            directional: See `WindowOracle`.
            window: See `StepRecorder`.

        Returns:
            The recorder, or None if there is nothing to do.

        Raises:
            MisconfigurationException: If the optimizer's questions cannot be answered here.
        """
        check_choice("window", window, ("all", "last"))
        strategy = trainer.strategy
        if getattr(strategy, _MARKER, None) is not None:
            return None
        optimizers = [_unwrapped(optimizer) for optimizer in strategy.optimizers]
        ours = [o for o in optimizers if isinstance(o, CurvatureOptimizer)]
        for optimizer in ours:
            if optimizer.needs_whole_params:
                refuse_strategy(strategy, optimizer)
                refuse_parts_of_state(trainer.world_size, optimizer)
        asking = [o for o in ours if o.asks]
        if not asking:
            return None
        refuse_strategy(strategy, asking[0])
        refuse_several_optimizers(asking)
        refuse_module(trainer.lightning_module, asking[0])
        refuse_precision(strategy.precision_plugin, trainer.lightning_module, asking[0])
        refuse_window(window, asking[0])
        recorder = cls(trainer, asking[0], directional=directional, window=window)
        asking[0].attach(recorder.oracle)
        setattr(strategy, _MARKER, recorder)
        if isinstance(asking[0], ZerothOrderOptimizer):
            recorder._forward_only = ForwardOnly(trainer, asking[0])
        recorder._watch_clipping(strategy)
        return recorder

    def stand_around(self, strategy: Strategy) -> None:
        """Shadow the ``training_step`` of a strategy that does not know of the recorder."""
        strategy.__dict__["training_step"] = functools.partial(self.around, strategy.training_step)
        self._shadowed = strategy

    def detach(self) -> None:
        """Undo everything that `attach` and `stand_around` did."""
        strategy = self.trainer.strategy
        if self._shadowed is not None:
            self._shadowed.__dict__.pop("training_step", None)
            self._shadowed = None
        strategy.precision_plugin.__dict__.pop("clip_gradients", None)
        if self._forward_only is not None:
            self._forward_only.undo()
            self._forward_only = None
        if getattr(strategy, _MARKER, None) is self:
            delattr(strategy, _MARKER)
        if self.optimizer.oracle is self.oracle:
            self.optimizer.detach()

    # Main passes

    def around(self, step: Callable[..., STEP_OUTPUT], *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Run the strategy's ``training_step``, watched if the coming step will ask.

        Args:
            step: The strategy's ``training_step``.
            *args: Its arguments.
            **kwargs: Its keyword arguments.
        """
        module = self.trainer.lightning_module
        if not (self.trainer.training and module.automatic_optimization):
            return step(*args, **kwargs)
        batch_idx = self.trainer.fit_loop.epoch_loop.batch_idx
        if self.window == "last" or batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.oracle.clear()
            if self._forward_only is not None:
                self._forward_only.refresh()
        if self.trainer.fit_loop._skip_backward:  # weight averaging refreshes batch norm like this
            self.oracle.without_backward = True
            return step(*args, **kwargs)
        asked = self.optimizer.wants_record()
        # A compiled module sees the mode: switching it on and off would compile everything twice.
        if not asked and not self._compiled:
            return step(*args, **kwargs)
        with self._watched(module, asked):
            return step(*args, **kwargs)

    @contextmanager
    def _watched(self, module: pl.LightningModule, asked: bool) -> Iterator[None]:
        original = module.training_step
        watch = self._record if asked else _only_captured
        with _instance_attribute(module, "training_step", functools.partial(watch, original)):
            yield

    def _record(
        self, training_step: Callable[..., STEP_OUTPUT], *args: Any, **kwargs: Any
    ) -> STEP_OUTPUT:
        """Run the module's ``training_step`` and remember how to run it again."""
        oracle = self.oracle
        versions = batch_versions((args, kwargs))
        batch = copied_containers((args, kwargs))
        with nullcontext() if oracle.main is None else oracle.main():
            environment = Environment.of(oracle.module, oracle.device, oracle.unchanging_buffers)
            with LossCapture() as capture:
                output = training_step(*args, **kwargs)
        check_batch_unchanged(versions)
        environment.learn_unchanging(oracle.unchanging_buffers)
        loss = _loss_of(output)
        if loss is not None:
            record = PassRecord(
                run=functools.partial(_run_again, training_step, batch),
                environment=environment,
                weight=self._weight(),
                loss=loss.detach().clone(),
                num_calls=len(capture.calls),
                versions=versions,
            )
            if oracle.main is None:
                oracle.observe(record, loss, capture.calls)
            oracle.add(record)
        return output

    def _weight(self) -> float:
        """Return what the loss of the present micro-batch counts in the step."""
        size = self.trainer.accumulate_grad_batches
        if self.window == "all":
            return 1.0 / size
        # It stands for all micro-batches so far: fewer than ``size`` in a short last window.
        return (self.trainer.fit_loop.epoch_loop.batch_idx % size + 1) / size

    @contextmanager
    def _silent(self) -> Iterator[None]:
        """Let the module's logging calls do nothing."""
        module = self.trainer.lightning_module
        with (
            _instance_attribute(module, "log", _nothing),
            _instance_attribute(module, "log_dict", _nothing),
        ):
            yield

    def _watch_clipping(self, strategy: Strategy) -> None:
        """Learn what gradient clipping does, which comes between backward and ``step``."""
        plugin = strategy.precision_plugin
        clip_gradients = plugin.clip_gradients

        @functools.wraps(clip_gradients)
        def watched(
            optimizer: Optimizer,
            clip_val: int | float = 0.0,
            gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
        ) -> None:
            params = [p for group in optimizer.param_groups for p in group["params"]]
            grads = [p.grad for p in params if p.grad is not None]
            ours = _unwrapped(optimizer) is self.optimizer and self.oracle.ready
            if ours and not grads:
                return  # torch cannot clip nothing by value
            if not (ours and grads and clip_val > 0):
                clip_gradients(optimizer, clip_val, gradient_clip_algorithm)
            elif gradient_clip_algorithm == GradClipAlgorithmType.VALUE:
                clip_gradients(optimizer, clip_val, gradient_clip_algorithm)
                self.oracle.clipped_by_value = True
            else:
                before = vectors.norm(grads)
                clip_gradients(optimizer, clip_val, gradient_clip_algorithm)
                factor = vectors.norm(grads) / before
                self.oracle.clip_factor = factor.nan_to_num(1.0, posinf=1.0)

        plugin.__dict__["clip_gradients"] = watched


def _unwrapped(optimizer: Any) -> Any:
    return optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


@contextmanager
def _instance_attribute(module: torch.nn.Module, name: str, value: Any) -> Iterator[None]:
    """Shadow a method of a module for a while."""
    attributes = module.__dict__
    missing = object()
    before = attributes.get(name, missing)
    attributes[name] = value
    try:
        yield
    finally:
        if before is missing:
            attributes.pop(name, None)
        else:
            attributes[name] = before


def _only_captured(step: Callable[..., STEP_OUTPUT], *args: Any, **kwargs: Any) -> STEP_OUTPUT:
    with LossCapture():
        return step(*args, **kwargs)


def _run_again(step: Callable[..., STEP_OUTPUT], batch: tuple[Any, Any]) -> Tensor | None:
    args, kwargs = copied_containers(batch)
    return _loss_of(step(*args, **kwargs))


def _loss_of(output: STEP_OUTPUT) -> Tensor | None:
    """Return the loss in what a training step returned, as Lightning reads it."""
    loss = output.get("loss") if isinstance(output, Mapping) else output
    return loss if isinstance(loss, Tensor) else None


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Stand for a logging call."""


def _user_closure(closure: Callable[[], Any]) -> Callable[[], Any]:
    """Return the user's own closure out of the one a precision plugin wrapped around it."""
    if isinstance(closure, functools.partial) and closure.args:
        inner = closure.args[-1]
        if callable(inner):
            return inner  # type: ignore[no-any-return]
    return closure
