"""Tests of lightning_curvature/curvature/schedule.py and time_budget.py."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch

from lightning_curvature.curvature.schedule import (
    DriftInterval,
    FixedInterval,
    RefreshSchedule,
    WarmupInterval,
)
from lightning_curvature.curvature.time_budget import TimeBudget

Drift = Callable[[int], float | None]

RULES: dict[str, Callable[[], RefreshSchedule]] = {
    "fixed": lambda: FixedInterval(4, phase=1),
    "warmup": lambda: WarmupInterval(7, 2, then=5),
    "drift": lambda: DriftInterval(3, low_drift=0.1, high_drift=0.4),
    "warmup, drift": lambda: WarmupInterval(7, 2, then=DriftInterval(3, 2, 12, 0.1, 0.4)),
    "budget, fixed": lambda: TimeBudget(FixedInterval(5), 10.0),
    "budget, drift": lambda: TimeBudget(WarmupInterval(5, 1, DriftInterval(2)), 10.0),
}


class Unread:
    """A drift that counts how often it is read."""

    def __init__(self, value: float) -> None:
        self.value = value
        self.readings = 0

    def __float__(self) -> float:
        self.readings += 1
        return self.value


def waves(step: int) -> float:
    """Return a drift that is small, middling and large in turn."""
    return 0.25 * (1 + math.sin(step / 7))


def run(
    rule: RefreshSchedule, steps: Sequence[int], drift: Drift = waves, *, asks: int = 1
) -> list[int]:
    """Take steps as an optimizer does, and return those that refreshed."""
    refreshes = []
    for step in steps:
        answers = {rule.due(step) for _ in range(asks)}
        assert len(answers) == 1
        if answers.pop():
            value = drift(step)
            rule.refreshed(step, None if value is None else torch.tensor(value))
            refreshes.append(step)
            assert rule.due(step), "the rest of the step sees the same answer"
    return refreshes


@pytest.mark.parametrize("interval", [1, 2, 7])
def test_fixed_interval_is_the_plain_one(interval: int) -> None:
    expected = [step for step in range(40) if step % interval == 0]
    assert run(FixedInterval(interval), range(40)) == expected
    assert FixedInterval(interval).every_step == (interval == 1)


def test_phase() -> None:
    assert run(FixedInterval(4, phase=3), range(12)) == [3, 7, 11]


def test_warmup_is_dense_then_sparse() -> None:
    rule = WarmupInterval(5, 1, then=4)
    assert run(rule, range(16)) == [0, 1, 2, 3, 4, 5, 9, 13]
    assert [rule.interval_at(step) for step in (4, 5)] == [1, 4]
    assert not rule.every_step
    assert WarmupInterval(5, 1, then=1).every_step


@pytest.mark.parametrize(
    ("drift", "expected"),
    [
        (0.01, [0, 4, 12, 28]),  # the first drift is not counted, then 8, 16, 16
        (0.5, [0, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30]),
        (0.2, [0, 4, 8, 12, 16, 20, 24, 28]),
        (math.nan, [0, 4, 8, 12, 16, 20, 24, 28]),
        (math.inf, [0, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30]),
    ],
)
def test_drift_changes_the_interval(drift: float, expected: list[int]) -> None:
    rule = DriftInterval(4, min_interval=2, max_interval=16, low_drift=0.1, high_drift=0.4)
    assert run(rule, range(32), lambda _: drift) == expected


def test_interval_follows_a_change() -> None:
    """It grows while nothing happens and shrinks when something does, within its limits."""
    rule = DriftInterval(2, max_interval=8)
    refreshes = run(rule, range(100), lambda step: 0.0 if step < 50 else 1.0)
    gaps = [b - a for a, b in pairwise(refreshes)]
    assert gaps[:8] == [2, 4, 8, 8, 8, 8, 8, 8]
    assert gaps[8:13] == [4, 2, 1, 1, 1]
    assert rule.interval_at(100) == 1


def test_drift_is_read_late_and_once() -> None:
    rule = DriftInterval(8)
    rule.refreshed(0, None)
    drift = Unread(0.01)
    assert rule.due(8)
    rule.refreshed(8, drift)  # type: ignore[arg-type]
    assert not any(rule.due(step) for step in range(9, 12))
    assert drift.readings == 0, "half the interval has not passed"
    assert not any(rule.due(step) for step in range(12, 24))
    assert rule.due(24)
    assert drift.readings == 1


def test_a_refresh_that_failed_is_due_again() -> None:
    rule = DriftInterval(4)
    rule.refreshed(0, None)
    assert [rule.due(step) for step in (3, 4, 5)] == [False, True, True]
    rule.refreshed(5, None)
    assert [rule.due(step) for step in (5, 6, 8, 9)] == [True, False, False, True]


def test_drift_that_is_never_measured() -> None:
    rule = DriftInterval(2)
    with pytest.warns(RuntimeWarning, match=r"DriftInterval\(2, .*\) was told no drift at 3 ref"):
        refreshes = run(rule, range(10), lambda _: None)
    assert refreshes == [0, 2, 4, 6, 8]


def test_warmup_keeps_its_drift_to_itself() -> None:
    rule = WarmupInterval(4, 1, then=DriftInterval(4))
    # Drifts of the warm-up are large, as it is with every start.
    assert run(rule, range(20), lambda step: 1.0 if step < 4 else 0.1) == [
        0,
        1,
        2,
        3,
        7,
        11,
        15,
        19,
    ]


@pytest.mark.parametrize("name", RULES)
def test_answers_do_not_depend_on_who_asks(name: str) -> None:
    assert run(RULES[name](), range(60)) == run(RULES[name](), range(60), asks=5)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("stop", range(1, 30, 4))
def test_resume_in_mid_interval(name: str, stop: int) -> None:
    """No times were measured here, so budgets resume exactly, too."""
    whole = run(RULES[name](), range(60))
    first, second = RULES[name](), RULES[name]()
    part = run(first, range(stop))
    state = first.state()
    assert all(isinstance(value, (int, float, str, type(None))) for value in state.values())
    second.due(0)  # what it did before loading does not matter
    second.refreshed(0, torch.tensor(0.0))
    second.load_state(state)
    assert second.state() == state
    assert part + run(second, range(stop, 60)) == whole


@pytest.mark.parametrize("name", RULES)
def test_empty_state_starts_anew(name: str) -> None:
    rule = RULES[name]()
    first = run(rule, range(40))
    rule.load_state({})
    assert run(rule, range(40)) == first


def test_other_settings_win_over_a_loaded_state() -> None:
    """Of the old state only the last refresh counts."""
    old = DriftInterval(2, max_interval=64)
    assert run(old, range(31), lambda _: 0.0)[-1] == 30
    for new in (DriftInterval(5), TimeBudget(DriftInterval(5), 10.0)):
        new.load_state(old.state())
        assert run(new, range(31, 42), lambda _: 0.1) == [35, 40]
    new.load_state(old.state())
    back = DriftInterval(5)
    back.load_state(new.state())
    assert run(back, range(31, 42), lambda _: 0.1) == [35, 40]


# Time


def timed(rule: TimeBudget, steps: Sequence[int], cost: Callable[[int], float]) -> int:
    """Take steps that are measured where the budget wants it; return the number of refreshes."""
    refreshes = 0
    for step in steps:
        refreshing, wanted = rule.due(step), rule.wants_time(step)
        if refreshing:
            refreshes += 1
            rule.refreshed(step, None)
        if wanted:
            rule.measured(step, 1.0 + (cost(step) if refreshing else 0.0))
    return refreshes


@pytest.mark.parametrize(
    ("cost", "percent", "distance"),
    [(1.0, 25.0, 4), (1.0, 10.0, 10), (0.5, 50.0, 1), (3.0, 200.0, 2), (0.33, 3.0, 11)],
)
def test_budget(cost: float, percent: float, distance: int) -> None:
    rule = TimeBudget(FixedInterval(1), percent)
    start = timed(rule, range(50), lambda _: cost)
    assert rule.interval_at(50) == distance
    assert start >= 5, "it has to measure first"
    refreshes = timed(rule, range(50, 250), lambda _: cost)
    assert abs(refreshes - 200 / distance) <= 1
    assert cost * refreshes <= percent / 100 * 200 + cost


def test_budget_never_refreshes_more_than_the_rule() -> None:
    rule = TimeBudget(FixedInterval(7), 1e6)
    assert run(rule, range(60)) == run(FixedInterval(7), range(60))


def test_postponed_refresh_comes_as_soon_as_it_may() -> None:
    rule = TimeBudget(FixedInterval(10), 10.0)
    rule.load_state({"rule": repr(rule), "last": 0, "distance": 13, "wanted": False})
    assert run(rule, range(1, 45)) == [13, 26, 39]  # and not 20, 40


def test_a_postponed_refresh_survives_a_resume() -> None:
    rule = TimeBudget(FixedInterval(10), 10.0)
    rule.load_state({"rule": repr(rule), "last": 0, "distance": 13, "wanted": False})
    assert run(rule, range(1, 12)) == []
    again = TimeBudget(FixedInterval(10), 10.0)
    again.load_state(rule.state())
    assert run(again, range(12, 20)) == [13]


def test_first_steps_are_left_out() -> None:
    """The first step of each kind compiles: believed, it would postpone refreshes for ever."""
    rule = TimeBudget(FixedInterval(1), 25.0)
    timed(rule, range(40), lambda step: 1e6 if step == 0 else 1.0)
    assert rule.interval_at(40) == 4


def test_outliers_do_not_matter() -> None:
    rule = TimeBudget(FixedInterval(1), 25.0)
    timed(rule, range(100), lambda step: 50.0 if step in (4, 24, 60) else 1.0)
    assert rule.interval_at(100) == 4


def test_budget_follows_the_cost() -> None:
    rule = TimeBudget(FixedInterval(1), 25.0)
    timed(rule, range(40), lambda _: 1.0)
    assert rule.interval_at(40) == 4
    timed(rule, range(40, 400), lambda _: 2.0)
    assert rule.interval_at(400) == 8


def test_free_refreshes_are_not_postponed() -> None:
    rule = TimeBudget(FixedInterval(1), 1.0)
    timed(rule, range(40), lambda _: -0.1)
    assert rule.interval_at(40) == 1


def test_few_steps_are_measured() -> None:
    rule = TimeBudget(FixedInterval(10), 1e3)
    wanted = []
    for step in range(1000):
        if rule.wants_time(step):
            wanted.append(step)
            rule.measured(step, 1.0)
        if rule.due(step):
            rule.refreshed(step, None)
        assert rule.wants_time(step) == (step in wanted), "the same during and after a step"
    # A refresh and the plain step behind it: of the first dozen, and then of one in ten.
    expected = [step for refresh in range(200, 1000, 100) for step in (refresh, refresh + 1)]
    assert [step for step in wanted if step > 111] == expected


def test_several_steps_at_once() -> None:
    """Manual optimization: only the sum of their durations is known."""
    rule = TimeBudget(FixedInterval(1), 25.0)
    for first in range(0, 120, 3):
        refreshes = 0
        for step in range(first, first + 3):
            if rule.due(step):
                rule.refreshed(step, None)
                refreshes += 1
        rule.measured(first, 3.0 + refreshes, 3)
    assert rule.interval_at(120) == 4


def test_ranks_decide_by_their_average() -> None:
    seen: list[list[float]] = []

    def mean(values: Sequence[float]) -> list[float]:
        seen.append(list(values))
        return [2.0, 5.0]

    rule = TimeBudget(FixedInterval(1), 25.0, mean)
    timed(rule, range(11), lambda _: 1.0)
    assert seen[0] == [1.0, 2.0]
    assert rule.interval_at(11) == 6  # (5 - 2) / (0.25 * 2)


def test_times_are_measured_anew_after_a_resume() -> None:
    old = TimeBudget(FixedInterval(1), 25.0)
    timed(old, range(41), lambda _: 1.0)
    new = TimeBudget(FixedInterval(1), 25.0)
    new.load_state(old.state())
    assert new.interval_at(41) == 4, "until then the old distance holds"
    last = old.state()["last"]
    for step in range(41, 100):
        refreshing = new.due(step)
        assert refreshing == (step - last >= new.interval_at(step))
        if refreshing:
            new.refreshed(step, None)
            last = step
        new.measured(step, 1.0 + 0.5 * refreshing)
    assert new.interval_at(100) == 2


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: FixedInterval(0), ValueError, r"Invalid interval=0: must be an integer >= 1"),
        (lambda: FixedInterval(3, 3), ValueError, r"Invalid phase=3: must be in \[0, 3\)\."),
        (lambda: FixedInterval(3, 0.5), TypeError, r"Invalid phase=0\.5: must be an integer\."),
        (lambda: WarmupInterval(0, 1, 2), ValueError, r"Invalid steps=0: must be an integer >= 1"),
        (lambda: WarmupInterval(3, 0, 2), ValueError, r"Invalid interval=0: must be an integer"),
        (lambda: WarmupInterval(3, 1, 0), ValueError, r"Invalid then=0: must be an integer >= 1"),
        (
            lambda: DriftInterval(9, max_interval=8),
            ValueError,
            r"Invalid interval=9: must be in \[min_interval, max_interval\], here \[1, 8\]\.",
        ),
        (lambda: DriftInterval(2, 0), ValueError, r"Invalid min_interval=0: must be an integer"),
        (lambda: DriftInterval(2, 1, 0), ValueError, r"Invalid max_interval=0: must be an int"),
        (lambda: DriftInterval(2, low_drift=-1), ValueError, r"Invalid low_drift=-1: must be >= 0"),
        (
            lambda: DriftInterval(2, low_drift=0.3, high_drift=0.3),
            ValueError,
            r"Invalid high_drift=0\.3: must be in \(0\.3, inf\)\.",
        ),
        (
            lambda: TimeBudget(FixedInterval(1), 0),
            ValueError,
            r"Invalid max_extra_time_percent=0: must be in \(0, inf\)\.",
        ),
    ],
)
def test_argument_errors(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
