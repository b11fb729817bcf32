"""Fits in float64 that `LayerStatistics` watches."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_curvature import LayerStatistics
from tests.helpers.modules import CLASSES, StockModule, loader, vectors
from tests.helpers.probing import make_trainer

SGD = partial(torch.optim.SGD, lr=0.0)
ADAMW = partial(torch.optim.AdamW, lr=1e-2)


def watch(**kwargs: Any) -> LayerStatistics:
    """Return a callback that looks at every step and draws nothing."""
    return LayerStatistics(**{"every_n_steps": 1, "plot": False, "max_rows": 10_000, **kwargs})


def double_mlp(make_optimizer: Any = SGD) -> StockModule:
    """Return a small classifier in float64, the same one at every call."""
    torch.manual_seed(3)
    network = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, CLASSES)).double()
    return StockModule(network, make_optimizer, loss=double_loss)


def double_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy."""
    return F.cross_entropy(logits, targets)


class AsDouble(Callback):
    """Makes the inputs of every batch float64."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        """Change the batch in place."""
        batch[0] = batch[0].double()


def fit_double(
    statistics: LayerStatistics, module: LightningModule, data: Any = None, **kwargs: Any
) -> Trainer:
    """Fit 6 batches of 4, or other data, as float64."""
    callbacks = [AsDouble(), statistics, *kwargs.pop("callbacks", [])]
    trainer = make_trainer("none", callbacks=callbacks, **kwargs)
    trainer.fit(module, loader(vectors(24)) if data is None else data)
    return trainer
