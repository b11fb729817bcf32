"""Reads recorded numbers of M-FAC: inverse products, trajectories, pruned networks."""

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_curvature import MFAC
from tests.golden.conftest import golden_files

# An array that only one kind of file has.
KINDS = {"products": "stream", "trajectory": "init", "pruned": "trained"}


def run_on_files(metafunc: pytest.Metafunc) -> None:
    """Run a test on every file of the kind that its first argument is named after."""
    for kind, array in KINDS.items():
        argument = f"{kind}_file"
        if argument in metafunc.fixturenames:
            files = [f for f in golden_files("mfac") if array in read(f)]
            absent = pytest.param(None, marks=pytest.mark.skip(reason=f"no {kind} of 'mfac'"))
            metafunc.parametrize(argument, files or [absent], ids=[f.stem for f in files] or None)


def read(path: Path) -> dict[str, Any]:
    """Return the arrays of a file: of numbers as tensors, scalars as Python numbers."""
    with np.load(path) as archive:
        arrays = {key: archive[key] for key in archive.files}
    return {
        key: a.item() if a.ndim == 0 else a.tolist() if a.dtype.kind == "U" else torch.from_numpy(a)
        for key, a in arrays.items()
    }


def error(found: Tensor, expected: Tensor) -> float:
    """Return the relative 2-norm of a difference."""
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm())


def network(sizes: Tensor, names: list[str] | None = None) -> nn.Sequential:
    """Build linear layers with tanh in between, in float64, optionally with recorded names."""
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(sizes.tolist()):
        layers += [nn.Linear(d_in, d_out), nn.Tanh()]
    model = nn.Sequential(*layers[:-1]).double()
    if names:
        prefix = names[0].removesuffix("0.weight")
        weights = [f"{prefix}{name}" for name, p in model.named_parameters() if p.ndim == 2]
        assert weights == names
    return model


class Products:
    """A file with inverse products.

    Attributes:
        stream: Gradients in the order of insertion, float64.
        num_grads: m.
    """

    def __init__(self, path: Path) -> None:
        self.arrays = read(path)
        self.stream = self.arrays["stream"].double()
        self.num_grads = int(self.arrays["m"])
        self.block_size = int(self.arrays["blocksize"])

    @property
    def static(self) -> Tensor:
        """The gradients of the static algorithm."""
        return self.stream[: self.num_grads]

    def dampings(self) -> Iterator[tuple[float, dict[str, Any]]]:
        """Yield dampings and what was recorded with each."""
        lams = self.arrays["lams"].tolist()
        assert lams
        for number, damping in enumerate(lams):
            prefix = f"lam{number}_"
            found = {
                k.removeprefix(prefix): v for k, v in self.arrays.items() if k.startswith(prefix)
            }
            assert found
            yield damping, found

    @staticmethod
    def insertions(recorded: dict[str, Any]) -> dict[int, dict[str, Any]]:
        """Return what was recorded after how many insertions, in this order."""
        found: dict[int, dict[str, Any]] = {}
        for key, value in recorded.items():
            if match := re.fullmatch(r"dyn(\d+)_(\w+)", key):
                found.setdefault(int(match[1]), {})[match[2]] = value
        return dict(sorted(found.items()))


class Training:
    """A file with trajectories of the optimizer, one per configuration."""

    def __init__(self, path: Path) -> None:
        self.arrays = read(path)
        self.steps = int(self.arrays["steps"])
        self.x, self.y = self.arrays["X"], self.arrays["y"]

    def configurations(self) -> list[str]:
        """Return the names of the configurations."""
        found = {m[1] for key in self.arrays if (m := re.fullmatch(r"(c\d+)_params", key))}
        assert found
        return sorted(found)

    def model(self, name: str) -> nn.Sequential:
        """Return the network before the first step."""
        model = network(self.arrays["sizes"])
        init = self.arrays.get(f"{name}_init_sparse", self.arrays["init"])
        # A copy: parameters become views of it.
        nn.utils.vector_to_parameters(init.double().clone(), model.parameters())
        return model

    def optimizer(self, name: str, model: nn.Module, **options: Any) -> MFAC:
        """Return our optimizer with the recorded arguments."""
        prefix = f"{name}_hp_"
        arguments = {
            k.removeprefix(prefix): v for k, v in self.arrays.items() if k.startswith(prefix)
        }
        ours = {
            "lr": "lr",
            "ngrads": "num_grads",
            "damp": "damping",
            "momentum": "momentum",
            "weight_decay": "l2_reg",
            "sparse": "sparse",
        }
        options.update({ours[key]: value for key, value in arguments.items()})
        return MFAC(model.parameters(), **options)

    def losses(self, model: nn.Module) -> Iterator[Tensor]:
        """Yield the loss of each step, at the present parameters."""
        size = int(self.arrays["batch"])
        for step in range(self.steps):
            start = step % (len(self.x) // size) * size
            batch = slice(start, start + size)
            yield nn.functional.cross_entropy(model(self.x[batch]), self.y[batch])


class Recomputation(NamedTuple):
    """What was recorded of one event.

    Attributes:
        sparsity: The sparsity asked for.
        keep: Which weights are left.
        weights: All weights after it.
    """

    sparsity: float
    keep: Tensor
    weights: Tensor


class Pruned:
    """A file with a pruned network."""

    def __init__(self, path: Path) -> None:
        self.arrays = read(path)
        self.num_grads = int(self.arrays["ngrads"])
        self.damping = float(self.arrays["damp"])

    def model(self) -> nn.Sequential:
        """Return the trained network."""
        model = network(self.arrays["sizes"], self.arrays["param_names"])
        trained = self.arrays["trained"].double().clone()
        nn.utils.vector_to_parameters(trained, model.parameters())
        return model

    def block_sizes(self) -> dict[str, int | None]:
        """Return the block sizes by their names; None for one block."""
        found = {m[1] for key in self.arrays if (m := re.fullmatch(r"b(-?\d+)_t0_r1_mask", key))}
        assert found
        return {name: None if int(name) < 0 else int(name) for name in sorted(found)}

    def events(self, block_size: str) -> Iterator[Recomputation]:
        """Yield the events of all targets, in order."""
        for target in range(len(self.arrays["targets"])):
            for number in range(1, int(self.arrays["nrecomps"]) + 1):
                name = f"b{block_size}_t{target}_r{number}"
                yield Recomputation(
                    float(self.arrays[f"{name}_sparsity_request"]),
                    self.arrays[f"{name}_mask"],
                    self.arrays[f"{name}_w"],
                )

    def loss(self, model: nn.Module, number: int) -> Tensor:
        """Return the loss of a minibatch."""
        x, y, size = self.arrays["X"], self.arrays["y"], int(self.arrays["batch"])
        start = number % (len(x) // size) * size
        batch = slice(start, start + size)
        return nn.functional.cross_entropy(model(x[batch]), y[batch])
