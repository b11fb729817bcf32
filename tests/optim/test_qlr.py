"""Tests of lightning_curvature/optim/qlr.py: what AdamQLR and SGDQLR share."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature import SGDQLR, AdamQLR
from tests.helpers.plain_loop import (
    FEATURES,
    OUTPUTS,
    Loop,
    classification,
    half_mse,
    network,
    regression,
)

STEPS = 8
CLASSES = pytest.mark.parametrize("cls", [AdamQLR, SGDQLR])
UNDAMPED = {"damping": 0.0, "min_damping": 0.0, "max_lr": None}


def no_tiny_eps(cls: type, **options: Any) -> dict[str, Any]:
    """Switch off the one constant that has the unit of a gradient."""
    return {**options, "eps": 1e-100} if cls is AdamQLR else options


def per_layer(model: nn.Module, *options: dict[str, Any]) -> list[dict[str, Any]]:
    """Make one group for each layer with parameters."""
    layers = [layer for layer in model if list(layer.parameters())]
    return [
        {"params": list(layer.parameters()), **option}
        for layer, option in zip(layers, options, strict=True)
    ]


class Deep(nn.Sequential):
    """Two biases and a matrix in two modules; linear in all its parameters."""

    def __init__(self) -> None:
        super().__init__(
            nn.Linear(FEATURES, OUTPUTS, dtype=torch.float64),
            Shift(),
        )


class Shift(nn.Module):
    """Adds a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.ones(OUTPUTS, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


# Learning rate


@CLASSES
def test_a_scheduler_is_an_envelope(cls: type) -> None:
    factors = [0.25, 0.5, 1.0, 0.6, 0.3]
    loop = Loop(network(), cls)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        loop.optimizer, lambda step: factors[min(step, len(factors) - 1)]
    )
    free = Loop(network(), cls)
    for step, (x, y) in enumerate(classification(len(factors))):
        before = loop.theta()
        loop.step(x, y)
        schedule.step()
        assert loop.stat("lr") == pytest.approx(factors[step] * loop.stat("step_length"))
        if step == 0:
            free.step(x, y)
            assert free.stat("lr") == loop.stat("step_length")
            torch.testing.assert_close(
                loop.theta() - before, factors[0] * (free.theta() - before), rtol=1e-12, atol=1e-14
            )
        assert loop.stat("update_norm") == pytest.approx((loop.theta() - before).norm().item())


@CLASSES
@pytest.mark.parametrize("lrs", [(1.0, 0.25), (0.3, 1.2), (1.0, 0.0)])
def test_groups_with_different_lr(cls: type, lrs: tuple[float, float]) -> None:
    """The model is along the scaled direction, so it stays exact on a bowl."""
    options = {**UNDAMPED, "lr": 1.0}
    batches = regression(STEPS)
    loop = Loop(
        Deep(),
        partial(cls, **options),
        half_mse,
        groups=lambda model: per_layer(model, *({"lr": lr} for lr in lrs)),
    )
    plain = Loop(Deep(), partial(cls, **options), half_mse)
    plain.model.load_state_dict(loop.model.state_dict())
    for index, (x, y) in enumerate(batches):
        before = [p.detach().clone() for p in loop.model.parameters()]
        loop.step(x, y)
        if max(lrs) == 1.0:
            assert loop.stat("reduction_ratio") == pytest.approx(1.0, abs=1e-8)
        if index > 0:
            continue
        # The step of each group is its lr times a common multiple of the plain direction.
        plain.step(x, y)
        ratios = [
            (new - old) / (other - old) * plain.stat("step_length")
            for new, old, other in zip(
                loop.model.parameters(), before, plain.model.parameters(), strict=True
            )
        ]
        expected = [lrs[0], lrs[0], lrs[1]]
        for ratio, lr in zip(ratios, expected, strict=True):
            wanted = torch.full_like(ratio, lr * loop.stat("step_length"))
            torch.testing.assert_close(ratio, wanted, rtol=1e-9, atol=1e-12)


@CLASSES
def test_one_lr_for_two_groups_is_one_group(cls: type) -> None:
    batches = classification(STEPS)
    one = Loop(network(), partial(cls, lr=0.7))
    two = Loop(
        network(),
        cls,
        groups=lambda model: per_layer(model, {"lr": 0.7}, {"lr": 0.7}),
    )
    assert one.train(batches) == two.train(batches)
    assert torch.equal(one.theta(), two.theta())


@CLASSES
def test_lr_zero_moves_nothing(cls: type) -> None:
    loop = Loop(network(), partial(cls, lr=0.0, weight_decay=0.1))
    before = loop.theta()
    loop.train(classification(3))
    assert torch.equal(loop.theta(), before)
    assert loop.stat("skipped_steps") == 0


@CLASSES
@pytest.mark.parametrize("decoupled", [True, False])
def test_weight_decay_per_group(cls: type, decoupled: bool) -> None:
    """One step with and without decay differ by the decay, in the group that has it."""
    ((x, y),) = classification(1)
    decay, lr = 0.2, 0.5
    options = {"lr": lr, "decoupled_weight_decay": decoupled}
    plain = Loop(network(), partial(cls, **options))
    loop = Loop(
        network(),
        partial(cls, **options),
        groups=lambda model: per_layer(model, {}, {"weight_decay": decay}),
    )
    start = [p.detach().clone() for p in plain.model.parameters()]
    plain.step(x, y)
    loop.step(x, y)
    triples = zip(start, plain.model.parameters(), loop.model.parameters(), strict=True)
    for index, (old, without, with_decay) in enumerate(triples):
        expected = without
        if index >= 2:
            shrink = loop.stat("lr") * decay
            expected = without * (1 - shrink) if decoupled else without - lr * decay * old
        torch.testing.assert_close(with_decay, expected, rtol=1e-12, atol=1e-14)


# Exactness


@CLASSES
@pytest.mark.parametrize("curvature", ["fisher", "hessian"])
def test_the_prediction_is_exact_on_linear_least_squares(cls: type, curvature: str) -> None:
    loop = Loop(Deep(), partial(cls, curvature=curvature, **UNDAMPED), half_mse)
    for x, y in regression(STEPS):
        loop.step(x, y)
        assert loop.stat("reduction_ratio") == pytest.approx(1.0, abs=1e-8)
        predicted = loop.stat("new_loss") - loop.stat("loss")
        assert loop.stat("quad_model_change") == pytest.approx(predicted, rel=1e-8)


# Intervals


@CLASSES
@pytest.mark.parametrize("lr_ema", [None, 0.0, 0.5])
@pytest.mark.parametrize(("curvature", "damping"), [(3, 1), (1, 3), (2, 4), (3, 2)])
def test_intervals(cls: type, curvature: int, damping: int, lr_ema: float | None) -> None:
    """Passes are saved, the damping rests, and the averaged step length is carried over."""
    options = {
        "curvature_update_interval": curvature,
        "damping_update_interval": damping,
        "lr_ema": lr_ema,
        "max_lr": 0.2,
    }
    loop = Loop(network(), partial(cls, **options))
    passes: list[None] = []
    loop.model[0].register_forward_hook(lambda *args: passes.append(None))
    decay = lr_ema if lr_ema is not None else 0.8 if curvature > 1 else 0.0
    average, dampings = math.nan, []
    for step, (x, y) in enumerate(classification(9)):
        passes.clear()
        before, lam = loop.theta(), loop.optimizer.damping
        loop.step(x, y)
        measured, adapted = step % curvature == 0, step % damping == 0
        assert len(passes) == 1 + measured + adapted, step
        if not adapted:
            assert loop.optimizer.damping == lam
        dampings.append(loop.optimizer.damping)
        length = loop.stat("step_length")
        if measured:
            squared = ((before - loop.theta()) / length).square().sum().item()
            alpha = loop.stat("slope") / (loop.stat("curvature") + lam * squared)
            alpha = max(-0.2, min(0.2, alpha))
            average = alpha if step == 0 else decay * average + (1 - decay) * alpha
        assert length == pytest.approx(average, rel=1e-7)
    assert len(set(dampings)) > 1


@CLASSES
def test_no_step_is_carried_over_from_a_bad_measurement(cls: type) -> None:
    """Until something was measured the weights stay."""
    (x, y), *rest = classification(6)
    loop = Loop(network(), partial(cls, curvature_update_interval=3))
    before = loop.theta()
    loop.step(x * math.nan, y)
    loop.train(rest[:2])
    assert torch.equal(loop.theta(), before)
    loop.train(rest[2:])
    assert not torch.equal(loop.theta(), before)
    assert bool(torch.isfinite(loop.theta()).all())


@CLASSES
def test_long_intervals_still_train(cls: type) -> None:
    losses = {}
    for interval in (1, 5):
        options = {"curvature_update_interval": interval, "damping_update_interval": interval}
        loop = Loop(network(), partial(cls, **options))
        losses[interval] = loop.train(classification(1, batch=32) * 30)
    assert losses[5][-1] < 0.5 * losses[5][0]
    assert losses[5][-1] < 1.5 * losses[1][-1]


# Invariances


@pytest.mark.parametrize("cls", [AdamQLR, SGDQLR])
@pytest.mark.parametrize("grad_clip_norm", [None, 0.5])
def test_maximize_is_minimizing_the_negated_loss(cls: type, grad_clip_norm: float | None) -> None:
    """On a concave objective, where the Hessian is negative."""
    options = {"curvature": "hessian", "grad_clip_norm": grad_clip_norm}

    def objective(output: Tensor, target: Tensor) -> Tensor:
        return -half_mse(output, target)

    down = Loop(Deep(), partial(cls, **options), half_mse)
    up = Loop(Deep(), partial(cls, maximize=True, **options), objective)
    up.model.load_state_dict(down.model.state_dict())
    for x, y in regression(STEPS):
        loss = down.step(x, y)
        assert up.step(x, y) == -loss
        assert torch.equal(up.theta(), down.theta())
        for name in ("curvature", "lr", "reduction_ratio", "quad_model_change", "damping"):
            assert up.stat(name) == down.stat(name), name
        assert up.stat("new_loss") == -down.stat("new_loss")
    assert down.stat("curvature") > 0


@CLASSES
def test_maximize_climbs_with_the_fisher(cls: type) -> None:
    loop = Loop(network(), partial(cls, maximize=True, damping=1.0))
    losses = loop.train(classification(1) * 5)
    assert losses == sorted(losses)
    assert loop.stat("quad_model_change") < 0


@CLASSES
def test_foreach_or_not(cls: type) -> None:
    batches = classification(STEPS)
    loops = [Loop(network(), partial(cls, foreach=foreach)) for foreach in (True, None, False)]
    losses = [loop.train(batches) for loop in loops]
    assert losses[0] == losses[1] == losses[2]
    assert torch.equal(loops[0].theta(), loops[2].theta())


@CLASSES
@pytest.mark.parametrize("scale", [1e-3, 64.0])
def test_loss_scale_and_damping_scale_cancel(cls: type, scale: float) -> None:
    batches = classification(STEPS)
    options = no_tiny_eps(cls, min_damping=0.0, max_lr=None)
    plain = Loop(network(), partial(cls, damping=0.1, **options))
    scaled = Loop(
        network(),
        partial(cls, damping=0.1 * scale, **options),
        lambda output, target: scale * F.cross_entropy(output, target),
    )
    for x, y in batches:
        plain.step(x, y)
        scaled.step(x, y)
        torch.testing.assert_close(scaled.theta(), plain.theta(), rtol=1e-9, atol=1e-11)
        ratio = plain.stat("reduction_ratio")
        assert scaled.stat("reduction_ratio") == pytest.approx(ratio, rel=1e-8)
        assert scaled.optimizer.damping == pytest.approx(scale * plain.optimizer.damping)
    without = Loop(
        network(),
        partial(cls, damping=0.1, **options),
        lambda output, target: scale * F.cross_entropy(output, target),
    )
    without.train(batches)
    assert not torch.allclose(without.theta(), plain.theta(), rtol=1e-3)


@CLASSES
def test_order_of_the_parameters(cls: type) -> None:
    batches = classification(STEPS)
    plain = Loop(network(), cls)
    turned = Loop(network(), cls, groups=lambda model: list(model.parameters())[::-1])
    plain.train(batches)
    turned.train(batches)
    torch.testing.assert_close(turned.theta(), plain.theta(), rtol=1e-10, atol=1e-12)


@CLASSES
@pytest.mark.parametrize("directional", ["jvp", "fd"])
@pytest.mark.parametrize("curvature", ["fisher", "hessian"])
def test_accumulation(cls: type, directional: str, curvature: str) -> None:
    """One batch of 8 is four of 2 with a quarter of their loss each."""
    whole = Loop(network(), partial(cls, curvature=curvature), directional=directional)
    parts = Loop(network(), partial(cls, curvature=curvature), directional=directional)
    # Finite differences of different sums differ in their round-off.
    rtol = 1e-10 if directional == "jvp" or curvature == "hessian" else 1e-5
    for x, y in classification(STEPS, batch=8):
        whole.step(x, y)
        parts.optimizer.zero_grad()
        for some_x, some_y in zip(x.split(2), y.split(2), strict=True):
            (parts.criterion(parts.model(some_x), some_y) / 4).backward()
        parts.optimizer.step()
        for name in ("loss", "new_loss", "slope", "curvature", "lr", "reduction_ratio", "damping"):
            expected = whole.stat(name)
            assert parts.stat(name) == pytest.approx(expected, rel=10 * rtol, abs=rtol), name
        torch.testing.assert_close(parts.theta(), whole.theta(), rtol=rtol, atol=rtol)


# Precision


@CLASSES
def test_bfloat16_parameters(cls: type) -> None:
    """Moments, damping and statistics stay in float32, and the loss falls."""
    loop = Loop(network(dtype=torch.bfloat16), cls, directional="auto")
    losses = loop.train(classification(1, batch=32, dtype=torch.bfloat16) * 30)
    assert loop.optimizer.oracle.method == "jvp"
    assert losses[-1] < 0.6 * losses[0]
    assert all(p.dtype is torch.bfloat16 for p in loop.model.parameters())
    state = [value for s in loop.optimizer.state.values() for value in s.values()]
    assert len(state) == (12 if cls is AdamQLR else 0)
    assert all(value.dtype is torch.float32 for value in state)
    assert all(value.dtype is torch.float32 for value in loop.optimizer.stats.values())
    assert loop.optimizer.param_groups[0]["damping"].dtype is torch.float32


@CLASSES
def test_float32_with_finite_differences(cls: type) -> None:
    """Close to the exact float64 run; the default method of full precision."""
    exact = Loop(network(), cls)
    loop = Loop(network(dtype=torch.float32), cls, directional="auto")
    for (x, y), (x32, y32) in zip(
        classification(STEPS), classification(STEPS, dtype=torch.float32), strict=True
    ):
        exact.step(x, y)
        loop.step(x32, y32)
        assert loop.stat("curvature") == pytest.approx(exact.stat("curvature"), rel=0.02)
    assert loop.optimizer.oracle.method == "fd"
    torch.testing.assert_close(loop.theta(), exact.theta(), rtol=0.02, atol=5e-3)


# Attributes


@CLASSES
def test_damping_is_a_property_over_all_groups(cls: type) -> None:
    loop = Loop(network(), cls, groups=lambda model: per_layer(model, {}, {}))
    loop.optimizer.damping = 0.5
    assert [group["damping"].item() for group in loop.optimizer.param_groups] == [0.5, 0.5]
    loop.train(classification(2))
    first, second = (group["damping"].item() for group in loop.optimizer.param_groups)
    assert first == second == loop.optimizer.damping == loop.stat("damping") != 0.5


STATS = {
    "loss",
    "new_loss",
    "lr",
    "step_length",
    "damping",
    "reduction_ratio",
    "quad_model_change",
    "slope",
    "curvature",
    "grad_norm",
    "update_norm",
    "skipped_steps",
}


@CLASSES
def test_stats(cls: type) -> None:
    loop = Loop(network(), cls)
    assert loop.optimizer.stats == {}
    loop.train(classification(1))
    assert set(loop.optimizer.stats) == STATS
    for name, value in loop.optimizer.stats.items():
        assert value.shape == (), name
        assert not value.requires_grad, name
