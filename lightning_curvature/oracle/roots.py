r"""Roots of the curvature of a loss: vectors at the outputs of a model, to be back-propagated.

A loss sum_i a_i l(z_i, y_i) over examples (and positions) i with weights a_i has the curvature
a_i H_i at its own inputs, H_i = d^2 l / dz_i^2. A root is a vector v with one part v_i per example
such that

    E[v_i v_i^T] = a_i H_i,        independent parts, or parts that are looked at one by one.

Its gradients in the layers are those of a loss, so one backward through a graph that exists gives
sampled gradients (`sampling.py`) and the Kronecker factors of layers. The kinds of `layer_roots`:

    mc                      score of a drawn label: sqrt(a) dl/dz at y drawn from the model
    curvature-propagation   sqrt(a) B r, B B^T = H, random signs r (Martens et al. 2012,
                            "Estimating the Hessian by back-propagating curvature")
    type-2                  sqrt(a) B e_j for every column j: the sum is H, nothing is random
    empirical               sqrt(a) dl/dz at the label of the data: no root of H, but its
                            expectation is one where the model's labels are right

Factors B: diag(sqrt p) - p sqrt(p)^T for a softmax, the root of the diagonal where the loss acts on
every entry by itself. Other losses (a declared one of any form, or one of which several inputs
depend on the parameters) have no likelihood that is known: B is then the root of the Hessian of
each example, curvature below zero counting as zero, if an example has few outputs.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_curvature import vectors
from lightning_curvature.checks import check_choice
from lightning_curvature.oracle.heads import (
    BoundLoss,
    bce_weights,
    cross_entropy_weights,
    kl_div_on_first_axis,
    kl_div_weights,
    mse_weights,
)
from lightning_curvature.oracle.labels import LabelSampler
from lightning_curvature.oracle.output_factors import (
    Extent,
    Factor,
    chosen,
    differences,
    extent_of,
    factor_of,
    generic_weights,
    hessian_products,
    input_gradients,
    likelihood,
    logits,
    output_weights,
    per_example,
    precise,
    softmax_axes,
    softmax_weights,
)
from lightning_curvature.oracle.plans import FisherType
from lightning_curvature.oracle.record import LossTerm

__all__ = [
    "MAX_COLUMNS",
    "FisherType",
    "Root",
    "count_columns",
    "layer_roots",
    "sampled_root",
]

# Each column is one backward through the model.
MAX_COLUMNS = 4096
# Largest number of outputs of an example whose Hessian is formed.
_MAX_DENSE = 64


class Root(NamedTuple):
    """Gradients with respect to the inputs of a loss, and the weight of each example.

    The expectation of ``values partners^T`` is the loss's Hessian.

    Attributes:
        values: One tensor per input of the loss that depends on the parameters, by name.
        weights: a_i, of shape ``[examples]``, or ``[examples, positions...]`` where the loss has
            positions; 0-dim for a single example without a batch axis.
        partners: What ``values`` is multiplied with instead of itself, None for itself.
    """

    values: dict[str, Tensor]
    weights: Tensor
    partners: dict[str, Tensor] | None = None

    def part(self, fraction: float) -> "Root":
        """Return that of the first examples, weighted for all.

        Args:
            fraction: Share of the examples, in (0, 1].
        """
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
        return Root(cut(self.values), _first(self.weights, kept) * factor, partners)


def _first(x: Tensor, count: int) -> Tensor:
    """Return a tensor with zeros after the first entries of its first axis."""
    return torch.cat([x[:count], torch.zeros_like(x[count:])])


def count_columns(term: LossTerm) -> int:
    """Return how many roots ``fisher_type="type-2"`` takes for a loss.

    Args:
        term: The loss.

    Returns:
        The number of outputs of an example: classes times positions for a softmax.
    """
    return extent_of(term.loss).columns


def sampled_root(term: LossTerm, sampler: LabelSampler) -> Root:
    """Draw labels for a loss, or signs where its likelihood is unknown.

    Args:
        term: The loss.
        sampler: Draws the labels.

    Returns:
        The root; with partners where the likelihood is unknown.
    """
    loss, coefficient = precise(term)
    kind = likelihood(loss)
    if kind == "softmax":
        z = logits(loss)
        weights, dim = cross_entropy_weights(loss.arguments, z, coefficient)
        return _softmax_root(z, weights, dim, sampler, term.index)
    if kind == "divergence":
        return _kl_div_root(loss, coefficient, sampler, term.index)
    if kind == "bernoulli":
        return _bernoulli_root(loss, coefficient, sampler, term.index)
    if kind == "normal":
        return _mse_root(loss, coefficient, sampler, term.index)
    return _generic_root(loss, coefficient, sampler, term.index)


def _softmax_root(z: Tensor, weights: Tensor, dim: int, sampler: LabelSampler, call: int) -> Root:
    weights = weights.clamp_min(0.0)
    p = torch.softmax(z, dim)
    labels = sampler.categorical(p, dim, call).unsqueeze(dim)
    score = p.scatter_add(dim, labels, torch.full_like(p.narrow(dim, 0, 1), -1.0))
    return Root({"input": score * weights.sqrt().unsqueeze(dim)}, weights)


def _kl_div_root(loss: BoundLoss, coefficient: Tensor, sampler: LabelSampler, call: int) -> Root:
    z = logits(loss)
    arguments = loss.arguments
    last = _softmax_root(z, *kl_div_weights(arguments, z, coefficient, -1), sampler, call)
    on_first = kl_div_on_first_axis(z)
    if on_first is None:
        return last
    first = _softmax_root(z, *kl_div_weights(arguments, z, coefficient, 1), sampler, call)
    value = torch.where(on_first, first.values["input"], last.values["input"])
    weights = torch.where(on_first, per_example(first.weights), per_example(last.weights))
    return Root({"input": value}, weights)


def _bernoulli_root(loss: BoundLoss, coefficient: Tensor, sampler: LabelSampler, call: int) -> Root:
    z = logits(loss)
    weights = bce_weights(loss.arguments, z, coefficient).clamp_min(0.0)
    if loss.function is F.binary_cross_entropy_with_logits:
        p = torch.sigmoid(z)
        value = weights.sqrt() * (p - sampler.bernoulli(p, call))
    else:
        scale = (z * (1 - z)).clamp_min(1e-12)
        value = weights.sqrt() * (z - sampler.bernoulli(z, call)) / scale
    return Root({"input": value}, per_example(weights))


def _mse_root(loss: BoundLoss, coefficient: Tensor, sampler: LabelSampler, call: int) -> Root:
    # The loss is the negative log-likelihood of a normal distribution of variance 1 / (2 a).
    z = logits(loss)
    weights = mse_weights(loss.arguments, z, coefficient).clamp_min(0.0)
    noise = sampler.normal(z.expand(weights.shape), call)
    return Root(differences(loss, (2 * weights).sqrt() * noise), per_example(weights))


def _generic_root(loss: BoundLoss, coefficient: Tensor, sampler: LabelSampler, call: int) -> Root:
    """Use the loss's own second derivative, with random signs.

    Where it acts on every entry by itself a root is known, and curvature below zero counts as zero.
    """
    names = loss.inputs
    signs = [sampler.signs(z, call, name) for z, name in zip(loss.values(), names, strict=True)]
    (products,) = hessian_products(loss, coefficient, [signs])
    weights = per_example(generic_weights(loss, coefficient))
    if likelihood(loss) == "entrywise":
        (r,), (product,) = signs, products
        return Root({names[0]: r * (r * product).clamp_min(0.0).sqrt()}, weights)
    # Both of one size, so that what belongs to different losses does not add variance.
    scale = (vectors.norm(products) / vectors.norm(signs)).sqrt()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    values = {name: r * scale for name, r in zip(names, signs, strict=True)}
    partners = {name: product / scale for name, product in zip(names, products, strict=True)}
    return Root(values, weights, partners)


def layer_roots(
    term: LossTerm,
    fisher_type: FisherType,
    sampler: LabelSampler,
    *,
    official_empirical_scaling: bool = False,
) -> Iterator[Root]:
    """Return the roots to back-propagate for the Kronecker factors of layers.

    None of them has partners: factors are sums of squares. A loss of unknown likelihood with more
    than 64 outputs per example gives the empirical root for "mc" and "curvature-propagation".

    Args:
        term: The loss.
        fisher_type: See the head of this file.
        sampler: Draws labels and signs.
        official_empirical_scaling: Whether the empirical root is d(total loss) / dz as it is, which
            makes its square N times smaller for the mean over N examples, as in kfac-jax.

    Returns:
        An iterator over one root, or over one per column for "type-2", where the squares add up.

    Raises:
        ValueError: If the type is unknown, or "type-2" would take too many columns.
    """
    check_choice("fisher_type", fisher_type, get_args(FisherType))
    if fisher_type == "mc" and likelihood(term.loss) != "dense":
        return iter([sampled_root(term, sampler)])
    loss, coefficient = precise(term)
    extent = extent_of(loss)
    if fisher_type == "type-2":
        _check_columns(loss, extent.columns)
        return _columns(factor_of(loss, coefficient), extent)
    too_large = likelihood(loss) == "dense" and extent.columns > _MAX_DENSE
    if fisher_type == "empirical" or too_large:
        official = fisher_type == "empirical" and official_empirical_scaling
        return iter([_empirical_root(loss, coefficient, official)])
    factor = factor_of(loss, coefficient)
    signs = sampler.signs(factor.like, term.index, loss.inputs[0])
    return iter([Root(factor.apply(signs), factor.weights)])


def _check_columns(loss: BoundLoss, columns: int) -> None:
    dense = likelihood(loss) == "dense"
    allowed = _MAX_DENSE if dense else MAX_COLUMNS
    if columns > allowed:
        name = getattr(loss.function, "__name__", "the loss")
        kind = "a loss of unknown likelihood" if dense else name
        raise ValueError(
            f"fisher_type='type-2' takes one backward pass per output of an example: {columns} for "
            f"{kind} here, at most {allowed} are allowed. Use fisher_type='mc'."
        )


def _columns(factor: Factor, extent: Extent) -> Iterator[Root]:
    for column in range(extent.columns):
        unit = factor.like.new_zeros(extent.examples, extent.columns)
        unit[:, column] = 1.0
        yield Root(factor.apply(unit.view(extent.shape)), factor.weights)


def _empirical_root(loss: BoundLoss, coefficient: Tensor, official: bool) -> Root:
    """Return the gradient at the data's labels: the sum of v v^T is that of a_i dl_i dl_i^T."""
    grads = input_gradients(loss, coefficient)
    if likelihood(loss) in ("softmax", "divergence"):
        axes, on_first = softmax_axes(loss, coefficient)
        weights = softmax_weights(axes, on_first)
        (grad,) = grads
        spread = [w.unsqueeze(dim).expand_as(grad) for w, dim in axes]
        scales = [chosen(spread, on_first)]
    else:
        outputs = output_weights(loss, coefficient)
        weights = scale = per_example(outputs)
        if loss.arguments.get("reduction") == "sum" and outputs.dim() > 1:
            # The loss of an example is the sum over its outputs, with the weight of one of them.
            scale = outputs.flatten(1).mean(1)
        scales = [_like_examples(scale, grad) for grad in grads]
    if not official:
        pairs = zip(grads, scales, strict=True)
        grads = [grad * torch.where(a > 0, a.rsqrt(), 0.0) for grad, a in pairs]
    return Root(dict(zip(loss.inputs, grads, strict=True)), weights)


def _like_examples(weights: Tensor, x: Tensor) -> Tensor:
    """Give the weights of examples the axes of a tensor that has the examples first."""
    if weights.dim() and x.dim() and weights.shape[0] == x.shape[0]:
        return weights.view([-1] + [1] * (x.dim() - 1))
    # An input that all examples share.
    return weights.sum()
