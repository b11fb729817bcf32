"""Every optimizer beside the callbacks of Lightning that watch, stop or steer training."""

import csv
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import lightning.pytorch.callbacks as lightning_callbacks
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    Callback,
    DeviceStatsMonitor,
    EarlyStopping,
    LambdaCallback,
    LearningRateMonitor,
    ModelPruning,
    ModelSummary,
    SpikeDetection,
    ThroughputMonitor,
    Timer,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_curvature import CurvatureMonitor, LayerStatistics
from tests.helpers.families import every_family
from tests.helpers.features import (
    BATCH_SIZE,
    BATCHES,
    EPOCHS,
    Validated,
    batched,
    noisy_module,
    plain,
    prepare,
    quiet,
    train,
)
from tests.helpers.modules import StockModule
from tests.helpers.optimizer_db import Contract
from tests.helpers.probing import assert_bitwise

pytestmark = quiet

# Callbacks of Lightning with tests of their own, in this folder.
ELSEWHERE = {
    "BatchSizeFinder", "LearningRateFinder",  # test_features_tuner.py
    "ModelCheckpoint", "OnExceptionCheckpoint",  # test_features_checkpoints.py
    "GradientAccumulationScheduler",  # test_features_gradients.py
    "StochasticWeightAveraging", "WeightAveraging", "EMAWeightAveraging",  # ..._averaging.py
}  # fmt: skip
# Bases without a behavior of their own, callbacks that never run in training, and two that need
# another package and only print.
NOTHING_TO_SHOW = {
    "BaseFinetuning", "Callback", "Checkpoint", "ProgressBar", "BasePredictionWriter",
    "RichModelSummary", "RichProgressBar",
}  # fmt: skip


def title(name: str) -> Any:
    """Name a row of the compatibility table."""
    return pytest.mark.feature("Callbacks", name)


def test_no_callback_of_lightning_is_forgotten() -> None:
    here = {name for name in globals() if name in lightning_callbacks.__all__}
    assert set(lightning_callbacks.__all__) <= here | ELSEWHERE | NOTHING_TO_SHOW


# Callbacks that only watch

WATCHING = {
    "LearningRateMonitor": lambda: LearningRateMonitor("step"),
    "DeviceStatsMonitor": lambda: DeviceStatsMonitor(cpu_stats=False),
    "ModelSummary": lambda: ModelSummary(max_depth=2),
    "TQDMProgressBar": lambda: TQDMProgressBar(refresh_rate=2),
    "ThroughputMonitor": lambda: ThroughputMonitor(lambda batch: len(batch[0]), window_size=2),
    "CurvatureMonitor": CurvatureMonitor,
    "LayerStatistics": lambda: LayerStatistics(2, plot=False),
    "Timer": lambda: Timer(duration=timedelta(hours=1)),
    "SpikeDetection": lambda: SpikeDetection(atol=1e6),
}
NEEDS_PROGRESS_BAR = ("TQDMProgressBar",)
NEEDS_SUMMARY = ("ModelSummary",)


@every_family
@pytest.mark.filterwarnings("ignore:When using the `ThroughputMonitor`:UserWarning")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=title(f"`{name}`")) for name in WATCHING]
)
def test_watching_changes_nothing(contract: Contract, name: str, tmp_path: Any) -> None:
    if name == "CurvatureMonitor" and not contract.info.asks:
        pytest.skip("has nothing to watch")
    told = (
        pytest.warns(UserWarning, match="LayerStatistics has nothing to show")
        if name == "LayerStatistics" and contract.forward_only
        else nullcontext()
    )
    with told:
        run = train(
            contract,
            callbacks=[WATCHING[name]()],
            logger=CSVLogger(tmp_path),
            enable_progress_bar=name in NEEDS_PROGRESS_BAR,
            enable_model_summary=name in NEEDS_SUMMARY,
        )
    assert_bitwise(run.tensors, plain(contract).tensors)


@every_family
@title("`LearningRateMonitor`")
def test_the_logged_rate_is_that_of_the_group(contract: Contract, tmp_path: Any) -> None:
    """Of the groups: what a scheduler changes. The derived step length is CurvatureMonitor's."""
    run = train(contract, callbacks=[LearningRateMonitor("step")], logger=CSVLogger(tmp_path))
    with next(tmp_path.rglob("metrics.csv")).open() as file:
        rows = list(csv.DictReader(file))
    logged = {float(row[key]) for row in rows for key in row if key.startswith("lr-") and row[key]}
    assert logged == {run.optimizer.param_groups[0]["lr"]}


@every_family
@title("`LambdaCallback`")
def test_every_hook_is_called_once_per_batch(contract: Contract) -> None:
    """Extra passes call no hook."""
    hooks = [
        "on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward",
        "on_before_optimizer_step", "on_train_batch_end",
    ]  # fmt: skip
    counts = dict.fromkeys(hooks, 0)

    def counting(name: str) -> Any:
        def count(*args: Any, **kwargs: Any) -> None:
            counts[name] += 1

        return count

    run = train(contract, callbacks=[LambdaCallback(**{name: counting(name) for name in hooks})])
    assert counts == dict.fromkeys(hooks, EPOCHS * BATCHES)
    assert_bitwise(run.tensors, plain(contract).tensors)


# Callbacks that stop training


@every_family
@title("`EarlyStopping`")
def test_early_stopping(contract: Contract) -> None:
    """The loss cannot fall by so much, so it stops when its patience is over."""
    stopping = EarlyStopping(
        "train_loss", min_delta=100.0, patience=2, check_on_train_epoch_end=True
    )
    run = train(contract, callbacks=[stopping], max_epochs=9)
    assert run.steps == 3 * BATCHES
    assert_bitwise(run.tensors, plain(contract).tensors)


@every_family
@title("`EarlyStopping`")
def test_early_stopping_in_the_middle_of_an_epoch(contract: Contract) -> None:
    """By a validation after every second batch."""
    stopping = EarlyStopping("val_loss", min_delta=100.0, patience=2)
    run = train(contract, callbacks=[stopping], val=batched(), val_check_interval=2, max_epochs=9)
    assert run.steps == 7
    assert_bitwise(run.watch.weights[-1], plain(contract).watch.weights[6])


@every_family
@title("`Timer`")
def test_the_timer_stops_training(contract: Contract) -> None:
    run = train(contract, callbacks=[Timer(timedelta(milliseconds=1), "step")], max_epochs=1000)
    assert run.steps < 1000
    assert_bitwise(run.watch.weights[-1], plain(contract).watch.weights[run.steps - 1])


@every_family
@title("`SpikeDetection`")
def test_a_spike_ends_training(contract: Contract, tmp_path: Any) -> None:
    """A batch with a huge loss; what was attached is removed although the fit ends by an error."""

    class Spiky(Validated):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss * 1e4 if self.trainer.global_step == 8 else loss

    def make(make_optimizer: Any) -> Spiky:
        return Spiky(noisy_module(make_optimizer).network, make_optimizer)

    class Remember(Callback):
        def on_exception(self, trainer: Trainer, *args: Any) -> None:
            optimizers.extend(trainer.optimizers)

    optimizers: list[Any] = []
    detection = SpikeDetection(rtol=20.0, exclude_batches_path=tmp_path)
    with pytest.raises(RuntimeError, match="spike"):
        train(contract, make, callbacks=[Remember(), detection])
    assert optimizers[0]._steps_done == 9
    assert optimizers[0].oracle is None
    assert detection.bad_batches == [2, 3]


# Callbacks that change the module


class Staged(StockModule):
    """Has a backbone that is frozen at first."""

    def __init__(self, make_optimizer: Any) -> None:
        super().__init__(nn.Linear(12, 4), make_optimizer)
        self.backbone = nn.Sequential(nn.Linear(5, 12), nn.LayerNorm(12), nn.Tanh())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        return self.network(self.backbone(x))

    def configure_optimizers(self) -> Any:
        """Optimize what is not frozen, as Lightning documents it."""
        return self.make_optimizer(filter(lambda p: p.requires_grad, self.parameters()))


@every_family
@pytest.mark.parametrize("directional", ["fd", "jvp"])
@title("`BackboneFinetuning` (a parameter group during training)")
def test_backbone_finetuning(contract: Contract, directional: str) -> None:
    """The group that is added in the second epoch takes part from then on."""
    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_ratio_lr=0.5)
    run = train(contract, Staged, callbacks=[finetuning], directional=directional, max_epochs=4)
    start, first, last = (run.watch.weights[i] for i in (0, BATCHES - 1, -1))
    frozen = [name for name in start if name.startswith("backbone.0")]
    assert frozen
    assert all(torch.equal(start[name], first[name]) for name in frozen)
    assert not any(torch.equal(first[name], last[name]) for name in frozen)
    assert len(run.optimizer.param_groups) == 2
    rates = [group["lr"] for group in run.optimizer.param_groups]
    assert 0 < rates[1] <= rates[0]
    assert run.steps == 4 * BATCHES
    run.assert_learned()


@every_family
@pytest.mark.parametrize("epochs", [1, 2])
@title("`BackboneFinetuning` (a parameter group during training)")
def test_backbone_finetuning_resumes(contract: Contract, epochs: int, tmp_path: Any) -> None:
    """The callback puts the groups back itself before the optimizer's state is loaded.

    Once the backbone is free, Lightning resumes with a frozen one (also with torch's optimizers).
    """

    def options() -> dict[str, Any]:
        return {"callbacks": [BackboneFinetuning(unfreeze_backbone_at_epoch=1)]}

    half = train(contract, Staged, **options(), max_epochs=epochs)
    half.trainer.save_checkpoint(tmp_path / "half.ckpt")
    rest = prepare(contract, Staged, **options(), max_epochs=4)
    rest.trainer.fit(rest.module, batched(), ckpt_path=tmp_path / "half.ckpt")
    assert rest.steps == 4 * BATCHES
    assert len(rest.optimizer.param_groups) == 2
    if epochs == 1:
        assert_bitwise(rest.tensors, train(contract, Staged, **options(), max_epochs=4).tensors)
    assert sum(rest.watch.losses[-BATCHES:]) < sum(half.watch.losses[:BATCHES])


@every_family
@pytest.mark.parametrize("directional", ["fd", "jvp"])
@title("`ModelPruning` (masked parameters)")
def test_pruning(contract: Contract, directional: str) -> None:
    """A mask appears after every epoch; what it hides stays hidden, and the rest goes on."""
    pruned: list[float] = []

    class Share(Callback):
        def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
            pruned.append(float((module.network[0].weight == 0).float().mean()))

    pruning = ModelPruning(
        "l1_unstructured",
        parameter_names=["weight"],
        amount=lambda epoch: 0.3,
        use_lottery_ticket_hypothesis=False,
        make_pruning_permanent=False,
    )

    def make(make_optimizer: Any) -> StockModule:
        network = nn.Sequential(nn.Linear(5, BATCH_SIZE), nn.Tanh(), nn.Linear(BATCH_SIZE, 4))
        return StockModule(network, make_optimizer)

    run = train(contract, make, callbacks=[pruning, Share()], directional=directional)
    assert pruned[0] == 0 < pruned[BATCHES] < pruned[-1]
    assert run.steps == EPOCHS * BATCHES
    run.assert_learned(0.97)
