"""Short fits that show whether an optimizer gets along with a feature of Lightning or torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_curvature import CurvatureOptimizer
from tests.helpers.modules import CLASSES, MakeOptimizer, StockModule
from tests.helpers.optimizer_db import Contract
from tests.helpers.probing import make_trainer, parameters_and_buffers

EPOCHS, BATCHES, BATCH_SIZE = 3, 5, 8
SEED = 11

# The module validates only where a test has something to validate on.
quiet = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no:UserWarning")

MakeModule = Callable[[MakeOptimizer], LightningModule]


def learnable(rows: int = BATCHES * BATCH_SIZE, seed: int = 34) -> TensorDataset:
    """Draw vectors whose labels a linear map explains, shapes ``[rows, 5]`` and ``[rows]``."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 5, generator=generator)
    teacher = torch.randn(5, CLASSES, generator=generator)
    return TensorDataset(x, (x @ teacher).argmax(dim=1))


def batched(data: TensorDataset | None = None, batch_size: int = BATCH_SIZE) -> DataLoader[Any]:
    """Batch a data set, by default the learnable one, always in the same order."""
    return DataLoader(
        learnable() if data is None else data,
        batch_size=batch_size,
        generator=torch.Generator(),  # a loader draws a number per epoch, here not from dropout's
    )


class Validated(StockModule):
    """Also validates, tests and predicts, and logs in all of them."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return and log the loss."""
        loss: Tensor = super().training_step(batch, batch_idx)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the loss."""
        x, y = batch
        self.log("val_loss", self.loss(self(x), y))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log the loss."""
        x, y = batch
        self.log("test_loss", self.loss(self(x), y))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return logits."""
        return self(batch[0])


def noisy_module(make_optimizer: MakeOptimizer) -> Validated:
    """Build a module with batch norm and dropout, on which every trace of an extra pass shows."""
    network = nn.Sequential(
        nn.Linear(5, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Dropout(0.1), nn.Linear(12, CLASSES)
    )
    return Validated(network, make_optimizer)


class Watch(Callback):
    """Collects losses, and weights after every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.weights: list[dict[str, Tensor]] = []
        self.training: list[bool] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any
    ) -> None:
        """Note loss and weights."""
        if outputs is not None and outputs.get("loss") is not None:
            self.losses.append(float(outputs["loss"]))
        self.weights.append({n: p.detach().clone() for n, p in pl_module.named_parameters()})
        self.training.append(pl_module.training)


@dataclass
class Run:
    """A fit.

    Attributes:
        module: The module.
        trainer: Its Trainer.
        watch: What was seen on the way.
    """

    module: Any
    trainer: Trainer
    watch: Watch = field(default_factory=Watch)

    @property
    def optimizer(self) -> CurvatureOptimizer:
        """The optimizer, without Lightning's wrapper."""
        return self.trainer.optimizers[0]

    @property
    def steps(self) -> int:
        """Steps that the optimizer has taken, which must be those that Lightning counts."""
        assert self.optimizer._steps_done == self.trainer.global_step
        return self.trainer.global_step

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers at the end."""
        return parameters_and_buffers(self.module)

    def assert_learned(self, factor: float = 0.9, per_epoch: int = BATCHES) -> None:
        """Assert that the mean loss of the last epoch is well below that of the first."""
        losses = self.watch.losses
        first, last = sum(losses[:per_epoch]), sum(losses[-per_epoch:])
        assert last < factor * first, losses
        assert all(t.isfinite().all() for t in self.tensors.values())


def prepare(
    contract: Contract,
    make_module: MakeModule = noisy_module,
    *,
    route: str = "strategy",
    callbacks: Sequence[Callback] = (),
    make_optimizer: MakeOptimizer | None = None,
    **settings: Any,
) -> Run:
    """Build module and Trainer; the same module every time."""
    seed_everything(SEED)
    watch = Watch()
    module = make_module(make_optimizer or contract.make)
    settings = {"max_epochs": EPOCHS, **settings}
    trainer = make_trainer(route, callbacks=[*callbacks, watch], **settings)
    return Run(module, trainer, watch)


def train(contract: Contract, *args: Any, data: Any = None, val: Any = None, **kwargs: Any) -> Run:
    """Fit what `prepare` builds.

    Args:
        contract: The optimizer.
        *args: Further arguments of `prepare`.
        data: Loader, by default that of `batched`; "module" if the module has one.
        val: Loader for validation.
        **kwargs: Further arguments of `prepare`.
    """
    run = prepare(contract, *args, **kwargs)
    loader = batched() if data is None else data
    run.trainer.fit(run.module, None if data == "module" else loader, val)
    return run


_plain: dict[str, Run] = {}


def plain(contract: Contract) -> Run:
    """Return the fit without any feature, computed once per optimizer."""
    name = contract.info.name
    if name not in _plain:
        _plain[name] = train(contract)
        _plain[name].assert_learned()
        assert _plain[name].steps == EPOCHS * BATCHES
    return _plain[name]
