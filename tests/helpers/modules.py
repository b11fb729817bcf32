"""Stock LightningModules and tiny data sets. None of them knows that curvature exists."""

import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

MakeOptimizer = Callable[[Iterable[Any]], torch.optim.Optimizer]

CLASSES = 4


def vectors(count: int = 20, features: int = 5, seed: int = 31) -> TensorDataset:
    """Draw labelled vectors, shapes ``[count, features]`` and ``[count]``."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, features, generator=generator)
    y = torch.randint(CLASSES, (count,), generator=generator)
    return TensorDataset(x, y)


def images(count: int = 20, seed: int = 32) -> TensorDataset:
    """Draw labelled images, shapes ``[count, 1, 6, 6]`` and ``[count]``."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 1, 6, 6, generator=generator)
    y = torch.randint(CLASSES, (count,), generator=generator)
    return TensorDataset(x, y)


def sequences(count: int = 12, length: int = 7, vocabulary: int = 11) -> TensorDataset:
    """Draw token sequences with next-token targets, shapes ``[count, length]``."""
    generator = torch.Generator().manual_seed(33)
    tokens = torch.randint(vocabulary, (count, length + 1), generator=generator)
    return TensorDataset(tokens[:, :-1].clone(), tokens[:, 1:].clone())


def loader(data: TensorDataset, batch_size: int = 4, shuffle: bool = False) -> DataLoader[Any]:
    """Batch a data set in the main process."""
    return DataLoader(data, batch_size=batch_size, shuffle=shuffle)


class ConvNet(nn.Sequential):
    """Convolution, batch norm, dropout, linear read-out for images of ``[1, 6, 6]``."""

    def __init__(self, channels: int = 4, dropout: float = 0.3) -> None:
        super().__init__(
            nn.Conv2d(1, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Conv2d(channels, channels, 3, stride=2),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(4 * channels, CLASSES),
        )


class Transformer(nn.Module):
    """One causal encoder layer with dropout and an untied read-out."""

    def __init__(
        self, vocabulary: int = 11, width: int = 16, heads: int = 2, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(0.1 * torch.randn(16, width))
        self.layer = nn.TransformerEncoderLayer(
            width, heads, 2 * width, dropout, activation="gelu", batch_first=True
        )
        self.out = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits, shape ``[batch, position, vocabulary]``."""
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(
            length, dtype=self.position.dtype, device=tokens.device
        )
        hidden = self.embed(tokens) + self.position[:length]
        return self.out(self.layer(hidden, src_mask=mask, is_causal=True))


class StockModule(LightningModule):
    """A network, a loss function and an optimizer.

    Args:
        network: maps the first element of a batch to logits.
        make_optimizer: called with the parameters.
        loss: called with logits and targets.
    """

    def __init__(
        self,
        network: nn.Module,
        make_optimizer: MakeOptimizer,
        loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    ) -> None:
        super().__init__()
        self.network = network
        self.make_optimizer = make_optimizer
        self.loss = loss

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.network(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Return the loss of a batch."""
        x, y = batch
        return self.loss(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make the optimizer."""
        return self.make_optimizer(self.parameters())


def mlp_module(make_optimizer: MakeOptimizer, **kwargs: Any) -> StockModule:
    """Build a module for `vectors`."""
    network = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    return StockModule(network, make_optimizer, **kwargs)


def norm_dropout_module(make_optimizer: MakeOptimizer, **kwargs: Any) -> StockModule:
    """Build a module for `vectors` with batch norm and dropout."""
    network = nn.Sequential(
        nn.Linear(5, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(8, 8),
        nn.Tanh(),
        nn.Dropout(0.2),
        nn.Linear(8, CLASSES),
    )
    return StockModule(network, make_optimizer, **kwargs)


def conv_module(make_optimizer: MakeOptimizer, **kwargs: Any) -> StockModule:
    """Build a module for `images`."""
    return StockModule(ConvNet(), make_optimizer, **kwargs)


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy per token."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def transformer_module(make_optimizer: MakeOptimizer, **kwargs: Any) -> StockModule:
    """Build a module for `sequences`."""
    return StockModule(Transformer(), make_optimizer, loss=token_loss, **kwargs)


class Everything(LightningModule):
    """Everything that an extra pass could leave a trace of.

    Batch norm, dropout, spectral norm, metrics logged as objects and by hand, augmentation drawn
    from torch, NumPy and Python, and a validation loop.

    Args:
        make_optimizer: called with the parameters.
        spectral: whether the second convolution has spectral norm, which forward mode cannot do.
    """

    def __init__(self, make_optimizer: MakeOptimizer, spectral: bool = True) -> None:
        super().__init__()
        second = nn.Conv2d(4, 4, 3, stride=2)
        self.features = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Dropout(0.2),
            spectral_norm(second) if spectral else second,
            nn.BatchNorm2d(4),
            nn.ReLU(),
        )
        self.head = nn.Linear(16, CLASSES)
        self.train_accuracy = MulticlassAccuracy(CLASSES)
        self.val_accuracy = MulticlassAccuracy(CLASSES)
        self.mean_margin = MeanMetric()
        self.register_buffer("loss_average", torch.zeros(()))
        self.make_optimizer = make_optimizer

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.head(self.features(x).flatten(1))

    def _augment(self, x: Tensor) -> Tensor:
        if random.random() < 0.5:
            x = x.flip(-1)
        x = x.roll(int(np.random.randint(0, 3)), dims=-2)  # noqa: NPY002 - the global stream is the point
        return x + 0.1 * torch.randn_like(x)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Augment, classify, count and log."""
        x, y = batch
        logits = self(self._augment(x))
        loss = F.cross_entropy(logits, y, label_smoothing=0.1)
        with torch.no_grad():
            self.loss_average.lerp_(loss.detach(), 0.1)
            top = logits.topk(2).values
            self.mean_margin.update(top[:, 0] - top[:, 1])
        self.train_accuracy(logits, y)
        self.log("train/accuracy", self.train_accuracy, on_step=True, on_epoch=True)
        self.log("train/margin", self.mean_margin, on_step=False, on_epoch=True)
        self.log("train/noise", torch.rand(()), on_step=True, on_epoch=True)
        self.log_dict(
            {"train/loss": loss, "train/average": self.loss_average.clone()},
            on_step=True,
            on_epoch=True,
            prog_bar=True,
        )
        return {"loss": loss, "logits": logits.detach()}

    def on_after_backward(self) -> None:
        """Draw between the training step and the optimizer step, as gradient noise does."""
        scale = 1e-9 * random.random() * np.random.rand()  # noqa: NPY002 - likewise
        for param in self.parameters():
            param.grad.add_(scale * torch.randn_like(param))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Classify and log."""
        x, y = batch
        logits = self(x)
        self.val_accuracy(logits, y)
        self.log("val/accuracy", self.val_accuracy)
        self.log("val/loss", F.cross_entropy(logits, y))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make the optimizer."""
        return self.make_optimizer(self.parameters())
