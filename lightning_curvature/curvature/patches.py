"""Convolutions as matrix products: what each position multiplies the weight with.

A convolution multiplies one patch of its padded input per output position; a transposed one turns
each input position into a patch of its output. Both are views here, made of `torch.Tensor.unfold`,
which knows any number of axes: nothing is copied but the padding.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CONVOLUTIONS", "TRANSPOSED", "Conv", "Transposed", "input_patches", "output_patches"]

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def input_patches(layer: Conv, given: Tensor) -> Tensor:
    """Return the patches of an input, ``[groups, n, *positions, channels per group, *kernel]``.

    Args:
        layer: A convolution, of any stride, dilation, padding and padding mode.
        given: Its input, ``[n, channels, *size]``.
    """
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    if any(layer._reversed_padding_repeated_twice):
        given = F.pad(given, layer._reversed_padding_repeated_twice, mode=mode)
    return _cut(given, layer.groups, layer.kernel_size, layer.stride, layer.dilation)


def output_patches(layer: Transposed, grad: Tensor, size: Sequence[int]) -> Tensor:
    """Return patches of an output, ``[groups, n, *positions, channels per group, *kernel]``.

    Position i of the input adds to the outputs ``stride * i - padding + dilation * k``; those
    outside the image were cut off and count as zero.

    Args:
        layer: A transposed convolution, of any stride, dilation, padding and output padding.
        grad: The gradient of its output, ``[n, channels, *output size]``.
        size: Size of its input, one number per axis of an image.
    """
    padding: list[int] = []
    spans = zip(
        size, grad.shape[2:], layer.kernel_size, layer.stride, layer.dilation, layer.padding,
        strict=True,
    )  # fmt: skip
    for given, output, kernel, stride, dilation, left in spans:
        reached = (given - 1) * stride + dilation * (kernel - 1) + 1
        # Negative where an output padding lies beyond all patches.
        padding = [int(left), reached - output - int(left), *padding]
    grad = F.pad(grad, padding) if any(padding) else grad
    return _cut(grad, layer.groups, layer.kernel_size, layer.stride, layer.dilation)


def _cut(
    image: Tensor,
    groups: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    for axis, (size, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        image = image.unfold(axis, gap * (size - 1) + 1, step)[..., ::gap]
    n, channels = image.shape[:2]
    image = image.view(n, groups, channels // groups, *image.shape[2:])
    axes = len(kernel)
    positions, offsets = range(3, 3 + axes), range(3 + axes, 3 + 2 * axes)
    return image.permute(1, 0, *positions, 2, *offsets)
