"""Tests of lightning_curvature/optim/saved_window.py, and of what MFAC does with its states."""

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from lightning_curvature import MFAC, join_window_shards
from tests.helpers.mfac_steps import SHAPES, USUAL, draw, start, step, trained, window_of
from tests.helpers.optimizer_db import identical

ENTRIES = 11
# While the window fills, when it is full, and after it has come around.
STEPS = [1, 3, 4, 9]
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.6, "l2_reg": 0.2, "weight_decay": 0.1},
    "heavy ball": {"momentum": 0.6, "momentum_type": "heavy_ball", "l2_in_window": False},
    "half": {"row_dtype": "bfloat16", "momentum": 0.3},
    "float16": {"row_dtype": "float16", "gram_dtype": "float32"},
    "count": {"window_normalization": "count"},
    "one": {"num_grads": 1},
    "sparse": {"sparse": True},
}
every_setting = pytest.mark.parametrize("setting", list(SETTINGS))

Trained = tuple[MFAC, list[nn.Parameter]]


def run(steps: int = 6, setting: str = "momentum") -> Any:
    """Train in float32, so that no detour over another dtype stays unseen."""
    return trained(draw(steps), start(dtype=torch.float32), **SETTINGS[setting])


def through_file(state: dict[str, Any]) -> dict[str, Any]:
    """Write a state and read it as Lightning does."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    found: dict[str, Any] = torch.load(file, weights_only=True)
    return found


def assert_goes_on_like(one: Trained, other: Trained, steps: int = 7) -> None:
    """Train both further and assert that all of it has the same bits."""
    for row in draw(steps, seed=3):
        for optimizer, params in (one, other):
            step(optimizer, params, row)
    assert all(torch.equal(p, q) for p, q in zip(one[1], other[1], strict=True))
    assert identical(one[0].state_dict(), other[0].state_dict())
    assert identical(one[0].stats, other[0].stats)


# Going on


@every_setting
@pytest.mark.parametrize("steps", STEPS)
def test_resuming(setting: str, steps: int) -> None:
    """Into an optimizer with other arguments, and into one that has another window."""
    whole = run(steps, setting)
    saved = through_file(whole[0].state_dict())
    kept = copy.deepcopy(saved)
    values = [p.detach().clone() for p in whole[1]]
    others: list[Any] = []
    for used in (False, True):
        params = [nn.Parameter(value.clone()) for value in values]
        other = MFAC(params, lr=7.0, num_grads=5)
        if used:
            step(other, params, draw(1, seed=8)[0])
            for p, value in zip(params, values, strict=True):
                p.data.copy_(value)
        other.load_state_dict(copy.deepcopy(saved))
        assert identical(other.state_dict(), kept)
        others.append((other, params))
    for row in draw(7, seed=3):
        for optimizer, params in (whole, *others):
            step(optimizer, params, row)
    for other, params in others:
        assert all(torch.equal(p, q) for p, q in zip(params, whole[1], strict=True))
        assert identical(other.state_dict(), whole[0].state_dict())


def test_the_window_that_was_loaded_is_another_ones_memory() -> None:
    """Nothing that is done to one optimizer reaches the other, or the state."""
    whole = run()
    saved = whole[0].state_dict()
    kept = copy.deepcopy(saved["curvature"]["window"])
    other = MFAC(start(dtype=torch.float32))
    other.load_state_dict(saved)
    for row in draw(3, seed=3):
        step(whole[0], whole[1], row)
        step(other, other.param_groups[0]["params"], row)
    assert identical(saved["curvature"]["window"], kept)


@every_setting
@pytest.mark.parametrize("steps", [0, 3, 9])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies(setting: str, steps: int, how: str) -> None:
    whole = run(steps, setting)
    other = copy.deepcopy(whole) if how == "deepcopy" else pickle.loads(pickle.dumps(whole))
    assert_goes_on_like(whole, other)
    # Each has its own.
    step(whole[0], whole[1], draw(1, seed=4)[0])
    assert not identical(window_of(whole[0]), window_of(other[0]))


def test_the_state_of_an_optimizer_that_never_stepped() -> None:
    """It has no window; where it is loaded the window begins anew."""
    fresh = MFAC(start(dtype=torch.float32), **USUAL)
    saved = through_file(fresh.state_dict())
    assert saved["curvature"]["window"] is None
    used = run()[0]
    used.load_state_dict(saved)
    params = used.param_groups[0]["params"]
    for p, q in zip(params, start(dtype=torch.float32), strict=True):
        p.data.copy_(q)
    assert_goes_on_like((used, params), (fresh, fresh.param_groups[0]["params"]))


def test_parameters_that_came_one_after_the_other() -> None:
    """Their columns are in the order in which they came, not in that of the parameters."""
    params = start(dtype=torch.float32)
    optimizer = MFAC(params, **USUAL, momentum=0.5)
    rows = draw(6)
    for row in rows[:3]:
        step(optimizer, params, [None, None, row[2]])
    for row in rows[3:]:
        step(optimizer, params, row)
    saved = through_file(optimizer.state_dict())
    assert saved["curvature"]["window"]["parameters"] == [2, 0, 1]
    assert saved["curvature"]["window"]["sizes"] == [1, 6, 4]
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    other = MFAC(copies)
    other.load_state_dict(saved)
    assert_goes_on_like((optimizer, params), (other, copies))


def test_what_a_window_says() -> None:
    optimizer, _ = run(9)
    window = window_of(optimizer)
    assert window["rows"].shape == (4, ENTRIES)
    assert window["rows"].dtype == torch.float32
    assert window["columns"] == [0, ENTRIES]
    assert window["num_columns"] == ENTRIES
    assert window["parameters"] == [0, 1, 2]
    assert window["inserted"] == 9
    expected = window["rows"].double() @ window["rows"].double().T
    torch.testing.assert_close(window["gram"], expected, rtol=1e-12, atol=1e-12)


# Damage


def refuses(state: Any, text: str, setting: str = "momentum") -> None:
    """Check that a state is refused, and that nothing changes."""
    one, other = run(setting=setting), run(setting=setting)
    with pytest.raises(ValueError, match=text):
        one[0].load_state_dict(state)
    assert identical(one[0].state_dict(), other[0].state_dict())
    assert_goes_on_like(one, other, steps=1)


KEYS = (
    *("parameters", "sizes", "kept", "columns", "num_columns", "rows", "scales", "gram"),
    "inserted",
)


@pytest.mark.parametrize("key", KEYS)
def test_nothing_may_be_missing(key: str) -> None:
    state = copy.deepcopy(run()[0].state_dict())
    del state["curvature"]["window"][key]
    refuses(state, f"^Cannot load the state into MFAC: 'window' has no {key}\\.$")


def test_a_state_without_a_window() -> None:
    state = copy.deepcopy(run()[0].state_dict())
    del state["curvature"]["window"]
    refuses(state, "^Cannot load the state into MFAC: it has no 'window'. The state is cut off.")
    for value, text in ((3, "got 3"), ([1], "got"), (torch.ones(2), "got a float32 tensor of")):
        state["curvature"]["window"] = value
        refuses(state, f"'window' must be a dict, {text}")


@pytest.mark.parametrize("key", ["rows", "scales", "gram"])
def test_every_tensor_is_looked_at(key: str) -> None:
    """Numbers, shape, dtype and place."""
    good = run()[0].state_dict()
    value = good["curvature"]["window"][key]
    for number in (math.nan, math.inf):
        state = copy.deepcopy(good)
        state["curvature"]["window"][key].view(-1)[-1] = number
        refuses(state, f"'{key}' of the window must be a tensor of finite real numbers of shape")
    bad = (value[None], value[:-1], value[..., :-1], value.long(), value.to("meta"), None, "x")
    for other in (*bad, value.to_sparse(), value.to(torch.complex64)):
        state = copy.deepcopy(good)
        state["curvature"]["window"][key] = other
        shape = r"\[" + ", ".join(map(str, value.shape)) + r"\]"
        refuses(state, f"'{key}' of the window must be a tensor of .* of shape {shape}, got")


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("parameters", None, "'parameters' of the window must be a list of integers >= 0"),
        ("parameters", [0, 1, -2], "'parameters' of the window must be a list of integers >= 0"),
        ("parameters", [0, 1, 7], "columns for parameters of other sizes"),
        ("parameters", [0, 1, 1], "columns for parameters of other sizes"),
        ("parameters", [1, 0, 2], "columns for parameters of other sizes"),
        ("parameters", [0, 1], "columns for parameters of other sizes"),
        ("sizes", (6, 4, 1), "'sizes' of the window must be a list of integers"),
        ("sizes", [6, 4, True], "'sizes' of the window must be a list of integers"),
        ("sizes", [6, 5, 0], r"columns for parameters of other sizes, \[6, 5, 0\]. The state is"),
        ("columns", [0, 5.0], "'columns' of the window must be a list of integers"),
        ("columns", [0], r"holds columns \[0\] of 11, its parameters have 11"),
        ("columns", [5, 2], r"holds columns \[5, 2\] of 11"),
        ("columns", [3, 14], r"holds columns \[3, 14\] of 11"),
        ("num_columns", "11", "'num_columns' of the window must be an integer >= 0, got '11'"),
        ("num_columns", 10, "of 10, its parameters have 11. The state is damaged"),
        ("num_columns", 12, "of 12, its parameters have 11. The state is damaged"),
        ("inserted", 6, "'inserted' of the window must be a 0-dim tensor with an integer"),
        ("inserted", torch.tensor(-1), "'inserted' of the window must be a 0-dim tensor"),
        ("inserted", torch.tensor([6]), "'inserted' of the window must be a 0-dim tensor"),
        ("inserted", torch.tensor(6.0), "'inserted' of the window must be a 0-dim tensor"),
        ("inserted", torch.tensor(6, device="meta"), "'inserted' of the window must be"),
        ("kept", 1, "'kept' of the window must be 11 booleans, got 1"),
        ("kept", torch.ones(11), "'kept' of the window must be 11 booleans, got a float32 tensor"),
        ("kept", torch.ones(10).bool(), "'kept' of the window must be 11 booleans"),
        ("kept", torch.arange(11) > 0, "of 11, its parameters have 10. The state is damaged"),
    ],
)
def test_damage_is_named(key: str, value: Any, text: str) -> None:
    state = copy.deepcopy(run()[0].state_dict())
    state["curvature"]["window"][key] = value
    refuses(state, f"^Cannot load the state into MFAC: .*{text}")


def test_windows_of_other_arguments_and_models() -> None:
    """The number of gradients is that of the state, so both must fit together."""
    state = copy.deepcopy(run()[0].state_dict())
    state["param_groups"][0]["num_grads"] = 5
    refuses(state, r"'rows' of the window must be .* of shape \[5, 11\]")
    shapes = ((2, 3), (4,), (1,))
    params = start(*shapes, dtype=torch.float32)
    other = trained(draw(6, *shapes), params)[0].state_dict()
    # Of the same number of entries, without a momentum that shows other shapes.
    one = run(setting="plain")[0]
    one.load_state_dict(other)
    shapes = ((2, 4), (4,), (1,))
    other = trained(draw(6, *shapes), start(*shapes, dtype=torch.float32))[0].state_dict()
    refuses(other, r"columns for parameters of other sizes, \[8, 4, 1\]", setting="plain")


# Parts of a window


def parts(optimizer: MFAC, *widths: int) -> list[dict[str, Any]]:
    """Return states as ranks save them that share the columns like this."""
    whole = copy.deepcopy(optimizer.state_dict())
    window = whole["curvature"]["window"]
    found, first = [], 0
    for width in widths:
        columns = [first, min(first + width, ENTRIES)]
        own = {**window, "columns": columns, "rows": window["rows"][:, slice(*columns)].clone()}
        found.append({**whole, "curvature": {**whole["curvature"], "window": own}})
        first = columns[1]
    assert first == ENTRIES
    return found


@pytest.mark.parametrize("widths", [(6, 5), (4, 4, 3), (11,), (10, 1, 0), (0, 11)])
@pytest.mark.parametrize("order", [1, -1])
def test_parts_are_put_together(widths: tuple[int, ...], order: int) -> None:
    whole = run()
    states = parts(whole[0], *widths)[::order]
    kept = copy.deepcopy(states)
    joined = join_window_shards(states)
    assert identical(joined, whole[0].state_dict())
    assert identical(states, kept)
    other = run(setting="plain")
    other[0].load_state_dict(through_file(joined))
    for p, q in zip(other[1], whole[1], strict=True):
        p.data.copy_(q)
    assert_goes_on_like(whole, other)


def test_parts_that_are_not_a_whole() -> None:
    states = parts(run()[0], 4, 4, 3)
    for some, end in (([0, 1], 8), ([1, 2], 0), ([0, 2], 4), ([0, 0, 2], 4)):
        text = f"The windows lack columns from {end} on, of 11. Join the states of all ranks"
        with pytest.raises(ValueError, match=text):
            join_window_shards([states[index] for index in some])
    later = parts(run(7)[0], 4, 4, 3)
    text = "The windows are of different steps: 6 and 7 gradients were inserted"
    with pytest.raises(ValueError, match=text):
        join_window_shards([*states[:2], later[2]])


def test_a_state_that_is_whole_already() -> None:
    """As those of a run with ``gather_state``, where the first rank has all columns."""
    whole = run()
    states = [whole[0].state_dict(), parts(whole[0], 6, 5)[1]]
    joined = join_window_shards(states)
    assert joined["curvature"]["window"]["rows"].shape == (4, ENTRIES)
    assert identical(joined, whole[0].state_dict())


@pytest.mark.parametrize("number", [0, 1])
def test_a_part_alone(number: int) -> None:
    """It says where the rest is to be found."""
    columns = "0 to 6" if number == 0 else "6 to 11"
    text = (
        f"The saved window holds columns {columns} of 11, but this rank needs 0 to 11. Put the "
        "states of all ranks together with join_window_shards, or save with gather_state=True."
    )
    refuses(parts(run()[0], 6, 5)[number], text)


def test_shapes_of_the_tests() -> None:
    """What is written out above."""
    assert sum(math.prod(shape) for shape in SHAPES) == ENTRIES


def test_states_that_cannot_be_joined() -> None:
    """None, those before the first step, and a mixture."""
    with pytest.raises(ValueError, match="must be the states of all ranks"):
        join_window_shards([])
    fresh = MFAC([torch.nn.Parameter(torch.ones(2))]).state_dict()
    assert identical(join_window_shards([fresh, fresh]), fresh)
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = MFAC([p])
    p.grad = torch.ones(2)
    optimizer.step()
    with pytest.raises(ValueError, match="1 of 2 states have no window"):
        join_window_shards([optimizer.state_dict(), fresh])
