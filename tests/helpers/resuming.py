"""Runs that are interrupted and resumed, on one rank or several, and what they leave behind."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from lightning_curvature import DDPCurvatureStrategy
from tests.helpers.modules import StockModule, mlp_module, vectors
from tests.helpers.optimizer_db import Contract
from tests.helpers.probing import make_trainer
from tests.helpers.ranks import world
from tests.helpers.stateful_loader import StatefulLoader

# 20 rows in batches of 4.
BATCHES, EPOCHS = 5, 2
SAVERS = ("epoch", "steps", "callback")


class Interrupted(Exception):
    """The job was stopped."""


class Interruption(Callback):
    """Stops the run before a batch, as a time limit does.

    Args:
        batch: Number of the batch, from 0 over all epochs; None for never.
    """

    def __init__(self, batch: int | None) -> None:
        self.batch = batch
        self.started = 0

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        """Stop, or count."""
        if self.started == self.batch:
            raise Interrupted
        self.started += 1


class Save(Callback):
    """Saves after an optimizer step, as users do by hand.

    Args:
        path: File to write.
        step: Number of the step.
        batch: Save after this batch instead, from 1 over all epochs.
    """

    def __init__(self, path: Path, step: int = -1, batch: int = -1) -> None:
        self.path, self.step, self.batch = path, step, batch
        self.ended = 0
        self.done = False

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Save once."""
        self.ended += 1
        due = self.ended == self.batch or (self.batch < 0 and trainer.global_step == self.step)
        if due and not self.done:
            self.done = True
            trainer.save_checkpoint(self.path, weights_only=False)


class Witness(Callback):
    """Notes the losses, and the optimizer's state where it is saved and after it was loaded."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.rates: list[float] = []
        self.saved: Any = None
        self.restored: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what a checkpoint brought."""
        self.restored = copy.deepcopy(trainer.optimizers[0].state_dict())

    def on_save_checkpoint(self, trainer: Trainer, *args: Any) -> None:
        """Note what is saved."""
        self.saved = copy.deepcopy(trainer.optimizers[0].state_dict())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any
    ) -> None:
        """Note the loss."""
        self.losses.append(outputs["loss"].item())
        self.rates.append(float(trainer.optimizers[0].param_groups[0]["lr"]))


class Scheduled(StockModule):
    """The module with a scheduler that writes hyper-parameters of its own into the groups."""

    @staticmethod
    def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.OneCycleLR:
        """Make the scheduler."""
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=1.5, total_steps=2 * BATCHES * EPOCHS, cycle_momentum=False
        )

    def configure_optimizers(self) -> Any:
        """Make optimizer and scheduler."""
        optimizer = self.make_optimizer(self.parameters())
        schedule = {"scheduler": self.schedule(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}


@dataclass
class Run:
    """What a run left behind.

    Attributes:
        weights: The module's state.
        state: The optimizer's state.
        stats: The optimizer's last measurements.
        losses: Losses of the batches of this run.
        rates: Learning rates after them.
        steps: ``trainer.global_step``.
        plugin: State of the precision plugin.
        saved: The optimizer's state as it was last saved, None if it was not.
        restored: The optimizer's state before the first batch.
    """

    weights: dict[str, Tensor]
    state: dict[str, Any]
    stats: dict[str, Tensor]
    losses: list[float]
    rates: list[float]
    steps: int
    plugin: dict[str, Any]
    saved: Any
    restored: Any


def saver(kind: str, path: Path, steps: int) -> Callback:
    """Return the callback that saves.

    Args:
        kind: One of `SAVERS`.
        path: File to write.
        steps: Optimizer steps after which to save, if not after an epoch.
    """
    if kind == "callback":
        return Save(path, steps)
    when = {"every_n_epochs": 1} if kind == "epoch" else {"every_n_train_steps": steps}
    return ModelCheckpoint(path.parent, filename=path.stem, **when)


def tensors_in(state: Any) -> list[Tensor]:
    """List the tensors of a state."""
    if isinstance(state, Tensor):
        return [state]
    parts = state.values() if isinstance(state, dict) else state
    return (
        [t for part in parts for t in tensors_in(part)]
        if isinstance(state, (dict, list, tuple))
        else []
    )


def build(
    contract: Contract, options: dict[str, Any], seed: int = 1, scheduled: bool = False
) -> StockModule:
    """Build the module, with reproducible weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = mlp_module(contract.making(**options))
    return Scheduled(module.network, module.make_optimizer) if scheduled else module


def for_all_ranks(route: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that make a Trainer use all ranks; none if there is one."""
    ranks = world()[1]
    if ranks == 1:
        return {}
    if route != "strategy":
        return {"devices": ranks, "strategy": "ddp"}
    strategy = DDPCurvatureStrategy(directional=settings.get("directional", "auto"))
    return {"devices": ranks, "strategy": strategy}


def run(
    contract: Contract,
    options: dict[str, Any],
    *,
    route: str = "strategy",
    seed: int = 1,
    epochs: int = EPOCHS,
    stop_before: int | None = None,
    callbacks: Sequence[Callback] = (),
    scheduled: bool = False,
    scaled: bool = False,
    ckpt_path: Path | None = None,
    weights_only: bool | None = None,
    before_fit: Callable[[StockModule, Trainer], None] | None = None,
    batches: StatefulLoader | None = None,
    **settings: Any,
) -> Run:
    """Train, perhaps until interrupted.

    Args:
        contract: The optimizer.
        options: Its arguments.
        route: See `make_trainer`; on several ranks "strategy" and "callback" mean their strategies.
        seed: Seed of the first weights.
        epochs: Number of epochs, those before a resume included.
        stop_before: Batch that the run is interrupted before, None for none.
        callbacks: More callbacks.
        scheduled: Whether there is a learning-rate scheduler.
        scaled: Whether to train in float16 with a gradient scaler.
        ckpt_path: Checkpoint to resume from.
        weights_only: See ``Trainer.fit``.
        before_fit: Called before the fit.
        batches: The loader, None for a fresh one.
        **settings: Arguments of the Trainer.
    """
    settings.update(for_all_ranks(route, settings))
    if scaled:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
        settings["plugins"] = [MixedPrecision("16-mixed", device="cpu", scaler=scaler)]
    module = build(contract, options, seed, scheduled)
    if settings.get("precision") == "64-true":
        # Lightning loads weights before it converts the module, which would round them to float32.
        module.double()
    witness = Witness()
    trainer = make_trainer(
        route,
        callbacks=[witness, *callbacks, Interruption(stop_before)],
        max_epochs=epochs,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        **settings,
    )
    if before_fit is not None:
        before_fit(module, trainer)
    loader = StatefulLoader(vectors()) if batches is None else batches
    try:
        trainer.fit(module, loader, ckpt_path=ckpt_path, weights_only=weights_only)
    except Interrupted:
        assert stop_before is not None
    else:
        assert stop_before is None
    optimizer = trainer.optimizers[0]
    assert optimizer.oracle is None
    return Run(
        weights=copy.deepcopy(module.network.state_dict()),
        state=copy.deepcopy(optimizer.state_dict()),
        stats=dict(optimizer.stats),
        losses=witness.losses,
        rates=witness.rates,
        steps=trainer.global_step,
        plugin=trainer.precision_plugin.state_dict(),
        saved=witness.saved,
        restored=witness.restored,
    )
