"""AdamQLR in two processes on the CPU, and what that has in common with one process.

Three runs on the same digits: one process, two processes with ``strategy="ddp_curvature"``, and two
processes with the stock ``ddp`` strategy and a `CurvatureCallback`. Each process takes its share of
every batch, so the steps are the same and the weights agree but for rounding. The processes
themselves agree in every bit: they share the averages that the step length is made of. The module
is an ordinary one; it has no dropout and no batch norm, which draw and count per process.
"""

import argparse
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from lightning_curvature import AdamQLR, CurvatureCallback

BATCH = 256  # over all processes


def digits() -> TensorDataset:
    """Load and shuffle 1797 handwritten digits of 8 x 8 pixels, which ship inside scikit-learn."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return TensorDataset(torch.from_numpy(pixels / 16.0)[order], torch.from_numpy(labels)[order])


class Classifier(L.LightningModule):
    """Knows nothing of processes but how to share its data."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.layers(x), y)
        self.log("train_loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return AdamQLR(self.parameters())

    def train_dataloader(self) -> DataLoader[Any]:
        # Every second row, so that the processes together see the batches of one. Lightning's own
        # sampler would share the data too, in another order.
        ranks, rank = self.trainer.world_size, self.trainer.global_rank
        data = digits()
        sampler = DistributedSampler(data, ranks, rank, shuffle=False, drop_last=True)
        return DataLoader(data, BATCH // ranks, sampler=sampler, drop_last=True)


def fit(epochs: int, **settings: Any) -> tuple[float, Tensor]:
    """Train and return the last loss and the weights of all processes, one row each."""
    L.seed_everything(0, verbose=False)
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = L.Trainer(
        accelerator="cpu",
        precision="64-true",  # rounding would look like a difference
        max_epochs=epochs,
        use_distributed_sampler=False,
        **dict.fromkeys(quiet, False),
        **settings,
    )
    module = Classifier()
    trainer.fit(module)
    weights = nn.utils.parameters_to_vector(module.parameters()).detach()
    gathered = trainer.strategy.all_gather(weights).reshape(-1, len(weights))
    return trainer.callback_metrics["train_loss"].item(), gathered


def main() -> None:
    """Train three times and compare. Lightning starts this file again for the second process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the processes share the cores
    loss, alone = fit(arguments.epochs, devices=1, strategy="single_device_curvature")
    lines = [f"one process: loss {loss:.6f}"]
    for strategy, callbacks in (("ddp_curvature", []), ("ddp", [CurvatureCallback()])):
        several = {"devices": arguments.processes, "strategy": strategy, "callbacks": callbacks}
        loss, weights = fit(arguments.epochs, **several)
        between, to_one = ((weights - row).abs().max() for row in (weights[0], alone[0]))
        lines.append(
            f"{strategy}: loss {loss:.6f}, weights differ between the processes by {between:.0e}, "
            f"from those of one process by {to_one:.0e}"
        )
    if torch.distributed.get_rank() == 0:
        print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
