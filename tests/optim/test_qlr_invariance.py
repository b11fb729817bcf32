"""Invariances of lightning_curvature/optim/qlr.py: what must not change a step; precision."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

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


def no_tiny_eps(cls: type, **options: Any) -> dict[str, Any]:
    """Switch off the one constant that has the unit of a gradient."""
    return {**options, "eps": 1e-100} if cls is AdamQLR else options


@pytest.mark.parametrize("cls", [AdamQLR, SGDQLR])
@pytest.mark.parametrize("grad_clip_norm", [None, 0.5])
def test_maximize_is_minimizing_the_negated_loss(cls: type, grad_clip_norm: float | None) -> None:
    """On a concave objective, where the Hessian is negative."""
    options = {"curvature": "hessian", "grad_clip_norm": grad_clip_norm}

    def objective(output: Tensor, target: Tensor) -> Tensor:
        return -half_mse(output, target)

    down = Loop(LinearModel(), partial(cls, **options), half_mse)
    up = Loop(LinearModel(), partial(cls, maximize=True, **options), objective)
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
@pytest.mark.parametrize("algorithm", ["levenberg-marquardt", "decreasing-loss"])
def test_maximize_climbs_with_the_fisher(cls: type, algorithm: str) -> None:
    loop = Loop(network(), partial(cls, maximize=True, damping=1.0, damping_algorithm=algorithm))
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
