"""Reads a recorded FAdam trajectory: data, model, optimizer arguments, numbers."""

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_curvature import FAdam
from tests.golden.adafisher_files import ACTIVATIONS, LOSSES, ConvNet, LNNet, read_value

# Gradients of rounding noise are divided by eps: biases before a normalization.
TIGHT, LOOSE = 1e-10, 1e-9


class Trajectory:
    """One file."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as archive:
            self.arrays = {key: archive[key] for key in archive.files}
        self.hparams: dict[str, Any] = json.loads(str(self.arrays["hparams"]))
        assert self.hparams["optimizer"] == "FAdam"
        self.x = torch.from_numpy(self.arrays["x"])
        self.y = torch.from_numpy(self.arrays["y"])
        self.batches = torch.from_numpy(self.arrays["batches"])
        self.steps = len(self.batches)
        self.loss_fn = LOSSES[self.hparams["loss"]]
        self.arch, _, self.sizes = self.hparams["arch"].partition(" ")

    @property
    def tolerance(self) -> float:
        """Absolute tolerance of parameters."""
        return TIGHT if self.arch == "mlp" else LOOSE

    def model(self) -> nn.Module:
        """Build the network with the recorded initial state."""
        options = {key: read_value(value) for key, value in re.findall(r"(\w+)=(\w+)", self.sizes)}
        model: nn.Module
        if self.arch == "mlp":
            widths, activation = self.sizes.split()
            layers: list[nn.Module] = []
            for d_in, d_out in pairwise(int(size) for size in widths.split("-")):
                layers += [nn.Linear(d_in, d_out), ACTIVATIONS[activation]()]
            model = nn.Sequential(*layers[:-1])
        elif self.arch == "ConvNet":
            model = ConvNet(**options, side=self.x.shape[-1])
        else:
            assert self.arch == "LNNet", self.arch
            model = LNNet(**options)
        model.double().load_state_dict(self.below("init"))
        names = [name for name, _ in model.named_parameters()]
        assert names == [str(name) for name in self.arrays["param_names"]]
        return model

    def below(self, prefix: str) -> dict[str, Tensor]:
        """Return the arrays below a name."""
        return {
            key.removeprefix(f"{prefix}/"): torch.from_numpy(np.asarray(value))
            for key, value in self.arrays.items()
            if key.startswith(f"{prefix}/")
        }

    def stored_steps(self) -> list[int]:
        found = (re.fullmatch(r"params@(\d+)/.*", key) for key in self.arrays)
        return sorted({int(match[1]) for match in found if match})

    def optimizer(self, params: Any, **options: Any) -> FAdam:
        """Build our optimizer in the mode that reproduces the official code."""
        recorded = self.hparams
        return FAdam(
            params,
            lr=recorded["lr"],
            betas=tuple(recorded["betas"]),
            eps=recorded["eps"],
            clip=recorded["clip"],
            clip_mode="scale",
            eps_mode="max",
            power=recorded["p"],
            weight_decay=recorded["weight_decay"],
            skip_unused=False,
            maximize=recorded.get("maximize", False),
            **options,
        )

    def state_norms(self, optimizer: FAdam) -> dict[str, np.ndarray]:
        """Return what the official code keeps, its norms per parameter."""
        params = [p for group in optimizer.param_groups for p in group["params"]]
        states = [optimizer.state[p] for p in params]
        beta2 = self.hparams["betas"][1]
        return {
            "momentum": np.array([float(s["exp_avg"].norm()) for s in states]),
            "fim": np.array(
                [float((s["exp_avg_sq"] / (1 - beta2 ** s["step"])).norm()) for s in states]
            ),
        }

    def epochs(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in self.batches:
            yield self.x[rows], self.y[rows]
