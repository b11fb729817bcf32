"""Loss heads: loss calls with their arguments by name, and the weights of their examples.

The weights a_i are those of the examples (and positions, and outputs) in the total loss; `forms.py`
and `sampling.py` build the curvature of each loss from them.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
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
    "kl_div_on_first_axis",
    "kl_div_weights",
    "mse_weights",
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
