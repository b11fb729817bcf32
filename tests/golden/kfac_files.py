"""Reads recorded K-FAC trajectories: data, model, arguments, numbers.

Recorded dense weights are (in, out), convolutions HWIO, images NHWC, flattened in that order.
"""

import functools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_curvature.optim.kfac import KFAC
from tests.golden.conftest import golden_files

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "gelu": nn.GELU}
FISHER_TYPES = {
    "fisher_exact": "type-2",
    "ggn_exact": "type-2",
    "fisher_empirical": "empirical",
}

# Official constructor arguments that have the same meaning under another name.
RENAMED = {
    "initial_damping": "damping",
    "use_adaptive_learning_rate": "adaptive_lr",
    "use_adaptive_momentum": "adaptive_momentum",
    "norm_constraint": "norm_constraint",
    "min_damping": "min_damping",
    "max_damping": "max_damping",
    "include_damping_in_quad_change": "include_damping_in_quad_change",
    "use_step_rejection": "step_rejection",
    "reject_damping_increase_factor": "rejection_increase_factor",
    "curvature_ema": "factor_decay",
    "curvature_update_period": "factor_update_interval",
    "inverse_update_period": "inverse_update_interval",
    "damping_adaptation_interval": "damping_update_interval",
}
DEFAULTS = {
    "use_adaptive_learning_rate": False,
    "use_adaptive_momentum": False,
    "min_damping": 1e-8,
    "max_damping": math.inf,
    "curvature_ema": 0.95,
    "curvature_update_period": 1,
    "inverse_update_period": 5,
    "damping_adaptation_interval": 5,
}


def run_on_files(metafunc: pytest.Metafunc, argument: str, *, trajectories: bool) -> None:
    """Run a test that has an argument of that name on every file of one kind."""
    if argument in metafunc.fixturenames:
        files = [f for f in golden_files("kfac") if is_trajectory(f) == trajectories]
        absent = pytest.param(None, marks=pytest.mark.skip(reason="no such file of 'kfac'"))
        metafunc.parametrize(argument, files or [absent], ids=[f.stem for f in files] or None)


def is_trajectory(path: Path) -> bool:
    """Tell a trajectory from one-shot estimates."""
    with np.load(path) as archive:
        return "batch_indices" in archive.files


def to_torch(array: Any) -> Tensor:
    """Return a recorded weight, bias or data set in the layout of torch."""
    x = torch.from_numpy(np.asarray(array))
    return x.permute(3, 2, 0, 1) if x.dim() == 4 else x.mT if x.dim() == 2 else x


def images(x: Tensor) -> Tensor:
    """Bring images from NHWC to NCHW; anything else stays."""
    return x.permute(0, 3, 1, 2).contiguous() if x.dim() == 4 else x


class Flatten(nn.Module):
    """Flattens images in the order height, width, channel."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).flatten(1)


def input_order(weight: Tensor, *, has_bias: bool) -> Tensor:
    """Return which of our rows of A is at each place in theirs: (kh, kw, in), then the bias."""
    order = torch.arange(weight[0].numel())
    if weight.dim() == 4:
        order = order.view(weight.shape[1:]).permute(1, 2, 0).flatten()
    return torch.cat([order, torch.tensor([len(order)])]) if has_bias else order


def compare_factors(
    state: dict[str, Tensor],
    layer: nn.Module,
    theirs: tuple[Any, Any],
    *,
    rtol: float,
    total: float = 1.0,
) -> None:
    """Compare the factors of a layer.

    Args:
        state: Ours.
        layer: The layer.
        theirs: A and G; of a convolution both are means over positions.
        rtol: Relative tolerance.
        total: Weight of all examples, which is inside of our A: M of a layer without positions.
    """
    order = input_order(layer.weight, has_bias=layer.bias is not None)
    positions = state["positions"] / total if isinstance(layer, nn.Conv2d) else 1.0
    a = (state["a_factor"][0, 0] / (total * positions))[order][:, order]
    g = state["g_factor"][0, 0] / positions
    for ours, expected in zip((a, g), theirs, strict=True):
        close(ours, torch.from_numpy(expected), rtol)


def close(ours: Tensor, expected: Tensor, rtol: float) -> None:
    """Compare tensors relative to their size."""
    assert ours.shape == expected.shape
    assert expected.isfinite().all()
    error, size = (ours.detach() - expected).norm(), expected.norm()
    assert float(error) <= rtol * float(size), float(error / size)


class Trajectory:
    """One trajectory."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as archive:
            self.arrays = {key: archive[key] for key in archive.files}
        self.hparams: dict[str, Any] = json.loads(str(self.arrays["hparams"]))
        self.problem = self.hparams["problem"]
        self.fixed: dict[str, float] = self.hparams["fixed"]
        self.l2_reg = float(self.hparams["l2_reg"])
        self.x = images(torch.from_numpy(self.arrays["x"]))
        self.y = torch.from_numpy(self.arrays["y"])
        self.batches = torch.from_numpy(self.arrays["batch_indices"])
        self.steps = len(self.batches)
        found = dict.fromkeys(key.split("/")[1] for key in self.arrays if key.startswith("init/"))

        def place(name: str) -> tuple[bool, int]:
            kind, number = name.rsplit("_", 1)
            return kind != "conv", int(number)

        self.layers = sorted(found, key=place)

    @property
    def is_classification(self) -> bool:
        return not self.y.is_floating_point()

    @property
    def is_adaptive(self) -> bool:
        """Whether every step measures the quadratic model."""
        return self.arguments["adaptive_lr"] or self.arguments["adaptive_momentum"]

    def model(self) -> nn.Sequential:
        """Build the network with the recorded initial parameters."""
        activation = ACTIVATIONS[self.problem["act"]]
        model = nn.Sequential()
        with torch.no_grad():
            for name in self.layers:
                weight, bias = self.tensors("init", name)
                if model:
                    model.append(activation())
                if weight.dim() == 4:
                    first = not model
                    layer = convolution(weight, bias, stride=1 if first else 2, padding=1)
                else:
                    if any(isinstance(m, nn.Conv2d) for m in model) and not _flat(model):
                        model.append(Flatten())
                    layer = linear(weight, bias)
                model.append(layer)
        return model

    def tensors(self, prefix: str, layer: str) -> list[Tensor]:
        """Return weight and bias, or anything of their shapes, in the layout of torch."""
        return [to_torch(self.arrays[f"{prefix}/{layer}/{role}"]) for role in ("w", "b")]

    def all_tensors(self, prefix: str) -> list[Tensor] | None:
        """Return those of all layers, None if they were not kept."""
        if f"{prefix}/{self.layers[0]}/w" not in self.arrays:
            return None
        return [x for layer in self.layers for x in self.tensors(prefix, layer)]

    def named_layers(self, model: nn.Sequential) -> Iterator[tuple[str, str, nn.Module]]:
        """Yield the recorded name of every layer, our name for it, and the layer."""
        own = [(n, m) for n, m in model.named_children() if isinstance(m, (nn.Linear, nn.Conv2d))]
        for theirs, (name, layer) in zip(self.layers, own, strict=True):
            yield theirs, name, layer

    def loss_fn(self, model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the loss: mean over examples, sum over outputs, penalty."""

        def loss(output: Tensor, target: Tensor) -> Tensor:
            if self.is_classification:
                value = nn.functional.cross_entropy(output, target)
            else:
                value = 0.5 * output.shape[1] * nn.functional.mse_loss(output, target)
            if self.l2_reg:
                squares = [p.square().sum() for p in model.parameters()]
                value = value + 0.5 * self.l2_reg * torch.stack(squares).sum()
            return value

        return loss

    @functools.cached_property
    def arguments(self) -> dict[str, Any]:
        """Arguments of our optimizer that reproduce the official rule."""
        official = {**DEFAULTS, **self.hparams["optimiser"]}
        adaptive = official.pop("use_adaptive_damping", False)
        decay = official.pop("damping_adaptation_decay", 0.9)
        assert official.pop("damping_lower_threshold", 0.25) == 0.25
        assert official.pop("damping_upper_threshold", 0.75) == 0.75
        always_exact = official.pop("always_use_exact_qmodel_for_damping_adjustment", False)
        exact_inverses = official.pop("use_exact_inverses", False)
        arguments = {
            RENAMED[theirs]: value for theirs, value in official.items() if value is not None
        }
        factor = decay ** arguments["damping_update_interval"]
        coefficients = arguments["adaptive_lr"] or arguments["adaptive_momentum"]
        mode = self.hparams["estimation_mode"]
        arguments |= {
            "damping_algorithm": "levenberg-marquardt" if adaptive else "fixed",
            "damping_decrease_factor": factor,
            "damping_increase_factor": 1 / factor,
            "damping_method": "exact" if exact_inverses else "factored",
            "quad_model": "exact" if coefficients or always_exact else "factors",
            "factor_warmup": self.hparams["num_burnin_steps"],
            "max_momentum": None,
            "max_relative_update": None,
            "fisher_type": FISHER_TYPES[mode],
            "official_empirical_scaling": mode == "fisher_empirical",
            "l2_reg": self.l2_reg,
            "norm_constraint": arguments.get("norm_constraint"),
        }
        for theirs, ours in (("learning_rate", "lr"), ("momentum", "momentum")):
            if theirs in self.fixed:
                arguments[ours] = self.fixed[theirs]
        if "damping" in self.fixed:
            arguments["damping"] = self.fixed["damping"]
        return arguments

    def optimizer(self, params: Any) -> KFAC:
        return KFAC(params, **self.arguments)

    def epochs(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in self.batches:
            yield self.x[rows], self.y[rows]


def _flat(model: nn.Sequential) -> bool:
    return any(isinstance(m, Flatten) for m in model)


def convolution(weight: Tensor, bias: Tensor | None, *, stride: Any, padding: Any) -> nn.Conv2d:
    d_out, d_in, *kernel = weight.shape
    layer = nn.Conv2d(
        d_in,
        d_out,
        tuple(kernel),
        stride=stride,
        padding=padding,
        bias=bias is not None,
        dtype=weight.dtype,
    )
    return filled(layer, weight, bias)


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    return filled(layer, weight, bias)


def filled(layer: Any, weight: Tensor, bias: Tensor | None) -> Any:
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer
