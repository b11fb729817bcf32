"""A network pruned to a tenth of its weights at once: by curvature, and by magnitude.

It learns the digits with AdamW. Then MFACPruning takes nine of ten weights away, before a single
step of training: those that the loss needs least, as predicted by the gradients of some batches,
and it lets the others make up for them. Removing the smallest weights instead costs much more.
Training goes on with what is left. The LightningModule knows nothing of any of this.
"""

import argparse
import copy

import lightning as L
import torch
from torch import Tensor, nn

from lightning_curvature import MFACPruning
from lightning_curvature.demos.digits import DigitsDataModule


class Classifier(L.LightningModule):
    """A small convolutional network."""

    def __init__(self) -> None:
        super().__init__()
        self.lr = 3e-3
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(512, 10),
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
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def trainer(callbacks: list[L.Callback], **limits: int) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **limits,
    )


def accuracy(model: Classifier, data: DigitsDataModule) -> float:
    """Return the accuracy on the test images."""
    return trainer([]).test(model, datamodule=data, verbose=False)[0]["accuracy"]


def main() -> None:
    """Train, prune in both ways, train on, print accuracies."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=15, help="of training the dense network")
    args = parser.parse_args()
    L.seed_everything(0, verbose=False)
    dense, data = Classifier(), DigitsDataModule(64)
    trainer([], max_epochs=args.epochs).fit(dense, datamodule=data)
    print(f"dense: accuracy {accuracy(dense, data):.3f}", flush=True)

    errors: dict[str, float] = {}
    for criterion in ("magnitude", "fisher"):
        model = copy.deepcopy(dense)
        pruning = MFACPruning(0.9, criterion=criterion, num_recomputations=8, plot=False, verbose=0)
        # It prunes before the first step; this one step is too short to matter.
        model.lr = 1e-6
        trainer([pruning], max_steps=1).fit(model, datamodule=data)
        errors[criterion] = 1 - accuracy(model, data)
        # The same callback keeps what is pruned at zero.
        model.lr = 1e-3
        trainer([pruning], max_epochs=2).fit(model, datamodule=data)
        weights = [m.weight for m in model.layers if hasattr(m, "weight")]
        zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
        after = 1 - accuracy(model, data)
        print(f"{criterion}: sparsity {zeros:.3f}, errors {errors[criterion]:.3f}")
        print(f"{criterion}: errors after two epochs of training {after:.3f}", flush=True)
    print(f"errors by fisher / by magnitude: {errors['fisher'] / errors['magnitude']:.3f}")


if __name__ == "__main__":
    main()
