"""Models, optimizers, loggers and fits for the tests of monitoring callbacks."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers.logger import Logger

PNG_SIGNATURE = b"\x89PNG"


class WatchedStats(dict[str, torch.Tensor]):
    """Remembers the steps on which the values were looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.read_at: set[int] = set()

    def items(self) -> Any:
        self.read_at.add(int(self["loss"]))
        return super().items()


class StatsSGD(torch.optim.SGD):
    """Stand-in for any optimizer that has ``stats``; the loss it reports is its step number."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.01)
        self.stats = WatchedStats()
        self.steps = 0

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self.steps += 1
        self.stats["loss"] = torch.tensor(float(self.steps), dtype=torch.float64)
        self.stats["lr"] = torch.tensor(0.01)
        self.stats["damping"] = torch.tensor(1e-3)
        self.stats["skipped_steps"] = torch.tensor(0)
        if self.steps > 1:  # not there before the first look at the new loss
            self.stats["reduction_ratio"] = torch.tensor(0.5)
        return loss


class Model(BoringModel):
    def __init__(self, optimizer: type[torch.optim.Optimizer] = StatsSGD) -> None:
        super().__init__()
        self.optimizer_class = optimizer

    def configure_optimizers(self) -> Any:
        return self.optimizer_class(self.parameters())


class TwoOptimizers(BoringModel):
    """Manual optimization: ``global_step`` grows by two per batch."""

    def __init__(self, *, plain_first: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.first = torch.optim.SGD if plain_first else StatsSGD

    def configure_optimizers(self) -> Any:
        return [self.first([self.layer.weight]), StatsSGD([self.layer.bias])], []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.step(batch))
            optimizer.step()


class RecordingLogger(Logger):
    """Keeps the rows with a key of ours."""

    def __init__(self, prefix: str = "curvature/") -> None:
        super().__init__()
        self.prefix = prefix
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "recording"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if any(key.startswith(self.prefix) for key in metrics):
            self.rows.append((step, dict(metrics)))

    @property
    def steps(self) -> list[int | None]:
        return [step for step, _ in self.rows]


def fit(
    root: Path, callback: Callback, model: LightningModule | None = None, **kwargs: Any
) -> Trainer:
    """Fit 8 batches of one example with a callback."""
    defaults: dict[str, Any] = {
        "max_epochs": 1,
        "limit_train_batches": 8,
        "limit_val_batches": 0,
        "log_every_n_steps": 1,
        "logger": False,
    }
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=root,
        callbacks=[callback, *kwargs.pop("callbacks", [])],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=kwargs.pop("enable_progress_bar", False),
        **{**defaults, **kwargs},
    )
    trainer.fit(model or Model())
    return trainer
