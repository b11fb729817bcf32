"""Handwritten digits that ship inside scikit-learn, and a stock module that classifies them."""

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from lightning_curvature.checks import check_in_range, check_interval

__all__ = ["DigitsClassifier", "DigitsDataModule"]

_NUM_CLASSES = 10
_SIDE = 8  # images are [1, 8, 8]
_MAX_PIXEL = 16.0
_FRACTIONS = (0.7, 0.1, 0.2)  # training, validation, test

_Subset = torch.utils.data.Subset[tuple[Tensor, ...]]


class DigitsDataModule(LightningDataModule):
    """1797 gray images of 8 x 8 pixels in ten classes: 70 % training, 10 % validation, 20 % test.

    No download: the images are part of scikit-learn (the extra ``demo``).

    Args:
        batch_size: Images per batch.
        split_seed: Seed of the random split, independent of the training seed.

    Raises:
        ModuleNotFoundError: If scikit-learn is missing (in ``setup``).
        ValueError: If ``batch_size`` is below 1.
    """

    def __init__(self, batch_size: int = 128, split_seed: int = 0) -> None:
        super().__init__()
        check_interval("batch_size", batch_size)
        self.batch_size = batch_size
        self.split_seed = split_seed
        self._splits: list[_Subset] | None = None

    @override
    def setup(self, stage: str) -> None:
        """Load and split the images once."""
        if self._splits is not None:
            return
        images, labels = _load_digits()
        generator = torch.Generator().manual_seed(self.split_seed)
        self._splits = random_split(TensorDataset(images, labels), _FRACTIONS, generator)

    @override
    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return shuffled training batches."""
        return self._loader(0, shuffle=True)

    @override
    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return validation batches."""
        return self._loader(1)

    @override
    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return test batches."""
        return self._loader(2)

    def _loader(self, index: int, *, shuffle: bool = False) -> DataLoader[tuple[Tensor, ...]]:
        if self._splits is None:
            raise RuntimeError("DigitsDataModule has no data yet: call setup(stage) first.")
        return DataLoader(self._splits[index], batch_size=self.batch_size, shuffle=shuffle)


class DigitsClassifier(LightningModule):
    """Small convolutional network with batch normalization and dropout.

    A stock LightningModule that knows nothing of curvature. It has no ``configure_optimizers``:
    the command line gives it an optimizer.

    Args:
        channels: Channels of the first convolution; the second has twice as many.
        dropout: Fraction of the features dropped before the last layer, in [0, 1).

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, channels: int = 16, dropout: float = 0.2) -> None:
        super().__init__()
        check_interval("channels", channels)
        check_in_range("dropout", dropout, 0, 1)
        self.save_hyperparameters()
        self.network = nn.Sequential(
            nn.Conv2d(1, channels, kernel_size=3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, kernel_size=3, padding=1),
            nn.BatchNorm2d(2 * channels),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(2 * channels * (_SIDE // 2) ** 2, _NUM_CLASSES),
        )
        self.val_acc = MulticlassAccuracy(num_classes=_NUM_CLASSES, average="micro")
        self.test_acc = MulticlassAccuracy(num_classes=_NUM_CLASSES, average="micro")

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Return the logits ``[N, 10]`` of images ``[N, 1, 8, 8]``."""
        logits: Tensor = self.network(images)
        return logits

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean cross-entropy of the batch."""
        images, labels = batch
        loss = functional.cross_entropy(self(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    @override
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy."""
        images, labels = batch
        logits = self(images)
        self.val_acc(logits, labels)
        loss = functional.cross_entropy(logits, labels)
        self.log("val_loss", loss, prog_bar=True, sync_dist=True)
        self.log("val_acc", self.val_acc, prog_bar=True)

    @override
    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the accuracy."""
        images, labels = batch
        self.test_acc(self(images), labels)
        self.log("test_acc", self.test_acc, prog_bar=True)


def _load_digits() -> tuple[Tensor, Tensor]:
    """Return images ``[1797, 1, 8, 8]`` in [0, 1] and labels ``[1797]``."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "DigitsDataModule reads the digits that ship inside scikit-learn. Install it with "
            '`pip install "lightning-curvature[demo]"`.'
        ) from error
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / _MAX_PIXEL
    return images, torch.tensor(digits.target, dtype=torch.int64)
