"""What a graph hides from `torch.autograd.grad`, which returns zeros then, without any error."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction

__all__ = ["check_differentiable_twice", "hidden_parameters"]

_REENTRANT = "CheckpointFunctionBackward"
_ERROR = "torch::autograd::Error"


def _nodes(outputs: Iterable[Tensor | None]) -> Iterator[Any]:
    """Visit every node of a graph."""
    seen: set[Any] = {None}
    waiting: list[Any] = [output.grad_fn for output in outputs if output is not None]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        waiting += [following for following, _ in node.next_functions]


def hidden_parameters(total: Tensor, params: Iterable[Tensor]) -> set[int]:
    """Return the ids of parameters that only reentrant activation checkpointing may lead to.

    Args:
        total: The loss.
        params: Parameters that require a gradient.
    """
    found: set[int] = set()
    is_reentrant = False
    for node in _nodes([total]):
        is_reentrant = is_reentrant or node.name() == _REENTRANT
        variable = getattr(node, "variable", None)  # of a leaf
        if variable is not None:
            found.add(id(variable))
    return {id(p) for p in params if id(p) not in found} if is_reentrant else set()


def check_differentiable_twice(total: Tensor, grads: Sequence[Tensor | None]) -> None:
    """Check that no custom function cuts the graph of a gradient.

    Args:
        total: The loss.
        grads: Its gradient, with a graph.

    Raises:
        RuntimeError: If one is marked with ``once_differentiable``.
    """
    if any(node.name() == _ERROR for node in _nodes(grads)):
        custom = {
            type(node).__name__.removesuffix("Backward")
            for node in _nodes([total])
            if isinstance(node, BackwardCFunction)
        }
        names = ", ".join(sorted(custom)) or "one that it uses"
        raise RuntimeError(
            f"a custom autograd.Function is marked with once_differentiable; it has {names}"
        )
