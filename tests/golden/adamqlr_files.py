"""Reads a recorded AdamQLR or SGDQLR trajectory: data, model, optimizer arguments, numbers."""

import json
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_curvature import SGDQLR, AdamQLR, CurvatureOptimizer

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "gelu": nn.GELU}
CLASSES = {"AdamQLROptimiser": AdamQLR, "SGDQLROptimiser": SGDQLR}
ADAM_DEFAULTS = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "eps_root": 0.0}

# Official constructor arguments that have the same meaning under another name.
RENAMED = {
    "initial_damping": "damping",
    "lr_clipping": "max_lr",
    "update_amplification": "amplification",
    "gradient_norm_clipping": "grad_clip_norm",
    "direction_clipping": "direction_clip",
    "update_norm_clipping": "update_clip_norm",
    "saddle_free_lr_curvature": "saddle_free",
    "weight_decay": "weight_decay",
    "curvature_matrix": "curvature",
}
DAMPING_ALGORITHMS = {
    "kfac": ("levenberg-marquardt", "derived"),
    "decreasing_loss": ("decreasing-loss", "derived"),
    "adam_no_sqrt": ("levenberg-marquardt", "adam"),
    "adam_sqrt": ("levenberg-marquardt", "adam-sqrt"),
}


class Trajectory:
    """One file."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as archive:
            self.arrays = {key: archive[key] for key in archive.files}
        self.hparams: dict[str, Any] = json.loads(str(self.arrays["hparams"]))
        self.problem = self.hparams["problem"]
        self.official = dict(self.hparams["optimiser"])
        self.x = torch.from_numpy(self.arrays["x"])
        self.y = torch.from_numpy(self.arrays["y"])
        self.batches = torch.from_numpy(self.arrays["batch_indices"])
        self.steps = len(self.batches)
        self.name = path.stem

    @property
    def is_classification(self) -> bool:
        return not self.y.is_floating_point()

    def model(self) -> nn.Sequential:
        """Build the network with the recorded initial parameters."""
        dims, activation = self.problem["dims"], ACTIVATIONS[self.problem["activation"]]
        layers: list[nn.Module] = []
        for index, (d_in, d_out) in enumerate(pairwise(dims)):
            layers += [nn.Linear(d_in, d_out, dtype=torch.float64), activation()]
            with torch.no_grad():
                for parameter, value in zip(
                    layers[-2].parameters(), self._layer("init", index), strict=True
                ):
                    parameter.copy_(value)
        return nn.Sequential(*layers[:-1])

    def _layer(self, prefix: str, index: int) -> tuple[Tensor, Tensor]:
        weight = torch.from_numpy(self.arrays[f"{prefix}/dense_{index}/w"]).T
        return weight, torch.from_numpy(self.arrays[f"{prefix}/dense_{index}/b"])

    def parameters(self, step: int) -> list[Tensor] | None:
        """Return the recorded parameters after a number of steps, if they were kept."""
        if f"params/step_{step}/dense_0/w" not in self.arrays:
            return None
        layers = range(len(self.problem["dims"]) - 1)
        return [p for i in layers for p in self._layer(f"params/step_{step}", i)]

    def stored_steps(self) -> list[int]:
        return [step for step in range(1, self.steps + 1) if self.parameters(step) is not None]

    def loss_fn(self, output: Tensor, target: Tensor) -> Tensor:
        if self.is_classification:
            return nn.functional.cross_entropy(output, target)
        return 0.5 * nn.functional.mse_loss(output, target)

    def optimizer(self, params: Any) -> CurvatureOptimizer:
        """Build our optimizer in the mode that reproduces the official rule."""
        official = dict(self.official)
        cls = CLASSES[official.pop("name")]
        arguments: dict[str, Any] = {
            "max_lr": None,
            "damping": 0.0,
            "decoupled_weight_decay": False,
            "curvature_guard": False,
            "official_regression_scaling": True,
            "quad_model": "derived",
            "damping_algorithm": "fixed",
        }
        increase = official.pop("damping_increase_factor", None)
        decrease = official.pop("damping_decrease_factor", None)
        low, high = official.pop("damping_clipping", None) or (None, None)
        algorithm = official.pop("damping_algorithm", "kfac")
        official.pop("scaling_envelope_peak", None)
        for theirs, value in official.items():
            if value is not None:
                arguments[RENAMED[theirs]] = value
        if increase is not None and decrease is not None:
            rule, quad_model = DAMPING_ALGORITHMS[algorithm]
            if rule == "decreasing-loss":  # the official variant does not clip the damping
                low, high = None, None
            arguments |= {
                "damping_algorithm": rule,
                "quad_model": quad_model,
                "damping_increase_factor": increase,
                "damping_decrease_factor": decrease,
                "min_damping": low or 0.0,
                "max_damping": math.inf if high is None else high,
            }
        if cls is AdamQLR:
            adam = {**ADAM_DEFAULTS, **self.hparams.get("adam_defaults", {})}
            assert adam["eps_root"] == 0.0
            arguments |= {"betas": (adam["b1"], adam["b2"]), "eps": adam["eps"]}
        return cls(params, **arguments)

    def envelope(self, step: int) -> float:
        """Return the factor on the update: linear warm-up from 0, then half a cosine to 0."""
        peak = self.official.get("scaling_envelope_peak")
        if peak is None:
            return 1.0
        if step < peak:
            return step / peak
        return 0.5 * (1 + math.cos(math.pi * (step - peak) / (self.steps - peak)))

    def epochs(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in self.batches:
            yield self.x[rows], self.y[rows]
