"""A small part of CIFAR-10 and a small residual network for it."""

import itertools
from pathlib import Path

import numpy as np
import torch
from fashion_mnist import Data
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

__all__ = ["ResidualNetwork", "load"]


class ResidualNetwork(nn.Module):
    """Stem, three residual blocks of two convolutions with BatchNorm, average, linear layer.

    Args:
        width: Channels of the first block; the others have twice and four times as many.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        widths = [width, width, 2 * width, 4 * width]
        self.stem = nn.Sequential(*_convolution(3, width, stride=2), nn.ReLU())
        self.blocks = nn.ModuleList()
        self.shortcuts = nn.ModuleList()
        for i, (before, after) in enumerate(itertools.pairwise(widths)):
            stride = 1 if i == 0 else 2
            first = _convolution(before, after, stride=stride)
            self.blocks.append(nn.Sequential(*first, nn.ReLU(), *_convolution(after, after)))
            same = before == after
            self.shortcuts.append(
                nn.Identity() if same else nn.Conv2d(before, after, 1, stride, bias=False)
            )
        self.head = nn.Linear(widths[-1], 10)

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Return the logits ``[N, 10]`` of images ``[N, 3, height, width]``."""
        hidden = self.stem(images)
        for block, shortcut in zip(self.blocks, self.shortcuts, strict=True):
            hidden = functional.relu(block(hidden) + shortcut(hidden))
        return self.head(hidden.mean((2, 3)))


def _convolution(channels_in: int, channels_out: int, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(channels_out)]


def load(folder: Path) -> Data:
    """Read a part of CIFAR-10 and standardize its channels; one part validates and tests.

    Args:
        folder: Folder that holds ``cifar10_small/cifar10_small.npz``.

    Raises:
        FileNotFoundError: If the file is not there.
    """
    path = folder / "cifar10_small" / "cifar10_small.npz"
    if not path.is_file():
        raise FileNotFoundError(
            f"No file {path}: --data must name the folder that holds it, with the arrays x_train, "
            "y_train, x_test and y_test; images are uint8, [N, 3, 32, 32]."
        )
    with np.load(path) as arrays:
        images, held_out = (torch.from_numpy(arrays[f"x_{p}"]) / 255 for p in ("train", "test"))
        labels, held_out_labels = (
            torch.from_numpy(arrays[f"y_{p}"]).long() for p in ("train", "test")
        )
    deviation, mean = torch.std_mean(images, dim=(0, 2, 3), keepdim=True)
    images, held_out = (images - mean) / deviation, (held_out - mean) / deviation
    validation = (held_out, held_out_labels)
    return Data((images, labels), validation, validation)
