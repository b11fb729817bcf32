"""Reads recorded EK-FAC factors: model, examples, sums over the training set."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lightning_curvature.oracle.plans import FisherType

# Prefix of the recorded names -> what was sent back.
KINDS: dict[str, FisherType] = {"": "empirical", "trueF_": "type-2"}


class Net(nn.Module):
    """The recorded layers in order, tanh in between.

    Args:
        layers: Layers by name.
        causal: Whether tokens see the mean of those up to them, after the first layer.
    """

    def __init__(self, layers: dict[str, nn.Module], *, causal: bool) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        layers = list(self.children())
        for number, layer in enumerate(layers):
            if isinstance(layer, nn.Linear) and x.dim() == 4:
                x = x.flatten(1)
            x = layer(x)
            if number < len(layers) - 1:
                x = torch.tanh(x)
            if number == 0 and self.causal:
                counts = torch.arange(1, x.shape[1] + 1, dtype=x.dtype)
                x = x.cumsum(1) / counts[:, None]
        return x


class Recording:
    """One file."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as archive:
            self.arrays = {key: archive[key] for key in archive.files}
        self.x = torch.from_numpy(self.arrays["X"]).double()
        self.y = torch.from_numpy(self.arrays["y"])
        self.mask = torch.from_numpy(self.arrays["mask"]) if "mask" in self.arrays else None
        names = [key.removeprefix("param__") for key in self.arrays if key.startswith("param__")]
        self.layers = list(dict.fromkeys(name.rsplit(".", 1)[0] for name in names))

    @property
    def classes(self) -> int:
        return len(self.get("gradient_covariance", self.layers[-1]))

    def has(self, name: str) -> bool:
        """Tell whether an array was recorded."""
        return f"{name}__{self.layers[0]}" in self.arrays

    def kinds(self) -> Iterator[tuple[str, FisherType]]:
        """Yield the kinds of the matrix that were recorded, with the prefix of their names."""
        yield from ((p, kind) for p, kind in KINDS.items() if self.has(f"{p}lambda_matrix"))

    def get(self, name: str, layer: str) -> Tensor:
        """Return a recorded array of a layer."""
        return torch.from_numpy(self.arrays[f"{name}__{layer}"])

    def count(self, name: str, layer: str) -> int:
        """Return a recorded number of examples or positions."""
        return int(self.get(name, layer))

    def model(self) -> Net:
        """Build the network with the recorded parameters.

        Strides and paddings are not recorded: convolutions are 3x3 with padding 1, and all but the
        first have stride 2.
        """
        layers: dict[str, nn.Module] = {}
        for name in self.layers:
            weight = torch.from_numpy(self.arrays[f"param__{name}.weight"])
            bias = self.arrays.get(f"param__{name}.bias")
            has_bias = bias is not None
            d_out, d_in = weight.shape[:2]
            layer: nn.Conv2d | nn.Linear
            if weight.dim() == 4:
                kernel = tuple(weight.shape[2:])
                stride = 2 if layers else 1
                layer = nn.Conv2d(d_in, d_out, kernel, stride, 1, bias=has_bias)
            else:
                layer = nn.Linear(d_in, d_out, bias=has_bias)
            layer = layer.double()
            with torch.no_grad():
                layer.weight.copy_(weight)
                if bias is not None:
                    layer.bias.copy_(torch.from_numpy(bias))
            layers[name] = layer
        return Net(layers, causal=self.mask is not None)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the cross-entropy summed over examples, and tokens that are not masked."""
        if self.mask is None:
            return nn.functional.cross_entropy(output, target, reduction="sum")
        return nn.functional.cross_entropy(output.mT, target, reduction="sum", ignore_index=-100)

    def targets(self) -> Tensor:
        """Return the labels, -100 where they are masked."""
        if self.mask is None:
            return self.y
        return self.y.masked_fill(self.mask == 0, -100)
