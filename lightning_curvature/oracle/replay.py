"""Runs recorded main passes again and pairs their loss calls with the recorded ones."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_curvature.oracle.capture import LossCapture, RawCall
from lightning_curvature.oracle.extra_pass import ContextFactory, extra_pass
from lightning_curvature.oracle.heads import BoundLoss, bind_loss
from lightning_curvature.oracle.record import LossTerm, PassRecord, check_batch_unchanged

__all__ = ["Replay", "eager", "is_compiled", "load_forward_mode", "matched_terms"]


class Replay:
    """Runs recorded passes again without a trace.

    Args:
        module: The module of the passes, None if unknown.
        contexts: Makers of contexts that every extra pass enters.

    Attributes:
        parameters: Ids of the parameters of the module.
        recurrent: Whether the module has an LSTM, GRU or RNN.
        cudnn: Whether it has layers that cuDNN computes on a GPU.
        compiled: Whether any part of it goes through `torch.compile`.
        checked_twice: Whether it is known that passes can be differentiated twice.
    """

    def __init__(self, module: nn.Module | None, contexts: Sequence[ContextFactory] = ()) -> None:
        self.module = module
        self.contexts = tuple(contexts)
        self.parameters = set() if module is None else {id(p) for p in module.parameters()}
        parts = () if module is None else module.modules()
        kinds = [type(part) for part in parts]
        self.recurrent = any(issubclass(kind, nn.RNNBase) for kind in kinds)
        self.compiled = module is not None and is_compiled(module)
        self.checked_twice = False
        self.cudnn = self.recurrent or any(issubclass(kind, _ConvNd) for kind in kinds)

    @contextmanager
    def running(self, record: PassRecord) -> Iterator[Tensor]:
        """Give the total loss of a pass at the present parameters, with a graph if grad mode is on.

        Whatever needs that graph must happen inside: leaving puts the buffers back in place.

        Args:
            record: The pass.

        Raises:
            RuntimeError: If it returns no loss this time.
        """
        check_batch_unchanged(record.versions)
        with extra_pass(record.environment, self.contexts):
            yield _present(record.run())

    def total(self, record: PassRecord) -> Tensor:
        """Return the total loss of a pass at the present parameters.

        Args:
            record: The pass.

        Raises:
            RuntimeError: If it returns no loss this time.
        """
        with self.running(record) as total:
            return total

    def total_alone(self, record: PassRecord) -> Tensor:
        """Return the total loss of a pass nobody captures the losses of.

        Args:
            record: The pass.

        Raises:
            RuntimeError: If it returns no loss this time.
        """
        # A compiled module sees the capture: without one it would be compiled once more.
        with LossCapture() if self.compiled else nullcontext():
            return self.total(record)

    def total_with(self, record: PassRecord, values: dict[int, Tensor]) -> Tensor:
        """Run a pass with other tensors in the place of parameters.

        Args:
            record: The pass.
            values: Replacements by ``id`` of the parameter.

        Raises:
            RuntimeError: If there is no module, or no loss.
        """
        if self.module is None:
            raise RuntimeError("Forward mode needs the module: call attach_model.")
        with _replaced(self.module, values), self.running(record) as total:
            return total


@contextmanager
def _replaced(module: nn.Module, values: dict[int, Tensor]) -> Iterator[None]:
    """Put other tensors into the place of parameters, wherever a parameter is used.

    Not `torch.func.functional_call`: it takes names, and a module registered under two of them
    would keep the replacements.
    """
    slots = [
        (part._parameters, name, parameter)
        for part in module.modules()
        for name, parameter in part._parameters.items()
        if parameter is not None and id(parameter) in values
    ]
    try:
        for slot, name, parameter in slots:
            slot[name] = values[id(parameter)]  # type: ignore[assignment]
        yield
    finally:
        for slot, name, parameter in slots:
            slot[name] = parameter


def _present(total: Tensor | None) -> Tensor:
    if total is None:
        raise RuntimeError(
            "The training step returned no loss in an extra pass, though it did in the main pass: "
            "it must do the same when it sees the same batch again."
        )
    return total


def matched_terms(record: PassRecord, calls: Sequence[RawCall]) -> list[tuple[LossTerm, BoundLoss]]:
    """Pair the terms of a main pass with the loss calls of an extra pass, by their index.

    Args:
        record: The main pass.
        calls: What was captured in the extra pass.

    Raises:
        RuntimeError: If the extra pass called other losses, or the same on other shapes.
    """
    same = len(calls) == record.num_calls
    matched = []
    for term in record.terms if same else ():
        loss = bind_loss(calls[term.index], term.loss.inputs)
        same = same and [v.shape for v in loss.values()] == [v.shape for v in term.loss.values()]
        matched.append((term, loss))
    if not same:
        raise RuntimeError(
            f"The training step called {len(calls)} loss functions in an extra pass and "
            f"{record.num_calls} in the main pass, or the same on other shapes: it must do the "
            "same when it sees the same batch again."
        )
    return matched


def eager() -> AbstractContextManager[None]:
    """Make a context in which compiled code runs as it was written."""
    context: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return context


def is_compiled(module: nn.Module) -> bool:
    """Tell whether any part of a module goes through `torch.compile`.

    Args:
        module: The module; Lightning marks those that were compiled as a whole.
    """
    if getattr(module, "_compiler_ctx", None) is not None:
        return True
    return any(
        isinstance(part, torch._dynamo.OptimizedModule) or part._compiled_call_impl is not None
        for part in module.modules()
    )


def load_forward_mode() -> None:
    """Load torch's rules for forward mode, whose import warns about torch's own code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.autograd.forward_ad._maybe_load_decompositions()  # type: ignore[no-untyped-call]
