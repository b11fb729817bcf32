"""Reads a recorded Sophia or AdaHessian trajectory: data, model, optimizer arguments, numbers."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_curvature import AdaHessian, CurvatureOptimizer, SophiaG, SophiaH

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "gelu": nn.GELU}
LOSSES = {"cross_entropy(mean)": nn.functional.cross_entropy, "mse(mean)": nn.functional.mse_loss}


class ConvNet(nn.Module):
    """Two convolutions with batch normalization and a linear read-out."""

    def __init__(self, c1: int, c2: int, n_cls: int, bias1: bool, bias2: bool, size: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, c1, 3, padding=1, bias=bias1)
        self.bn1 = nn.BatchNorm2d(c1)
        self.conv2 = nn.Conv2d(c1, c2, 3, stride=2, bias=bias2)
        self.bn2 = nn.BatchNorm2d(c2)
        side = (size - 3) // 2 + 1
        self.fc = nn.Linear(c2 * side * side, n_cls)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.fc(torch.relu(self.bn2(self.conv2(x))).flatten(1))


def _words(text: str) -> dict[str, Any]:
    """Read ``name=value`` pairs."""
    pairs = (word.split("=") for word in text.split() if "=" in word)
    return {
        key: value == "True" if value in ("True", "False") else int(value) for key, value in pairs
    }


class Recording:
    """One file."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as archive:
            self.arrays = {key: archive[key] for key in archive.files}
        self.hparams: dict[str, Any] = json.loads(str(self.arrays["hparams"]))
        self.x = torch.from_numpy(self.arrays["x"])
        self.y = torch.from_numpy(self.arrays["y"])
        self.names = [str(name) for name in self.arrays["param_names"]]
        self.kind = str(self.hparams.get("optimizer", "curvature")).split("(")[0]
        self.loss_fn = LOSSES[self.hparams["loss"]]

    @property
    def steps(self) -> int:
        return len(self.arrays["batches"])

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return the batch of a step, counted from 1."""
        rows = torch.from_numpy(self.arrays["batches"][step - 1])
        return self.x[rows], self.y[rows]

    def model(self) -> nn.Module:
        """Build the network with the recorded initial parameters and buffers."""
        arch = str(self.hparams.get("arch", ""))
        if arch.startswith("ConvNet"):
            model: nn.Module = ConvNet(**_words(arch), size=self.x.shape[-1])
        else:
            sizes, activation = self.hparams.get("sizes"), self.hparams.get("activation")
            if sizes is None:
                _, shape, activation = arch.split()
                sizes = [int(size) for size in shape.split("-")]
            layers: list[nn.Module] = []
            for d_in, d_out in pairwise(sizes):
                layers += [nn.Linear(d_in, d_out), ACTIVATIONS[activation]()]
            model = nn.Sequential(*layers[:-1])
        model = model.double()
        values = {
            key.removeprefix("init/"): torch.from_numpy(np.array(value))
            for key, value in self.arrays.items()
            if key.startswith("init/")
        }
        model.load_state_dict(values)
        return model

    def named(self, prefix: str, row: int | None = None) -> list[Tensor]:
        """Return the arrays of all parameters under a prefix."""
        found = [torch.from_numpy(np.array(self.arrays[f"{prefix}/{name}"])) for name in self.names]
        return found if row is None else [x[row] for x in found]

    def optimizer(self, params: Any, **options: Any) -> CurvatureOptimizer:
        """Build our optimizer in the mode that reproduces the official rule."""
        h = self.hparams
        shared = {"betas": tuple(h["betas"]), **options}
        if self.kind == "AdaHessian":
            return AdaHessian(
                params,
                lr=h["lr"],
                eps=h["eps"],
                hessian_power=h["hessian_power"],
                weight_decay=h["weight_decay"],
                hvp_method="double-backward",
                **shared,
            )
        timing = {"hessian_update_interval": h["hess_interval"], "hessian_timing": h["hess_order"]}
        if self.kind == "SophiaH":
            # The form of the paper's first version: lr clip(m / max(h, eps), p).
            p = h["p"]
            return SophiaH(
                params,
                lr=h["lr"] * p,
                rho=p,
                eps=h["eps"] * p,
                weight_decay=h["weight_decay"] / p,
                distribution="normal",
                hvp_method="double-backward",
                **timing,
                **shared,
            )
        return SophiaG(
            params,
            lr=h["lr"],
            rho=h["rho"],
            eps=1e-15,
            weight_decay=h["weight_decay"],
            squared="window",
            hessian_batch_fraction=h["hess_batch_size"] / h["batch_size"],
            hessian_clip_norm=h["hess_grad_clip"],
            maximize=h["maximize"],
            **timing,
            **shared,
        )
