"""A LightningModule that knows nothing of curvature, trained with AdamW and then with AdamQLR.

The only difference is the optimizer; AdamW has its default learning rate, AdamQLR derives its own.
The Trainer has no special strategy and no callback: the package finds its optimizers in any
Trainer. (``strategy="single_device_curvature"`` would say the same in so many words.)
"""

import argparse
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_curvature import AdamQLR
from lightning_curvature.demos.digits import DigitsDataModule


class Classifier(L.LightningModule):
    """Batch norm, dropout, a metric and a scheduler, as in many a module."""

    def __init__(self, make_optimizer: Callable[[Any], torch.optim.Optimizer]) -> None:
        super().__init__()
        self.make_optimizer = make_optimizer
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, 128),
            nn.BatchNorm1d(128),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Linear(128, 10),
        )
        self.accuracy = MulticlassAccuracy(num_classes=10, average="micro")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.layers(x), y)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        self.accuracy(self.layers(x), y)
        self.log("val_accuracy", self.accuracy)

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def fit(make_optimizer: Callable[[Any], torch.optim.Optimizer], epochs: int) -> dict[str, float]:
    """Train and return what was logged last."""
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(make_optimizer), datamodule=DigitsDataModule(batch_size=256))
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


def main() -> None:
    """Train with both optimizers and print the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    epochs = parser.parse_args().epochs
    optimizers: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-3),
        "AdamQLR": AdamQLR,
    }
    for name, make_optimizer in optimizers.items():
        result = fit(make_optimizer, epochs)
        print(
            f"{name} loss {result['train_loss']:.4f} accuracy {result['val_accuracy']:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
