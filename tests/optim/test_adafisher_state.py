"""`AdaFisher`: what is not finite, what is saved, what is refused."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature import AdaFisher
from lightning_curvature.optim.diagonal import DiagonalOptimizer
from tests.helpers.adafisher import (
    Zoo,
    factors,
    inside,
    making,
    sentences,
    zoo_loop,
)
from tests.helpers.optimizer_db import identical
from tests.helpers.plain_loop import CLASSES, FEATURES, Loop, classification, network

# Failures


class Overflowing(nn.Module):
    """The squares of what goes into its layer overflow; its gradients do not."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, CLASSES, dtype=torch.float64)
        nn.init.zeros_(self.layer.weight).requires_grad_(False)
        self.huge = True

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x * 1e200 if self.huge else x)


@pytest.mark.parametrize("looks", [True, False])
def test_factors_that_are_not_finite_are_left_out(
    looks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DiagonalOptimizer, "_can_look", lambda self, scalar: looks)
    loop = Loop(Overflowing(), making())
    batches = classification(3)
    loop.model.huge = False
    loop.train(batches[:1])
    before = copy.deepcopy(factors(loop))
    loop.model.huge = True
    loop.train(batches[1:])
    assert identical(factors(loop), before)
    assert loop.stat("skipped_refreshes") == 2
    assert loop.is_finite()
    # It asks to be told when it reads its counts.
    assert loop.optimizer.watched["skipped_refreshes"][0] == 1


@pytest.mark.parametrize("looks", [True, False])
def test_a_bad_gradient_changes_nothing(looks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DiagonalOptimizer, "_can_look", lambda self, scalar: looks)
    loop = zoo_loop()
    good = sentences(3)
    loop.train(good)
    kept = {"theta": loop.theta(), "factors": copy.deepcopy(factors(loop))}
    states = copy.deepcopy(list(loop.optimizer.state.values()))
    x, y = good[0]
    loop.backward(x, y)
    loop.model.position.grad.fill_(torch.nan)
    loop.optimizer.step()
    assert identical(kept, {"theta": loop.theta(), "factors": factors(loop)})
    assert identical(states, list(loop.optimizer.state.values()))
    assert loop.stat("skipped_steps") == 1


# State


@pytest.mark.parametrize("mode", ["reference", "corrected"])
@pytest.mark.parametrize("loaded", ["before attaching", "after attaching"])
def test_resume_in_the_middle_of_an_interval(mode: str, loaded: str) -> None:
    """Bit for bit, also where the model has another name."""

    class Wrapped(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    options = {"mode": mode, "lr": 1e-3, "factor_update_interval": 3}
    batches = sentences(9)
    straight = zoo_loop(**options)
    straight.train(batches)
    first = zoo_loop(**options)
    first.train(batches[:4])
    saved = pickle.loads(pickle.dumps(first.optimizer.state_dict()))
    model = Wrapped(Zoo())
    model.net.load_state_dict(first.model.state_dict())
    if loaded == "before attaching":

        def make(params: Any) -> Any:
            optimizer = making(**options)(params)
            optimizer.load_state_dict(saved)
            return optimizer

        loop = Loop(model, make)
    else:
        loop = Loop(model, making(**options))
        loop.optimizer.load_state_dict(saved)
    loop.train(batches[4:])
    assert torch.equal(straight.theta(), loop.theta())
    assert list(factors(loop)) == [f"net.{name}" for name in factors(straight)]
    renamed = {f"net.{name}": entry for name, entry in factors(straight).items()}
    assert identical(factors(loop), renamed)
    assert identical(straight.optimizer.stats, loop.optimizer.stats)


def damages() -> dict[str, tuple[Callable[[dict[str, Any]], Any], str]]:
    def put(name: str, key: str, value: Any) -> Callable[[dict[str, Any]], Any]:
        return lambda found: found[name].update({key: value})

    return {
        "cut off": (lambda found: found["0"].pop("output"), "'0' have no output"),
        "no dict": (lambda found: found.update({"0": 3}), "must be a dict, got 3"),
        "text": (put("0", "input", "x"), "'input' must be a tensor"),
        "nan": (
            put("0", "input", torch.full((6,), torch.nan)),
            "'input' must be a tensor of finite",
        ),
        "negative": (put("0", "output", -torch.ones(7)), "numbers >= 0"),
        "meta": (put("0", "updates", torch.zeros((), device="meta")), "'updates' must be"),
        "axes": (put("0", "updates", torch.zeros(1)), "'updates' must be"),
        "shape": (put("0", "input", torch.ones(5)), r"must have the shapes \[6\] and \[7\]"),
        "stranger": (put("0", "weight", 17), "number of one of 4 parameters"),
        "nobody": (lambda found: found["0"].update(weight=None, bias=None), "not both be None"),
        "missing": (lambda found: found.pop("2"), r"nothing for the layers \['2'\]"),
        "unexpected": (
            lambda found: found.update({"3": {**found["2"]}}),
            r"\['3'\] in it belong to no layer",
        ),
    }


@pytest.mark.parametrize("how", damages())
def test_damaged_factors_are_refused(how: str) -> None:
    loop = Loop(network(), making())
    loop.train(classification(2))
    state = copy.deepcopy(loop.optimizer.state_dict())
    before = copy.deepcopy(state)
    damage, text = damages()[how]
    damage(state["curvature"]["factors"])
    with pytest.raises(ValueError, match=f"^Cannot load the state into AdaFisher: .*{text}"):
        loop.optimizer.load_state_dict(state)
    assert identical(loop.optimizer.state_dict(), before)
    if how not in ("missing", "unexpected", "shape"):
        return
    # Without a model these are found when there is one.
    optimizer = AdaFisher(network().parameters(), factor_update_interval=1)
    optimizer.load_state_dict(state)
    model = network()
    optimizer = AdaFisher(model.parameters(), factor_update_interval=1)
    optimizer.load_state_dict(state)
    with pytest.raises(ValueError, match=text):
        optimizer.attach_model(model, F.cross_entropy)
    assert optimizer.oracle is None
    assert not any(layer._forward_hooks for layer in model.modules())


def test_squares_of_another_shape_are_refused() -> None:
    loop = zoo_loop()
    loop.train(sentences(1))
    state = copy.deepcopy(loop.optimizer.state_dict())
    state["state"][0]["exp_avg_sq"] = torch.zeros(2)
    with pytest.raises(ValueError, match="'exp_avg_sq' of parameter 0 must be"):
        loop.optimizer.load_state_dict(state)


def test_the_other_mode_is_refused() -> None:
    loop, other = (Loop(network(), making(mode=mode)) for mode in ("reference", "corrected"))
    with pytest.raises(ValueError, match="its mode is 'corrected', here it is 'reference'"):
        loop.optimizer.load_state_dict(other.optimizer.state_dict())


def test_detach_leaves_no_hook_and_can_be_undone() -> None:
    loop, straight = (Loop(network(), making(lr=0.1)) for _ in range(2))
    batches = classification(4)
    straight.train(batches)
    loop.train(batches[:2])
    loop.optimizer.detach()
    assert not any(layer._forward_hooks for layer in loop.model.modules())
    assert inside(loop).fallback_parameters == inside(loop).silent_layers == []
    loop.criterion = loop.optimizer.attach_model(loop.model, F.cross_entropy)
    loop.train(batches[2:])
    assert torch.equal(loop.theta(), straight.theta())
