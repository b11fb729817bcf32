"""MeZO in plain loops, and its step written down with the whole direction in memory."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature.curvature.perturbation import direction_seed
from lightning_curvature.optim.mezo import MeZO
from tests.helpers.plain_loop import Loop

STEPS = 4
LR, EPS = 0.05, 1e-3
RESTORES = ("fused", "inplace", "snapshot")
ONE_OF_EACH = (
    {"estimator": "two_sided"},
    {"estimator": "one_sided"},
    {"estimator": "residual"},
    {"num_samples": 3},
    {"blockwise": "coordinate"},
    {"blockwise": "joint"},
)


def ids(options: Any) -> str:
    return "-".join(f"{v}" for v in options.values()) if isinstance(options, dict) else str(options)


def mezo(**options: Any) -> Callable[[Any], MeZO]:
    return lambda params: MeZO(params, **{"lr": LR, "perturbation_scale": EPS, **options})


def by_layer(model: nn.Module) -> list[dict[str, Any]]:
    """Make the weights and the biases of the first layer, and the rest, groups of their own."""
    params = list(model.parameters())
    return [
        {"params": [params[0]], "weight_decay": 0.1},
        {"params": [params[1]], "lr": 2 * LR},
        {"params": params[2:], "weight_decay": 0.02},
    ]


def clones(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_equal(found: Sequence[Tensor], expected: Sequence[Tensor], atol: float = 0.0) -> None:
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.detach(), y, rtol=0, atol=atol)


def closure_of(loop: Loop, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    return lambda: loop.criterion(loop.model(x), y)


class Reference:
    """The step, written down tensor by tensor, with the whole direction in memory."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        self.model = model
        self.seed = options.get("seed", 0)
        self.options = options
        self.previous: float | None = None
        self.slopes: list[float] = []

    def direction(self, step: int, sample: int) -> list[Tensor]:
        drawn = []
        for index, p in enumerate(self.model.parameters()):
            generator = torch.Generator().manual_seed(
                direction_seed(self.seed, step, sample, index)
            )
            if self.options.get("distribution") == "rademacher":
                words = torch.empty(-(-p.numel() // 64), dtype=torch.int64)
                octets = words.random_(-(2**63), None, generator=generator).view(torch.uint8)
                bits = [(int(octet) >> place) & 1 for octet in octets for place in range(8)]
                signs = torch.tensor(bits[: p.numel()]).to(p.dtype) * 2 - 1
                z = signs.view(p.shape)
            else:
                z = torch.empty_like(p).normal_(generator=generator)
            drawn.append(z.detach())
        if self.options.get("distribution") == "sphere":
            norm = torch.cat([z.reshape(-1) for z in drawn]).norm()
            factor = math.sqrt(sum(z.numel() for z in drawn)) / norm
            drawn = [z * factor for z in drawn]
        return drawn

    @torch.no_grad()
    def loss(self, x: Tensor, y: Tensor, z: Sequence[Tensor] = (), length: float = 0.0) -> float:
        params = list(self.model.parameters())
        before = clones(self.model)
        for p, d in zip(params, z, strict=False):
            p.add_(length * d)
        value = F.cross_entropy(self.model(x), y).item()
        for p, b in zip(params, before, strict=True):
            p.copy_(b)
        return value

    def slope(self, x: Tensor, y: Tensor, z: Sequence[Tensor]) -> float:
        above = self.loss(x, y, z, EPS)
        estimator = self.options.get("estimator", "two_sided")
        if estimator == "two_sided":
            slope = (above - self.loss(x, y, z, -EPS)) / (2 * EPS)
        elif estimator == "one_sided":
            slope = (above - self.loss(x, y)) / EPS
        else:
            before = above if self.previous is None else self.previous
            slope, self.previous = (above - before) / EPS, above
        limit = self.options.get("max_projected_grad")
        return slope if limit is None else max(-limit, min(limit, slope))

    @torch.no_grad()
    def step(self, step: int, x: Tensor, y: Tensor) -> None:
        groups = by_layer(self.model)
        owner = {id(p): k for k, group in enumerate(groups) for p in group["params"]}
        params = list(self.model.parameters())
        blockwise = self.options.get("blockwise", "none")
        count = self.options.get("num_samples", 1)
        blocks = range(len(groups)) if blockwise != "none" else [None]
        pending: list[tuple[Tensor, Tensor, float, float]] = []
        for block in blocks:
            mine = [block is None or owner[id(p)] == block for p in params]
            estimate = [torch.zeros_like(p) for p in params]
            for sample in range(count):
                z = [d * on for d, on in zip(self.direction(step, sample), mine, strict=True)]
                slope = self.slope(x, y, z)
                self.slopes.append(slope)
                estimate = [e + slope / count * d for e, d in zip(estimate, z, strict=True)]
            for p, e, on in zip(params, estimate, mine, strict=True):
                if on:
                    group = groups[owner[id(p)]]
                    sign = -1.0 if self.options.get("maximize") else 1.0
                    wd, lr = group.get("weight_decay", 0.0), group.get("lr", LR)
                    pending.append((p, sign * e, lr, wd))
            if blockwise != "joint":
                self._apply(pending)
        self._apply(pending)

    @staticmethod
    def _apply(pending: list[tuple[Tensor, Tensor, float, float]]) -> None:
        for p, estimate, lr, decay in pending:
            p.sub_(lr * (estimate + decay * p))
        pending.clear()
