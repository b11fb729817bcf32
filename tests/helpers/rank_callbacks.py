"""Callbacks that note what a fit does on a rank, in ``seen``, or change what the ranks exchange."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (
    bf16_compress_hook,
    fp16_compress_hook,
)
from torch.nn.parallel import DistributedDataParallel
from torchmetrics import Metric

from lightning_curvature import vectors
from tests.helpers.faults import random_streams

HOOKS = {"fp16_compress_hook": fp16_compress_hook, "bf16_compress_hook": bf16_compress_hook}


class Compressed(Callback):
    """Lets the ranks exchange gradients in half precision.

    Args:
        hook: One of `HOOKS`.
    """

    def __init__(self, hook: str) -> None:
        self.hook = hook

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Register the hook; Lightning does so on GPUs only."""
        model = trainer.strategy.model
        if isinstance(model, DistributedDataParallel):
            model.register_comm_hook(None, HOOKS[self.hook])


class Gradients(Callback):
    """Notes the largest norm and the largest entry of the gradients that the steps used."""

    def __init__(self) -> None:
        self.seen = {"norm": 0.0, "entry": 0.0}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Look at the gradients after a step; Lightning removes them before the next backward."""
        if trainer.fit_loop._should_accumulate():
            return
        grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
        entry = max(grad.abs().max().item() for grad in grads)
        self.seen["norm"] = max(self.seen["norm"], vectors.norm(grads).item())
        self.seen["entry"] = max(self.seen["entry"], entry)


class Trace(Callback):
    """Notes after every batch what an extra pass could have changed."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {"batches": []}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any
    ) -> None:
        """Note buffers, metrics, logged values and random streams."""
        self.seen["batches"].append(
            {
                "loss": outputs["loss"].detach().clone(),
                "logits": outputs["logits"].clone(),
                "buffers": {name: b.clone() for name, b in pl_module.named_buffers()},
                "metrics": {
                    name: {
                        **{key: torch.clone(state) for key, state in metric.metric_state.items()},
                        "count": metric.update_count,
                    }
                    for name, metric in pl_module.named_modules()
                    if isinstance(metric, Metric)
                },
                "logged": dict(trainer.logged_metrics),
                "random": random_streams(),
            }
        )


class Weights(Callback):
    """Notes the weights before the first and after every step."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {"weights": []}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note where the fit starts."""
        self._note(pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Note where the step led."""
        self._note(pl_module)

    def _note(self, module: LightningModule) -> None:
        flat = torch.cat([p.detach().flatten() for p in module.parameters()])
        self.seen["weights"].append(flat.clone())
