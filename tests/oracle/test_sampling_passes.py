"""Tests of sampling on the graph of the main pass (oracle/recorded.py): no trace, every loop.

`ContentSampler` gives an example the same label however it is computed, so that most estimates can
be compared exactly.
"""

import gc
import random
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_curvature import SophiaG, in_extra_pass
from lightning_curvature.oracle import ClosureOracle, NoLossCapturedError
from lightning_curvature.oracle.plans import ProbePlan
from tests.helpers.dense import build
from tests.helpers.estimates import backward, flat, sampling, squares, watched
from tests.helpers.labels import ContentSampler
from tests.helpers.losses import inputs, labels, values

CONTENT = sampling(sampler=ContentSampler)
SQUARED = ("micro_batch", "window")


def _random_state() -> tuple[Any, ...]:
    return (
        torch.get_rng_state().tolist(),
        random.getstate(),
        [np.asarray(part).tolist() for part in np.random.get_state()],  # noqa: NPY002
    )


# No trace


@pytest.mark.parametrize("again", [False, True])
def test_nothing_is_left_behind(again: bool) -> None:
    """Gradients, statistics of batch normalization, random numbers: as without an estimate."""
    outcomes = []
    for plan in (None, sampling(again=again)):
        torch.manual_seed(3)
        model = build("batch-norm-dropout")
        oracle = watched(model, plan)
        backward(oracle, (inputs(), labels(), 0.5), (inputs().flip(0), labels(), 0.5))
        if plan is not None:
            assert flat(oracle.sampled_squares()).any()
        buffers = [b.clone() for b in model.buffers()]
        outcomes.append([*[p.grad for p in model.parameters()], *buffers, _random_state()])
    for one, other in zip(*outcomes, strict=True):
        same = torch.equal(one, other) if isinstance(one, Tensor) else one == other
        assert same


def test_hooks_of_the_user_can_tell() -> None:
    model = build("linear-bias")
    seen: list[bool] = []
    model.register_forward_hook(
        lambda _, args, out: (out.register_hook(lambda g: seen.append(in_extra_pass())), None)[1]
    )
    backward(watched(model, CONTENT), (inputs(), labels()))
    assert seen == [True, False]  # the sample, and the backward of the user


def test_the_graph_is_still_there_for_the_user() -> None:
    model = build("conv")
    oracle = watched(model, CONTENT)
    loss = oracle.criterion(model(inputs()), labels())
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    again = torch.autograd.grad(loss, list(model.parameters()))
    assert torch.equal(flat(first), flat(again))


def test_a_pass_of_its_own_finds_the_same() -> None:
    """Dropout, batch normalization, and parameters that have not moved."""
    model = build("batch-norm-dropout")
    batches = [(inputs(), labels(), 0.3), (inputs().flip(0), labels(), 0.7)]
    found = []
    for again in (False, True):
        torch.manual_seed(5)
        oracle = watched(model, sampling(sampler=ContentSampler, again=again))
        found.append(squares(oracle, *batches))
    torch.testing.assert_close(*found)


def test_a_pass_of_its_own_is_at_the_present_parameters() -> None:
    model = build("linear-bias")
    oracle = watched(model, sampling(sampler=ContentSampler, again=True))
    backward(oracle, (inputs(), labels()))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    moved = flat(oracle.sampled_squares())
    torch.testing.assert_close(moved, squares(watched(model, CONTENT), (inputs(), labels())))


# Models and precisions


class Checkpointed(nn.Module):
    """Recomputes its hidden layer in the backward."""

    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.3), nn.Tanh()).double()
        self.out = nn.Linear(6, 4).double()
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        if not self.recompute:
            return self.out(self.hidden(x))
        return self.out(checkpoint(self.hidden, x, use_reentrant=False))


def test_activation_checkpointing() -> None:
    found = []
    for recompute in (False, True):
        torch.manual_seed(1)
        model = Checkpointed(recompute)
        oracle = watched(model, CONTENT)
        estimate = squares(oracle, (inputs(), labels()), (inputs().flip(0), labels()))
        found.append(torch.cat([estimate, flat([p.grad for p in oracle.params])]))
        assert not oracle._passes_again
    assert torch.equal(*found)


def test_autocast() -> None:
    model = build("conv", torch.float32)
    x, y = inputs(torch.float32), labels()
    full = squares(watched(model, sampling()), (x, y))
    oracle = watched(model, sampling())
    with torch.autocast("cpu", torch.bfloat16):
        backward(oracle, (x, y))
    found = flat(oracle.sampled_squares())
    assert found.dtype == torch.float32
    assert 0 < float((found - full).norm() / full.norm()) < 0.05


def test_half_precision_parameters() -> None:
    model = build("linear-bias", torch.float32)
    full = squares(watched(model, sampling()), (inputs(torch.float32), labels()))
    model = build("linear-bias", torch.bfloat16)
    found = squares(watched(model, sampling()), (inputs(torch.bfloat16), labels()))
    assert found.dtype == torch.float32
    assert float((found - full).norm() / full.norm()) < 0.1


def test_a_compiled_model_takes_a_pass_of_its_own() -> None:
    expected = squares(watched(build("linear-bias"), CONTENT), (inputs(), labels()))
    runs: list[bool] = []

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.compile(build("linear-bias"), backend="eager")

        def forward(self, x: Tensor) -> Tensor:
            runs.append(in_extra_pass())
            return self.inner(x)

    oracle = watched(Outer(), CONTENT)
    torch.testing.assert_close(squares(oracle, (inputs(), labels())), expected)
    assert runs == [False, True]


def test_frozen_and_unused_parameters() -> None:
    for name in ("frozen-layer", "unused-parameter"):
        model = build(name)
        oracle = watched(model, CONTENT)
        backward(oracle, (inputs(), labels()))
        found = oracle.sampled_squares()
        active = [p for p in model.parameters() if p.grad is not None]
        assert len(active) < len(list(model.parameters()))
        assert [x.shape for x in found] == [p.shape for p in active]
        assert all(bool(x.any()) for x in found)


def test_a_parameter_without_a_part_in_this_loss() -> None:
    """It has a gradient all the same, of zeros."""
    model = build("unused-parameter")
    oracle = watched(model, CONTENT)
    backward(oracle, (inputs(), labels()))
    model.unused.grad = torch.zeros_like(model.unused)
    oracle.select(oracle.params)
    assert not oracle.sampled_squares()[0].any()


# Loops


def _zero(oracle: Any, how: str) -> None:
    oracle.zeroed()
    for p in oracle.params:
        if how == "none":
            p.grad = None
        elif p.grad is not None:
            p.grad.zero_()


@pytest.mark.parametrize("how", ["none", "zeros"])
@pytest.mark.parametrize("order", ["first", "before the backward", "last"])
@pytest.mark.parametrize("squared", SQUARED)
def test_when_gradients_are_set_to_zero(squared: Any, order: str, how: str) -> None:
    model = build("linear-bias")
    oracle = watched(model, sampling(squared=squared, sampler=ContentSampler))
    expected = squares(oracle, (inputs(), labels()))
    for _ in range(2):
        oracle.clear()
        if order == "first":
            _zero(oracle, how)
        loss = oracle.criterion(model(inputs()), labels())
        if order == "before the backward":
            _zero(oracle, how)
        loss.backward()
        oracle.select(oracle.params)
        torch.testing.assert_close(flat(oracle.sampled_squares()), expected)
        if order == "last":
            _zero(oracle, how)


@pytest.mark.parametrize("by", ["optimizer", "model"])
@pytest.mark.parametrize("squared", SQUARED)
def test_a_skipped_step_leaves_nothing(squared: Any, by: str) -> None:
    """As a scaler skips one whose gradients overflowed."""
    model = build("linear-bias")
    oracle = watched(model, sampling(squared=squared, sampler=ContentSampler))
    expected = squares(oracle, (inputs(), labels(), 0.5), (inputs().flip(0), labels(), 0.5))
    backward(oracle, (inputs() * 9, labels()), (inputs() * 8, labels()))
    if by == "optimizer":
        oracle.zeroed()
    model.zero_grad()
    for x in (inputs(), inputs().flip(0)):
        (oracle.criterion(model(x), labels()) / 2).backward()
    oracle.select(oracle.params)
    torch.testing.assert_close(flat(oracle.sampled_squares()), expected)


@pytest.mark.parametrize("squared", SQUARED)
def test_a_loss_that_is_only_looked_at(squared: Any) -> None:
    """It has no part in the estimate, and takes its sample along."""
    model = build("linear-bias")
    oracle = watched(model, sampling(squared=squared, sampler=ContentSampler))
    expected = squares(oracle, (inputs(), labels()))
    backward(oracle)
    for _ in range(5):
        oracle.criterion(model(inputs() * 3), labels()).item()
    assert len(oracle._samples._waiting) <= 1
    oracle.criterion(model(inputs()), labels()).backward()
    oracle.criterion(model(inputs() * 3), labels()).item()
    oracle.select(oracle.params)
    torch.testing.assert_close(flat(oracle.sampled_squares()), expected)


def test_the_step_over_everything_is_free() -> None:
    model = build("linear-bias")
    oracle = watched(model, CONTENT)
    backward(oracle, (inputs(), labels()))
    oracle.sampled_squares()
    record = weakref.ref(oracle.records[0])
    samples = weakref.ref(oracle._samples)
    oracle.clear()
    gc.collect()
    assert record() is None
    assert samples() is None


def test_the_scale_of_a_scaler_does_not_enter() -> None:
    model = build("linear-bias", torch.float32)
    x, y = inputs(torch.float32), labels()
    expected = squares(watched(model, CONTENT), (x, y))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    oracle = watched(model, CONTENT, grad_scaler=scaler)
    backward(oracle)
    scaler.scale(oracle.criterion(model(x), y)).backward()
    assert float(model.bias.grad.norm()) > 10
    oracle.select(oracle.params)
    torch.testing.assert_close(flat(oracle.sampled_squares()), expected)


# Closures


def _closure_oracle(model: nn.Module, plan: Any, known: bool) -> ClosureOracle:
    oracle = ClosureOracle(list(model.parameters()), model if known else None)
    oracle.plan = lambda: plan
    return oracle


@pytest.mark.parametrize("known", [False, True], ids=["bare", "module"])
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("squared", SQUARED)
def test_a_closure_with_several_backwards(squared: Any, again: bool, known: bool) -> None:
    model = build("linear-bias")
    plan = sampling(squared=squared, sampler=ContentSampler, again=again)
    oracle = _closure_oracle(model, plan, known)
    params = list(model.parameters())

    def run() -> Tensor:
        model.zero_grad()
        first = 0.25 * F.cross_entropy(model(inputs()), labels())
        first.backward()
        second = 0.5 * F.huber_loss(model(inputs().flip(0)), values())
        second.backward()
        return first + second

    oracle.evaluate(run)
    grads = flat([p.grad for p in params])
    oracle.select(params)
    found = flat(oracle.sampled_squares())
    assert torch.equal(flat([p.grad for p in params]), grads)

    def loss(z: Tensor, y: Any) -> Tensor:
        classes, regression = z.chunk(2)
        return 0.25 * F.cross_entropy(classes, labels()) + 0.5 * F.huber_loss(regression, values())

    both = torch.cat([inputs(), inputs().flip(0)])
    one = squares(watched(model, CONTENT, loss), (both, None))
    parts = [
        squares(watched(model, CONTENT, part), (x, y))
        for part, x, y in (
            (lambda z, y: 0.25 * F.cross_entropy(z, y), inputs(), labels()),
            (lambda z, t: 0.5 * F.huber_loss(z, t), inputs().flip(0), values()),
        )
    ]
    # A pass of its own sees one loss; on the graphs there are two backwards, squared apart.
    apart = squared == "micro_batch" and not again
    torch.testing.assert_close(found, parts[0] + parts[1] if apart else one)


def test_samples_are_not_taken_for_losses_of_the_closure() -> None:
    """The loss of an estimate is called by us; a further question must find those of the user."""
    model = build("linear-bias")
    oracle = _closure_oracle(model, CONTENT, known=True)
    params = list(model.parameters())

    def run() -> Tensor:
        model.zero_grad()
        for x in (inputs(), inputs().flip(0)):
            loss = F.huber_loss(model(x), values())
            torch.autograd.backward(loss)  # unlike the method it runs while losses are captured
        return loss

    oracle.evaluate(run)
    oracle.select(params)
    oracle.sampled_squares()
    direction = [torch.ones_like(p) for p in params]
    assert float(oracle.directional(direction).curvature) > 0
    assert oracle.records[0].num_calls == 2


def test_a_bare_closure_of_an_optimizer() -> None:
    model = build("linear-bias")
    optimizer = SophiaG(model.parameters(), lr=0.01)
    optimizer.sampler = ContentSampler

    def run() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs()), labels())
        loss.backward()
        return loss

    expected = squares(watched(build("linear-bias"), CONTENT), (inputs(), labels()))
    with pytest.warns(RuntimeWarning, match="SophiaG has only a closure to ask"):
        optimizer.step(run)
    found = flat([optimizer.state[p]["hess_diag"] for p in model.parameters()])
    torch.testing.assert_close(found, 0.01 * expected)


# Errors


def test_asking_without_a_plan() -> None:
    model = build("linear-bias")
    for plan in (None, ProbePlan(lambda params, index: [torch.ones_like(p) for p in params])):
        oracle = watched(model, plan)
        backward(oracle, (inputs(), labels()))
        with pytest.raises(RuntimeError, match=r"^Samples were not planned for this step\.$"):
            oracle.sampled_squares()


@pytest.mark.parametrize("loss", [lambda z, y: z.square().mean(), lambda z, y: F.mse_loss(y, y)])
def test_a_loss_of_unknown_curvature(loss: Callable[..., Tensor]) -> None:
    model = build("linear-bias")
    oracle = watched(model, CONTENT, lambda z, y: z.sum() * 0 + loss(z, y))
    backward(oracle, (inputs(), values()))
    with pytest.raises(NoLossCapturedError, match="The curvature of the loss is unknown"):
        oracle.sampled_squares()


class Reentrant(nn.Module):
    """Recomputes a part in the backward, by the kind that has no graph in between."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.first = first
        self.inner = build("linear-bias")

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return checkpoint(self.inner, self.first(x), use_reentrant=True)


@pytest.mark.parametrize("first", ["linear", "nothing"])
@pytest.mark.parametrize("again", [False, True])
def test_reentrant_checkpointing_is_named(first: str, again: bool) -> None:
    """Where no parameter comes before it torch would find zeros."""
    before = nn.Linear(5, 5, dtype=torch.float64) if first == "linear" else nn.Identity()
    oracle = watched(Reentrant(before), sampling(again=again))
    backward(oracle, (inputs().requires_grad_(), labels()))
    with pytest.raises(RuntimeError, match=r"use_reentrant=(True|False)"):
        oracle.sampled_squares()


def test_parameters_that_came_during_the_step() -> None:
    """A group that is added before its first step has an estimate in it."""
    model = build("frozen-layer")
    for p in model.parameters():
        p.requires_grad_(True)
    expected = squares(watched(model, CONTENT), (inputs(), labels()))
    params = list(model.parameters())
    optimizer = SophiaG(params[:2], lr=1e-3, betas=(0.9, 0.0))
    optimizer.sampler = ContentSampler
    criterion = optimizer.attach_model(model, F.cross_entropy)
    optimizer.add_param_group({"params": params[2:]})
    criterion(model(inputs()), labels()).backward()
    optimizer.step()
    torch.testing.assert_close(flat([optimizer.state[p]["hess_diag"] for p in params]), expected)
