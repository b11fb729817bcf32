"""Reads a recorded trajectory of a zeroth-order optimizer: data, model, directions, numbers."""

import json
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

DTYPES = {"f32": torch.float32, "f64": torch.float64}
LOSSES = {"cls": F.cross_entropy, "reg": F.mse_loss}
# Names that the official codes leave out of weight decay, and the methods that do so.
NO_DECAY = ("bias", "layer_norm", "layernorm")
SPARING = ("mezo", "nspsa", "zob_fwd")


class Net(nn.Module):
    """Linear layers fc1, fc2, ... with tanh between."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        for number, (d_in, d_out) in enumerate(pairwise(sizes), start=1):
            self.add_module(f"fc{number}", nn.Linear(d_in, d_out))

    def forward(self, x: Tensor) -> Tensor:
        *hidden, last = self.children()
        for layer in hidden:
            x = torch.tanh(layer(x))
        return last(x)


class Point(nn.Module):
    """A vector ``w``."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(size))

    def forward(self) -> Tensor:
        return self.w


class Recording:
    """One file."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as archive:
            self.arrays = {key: archive[key] for key in archive.files}
        self.meta: dict[str, Any] = json.loads(str(self.arrays.pop("meta")))
        self.hyper: dict[str, Any] = self.meta.get("hyper", {})
        self.method: str = self.hyper.get("method", "")

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.meta["dtype"]]

    @property
    def names(self) -> list[str]:
        return list(self.meta["param_names"])

    @property
    def steps(self) -> int:
        return len(self.arrays["z"])

    @property
    def num_samples(self) -> int:
        return 1 if self.arrays["z"].ndim == 2 else self.arrays["z"].shape[1]

    @property
    def is_blockwise(self) -> bool:
        return self.method.startswith("zob_block")

    @property
    def blocks(self) -> list[list[str]]:
        """Names of the parameters of each module, the blocks of block-wise files."""
        owners = dict.fromkeys(name.rpartition(".")[0] for name in self.names)
        return [[n for n in self.names if n.rpartition(".")[0] == owner] for owner in owners]

    def number(self, name: str, step: int) -> float:
        """Return one number of a step."""
        return float(self.arrays[name][step])

    # Model and data

    def model(self) -> nn.Module:
        """Build the model with the recorded initial parameters."""
        config = self.meta["config"]
        model = Net(config["sizes"]) if "sizes" in config else Point(config["d"])
        model = model.to(self.dtype)
        assert [name for name, _ in model.named_parameters()] == self.names
        shapes = [tuple(shape) for shape in self.meta["param_shapes"]]
        assert [tuple(p.shape) for p in model.parameters()] == shapes
        nn.utils.vector_to_parameters(self.vector("params_0"), model.parameters())
        return model

    def vector(self, name: str) -> Tensor:
        """Return an array as a vector."""
        return torch.from_numpy(np.array(self.arrays[name]))

    def loss_fn(self) -> Callable[..., Tensor]:
        """Return the loss, called with the output of the model and the targets."""
        if self.meta["problem"] != "quad":
            return LOSSES[self.meta["problem"]]
        h = self.vector("h_diag").to(self.dtype)
        return lambda w: 0.5 * (h * w.square()).sum()

    def batch(self, step: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return the arguments of the model and the targets of a step."""
        if self.meta["problem"] == "quad":
            return (), ()
        x, y = self.vector("data_x"), self.vector("data_y")
        if "batch_idx" in self.arrays:
            rows = torch.from_numpy(self.arrays["batch_idx"][step]).long()
            x, y = x[rows], y[rows]
        return (x,), (y,)

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Return the parameter groups: blocks, or decay and none, or all in one."""
        named = dict(model.named_parameters())
        if self.is_blockwise:
            return [{"params": [named[name] for name in block]} for block in self.blocks]
        decay = float(self.hyper.get("wd", 0.0))
        spared = [n for n in named if self.method in SPARING and any(k in n for k in NO_DECAY)]
        groups = [
            {"params": [p for name, p in named.items() if name not in spared]},
            {"params": [named[name] for name in spared]},
        ]
        decays = (decay, 0.0)
        return [
            {**group, "weight_decay": wd} if decay else group
            for group, wd in zip(groups, decays, strict=True)
            if group["params"]
        ]

    def noise(self, model: nn.Module) -> Callable[[int, int, int, Tensor], Tensor]:
        """Return a source of the recorded directions."""
        params = list(model.parameters())
        sizes = [p.numel() for p in params]
        position = {id(p): i for i, p in enumerate(params)}

        def source(step: int, sample: int, index: int, param: Tensor) -> Tensor:
            z = self.vector("z")[step]
            z = z[sample] if self.num_samples > 1 else z
            return z.split(sizes)[position[id(param)]].view(param.shape)

        return source

    # Losses

    def losses(self, step: int, order: tuple[str, ...]) -> list[float]:
        """Return the losses of a step as they are asked for.

        Args:
            step: The step.
            order: Arrays in the order of the evaluations; those with a column per direction or
                block are gone through together.
        """
        columns = [np.atleast_1d(self.arrays[name][step]) for name in order]
        return [float(x) for row in zip(*columns, strict=True) for x in row]

    def checkpoints(self, prefix: str = "params") -> Iterator[tuple[int, Tensor]]:
        """Iterate over (number of steps, vector) of what was kept on the way."""
        for name in self.arrays:
            head, _, steps = name.rpartition("_")
            if head == prefix and steps.isdigit() and steps != "0":
                yield int(steps), self.vector(name)
