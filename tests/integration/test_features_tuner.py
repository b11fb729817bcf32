"""Every optimizer beside what Lightning tunes: learning-rate finder and batch-size finder."""

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from torch import Tensor

from lightning_curvature import in_extra_pass
from lightning_curvature.oracle import MissingCapabilityError
from tests.helpers.families import every_family
from tests.helpers.faults import exact_maker
from tests.helpers.features import (
    BATCHES,
    EPOCHS,
    batched,
    learnable,
    noisy_module,
    plain,
    prepare,
    quiet,
)
from tests.helpers.modules import StockModule
from tests.helpers.optimizer_db import Contract
from tests.helpers.probing import assert_bitwise, parameters_and_buffers

pytestmark = quiet

FINDER = {"min_lr": 1e-3, "max_lr": 1.0, "num_training": 6}
FITS = 5
WITHOUT_THE_STRATEGY = r"\(Learning-rate finder runs drop callbacks: use the strategy\.\)$"


@pytest.fixture(autouse=True)
def no_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the garbage collection before every trial, which takes most of the time."""
    place = "lightning.pytorch.tuner.batch_size_scaling.garbage_collection_cuda"
    monkeypatch.setattr(place, lambda: None)


class Tunable(StockModule):
    """Has a learning rate and a batch size to find, and can run out of memory."""

    lr: float | None = None
    batch_size = 2
    limit = 10**9
    where = "main"
    error: type[RuntimeError] = RuntimeError
    rows: set[int]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss, unless the batch is too large."""
        rows = len(batch[0])
        if rows > self.limit and in_extra_pass() == (self.where == "extra"):
            raise self.error("CUDA out of memory. Tried to allocate 20.00 GiB.")
        if not in_extra_pass():
            self.rows.add(rows)
        return super().training_step(batch, batch_idx)

    def train_dataloader(self) -> Any:
        """Batch by the batch size."""
        return batched(learnable(80), self.batch_size)

    def configure_optimizers(self) -> Any:
        """Pass the learning rate on."""
        given = {} if self.lr is None else {"lr": self.lr}
        return self.make_optimizer(self.parameters(), **given)


def tunable(make_optimizer: Any) -> Tunable:
    """Build the module."""
    module = Tunable(noisy_module(make_optimizer).network, make_optimizer)
    module.rows = set()
    return module


def skip_without_lr(contract: Contract) -> None:
    """Skip optimizers that have no learning rate to find."""
    if not contract.takes("lr"):
        pytest.skip("has no lr")


@every_family
@pytest.mark.feature("Trainer features", "`Tuner.lr_find`, with the strategy")
def test_lr_find_with_the_strategy(contract: Contract) -> None:
    """It tries what it was told to, leaves no trace, and the fit afterwards is an ordinary one."""
    skip_without_lr(contract)
    run = prepare(contract, tunable)
    before = parameters_and_buffers(run.module)
    finder = Tuner(run.trainer).lr_find(run.module, batched(), **FINDER, update_attr=False)
    assert finder is not None
    tried = finder.results["lr"]
    assert len(tried) >= FINDER["num_training"] - 1
    assert tried == sorted(tried)
    assert len(set(finder.results["loss"])) > 1
    assert_bitwise(parameters_and_buffers(run.module), before)
    torch.manual_seed(11)
    run.trainer.fit(run.module, batched())
    assert run.steps == EPOCHS * BATCHES
    run.assert_learned()


@every_family
@pytest.mark.parametrize("route", ["callback", "auto"])
@pytest.mark.feature("Trainer features", "`Tuner.lr_find`, with the callback")
def test_lr_find_without_the_strategy(contract: Contract, route: str, refused: Any) -> None:
    skip_without_lr(contract)
    run = prepare(contract, tunable, route=route)
    tuner = Tuner(run.trainer)
    if not contract.info.asks:
        assert tuner.lr_find(run.module, batched(), **FINDER, update_attr=False) is not None
        return
    before = parameters_and_buffers(run.module)
    with pytest.raises(MissingCapabilityError, match=WITHOUT_THE_STRATEGY):
        tuner.lr_find(run.module, batched(), **FINDER, update_attr=False)
    for name, param in run.module.named_parameters():
        assert torch.equal(param, before[name])
    refused("Learning-rate finder runs drop callbacks: use the strategy.")


@every_family
@pytest.mark.feature("Callbacks", "`LearningRateFinder`, with the strategy")
def test_learning_rate_finder_in_a_fit(contract: Contract) -> None:
    """The rate that it found is the one that training goes on with."""
    skip_without_lr(contract)
    run = prepare(contract, tunable, callbacks=[LearningRateFinder(1e-2, 1.0, 20)])
    run.module.lr = 0.123
    run.trainer.fit(run.module, batched())
    assert run.module.lr != 0.123
    assert [group["lr"] for group in run.optimizer.param_groups] == [run.module.lr]
    assert run.steps == EPOCHS * BATCHES
    losses = run.watch.losses
    if contract.takes("max_lr"):  # others may be given a rate that is too high for them
        assert sum(losses[-BATCHES:]) < sum(losses[:BATCHES])
    assert all(p.isfinite().all() for p in run.module.parameters())


@every_family
@pytest.mark.parametrize(
    ("mode", "where", "error"),
    [
        ("power", "main", RuntimeError),
        ("power", "extra", torch.OutOfMemoryError),
        ("binsearch", "main", torch.OutOfMemoryError),
        ("binsearch", "extra", RuntimeError),
    ],
)
@pytest.mark.feature("Trainer features", "`Tuner.scale_batch_size`, out of memory anywhere")
def test_batch_size_until_memory_runs_out(
    contract: Contract, mode: str, where: str, error: type[RuntimeError]
) -> None:
    """The size that is found fits; nothing is left of the trials."""
    if where == "extra" and not contract.runs_again:
        pytest.skip("makes no extra pass")
    # In mixed precision the extra pass is one in forward mode, which may fail for other reasons.
    precision = "bf16-mixed" if error is RuntimeError else "32-true"
    run = prepare(contract, tunable, max_epochs=1, limit_train_batches=6, precision=precision)
    run.module.limit, run.module.where, run.module.error = FITS, where, error
    before = parameters_and_buffers(run.module)
    found = Tuner(run.trainer).scale_batch_size(run.module, mode=mode, init_val=2, max_trials=8)
    assert found == 4  # a power of two, or 5 less a margin
    assert_bitwise(parameters_and_buffers(run.module), before)
    assert run.optimizer.oracle is None
    run.module.rows.clear()
    run.trainer.fit(run.module)
    assert run.module.rows == {found}
    assert run.steps == 6
    assert all(p.isfinite().all() for p in run.module.parameters())


@every_family
@pytest.mark.parametrize("route", ["callback", "auto"])
@pytest.mark.feature("Trainer features", "`Tuner.scale_batch_size`, with the callback")
def test_batch_size_without_the_strategy(contract: Contract, route: str, refused: Any) -> None:
    run = prepare(contract, tunable, route=route, max_epochs=1, limit_train_batches=6)
    tuner = Tuner(run.trainer)
    if not contract.info.asks:
        assert tuner.scale_batch_size(run.module, max_trials=2) is not None
        return
    with pytest.raises(MissingCapabilityError, match="use the strategy"):
        tuner.scale_batch_size(run.module, max_trials=2)
    refused("Learning-rate finder runs drop callbacks: use the strategy.")


@every_family
@pytest.mark.feature("Callbacks", "`BatchSizeFinder`")
def test_batch_size_finder_in_a_fit(contract: Contract) -> None:
    """It runs inside the fit, which then goes on with the size that was found."""
    finder = BatchSizeFinder(mode="power", init_val=2, max_trials=8)
    run = prepare(contract, tunable, callbacks=[finder], max_epochs=2, limit_train_batches=6)
    run.module.limit, run.module.where = FITS, "extra" if contract.runs_again else "main"
    run.trainer.fit(run.module)
    assert run.module.batch_size == 4
    assert run.module.rows == {2, 4} | ({8} if contract.runs_again else set())
    assert run.steps == 12 == len(run.watch.losses)
    assert all(p.isfinite().all() for p in run.module.parameters())


@every_family
@pytest.mark.feature("Faults", "out of memory in an extra pass")
def test_running_out_of_memory_leaves_a_usable_optimizer(contract: Contract) -> None:
    """The error reaches the user as it was; parameters are as before, and training can go on."""
    if not contract.runs_again:
        pytest.skip("makes no extra pass")
    run = prepare(contract, tunable, make_optimizer=exact_maker(contract))
    run.module.limit, run.module.where = 0, "extra"
    before = {name: p.detach().clone() for name, p in run.module.named_parameters()}
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        run.trainer.fit(run.module, batched())
    assert_bitwise(dict(run.module.named_parameters()), before)
    assert not in_extra_pass()
    again = prepare(contract)
    again.module.load_state_dict(run.module.state_dict())
    again.trainer.fit(again.module, batched())
    again.assert_learned()
    assert plain(contract).steps == again.steps
