"""Tests of lightning_curvature/callbacks/hessian_schedule.py."""

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_curvature import (
    AdamQLR,
    CurvatureMonitor,
    FixedInterval,
    HessianSchedule,
    TimeBudget,
)
from lightning_curvature.callbacks.hessian_schedule import _Owned
from tests.helpers.modules import StockModule, loader, mlp_module, vectors
from tests.helpers.optimizer_db import CONTRACTS, Contract, identical
from tests.helpers.probing import ROUTES, make_trainer
from tests.helpers.ranks import RankPool
from tests.helpers.resuming import Run, Save, run
from tests.helpers.scheduled import Clock, Refreshes, Sparse, fit_on_budget, fit_sparse
from tests.helpers.two_ranks import RESPONSIVE, assert_same_on_all, fit

pytestmark = pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`, callbacks used to create:UserWarning"
)

PRIMARY = ("hessian_update_interval", "curvature_update_interval", "factor_update_interval")
every_scheduled = pytest.mark.parametrize(
    "contract",
    [contract for contract in CONTRACTS if set(PRIMARY) & set(contract.intervals)],
    ids=lambda contract: contract.info.name,
)


def interval_of(contract: Contract) -> str:
    """Return the interval that the callback owns if nothing is named."""
    return next(name for name in PRIMARY if name in contract.intervals)


def adaptive(**arguments: Any) -> HessianSchedule:
    """Return a schedule whose interval changes within a few steps."""
    given = {"low_drift": 0.3, "high_drift": 0.7, "max_interval": 4, **arguments}
    return HessianSchedule(2, adaptive=True, **given)


# When


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (HessianSchedule(), [0, 6, 12, 18]),
        (HessianSchedule(8), [0, 8, 16]),
        (HessianSchedule(warmup_steps=3), [0, 1, 2, 3, 9, 15]),
        (HessianSchedule(9, warmup_steps=5, warmup_interval=2), [0, 2, 4, 5, 14]),
        (HessianSchedule(2, adaptive=True, low_drift=0.2, high_drift=0.3), [0, 2, 6, 14]),
        (
            HessianSchedule(8, adaptive=True, low_drift=0, high_drift=0.05),
            [0, 8, 12, 14, *range(15, 20)],
        ),
    ],
    ids=lambda value: repr(value) if isinstance(value, HessianSchedule) else "",
)
def test_steps_that_refresh(schedule: HessianSchedule, expected: list[int]) -> None:
    optimizer = fit_sparse(schedule, options={"hessian_update_interval": 6})
    assert optimizer.estimates == expected


@every_scheduled
@pytest.mark.parametrize("interval", [1, 3])
def test_interval_means_what_the_argument_means(contract: Contract, interval: int) -> None:
    """Bit for bit the steps of the optimizer with that interval."""
    name = interval_of(contract)
    noted = Refreshes()
    ours = run(contract, {name: 2}, callbacks=[HessianSchedule(interval), noted])
    theirs = run(contract, {name: interval})
    assert noted.steps[name] == [step for step in range(10) if step % interval == 0]
    assert identical(ours.weights, theirs.weights)
    assert ours.losses == theirs.losses


def test_refresh_after_the_step() -> None:
    """Sophia may ask about the step that comes after the present one."""
    contract = next(c for c in CONTRACTS if c.info.name == "sophiag")
    noted, schedule = Refreshes(), HessianSchedule(3, max_extra_time_percent=1e6)
    options = {"hessian_timing": "after", "hessian_update_interval": 3}
    measured: list[tuple[int, bool]] = []

    class Watch(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            (rule,) = schedule.schedules
            assert isinstance(rule, TimeBudget)
            original = rule.measured

            def record(step: int, seconds: float, steps: int = 1) -> None:
                measured.append((step, step == rule._last))
                original(step, seconds, steps)

            rule.measured = record  # type: ignore[method-assign]

    ours = run(contract, options, callbacks=[schedule, noted, Watch()])
    theirs = run(contract, options)
    assert noted.steps["hessian_update_interval"] == [2, 5, 8]
    assert identical(ours.weights, theirs.weights)
    assert measured == [(3, True), (4, False), (6, True), (7, False), (9, True), (10, False)]


@every_scheduled
@pytest.mark.parametrize("route", ROUTES)
def test_routes_and_accumulation(contract: Contract, route: str) -> None:
    noted = Refreshes()
    schedule = HessianSchedule(4, warmup_steps=2)
    # 5 batches in windows of 2, 2 and 1, twice.
    whole = run(contract, {}, route=route, callbacks=[schedule, noted], accumulate_grad_batches=2)
    assert whole.steps == 6
    assert noted.steps[interval_of(contract)] == [0, 1, 2]
    assert noted.intervals == [1.0, 1.0, 1.0, 1.0, *[4.0] * 6]


@every_scheduled
def test_every_optimizer_tells_its_drift(contract: Contract) -> None:
    name = interval_of(contract)
    often, seldom = Refreshes(), Refreshes()
    # A step length at its limit would not drift.
    options = contract.known(RESPONSIVE)
    run(contract, options, callbacks=[often, adaptive(low_drift=0, high_drift=1e-9)])
    run(contract, options, callbacks=[seldom, adaptive(low_drift=1e9, high_drift=2e9)])
    assert often.steps[name] == [0, 2, 3, 4, 5, 6, 7, 8, 9]
    assert seldom.steps[name] == [0, 2, 6]


def test_another_interval_by_name() -> None:
    noted = Refreshes()
    contract = next(c for c in CONTRACTS if c.info.name == "adamqlr")
    callbacks = [
        HessianSchedule(4),
        HessianSchedule(3, interval_name="damping_update_interval"),
        noted,
    ]
    run(contract, {}, callbacks=callbacks)
    assert noted.steps == {
        "curvature_update_interval": [0, 4, 8],
        "damping_update_interval": [0, 3, 6, 9],
    }
    assert noted.intervals == [4.0] * 10


def test_manual_optimization() -> None:
    class Manual(StockModule):
        automatic_optimization = False

        def __init__(self, make: Any) -> None:
            super().__init__(mlp_module(make).network, make)

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for _ in range(2):
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(super().training_step(batch, batch_idx))
                optimizer.step()

    module = Manual(Sparse)
    trainer = make_trainer("none", callbacks=[HessianSchedule(3, max_extra_time_percent=1e4)])
    trainer.fit(module, loader(vectors(20)))
    assert trainer.optimizers[0].estimates == [0, 4, 8], "two per batch: four apart at first"


# Time


def test_budget() -> None:
    estimates, intervals, readings = fit_on_budget([1.0], 40)
    assert estimates == [0, 2, 4, 6, 8, *range(12, 40, 4)]
    assert intervals[8:10] == [2.0, 4.0]
    # Refreshes and the plain steps behind them, twice each.
    assert readings == 4 * len(estimates)


def test_budget_under_accumulation() -> None:
    """The time of a step is that of all its micro-batches."""
    clock = Clock()
    schedule = HessianSchedule(1, max_extra_time_percent=25.0)
    # Every micro-batch takes 1 second, and the refresh 4: a second per step more than allowed.
    module = mlp_module(lambda params: Sparse(params, clock=clock, cost=4.0))

    class Tick(Callback):
        def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
            clock.now += 1.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_curvature.callbacks.hessian_schedule.time.perf_counter", clock)
        trainer = make_trainer("none", callbacks=[schedule, Tick()], accumulate_grad_batches=3)
        trainer.fit(module, loader(vectors(4 * 60)))
    # Plain: 3 micro-batches and the update, 4 seconds. 4 / (0.25 * 4) = 4.
    assert trainer.optimizers[0].estimates == [0, 2, 4, 6, 8, 12, 16]


def test_budget_reads_the_device_only_where_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On other devices every look at the clock waits; the device is a fake one here."""
    waits = 0

    class Fake:
        def synchronize(self) -> None:
            nonlocal waits
            waits += 1

    monkeypatch.setattr(torch, "get_device_module", lambda device: Fake())
    optimizer = Sparse([torch.nn.Parameter(torch.ones(2))])
    rule = TimeBudget(FixedInterval(10), 25.0)
    owned = _Owned(optimizer, "hessian_update_interval", rule, torch.device("cpu"))
    owned._device = torch.device("meta")
    optimizer.own_interval("hessian_update_interval", rule)
    for step in range(100):
        before = waits
        owned.start()
        optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
        optimizer.step()
        owned.stop()
        assert waits - before == (2 if step % 10 in (0, 1) else 0)


@pytest.mark.ddp
def test_budget_on_two_ranks(ranks: RankPool) -> None:
    """They measure different times and decide alike, by the average."""
    one, other = ranks.run(fit_on_budget, [1.0, 3.0], 60)
    assert one == other
    assert one[0] == [0, 2, 4, 6, 8, *range(16, 60, 8)]


# Two ranks


@pytest.mark.ddp
@every_scheduled
def test_two_ranks_decide_alike(contract: Contract, ranks: RankPool) -> None:
    outcomes = ranks.run(fit, contract, callbacks=[adaptive(low_drift=0.1, high_drift=0.4)])
    assert_same_on_all(outcomes)
    state = outcomes[0].state["curvature"]["schedules"][interval_of(contract)]
    assert state["last"] > 0


# Resume


def assert_same_end(resumed: Run, whole: Run) -> None:
    for what in ("weights", "state", "stats", "steps"):
        assert identical(getattr(resumed, what), getattr(whole, what)), what


@every_scheduled
@pytest.mark.parametrize("stop", [3, 4])
def test_resume_in_mid_interval(contract: Contract, stop: int, tmp_path: Path) -> None:
    path = tmp_path / "part.ckpt"

    def schedule() -> HessianSchedule:
        return adaptive(low_drift=1e9, high_drift=2e9)  # 0, 2, 6

    whole_steps, rest_steps = Refreshes(), Refreshes()
    whole = run(contract, {}, callbacks=[schedule(), whole_steps])
    run(contract, {}, stop_before=stop, callbacks=[schedule(), Save(path, stop)])
    saved = torch.load(path, weights_only=True)
    state = saved["optimizer_states"][0]["curvature"]["schedules"]
    assert state[interval_of(contract)]["last"] == 2
    assert not any("Schedule" in name for name in saved["callbacks"]), "nothing in the callback"
    resumed = run(
        contract, {}, seed=99, ckpt_path=path, weights_only=True, callbacks=[schedule(), rest_steps]
    )
    name = interval_of(contract)
    assert whole_steps.steps[name] == [0, 2, 6]
    assert rest_steps.steps[name] == [6]
    assert_same_end(resumed, whole)


def test_checkpoint_without_the_callback(tmp_path: Path) -> None:
    """The optimizer's interval holds; the state waits for a run with the callback."""
    contract = next(c for c in CONTRACTS if c.info.name == "adamqlr")
    first, second = tmp_path / "first.ckpt", tmp_path / "second.ckpt"
    name = interval_of(contract)
    options = {name: 3}
    run(contract, options, stop_before=3, callbacks=[adaptive(), Save(first, 3)])
    plain = Refreshes()
    without = run(contract, options, ckpt_path=first, callbacks=[plain, Save(second, 7)])
    assert plain.steps[name] == [3, 6, 9]
    assert without.state["curvature"]["schedules"][name]["last"] == 2
    again = Refreshes()
    run(contract, options, ckpt_path=second, callbacks=[adaptive(), again])
    assert again.steps[name][0] == 7, "overdue"


def test_settings_of_the_user_win(tmp_path: Path) -> None:
    contract = next(c for c in CONTRACTS if c.info.name == "adamqlr")
    path = tmp_path / "part.ckpt"
    run(contract, {}, stop_before=3, callbacks=[adaptive(), Save(path, 3)])
    noted = Refreshes()
    schedule = HessianSchedule(5, adaptive=True, low_drift=0, high_drift=1e9)
    run(contract, {}, ckpt_path=path, callbacks=[schedule, noted])
    assert noted.steps[interval_of(contract)] == [7], "5 after the last refresh"


def test_plain_loop_continues_a_trainer() -> None:
    optimizer = fit_sparse(adaptive(low_drift=0.2, high_drift=0.3), 5)
    assert optimizer.estimates == [0, 2]
    rule = adaptive(low_drift=0.2, high_drift=0.3)._make_rule(1, None)
    optimizer.own_interval("hessian_update_interval", rule)
    for _ in range(12):
        optimizer.step()
    assert optimizer.estimates == [0, 2, 6, 10, 14]


# Owners


def test_two_owners() -> None:
    with pytest.raises(
        MisconfigurationException,
        match=r"hessian_update_interval of Sparse has two owners: HessianSchedule\(interval=3\) "
        r"and HessianSchedule\(interval=5, warmup_steps=10\)\. Remove one of them, or",
    ):
        fit_sparse(HessianSchedule(3), callbacks=[HessianSchedule(5, warmup_steps=10)])


def test_owner_outside_of_the_trainer() -> None:
    def make(params: Any) -> Sparse:
        optimizer = Sparse(params)
        optimizer.own_interval("hessian_update_interval", FixedInterval(2))
        return optimizer

    trainer = make_trainer("none", callbacks=[HessianSchedule(3)])
    with pytest.raises(
        MisconfigurationException,
        match=r"two owners: FixedInterval\(2\) and HessianSchedule\(interval=3\)",
    ):
        trainer.fit(mlp_module(make), loader(vectors()))
    assert trainer.global_step == 0
    assert repr(trainer.optimizers[0]._schedules["hessian_update_interval"]) == "FixedInterval(2)"


def test_optimizer_without_intervals() -> None:
    def make(params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.1)

    trainer = make_trainer("none", callbacks=[HessianSchedule(3)])
    with pytest.raises(
        MisconfigurationException,
        match=r"found no optimizer with hessian_update_interval, curvature_update_interval or "
        r"factor_update_interval\. Got: SGD with no interval\. Use an optimizer",
    ):
        trainer.fit(mlp_module(make), loader(vectors()))


def test_interval_that_is_not_there() -> None:
    with pytest.raises(
        MisconfigurationException,
        match=r"found no optimizer with inverse_update_interval\. Got: Sparse with "
        r"hessian_update_interval\. Use an optimizer",
    ):
        fit_sparse(HessianSchedule(3, interval_name="inverse_update_interval"))


class Fails(Callback):
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 4:
            raise RuntimeError("the fifth batch is broken")


@pytest.mark.parametrize("fails", [False, True])
def test_no_trace(fails: bool) -> None:
    schedule = HessianSchedule(3, max_extra_time_percent=50.0)
    module = mlp_module(lambda params: Sparse(params, hessian_update_interval=2))
    trainer = make_trainer("none", callbacks=[schedule, *([Fails()] if fails else [])])
    if fails:
        with pytest.raises(RuntimeError, match="the fifth batch is broken"):
            trainer.fit(module, loader(vectors()))
    else:
        trainer.fit(module, loader(vectors()))
    (optimizer,) = trainer.optimizers
    assert optimizer.estimates == [0, 3]
    assert schedule.schedules == []
    assert schedule.state_dict() == {}
    assert optimizer._schedules == {}
    assert "update_interval" not in optimizer.stats
    assert optimizer.param_groups[0]["hessian_update_interval"] == 2
    for _ in range(3):
        optimizer.step()
    assert optimizer.estimates == [0, 3, 6], "its own interval decides again"
    optimizer.own_interval("hessian_update_interval", FixedInterval(1))


def test_second_fit_with_the_same_callback() -> None:
    schedule = HessianSchedule(3)
    for _ in range(2):
        assert fit_sparse(schedule, 7).estimates == [0, 3, 6]


def test_pickle_leaves_the_run_out() -> None:
    schedule = HessianSchedule(3)
    optimizer = Sparse([torch.nn.Parameter(torch.ones(2))])
    trainer: Any = SimpleNamespace(optimizers=[optimizer], callbacks=[schedule], world_size=1)
    schedule.on_fit_start(trainer, LightningModule())
    assert len(schedule.schedules) == 1
    copied = pickle.loads(pickle.dumps(schedule))
    assert copied.schedules == []
    assert copied.interval == 3


def test_interval_is_logged() -> None:
    monitor = CurvatureMonitor(every_n_steps=1, plot=False)
    schedule = HessianSchedule(2, adaptive=True, low_drift=0.2, high_drift=0.3)
    fit_sparse(schedule, 8, callbacks=[monitor])
    # A drift is looked at when the answer depends on it: before steps 4 and 8.
    assert monitor.history["update_interval"] == [2.0] * 4 + [4.0] * 4


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"interval": 0}, ValueError, r"Invalid interval=0: must be an integer >= 1"),
        ({"warmup_steps": -1}, ValueError, r"Invalid warmup_steps=-1: must be an integer"),
        ({"warmup_steps": 2.5}, TypeError, r"Invalid warmup_steps=2\.5: must be an integer"),
        ({"warmup_interval": 0}, ValueError, r"Invalid warmup_interval=0: must be an integer"),
        (
            {"interval": 9, "adaptive": True, "max_interval": 4},
            ValueError,
            r"Invalid interval=9: must be in \[min_interval, max_interval\], here \[1, 4\]\.",
        ),
        ({"adaptive": True, "low_drift": -1.0}, ValueError, r"Invalid low_drift=-1\.0: must be >="),
        (
            {"adaptive": True, "min_interval": 5, "max_interval": 4},
            ValueError,
            r"Invalid interval=5: must be in",
        ),
        (
            {"max_extra_time_percent": 0.0},
            ValueError,
            r"Invalid max_extra_time_percent=0\.0: must be in \(0, inf\)\.",
        ),
    ],
)
def test_argument_errors(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        HessianSchedule(**kwargs)


def test_interval_of_the_optimizer_outside_of_the_limits() -> None:
    with pytest.raises(ValueError, match=r"Invalid interval=6: must be in .* here \[1, 4\]\."):
        fit_sparse(
            HessianSchedule(adaptive=True, max_interval=4), options={"hessian_update_interval": 6}
        )


def test_oracle_is_asked_only_when_due() -> None:
    asked: list[int] = []

    class Counting(AdamQLR):
        def _line_search(self, oracle: Any, *args: Any) -> Any:
            original = oracle.directional

            def directional(*args: Any, **kwargs: Any) -> Any:
                asked.append(self._steps_done)
                return original(*args, **kwargs)

            oracle.directional = directional
            try:
                return super()._line_search(oracle, *args)
            finally:
                oracle.directional = original

    trainer = make_trainer("strategy", callbacks=[HessianSchedule(3, warmup_steps=2)], max_epochs=2)
    trainer.fit(mlp_module(Counting), loader(vectors()))
    assert asked == [0, 1, 2, 5, 8]
