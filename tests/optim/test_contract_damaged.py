"""The contract of every optimizer of lightning_curvature/registry.py: damaged and foreign states.

Every entry of a sound state is spoiled in every way that a cut file, another program or another
release could. Each has to be refused by name, with the live optimizer as it was.
"""

import copy
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor

from lightning_curvature import CurvatureOptimizer
from lightning_curvature.optim.saved_state import COPY_KEY
from tests.helpers.families import every_family
from tests.helpers.optimizer_db import OPTIONAL, Contract, every_optimizer, identical
from tests.helpers.plain_loop import Loop, classification, network

Path = tuple[Any, ...]

ANYTHING: dict[str, Any] = {"text": "x", "none": None, "a list": [1], "an empty dict": {}}
NOT_A_SCALAR: dict[str, Any] = {
    **ANYTHING,
    "a matrix": torch.zeros(3, 2),
    "one entry too deep": torch.zeros(1),
    "complex": torch.tensor(1j),
    "integer": torch.tensor(1),
    "without data": torch.zeros((), device="meta"),
}
NOT_A_VECTOR: dict[str, Any] = {
    **{name: value for name, value in NOT_A_SCALAR.items() if name != "one entry too deep"},
    "a number": torch.tensor(1.0),
}


def edited(state: dict[str, Any], path: Path, value: Any = None, *, cut: bool = False) -> Any:
    """Return a copy of a state with one entry replaced, or cut out."""
    state = copy.deepcopy(state)
    place: Any = state
    for key in path[:-1]:
        place = place[key]
    if cut:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return state


def may_be_none(optimizer: CurvatureOptimizer, key: str) -> bool:
    """Tell whether a hyper-parameter may be None."""
    argument = optimizer.argument_names.get(key, key)
    return type(None) in get_args(get_type_hints(type(optimizer).__init__).get(argument))


def spoiled(good: dict[str, Any], optimizer: CurvatureOptimizer) -> Iterator[tuple[Path, str, Any]]:
    """List states that must be refused: where, how, and the state."""
    own, (group, *_) = good["curvature"], good["param_groups"]
    kept = [(index, name) for index in good["state"] for name in optimizer.state_names]
    wrong: dict[Path, dict[str, Any]] = {
        ("state",): ANYTHING if good["state"] else {"text": "x", "none": None},
        ("param_groups",): ANYTHING,
        ("param_groups", 0): {**ANYTHING, "a tensor": torch.zeros(2)},
        ("param_groups", 0, "params"): {"none": None, "too few": [0], "text": "x"},
        ("curvature",): ANYTHING,
        ("curvature", "version"): {**ANYTHING, "zero": 0, "newer": 999, "a half": 1.5},
        ("curvature", "optimizer"): ANYTHING,
        ("curvature", "steps_done"): {**ANYTHING, "negative": -1, "nan": float("nan")},
        ("curvature", "scalars"): {k: v for k, v in ANYTHING.items() if v != {}},
    }
    wrong.update({("curvature", "scalars", name): NOT_A_SCALAR for name in own["scalars"]})
    wrong["curvature", "schedules"] = {
        **{k: v for k, v in ANYTHING.items() if v != {}},
        "no states": {"damping_update_interval": 3},
    }
    if "streams" in own:
        wrong["curvature", "streams"] = {
            **ANYTHING,
            "too short": own["streams"][:-1],
            "halves": [0.5 * index for index in own["streams"]],
        }
    wrong["curvature", "oracle"] = {k: v for k, v in ANYTHING.items() if v != {}}
    wrong.update(
        {("curvature", "oracle", name): {"a dict": {}, "3.5": 3.5} for name in own["oracle"]}
    )
    for index, name in kept:
        wrong["state", index] = {"text": "x", "none": None, "an empty dict": {}}
        is_scalar = good["state"][index][name].ndim == 0
        wrong["state", index, name] = NOT_A_SCALAR if is_scalar else NOT_A_VECTOR
    for name, value in group.items():
        if isinstance(value, Tensor):
            wrong["param_groups", 0, name] = {**NOT_A_SCALAR, "nan": torch.tensor(torch.nan)}
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            wrong["param_groups", 0, name] = {**ANYTHING, "nan": float("nan")}
        elif isinstance(value, tuple):
            wrong["param_groups", 0, name] = {**ANYTHING, "too short": value[:-1]}
        if name in optimizer.defaults and may_be_none(optimizer, name):
            wrong.get(("param_groups", 0, name), {}).pop("none", None)
    for path, values in wrong.items():
        for how, value in values.items():
            yield path, how, edited(good, path, value)
    required = [("state",), ("param_groups",), ("curvature",)]
    required += [("curvature", name) for name in own if name not in OPTIONAL]
    required += [("curvature", "oracle", name) for name in own["oracle"]]
    required += [("param_groups", 0, name) for name in group]
    required += [("state", index, name) for index, name in kept]
    if not (
        optimizer.asks or optimizer.needs_whole_params
    ):  # the first group has a copy: either is enough
        required.remove(("curvature",))
        required.remove(("param_groups", 0, COPY_KEY))
    for path in required:
        yield path, "missing", edited(good, path, cut=True)


def is_named(path: Path, text: str, optimizer: CurvatureOptimizer) -> bool:
    """Tell whether a message says which entry it is about."""
    key = next(part for part in reversed(path) if isinstance(part, str))
    names = {key, optimizer.argument_names.get(key, key)}
    # Foreign states are named by what they are; torch's own message counts the parameters.
    others = {
        "curvature": ("plain torch optimizer", "truncated state"),
        "optimizer": ("Cannot load the state of",),
        "param_groups": ("group",),
        "params": ("group",),
        "state": ("parameter",),
    }
    return any(name in text for name in (*names, *others.get(key, ())))


@every_family
@pytest.mark.feature("Faults", "damaged optimizer state: refused, nothing changes")
def test_damage_is_named_and_changes_nothing(contract: Contract) -> None:
    given = contract.rich
    loop, twin = (Loop(network(), contract.making(**given)) for _ in range(2))
    for each in (loop, twin):
        each.train(classification(4))
    optimizer, good = loop.optimizer, copy.deepcopy(loop.optimizer.state_dict())
    stats = dict(optimizer.stats)
    problems, count = [], 0
    for path, how, state in spoiled(good, optimizer):
        where = f"{'/'.join(map(str, path))} {how}"
        count += 1
        try:
            optimizer.load_state_dict(state)
        except ValueError as error:
            if not is_named(path, str(error), optimizer):
                problems.append(f"{where}: not named in {error}")
        except Exception as error:
            problems.append(f"{where}: {error!r}")
        else:
            problems.append(f"{where}: loaded")
            optimizer.load_state_dict(good)
            optimizer.stats = dict(stats)
        if not identical(optimizer.state_dict(), good) or not identical(optimizer.stats, stats):
            problems.append(f"{where}: the live state was changed")
            optimizer.load_state_dict(good)
    assert not problems, "\n".join([f"{len(problems)} of {count}:", *problems])
    for each in (loop, twin):
        each.train(classification(3, seed=8))
    assert torch.equal(loop.theta(), twin.theta())
    assert identical(optimizer.state_dict(), twin.optimizer.state_dict())
    assert identical(optimizer.stats, twin.optimizer.stats)


@every_optimizer
@pytest.mark.parametrize("whole", [None, 3, "x", [], {}, {"curvature": {}}], ids=repr)
def test_what_is_no_state_is_refused(contract: Contract, whole: Any) -> None:
    loop = Loop(network(), contract.make)
    loop.train(classification(2))
    before = copy.deepcopy(loop.optimizer.state_dict())
    with pytest.raises(ValueError, match=f"^Cannot load .* into {contract.info.cls.__name__}"):
        loop.optimizer.load_state_dict(whole)
    assert identical(loop.optimizer.state_dict(), before)


@every_optimizer
@pytest.mark.feature("Faults", "optimizer state of another model: refused, nothing changes")
def test_the_state_of_another_model(contract: Contract) -> None:
    loop = Loop(network(), contract.make)
    loop.train(classification(2))
    other = Loop(network(outputs=6), contract.make)
    other.train(classification(2))
    if not other.optimizer.state_dict()["state"]:
        pytest.skip("keeps nothing that has a shape")
    before = copy.deepcopy(loop.optimizer.state_dict())
    text = rf"^Cannot load the state into {contract.info.cls.__name__}: .*of parameter 2 must be .*"
    with pytest.raises(ValueError, match=text + r"\[4(, 7)?\], got .*\[6(, 7)?\]"):
        loop.optimizer.load_state_dict(other.optimizer.state_dict())
    assert identical(loop.optimizer.state_dict(), before)


@every_optimizer
def test_what_others_left_in_the_groups_is_kept(contract: Contract) -> None:
    """Schedulers keep numbers in the groups; releases to come may keep more everywhere."""
    loop = Loop(network(), contract.make)
    loop.train(classification(2))
    state = copy.deepcopy(loop.optimizer.state_dict())
    state["param_groups"][0]["initial_lr"] = 0.25
    state["curvature"]["scalars"]["novel"] = torch.tensor(2.0)
    loop.optimizer.load_state_dict(state)
    loop.train(classification(2))
    saved = loop.optimizer.state_dict()
    assert saved["param_groups"][0]["initial_lr"] == 0.25
    assert torch.equal(saved["curvature"]["scalars"]["novel"], torch.tensor(2.0))


@every_optimizer
def test_whatever_was_saved_loads(contract: Contract) -> None:
    """Also where a user turned a knob of the first group only, which is the one that is read."""
    groups = lambda model: [  # noqa: E731
        {"params": model[0].parameters()},
        {"params": model[2].parameters()},
    ]
    loop, again = (Loop(network(), contract.make, groups=groups) for _ in range(2))
    for name in loop.optimizer.shared:
        value = loop.optimizer.param_groups[0][name]
        if isinstance(value, float):
            # A factor of 1 may be one that makes something larger, or nothing.
            larger = value == 1 and name.endswith("_factor")
            loop.optimizer.param_groups[0][name] = 1.1 if larger else 0.9 * value
    loop.train(classification(2))
    again.model.load_state_dict(loop.model.state_dict())
    again.optimizer.load_state_dict(copy.deepcopy(loop.optimizer.state_dict()))
    for each in (loop, again):
        each.train(classification(3))
    assert torch.equal(again.theta(), loop.theta())


@every_optimizer
@pytest.mark.parametrize("when", ["before anything is replaced", "after everything is replaced"])
def test_a_hook_that_fails_changes_nothing(contract: Contract, when: str) -> None:
    """PyTorch calls hooks of the user around loading; theirs is the last way to fail."""
    loop = Loop(network(), contract.make)
    loop.train(classification(3))
    other = Loop(network(seed=2), contract.make)
    other.train(classification(2))
    before = copy.deepcopy(loop.optimizer.state_dict())

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    optimizer = loop.optimizer
    register = (
        optimizer.register_load_state_dict_pre_hook
        if when.startswith("before")
        else optimizer.register_load_state_dict_post_hook
    )
    handle = register(fail)
    with pytest.raises(KeyboardInterrupt):
        optimizer.load_state_dict(other.optimizer.state_dict())
    handle.remove()
    assert identical(optimizer.state_dict(), before)
    optimizer.load_state_dict(other.optimizer.state_dict())
    assert identical(optimizer.state_dict(), other.optimizer.state_dict())


@every_optimizer
def test_a_hook_may_translate_a_state(contract: Contract) -> None:
    """What torch offers for renamed parameters counts, not what it was made of."""
    donor = Loop(network(), contract.make)
    donor.train(classification(2))
    good = donor.optimizer.state_dict()
    loop = Loop(network(), contract.make)
    old_names = {"old-" + key: value for key, value in good.items()}

    def translate(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        return {key.removeprefix("old-"): value for key, value in state.items()}

    handle = loop.optimizer.register_load_state_dict_pre_hook(translate)
    loop.optimizer.load_state_dict(old_names)
    handle.remove()
    assert identical(loop.optimizer.state_dict(), good)
