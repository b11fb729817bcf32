r"""The curvature of each loss function in its own inputs, as bilinear forms.

A loss call l = loss(z, targets) with inputs z (the logits) and tangents u = J d, v = J e
contributes ``c * u^T H v`` to d^T G e, where H is the Hessian of l in z and c = d(total loss) /
d(l). Cross-entropy, negative log-likelihood, squared error and binary cross-entropy have closed
forms; every other loss, and every call where more than the first input depends on the parameters,
goes through Hessian-vector products of the loss function alone.

Two losses take log-probabilities or probabilities. Their literal Hessian is zero, or is not the
Fisher, so they are treated as the cross-entropy they are part of: with z log-probabilities the
softmax of z returns the probabilities, and d^T G d is exact.

A list of forms is in the order of `pairs`: entries of a symmetric matrix on and above the diagonal.
"""

from collections.abc import Callable, Sequence
from itertools import combinations_with_replacement
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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
from lightning_curvature.oracle.protocol import RegressionScaling

__all__ = ["bilinear_forms", "generic_forms", "pairs", "symmetric"]


def pairs(count: int) -> list[tuple[int, int]]:
    """Return the entries on and above the diagonal of a symmetric matrix, row by row.

    Args:
        count: Its number of rows.
    """
    return list(combinations_with_replacement(range(count), 2))


def symmetric(entries: Tensor, count: int) -> Tensor:
    """Return the symmetric matrix with these entries on and above the diagonal.

    Args:
        entries: In the order of `pairs`.
        count: Number of rows.
    """
    at = {pair: index for index, pair in enumerate(pairs(count))}
    order = [at[min(i, j), max(i, j)] for i in range(count) for j in range(count)]
    return torch.stack([entries[index] for index in order]).view(count, count)


def _forms(us: Sequence[Tensor], of_product: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Apply a linear function to the product u * v of every pair; it may overwrite the product."""
    return [of_product(us[i] * us[j]) for i, j in pairs(len(us))]


def _softmax_covariances(
    logits: Tensor, us: Sequence[Tensor], dim: int, weights: Tensor
) -> list[Tensor]:
    """Return the weighted sums of u^T (diag p - p p^T) v, in the form that cannot cancel."""
    p = torch.softmax(logits, dim)
    centered = [u - (p * u).sum(dim, keepdim=True) for u in us]

    def of_product(product: Tensor) -> Tensor:
        # In place: with many classes these are the largest tensors of the step.
        product = product.to(torch.promote_types(product.dtype, p.dtype)).mul_(p)
        return (weights * product.sum(dim)).sum()

    return _forms(centered, of_product)


_Tangents = Sequence[Tensor]


def _cross_entropy(
    a: Arguments, z: Tensor, us: _Tangents, c: Tensor, _: RegressionScaling
) -> list[Tensor]:
    weights, dim = cross_entropy_weights(a, z, c)
    return _softmax_covariances(z, us, dim, weights)


def _mse(
    a: Arguments, z: Tensor, us: _Tangents, c: Tensor, scaling: RegressionScaling
) -> list[Tensor]:
    weights = mse_weights(a, z, c, scaling)
    return _forms(us, lambda product: (2.0 * product * weights).sum())


def _bce_with_logits(
    a: Arguments, z: Tensor, us: _Tangents, c: Tensor, _: RegressionScaling
) -> list[Tensor]:
    p, weights = torch.sigmoid(z), bce_weights(a, z, c)
    return _forms(us, lambda product: (product * p * (1 - p) * weights).sum())


def _bce(a: Arguments, z: Tensor, us: _Tangents, c: Tensor, _: RegressionScaling) -> list[Tensor]:
    # The Fisher of a Bernoulli in its probability; torch clamps the same product at 1e-12.
    variance, weights = (z * (1 - z)).clamp_min(1e-12), bce_weights(a, z, c)
    return _forms(us, lambda product: (product / variance * weights).sum())


def _kl_div(
    a: Arguments, z: Tensor, us: _Tangents, c: Tensor, _: RegressionScaling
) -> list[Tensor]:
    def on_axis(dim: int) -> list[Tensor]:
        weights, _ = kl_div_weights(a, z, c, dim)
        return _softmax_covariances(z, us, dim, weights)

    on_first = kl_div_on_first_axis(z)
    on_last_axis = on_axis(-1)
    if on_first is None:
        return on_last_axis
    both = zip(on_axis(1), on_last_axis, strict=True)
    return [torch.where(on_first, first, last) for first, last in both]


_ClosedForm = Callable[[Arguments, Tensor, _Tangents, Tensor, RegressionScaling], list[Tensor]]

_CLOSED_FORMS: dict[Callable[..., Any], _ClosedForm] = {
    F.cross_entropy: _cross_entropy,
    F.nll_loss: _cross_entropy,
    F.mse_loss: _mse,
    F.binary_cross_entropy_with_logits: _bce_with_logits,
    F.binary_cross_entropy: _bce,
    F.kl_div: _kl_div,
}


def _products(xs: Sequence[Tensor | None], us: Sequence[Tensor]) -> list[Tensor]:
    return [(x * u).sum() for x, u in zip(xs, us, strict=True) if x is not None]


def generic_forms(
    loss: BoundLoss,
    values: Sequence[Tensor],
    tangents: Sequence[Sequence[Tensor]],
    coefficient: Tensor,
) -> list[Tensor]:
    """Return ``c * u^T H v`` by differentiating the loss function alone, twice per direction.

    Args:
        loss: The loss call.
        values: Its inputs z, in the order of ``loss.inputs``.
        tangents: For each direction its u, in the same order and of the same shapes.
        coefficient: d(total loss) / d(this loss), of the shape of the loss.

    Returns:
        0-dim tensors in the order of `pairs`.
    """
    forms = []
    with torch.enable_grad():
        leaves = [at_least_float32(z.detach()).clone().requires_grad_() for z in values]
        total = (coefficient * loss(leaves)).sum()
        grads = torch.autograd.grad(total, leaves, create_graph=True, allow_unused=True)
        for i, us in enumerate(tangents):
            slope = torch.stack(_products(grads, us)).sum()
            if not slope.requires_grad:  # piecewise linear, such as the absolute error
                return [torch.zeros_like(slope) for _ in pairs(len(tangents))]
            products = torch.autograd.grad(
                slope, leaves, allow_unused=True, retain_graph=i < len(tangents) - 1
            )
            for vs in tangents[i:]:
                terms = _products(products, vs)
                forms.append(torch.stack(terms).sum() if terms else torch.zeros_like(slope))
    return [form.detach() for form in forms]


def bilinear_forms(
    loss: BoundLoss,
    values: Sequence[Tensor],
    tangents: Sequence[Sequence[Tensor]],
    coefficient: Tensor,
    regression_scaling: RegressionScaling = "mean",
) -> list[Tensor]:
    """Return the shares ``c * u^T H v`` of one loss call in the products d^T G e of directions.

    Args:
        loss: The loss call.
        values: Its inputs z, in the order of ``loss.inputs``.
        tangents: For each direction the directional derivatives u = J d of the inputs, same order
            and shapes.
        coefficient: d(total loss) / d(this loss), of the shape of the loss.
        regression_scaling: See `Oracle.directional`.

    Returns:
        0-dim tensors in the order of `pairs`, in float32 or float64.
    """
    values = [at_least_float32(z) for z in values]
    tangents = [[at_least_float32(u) for u in us] for us in tangents]
    coefficient = at_least_float32(coefficient)
    closed = _CLOSED_FORMS.get(loss.function)
    if closed is None or loss.inputs != ("input",):
        return generic_forms(loss, values, tangents, coefficient)
    only = [us[0] for us in tangents]
    return closed(loss.arguments, values[0], only, coefficient, regression_scaling)
