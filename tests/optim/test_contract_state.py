"""The contract of every optimizer of lightning_curvature/registry.py: groups, state, copies."""

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_curvature import CurvatureOptimizer
from tests.helpers.families import variants_too
from tests.helpers.optimizer_db import (
    CONTRACTS,
    OPTIONAL,
    Contract,
    every_optimizer,
    identical,
    state_tensors,
)
from tests.helpers.plain_loop import Loop, classification, network

STEPS = 5


def through_a_file(state: Any) -> Any:
    """Save and load as a strict reader does."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same(one: Loop, other: Loop) -> None:
    """Compare weights, state and statistics bit for bit."""
    assert torch.equal(one.theta(), other.theta())
    ones, others = state_tensors(one.optimizer), state_tensors(other.optimizer)
    assert ones.keys() == others.keys()
    for name, tensor in ones.items():
        assert tensor.dtype is others[name].dtype, name
        assert torch.equal(tensor, others[name]), name
    for name, value in one.optimizer.stats.items():
        assert torch.equal(value, other.optimizer.stats[name]), name


# Groups


@every_optimizer
def test_add_param_group(contract: Contract) -> None:
    """A group added later trains, and shares what all groups share."""
    if "lr" in contract.make([nn.Parameter(torch.ones(1))]).shared:
        pytest.skip("has one learning rate")
    loop = Loop(network(), contract.make, groups=lambda model: model[0].parameters())
    before = [p.detach().clone() for p in loop.model.parameters()]
    loop.optimizer.add_param_group({"params": loop.model[2].parameters(), "lr": 0.5})
    first, second = loop.optimizer.param_groups
    assert second["lr"] == 0.5 != first["lr"]
    for name in loop.optimizer.shared:
        assert second[name] is first[name]
    # What watches the model has to learn of the new parameters.
    loop.criterion = loop.optimizer.attach_model(loop.model, nn.functional.cross_entropy)
    loop.train(classification(2))
    for p, old in zip(loop.model.parameters(), before, strict=True):
        assert not torch.equal(p, old)


@every_optimizer
def test_groups_must_agree_in_shared_hyper_parameters(contract: Contract) -> None:
    one, two = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = contract.make([one])
    if "max_step_length" not in optimizer.shared:
        pytest.skip("shares nothing")
    text = (
        r"^Invalid max_lr=0\.7 in a parameter group: it is one value for all groups, here "
        r"(0\.1|1\.0)\. Leave it out of the group\.$"
    )
    with pytest.raises(ValueError, match=text):
        optimizer.add_param_group({"params": [two], "max_lr": 0.7})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match=text):
        contract.make([{"params": [one]}, {"params": [two], "max_lr": 0.7}])
    # The same value is no conflict.
    optimizer.add_param_group(
        {"params": [two], "max_lr": optimizer.param_groups[0]["max_step_length"]}
    )
    assert len(optimizer.param_groups) == 2


@every_optimizer
def test_a_shared_hyper_parameter_may_be_given_in_all_groups(contract: Contract) -> None:
    """A group's value counts where it differs from the argument but not from the other groups."""
    one, two = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    if not contract.takes("max_lr"):
        pytest.skip("has no max_lr")
    optimizer = contract.make([{"params": [one], "max_lr": 0.7}, {"params": [two], "max_lr": 0.7}])
    assert [group["max_step_length"] for group in optimizer.param_groups] == [0.7, 0.7]


@every_optimizer
def test_a_scheduler_drives_the_step(contract: Contract) -> None:
    """Any scheduler of torch acts on ``lr`` of each group."""
    loop = Loop(network(), contract.make)
    start = loop.optimizer.param_groups[0]["lr"]
    schedule = torch.optim.lr_scheduler.StepLR(loop.optimizer, step_size=1, gamma=1e-12)
    batches = classification(3)
    before = loop.theta()
    loop.step(*batches[0])
    moved = (loop.theta() - before).norm()
    schedule.step()
    assert loop.optimizer.param_groups[0]["lr"] == pytest.approx(1e-12 * start)
    before = loop.theta()
    loop.step(*batches[1])
    assert (loop.theta() - before).norm() < 1e-9 * moved


# State dict


def key_of(argument: str) -> str:
    """Return the name of an argument in the groups: torch's OneCycleLR claims one for itself."""
    return {"max_lr": "max_step_length"}.get(argument, argument)


@variants_too
@every_optimizer
def test_state_dict_has_torchs_layout(contract: Contract) -> None:
    loop = Loop(network(), contract.make)
    loop.train(classification(2))
    state = loop.optimizer.state_dict()
    assert set(state) == {"state", "param_groups", "curvature"}
    assert state["curvature"]["optimizer"] == contract.info.cls.__name__
    assert state["curvature"]["steps_done"] == 2
    assert isinstance(state["curvature"]["version"], int)
    arguments = {key_of(name) for name in inspect.signature(contract.info.cls).parameters}
    # For distributed checkpoints, which drop the key at the top.
    copied = {"curvature_state"} if contract.elementwise else set()
    found = set(state["param_groups"][0])
    # The first says that a group is trained by a backward; the others are fixed in some classes.
    inner = {"first_order", "estimator", "num_samples", "restore"} if contract.forward_only else ()
    assert arguments | copied == found - (set(inner) - arguments)

    def check(value: Any) -> None:
        # What `weights_only` loading and other readers understand.
        assert type(value) in (Tensor, float, int, bool, str, type(None), tuple, list, dict), value
        if isinstance(value, dict):
            for part in value.values():
                check(part)
        elif isinstance(value, (tuple, list)):
            for part in value:
                check(part)

    check(state)


@every_optimizer
def test_state_dict_is_a_snapshot_of_the_scalars(contract: Contract) -> None:
    """Further steps change no saved number (tensors of parameters are shared, as in torch)."""
    loop = Loop(network(), contract.making(**contract.rich))
    loop.train(classification(2))
    saved = loop.optimizer.state_dict()["curvature"]
    for name in contract.shared_state:
        assert saved.pop(name)
    before = copy.deepcopy(saved)
    loop.train(classification(3))
    assert identical(saved, before)


@variants_too
@every_optimizer
@pytest.mark.parametrize("options", ["defaults", "rich"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_resume_is_bitwise(contract: Contract, options: str, dtype: torch.dtype) -> None:
    """K steps, save, load, k steps are 2k steps."""
    make = contract.making(**(contract.rich if options == "rich" else {}))
    batches = classification(2 * STEPS, dtype=dtype)
    whole = Loop(network(dtype=dtype), make, directional="auto")
    torch.manual_seed(1)
    whole.train(batches[:STEPS])
    saved = through_a_file(
        {
            "model": whole.model.state_dict(),
            "optimizer": whole.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
        }
    )
    whole.train(batches[STEPS:])

    resumed = Loop(network(seed=99, dtype=dtype), make, directional="auto")
    resumed.model.load_state_dict(saved["model"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["rng"])
    assert resumed.optimizer.stats == {}
    resumed.train(batches[STEPS:])
    assert_same(resumed, whole)


@every_optimizer
def test_load_brings_the_saved_hyper_parameters(contract: Contract) -> None:
    loop = Loop(network(), contract.making(lr=0.25))
    loop.train(classification(2))
    other = Loop(network(), contract.making(lr=0.75))
    other.optimizer.load_state_dict(loop.optimizer.state_dict())
    assert other.optimizer.param_groups[0]["lr"] == 0.25
    if hasattr(loop.optimizer, "damping"):
        assert other.optimizer.damping == loop.optimizer.damping != 1e-3


@every_optimizer
def test_load_copies(contract: Contract) -> None:
    """Training on does not change what was loaded (but, as in torch, tensors of parameters)."""
    loop = Loop(network(), contract.making(**contract.rich))
    loop.train(classification(4))
    saved = through_a_file(loop.optimizer.state_dict())
    original = copy.deepcopy(saved)
    first = Loop(network(), contract.make)
    first.optimizer.load_state_dict(saved)
    first.train(classification(4))
    for key in ("param_groups", "curvature"):
        assert identical(saved[key], original[key]), key


@every_optimizer
def test_load_keeps_the_dtype_of_the_state(contract: Contract) -> None:
    """Also where torch would cast it to the dtype of the parameter."""
    loop = Loop(network(dtype=torch.bfloat16), contract.make, directional="auto")
    loop.train(classification(2, dtype=torch.bfloat16))
    other = Loop(network(dtype=torch.bfloat16), contract.make, directional="auto")
    other.optimizer.load_state_dict(through_a_file(loop.optimizer.state_dict()))
    ours, theirs = state_tensors(other.optimizer), state_tensors(loop.optimizer)
    assert ours.keys() == theirs.keys()
    # Losses of forward passes are told apart in float64, and so is what is counted of them.
    numbers = {torch.float64} if contract.forward_only else set()
    known = {torch.float32, torch.int64} | ({torch.float64} if contract.precise else set())
    assert {t.dtype for t in theirs.values()} <= known | numbers
    assert {t.dtype for t in theirs.values() if t.ndim} <= known
    for name, tensor in theirs.items():
        assert ours[name].dtype is tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


def foreign_states(contract: Contract) -> dict[str, tuple[Any, type[Exception], str]]:
    """Return states that must be refused: the state, the error, its text."""
    name = contract.info.cls.__name__
    own = Loop(network(), contract.make)
    own.train(classification(2))
    good = own.optimizer.state_dict()
    plain_model = network()
    adam = torch.optim.Adam(plain_model.parameters())
    other = next((c for c in CONTRACTS if c is not contract), None)
    newer = {**good, "curvature": {**good["curvature"], "version": 999}}
    states: dict[str, tuple[Any, type[Exception], str]] = {
        "plain": (
            adam.state_dict(),
            ValueError,
            f"^Cannot load the state of a plain torch optimizer into {name}.$",
        ),
        "newer": (
            newer,
            ValueError,
            f"^Cannot load version 999 of the state of {name}: this release knows versions up to "
            r"\d+. Update lightning-curvature.$",
        ),
        "fewer-groups": (
            {**good, "param_groups": []},
            ValueError,
            "different number of parameter groups",
        ),
        "fewer-parameters": (
            {
                **good,
                "param_groups": [{**g, "params": g["params"][:-1]} for g in good["param_groups"]],
            },
            ValueError,
            "doesn't match the size of optimizer's group",
        ),
    }
    if other is not None:
        foreign = Loop(network(), other.make)
        foreign.train(classification(2))
        their_name = other.info.cls.__name__
        states["another"] = (
            foreign.optimizer.state_dict(),
            ValueError,
            f"^Cannot load the state of '{their_name}' into {name}.$",
        )
    for key in good["curvature"].keys() - set(OPTIONAL):
        rest = {k: v for k, v in good["curvature"].items() if k != key}
        states[f"without-{key}"] = ({**good, "curvature": rest}, ValueError, "Cannot load")
    for key in good["state"].get(0, {}):
        rest = {k: v for k, v in good["state"][0].items() if k != key}
        truncated = {**good, "state": {**good["state"], 0: rest}}
        states[f"without-{key}-of-a-parameter"] = (truncated, ValueError, "Cannot load")
    return states


@every_optimizer
def test_foreign_and_truncated_states_are_refused(contract: Contract) -> None:
    """With a clear text, and with everything as it was."""
    loop = Loop(network(), contract.make)
    loop.train(classification(3))
    problems = []
    for kind, (state, error, text) in foreign_states(contract).items():
        before = copy.deepcopy(loop.optimizer.state_dict())
        try:
            with pytest.raises(error, match=text):
                loop.optimizer.load_state_dict(state)
        except (Exception, pytest.fail.Exception) as wrong:
            problems.append(f"{kind}: {wrong!r}")
        if not identical(loop.optimizer.state_dict(), before):
            problems.append(f"{kind}: the state was changed")
            loop.optimizer.load_state_dict(before)
    assert not problems, "\n".join(problems)
    loop.train(classification(1))


# Copies


@every_optimizer
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_continue_alike(contract: Contract, how: str) -> None:
    """The oracle is not copied: a copy belongs to another model and is attached anew."""
    batches = classification(2 * STEPS)
    loop = Loop(network(), contract.making(**contract.rich))
    loop.train(batches[:STEPS])
    pair: tuple[nn.Module, CurvatureOptimizer]
    if how == "deepcopy":
        pair = copy.deepcopy((loop.model, loop.optimizer))
    else:
        # The hooks on an attached model belong to its loop and cannot be pickled.
        loop.optimizer.detach()
        pair = pickle.loads(pickle.dumps((loop.model, loop.optimizer)))
        loop.criterion = loop.optimizer.attach_model(
            loop.model, nn.functional.cross_entropy, directional="jvp"
        )
    model, optimizer = pair
    assert optimizer.oracle is None
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == [
        id(p) for p in model.parameters()
    ]
    again = Loop(model, lambda params: optimizer)
    loop.train(batches[STEPS:])
    again.train(batches[STEPS:])
    assert_same(again, loop)


@every_optimizer
def test_a_copied_model_is_not_watched(contract: Contract) -> None:
    """An average of the weights, say, may be evaluated between loss and step."""
    batches = classification(4)
    plain = Loop(network(), contract.make)
    loop = Loop(network(), contract.make)
    for x, y in batches:
        plain.step(x, y)
        average = copy.deepcopy(loop.model)
        loop.optimizer.zero_grad()
        output = loop.model(x)
        average(x)
        loss = loop.criterion(output, y)
        average(x)
        copy.deepcopy(loop.model)(x)
        loss.backward()
        loop.optimizer.step()
    assert_same(loop, plain)


@every_optimizer
def test_repr(contract: Contract) -> None:
    """Names the class and every hyper-parameter."""
    text = repr(contract.make([nn.Parameter(torch.ones(2))]))
    assert text.startswith(f"{contract.info.cls.__name__} (")
    for name in inspect.signature(contract.info.cls).parameters:
        if name != "params":
            assert f"{key_of(name)}: " in text


@every_optimizer
def test_signature_follows_torch(contract: Contract) -> None:
    """``params`` first, then ``lr``; the switches that change no result by keyword only."""
    parameters = inspect.signature(contract.info.cls).parameters
    assert list(parameters)[:2] == ["params", "lr"]
    switches = {"maximize"} | ({"foreach"} & set(parameters))
    for name in switches:
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
    documented = contract.info.cls.__doc__ or ""
    for name in parameters:
        assert f"\n        {name}: " in documented, name
