r"""Output factors: for every loss a matrix B with B B^T its curvature in its own inputs.

diag(sqrt p) - p sqrt(p)^T for a softmax, and the root of the diagonal where the loss acts on every
entry by itself. Other losses (a declared one of any form, or one of which several inputs depend on
the parameters) have no likelihood that is known: B is then the root of the Hessian of each example,
curvature below zero counting as zero. `roots.py` says what B is for.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_curvature.oracle.heads import (
    BoundLoss,
    at_least_float32,
    bce_weights,
    cross_entropy_weights,
    kl_div_on_first_axis,
    kl_div_weights,
    mse_weights,
)
from lightning_curvature.oracle.record import LossTerm

__all__ = [
    "Extent",
    "Factor",
    "Likelihood",
    "chosen",
    "differences",
    "extent_of",
    "factor_of",
    "generic_weights",
    "hessian_products",
    "input_gradients",
    "likelihood",
    "logits",
    "output_weights",
    "per_example",
    "precise",
    "softmax_axes",
    "softmax_weights",
]

Likelihood = Literal["softmax", "divergence", "bernoulli", "normal", "entrywise", "dense"]

# What the losses are the negative log-likelihood of.
_LIKELIHOODS: dict[Callable[..., Any], Likelihood] = {
    F.cross_entropy: "softmax",
    F.nll_loss: "softmax",
    F.kl_div: "divergence",
    F.binary_cross_entropy_with_logits: "bernoulli",
    F.binary_cross_entropy: "bernoulli",
}

# Losses whose Hessian in one input is diagonal.
_ENTRYWISE = (
    F.l1_loss,
    F.smooth_l1_loss,
    F.huber_loss,
    F.gaussian_nll_loss,
    F.poisson_nll_loss,
    F.soft_margin_loss,
)


def likelihood(loss: BoundLoss) -> Likelihood:
    """Tell what a loss is the negative log-likelihood of, or else what its Hessian is like."""
    if loss.inputs == ("input",) and loss.function in _LIKELIHOODS:
        return _LIKELIHOODS[loss.function]
    if loss.function is F.mse_loss and set(loss.inputs) <= {"input", "target"}:
        return "normal"
    if loss.function in _ENTRYWISE and len(loss.inputs) == 1:
        return "entrywise"
    return "dense"


def precise(term: LossTerm) -> tuple[BoundLoss, Tensor]:
    """Return a loss without its graph and its coefficient, everything in float32 or float64.

    The inputs alone would not do: several losses take no half-precision targets or weights then.
    """
    loss = term.loss.detached()
    arguments = {
        name: at_least_float32(x) if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in loss.arguments.items()
    }
    coefficient = at_least_float32(term.coefficient.detach())
    return BoundLoss(loss.function, arguments, loss.inputs), coefficient


def logits(loss: BoundLoss) -> Tensor:
    """Return the first argument of a loss."""
    found: Tensor = loss.arguments["input"]
    return found


class Extent(NamedTuple):
    """Shape of what B is applied to, the examples in it, and the columns of B per example."""

    shape: tuple[int, ...]
    examples: int
    columns: int


def extent_of(loss: BoundLoss) -> Extent:
    """Return on what B of a loss acts."""
    kind = likelihood(loss)
    shapes = [tuple(loss.arguments[name].shape) for name in loss.inputs]
    shape = shapes[0]
    if kind == "normal":
        pair = (loss.arguments["input"].shape, loss.arguments["target"].shape)
        shape = tuple(torch.broadcast_shapes(*pair))  # type: ignore[no-untyped-call]
    # An unbatched softmax has an axis too, that of the classes.
    batched = len(shape) > (1 if kind in ("softmax", "divergence") else 0)
    batched = batched and all(other[:1] == shape[:1] for other in shapes)
    if kind == "dense":
        sizes = [math.prod(other[1:] if batched else other) for other in shapes]
        shape = (shape[0] if batched else 1, sum(sizes))
        batched = True
    inner = math.prod(shape[1:] if batched else shape)
    return Extent(shape, shape[0] if batched else 1, inner)


def per_example(weights: Tensor) -> Tensor:
    """Add the weights of the outputs of an example up."""
    return weights.flatten(1).sum(1) if weights.dim() > 1 else weights


def generic_weights(loss: BoundLoss, coefficient: Tensor) -> Tensor:
    """Return the weights of the outputs of a loss of which no more than the reduction is known."""
    first = loss.values()[0]
    size = coefficient.new_tensor(first.numel())
    mean = loss.arguments.get("reduction", "mean") == "mean"
    weights = coefficient.abs() / (size.clamp_min(1.0) if mean else 1.0)
    return weights.expand(first.shape) if weights.dim() == 0 else weights


def output_weights(loss: BoundLoss, coefficient: Tensor) -> Tensor:
    """Return the weights of the outputs of a loss that is no softmax."""
    kind = likelihood(loss)
    if kind == "bernoulli":
        return bce_weights(loss.arguments, logits(loss), coefficient).clamp_min(0.0)
    if kind == "normal":
        return mse_weights(loss.arguments, logits(loss), coefficient).clamp_min(0.0)
    # The losses of single examples were averaged by whoever called the loss.
    return coefficient.abs() if coefficient.dim() else generic_weights(loss, coefficient)


def input_gradients(loss: BoundLoss, coefficient: Tensor) -> list[Tensor]:
    """Return d(total loss) / d(inputs of this loss)."""
    # Nobody who captures the losses of this pass may see this call.
    with torch.enable_grad(), torch._C.DisableTorchFunction():
        leaves = _leaves(loss)
        total = (coefficient * loss(leaves)).sum()
        return list(torch.autograd.grad(total, leaves, materialize_grads=True))


def _leaves(loss: BoundLoss) -> list[Tensor]:
    return [z.clone().requires_grad_() for z in loss.values()]


def hessian_products(
    loss: BoundLoss, coefficient: Tensor, tangents: Sequence[Sequence[Tensor]]
) -> list[list[Tensor]]:
    """Return the products of the Hessian of coefficient * loss with vectors.

    Args:
        loss: The loss call.
        coefficient: d(total loss) / d(this loss).
        tangents: The vectors, each a list of tensors like the inputs.
    """
    with torch.enable_grad(), torch._C.DisableTorchFunction():
        leaves = _leaves(loss)
        total = (coefficient * loss(leaves)).sum()
        grads: Sequence[Tensor | None] = torch.autograd.grad(
            total, leaves, create_graph=True, allow_unused=True
        )
        found = []
        for tangent in tangents:
            slopes = [
                (g * r).sum()
                for g, r in zip(grads, tangent, strict=True)
                if g is not None and g.requires_grad
            ]
            if not slopes:  # piecewise linear, such as the absolute error
                found.append([torch.zeros_like(r) for r in tangent])
                continue
            slope = torch.stack(slopes).sum()
            products = torch.autograd.grad(slope, leaves, retain_graph=True, materialize_grads=True)
            found.append([product.detach() for product in products])
    return found


def differences(loss: BoundLoss, value: Tensor) -> dict[str, Tensor]:
    """Return the gradients in the inputs of a squared error, given that in their difference."""
    signs = {"input": 1.0, "target": -1.0}
    return {
        name: (signs[name] * value).sum_to_size(loss.arguments[name].shape) for name in loss.inputs
    }


def softmax_axes(
    loss: BoundLoss, coefficient: Tensor
) -> tuple[list[tuple[Tensor, int]], Tensor | None]:
    """Return weights and axis of the classes, and which of two it is if only the values tell."""
    z = logits(loss)
    if likelihood(loss) == "softmax":
        weights, dim = cross_entropy_weights(loss.arguments, z, coefficient)
        return [(weights.clamp_min(0.0), dim)], None
    on_first = kl_div_on_first_axis(z)
    axes = []
    for axis in (-1,) if on_first is None else (1, -1):
        weights, dim = kl_div_weights(loss.arguments, z, coefficient, axis)
        axes.append((weights.clamp_min(0.0), dim))
    return axes, on_first


def chosen(values: Sequence[Tensor], on_first: Tensor | None) -> Tensor:
    """Return the one of two tensors for the axis of the classes."""
    return values[0] if on_first is None else torch.where(on_first, values[0], values[1])


def softmax_weights(axes: Sequence[tuple[Tensor, int]], on_first: Tensor | None) -> Tensor:
    """Return the weights as those of a `Root`."""
    if on_first is None:
        return axes[0][0]
    return chosen([per_example(weights) for weights, _ in axes], on_first)


class Factor(NamedTuple):
    """B of a loss, for all examples at once.

    Attributes:
        apply: Multiplies with sqrt(a) B; its argument has the shape of ``like``.
        like: Says shape, dtype and device of what B is applied to.
        weights: As of `Root`.
    """

    apply: Callable[[Tensor], dict[str, Tensor]]
    like: Tensor
    weights: Tensor


def factor_of(loss: BoundLoss, coefficient: Tensor) -> Factor:
    """Return B of a loss, its weights inside.

    Args:
        loss: The loss call, from `precise`; an example of unknown likelihood must be small, since
            its Hessian is formed.
        coefficient: d(total loss) / d(this loss).
    """
    kind = likelihood(loss)
    if kind in ("softmax", "divergence"):
        return _softmax_factor(loss, coefficient)
    if kind == "dense":
        return _dense_factor(loss, coefficient)
    name = loss.inputs[0]
    z: Tensor = loss.arguments[name]
    if kind == "normal":
        weights = mse_weights(loss.arguments, logits(loss), coefficient).clamp_min(0.0)
        root = (2 * weights).sqrt()
        return Factor(lambda r: differences(loss, root * r), root, per_example(weights))
    if kind == "bernoulli":
        weights = bce_weights(loss.arguments, z, coefficient).clamp_min(0.0)
        if loss.function is F.binary_cross_entropy_with_logits:
            variance = torch.sigmoid(z) * torch.sigmoid(-z)
        else:
            variance = 1 / (z * (1 - z)).clamp_min(1e-12)
        root = (weights * variance).sqrt()
    else:
        ((diagonal,),) = hessian_products(loss, coefficient, [[torch.ones_like(z)]])
        weights = output_weights(loss, coefficient)
        root = diagonal.clamp_min(0.0).sqrt()
    return Factor(lambda r: {name: root * r}, root, per_example(weights))


def _softmax_factor(loss: BoundLoss, coefficient: Tensor) -> Factor:
    z = logits(loss)
    axes, on_first = softmax_axes(loss, coefficient)

    def on_axis(r: Tensor, weights: Tensor, dim: int) -> Tensor:
        p = torch.softmax(z, dim)
        part = p.sqrt() * r
        return weights.sqrt().unsqueeze(dim) * (part - p * part.sum(dim, keepdim=True))

    def apply(r: Tensor) -> dict[str, Tensor]:
        return {"input": chosen([on_axis(r, *axis) for axis in axes], on_first)}

    return Factor(apply, z, softmax_weights(axes, on_first))


def _dense_factor(loss: BoundLoss, coefficient: Tensor) -> Factor:
    """Form the Hessian of every example; what one example does to another is left out."""
    inputs = loss.values()
    examples, columns = extent_of(loss).shape
    shapes = [z.shape for z in inputs]
    # One example may be all of several inputs of unlike first axes; there may be none at all.
    single = any(shape[:1] != (examples,) for shape in shapes)
    sizes = [math.prod(shape if single else shape[1:]) for shape in shapes]

    def split(rows: Tensor) -> list[Tensor]:
        parts = torch.split(rows, sizes, dim=1)
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    def joined(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(
            [part.reshape(examples, size) for part, size in zip(parts, sizes, strict=True)], dim=1
        )

    units = inputs[0].new_zeros(columns, examples, columns)
    units.diagonal(dim1=0, dim2=2).fill_(1.0)
    products = hessian_products(loss, coefficient, [split(unit) for unit in units])
    hessian = torch.stack([joined(product) for product in products], dim=2)
    hessian = (hessian + hessian.transpose(1, 2)) / 2
    # A decomposition of anything not finite raises; a backward of it would not.
    finite = hessian.isfinite().flatten(1).all(1)[:, None, None]
    values, basis = torch.linalg.eigh(torch.where(finite, hessian, 0.0))
    root = basis * values.clamp_min(0.0).sqrt().unsqueeze(1)
    root = torch.where(finite, root, torch.nan)

    def apply(r: Tensor) -> dict[str, Tensor]:
        rows = (root @ r.unsqueeze(2)).squeeze(2)
        return dict(zip(loss.inputs, split(rows), strict=True))

    weights = per_example(output_weights(loss, coefficient))
    return Factor(apply, units[0], weights)
