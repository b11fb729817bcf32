"""Tests of lightning_curvature/pruning/schedule.py."""

import itertools
import math
from typing import Any

import pytest

from lightning_curvature.pruning.schedule import (
    CubicSparsity,
    ListSparsity,
    SparsitySchedule,
    recomputation_targets,
)


def events(schedule: SparsitySchedule, epochs: int = 50) -> dict[int, float]:
    found = {epoch: schedule.sparsity(epoch) for epoch in range(epochs)}
    return {epoch: sparsity for epoch, sparsity in found.items() if sparsity is not None}


def test_cubic_by_hand() -> None:
    schedule = CubicSparsity(0.9, start_epoch=2, end_epoch=6, interval=2, initial=0.1)
    assert events(schedule) == {2: pytest.approx(0.1), 4: pytest.approx(0.8), 6: 0.9}


def test_cubic_prunes_less_and_less() -> None:
    reached = [0.0, *events(CubicSparsity(0.8, 0, 10)).values()]
    steps = [after - before for before, after in itertools.pairwise(reached)]
    assert len(steps) == 10, "no event at the start, where nothing is asked for"
    assert all(step > 0 for step in steps)
    assert steps == sorted(steps, reverse=True)


def test_cubic_ends_where_it_says() -> None:
    """Also if the interval leads past the end."""
    found = events(CubicSparsity(0.7, 1, 6, interval=3))
    assert list(found) == [4, 6]
    assert found[6] == 0.7


def test_cubic_in_one_event() -> None:
    assert events(CubicSparsity(0.7, 3, 3, initial=0.2)) == {3: 0.7}


def test_list() -> None:
    assert events(ListSparsity({10: 0.75, 0: 0.5})) == {0: 0.5, 10: 0.75}


def test_both_are_schedules() -> None:
    assert isinstance(CubicSparsity(0.5, 0, 1), SparsitySchedule)
    assert isinstance(ListSparsity({0: 0.5}), SparsitySchedule)


def test_text() -> None:
    for schedule in (CubicSparsity(0.9, 2, 6, 2, 0.1), ListSparsity({0: 0.5, 3: 0.75})):
        assert events(eval(repr(schedule))) == events(schedule)


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"final": 0.0}, "Invalid final=0.0: must be in (0, 1)."),
        ({"final": 1.0}, "Invalid final=1.0: must be in (0, 1)."),
        ({"start_epoch": -1}, "Invalid start_epoch=-1: must be an integer >= 0."),
        ({"end_epoch": 1}, "Invalid end_epoch=1: must be >= start_epoch=2."),
        ({"interval": 0}, "Invalid interval=0: must be an integer >= 1."),
        ({"initial": 0.95}, "Invalid initial=0.95: must be in [0, 0.9]."),
        ({"initial": math.nan}, "Invalid initial=nan: must be in [0, 0.9]."),
    ],
)
def test_cubic_refuses(kwargs: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole text is compared
        CubicSparsity(**{"final": 0.9, "start_epoch": 2, "end_epoch": 6, **kwargs})
    assert str(caught.value) == text


@pytest.mark.parametrize("epoch", [1.0, True, "1"])
def test_epochs_are_integers(epoch: Any) -> None:
    with pytest.raises(TypeError, match=r"Invalid start_epoch=.*must be an integer >= 0, got"):
        CubicSparsity(0.5, epoch, 6)
    with pytest.raises(TypeError, match="must be an integer >= 0"):
        ListSparsity({epoch: 0.5})


@pytest.mark.parametrize(
    ("sparsities", "match"),
    [
        ({}, "at least one epoch"),
        ({0: 1.0}, r"Invalid sparsities\[0\]=1.0: must be in \(0, 1\)"),
        ({0: 0.5, 1: 0.5}, r"Invalid sparsities\[1\]=0.5: must be above 0.5"),
        ({5: 0.5, 1: 0.6}, r"Invalid sparsities\[5\]=0.5: must be above 0.6"),
        ({-1: 0.5}, "Invalid epoch=-1"),
    ],
)
def test_list_refuses(sparsities: dict[int, float], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ListSparsity(sparsities)


@pytest.mark.parametrize(
    ("start", "final", "count"), [(0.0, 0.5, 4), (0.5, 0.8, 4), (0, 0.9, 16), (0.3, 0.3, 2)]
)
def test_each_event_leaves_the_same_fraction(start: float, final: float, count: int) -> None:
    targets = recomputation_targets(start, final, count)
    assert len(targets) == count
    assert targets[-1] == final, "exactly"
    ratio = ((1 - final) / (1 - start)) ** (1 / count)
    left = [1 - target for target in (start, *targets)]
    for before, after in itertools.pairwise(left):
        assert after / before == pytest.approx(ratio, rel=1e-13)


@pytest.mark.parametrize(
    ("args", "match"),
    [
        ((1.0, 1.0, 2), "Invalid start"),
        ((0.0, 0.0, 2), "Invalid final=0.0"),
        ((0.5, 0.4, 2), "Invalid final=0.4: must be >= start=0.5"),
        ((0.0, 0.5, 0), "Invalid num_recomputations=0"),
    ],
)
def test_targets_refuse(args: tuple[float, float, int], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        recomputation_targets(*args)
