"""Every optimizer beside the arguments of the Trainer that touch training or loading."""

import itertools
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import TensorDataset

from tests.helpers.families import every_family
from tests.helpers.faults import exact_maker
from tests.helpers.features import (
    BATCH_SIZE,
    BATCHES,
    EPOCHS,
    Run,
    Validated,
    batched,
    learnable,
    noisy_module,
    plain,
    prepare,
    quiet,
    train,
)
from tests.helpers.optimizer_db import Contract
from tests.helpers.probing import ROUTES, assert_bitwise

pytestmark = quiet


def title(name: str) -> Any:
    """Name a row of the compatibility table."""
    return pytest.mark.feature("Trainer features", name)


def first_rows(batches: int) -> TensorDataset:
    """Return the data of the first batches only."""
    return TensorDataset(*(t[: batches * BATCH_SIZE] for t in learnable().tensors))


def case(name: str, **settings: Any) -> Any:
    """Name settings of the Trainer that must change nothing about the steps."""
    return pytest.param(settings, marks=title(name), id=name.replace(" ", "-"))


@pytest.mark.filterwarnings("ignore:You are trying to `self.log:UserWarning")  # barebones
@every_family
@pytest.mark.parametrize(
    "settings",
    [
        case("`detect_anomaly=True`", detect_anomaly=True),
        case("`profiler=\"simple\"` and `\"advanced\"`", profiler="simple"),
        case("`profiler=\"simple\"` and `\"advanced\"`", profiler="advanced"),
        case("`deterministic=True`", deterministic=True),
        case("`benchmark=True`", benchmark=True),
        case("`barebones=True`", barebones=True),
        case("progress bar and model summary", enable_progress_bar=True, enable_model_summary=True),
        case("`use_distributed_sampler=False`", use_distributed_sampler=False),
    ],
)  # fmt: skip
def test_settings_that_must_change_nothing(
    contract: Contract, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    if settings.get("barebones"):  # conflicts even with values it would choose itself
        unset = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        settings = {**settings, **dict.fromkeys((*unset, "num_sanity_val_steps"))}
        settings["log_every_n_steps"] = None
    run = train(contract, **settings)
    assert run.steps == EPOCHS * BATCHES
    assert_bitwise(run.tensors, plain(contract).tensors)


@every_family
@pytest.mark.parametrize(
    "settings",
    [
        case("validation after every epoch"),
        case("sanity check before training", num_sanity_val_steps=2),
        case("`val_check_interval`", val_check_interval=2),
        case("`check_val_every_n_epoch`", check_val_every_n_epoch=2),
        case("`inference_mode=False`", inference_mode=False),
        case("`limit_val_batches`", limit_val_batches=1),
    ],
)
def test_validation_changes_nothing(contract: Contract, settings: dict[str, Any]) -> None:
    run = train(contract, val=batched(first_rows(2)), **settings)
    assert "val_loss" in run.trainer.callback_metrics
    assert all(run.watch.training)
    assert_bitwise(run.tensors, plain(contract).tensors)


@every_family
@title("logger and `log_every_n_steps`")
def test_a_logger_changes_nothing(contract: Contract, tmp_path: Any) -> None:
    run = train(contract, logger=CSVLogger(tmp_path), log_every_n_steps=2)
    assert "train_loss" in next(tmp_path.rglob("metrics.csv")).read_text()
    assert_bitwise(run.tensors, plain(contract).tensors)


@every_family
@pytest.mark.parametrize(
    ("limit", "batches"),
    [
        pytest.param({"limit_train_batches": 3}, 3, marks=title("`limit_train_batches` (int)")),
        pytest.param({"limit_train_batches": 0.6}, 3, marks=title("`limit_train_batches` (float)")),
        pytest.param({"overfit_batches": 2}, 2, marks=title("`overfit_batches` (int)")),
        pytest.param({"overfit_batches": 0.4}, 2, marks=title("`overfit_batches` (float)")),
    ],
)
def test_a_part_of_the_data(contract: Contract, limit: dict[str, Any], batches: int) -> None:
    """The same steps as on a data set that has no more."""
    run = train(contract, **limit)
    assert run.steps == EPOCHS * batches
    assert_bitwise(run.tensors, train(contract, data=batched(first_rows(batches))).tensors)


@every_family
@pytest.mark.parametrize(
    ("limit", "steps"),
    [
        pytest.param({"fast_dev_run": True}, 1, marks=title("`fast_dev_run`")),
        pytest.param({"fast_dev_run": 4}, 4, marks=title("`fast_dev_run`")),
        pytest.param({"max_steps": 7}, 7, marks=title("`max_steps`")),
        pytest.param({"max_steps": 7, "max_epochs": -1}, 7, marks=title("`max_steps`")),
        pytest.param({"min_steps": 7, "max_epochs": 1}, 5, marks=title("`min_steps`")),
    ],
)
def test_training_that_ends_early(contract: Contract, limit: dict[str, Any], steps: int) -> None:
    run = train(contract, **limit)
    assert run.steps == steps == len(run.watch.losses)
    assert_bitwise(run.watch.weights[-1], plain(contract).watch.weights[steps - 1])
    assert run.optimizer.oracle is None


@every_family
@title("`max_time`")
def test_training_that_runs_out_of_time(contract: Contract) -> None:
    run = train(contract, max_time={"milliseconds": 1}, max_epochs=1000)
    assert run.steps < 1000
    expected = plain(contract).watch.weights[run.steps - 1]
    assert_bitwise(run.watch.weights[-1], expected)


class LoadsItself(Validated):
    """Makes its loaders itself, and counts them."""

    loaders = 0

    def train_dataloader(self) -> Any:
        """Return a loader of the usual data."""
        self.loaders += 1
        return batched()


@every_family
@title("`reload_dataloaders_every_n_epochs`")
def test_loaders_that_are_made_anew(contract: Contract) -> None:
    def make(make_optimizer: Any) -> LoadsItself:
        return LoadsItself(noisy_module(make_optimizer).network, make_optimizer)

    run = train(contract, make, data="module", reload_dataloaders_every_n_epochs=1)
    assert run.module.loaders == EPOCHS
    assert_bitwise(run.tensors, plain(contract).tensors)


class TwoLoaders(Validated):
    """Adds the losses of one batch of each of two loaders."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Return the sum of both losses; either may have run out."""
        if not isinstance(batch, dict):  # sequential loaders give one batch at a time
            return super().training_step(batch, batch_idx)
        parts = [self.loss(self(x), y) for x, y in filter(None, batch.values())]
        return torch.stack(parts).mean()


@every_family
@pytest.mark.parametrize(
    ("mode", "batches"),
    [("min_size", 2), ("max_size_cycle", 5), ("max_size", 5), ("sequential", 7)],
)
@title("several loaders (`CombinedLoader`, all modes)")
def test_several_loaders(contract: Contract, mode: str, batches: int) -> None:
    def make(make_optimizer: Any) -> TwoLoaders:
        return TwoLoaders(noisy_module(make_optimizer).network, make_optimizer)

    loaders = {"all": batched(), "few": batched(first_rows(2))}
    if mode == "sequential":
        both: Any = _Sequential(loaders)
    else:
        both = CombinedLoader(loaders, mode)
    run = train(contract, make, data=both)
    assert run.steps == EPOCHS * batches
    run.assert_learned(per_epoch=batches)


class _Sequential:
    """Batches of one loader after the other, as an iterable without a length."""

    def __init__(self, loaders: dict[str, Any]) -> None:
        self.loaders = loaders

    def __iter__(self) -> Any:
        return itertools.chain(*self.loaders.values())


@every_family
@pytest.mark.parametrize("route", ROUTES)
@title("`trainer.fit` twice")
def test_fit_twice(contract: Contract, route: str) -> None:
    """Lightning makes a new optimizer for the second one; weights go on from where they were."""
    run = prepare(contract, route=route, max_epochs=2)
    run.trainer.fit(run.module, batched())
    first = run.optimizer
    run.trainer.fit_loop.max_epochs = 4
    run.trainer.fit(run.module, batched())
    assert run.optimizer is not first
    assert (first._steps_done, run.optimizer._steps_done) == (2 * BATCHES, 2 * BATCHES)
    assert first.oracle is run.optimizer.oracle is None
    assert_bitwise(run.watch.weights[2 * BATCHES - 1], plain(contract).watch.weights[9])
    run.assert_learned()


@every_family
@title("`validate`, `test`, `predict` after `fit`")
def test_evaluation_after_the_fit(contract: Contract) -> None:
    run = train(contract)
    before = run.tensors
    assert run.trainer.validate(run.module, batched(), verbose=False)[0]["val_loss"] > 0
    assert run.trainer.test(run.module, batched(), verbose=False)[0]["test_loss"] > 0
    predictions = run.trainer.predict(run.module, batched())
    assert len(predictions) == BATCHES
    assert_bitwise(run.tensors, before)
    assert run.optimizer.oracle is None


@every_family
@title("`validate` before `fit`")
def test_evaluation_before_the_fit(contract: Contract) -> None:
    run = prepare(contract)
    run.trainer.validate(run.module, batched(), verbose=False)
    run.trainer.fit(run.module, batched())
    assert_bitwise(run.tensors, plain(contract).tensors)


class LongSteps(Validated):
    """Has the hooks that surround a step, and changes the gradient in one."""

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Count."""
        self.hooks = getattr(self, "hooks", 0) + 1

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Count and step, as warm-up schedules do it."""
        self.overridden = getattr(self, "overridden", 0) + 1
        super().optimizer_step(*args, **kwargs)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        """Zero the gradients in place."""
        optimizer.zero_grad(set_to_none=False)


@every_family
@title("overridden `optimizer_step` and `optimizer_zero_grad`")
def test_overridden_hooks(contract: Contract) -> None:
    def make(make_optimizer: Any) -> LightningModule:
        return LongSteps(noisy_module(make_optimizer).network, make_optimizer)

    run: Run = train(contract, make)
    assert run.module.hooks == run.module.overridden == run.steps == EPOCHS * BATCHES
    assert_bitwise(run.tensors, plain(contract).tensors)


@every_family
@pytest.mark.parametrize("route", ROUTES)
@title("learning-rate scheduler, per epoch")
def test_a_schedule_per_epoch(contract: Contract, route: str) -> None:
    """An ordinary scheduler is an envelope of the step: zero means stand still."""
    if not contract.takes("lr"):
        pytest.skip("has no lr")

    class Scheduled(Validated):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: float(epoch < 1))
            return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def make(make_optimizer: Any) -> Scheduled:
        return Scheduled(noisy_module(make_optimizer).network, make_optimizer)

    make_optimizer = exact_maker(contract)
    run = train(contract, make, route=route, make_optimizer=make_optimizer)
    weights = run.watch.weights
    unscheduled = train(contract, make_optimizer=make_optimizer, max_epochs=1)
    assert_bitwise(weights[BATCHES - 1], unscheduled.watch.weights[-1])
    assert_bitwise(weights[-1], weights[BATCHES - 1])
