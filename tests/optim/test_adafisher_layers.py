"""`AdaFisher`: what counts as a look at a layer, and who owns which parameter."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_curvature import AdaFisher
from lightning_curvature.curvature.layers import layer_moments
from lightning_curvature.oracle.protocol import MissingCapabilityError
from tests.helpers.adafisher import (
    EXACT,
    factors,
    inside,
    making,
    sentences,
    theta,
    zoo_loop,
)
from tests.helpers.optimizer_db import identical
from tests.helpers.plain_loop import CLASSES, FEATURES, Loop, classification, network

# Which passes count


class Disturbed(nn.Module):
    """Runs its network once more, in ways that must not count."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.net = network()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "checkpoint":
            return checkpoint(self.net, x, use_reentrant=False)
        if self.how == "no_grad":
            with torch.no_grad():
                self.net(2 * x)
        if self.how == "forward":
            self.net(2 * x)
        return self.net(x)


@pytest.mark.parametrize("how", ["checkpoint", "no_grad", "forward", "evaluation"])
def test_other_passes_do_not_count(how: str) -> None:
    quiet, loop = (Loop(Disturbed(word), making(lr=0.1)) for word in ("", how))
    for x, y in classification(3):
        quiet.step(x, y)
        if how == "evaluation":
            loop.model.eval()
            F.cross_entropy(loop.model(2 * x), y)
            loop.model.train()
        loop.step(x, y)
    assert torch.equal(quiet.theta(), loop.theta())


def test_nothing_is_watched_between_refreshes() -> None:
    loop = Loop(network(), making(factor_update_interval=3))
    before = None
    for step, (x, y) in enumerate(classification(6)):
        loop.step(x, y)
        assert (before is not None and identical(before, factors(loop))) == (step % 3 != 0)
        before = copy.deepcopy(factors(loop))
        assert ("curvature_drift" in loop.optimizer.stats) is True
    assert factors(loop)["0"]["updates"] == 2


def test_a_compiled_model_is_looked_at_in_an_extra_pass() -> None:
    plain = Loop(network(), making(lr=0.1, factor_update_interval=2))
    loop = Loop(torch.compile(network(), backend="eager"), making(lr=0.1, factor_update_interval=2))
    for x, y in classification(4):
        plain.step(x, y)
        loop.step(x, y)
    torch.testing.assert_close(plain.theta(), loop.theta(), **EXACT)
    assert [entry["updates"] for entry in factors(loop).values()] == [2, 2]
    assert not inside(loop).silent_layers


# Layers


def test_all_kinds_of_layers_train() -> None:
    loop = zoo_loop()
    before = theta(loop)
    losses = loop.train(sentences(1) * 30)
    assert losses[-1] < 0.7 * losses[0]
    for name, p in loop.model.named_parameters():
        assert not torch.equal(p, before[name]), name
    assert inside(loop).silent_layers == []
    attention = [f"attention.{n}" for n in ("in_proj_weight", "in_proj_bias")]
    attention += [f"attention.out_proj.{n}" for n in ("weight", "bias")]
    assert inside(loop).fallback_parameters == ["position", *attention]
    assert all(entry["updates"] == 30 for entry in factors(loop).values())


def test_tied_weight_has_the_sum_of_its_diagonals() -> None:
    loop = zoo_loop(lr=0.0)
    loop.train(sentences(1))
    found, own = factors(loop), inside(loop)
    one, two = found["embedding"], found["head"]
    assert one["weight"] == two["weight"]
    total = torch.outer(one["input"], one["output"]) + torch.outer(two["output"], two["input"])
    assert own._diagonals is not None
    diagonal = own._diagonals[one["weight"]]
    assert isinstance(diagonal, Tensor)
    mean = sum(entry["input"].mean() * entry["output"].mean() for entry in (one, two))
    torch.testing.assert_close(diagonal, total / mean, **EXACT)


def test_shared_layer_sums_over_its_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(CLASSES, CLASSES, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            self.calls = [x, self.layer(x).tanh()]
            self.outputs = [self.layer(part) for part in self.calls]
            return self.outputs[0] + self.outputs[1]

    model = Twice()
    loop = Loop(model, making(lr=0.0))
    x, y = torch.randn(5, CLASSES, dtype=torch.float64), torch.randint(CLASSES, (5,))
    loop.step(x, y)
    found = factors(loop)["layer"]
    # Three calls: the first feeds the activation.
    loss = F.cross_entropy(model(x), y)
    hidden = model.layer(x)
    loss = F.cross_entropy(model.layer(x) + model.layer(hidden.tanh()), y)
    (inner,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    output = model.layer(x) + model.layer(hidden.tanh())
    (outer,) = torch.autograd.grad(F.cross_entropy(output, y), output)
    calls = [(x, inner), (x, outer), (hidden.tanh().detach(), outer)]
    moments = [layer_moments(model.layer, given, grad) for given, grad in calls]
    inputs = sum(m.input for m in moments) / 15
    outputs = sum(m.output for m in moments)
    torch.testing.assert_close(found["input"], inputs, **EXACT)
    torch.testing.assert_close(found["output"], outputs / outputs.sum(), **EXACT)


def test_parameters_without_a_layer_follow_their_squared_gradient() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(CLASSES, FEATURES, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.T

    loop = Loop(Bare(), making(lr=0.3, damping=0.5))
    assert inside(loop).fallback_parameters == ["weight"]
    loop.step(*classification(1)[0])
    g = loop.model.weight.grad
    expected = -0.3 * 1.5 * g / (g.square() / g.square().mean() + 0.5)
    torch.testing.assert_close(loop.model.weight.detach(), expected, **EXACT)


def test_a_layer_that_joins_later() -> None:
    model = network()
    loop = Loop(model, making(), groups=lambda model: model[0].parameters())
    batches = classification(4)
    loop.train(batches[:2])
    before = theta(loop)
    loop.optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 0.1})
    assert inside(loop).fallback_parameters == []
    loop.train(batches[2:])
    assert {name: int(entry["updates"]) for name, entry in factors(loop).items()} == {
        "0": 4,
        "2": 2,
    }
    assert not torch.equal(model[2].weight, before["2.weight"])


def test_groups_that_a_callback_replaces() -> None:
    """Lightning's finetuning callbacks write to ``param_groups`` when they resume."""
    model = network()
    loop = Loop(model, making(), groups=lambda model: model[2].parameters())
    batches = classification(4)
    loop.train(batches[:2])
    group = loop.optimizer.param_groups[0]
    kept = copy.deepcopy(factors(loop)["2"])
    everything = list(model.parameters())
    loop.optimizer.param_groups = [{**group, "params": everything}]
    state = copy.deepcopy(loop.optimizer.state_dict())
    loop.optimizer.load_state_dict(state)
    assert identical(factors(loop)["2"], {**kept, "weight": 2, "bias": 3})
    loop.train(batches[2:])
    assert {name: int(entry["updates"]) for name, entry in factors(loop).items()} == {
        "0": 2,
        "2": 4,
    }


def test_a_layer_without_a_gradient_keeps_its_factors() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()
            self.side = nn.Linear(FEATURES, CLASSES, dtype=torch.float64)
            self.gate = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) + self.gate * self.side(x)

    loop = Loop(Gated(), making())
    batches = classification(3)
    loop.train(batches[:1])
    before = copy.deepcopy(factors(loop)["side"])
    loop.model.gate = 0.0  # called, with a gradient of zero
    loop.train(batches[1:])
    assert identical(factors(loop)["side"], before)
    assert loop.stat("skipped_refreshes") == 0
    assert loop.is_finite()


def test_a_compiled_method_is_found() -> None:
    class Compiled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()
            self.head = torch.compile(self.net.forward, backend="eager")

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x)

    loop = Loop(Compiled(), making())
    loop.train(classification(2))
    assert [entry["updates"] for entry in factors(loop).values()] == [2, 2]


def test_a_bare_closure_is_refused() -> None:
    model = network()
    optimizer = AdaFisher(model.parameters())
    with pytest.raises(MissingCapabilityError, match=r"Call optimizer\.attach_model"):
        optimizer.step(lambda: F.cross_entropy(model(torch.ones(1, FEATURES)), torch.ones(1)))
