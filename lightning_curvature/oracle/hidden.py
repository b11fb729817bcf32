"""Parameters that a graph hides: those inside of reentrant activation checkpointing.

To `torch.autograd.grad` they look as if the loss did not depend on them, without any error.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

__all__ = ["hidden_parameters"]

_REENTRANT = "CheckpointFunctionBackward"


def hidden_parameters(total: Tensor, params: Iterable[Tensor]) -> set[int]:
    """Return the ids of parameters that only reentrant checkpointing may lead to.

    Args:
        total: The loss.
        params: Parameters that require a gradient.
    """
    found: set[int] = set()
    is_reentrant = False
    seen: set[Any] = set()
    waiting: list[Any] = [total.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        is_reentrant = is_reentrant or node.name() == _REENTRANT
        variable = getattr(node, "variable", None)  # of a leaf
        if variable is not None:
            found.add(id(variable))
        waiting += [following for following, _ in node.next_functions]
    return {id(p) for p in params if id(p) not in found} if is_reentrant else set()
