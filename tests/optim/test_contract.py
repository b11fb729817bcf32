"""The contract of every optimizer of lightning_curvature/registry.py: in plain PyTorch."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature.oracle import MissingCapabilityError
from tests.helpers.families import variants_too
from tests.helpers.optimizer_db import Contract, every_optimizer, state_tensors
from tests.helpers.plain_loop import (
    CLASSES,
    FEATURES,
    HIDDEN,
    OUTPUTS,
    Loop,
    classification,
    half_mse,
    network,
    regression,
)

# The loss falls


class Point(nn.Module):
    """Parameters that are looked at through a function."""

    def __init__(self, start: list[float], look: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.tensor(start, dtype=torch.float64))
        self.look = look

    def forward(self, x: Tensor) -> Tensor:
        return self.look(self.at)


def ellipse(at: Tensor) -> Tensor:
    """Residuals of a quadratic with condition number 100."""
    return at * torch.tensor([1.0, 10.0, 3.0], dtype=torch.float64)


def rosenbrock(at: Tensor) -> Tensor:
    """Residuals of the Rosenbrock function with a = 1, b = 100."""
    return torch.stack([1 - at[0], 10 * (at[1] - at[0] ** 2)])


@every_optimizer
@pytest.mark.parametrize(
    ("look", "start", "steps", "factor"),
    [(ellipse, [1.0, 1.0, -2.0], 100, 1e-3), (rosenbrock, [1.0, -1.0], 100, 1e-2)],
)
def test_loss_falls_on_residuals(
    contract: Contract,
    look: Callable[[Tensor], Tensor],
    start: list[float],
    steps: int,
    factor: float,
) -> None:
    loop = Loop(Point(start, look), contract.making(**contract.steep), half_mse, directional="auto")
    nothing = torch.zeros(1, dtype=torch.float64)
    target = torch.zeros(len(look(loop.model.at)), dtype=torch.float64)
    losses = loop.train([(nothing, target)] * steps)
    # Noise is multiplied by the largest curvature, and limits the rate for the smallest.
    factor = 0.02 if contract.forward_only else factor
    assert losses[-1] < factor * losses[0]


@variants_too
@every_optimizer
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_loss_falls_on_a_network(contract: Contract, task: str) -> None:
    if task == "classification":
        data = classification(4, batch=16, dtype=torch.float32)
        loop = Loop(network(dtype=torch.float32), contract.make, directional="auto")
    else:
        data = regression(4, batch=16, dtype=torch.float32)
        model = network(OUTPUTS, dtype=torch.float32)
        loop = Loop(model, contract.make, half_mse, directional="auto")
    losses = loop.train(data * 10)
    assert sum(losses[-4:]) < 0.5 * contract.slack * sum(losses[:4])


# Closures


@every_optimizer
@pytest.mark.parametrize("attached", [True, False])
def test_the_closure_is_called_once(contract: Contract, attached: bool) -> None:
    """In a step it is run with gradients on, once; extra passes of it run no backward.

    Where nothing is differentiated all passes are alike, without gradients.
    """
    model = network()
    optimizer = contract.make(model.parameters())
    criterion = F.cross_entropy
    if attached:
        criterion = optimizer.attach_model(model, F.cross_entropy)
    (x, y), *_ = classification(1)
    backwards: list[bool] = []
    model[0].weight.register_post_accumulate_grad_hook(lambda p: backwards.append(True))
    calls: list[bool] = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        return loss

    before = [p.detach().clone() for p in model.parameters()]
    with warnings.catch_warnings():
        if not attached:
            warnings.filterwarnings("ignore", message=".*has only a closure to ask.*")
        if not attached and contract.needs_module:
            with pytest.raises(MissingCapabilityError, match="which a bare closure does not tell"):
                optimizer.step(closure)
            assert calls == []
            return
        loss = optimizer.step(closure)
    assert len(backwards) == (not contract.forward_only)
    assert isinstance(loss, Tensor)
    # Some take the mean around the parameters for the loss there.
    tolerance = 1e-3 if contract.forward_only else 1e-6
    expected = float(F.cross_entropy(_with(model, before, x), y))
    assert loss.item() == pytest.approx(expected, rel=tolerance)
    assert calls[0] is not contract.forward_only
    if attached and not contract.info.asks:
        assert len(calls) == 1
    assert not torch.equal(before[0], model[0].weight)


def _with(model: nn.Module, values: list[Tensor], x: Tensor) -> Tensor:
    named = dict(zip((name for name, _ in model.named_parameters()), values, strict=True))
    return torch.func.functional_call(model, named, (x,))


@every_optimizer
def test_a_bare_closure_trains_and_says_what_it_lacks(contract: Contract) -> None:
    if not contract.records or contract.needs_module:
        pytest.skip("does not ask the closure")
    model = network()
    optimizer = contract.make(model.parameters())
    (x, y), *_ = classification(1, batch=32)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    without_backward = contract.forward_only
    derivatives = "" if without_backward else "curvature comes from finite differences, and "
    text = (
        f"{contract.info.cls.__name__} has only a closure to ask: {derivatives}BatchNorm "
        "statistics and metrics see every extra pass. optimizer.attach_model(model, loss_fn) "
        f"removes {'this limit' if without_backward else 'both limits'}."
    )
    with pytest.warns(RuntimeWarning, match=f"^{re.escape(text)}$") as record:
        losses = [optimizer.step(closure).item() for _ in range(30)]
    assert len(record) == 1
    assert record[0].filename == __file__
    assert losses[-1] < (0.85 if contract.forward_only else 0.5) * losses[0]


# Missing gradients


@every_optimizer
@pytest.mark.parametrize("frozen", [0, 2])
def test_parameters_without_a_gradient_stay(contract: Contract, frozen: int) -> None:
    """Frozen for a while, then trained."""
    batches = classification(6, batch=32)
    loop = Loop(network(), contract.make)
    loop.model[frozen].requires_grad_(False)
    before = {name: p.detach().clone() for name, p in loop.model.named_parameters()}
    loop.train(batches[:3])
    for name, p in loop.model.named_parameters():
        assert torch.equal(p, before[name]) == name.startswith(str(frozen)), name
    loop.model[frozen].requires_grad_(True)
    loop.train(batches[3:])
    for name, p in loop.model.named_parameters():
        assert not torch.equal(p, before[name]), name
        assert bool(torch.isfinite(p).all())


@every_optimizer
def test_an_unused_parameter_stays(contract: Contract) -> None:
    """Unless nobody knows that it is unused: without gradients it moves like the others."""

    class WithUnused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
            self.used = network()

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    plain = Loop(network(), contract.make)
    loop = Loop(WithUnused(), contract.make)
    batches = classification(3)
    losses = loop.train(batches)
    if contract.forward_only:
        assert not torch.equal(loop.model.unused, torch.ones(2, dtype=torch.float64))
        assert loop.is_finite()
        return
    if "hvp" not in contract.info.asks:  # probes are drawn for all parameters, in their order
        assert losses == plain.train(batches)
    assert torch.equal(loop.model.unused, torch.ones(2, dtype=torch.float64))


@every_optimizer
def test_a_step_without_any_gradient_changes_nothing(contract: Contract) -> None:
    (batch,) = classification(1)
    for trained_before in (False, True):
        loop = Loop(network(), contract.make)
        if trained_before:
            loop.step(*batch)
        weights, state = loop.theta(), state_tensors(loop.optimizer)
        steps = loop.optimizer.state_dict()["curvature"]["steps_done"]
        loop.optimizer.zero_grad()
        if contract.forward_only:
            # It would not have had one anyway: what is missing is the loss.
            text = f"^{contract.info.cls.__name__} found no recorded loss. Compute the loss with"
            with pytest.raises(MissingCapabilityError, match=text):
                loop.optimizer.step()
        else:
            assert loop.optimizer.step() is None
        assert torch.equal(loop.theta(), weights)
        after = state_tensors(loop.optimizer)
        assert after.keys() == state.keys()
        assert all(torch.equal(after[name], state[name]) for name in state)
        assert loop.optimizer.state_dict()["curvature"]["steps_done"] == steps
        loop.step(*batch)
        assert not torch.equal(loop.theta(), weights)


@every_optimizer
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("complex", marks=pytest.mark.feature("Models", "complex parameters")),
        pytest.param("sparse", marks=pytest.mark.feature("Models", "sparse gradients")),
    ],
)
def test_unsupported_tensors_are_refused(contract: Contract, kind: str, refused: Any) -> None:
    name = contract.info.cls.__name__
    if kind == "complex":
        parameter = nn.Parameter(torch.ones(2, dtype=torch.complex64))
        with pytest.raises(TypeError, match=f"^{name} does not support complex parameters.$"):
            contract.make([parameter])
        optimizer = contract.make([nn.Parameter(torch.ones(2))])
        with pytest.raises(TypeError, match=f"^{name} does not support complex parameters.$"):
            optimizer.add_param_group({"params": [parameter]})
        assert len(optimizer.param_groups) == 1
        refused(f"{name} does not support complex parameters.")
        return
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Flatten(), nn.Linear(6, 2))
    loop = Loop(model, contract.make, directional="auto")
    before = loop.theta()
    batch = torch.tensor([[0, 1], [2, 3]]), torch.tensor([0, 1])
    if contract.forward_only:
        losses = loop.train([batch] * 20)
        assert losses[-1] < losses[0]
        return
    with pytest.raises(RuntimeError, match=f"^{name} does not support sparse gradients.$"):
        loop.step(*batch)
    assert torch.equal(loop.theta(), before)
    refused(f"{name} does not support sparse gradients.")


# Gradients and shapes


@every_optimizer
def test_gradients_are_as_the_backward_left_them(contract: Contract) -> None:
    """Callbacks and monitors read them after the step; forward passes alone leave none."""
    loop = Loop(network(), contract.make)
    for x, y in classification(2):
        loop.backward(x, y)
        if contract.forward_only:
            loop.optimizer.step()
            assert all(p.grad is None for p in loop.model.parameters())
            continue
        before = [p.grad.clone() for p in loop.model.parameters()]
        loop.optimizer.step()
        for p, grad in zip(loop.model.parameters(), before, strict=True):
            assert torch.equal(p.grad, grad)


@every_optimizer
def test_shapes(contract: Contract) -> None:
    """0-dim, empty and one-element parameters."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
            self.empty = nn.Parameter(torch.zeros(0, dtype=torch.float64))
            self.first = nn.Linear(FEATURES, HIDDEN, dtype=torch.float64)
            self.out = nn.Linear(HIDDEN, CLASSES, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * self.out(torch.tanh(self.first(x))) + self.empty.sum()

    loop = Loop(Odd(), contract.make)
    losses = loop.train(classification(1, batch=32) * 20)
    assert losses[-1] < min(0.7 * contract.slack, 0.9) * losses[0]
    assert loop.model.scale.item() != 1.0
