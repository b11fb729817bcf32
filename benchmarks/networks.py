"""The networks whose steps are timed and weighed: stock LightningModules and batches for them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from typing_extensions import override

__all__ = ["USUAL", "WORKLOADS", "Batch", "Classifier", "OptimizerFactory", "Workload"]

Batch = tuple[Tensor, Tensor]
OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]

_IMAGE_CLASSES = 10
_VOCABULARY = 128
_POSITIONS = 64


class Classifier(LightningModule):
    """Trains a network with the mean cross-entropy over examples (and positions).

    Args:
        network: Gives logits ``[N, classes]`` or ``[N, positions, classes]``.
        make_optimizer: Called with the parameters.
        extra_forwards: Forward passes without a graph before each training step, for comparison.
        graph_interval: Every so many steps the gradients get a graph of their own, for optimizers
            that differentiate them again and leave that to the user, who then steps by hand. None
            for ordinary optimizers.
    """

    def __init__(
        self,
        network: nn.Module,
        make_optimizer: OptimizerFactory,
        *,
        extra_forwards: int = 0,
        graph_interval: int | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self._make_optimizer = make_optimizer
        self._extra_forwards = extra_forwards
        self._graph_interval = graph_interval
        self.automatic_optimization = graph_interval is None

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        for _ in range(self._extra_forwards):
            with torch.no_grad():
                self._loss(*batch)
        loss = self._loss(*batch)
        if self._graph_interval is not None:
            optimizer: Any = self.optimizers()
            # To None, or gradients and their graphs hold each other.
            optimizer.zero_grad(set_to_none=True)
            self.manual_backward(loss, create_graph=batch_idx % self._graph_interval == 0)
            optimizer.step()
        return loss.detach() if self._graph_interval is not None else loss

    def _loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        logits = self.network(inputs)
        return functional.cross_entropy(logits.flatten(0, -2), labels.flatten())

    @override
    def configure_optimizers(self) -> Any:
        """Return the optimizer under test."""
        return self._make_optimizer(self.parameters())


class Block(nn.Module):
    """Pre-norm transformer block; dropout on its two residual branches.

    Args:
        width: Width of the residual stream.
        heads: Number of attention heads.
        dropout: Fraction dropped, in [0, 1).
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
        )
        self.dropout = nn.Dropout(dropout)

    @override
    def forward(self, hidden: Tensor) -> Tensor:
        """Return the next hidden states, both ``[N, positions, width]``."""
        qkv = self.qkv(self.attention_norm(hidden)).unflatten(-1, (3, self.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.dropout(self.project(mixed.transpose(1, 2).flatten(-2)))
        return hidden + self.dropout(self.mlp(hidden))


class Transformer(nn.Module):
    """Small causal transformer that predicts the next token.

    Args:
        dropout: Fraction dropped, in [0, 1).
        width: Width of the residual stream.
        layers: Number of layers.
        heads: Number of attention heads.
        vocabulary: Number of different tokens.
        positions: Tokens per example.
        is_tied: Whether the head shares its weights with the embedding.
    """

    def __init__(
        self,
        dropout: float,
        width: int = 128,
        layers: int = 3,
        *,
        heads: int = 4,
        vocabulary: int = _VOCABULARY,
        positions: int = _POSITIONS,
        is_tied: bool = False,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(0.02 * torch.randn(positions, width))
        head = nn.Linear(width, vocabulary, bias=not is_tied)
        if is_tied:
            nn.init.normal_(self.embedding.weight, std=0.02)
            head.weight = self.embedding.weight
        self.blocks = nn.Sequential(
            nn.Dropout(dropout),
            *(Block(width, heads=heads, dropout=dropout) for _ in range(layers)),
            nn.LayerNorm(width),
            head,
        )

    @override
    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits ``[N, positions, vocabulary]`` of tokens ``[N, positions]``."""
        return self.blocks(self.embedding(tokens) + self.position)


def _mlp(*hidden: int) -> nn.Module:
    layers: list[nn.Module] = []
    for given, width in pairwise((784, *hidden)):
        layers += [nn.Linear(given, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden[-1], _IMAGE_CLASSES))


def _conv() -> nn.Module:
    def block(channels_in: int, channels_out: int, stride: int = 1) -> list[nn.Module]:
        convolution = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(channels_out), nn.ReLU()]

    return nn.Sequential(
        *block(3, 32),
        *block(32, 64, stride=2),
        *block(64, 64),
        *block(64, 128, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, _IMAGE_CLASSES),
    )


def _random_images(count: int, *shape: int) -> Batch:
    return torch.randn(count, *shape), torch.randint(_IMAGE_CLASSES, (count,))


def _random_tokens(count: int, vocabulary: int = _VOCABULARY, positions: int = _POSITIONS) -> Batch:
    tokens = torch.randint(vocabulary, (count, positions + 1))
    return tokens[:, :-1], tokens[:, 1:]


@dataclass(frozen=True)
class Workload:
    """A network and how to draw a batch for it.

    Attributes:
        description: What it is, in words.
        network: Makes the network.
        draw: Draws a batch of the given number of examples.
        batch_size: Its usual number of examples.
        goal: Largest time of a step that asks everything, relative to AdamW.
    """

    description: str
    network: Callable[[], nn.Module]
    draw: Callable[[int], Batch]
    batch_size: int
    goal: float

    def module(
        self,
        make_optimizer: OptimizerFactory,
        *,
        extra_forwards: int = 0,
        graph_interval: int | None = None,
        seed: int = 0,
    ) -> Classifier:
        """Return a freshly initialized module.

        Args:
            make_optimizer: Called with the parameters.
            extra_forwards: See `Classifier`.
            graph_interval: See there.
            seed: Seed of the weights.
        """
        torch.manual_seed(seed)
        return Classifier(
            self.network(),
            make_optimizer,
            extra_forwards=extra_forwards,
            graph_interval=graph_interval,
        )

    def batches(self, count: int, *, batch_size: int | None = None, seed: int = 0) -> list[Batch]:
        """Return some batches of random data.

        Args:
            count: How many.
            batch_size: Examples in each, None for the usual number.
            seed: Seed of the data.
        """
        torch.manual_seed(seed)
        return [self.draw(batch_size or self.batch_size) for _ in range(count)]


WORKLOADS = {
    "mlp": Workload(
        "MLP 784-1024-1024-10, batch 512",
        partial(_mlp, 1024, 1024),
        lambda n: _random_images(n, 784),
        512,
        1.9,
    ),
    "mlp40k": Workload(
        "MLP 784-50-10, batch 3200",
        partial(_mlp, 50),
        lambda n: _random_images(n, 784),
        3200,
        1.9,
    ),
    "mlp5m": Workload(
        "MLP 784-1872-1872-10 (4.99M parameters), batch 256",
        partial(_mlp, 1872, 1872),
        lambda n: _random_images(n, 784),
        256,
        1.9,
    ),
    "conv": Workload(
        "4 convolutions with BatchNorm, 64 images [3, 32, 32]",
        _conv,
        lambda n: _random_images(n, 3, 32, 32),
        64,
        1.75,
    ),
    "transformer": Workload(
        "3-layer transformer, dropout 0.1, 16 x 64 tokens",
        partial(Transformer, 0.1),
        _random_tokens,
        16,
        1.75,
    ),
    "transformer_without_dropout": Workload(
        "3-layer transformer, no dropout, 16 x 64 tokens",
        partial(Transformer, 0.0),
        _random_tokens,
        16,
        1.75,
    ),
    "transformer20m": Workload(
        "5-layer transformer (20.0M parameters, tied head), 8 x 128 tokens",
        partial(
            *(Transformer, 0.0, 512, 5),
            heads=8,
            vocabulary=8192,
            positions=128,
            is_tied=True,
        ),
        partial(_random_tokens, vocabulary=8192, positions=128),
        8,
        1.75,
    ),
}

# Those that are measured unless others are asked for.
USUAL = [name for name in WORKLOADS if name not in ("mlp5m", "mlp40k", "transformer20m")]
