"""Reads a recorded AdaFisher(W) trajectory: data, model, optimizer arguments, numbers."""

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature.optim.adafisher import AdaFisher
from lightning_curvature.optim.adafisherw import AdaFisherW

CLASSES = {"AdaFisher": AdaFisher, "AdaFisherW": AdaFisherW}
ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "gelu": nn.GELU}
LOSSES = {"cross_entropy(mean)": F.cross_entropy, "mse(mean)": F.mse_loss}
# Where the damping is so small that rounding is amplified the README allows more.
TIGHT, LOOSE, SMALL_DAMPING = 1e-10, 1e-9, 1e-5


class ConvNet(nn.Module):
    """Two convolutions with batch normalization, and a linear layer."""

    def __init__(self, c1: int, c2: int, n_cls: int, bias1: bool, bias2: bool, side: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, c1, 3, padding=1, bias=bias1)
        self.bn1 = nn.BatchNorm2d(c1)
        self.conv2 = nn.Conv2d(c1, c2, 3, stride=2, bias=bias2)
        self.bn2 = nn.BatchNorm2d(c2)
        self.fc = nn.Linear(c2 * ((side - 3) // 2 + 1) ** 2, n_cls)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu()
        return self.fc(x.flatten(1))


class LNNet(nn.Module):
    """A layer-normalized network over a sequence, averaged over it."""

    def __init__(self, d: int, h: int, n_cls: int) -> None:
        super().__init__()
        self.l1 = nn.Linear(d, h)
        self.ln = nn.LayerNorm(h)
        self.l2 = nn.Linear(h, n_cls, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.l2(self.ln(self.l1(x)).tanh()).mean(1)


def read_value(text: str) -> Any:
    return {"True": True, "False": False}[text] if text in ("True", "False") else int(text)


class Trajectory:
    """One file."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as archive:
            self.arrays = {key: archive[key] for key in archive.files}
        self.hparams: dict[str, Any] = json.loads(str(self.arrays["hparams"]))
        self.x = torch.from_numpy(self.arrays["x"])
        self.y = torch.from_numpy(self.arrays["y"])
        self.batches = torch.from_numpy(self.arrays["batches"])
        self.steps = len(self.batches)
        self.param_names = [str(name) for name in self.arrays["param_names"]]
        self.layer_names = [str(name) for name in self.arrays["module_names"]]

    @property
    def tolerance(self) -> float:
        return LOOSE if self.hparams["Lambda"] <= SMALL_DAMPING else TIGHT

    def model(self) -> nn.Module:
        """Build the network with the recorded initial state."""
        name, _, rest = self.hparams["arch"].partition(" ")
        options = {key: read_value(value) for key, value in re.findall(r"(\w+)=(\w+)", rest)}
        model: nn.Module
        if name == "mlp":
            widths, activation = rest.split()
            sizes = [int(size) for size in widths.split("-")]
            layers: list[nn.Module] = []
            for d_in, d_out in pairwise(sizes):
                layers += [nn.Linear(d_in, d_out), ACTIVATIONS[activation]()]
            model = nn.Sequential(*layers[:-1])
        elif name == "ConvNet":
            model = ConvNet(**options, side=self.x.shape[-1])
        else:
            assert name == "LNNet", name
            model = LNNet(**options)
        model.to(torch.float64).load_state_dict(self.snapshot("init"))
        assert [name for name, _ in model.named_parameters()] == self.param_names
        return model

    def snapshot(self, prefix: str) -> dict[str, Tensor]:
        """Return what was recorded below a name."""
        return {
            key.removeprefix(f"{prefix}/"): torch.from_numpy(np.asarray(value))
            for key, value in self.arrays.items()
            if key.startswith(f"{prefix}/")
        }

    def stored_steps(self) -> list[int]:
        found = {re.fullmatch(r"params@(\d+)/.*", key) for key in self.arrays}
        return sorted({int(match[1]) for match in found if match})

    def optimizer(self, params: Any) -> AdaFisher | AdaFisherW:
        """Build our optimizer in the mode that reproduces the authors' code."""
        recorded = self.hparams
        # Both are fixed in that code, and so in ours.
        assert recorded.get("minmax_eps", 1e-6) == 1e-6
        gamma = recorded["gamma"]
        coefficients = recorded.get("ema_coefficients", [0.1 * gamma, 0.01 * gamma])
        np.testing.assert_allclose(coefficients, [0.1 * gamma, 0.01 * gamma], rtol=1e-12)
        return CLASSES[recorded["optimizer"]](
            params,
            lr=recorded["lr"],
            beta=recorded["beta"],
            damping=recorded["Lambda"],
            factor_update_interval=recorded["TCov"],
            factor_decay=gamma,
            weight_decay=recorded["weight_decay"],
            mode="reference",
        )

    def loss_fn(self, output: Tensor, target: Tensor) -> Tensor:
        loss = LOSSES[self.hparams["loss"]](output, target)
        return loss * self.hparams.get("loss_scale", 1.0)

    def epochs(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in self.batches:
            yield self.x[rows], self.y[rows]
