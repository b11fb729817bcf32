"""Tests of lightning_curvature/callbacks/curvature_cost.py."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_curvature import AdamQLR, CurvatureMonitor
from lightning_curvature.callbacks import curvature_cost
from lightning_curvature.callbacks.curvature_cost import CurvatureCost
from tests.helpers.modules import StockModule, loader, mlp_module, vectors
from tests.helpers.probing import Probe, make_trainer, the_optimizer


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.time = 0.0

    def perf_counter(self) -> float:
        return self.time

    def work(self, seconds: float) -> None:
        self.time += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(curvature_cost, "time", clock)
    return clock


class FakeOracle:
    """Its answers take two seconds; that to "hvp" asks for the loss first."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def loss(self) -> str:
        self.clock.work(2.0)
        return "loss"

    def hvp(self) -> str:
        self.loss()
        self.clock.work(2.0)
        return "hvp"


class FakeOptimizer:
    def __init__(self, clock: Clock, interval: int, asks: str = "loss") -> None:
        self.asks = frozenset({asks})
        self.oracle = FakeOracle(clock)
        self.interval = interval
        self.steps = 0

    def wants_record(self) -> bool:
        return self.steps % self.interval == 0


def run(
    clock: Clock, optimizer: Any, steps: int = 40, micro_batches: int = 1, question: str = "loss"
) -> float | None:
    """Return the cost of steps of 5 seconds, without those of the answers."""
    cost = CurvatureCost([optimizer], torch.device("cpu"))
    cost.watch()
    for _ in range(steps):
        asks = optimizer.wants_record()
        for micro_batch in range(micro_batches):
            cost.batch_starts()
            clock.work(5.0 / micro_batches)
            last = micro_batch == micro_batches - 1
            if last and asks:
                getattr(optimizer.oracle, question)()
            optimizer.steps += last
            cost.batch_ends(stepped=last)
            clock.work(100.0)  # validation, loading
    percent = cost.percent()
    cost.unwatch()
    return percent


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize(("interval", "expected"), [(1, 40.0), (2, 20.0), (4, 10.0)])
def test_percent(clock: Clock, interval: int, expected: float, micro_batches: int) -> None:
    # 39 steps count: the first one does not.
    optimizer = FakeOptimizer(clock, interval)
    steps = 41
    assert run(clock, optimizer, steps, micro_batches) == pytest.approx(expected)


def test_a_machine_that_slows_down(clock: Clock) -> None:
    """Each step is compared with those before it: later ones take 20 times as long."""
    optimizer = FakeOptimizer(clock, 4)
    cost = CurvatureCost([optimizer], torch.device("cpu"))
    for number in range(400):
        slow = 20.0 if number >= 200 else 1.0
        cost.batch_starts()
        lucky = 0.2 if number % 4 == 2 else 1.0
        clock.work(slow * (1.5 if optimizer.wants_record() else lucky))
        optimizer.steps += 1
        cost.batch_ends(stepped=True)
    assert cost.percent() == pytest.approx(0.25 * 50, rel=0.02)


def test_answers_within_answers_count_once(clock: Clock) -> None:
    assert run(clock, FakeOptimizer(clock, 1), question="hvp") == pytest.approx(80.0)


def test_no_number_where_none_can_be_told(clock: Clock) -> None:
    assert run(clock, FakeOptimizer(clock, 1, asks="layers")) is None  # work done elsewhere
    assert run(clock, FakeOptimizer(clock, 2, asks="layers")) == pytest.approx(20.0, rel=0.1)
    assert run(clock, FakeOptimizer(clock, 10**9)) is None  # asked in the first step only
    assert run(clock, FakeOptimizer(clock, 1), steps=4) is None
    assert run(clock, FakeOptimizer(clock, 4), steps=24) is None


def test_looking_at_the_layers_is_asking(clock: Clock) -> None:
    """AdaFisher's hooks work in the main pass of every fourth step: nothing is recorded."""
    optimizer = FakeOptimizer(clock, 10**9, asks="layers")
    optimizer.intervals = ("factor_update_interval",)  # type: ignore[attr-defined]
    optimizer._due = lambda name: optimizer.steps % 4 == 0  # type: ignore[attr-defined]
    cost = CurvatureCost([optimizer], torch.device("cpu"))
    for _ in range(41):
        cost.batch_starts()
        clock.work(1.4 if optimizer._due("factor_update_interval") else 1.0)  # type: ignore[attr-defined]
        optimizer.steps += 1
        cost.batch_ends(stepped=True)
    assert cost.percent() == pytest.approx(10.0)


def test_an_optimizer_that_never_asks(clock: Clock) -> None:
    cost = CurvatureCost([SimpleNamespace(stats={})], torch.device("cpu"))
    cost.watch()
    cost.batch_starts()
    cost.batch_ends(stepped=True)
    assert cost.percent() is None


def test_a_device_without_a_clock(clock: Clock) -> None:
    optimizer = FakeOptimizer(clock, 1)
    cost = CurvatureCost([optimizer], torch.device("meta"))
    cost.watch()
    assert set(vars(optimizer.oracle)) == {"clock"}
    cost.batch_starts()
    cost.batch_ends(stepped=True)
    assert cost.percent() is None


def test_the_oracle_is_left_alone(clock: Clock) -> None:
    optimizer = FakeOptimizer(clock, 1)
    cost = CurvatureCost([optimizer], torch.device("cpu"))
    cost.watch()
    cost.watch()
    assert set(vars(optimizer.oracle)) == {"clock", "loss", "hvp"}
    assert optimizer.oracle.hvp() == "hvp"
    cost.unwatch()
    assert set(vars(optimizer.oracle)) == {"clock"}


def test_an_answer_that_raises(clock: Clock) -> None:
    optimizer = FakeOptimizer(clock, 1)

    def fail() -> None:
        raise RuntimeError("no answer")

    vars(optimizer.oracle)["sampled_squares"] = None  # not ours to touch
    optimizer.oracle.gradient = fail  # type: ignore[attr-defined]
    cost = CurvatureCost([optimizer], torch.device("cpu"))
    cost.watch()
    cost.batch_starts()
    with pytest.raises(RuntimeError, match="no answer"):
        optimizer.oracle.gradient()  # type: ignore[attr-defined]
    cost.batch_ends(stepped=True)
    cost.unwatch()
    assert vars(optimizer.oracle)["gradient"] is fail


# In a Trainer


class Timed(StockModule):
    """A step takes a second of the clock, and so does an extra pass."""

    clock: Clock

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.clock.work(1.0)
        return super().training_step(batch, batch_idx)


class Asks(Probe):
    """Asks for the loss in every step."""

    interval = 1

    def wants_record(self) -> bool:
        return self._steps_done % self.interval == 0

    def _update(self, params: Any, oracle: Any) -> None:
        self.passes = ("loss",) if self.wants_record() else ()
        super()._update(params, oracle)
        self.stats = {"lr": torch.tensor(0.1)}


class AsksRarely(Asks):
    """Asks for the loss in every fourth step."""

    interval = 4


@pytest.mark.parametrize(("make", "expected"), [(Asks, 100.0), (AsksRarely, 25.0)])
@pytest.mark.parametrize("route", ["strategy", "callback"])
def test_cost_in_a_trainer(clock: Clock, make: Any, expected: float, route: str) -> None:
    module = Timed(mlp_module(make).network, make)
    module.clock = clock
    monitor = CurvatureMonitor(plot=False)
    trainer = make_trainer(route, callbacks=[monitor], max_epochs=8)
    trainer.fit(module, loader(vectors(24)))
    costs = monitor.history["cost_percent"]
    assert costs[-1] == pytest.approx(expected, rel=0.1)


class Peek(CurvatureMonitor):
    """Looks at the oracle during training; ends it with an error if asked to."""

    def __init__(self, fail: bool) -> None:
        super().__init__(plot=False)
        self.fail = fail
        self.seen: list[bool] = []
        self.oracle: Any = None

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        super().on_train_batch_end(trainer, *args)
        self.oracle = trainer.optimizers[0].oracle
        self.seen.append("loss" in vars(self.oracle))
        if self.fail:
            raise RuntimeError("stop")


@pytest.mark.parametrize("fail", [False, True])
def test_nothing_stays_on_the_oracle(fail: bool, tmp_path: Path) -> None:
    monitor = Peek(fail)
    trainer = make_trainer("strategy", callbacks=[monitor])
    module = mlp_module(AdamQLR)
    try:
        trainer.fit(module, loader(vectors(8)))
    except RuntimeError:
        assert fail
    assert all(monitor.seen)
    assert monitor.seen
    assert "loss" not in vars(monitor.oracle)
    assert the_optimizer(module).stats
