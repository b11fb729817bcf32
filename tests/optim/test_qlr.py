"""Tests of lightning_curvature/optim/qlr.py: what AdamQLR and SGDQLR share."""

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_curvature import SGDQLR, AdamQLR
from tests.helpers.plain_loop import (
    LinearModel,
    Loop,
    classification,
    half_mse,
    network,
    regression,
)

STEPS = 8
CLASSES = pytest.mark.parametrize("cls", [AdamQLR, SGDQLR])
UNDAMPED = {"damping": 0.0, "min_damping": 0.0, "max_lr": None}


def per_layer(model: nn.Module, *options: dict[str, Any]) -> list[dict[str, Any]]:
    """Make one group for each layer with parameters."""
    layers = [layer for layer in model if list(layer.parameters())]
    return [
        {"params": list(layer.parameters()), **option}
        for layer, option in zip(layers, options, strict=True)
    ]


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
        LinearModel(),
        partial(cls, **options),
        half_mse,
        groups=lambda model: per_layer(model, *({"lr": lr} for lr in lrs)),
    )
    plain = Loop(LinearModel(), partial(cls, **options), half_mse)
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
@pytest.mark.parametrize("lr", [0.5, 0.2, 0.0])
def test_weight_decay_per_group(cls: type, decoupled: bool, lr: float) -> None:
    """One step with and without decay differ by the decay, in the group that has it."""
    ((x, y),) = classification(1)
    decay, top_lr = 0.2, 0.5

    def after_a_step(weight_decay: float) -> Loop:
        loop = Loop(
            network(),
            partial(cls, lr=top_lr, decoupled_weight_decay=decoupled),
            groups=lambda model: per_layer(model, {}, {"weight_decay": weight_decay, "lr": lr}),
        )
        loop.step(x, y)
        return loop

    start = [p.detach().clone() for p in network().parameters()]
    plain, loop = after_a_step(0.0), after_a_step(decay)
    triples = zip(start, plain.model.parameters(), loop.model.parameters(), strict=True)
    for index, (old, without, with_decay) in enumerate(triples):
        expected = without
        if index >= 2:
            shrink = loop.stat("lr") * lr / top_lr * decay
            expected = without * (1 - shrink) if decoupled else without - lr * decay * old
        torch.testing.assert_close(with_decay, expected, rtol=1e-12, atol=1e-14)


# Exactness


@CLASSES
@pytest.mark.parametrize("curvature", ["fisher", "hessian"])
def test_the_prediction_is_exact_on_linear_least_squares(cls: type, curvature: str) -> None:
    loop = Loop(LinearModel(), partial(cls, curvature=curvature, **UNDAMPED), half_mse)
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
    assert loop.stat("skipped_steps") == 1
    loop.train(rest[2:])
    assert not torch.equal(loop.theta(), before)
    assert bool(torch.isfinite(loop.theta()).all())


@CLASSES
def test_a_negative_step_is_not_carried_over(cls: type) -> None:
    """The unguarded Hessian climbs a concave slope where it was measured, but no further."""
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.constant_(model.weight, 1.0)
    options = {"curvature": "hessian", "curvature_guard": False, "curvature_update_interval": 3}
    loop = Loop(model, partial(cls, **options), lambda z, y: F.mse_loss(torch.tanh(2 * z), y))
    x, y = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    loop.step(x, y)
    assert loop.stat("step_length") < 0
    climbed = model.weight.item()
    assert climbed > 1.0
    loop.train([(x, y)] * 2)
    assert loop.stat("step_length") == 0.0
    assert model.weight.item() == climbed


@CLASSES
def test_long_intervals_still_train(cls: type) -> None:
    losses = {}
    for interval in (1, 5):
        options = {"curvature_update_interval": interval, "damping_update_interval": interval}
        loop = Loop(network(), partial(cls, **options))
        losses[interval] = loop.train(classification(1, batch=32) * 30)
    assert losses[5][-1] < 0.5 * losses[5][0]
    assert losses[5][-1] < 1.5 * losses[1][-1]


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
