"""Fits with `MFACPruning` that its tests share."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_curvature.callbacks import MFACPruning
from tests.helpers.modules import StockModule, mlp_module, vectors
from tests.helpers.probing import make_trainer
from tests.helpers.resuming import Interrupted


def momentum_sgd(params: Any) -> torch.optim.Optimizer:
    """Make an optimizer whose state would move pruned weights."""
    return torch.optim.SGD(params, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01)


def norm_module(make_optimizer: Any) -> LightningModule:
    """Build a module with batch norm, but without dropout, which a resumed run would redo."""
    network = nn.Sequential(
        nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)
    )
    return StockModule(network, make_optimizer)


def build(
    make: Callable[..., LightningModule] = mlp_module,
    optimizer: Callable[[Any], torch.optim.Optimizer] = momentum_sgd,
    **options: Any,
) -> LightningModule:
    """Build a module, with reproducible weights."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return make(optimizer, **options)


def pruning(sparsity: float | None = 0.5, **options: Any) -> MFACPruning:
    """Make a callback that is quick and quiet."""
    defaults: dict[str, Any] = {
        "num_grads": 6,
        "num_recomputations": 2,
        "damping": 1e-3,
        "plot": False,
        "verbose": 0,
    }
    return MFACPruning(sparsity, **{**defaults, **options})


def fit(
    module: LightningModule,
    *callbacks: Callback,
    data: Any = None,
    ckpt_path: Path | None = None,
    route: str = "auto",
    **settings: Any,
) -> Trainer:
    """Train for an epoch of five batches, perhaps until interrupted."""
    torch.manual_seed(3)
    trainer = make_trainer(route, callbacks=callbacks, **settings)
    data = DataLoader(vectors(20), batch_size=4) if data is None else data
    with contextlib.suppress(Interrupted):
        trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer


def zeros_of(module: nn.Module) -> dict[str, Tensor]:
    """Return where the weights are exactly 0, by ordinary name."""
    return {
        name.removesuffix("_orig"): p.detach() == 0
        for name, p in module.named_parameters()
        if p.ndim > 1
    }


class EveryBatch(Callback):
    """Notes something before every batch, and after the last."""

    def __init__(self, note: Callable[[Trainer], Any]) -> None:
        self.note = note
        self.notes: list[Any] = []

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        """Note."""
        self.notes.append(self.note(trainer))

    def on_train_epoch_end(self, trainer: Trainer, *args: Any) -> None:
        """Note."""
        self.notes.append(self.note(trainer))
