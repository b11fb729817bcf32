"""ClosureOracle: answers made from an ordinary closure (zero_grad, forward, backward, return loss).

The closure runs once as the main pass, watched. For every further question it runs again with
``backward`` turned into "remember this loss", and with all gradients out of its reach.
"""

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from lightning_curvature.oracle.capture import LossCapture
from lightning_curvature.oracle.extra_pass import ContextFactory, Environment
from lightning_curvature.oracle.record import PassRecord
from lightning_curvature.oracle.window import DirectionalMethod, WindowOracle
from lightning_curvature.vectors import scalar_dtype

__all__ = ["ClosureOracle"]

Backward = Callable[..., None]
Replacement = Callable[[Backward, Any, Any, dict[str, Any]], None]


@contextmanager
def _backward_replaced(replacement: Replacement) -> Iterator[None]:
    """Send every ``Tensor.backward`` and ``torch.autograd.backward`` to another function."""
    original = torch.autograd.backward

    @functools.wraps(original)
    def backward(tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> None:
        named = inspect.signature(original).bind(tensors, grad_tensors, *args, **kwargs).arguments
        replacement(original, named.pop("tensors"), named.pop("grad_tensors", None), named)

    torch.autograd.backward = backward
    try:
        yield
    finally:
        torch.autograd.backward = original


def _total(tensors: Any, grad_tensors: Any) -> Tensor:
    """Return the scalar that a call of ``backward`` differentiates."""
    outputs = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    weights = [grad_tensors] if isinstance(grad_tensors, Tensor) else grad_tensors
    if weights is None:
        weights = [None] * len(outputs)
    parts = [t.sum() if w is None else (t * w).sum() for t, w in zip(outputs, weights, strict=True)]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()


class ClosureOracle(WindowOracle):
    """Answers by running a closure again.

    Args:
        params: Parameters of the optimizer, in its order.
        module: Module that holds them, for buffers and forward mode; None for a bare closure.
        directional: See `WindowOracle`.
        mean: See `WindowOracle`.
        contexts: See `WindowOracle`.
        unwrap: Returns the part of a closure that is run again, without the hooks around it.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        module: nn.Module | None = None,
        *,
        directional: DirectionalMethod = "auto",
        mean: Callable[[Tensor], Tensor] | None = None,
        contexts: Sequence[ContextFactory] = (),
        unwrap: Callable[[Callable[[], Any]], Callable[[], Any]] | None = None,
    ) -> None:
        super().__init__(params, module, directional=directional, mean=mean, contexts=contexts)
        self._unwrap = unwrap
        # By identity, now: while forward mode runs the module shows other tensors.
        self._owners = self.params if module is None else [*module.parameters()]
        self.recording = False

    def missing(self) -> str | None:
        """Tell the user what was needed when gradients came without a recorded loss."""
        return (
            "evaluates the loss again, which a loop without a closure does not allow. Call "
            "optimizer.step(closure), where closure() zeroes the gradients, computes the loss, "
            "runs backward and returns the loss."
        )

    def evaluate(self, closure: Callable[[], Any]) -> Any:
        """Run the closure once, watched, and return its result."""
        if self.main is not None:
            return self._evaluate_forward(closure, self.main)
        again = closure if self._unwrap is None else self._unwrap(closure)
        environment = Environment.of(self.module, self.device, self.unchanging_buffers)
        record = PassRecord(functools.partial(self._run_again, again), environment)
        self.recording = True
        try:
            with LossCapture() as capture:

                def watch(original: Backward, tensors: Any, weights: Any, rest: Any) -> None:
                    total = _total(tensors, weights)
                    self.observe(record, total, capture.calls)
                    value = total.detach().clone()
                    record.loss = value if record.loss is None else record.loss + value
                    original(tensors, weights, **rest)

                with _backward_replaced(watch):
                    result = closure()
        finally:
            self.recording = False
        environment.learn_unchanging(self.unchanging_buffers)
        record.num_calls = len(capture.calls)
        if record.loss is not None:
            self.add(record)
        return result

    def _evaluate_forward(
        self, closure: Callable[[], Any], main: Callable[..., AbstractContextManager[None]]
    ) -> Any:
        """Run the closure as a main pass that needs no backward.

        Args:
            closure: The closure. Its loss is what it calls backward on, otherwise its result.
            main: Surrounds the pass.
        """
        again = closure if self._unwrap is None else self._unwrap(closure)
        totals: list[Tensor] = []
        self.recording = True
        try:
            with main(), LossCapture() as capture:
                environment = Environment.of(self.module, self.device, self.unchanging_buffers)
                differentiated = torch.is_grad_enabled()

                def remember(original: Backward, tensors: Any, weights: Any, rest: Any) -> None:
                    totals.append(_total(tensors, weights).detach())
                    if differentiated and _total(tensors, weights).requires_grad:
                        original(tensors, weights, **rest)

                with _backward_replaced(remember):
                    result = closure()
        finally:
            self.recording = False
        environment.learn_unchanging(self.unchanging_buffers)
        value = None if totals else self._value(result)
        if value is not None and differentiated and value.requires_grad:
            raise RuntimeError(
                "Groups with first_order=True got no gradient: the closure ran no backward. Call "
                "optimizer.zero_grad() and loss.backward() in it."
            )
        if value is not None:
            totals = [value.detach().clone()]
        if totals:
            record = PassRecord(functools.partial(self._run_again, again), environment)
            record.loss = torch.stack(totals).sum()
            record.num_calls = len(capture.calls)
            self.add(record)
        return result

    def _value(self, result: Any) -> Tensor | None:
        """Return the loss that a closure without a backward returned, None for no loss.

        Raises:
            TypeError: If it returned something else.
            ValueError: If it returned more than one number.
        """
        if isinstance(result, (int, float)) and not isinstance(result, bool):
            if forward_ad._current_level >= 0:
                raise TypeError(
                    "The closure must return its loss as a tensor: a number has no derivative."
                )
            result = torch.tensor(result, dtype=scalar_dtype(self.params), device=self.device)
        if result is None:
            return None
        if not isinstance(result, Tensor):
            raise TypeError(
                "A closure that runs no backward must return the loss, a scalar tensor or a "
                f"number; got {type(result).__name__}."
            )
        if result.numel() != 1:
            raise ValueError(
                f"A closure must return one loss; got a tensor of shape {list(result.shape)}. "
                "Return its mean, say."
            )
        return result.reshape(())

    def _run_again(self, closure: Callable[[], Any]) -> Tensor | None:
        """Run the closure without a backward and without touching a gradient."""
        totals: list[Tensor] = []

        def remember(original: Backward, tensors: Any, weights: Any, rest: Any) -> None:
            totals.append(_total(tensors, weights))

        grads = [p.grad for p in self._owners]
        try:
            for p in self._owners:
                p.grad = None
            with _backward_replaced(remember):
                result = closure()
        finally:
            for p, grad in zip(self._owners, grads, strict=True):
                p.grad = grad
        if not totals:
            return None if self.main is None else self._value(result)
        return totals[0] if len(totals) == 1 else torch.stack(totals).sum()


def warn_bare_closure(name: str, *, is_forward_only: bool = False) -> None:
    """Tell the user what a bare closure cannot give.

    Args:
        name: Name of the optimizer.
        is_forward_only: Whether it asks for losses only.
    """
    limits = "" if is_forward_only else "curvature comes from finite differences, and "
    number = "this limit" if is_forward_only else "both limits"
    warnings.warn(
        f"{name} has only a closure to ask: {limits}BatchNorm statistics and metrics see every "
        f"extra pass. optimizer.attach_model(model, loss_fn) removes {number}.",
        RuntimeWarning,
        stacklevel=6,
    )
