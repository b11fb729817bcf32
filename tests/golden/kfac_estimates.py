"""Reads recorded one-shot estimates of K-FAC: a model, two batches, and what they say of blocks."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lightning_curvature.curvature.factor_window import FactorWindow
from lightning_curvature.curvature.layer_rows import KRONECKER_LAYERS
from lightning_curvature.oracle.plain import ModelOracle
from lightning_curvature.oracle.plans import FisherType, LayerPlan
from tests.golden.kfac_files import (
    FISHER_TYPES,
    Flatten,
    convolution,
    filled,
    images,
    linear,
    to_torch,
)


class Case(NamedTuple):
    """A model with two batches and what was estimated from them.

    Attributes:
        name: Prefix of its arrays.
        model: With the recorded parameters.
        layers: Recorded names of weight and bias by the name of the layer.
        loss_fn: Its loss.
        fisher_type: See `layer_roots`.
        batches: Input and target, in order.
        arrays: All numbers of the file.
        damping: That of the recorded products.
        decay: Of the running averages.
    """

    name: str
    model: nn.Module
    layers: dict[str, tuple[str, ...]]
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    fisher_type: FisherType
    batches: list[tuple[Tensor, Tensor]]
    arrays: dict[str, Any]
    damping: float
    decay: float

    def recorded(self, kind: str, name: str) -> Tensor:
        """Return a recorded vector's part of one parameter, in the layout of torch."""
        x = self.arrays[f"{self.name}/{kind}/{name}"]
        return torch.from_numpy(x) if name == "emb" else to_torch(x)

    def windows(self) -> Iterator[tuple[ModelOracle, FactorWindow]]:
        """Run one batch after another, and give what the layers have seen."""
        params = list(self.model.parameters())
        # Their embedding has the diagonal of any parameter that is in no known layer.
        kinds = tuple(kind for kind in KRONECKER_LAYERS if kind is not nn.Embedding)
        oracle = ModelOracle(params, self.model, self.loss_fn, wanted=lambda: True)
        window = FactorWindow(self.model, params, lambda: True, kinds=kinds)
        oracle.attachments.append(window)
        oracle.plan = lambda: LayerPlan(
            seed=0,
            step=0,
            observer=window,
            fisher_type=self.fisher_type,
            official_empirical_scaling=True,
        )
        for x, y in self.batches:
            self.model.zero_grad()
            oracle.criterion(self.model(x), y).backward()
            oracle.see_layers()
            yield oracle, window
            oracle.clear()
            window.clear()
        oracle.close()


def cases(path: Path) -> Iterator[Case]:
    """Read a file of one-shot estimates."""
    with np.load(path) as archive:
        arrays = {key: archive[key] for key in archive.files}
    hparams = json.loads(str(arrays["hparams"]))
    if "variants" in hparams:
        for name, variant in hparams["variants"].items():
            yield _conv_case(name, variant, hparams, arrays)
    else:
        for name in hparams["blocks"]:
            yield _sequence_case(name, hparams, arrays)


def _batches(arrays: dict[str, Any], x: str, y: str) -> list[tuple[Tensor, Tensor]]:
    count = sum(key.startswith(f"{x}_") for key in arrays)
    return [
        (
            images(torch.from_numpy(arrays[f"{x}_{number}"])),
            torch.from_numpy(arrays[f"{y}_{number}"]),
        )
        for number in range(1, count + 1)
    ]


def _same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Return what SAME adds before and after one axis."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def _conv_case(name: str, variant: dict[str, Any], hparams: Any, arrays: dict[str, Any]) -> Case:
    batches = _batches(arrays, "x", "y")
    given = {n: to_torch(arrays[f"{name}/params/{n}"]) for n in ("c_w", "d_w", "d_b")}
    bias = to_torch(arrays[f"{name}/params/c_b"]) if variant["bias"] else None
    padding = variant["padding"]
    if padding == "VALID":
        padding = [[0, 0], [0, 0]]
    elif padding == "SAME":
        sizes = zip(batches[0][0].shape[2:], variant["kernel"], variant["stride"], strict=True)
        padding = [_same_padding(*each) for each in sizes]
    else:
        # Symmetric: the layer's own, so that both ways are seen.
        assert all(low == high for low, high in padding)
    own = [low if low == high else 0 for low, high in padding]
    left = [each if each[0] != each[1] else (0, 0) for each in padding]
    model = nn.Sequential(
        nn.ZeroPad2d((*left[1], *left[0])),
        convolution(given["c_w"], bias, stride=tuple(variant["stride"]), padding=tuple(own)),
        nn.ReLU(),
        Flatten(),
        linear(given["d_w"], given["d_b"]),
    )
    return Case(
        name,
        model,
        {"1": ("c_w", "c_b") if variant["bias"] else ("c_w",), "4": ("d_w", "d_b")},
        nn.functional.cross_entropy,
        "type-2",
        batches,
        arrays,
        hparams["damping"],
        hparams["ema"],
    )


class SequenceModel(nn.Module):
    """Embedding, layer norm, linear, tanh, and a linear output per sequence or token."""

    def __init__(self, hparams: dict[str, Any], arrays: dict[str, Any], *, pooled: bool) -> None:
        super().__init__()
        given = {n.removeprefix("params/"): x for n, x in arrays.items() if n.startswith("params/")}
        self.pooled = pooled
        embedding = torch.from_numpy(given["emb"])
        self.emb = nn.Embedding(*embedding.shape, dtype=embedding.dtype)
        self.ln = nn.LayerNorm(embedding.shape[1:], eps=hparams["ln_eps"], dtype=embedding.dtype)
        self.d0 = linear(to_torch(given["d0_w"]), to_torch(given["d0_b"]))
        self.d1 = linear(to_torch(given["d1_w"]), to_torch(given["d1_b"]))
        filled(self.emb, embedding, None)
        filled(self.ln, to_torch(given["ln_scale"]), to_torch(given["ln_shift"]))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.d0(self.ln(self.emb(x))))
        return self.d1(hidden.mean(1) if self.pooled else hidden)


def _token_loss(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())


def _sequence_case(name: str, hparams: dict[str, Any], arrays: dict[str, Any]) -> Case:
    kind, mode = name.split("_")
    return Case(
        name,
        SequenceModel(hparams, arrays, pooled=kind == "pooled"),
        {
            "emb": ("emb",),
            "ln": ("ln_scale", "ln_shift"),
            "d0": ("d0_w", "d0_b"),
            "d1": ("d1_w", "d1_b"),
        },
        nn.functional.cross_entropy if kind == "pooled" else _token_loss,
        FISHER_TYPES[f"fisher_{mode}"],
        _batches(arrays, "ids", f"y_{kind}"),
        arrays,
        hparams["damping"],
        hparams["ema"],
    )
