"""Tests of the numbers of K-FAC and EK-FAC: coefficients, rejections, failures, precision."""

import warnings
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature import EKFAC, KFAC
from tests.helpers.dense import DenseModel, Head
from tests.helpers.kronecker import block_matrix, gradient_matrix, parameters_of, places
from tests.helpers.plain_loop import CLASSES, Loop, classification, network, regression
from tests.optim.test_kfac import FIXED, PLAIN, watched

DAMPING = 0.3


def dense_block(optimizer: Any, name: str, damping: float) -> Tensor:
    """Return a block with factored damping, by its definition."""
    state = optimizer._states[name]
    a, g = state["a_factor"][0, 0] / state["positions"], state["g_factor"][0, 0]
    ratio = (g.diagonal().mean() / a.diagonal().mean()).sqrt()
    a = ratio * a + damping**0.5 * torch.eye(len(a), dtype=a.dtype)
    g = g / ratio + damping**0.5 * torch.eye(len(g), dtype=g.dtype)
    return torch.kron(g, a)


def direction(optimizer: Any, damping: float) -> Tensor:
    """Return Delta as one vector, from the factors that a step has left."""
    window, found = optimizer._window, {}
    for name, info in window.parts.blocks.items():
        grad = gradient_matrix(window, info)
        solved = torch.linalg.solve(dense_block(optimizer, name, damping), grad.flatten())
        weight, bias = parameters_of(info, solved.view_as(grad))
        found[info.weight.number], found[info.bias.number] = weight, bias
    return torch.cat([found[number].flatten() for number in sorted(found)])


def gradient(loop: Loop) -> Tensor:
    return torch.cat([p.grad.flatten() for p in loop.model.parameters()])


def velocity(loop: Loop) -> Tensor:
    state = loop.optimizer.state
    return torch.cat([state[p]["velocity"].flatten() for p in loop.model.parameters()])


def velocity_or_zeros(loop: Loop) -> Tensor:
    return velocity(loop).clone() if loop.optimizer.state else torch.zeros_like(loop.theta())


@pytest.mark.parametrize("limit", [None, 1e-3, 1e3])
def test_given_rate(limit: float | None) -> None:
    """The update by its formula, shortened to the norm constraint."""
    make = partial(KFAC, **FIXED, damping=DAMPING, norm_constraint=limit, momentum=0.7)
    loop = Loop(network(), make)
    for x, y in classification(4):
        before, old = loop.theta(), velocity_or_zeros(loop)
        loop.step(x, y)
        delta = direction(loop.optimizer, DAMPING)
        size = 0.1**2 * float(delta @ gradient(loop))
        factor = 1.0 if limit is None else min(1.0, (limit / size) ** 0.5)
        assert limit is None or (factor < 1) == (limit == 1e-3)
        torch.testing.assert_close(loop.theta() - before, -0.1 * factor * delta + 0.7 * old)
        assert loop.stat("lr") == pytest.approx(0.1 * factor, rel=1e-9)


@pytest.mark.parametrize("quad_model", ["exact", "factors"])
@pytest.mark.parametrize("l2_reg", [0.0, 0.2])
@pytest.mark.parametrize("limit", [None, 0.02])
def test_adaptive_coefficients(limit: float | None, l2_reg: float, quad_model: str) -> None:
    """They minimize the model; where the momentum is bounded the rate is derived anew."""
    options = {**PLAIN, "max_momentum": limit, "damping_algorithm": "fixed"}
    make = partial(KFAC, **options, damping=DAMPING, l2_reg=l2_reg, quad_model=quad_model)
    loop = Loop(network(), make)
    calls, bounded = watched(loop), []
    for step, (x, y) in enumerate(classification(5)):
        dense, before, old = DenseModel(loop.model), loop.theta(), velocity_or_zeros(loop)
        loop.step(x, y)
        if quad_model == "exact":
            head = Head(lambda z: z, lambda z, y=y: F.cross_entropy(z, y))
            curvature = dense.ggn((x,), [head])
        else:
            curvature = torch.zeros(len(before), len(before), dtype=torch.float64)
            for name, info in loop.optimizer._parts.blocks.items():
                index = places(loop.optimizer._window, info)
                state = loop.optimizer._states[name]
                curvature[index[:, None], index] = block_matrix(info, state)
        curvature += (DAMPING + l2_reg) * torch.eye(len(before), dtype=torch.float64)
        directions = torch.stack([direction(loop.optimizer, DAMPING + l2_reg), old])
        matrix, slopes = directions @ curvature @ directions.T, directions @ gradient(loop)
        if step == 0:
            w = torch.stack([-slopes[0] / matrix[0, 0], torch.zeros_like(slopes[0])])
        else:
            w = -torch.linalg.solve(matrix, slopes)
            bounded.append(limit is not None and abs(w[1].item()) > limit)
            if bounded[-1]:
                w[1] = w[1].clamp(-limit, limit)
                w[0] = -(slopes[0] + matrix[0, 1] * w[1]) / matrix[0, 0]
        assert loop.stat("momentum") == pytest.approx(w[1].item(), rel=1e-6, abs=1e-9)
        assert loop.stat("lr") == pytest.approx(-w[0].item(), rel=1e-6)
        torch.testing.assert_close(loop.theta() - before, w @ directions, rtol=1e-6, atol=1e-9)
    assert any(bounded) == (limit is not None)
    assert bool(calls["model"]) == (quad_model == "exact")


@pytest.mark.parametrize("measured", [True, False])
def test_relative_update(measured: bool) -> None:
    """The update is as long as it may be; without a measured model no longer than that."""
    options = {**(PLAIN if measured else {**FIXED, "lr": 1e3}), "max_relative_update": 1e-3}
    loop = Loop(network(), partial(KFAC, **options))
    for step, (x, y) in enumerate(classification(5)):
        before = loop.theta()
        loop.step(x, y)
        share = ((loop.theta() - before).norm() / before.norm()).item()
        assert share <= 1e-3 * (1 + 1e-9)
        if measured or step == 0:
            assert share == pytest.approx(1e-3, rel=1e-9)
        assert share > 1e-4
        assert loop.stat("update_norm") == pytest.approx(share * before.norm().item())


def test_relative_update_of_zeros() -> None:
    """Parameters that start at zero move."""
    model = network()
    for p in model.parameters():
        nn.init.zeros_(p)
    loop = Loop(model, partial(KFAC, **{**PLAIN, "max_relative_update": 0.1}))
    loop.train(classification(3)[:1])
    expected = 0.1 * 0.01 * len(loop.theta()) ** 0.5
    assert loop.theta().norm().item() == pytest.approx(expected, rel=1e-9)


def loss_now(loop: Loop, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return F.cross_entropy(loop.model(x), y).item()


@pytest.mark.parametrize(
    "options",
    [{"damping_algorithm": "fixed"}, {"damping_update_interval": 5, "damping": 0.01}],
    ids=["fixed", "interval"],
)
@pytest.mark.parametrize("lr", [0.05, 40.0])
def test_only_steps_that_raise_the_loss_are_undone(lr: float, options: dict[str, Any]) -> None:
    """Also where no reduction ratio is looked at: kfac-jax undoes all steps there."""
    options = {**FIXED, "damping_algorithm": "levenberg-marquardt", **options, "lr": lr}
    loop = Loop(network(), partial(KFAC, **options, step_rejection=True, weight_decay=0.1))
    (x, y), *_ = classification(1, batch=32)
    undone = []
    for step in range(7):
        before, old, loss = loop.theta(), velocity_or_zeros(loop), loss_now(loop, x, y)
        loop.step(x, y)
        undone.append(loop.stat("step_rejected") == 1)
        assert undone[-1] == (loop.stat("new_loss") > loop.stat("loss"))
        assert loop.stat("loss") == pytest.approx(loss, rel=1e-12)
        same = torch.equal(loop.theta(), before), torch.equal(velocity(loop), old)
        assert same == (undone[-1], undone[-1]), step
    assert any(undone) == (lr > 1)
    assert not all(undone) or lr > 1


def test_rejection_restores_after_good_steps() -> None:
    """Weights and velocity bit for bit; the damping grows, but not beyond its limit."""
    options = {**FIXED, "damping_algorithm": "levenberg-marquardt", "damping_update_interval": 50}
    limits = {"rejection_increase_factor": 3.0, "max_damping": 5.0}
    loop = Loop(network(), partial(KFAC, **options, **limits, step_rejection=True))
    (x, y), *_ = classification(1, batch=32)
    loop.train([(x, y)] * 4)
    assert loop.stat("step_rejected") == 0
    weights, last = loop.theta(), velocity(loop).clone()
    assert last.any()
    for group in loop.optimizer.param_groups:
        group["lr"] = 1e4
    found = []
    for _ in range(3):
        loop.step(x, y)
        assert loop.stat("step_rejected") == 1
        assert torch.equal(loop.theta(), weights)
        assert torch.equal(velocity(loop), last)
        found.append(loop.optimizer.damping)
    assert found == [3.0, 5.0, 5.0]


def first_update(lrs: tuple[float, float] = (0.1, 0.1), **options: Any) -> tuple[Tensor, Tensor]:
    """Return the first update of both layers."""
    model = network()

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        return [
            {"params": model[i].parameters(), "lr": lr} for i, lr in zip((0, 2), lrs, strict=True)
        ]

    loop = Loop(model, partial(KFAC, **{**FIXED, **options}), groups=groups)
    before = loop.theta()
    loop.train(classification(1))
    change = loop.theta() - before
    size = sum(p.numel() for p in model[0].parameters())
    return change[:size], change[size:]


def test_groups() -> None:
    """Rates of groups scale Delta; with one of 0 nothing moves."""
    first, second = first_update()
    same, half = first_update((0.1, 0.05))
    torch.testing.assert_close(same, first)
    torch.testing.assert_close(half, 0.5 * second)
    for options in ({}, {"adaptive_lr": True, "adaptive_momentum": True}):
        moved, still = first_update((0.1, 0.0), **options)
        assert moved.any()
        assert not still.any()
        assert not torch.cat(first_update((0.0, 0.0), **options, weight_decay=0.5)).any()


@pytest.mark.parametrize("adaptive", [True, False])
def test_envelope_decay_and_climbing(adaptive: bool) -> None:
    options = {"adaptive_lr": adaptive, "adaptive_momentum": adaptive}
    update = torch.cat(first_update(**options))
    torch.testing.assert_close(torch.cat(first_update((0.05, 0.05), **options)), 0.5 * update)
    torch.testing.assert_close(torch.cat(first_update(**options, maximize=True)), -update)
    weights = torch.cat([p.detach().flatten() for p in network().parameters()])
    decayed = torch.cat(first_update(**options, weight_decay=0.5))
    delta = update if not adaptive else torch.cat(first_update())
    rate = (update.norm() / delta.norm()).item() * 0.1
    torch.testing.assert_close(weights + decayed, (weights + update) * (1 - rate * 0.5))


def test_climbing_is_judged_by_what_was_climbed() -> None:
    loop = Loop(network(), partial(KFAC, **PLAIN, maximize=True, step_rejection=True, lr=0.1))
    batches = classification(1, batch=32) * 3
    losses = loop.train(batches)
    assert losses == sorted(losses)
    assert loop.stat("step_rejected") == 0
    assert loop.stat("new_loss") > losses[-1] > losses[0]
    assert loop.stat("quad_model_change") < 0
    assert loop.stat("reduction_ratio") > 0.75
    assert loop.optimizer.damping == pytest.approx(0.6**3)


def test_a_step_too_short_to_judge_lowers_the_damping() -> None:
    options = {**PLAIN, "damping": 1e9, "max_damping": float("inf")}
    loop = Loop(network(dtype=torch.float32), partial(KFAC, **options), directional="fd")
    loop.train(classification(1, dtype=torch.float32))
    assert torch.isnan(loop.optimizer.stats["reduction_ratio"])
    assert loop.optimizer.damping == pytest.approx(0.6e9)


@pytest.mark.parametrize("make", [KFAC, partial(KFAC, damping_method="exact"), EKFAC])
@pytest.mark.parametrize("from_start", [True, False])
def test_inverse_that_fails(make: Any, from_start: bool) -> None:
    """The last good one stays; without any the layer does not move; told once, counted always."""
    loop = Loop(network(), partial(make, factor_warmup=0, inverse_update_interval=1))
    optimizer: Any = loop.optimizer
    batches = classification(8)
    kept: dict[str, Tensor] = {}
    if not from_start:
        loop.train(batches[:2])
        kept = {k: x.clone() for k, x in optimizer._states["0"].items() if "g_" in k}
        kept.pop("g_factor")
        assert kept
    inner = optimizer._refreshed_block

    def spoiled(info: Any, state: Any, damping: Tensor) -> Any:
        if info.name == "0":
            state = {**state, "a_factor": torch.full_like(state["a_factor"], torch.nan)}
        return inner(info, state, damping)

    optimizer._refreshed_block = spoiled
    before = [p.detach().clone() for p in loop.model.parameters()]
    with pytest.warns(RuntimeWarning, match="could not invert the factors of 0, not") as told:
        loop.train(batches[2:5])
    assert len(told) == 1
    assert loop.stat("inverse_failures") == 3
    moved = [not torch.equal(p, x) for p, x in zip(loop.model.parameters(), before, strict=True)]
    assert moved == [not from_start] * 2 + [True] * 2
    assert all(torch.equal(optimizer._states["0"][key], x) for key, x in kept.items())
    # As soon as there is an inverse again, it is used.
    optimizer._refreshed_block = inner
    loop.train(batches[5:])
    assert loop.stat("inverse_failures") == 3
    assert not torch.equal(next(loop.model.parameters()), before[0])
    assert loop.is_finite()


@pytest.mark.parametrize("make", [KFAC, partial(KFAC, damping_method="exact"), EKFAC])
def test_ill_conditioned_regression_with_tiny_damping(make: Any) -> None:
    options = {"damping": 1e-9, "min_damping": 1e-12, "inverse_update_interval": 10}
    model = network(3, dtype=torch.float32)
    loop = Loop(model, partial(make, **options), F.mse_loss)
    scales = torch.logspace(-3, 3, 5)
    batches = [(x * scales, y) for x, y in regression(1, 64, dtype=torch.float32) * 200]
    losses = loop.train(batches)
    assert loop.is_finite()
    assert max(losses[100:]) < losses[0]


@pytest.mark.parametrize("make", [KFAC, partial(KFAC, damping_method="exact"), EKFAC])
def test_low_precision_trains(make: Any) -> None:
    options = {"factor_dtype": "bfloat16", "inverse_dtype": "bfloat16"}
    loop = Loop(network(dtype=torch.float32), partial(make, **options), directional="fd")
    losses = loop.train(classification(1, 64, dtype=torch.float32) * 40)
    full = Loop(network(dtype=torch.float32), make, directional="fd")
    expected = full.train(classification(1, 64, dtype=torch.float32) * 40)
    assert losses[-1] < 0.8 * losses[0]
    assert losses[-1] < expected[-1] + 0.2 * (expected[0] - expected[-1])


@pytest.mark.parametrize("make", [KFAC, EKFAC])
def test_small_batches_do_not_diverge(make: Any) -> None:
    """Ten classes, sixteen examples a batch, defaults."""
    generator = torch.Generator().manual_seed(3)
    centers = torch.randn(10, 64, generator=generator)
    labels = torch.randint(10, (320,), generator=generator)
    x = centers[labels] + 1.5 * torch.randn(320, 64, generator=generator)
    model = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))
    loop = Loop(model, make, directional="fd")
    pairs = list(zip(x.split(16), labels.split(16), strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses = loop.train(pairs * 6)
    assert loop.is_finite()
    assert max(losses) < 3 * losses[0]
    assert sum(losses[-20:]) / 20 < 0.3 * losses[0]


@pytest.mark.parametrize("warmup", [0, 5])
def test_corrected_eigenvalues_are_closer_to_the_fisher(warmup: int) -> None:
    (x, y), *_ = classification(1, batch=12)
    fisher = DenseModel(network()).softmax_fisher((x,))
    errors = {}
    for make in (KFAC, EKFAC):
        options = {"fisher_type": "type-2", "factor_warmup": warmup, "lr": 0.0}
        loop = Loop(network(), partial(make, **options))
        loop.train([(x, y)] * 5)
        optimizer: Any = loop.optimizer
        for name, info in optimizer._parts.blocks.items():
            index = places(optimizer._window, info)
            found = block_matrix(info, optimizer._states[name])
            errors[make, name] = (found - fisher[index[:, None], index]).norm().item()
    assert len(errors) == 2 * 2
    assert CLASSES < 12
    for name in ("0", "2"):
        assert errors[EKFAC, name] < 0.999 * errors[KFAC, name]
