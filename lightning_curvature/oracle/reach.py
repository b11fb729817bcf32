"""Which losses of a pass lead back to which outputs of layers."""

from collections.abc import Sequence

from torch.autograd.graph import GradientEdge, Node

from lightning_curvature.oracle.record import LossTerm

__all__ = ["losses_behind"]

# Of more losses than that all are taken to lead everywhere: a recurrent network calls one per step.
_MAX_LOSSES = 16


def losses_behind(
    terms: Sequence[LossTerm], edges: Sequence[GradientEdge]
) -> list[tuple[int, ...]] | None:
    """Return for every output the numbers of the losses whose gradients reach it.

    Args:
        terms: The losses, connected to the graph.
        edges: Outputs of layers.

    Returns:
        The numbers; None if all losses reach everything, or there are too many to tell.
    """
    if not 1 < len(terms) <= _MAX_LOSSES:
        return None
    # One bit per loss.
    bits: dict[Node, int] = {}
    for number, term in enumerate(terms):
        for output in term.loss.arguments.values():
            if getattr(output, "grad_fn", None) is not None:
                bits[output.grad_fn] = bits.get(output.grad_fn, 0) | 1 << number
    for node in _in_order(list(bits)):
        for following, _ in node.next_functions:
            if following is not None:
                bits[following] = bits.get(following, 0) | bits[node]
    found = [bits.get(edge.node, 0) for edge in edges]
    return [tuple(n for n in range(len(terms)) if mask >> n & 1) for mask in found]


def _in_order(starts: list[Node]) -> list[Node]:
    """Return all nodes behind some, every one before those behind it."""
    finished: list[Node] = []
    seen: set[Node] = set()
    left = [(node, False) for node in starts]
    while left:
        node, done = left.pop()
        if done:
            finished.append(node)
        elif node not in seen:
            seen.add(node)
            left.append((node, True))
            left += [(n, False) for n, _ in node.next_functions if n is not None]
    return finished[::-1]
