"""Turned digits, and a module that learns to turn them back for a classifier without gradients."""

import math
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from lightning_curvature.checks import check_in_range
from lightning_curvature.demos.digits import DigitsDataModule

__all__ = ["BlackBoxClassifier", "TurnedDigitsDataModule"]

_NUM_CLASSES = 10
_NEIGHBORS = 25
# An image without a neighbor of its class costs no more than this.
_LEAST_PROBABILITY = 1e-2


class TurnedDigitsDataModule(DigitsDataModule):
    """The digits of `DigitsDataModule`, photographed with a camera that hangs askew.

    Args:
        batch_size: Images per batch.
        split_seed: Seed of the random split, independent of the training seed.
        angle: Degrees by which every image is turned, in [-180, 180).

    Raises:
        ModuleNotFoundError: If scikit-learn is missing (in ``setup``).
        ValueError: If an argument is out of range.
    """

    def __init__(self, batch_size: int = 64, split_seed: int = 0, angle: float = 35.0) -> None:
        super().__init__(batch_size, split_seed)
        check_in_range("angle", angle, -180, 180)
        self.angle = angle

    @override
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Return the batch with its images turned."""
        images, labels = batch
        cos, sin = math.cos(math.radians(self.angle)), math.sin(math.radians(self.angle))
        return _viewed(images, images.new_tensor([[cos, -sin, 0.0], [sin, cos, 0.0]])), labels


class BlackBoxClassifier(LightningModule):
    """A classifier that cannot be differentiated, behind an affine view that is learned.

    The classifier is scikit-learn's: the nearest of the upright training images vote. The module
    trains only the six numbers that say how images are looked at before they reach it. Nothing
    leads from the loss back to them but its values, so this trains with `MeZO` and its kin, and
    with no optimizer that needs a gradient.

    A stock LightningModule that knows nothing of curvature. It has no ``configure_optimizers``: the
    command line gives it an optimizer. Its data module is a `DigitsDataModule`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.view = nn.Parameter(torch.eye(2, 3))
        self.val_acc = MulticlassAccuracy(num_classes=_NUM_CLASSES, average="micro")
        self.test_acc = MulticlassAccuracy(num_classes=_NUM_CLASSES, average="micro")
        self._classifier: Any = None

    @override
    def setup(self, stage: str) -> None:
        """Show the classifier its examples, once."""
        if self._classifier is not None:
            return
        from sklearn.neighbors import KNeighborsClassifier

        # Its data loaders give upright images: the Trainer's hooks turn them.
        loader = self.trainer.datamodule.train_dataloader()  # type: ignore[attr-defined]
        images, labels = zip(*loader.dataset, strict=True)
        self._classifier = KNeighborsClassifier(_NEIGHBORS, weights="distance")
        self._classifier.fit(torch.stack(images).flatten(1).numpy(), torch.stack(labels).numpy())

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Return log-probabilities ``[N, 10]`` of images ``[N, 1, 8, 8]``."""
        seen = _viewed(images, self.view.detach()).flatten(1).cpu().numpy()
        probabilities = np.clip(self._classifier.predict_proba(seen), _LEAST_PROBABILITY, 1)
        return torch.as_tensor(np.log(probabilities), dtype=images.dtype, device=images.device)

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean negative log-likelihood of the batch."""
        images, labels = batch
        loss = functional.nll_loss(self(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    @override
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy."""
        images, labels = batch
        scores = self(images)
        self.val_acc(scores, labels)
        loss = functional.nll_loss(scores, labels)
        self.log("val_loss", loss, prog_bar=True, sync_dist=True)
        self.log("val_acc", self.val_acc, prog_bar=True)

    @override
    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the accuracy."""
        images, labels = batch
        self.test_acc(self(images), labels)
        self.log("test_acc", self.test_acc, prog_bar=True)


def _viewed(images: Tensor, view: Tensor) -> Tensor:
    """Return images ``[N, 1, 8, 8]`` seen through an affine map ``[2, 3]`` of the plane."""
    grid = functional.affine_grid(
        view.expand(len(images), 2, 3), list(images.shape), align_corners=False
    )
    return functional.grid_sample(images, grid, align_corners=False)
