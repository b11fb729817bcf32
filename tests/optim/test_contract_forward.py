"""The contract of the optimizers that run no backward: what the loss is asked.

Files under test: optim/zeroth_order.py, oracle/plain.py, oracle/closure.py.
"""

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature.oracle import MissingCapabilityError
from tests.helpers.optimizer_db import Contract, every_forward_only, identical
from tests.helpers.plain_loop import Loop, classification, network

# What the way there and back may add to a weight of float64.
ROUND_OFF = {"rtol": 0.0, "atol": 1e-14}


def passes_per_step(contract: Contract) -> int:
    """Return how often a step evaluates the loss when the main pass counts as one of them."""
    samples = contract.options.get("num_samples", 1)
    name = contract.info.name
    if name == "zoconservative":
        return 5
    # Slopes come from passes with tangents.
    return {
        "hizoo": 1 + 2 * samples,
        "hizool": 1 + 2 * samples,
        "forwardgradient": 1 + samples,
    }.get(name, 2 * samples)


class Counting(nn.Module):
    """A network that notes what its passes are like.

    Attributes:
        seen: Of every pass: whether a gradient could be taken, and the mode.
        outputs: Whether outputs had a graph.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()
        self.seen: list[tuple[bool, bool]] = []
        self.outputs: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((torch.is_grad_enabled(), self.training))
        output = self.inner(x)
        self.outputs.append(output.requires_grad)
        return output


def closure_loop(contract: Contract, model: nn.Module, **options: Any) -> Any:
    """Return the optimizer, and a function that takes a step by a closure that returns the loss."""
    optimizer = contract.make(model.parameters(), **options)
    criterion = optimizer.attach_model(model, F.cross_entropy, directional="jvp")
    return optimizer, lambda x, y: optimizer.step(lambda: criterion(model(x), y))


# Passes


@every_forward_only
def test_passes(contract: Contract) -> None:
    """As many as the docstring says, without a graph; the ordinary loop needs one more."""
    (x, y), *_ = classification(1)
    model = Counting()
    _, step = closure_loop(contract, model)
    for _ in range(2):
        model.seen.clear()
        loss = step(x, y)
        assert len(model.seen) == passes_per_step(contract)
    assert not any(grad for grad, _ in model.seen)
    assert not any(model.outputs)
    assert loss.requires_grad is False
    assert all(p.grad is None for p in model.parameters())
    loop = Loop(Counting(), contract.make)
    loop.step(x, y)
    away = contract.info.name in ("mezo", "zoadam", "zomomentum", "zosignsgd")
    assert len(loop.model.seen) == passes_per_step(contract) + away
    assert not any(loop.model.outputs)


@every_forward_only
@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_counts(contract: Contract, training: bool) -> None:
    model = Counting().train(training)
    _, step = closure_loop(contract, model)
    step(*classification(1)[0])
    assert {mode for _, mode in model.seen} == {training}
    model = Counting().train(training)
    _, step = closure_loop(contract, model, model_mode="eval")
    step(*classification(1)[0])
    assert {mode for _, mode in model.seen} == {False}
    assert model.training is training


@every_forward_only
def test_random_numbers_of_others(contract: Contract) -> None:
    """A step draws nothing from the global generators: dropout draws once, in the main pass."""
    model = nn.Sequential(nn.Dropout(0.5), network())
    _, step = closure_loop(contract, model)
    (x, y), *_ = classification(1)

    def drawn() -> tuple[Any, ...]:
        return torch.rand(3).tolist(), random.random(), np.random.rand()  # noqa: NPY002

    def reset() -> None:
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)  # noqa: NPY002

    reset()
    F.dropout(x, 0.5)
    expected = drawn()
    reset()
    step(x, y)
    assert drawn() == expected


# What closures may be


def returning(kind: str, model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Any]:
    """Return a closure that tells its loss in one of several ways."""

    def closure() -> Any:
        loss = F.cross_entropy(model(x), y)
        if kind == "backward":
            model.zero_grad()
            loss.backward()
            return None
        if kind == "two backwards":
            (0.25 * loss).backward()
            (0.75 * loss).backward()
            return {"loss": loss}
        return {"tensor": loss, "one entry": loss.reshape(1), "number": loss.item()}[kind]

    return closure


@every_forward_only
@pytest.mark.filterwarnings("ignore:.*has only a closure to ask:RuntimeWarning")
@pytest.mark.parametrize("kind", ["backward", "two backwards", "one entry", "number"])
def test_closures_may_tell_the_loss_in_any_way(contract: Contract, kind: str) -> None:
    if contract.needs_module:
        pytest.skip("needs a model")
    weights, losses = [], []
    for each in ("tensor", kind):
        model = network()
        optimizer = contract.make(model.parameters())
        losses = [optimizer.step(returning(each, model, x, y)) for x, y in classification(3)]
        weights.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    torch.testing.assert_close(*weights, rtol=0, atol=1e-9)
    assert type(losses[0]) is {"backward": type(None), "two backwards": dict}.get(
        kind, float if kind == "number" else Tensor
    )


@every_forward_only
@pytest.mark.filterwarnings("ignore:.*has only a closure to ask:RuntimeWarning")
@pytest.mark.parametrize(
    ("result", "error", "text"),
    [
        ((1.0, 2.0), TypeError, "a scalar tensor or a number; got tuple"),
        ("loss", TypeError, "a scalar tensor or a number; got str"),
        (torch.ones(3), ValueError, r"one loss; got a tensor of shape \[3\]"),
    ],
)
def test_what_is_no_loss_is_refused(
    contract: Contract, result: Any, error: type[Exception], text: str
) -> None:
    if contract.needs_module:
        pytest.skip("needs a model")
    model = network()
    optimizer = contract.make(model.parameters())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=text):
        optimizer.step(lambda: result)
    torch.testing.assert_close(model.state_dict(), before, **ROUND_OFF)
    # No loss at all is no mistake: the batch was not one to train on.
    assert optimizer.step(lambda: None) is None
    torch.testing.assert_close(model.state_dict(), before, **ROUND_OFF)
    optimizer.step(returning("tensor", model, *classification(1)[0]))
    assert not identical(dict(model.state_dict()), dict(before))


@every_forward_only
def test_a_number_has_no_derivative(contract: Contract) -> None:
    """Differences of losses need none."""
    model = network()
    optimizer = contract.make(model.parameters())
    criterion = optimizer.attach_model(model, F.cross_entropy)
    (x, y), *_ = classification(1)
    if "slope" not in contract.info.asks:
        assert type(optimizer.step(lambda: criterion(model(x), y).item())) is float
        return
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TypeError, match="a number has no derivative"):
        optimizer.step(lambda: criterion(model(x), y).item())
    assert identical(dict(model.state_dict()), dict(before))


@every_forward_only
@pytest.mark.parametrize(
    ("error", "restore"), [(KeyboardInterrupt, "fused"), (ValueError, "snapshot")]
)
def test_an_interrupt_in_any_pass(
    contract: Contract, error: type[BaseException], restore: str
) -> None:
    """The weights are back where they were, the step has not been taken, and the next one works."""
    options = {"restore": restore} if contract.takes("restore") else {}
    batches = classification(3)
    passes = passes_per_step(contract)
    for position in sorted({0, 1, passes // 2, passes - 1}):
        model = Counting()
        optimizer, step = closure_loop(contract, model, **options)
        step(*batches[0])
        before = copy.deepcopy(model.state_dict())
        state = copy.deepcopy(optimizer.state_dict())
        start = len(model.seen)

        def fail(module: nn.Module, *_: Any) -> None:
            if len(module.seen) - start > position:  # noqa: B023
                raise error

        handle = model.register_forward_hook(fail)
        with pytest.raises(error):
            step(*batches[1])
        handle.remove()
        tolerance = {"rtol": 0.0, "atol": 0.0} if restore == "snapshot" else ROUND_OFF
        torch.testing.assert_close(model.state_dict(), before, **tolerance)
        assert identical(optimizer.state_dict(), state)
        step(*batches[2])
        assert all(bool(p.isfinite().all()) for p in model.parameters())


@every_forward_only
def test_gradients_of_others_are_left_alone(contract: Contract) -> None:
    """Those that a user has computed for purposes of their own."""
    model = network()
    optimizer, step = closure_loop(contract, model)
    grads = []
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
        grads.append(p.grad)
    for batch in classification(2):
        step(*batch)
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert p.grad is grad
        assert bool((grad == 7.0).all())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@every_forward_only
def test_without_gradients_around_it(contract: Contract) -> None:
    """A closure may be run where gradients are off; a loss computed there is no training loss."""
    batches = classification(3)
    thetas = []
    for context in (torch.enable_grad, torch.no_grad):
        model = network()
        _, step = closure_loop(contract, model)
        with context():
            for batch in batches:
                step(*batch)
        thetas.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    assert torch.equal(*thetas)
    loop = Loop(network(), contract.make)
    with torch.no_grad():
        loop.criterion(loop.model(batches[0][0]), batches[0][1])
        with pytest.raises(MissingCapabilityError, match=r"outside of torch\.no_grad\(\)"):
            loop.optimizer.step()
