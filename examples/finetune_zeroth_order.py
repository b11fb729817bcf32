"""A network fine-tuned with forward passes only: MeZO in a stock LightningModule.

It learns the digits with AdamW. Then they come shifted by one pixel, and MeZO teaches it those: no
backward, no gradients, no state, the memory of evaluation. Only the optimizer differs. Such a step
learns much less than one with a gradient, so there are many, with large batches and several
directions each; it works because the network knows most of the task already.
"""

import argparse
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lightning_curvature import MeZO
from lightning_curvature.demos.digits import DigitsDataModule


class ShiftedDigits(DigitsDataModule):
    """The digits one pixel to the right."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        x, y = batch
        return x.roll(1, dims=-1), y


class Classifier(L.LightningModule):
    """Knows nothing of what its optimizer asks."""

    def __init__(self) -> None:
        super().__init__()
        self.make_optimizer: Callable[[Any], torch.optim.Optimizer] = torch.optim.AdamW
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 10)
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.layers(x), y)
        self.log("train_loss", loss)
        return loss

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("accuracy", (self.layers(x).argmax(1) == y).float().mean(), batch_size=len(y))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self.parameters())


def trainer(epochs: int = 1) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def accuracy(model: Classifier, data: DigitsDataModule) -> float:
    """Return the accuracy on the test images."""
    return trainer().test(model, datamodule=data, verbose=False)[0]["accuracy"]


def main() -> None:
    """Pretrain with AdamW, fine-tune with MeZO, print accuracies."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=100, help="of fine-tuning")
    parser.add_argument("--lr", type=float, default=3e-2)
    args = parser.parse_args()
    L.seed_everything(0, verbose=False)
    model, digits, shifted = Classifier(), DigitsDataModule(64), ShiftedDigits(256)

    model.make_optimizer = lambda params: torch.optim.AdamW(params, lr=1e-2)
    trainer(epochs=10).fit(model, datamodule=digits)
    before, own = accuracy(model, shifted), accuracy(model, digits)
    print(f"pretrained: accuracy {own:.3f}, on shifted digits {before:.3f}", flush=True)

    model.make_optimizer = lambda params: MeZO(params, lr=args.lr, num_samples=4)
    trainer(args.epochs).fit(model, datamodule=shifted)
    after = accuracy(model, shifted)
    assert all(p.grad is None for p in model.parameters())
    print(f"after MeZO: accuracy on shifted digits {after:.3f}")
    print(f"errors on shifted digits after / before: {(1 - after) / (1 - before):.3f}")


if __name__ == "__main__":
    main()
