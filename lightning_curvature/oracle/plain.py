"""ModelOracle: answers for an ordinary PyTorch loop, from a model and its loss function."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_curvature.oracle.capture import LossCapture
from lightning_curvature.oracle.closure import ClosureOracle
from lightning_curvature.oracle.extra_pass import Environment, in_extra_pass
from lightning_curvature.oracle.record import (
    PassRecord,
    batch_versions,
    check_batch_unchanged,
    copied_containers,
)
from lightning_curvature.oracle.window import DirectionalMethod

__all__ = ["ModelOracle"]


class _Forward:
    """One forward pass of the model that waits for its loss."""

    def __init__(self, args: Any, kwargs: Any, environment: Environment) -> None:
        self.arguments = copied_containers((args, kwargs))
        self.environment = environment
        self.versions = batch_versions((args, kwargs))
        self.output: Any = None
        self.finished = False


class _Hook:
    """A forward hook that copies and pickles of the model carry along without its effect."""

    def __init__(self, function: Callable[..., None] | None = None) -> None:
        self.function = function

    def __call__(self, *args: Any) -> None:
        if self.function is not None:
            self.function(*args)

    def __reduce__(self) -> tuple[type["_Hook"], tuple[()]]:
        return type(self), ()


class ModelOracle(ClosureOracle):
    """Watches a model and its loss function in an ordinary training loop.

    The model is watched through its forward hooks and the loss through `criterion`, which stands
    for the loss function in the loop. The weight of a loss in the step (1/k when it is divided by
    the number of accumulated batches) is read off its own backward. ``step(closure)`` works too.

    Args:
        params: Parameters of the optimizer, in its order.
        model: The model.
        loss_fn: Called as ``loss_fn(model_output, *targets)``, returns a scalar.
        wanted: Tells whether the coming step will ask anything.
        directional: See `WindowOracle`.
        grad_scaler: Scaler of a float16 loop, so that its scale is not taken for a weight.
        mean: See `WindowOracle`.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        model: nn.Module,
        loss_fn: Callable[..., Tensor],
        *,
        wanted: Callable[[], bool],
        directional: DirectionalMethod = "auto",
        grad_scaler: torch.amp.GradScaler | None = None,
        mean: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        holder = nn.ModuleList([model, loss_fn]) if isinstance(loss_fn, nn.Module) else model
        super().__init__(params, holder, directional=directional, mean=mean)
        self._model = model
        self._loss_fn = loss_fn
        self._wanted = wanted
        self._grad_scaler = grad_scaler
        self._forward: _Forward | None = None
        self._step = 0
        # Of optimizers without a backward: what surrounds the forward that runs, and losses that
        # nobody has called backward on.
        self._open = ExitStack()
        self._unfinished: tuple[PassRecord, Tensor] | None = None
        self._hooks = [
            model.register_forward_pre_hook(_Hook(self._before_forward), with_kwargs=True),
            model.register_forward_hook(_Hook(self._after_forward), always_call=True),
        ]

    def close(self) -> None:
        """Remove the hooks from the model."""
        super().close()
        self._leave()
        for hook in self._hooks:
            hook.remove()
        self._forward = None

    def missing(self) -> str | None:
        """Tell the user what was needed when gradients came without a recorded loss."""
        if self.main is not None:
            return (
                "found no recorded loss. Compute the loss with the function that attach_model "
                "returned, on the output of the attached model and outside of torch.no_grad(), or "
                "pass a closure to step."
            )
        return (
            "found gradients without a recorded loss. Compute the loss with the function that "
            "attach_model returned, on the output of the attached model, or pass a closure to step."
        )

    def clear(self) -> None:
        """Forget the recorded micro-batches."""
        super().clear()
        self._forward = None
        self._unfinished = None
        self._step += 1

    def zeroed(self) -> None:
        """Forget batches whose gradient is gone: their step was skipped (by a scaler, say)."""
        if not (self.recording or in_extra_pass()):
            self._leave()
            self._unfinished = None
            self.records = []
            self._drop_finished()
            for attachment in self.attachments:
                attachment.zeroed()

    def finish_main(self) -> None:
        """Take the last loss for that of the step if there was no backward."""
        if not self._recorded() and self._unfinished:
            record, value = self._unfinished
            record.loss = value
            self.add(record)

    def _leave(self) -> None:
        """Leave what surrounds a forward that was broken off: torch calls no hook after Ctrl-C."""
        if self._forward is not None and not self._forward.finished:
            self._forward = None
        self._open.close()

    def _before_forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.recording or in_extra_pass():
            return
        self._leave()
        if not torch.is_grad_enabled() or not self._wanted():
            return
        if self._forward is not None:  # an evaluation with gradients on, say
            for attachment in self.attachments:
                attachment.forward_dropped()
        if self.main is not None:
            self._open.enter_context(self.main(displace=False))
        environment = Environment.of(self.module, self.device, self.unchanging_buffers)
        self._forward = _Forward(args, kwargs, environment)

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        forward = self._forward
        if not in_extra_pass():
            self._open.close()
        if forward is not None and not forward.finished and not in_extra_pass():
            forward.output, forward.finished = output, True

    def criterion(self, output: Any, *targets: Any, **kwargs: Any) -> Tensor:
        """Compute the loss, as ``loss_fn`` does, and record it for the coming step.

        Args:
            output: What the model returned in its last forward pass.
            *targets: Further arguments of ``loss_fn``.
            **kwargs: Further keyword arguments of ``loss_fn``.

        Raises:
            RuntimeError: If ``output`` is not what the model returned last.
        """
        forward, self._forward = self._forward, None
        # Within a closure all is watched already; this forward was another one then.
        if forward is None or self.recording:
            return self._loss_fn(output, *targets, **kwargs)
        if output is not forward.output:
            raise RuntimeError(
                "The attached loss must be called with the very output of the attached model's "
                "last forward pass, so that both can be evaluated again. For anything else put the "
                "whole computation into a closure and call optimizer.step(closure)."
            )

        labels = copied_containers((targets, kwargs))

        def run() -> Tensor:
            args, named = copied_containers(forward.arguments)
            rest, named_rest = copied_containers(labels)
            return self._loss_fn(self._model(*args, **named), *rest, **named_rest)

        versions = batch_versions((targets, kwargs))
        with (
            nullcontext() if self.main is None else self.main(displace=False),
            LossCapture() as capture,
        ):
            loss = self._loss_fn(output, *targets, **kwargs)
        check_batch_unchanged(forward.versions + versions)
        forward.environment.learn_unchanging(self.unchanging_buffers)
        forward.output = None
        if self.main is not None and torch.is_grad_enabled() and not loss.requires_grad:
            # Something to call backward on, as in every other loop.
            loss = loss + torch.zeros_like(loss, requires_grad=True)
        if not loss.requires_grad:
            return loss
        earlier = self._recorded()  # through with their backward before this batch came
        record = PassRecord(run, forward.environment)
        if self.main is None:
            self.observe(record, loss, capture.calls)
        record.num_calls = len(capture.calls)
        record.versions = forward.versions + versions
        value = loss.detach().clone()
        step = self._step
        if self.main is not None:
            self._unfinished = (record, value)

        # The batch belongs to the graph of its loss until the backward: a loss that is only looked
        # at takes it along.
        def finish(weight: Tensor) -> None:
            if step != self._step:  # the weights have moved since
                return
            zeroed = self.main is None and all(p.grad is None for p in self.params)
            if record.loss is None and zeroed:
                # Zeroed by the model, perhaps, after a step that was skipped.
                self.records = [r for r in self.records if all(r is not e for e in earlier)]
                self._drop_finished()
            if self._grad_scaler is not None:
                # Not get_scale(), which would wait for the device.
                weight = weight / self._grad_scaler.scale(torch.ones_like(weight))
            if record.loss is None:
                self.add(record)
            else:
                weight = record.weight + weight
            record.weight, record.loss = weight, value

        loss.register_hook(finish)  # type: ignore[no-untyped-call]
        return loss
