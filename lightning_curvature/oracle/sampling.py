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

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_curvature import vectors
from lightning_curvature.oracle.heads import (
    Arguments,
    BoundLoss,
    at_least_float32,
    bce_weights,
    cross_entropy_weights,
    kl_div_on_first_axis,
    kl_div_weights,
    mse_weights,
)
from lightning_curvature.oracle.labels import LabelSampler
from lightning_curvature.oracle.record import LossTerm

__all__ = ["Sample", "sample_gradients"]


# Losses whose Hessian in one input is diagonal.
_ENTRYWISE = (
    F.l1_loss,
    F.smooth_l1_loss,
    F.huber_loss,
    F.gaussian_nll_loss,
    F.poisson_nll_loss,
    F.soft_margin_loss,
)


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


class _Root(NamedTuple):
    """Gradients with respect to the inputs of a loss, and the weight of each example.

    The expectation of ``values partners^T`` is the loss's Hessian; ``partners`` is None where it
    is the same as ``values``.
    """

    values: dict[str, Tensor]
    weights: Tensor
    partners: dict[str, Tensor] | None = None

    def part(self, fraction: float) -> "_Root":
        """Return that of the first examples, weighted for all."""
        count = self.weights.shape[0] if self.weights.dim() else 1
        kept = max(1, math.ceil(fraction * count - 1e-9))
        if kept == count:
            return self
        factor = count / kept

        def cut(values: dict[str, Tensor]) -> dict[str, Tensor]:
            return {
                name: _first(x, kept) * math.sqrt(factor) if x.shape[:1] == (count,) else x
                for name, x in values.items()
            }

        partners = None if self.partners is None else cut(self.partners)
        return _Root(cut(self.values), _first(self.weights, kept) * factor, partners)


def _first(x: Tensor, count: int) -> Tensor:
    """Return a tensor with zeros after the first entries of its first axis."""
    return torch.cat([x[:count], torch.zeros_like(x[count:])])


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
    roots: list[_Root] = []
    outputs: list[Tensor] = []
    for term in terms:
        root = _root(term, sampler)
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


def _root(term: LossTerm, sampler: LabelSampler) -> _Root:
    """Draw for one loss call."""
    loss = term.loss.detached()
    arguments: Arguments = loss.arguments
    coefficient = at_least_float32(term.coefficient.detach())
    if loss.inputs == ("input",):
        z = at_least_float32(arguments["input"])
        if loss.function in (F.cross_entropy, F.nll_loss):
            weights, dim = cross_entropy_weights(arguments, z, coefficient)
            return _softmax_root(z, weights, dim, sampler, term.index)
        if loss.function is F.kl_div:
            return _kl_div_root(arguments, z, coefficient, sampler, term.index)
        if loss.function is F.binary_cross_entropy_with_logits:
            weights = bce_weights(arguments, z, coefficient).clamp_min(0.0)
            p = torch.sigmoid(z)
            value = weights.sqrt() * (p - sampler.bernoulli(p, term.index))
            return _Root({"input": value}, _per_example(weights))
        if loss.function is F.binary_cross_entropy:
            weights = bce_weights(arguments, z, coefficient).clamp_min(0.0)
            scale = (z * (1 - z)).clamp_min(1e-12)
            value = weights.sqrt() * (z - sampler.bernoulli(z, term.index)) / scale
            return _Root({"input": value}, _per_example(weights))
    if loss.function is F.mse_loss and set(loss.inputs) <= {"input", "target"}:
        return _mse_root(loss, coefficient, sampler, term.index)
    return _generic_root(loss, coefficient, sampler, term.index)


def _softmax_root(z: Tensor, weights: Tensor, dim: int, sampler: LabelSampler, call: int) -> _Root:
    weights = weights.clamp_min(0.0)
    p = torch.softmax(z, dim)
    labels = sampler.categorical(p, dim, call).unsqueeze(dim)
    score = p.scatter_add(dim, labels, torch.full_like(p.narrow(dim, 0, 1), -1.0))
    return _Root({"input": score * weights.sqrt().unsqueeze(dim)}, weights)


def _kl_div_root(
    arguments: Arguments, z: Tensor, coefficient: Tensor, sampler: LabelSampler, call: int
) -> _Root:
    last = _softmax_root(z, *kl_div_weights(arguments, z, coefficient, -1), sampler, call)
    on_first = kl_div_on_first_axis(z)
    if on_first is None:
        return last
    first = _softmax_root(z, *kl_div_weights(arguments, z, coefficient, 1), sampler, call)
    value = torch.where(on_first, first.values["input"], last.values["input"])
    weights = torch.where(on_first, _per_example(first.weights), _per_example(last.weights))
    return _Root({"input": value}, weights)


def _mse_root(loss: BoundLoss, coefficient: Tensor, sampler: LabelSampler, call: int) -> _Root:
    # The loss is the negative log-likelihood of a normal distribution of variance 1 / (2 a).
    z = at_least_float32(loss.arguments["input"])
    weights = mse_weights(loss.arguments, z, coefficient).clamp_min(0.0)
    noise = sampler.normal(z.expand(weights.shape), call)
    value = (2 * weights).sqrt() * noise
    signs = {"input": 1.0, "target": -1.0}
    values = {
        name: (signs[name] * value).sum_to_size(loss.arguments[name].shape) for name in loss.inputs
    }
    return _Root(values, _per_example(weights))


def _generic_root(loss: BoundLoss, coefficient: Tensor, sampler: LabelSampler, call: int) -> _Root:
    """Use the loss's own second derivative, with random signs.

    Where it acts on every entry by itself a root is known, and curvature below zero counts as zero.
    """
    signs, products = _random_product(loss, coefficient, sampler, call)
    size = coefficient.new_tensor(loss.values()[0].numel())
    mean = loss.arguments.get("reduction", "mean") == "mean"
    weights = coefficient.abs() / (size.clamp_min(1.0) if mean else 1.0)
    if weights.dim() == 0:
        weights = weights.expand(signs[0].shape)
    weights = _per_example(weights)
    names = loss.inputs
    if loss.function in _ENTRYWISE and len(names) == 1:
        (r,), (product,) = signs, products
        return _Root({names[0]: r * (r * product).clamp_min(0.0).sqrt()}, weights)
    # Both of one size, so that what belongs to different losses does not add variance.
    scale = (vectors.norm(products) / vectors.norm(signs)).sqrt()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    values = {name: r * scale for name, r in zip(names, signs, strict=True)}
    partners = {name: product / scale for name, product in zip(names, products, strict=True)}
    return _Root(values, weights, partners)


def _random_product(
    loss: BoundLoss, coefficient: Tensor, sampler: LabelSampler, call: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Return random signs for the inputs of a loss, and the product of its Hessian with them."""
    # Nobody who captures the losses of this pass may see this call.
    with torch.enable_grad(), torch._C.DisableTorchFunction():
        leaves = [at_least_float32(z).clone().requires_grad_() for z in loss.values()]
        inputs = zip(leaves, loss.inputs, strict=True)
        signs = [sampler.signs(z.detach(), call, name) for z, name in inputs]
        total = (coefficient * loss(leaves)).sum()
        grads: Sequence[Tensor | None] = torch.autograd.grad(
            total, leaves, create_graph=True, allow_unused=True
        )
        slopes = [
            (g * r).sum()
            for g, r in zip(grads, signs, strict=True)
            if g is not None and g.requires_grad
        ]
        if not slopes:  # piecewise linear, such as the absolute error
            return signs, [torch.zeros_like(r) for r in signs]
        products = torch.autograd.grad(torch.stack(slopes).sum(), leaves, materialize_grads=True)
    return signs, [product.detach() for product in products]


def _per_example(weights: Tensor) -> Tensor:
    """Add the weights of the outputs of an example up."""
    return weights.flatten(1).sum(1) if weights.dim() > 1 else weights
