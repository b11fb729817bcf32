"""Loops around AdaFisher, and a model with layers of all kinds."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_curvature import AdaFisher, AdaFisherW
from tests.helpers.plain_loop import CLASSES, Loop

EXACT: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-13}
BOTH = pytest.mark.parametrize("cls", [AdaFisher, AdaFisherW])


def making(cls: type[AdaFisher | AdaFisherW] = AdaFisher, **options: Any) -> Callable[..., Any]:
    return lambda params: cls(params, **{"factor_update_interval": 1, **options})


def theta(loop: Loop) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in loop.model.named_parameters()}


def factors(loop: Loop) -> dict[str, Any]:
    found: dict[str, Any] = loop.optimizer.state_dict()["curvature"]["factors"]
    return found


def inside(loop: Loop) -> AdaFisher:
    assert isinstance(loop.optimizer, (AdaFisher, AdaFisherW))
    return loop.optimizer  # type: ignore[return-value]


class Zoo(nn.Module):
    """One layer of every kind, a shared and a tied one, and parameters without a layer."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(4, width, dtype=torch.float64))
        self.embedding = nn.Embedding(CLASSES, width, dtype=torch.float64)
        self.conv1 = nn.Conv1d(width, width, 3, padding="same", dtype=torch.float64)
        self.batch = nn.BatchNorm1d(width, dtype=torch.float64)
        self.conv2 = nn.Conv2d(2, 4, 2, groups=2, dtype=torch.float64)
        self.group = nn.GroupNorm(2, 4, dtype=torch.float64)
        self.shared = nn.Linear(width, width, dtype=torch.float64)
        self.layer = nn.LayerNorm(width, dtype=torch.float64)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True, dtype=torch.float64)
        self.head = nn.Linear(width, CLASSES, bias=False, dtype=torch.float64)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position
        x = self.batch(self.conv1(x.transpose(1, 2)))
        image = self.group(self.conv2(x.unflatten(1, (2, -1)))).relu().mean((1, 2, 3))
        x = self.shared(self.shared(x.transpose(1, 2)).tanh())
        x = self.attention(x, x, x)[0]
        return self.head(self.layer(x).mean(1)) * (1 + image[:, None])


def sentences(steps: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(CLASSES, (steps, 8, 4), generator=generator)
    return [(x, x[:, 0]) for x in tokens]


def zoo_loop(**options: Any) -> Loop:
    torch.manual_seed(0)
    return Loop(Zoo(), making(**options))
