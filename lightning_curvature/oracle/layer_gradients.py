"""Gradients at the outputs of layers: roots of the losses' curvature sent back."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lightning_curvature.oracle.labels import LabelSampler
from lightning_curvature.oracle.plans import LayerPlan
from lightning_curvature.oracle.reach import losses_behind
from lightning_curvature.oracle.record import LossTerm
from lightning_curvature.oracle.roots import Root, layer_roots

__all__ = ["LayerGradients", "layer_gradients"]

_Found = tuple[list[Tensor | None], list[Tensor | None]]


class LayerGradients(NamedTuple):
    """What one micro-batch says; see `LayerObserver.observe`.

    Attributes:
        gradients: For every root the gradients at the edges, and those of the parameters.
        weights: Weights of the examples in each loss.
        behind: For every edge the numbers of the losses that lead to it; None for all.
    """

    gradients: list[_Found]
    weights: list[Tensor]
    behind: list[tuple[int, ...]] | None


def layer_gradients(
    terms: Sequence[LossTerm],
    edges: Sequence[GradientEdge],
    params: Sequence[Tensor],
    plan: LayerPlan,
    key: Sequence[int],
) -> LayerGradients | None:
    """Differentiate the roots of the losses of a pass; its graph is kept.

    What is not asked for is not computed: with the outputs of all layers as ends the backward
    spares the products that make gradients of weights.

    Args:
        terms: The losses, connected to the graph.
        edges: Outputs of layers.
        params: Parameters, all of which require a gradient.
        plan: What to send back.
        key: Rank and number of the micro-batch, so that no two draw alike.

    Returns:
        The gradients; None if there is no loss, or nothing to differentiate.
    """
    ends: Any = [*edges, *params]
    if not terms or not ends:
        return None
    weights: list[Tensor] = []
    gradients: list[_Found] = []
    # The others are not random.
    samples = plan.num_samples if plan.fisher_type in ("mc", "curvature-propagation") else 1
    for sample in range(samples):
        sampler = plan.sampler(plan.seed, plan.step, *key, *([sample] if sample else []))
        for roots, first in _together(terms, plan, sampler):
            if sample == 0 and first:
                weights += [root.weights for _, root in roots]
            scale = samples**-0.5
            outputs, vectors = [], []
            for term, root in roots:
                for name, value in root.values.items():
                    output = term.loss.arguments[name]
                    outputs.append(output)
                    vectors.append((value if scale == 1 else value * scale).to(output.dtype))
            found = torch.autograd.grad(
                outputs, ends, vectors, retain_graph=True, allow_unused=True
            )
            gradients.append((list(found[: len(edges)]), list(found[len(edges) :])))
    return LayerGradients(gradients, weights, losses_behind(terms, edges))


def _together(
    terms: Sequence[LossTerm], plan: LayerPlan, sampler: LabelSampler
) -> Iterator[tuple[list[tuple[LossTerm, Root]], bool]]:
    """Yield the roots that go back in one backward, and whether they are the first of a loss.

    Random roots of different losses are independent, so that one backward serves all.
    """

    def roots(term: LossTerm) -> Iterator[Root]:
        return layer_roots(
            term,
            plan.fisher_type,
            sampler,
            official_empirical_scaling=plan.official_empirical_scaling,
        )

    if plan.fisher_type != "type-2":
        yield [(term, root) for term in terms for root in roots(term)], True
        return
    for term in terms:
        for number, root in enumerate(roots(term)):
            yield [(term, root)], number == 0
