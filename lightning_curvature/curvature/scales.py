"""Layers that scale and shift: normalization layers, and the bias of convolutions.

Their curvature is diagonal: squares of the gradients of single examples, which are sums over
positions (tokens, pixels). The first axis of an input is that of the examples, if it has one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from lightning_curvature.curvature.patches import CONVOLUTIONS, TRANSPOSED

__all__ = [
    "SCALE_LAYERS",
    "at_least_float32",
    "normalized",
    "scale_squares",
    "shift_squares",
    "unknown_layer",
]

SCALE_LAYERS: tuple[type[nn.Module], ...] = (
    _BatchNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    _InstanceNorm,
    nn.RMSNorm,
)


def at_least_float32(x: Tensor) -> Tensor:
    """Return a tensor of numbers that can be summed: half precision becomes float32.

    Args:
        x: Floating-point tensor.
    """
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def unknown_layer(layer: nn.Module, known: tuple[type[nn.Module], ...]) -> TypeError:
    """Return the error for a layer of a type that a function does not know.

    Args:
        layer: The layer.
        known: Types that it knows.
    """
    names = ", ".join(kind.__name__.strip("_") for kind in known)
    return TypeError(f"Invalid layer of type {type(layer).__name__}: must be one of {names}.")


def normalized(layer: nn.Module, given: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return the normalized input and the output gradient, channels last.

    Axes that share their channels are one: ``[examples, ..., channels]``. A batch normalization in
    training uses the statistics of this input, also where it shares them with other ranks
    (`torch.nn.SyncBatchNorm`). Its running statistics stay as they are.

    Args:
        layer: One of `SCALE_LAYERS`.
        given: Its input, with an axis of examples.
        grad: The gradient of its output.
    """
    if isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):
        axes = len(layer.normalized_shape)
        if isinstance(layer, nn.LayerNorm):
            given = F.layer_norm(given, layer.normalized_shape, eps=layer.eps)
        else:
            given = F.rms_norm(given, layer.normalized_shape, eps=layer.eps)
        return given.flatten(-axes), grad.flatten(-axes)
    if isinstance(layer, nn.GroupNorm):
        given = F.group_norm(given, layer.num_groups, eps=layer.eps)
        return given.movedim(1, -1), grad.movedim(1, -1)
    assert isinstance(layer, (_BatchNorm, _InstanceNorm))
    mean, var = layer.running_mean, layer.running_var
    own = layer.training or mean is None or var is None
    mean = None if own or mean is None else mean.to(given.dtype)
    var = None if own or var is None else var.to(given.dtype)
    if isinstance(layer, _BatchNorm):
        given = F.batch_norm(given, mean, var, training=own, momentum=0.0, eps=layer.eps)
    else:
        given = F.instance_norm(given, mean, var, use_input_stats=own, momentum=0.0, eps=layer.eps)
    return given.movedim(1, -1), grad.movedim(1, -1)


@torch.no_grad()
def scale_squares(layer: nn.Module, given: Tensor, grad: Tensor) -> tuple[Tensor | None, Tensor]:
    """Return the squared gradients of scale and shift, summed over examples, in at least float32.

    The gradients of an example are its sums over positions of xhat dy and of dy, xhat the
    normalized input. A batch normalization in training counts as if its statistics were constants.

    Args:
        layer: One of `SCALE_LAYERS`.
        given: Its input.
        grad: The gradient of its output.

    Returns:
        Both flat, in the order of the parameters. No scale if the layer has none; the shift also
        where the layer has none.

    Raises:
        TypeError: If the layer is none of these.
    """
    grad = at_least_float32(grad)
    given = given.to(grad.dtype)
    if isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):
        batched = given.ndim > len(layer.normalized_shape)
    elif isinstance(layer, _InstanceNorm):
        batched = given.ndim > _instance_axes(layer)
    elif isinstance(layer, SCALE_LAYERS):
        batched = True
    else:
        raise unknown_layer(layer, SCALE_LAYERS)
    if not batched:
        given, grad = given[None], grad[None]
    xhat, dy = normalized(layer, given, grad)
    xhat, dy = (x[:, None] if x.ndim == 2 else x.flatten(1, -2) for x in (xhat, dy))  # noqa: PLR2004
    shift = dy.sum(1).square().sum(0)
    if getattr(layer, "weight", None) is None:
        return None, shift
    return (xhat * dy).sum(1).square().sum(0), shift


def _instance_axes(layer: _InstanceNorm) -> int:
    """Return the number of axes of one example: channels and size."""
    kinds: tuple[type[nn.Module], ...] = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
    return next(axes for axes, kind in enumerate(kinds, start=2) if isinstance(layer, kind))


@torch.no_grad()
def shift_squares(layer: nn.Module, grad: Tensor) -> Tensor:
    """Return the squared gradients of the bias of a convolution, summed over examples.

    Args:
        layer: A convolution, transposed or not.
        grad: The gradient of its output.

    Returns:
        ``[out_channels]``, in at least float32.

    Raises:
        TypeError: If it is another layer.
    """
    if not isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED)):
        raise unknown_layer(layer, (*CONVOLUTIONS, *TRANSPOSED))
    grad = at_least_float32(grad)
    grad = grad[None] if grad.ndim == len(layer.kernel_size) + 1 else grad
    return grad.flatten(2).sum(2).square().sum(0)
