r"""Loss heads: the curvature of each loss function in its own inputs.

A loss call l = loss(z, targets) with inputs z (the logits) and tangents u = J d contributes
``c * u^T H u`` to d^T G d, where H is the Hessian of l in z and c = d(total loss) / d(l).
Cross-entropy, negative log-likelihood, squared error and binary cross-entropy have closed forms;
every other loss, and every call where more than the first input depends on the parameters, goes
through a Hessian-vector product of the loss function alone.

Two losses take log-probabilities or probabilities. Their literal Hessian is zero, or is not the
Fisher, so they are treated as the cross-entropy they are part of: with z log-probabilities the
softmax of z returns the probabilities, and d^T G d is exact.

Index letters: n examples (and positions), k classes.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_curvature.oracle.capture import DECLARED, RawCall, declare_loss
from lightning_curvature.oracle.protocol import RegressionScaling

__all__ = [
    "Arguments",
    "BoundLoss",
    "at_least_float32",
    "bce_weights",
    "bind_loss",
    "cross_entropy_weights",
    "generic_form",
    "kl_div_on_first_axis",
    "kl_div_weights",
    "mse_weights",
    "quadratic_form",
]

Arguments = dict[str, Any]


@dataclass(frozen=True)
class BoundLoss:
    """A loss call with its arguments by name.

    Attributes:
        function: The loss function; for a declared loss the function it was declared to be.
        arguments: All arguments by name, defaults filled in.
        inputs: Names of the tensor arguments that depend on the parameters.
    """

    function: Callable[..., Any]
    arguments: Arguments
    inputs: tuple[str, ...]

    def detached(self) -> "BoundLoss":
        """Return the same call without its graph."""
        arguments = {
            name: value.detach() if isinstance(value, Tensor) else value
            for name, value in self.arguments.items()
        }
        return BoundLoss(self.function, arguments, self.inputs)

    def values(self) -> list[Tensor]:
        """Return the inputs, detached."""
        return [self.arguments[name].detach() for name in self.inputs]

    def __call__(self, values: Sequence[Tensor]) -> Tensor:
        """Call the loss function with other values for its inputs."""
        arguments = {**self.arguments, **dict(zip(self.inputs, values, strict=True))}
        output: Tensor = self.function(**arguments)
        return output


@cache
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)


def _declared_function(kind: Callable[[Tensor, Any], Tensor]) -> Callable[..., Tensor]:
    def call(input: Tensor, target: Any) -> Tensor:
        return kind(input, target)

    return call


def bind_loss(raw: RawCall, inputs: tuple[str, ...] | None = None) -> BoundLoss:
    """Give the arguments of a captured call their names.

    Args:
        raw: The call as captured.
        inputs: Names of the inputs, if known from the main pass; by default the tensors that
            require a gradient.
    """
    function = raw.function
    bound = _signature(function).bind(*raw.args, **raw.kwargs)
    bound.apply_defaults()
    arguments: Arguments = dict(bound.arguments)
    if function is declare_loss:
        kind = arguments["kind"]
        named = {"input": arguments["logits"], "target": arguments["targets"]}
        if callable(kind):
            function, arguments = _declared_function(kind), named
        else:
            function = DECLARED[kind]
            bound = _signature(function).bind(**named, reduction=arguments["reduction"])
            bound.apply_defaults()
            arguments = dict(bound.arguments)
    # Deprecated spellings of the reduction; torch resolves them in the same way.
    if arguments.pop("size_average", None) is False:
        arguments["reduction"] = "sum"
    if arguments.pop("reduce", None) is False:
        arguments["reduction"] = "none"
    if inputs is None:
        inputs = tuple(
            name
            for name, value in arguments.items()
            if isinstance(value, Tensor) and value.requires_grad
        )
    return BoundLoss(function, arguments, inputs)


def at_least_float32(x: Tensor) -> Tensor:
    """Return a tensor in float32, or float64 if it is."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


# Weights a_i of the examples (and positions, and outputs) in the total loss, coefficient included.


def _weights(mass: Tensor, coefficient: Tensor, reduction: str, normalizer: Any) -> Tensor:
    """Return the weights that a loss's own reduction and the coefficient give."""
    return coefficient * mass / normalizer if reduction == "mean" else coefficient * mass


def cross_entropy_weights(a: Arguments, z: Tensor, c: Tensor) -> tuple[Tensor, int]:
    """Return the weights of a cross-entropy, of the shape of z without classes, and their axis.

    Args:
        a: Arguments of the loss.
        z: Its logits.
        c: d(total loss) / d(this loss).
    """
    # -sum_k m_k log softmax(z)_k has Hessian (sum_k m_k) (diag p - p p^T): only the mass counts.
    dim = 1 if z.dim() > 1 else 0
    num_classes = z.shape[dim]
    weight, target, reduction = a.get("weight"), a["target"], a["reduction"]
    smoothing = a.get("label_smoothing", 0.0)
    if target.is_floating_point():
        soft = target * (1 - smoothing) + smoothing / num_classes
        if weight is not None:
            soft = soft * weight.reshape([-1] + [1] * (z.dim() - dim - 1))
        return _weights(soft.sum(dim), c, reduction, z.numel() // num_classes), dim
    valid = target != a["ignore_index"]
    if weight is None:
        normalizer, mass = valid.sum(), valid.to(z.dtype)
    else:
        of_label = torch.where(valid, weight[torch.where(valid, target, 0)], 0.0)
        normalizer = of_label.sum()
        spread = smoothing / num_classes * weight.sum()
        mass = torch.where(valid, (1 - smoothing) * of_label + spread, 0.0)
    # Without any target the loss is 0/0, but its gradient in torch is 0: so is its curvature.
    normalizer = torch.where(valid.any(), normalizer, torch.ones_like(normalizer))
    return _weights(mass, c, reduction, normalizer), dim


def mse_weights(a: Arguments, z: Tensor, c: Tensor, scaling: RegressionScaling = "mean") -> Tensor:
    """Return the weights of a squared error, of the shape of its arguments broadcast."""
    shape = torch.broadcast_tensors(z, a["target"])[0].shape  # type: ignore[no-untyped-call]
    mass = torch.ones(shape, dtype=z.dtype, device=z.device)
    weight = a.get("weight")
    normalizer: Any = math.prod(shape)
    if weight is not None:
        mass, normalizer = mass * weight, weight.sum()
    if scaling == "per_example" and a["reduction"] == "mean" and len(shape) > 0:
        normalizer = normalizer * (shape[0] / math.prod(shape))
    return _weights(mass, c, a["reduction"], normalizer)


def bce_weights(a: Arguments, z: Tensor, c: Tensor) -> Tensor:
    """Return the weights of a binary cross-entropy, of the shape of z."""
    mass = torch.ones_like(z)
    if a.get("pos_weight") is not None:
        mass = mass * (1 + (a["pos_weight"] - 1) * a["target"])
    if a["weight"] is not None:
        mass = mass * a["weight"]
    return _weights(mass, c, a["reduction"], z.numel())


def kl_div_weights(a: Arguments, z: Tensor, c: Tensor, dim: int) -> tuple[Tensor, int]:
    """Return the weights of a divergence with the classes on an axis, and that axis."""
    # The target probabilities are the label mass.
    mass = a["target"].exp() if a["log_target"] else a["target"]
    if a["reduction"] == "none":
        return (c * mass).sum(dim), dim
    normalizer = {"batchmean": z.shape[0] if z.dim() else 1, "mean": z.numel()}
    return c * mass.sum(dim) / normalizer.get(a["reduction"], 1), dim


def kl_div_on_first_axis(z: Tensor) -> Tensor | None:
    """Tell whether the classes are on axis 1 (images), not the last; None if both are the same."""
    if z.dim() <= 2:  # noqa: PLR2004
        return None
    # Where the log-probabilities sum to one.
    off_first, off_last = (z.logsumexp(dim).abs().max() for dim in (1, -1))
    return off_first < off_last


def _softmax_variance(logits: Tensor, tangent: Tensor, dim: int) -> Tensor:
    """Return u^T (diag p - p p^T) u per example, in the form that cannot cancel."""
    p = torch.softmax(logits, dim)
    mean = (p * tangent).sum(dim, keepdim=True)
    return (p * (tangent - mean).square_()).sum(dim)


def _cross_entropy(a: Arguments, z: Tensor, u: Tensor, c: Tensor, _: RegressionScaling) -> Tensor:
    weights, dim = cross_entropy_weights(a, z, c)
    return (weights * _softmax_variance(z, u, dim)).sum()


def _mse(a: Arguments, z: Tensor, u: Tensor, c: Tensor, scaling: RegressionScaling) -> Tensor:
    return (2.0 * u.square() * mse_weights(a, z, c, scaling)).sum()


def _bce_with_logits(a: Arguments, z: Tensor, u: Tensor, c: Tensor, _: RegressionScaling) -> Tensor:
    p = torch.sigmoid(z)
    return (u.square() * p * (1 - p) * bce_weights(a, z, c)).sum()


def _bce(a: Arguments, z: Tensor, u: Tensor, c: Tensor, _: RegressionScaling) -> Tensor:
    # The Fisher of a Bernoulli in its probability; torch clamps the same product at 1e-12.
    return (u.square() / (z * (1 - z)).clamp_min(1e-12) * bce_weights(a, z, c)).sum()


def _kl_div(a: Arguments, z: Tensor, u: Tensor, c: Tensor, _: RegressionScaling) -> Tensor:
    def on_axis(dim: int) -> Tensor:
        weights, _ = kl_div_weights(a, z, c, dim)
        return (weights * _softmax_variance(z, u, dim)).sum()

    on_first = kl_div_on_first_axis(z)
    total = on_axis(-1)
    return total if on_first is None else torch.where(on_first, on_axis(1), total)


_ClosedForm = Callable[[Arguments, Tensor, Tensor, Tensor, RegressionScaling], Tensor]

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


def generic_form(
    loss: BoundLoss, values: Sequence[Tensor], tangents: Sequence[Tensor], coefficient: Tensor
) -> Tensor:
    """Return ``c * u^T H u`` by differentiating the loss function alone twice.

    Args:
        loss: The loss call.
        values: Its inputs z, in the order of ``loss.inputs``.
        tangents: u, in the same order and of the same shapes.
        coefficient: d(total loss) / d(this loss), of the shape of the loss.

    Returns:
        A 0-dim tensor.
    """
    with torch.enable_grad():
        leaves = [at_least_float32(z.detach()).clone().requires_grad_() for z in values]
        total = (coefficient * loss(leaves)).sum()
        grads = torch.autograd.grad(total, leaves, create_graph=True, allow_unused=True)
        slope = torch.stack(_products(grads, tangents)).sum()
        if not slope.requires_grad:  # piecewise linear, such as the absolute error
            return torch.zeros_like(slope)
        products = torch.autograd.grad(slope, leaves, allow_unused=True)
    terms = _products(products, tangents)
    return torch.stack(terms).sum() if terms else torch.zeros_like(slope)


def quadratic_form(
    loss: BoundLoss,
    values: Sequence[Tensor],
    tangents: Sequence[Tensor],
    coefficient: Tensor,
    regression_scaling: RegressionScaling = "mean",
) -> Tensor:
    """Return the share ``c * u^T H u`` of one loss call in d^T G d.

    Args:
        loss: The loss call.
        values: Its inputs z, in the order of ``loss.inputs``.
        tangents: Directional derivatives u = J d of the inputs, same order and shapes.
        coefficient: d(total loss) / d(this loss), of the shape of the loss.
        regression_scaling: See `Oracle.directional`.

    Returns:
        A 0-dim tensor, in float32 or float64.
    """
    values = [at_least_float32(z) for z in values]
    tangents = [at_least_float32(u) for u in tangents]
    coefficient = at_least_float32(coefficient)
    closed = _CLOSED_FORMS.get(loss.function)
    if closed is None or loss.inputs != ("input",):
        return generic_form(loss, values, tangents, coefficient)
    return closed(loss.arguments, values[0], tangents[0], coefficient, regression_scaling)
