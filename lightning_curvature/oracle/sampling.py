r"""Gradients under labels drawn from the model: the Gauss-Newton-Bartlett estimator.

A loss sum_i a_i l(z_i, y_i) over examples (and positions) i with weights a_i has the generalized
Gauss-Newton matrix G = sum_i a_i J_i^T H_i J_i. With labels drawn from the model's own likelihood
the scores s_i = dl/dz_i are independent, have mean zero and covariance H_i, so for

    g = sum_i sqrt(a_i) J_i^T s_i        E[g g^T] = G.

For the mean over B examples this is sqrt(B) times the gradient of the mean loss, whose square is
the B g*g of Liu et al., arXiv:2305.14342, algorithm 2; in this form the factor B is never needed,
and masked positions, ragged batches, class weights, sums and several losses come out right. The
draw goes in as a gradient with respect to the logits, so one backward through a graph that exists
is all it costs.

Where the likelihood is not known (a declared loss of any form, or one of which several inputs
depend on the parameters) there is no root of H either. With random signs r the product of two
gradients takes the place of the square,

    (J^T r) * (J^T H r)                                 of expectation diag G.

It takes a second backward, and single estimates may be negative.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_curvature.oracle.labels import LabelSampler
from lightning_curvature.oracle.record import LossTerm
from lightning_curvature.oracle.roots import Root, sampled_root

__all__ = ["Sample", "sample_gradients"]


class Sample(NamedTuple):
    """What one micro-batch says.

    Attributes:
        grads: g, one tensor per parameter; None where the loss does not depend on it.
        partners: What ``grads`` is multiplied with instead of itself, None for itself.
        mass: Sum of the weights a_i, a 0-dim tensor.
        squared_mass: Sum of their squares per example.
    """

    grads: list[Tensor | None]
    partners: list[Tensor | None] | None
    mass: Tensor
    squared_mass: Tensor


def sample_gradients(
    terms: Sequence[LossTerm],
    params: Sequence[Tensor],
    sampler: LabelSampler,
    fraction: float = 1.0,
) -> Sample | None:
    """Draw labels for the losses of a pass and differentiate; its graph is kept.

    Args:
        terms: The losses, connected to the graph.
        params: Parameters to differentiate with respect to.
        sampler: Draws the labels.
        fraction: Share of the examples to use: the first ones, which stand for all.

    Returns:
        The sample, None if no loss depends on the parameters.
    """
    trained = [p for p in params if p.requires_grad]
    roots: list[Root] = []
    outputs: list[Tensor] = []
    for term in terms:
        root = sampled_root(term, sampler)
        if fraction < 1:
            root = root.part(fraction)
        roots.append(root)
        outputs += [term.loss.arguments[name] for name in root.values]
    if not (outputs and trained):
        return None

    def differentiate(values: list[Tensor]) -> list[Tensor | None]:
        vector = [x.to(output.dtype) for x, output in zip(values, outputs, strict=True)]
        found = torch.autograd.grad(outputs, trained, vector, retain_graph=True, allow_unused=True)
        grads = dict(zip(map(id, trained), found, strict=True))
        return [grads.get(id(p)) for p in params]

    partners = None
    if any(root.partners is not None for root in roots):
        partners = differentiate([x for r in roots for x in (r.partners or r.values).values()])
    return Sample(
        differentiate([x for root in roots for x in root.values.values()]),
        partners,
        torch.stack([root.weights.sum() for root in roots]).sum(),
        torch.stack([root.weights.square().sum() for root in roots]).sum(),
    )
