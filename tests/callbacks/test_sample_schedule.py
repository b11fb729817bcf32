"""Tests of lightning_curvature/callbacks/sample_schedule.py."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, IterableDataset

from lightning_curvature import MeZO, SampleSchedule, SophiaG, ZOConservative
from lightning_curvature.curvature.query_schedule import adazeta_num_samples
from tests.helpers.modules import mlp_module, vectors
from tests.helpers.probing import make_trainer
from tests.helpers.resuming import Save
from tests.helpers.stateful_loader import StatefulLoader

pytestmark = pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`, callbacks used to create:UserWarning"
)

# 20 rows in batches of 4.
BATCHES = 5


class Numbers(Callback):
    """Notes the number of directions of every step, from what the step concluded."""

    def __init__(self) -> None:
        self.values: list[int] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen."""
        trainer.optimizers[0].on_answer = lambda answer: self.values.append(len(answer))


def fit(
    schedule: Callback,
    *callbacks: Callback,
    make: Callable[..., Any] = lambda params: MeZO(params, lr=1e-3),
    ckpt_path: Path | None = None,
    **settings: Any,
) -> tuple[list[int], Trainer]:
    """Train; return the number of directions of every step."""
    numbers = Numbers()
    trainer = make_trainer("strategy", callbacks=[schedule, numbers, *callbacks], **settings)
    trainer.fit(mlp_module(make), StatefulLoader(vectors()), ckpt_path=ckpt_path)
    return numbers.values, trainer


def test_adazeta_changes_with_the_epoch() -> None:
    numbers, trainer = fit(SampleSchedule("adazeta", nominal=6, largest=4), max_epochs=4)
    expected = [adazeta_num_samples(epoch, 4, nominal=6, largest=4) for epoch in range(4)]
    assert expected == [1, 1, 2, 3]
    assert numbers == [number for number in expected for _ in range(BATCHES)]
    assert trainer.optimizers[0].param_groups[0]["num_samples"] == 3


def test_linear_changes_with_the_step() -> None:
    numbers, _ = fit(SampleSchedule("linear", largest=5), max_epochs=2)
    assert numbers == [1, 1, 1, 1, 2, 2, 3, 3, 4, 4]
    numbers, _ = fit(SampleSchedule("linear", largest=3, horizon=6))
    assert numbers == [1, 1, 1, 1, 2]


def test_linear_counts_optimizer_steps_and_takes_the_largest_from_the_optimizer() -> None:
    def make(params: Any) -> MeZO:
        return MeZO(params, lr=1e-3, num_samples=3)

    numbers, _ = fit(SampleSchedule("linear"), make=make, max_epochs=2, accumulate_grad_batches=2)
    assert numbers == [1, 1, 1, 1, 2, 2]


def test_function() -> None:
    numbers, _ = fit(SampleSchedule(lambda step: 1 + step % 2))
    assert numbers == [1, 2, 1, 2, 1]


def test_all_groups_get_it() -> None:
    def make(params: Any) -> MeZO:
        first, *rest = params
        return MeZO([{"params": [first]}, {"params": rest}], lr=1e-3)

    _, trainer = fit(SampleSchedule(lambda step: 2), make=make)
    assert [group["num_samples"] for group in trainer.optimizers[0].param_groups] == [2, 2]


@pytest.mark.parametrize("shape", ["adazeta", "linear"])
def test_resume(shape: Any, tmp_path: Path) -> None:
    def schedule() -> SampleSchedule:
        return SampleSchedule(shape, largest=4)

    def make(params: Any) -> MeZO:
        return MeZO(params, lr=1e-3, num_samples=4)

    whole, _ = fit(schedule(), make=make, max_epochs=3)
    path = tmp_path / "some.ckpt"
    fit(schedule(), Save(path, 7), make=make, max_epochs=3)
    rest, _ = fit(schedule(), make=make, max_epochs=3, ckpt_path=path)
    assert rest == whole[7:]


def test_it_lets_go_after_fit() -> None:
    schedule = SampleSchedule(lambda step: 2)
    _, trainer = fit(schedule)
    (optimizer,) = trainer.optimizers
    optimizer.param_groups[0]["num_samples"] = 5
    assert not optimizer._optimizer_step_pre_hooks
    assert "_hooks" in vars(pickle.loads(pickle.dumps(SampleSchedule("linear"))))


def test_it_lets_go_after_an_exception() -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            self.optimizer = trainer.optimizers[0]
            raise OSError("no room")

    stop = Stop()
    with pytest.raises(OSError, match="no room"):
        fit(SampleSchedule(lambda step: 2), stop)
    assert not stop.optimizer._optimizer_step_pre_hooks


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield from vectors()


def test_unknown_horizons_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"'adazeta'.*needs horizon: .* epochs"):
        fit(SampleSchedule("adazeta"), max_epochs=-1, max_steps=3)
    trainer = make_trainer("strategy", callbacks=[SampleSchedule("linear", largest=3)])
    module = mlp_module(MeZO)
    with pytest.raises(MisconfigurationException, match=r"'linear'.*needs horizon: .* steps"):
        trainer.fit(module, DataLoader(Endless(), batch_size=4))
    numbers, _ = fit(SampleSchedule("adazeta", horizon=2), max_epochs=-1, max_steps=7)
    assert numbers == [1] * 7


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (torch.optim.SGD, r"found no optimizer with num_samples. Got: SGD"),
        (SophiaG, r"found no optimizer with num_samples. Got: SophiaG"),
        (ZOConservative, r"found no optimizer with num_samples. Got: ZOConservative"),
        (lambda params: MeZO(params, estimator="residual"), r"takes one direction per step"),
    ],
)
def test_other_optimizers_are_refused(make: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        fit(SampleSchedule("linear", largest=3), make=make)


def test_two_owners_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match="num_samples has two owners"):
        fit(SampleSchedule("linear"), SampleSchedule("adazeta"))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"schedule": "cubic"}, ValueError, "Invalid schedule='cubic': must be one of"),
        ({"largest": 0}, ValueError, "Invalid largest=0"),
        ({"horizon": 1.5}, TypeError, r"Invalid horizon=1\.5"),
        ({"nominal": 0}, ValueError, "Invalid nominal=0"),
        ({"shrink": 0}, ValueError, "Invalid shrink=0"),
        ({"shrink": 30}, ValueError, "Invalid shrink=30: must be below nominal=20"),
        ({"schedule": abs, "horizon": 3}, ValueError, "no meaning with a function"),
    ],
)
def test_arguments(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SampleSchedule(**arguments)


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (1.5, TypeError)])
def test_results_of_functions_are_checked(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="Invalid num_samples"):
        fit(SampleSchedule(lambda step: value))


def test_repr() -> None:
    assert repr(SampleSchedule()) == "SampleSchedule('adazeta', largest=None, horizon=None)"
