"""Tests of lightning_curvature/optim/adamqlr.py and, for what both share, of optim/qlr.py."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature import AdamQLR
from tests.helpers.dense import DenseModel, Head
from tests.helpers.plain_loop import (
    FEATURES,
    OUTPUTS,
    Loop,
    classification,
    half_mse,
    network,
    regression,
)
from tests.helpers.reference_adamqlr import ReferenceQLR, Settings

STEPS = 10
# Forward mode is exact; what is left is round-off, which ten steps amplify.
FIRST, ALL = 1e-11, 1e-8
NEEDS_A_NEW_LOSS = ("new_loss", "reduction_ratio", "quad_model_change")


def lockstep(
    settings: Settings, task: str, steps: int = STEPS, lrs: Callable[[int], float] | None = None
) -> list[dict[str, float]]:
    """Train both forms beside each other and compare every scalar and every parameter."""
    is_classification = task == "classification"
    loss = F.cross_entropy if is_classification else half_mse
    batches = classification(steps) if is_classification else regression(steps)
    model = network() if is_classification else network(OUTPUTS)
    reference = ReferenceQLR(DenseModel(model), loss, settings)
    loop = Loop(model, partial(AdamQLR, **dataclasses.asdict(settings)), loss)
    history = []
    for step, (x, y) in enumerate(batches):
        rtol = FIRST if step == 0 else ALL
        lr = 1.0 if lrs is None else lrs(step)
        loop.optimizer.param_groups[0]["lr"] = lr
        expected = reference.step(x, y, lr)
        loop.step(x, y)
        for name, value in expected.items():
            if settings.damping_algorithm == "fixed" and name in NEEDS_A_NEW_LOSS:
                assert name not in loop.optimizer.stats
                continue
            assert loop.stat(name) == pytest.approx(value, rel=rtol, abs=rtol * 1e-2), (name, step)
        torch.testing.assert_close(loop.theta(), reference.dense.theta, rtol=rtol, atol=rtol)
        assert loop.optimizer.damping == pytest.approx(reference.damping, rel=1e-14)
        history.append(expected)
    return history


VARIANTS: dict[str, dict[str, Any]] = {
    "untuned": {},
    "tuned": {
        "damping": 1.0,
        "damping_increase_factor": 1.0526,
        "damping_decrease_factor": 0.95,
    },
    "undamped": {"damping": 0.0, "damping_algorithm": "fixed", "max_lr": 0.05},
    "fixed-damping": {"damping": 0.1, "damping_algorithm": "fixed"},
    "capped": {"max_lr": 0.02},
    "amplified": {"amplification": 0.5},
    "amplified-beyond-the-cap": {"max_lr": 0.02, "amplification": 1.7},
    "lr-ema": {"lr_ema": 0.7},
    "curvature-ema": {"curvature_ema": 0.6},
    "curvature-ema-official-start": {"curvature_ema": 0.6, "curvature_ema_init": 1e7},
    "grad-clip": {"grad_clip_norm": 0.1},
    "direction-clip": {"direction_clip": 0.4},
    "update-clip": {"update_clip_norm": 0.05},
    "update-clip-taken": {"update_clip_norm": 0.05, "quad_model": "taken"},
    "decay": {"weight_decay": 0.01},
    "decay-and-update-clip": {"weight_decay": 0.01, "update_clip_norm": 0.05},
    "decay-decoupled": {"weight_decay": 0.3, "decoupled_weight_decay": True},
    "quad-taken": {"quad_model": "taken"},
    "quad-adam": {"quad_model": "adam"},
    "quad-adam-sqrt": {"quad_model": "adam-sqrt"},
    "narrow-damping-range": {"damping": 0.1, "min_damping": 0.06, "max_damping": 0.11},
    "betas-eps": {"betas": (0.5, 0.9), "eps": 1e-3},
    "decreasing-loss": {"damping_algorithm": "decreasing-loss", "damping": 1e-3},
}


@pytest.mark.parametrize("curvature", ["fisher", "hessian"])
@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("name", list(VARIANTS))
def test_reference(name: str, task: str, curvature: str) -> None:
    options = dict(VARIANTS[name])
    if curvature == "hessian":
        # Uncapped Hessian runs amplify round-off by 1e10 within twenty steps.
        options = {"curvature_guard": True, "max_lr": 0.1, **options}
    lockstep(Settings(curvature=curvature, **options), task)


@pytest.mark.parametrize("options", [{"saddle_free": True}, {"curvature_guard": False}])
def test_reference_with_negative_curvature(options: dict[str, Any]) -> None:
    """On a concave slope the official Hessian variant climbs and the saddle-free one descends."""
    settings = Settings(
        curvature="hessian", damping=1e-8, damping_algorithm="fixed", max_lr=0.05, **options
    )
    x = torch.ones(1, 1, dtype=torch.float64)
    y = torch.zeros(1, 1, dtype=torch.float64)
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.fill_(1.0)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(torch.tanh(2 * output), target)

    reference = ReferenceQLR(DenseModel(model), loss, settings)
    loop = Loop(model, partial(AdamQLR, **dataclasses.asdict(settings)), loss)
    for _ in range(3):
        expected = reference.step(x, y)
        assert expected["curvature"] < 0
        loop.step(x, y)
        assert loop.stat("step_length") == pytest.approx(expected["step_length"], rel=1e-10)
        torch.testing.assert_close(loop.theta(), reference.dense.theta, rtol=1e-10, atol=1e-12)
    climbs = not settings.saddle_free
    assert (model.weight.item() > 1.0) == climbs


@pytest.mark.parametrize("quad_model", ["taken", "derived"])
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_reference_with_an_envelope(task: str, quad_model: str) -> None:
    """Warm-up from zero, then a cosine: ``lr`` multiplies the derived step."""

    def envelope(step: int) -> float:
        return step / 4 if step < 4 else 0.5 * (1 + math.cos(math.pi * (step - 4) / STEPS))

    if quad_model == "taken":
        # No step was taken where the envelope is zero, and 0/0 compares with nothing.
        lockstep(Settings(quad_model=quad_model), task, lrs=lambda step: envelope(step + 1))
    else:
        history = lockstep(Settings(quad_model=quad_model), task, lrs=envelope)
        assert history[0]["reduction_ratio"] == 0.0
        assert history[0]["damping"] == 2e-3


@pytest.mark.parametrize("official", [True, False])
def test_reference_scaling_of_several_outputs(official: bool) -> None:
    settings = Settings(official_regression_scaling=official)
    curvature = lockstep(settings, "regression", steps=1)[0]["curvature"]
    right = lockstep(Settings(), "regression", steps=1)[0]["curvature"]
    assert curvature == pytest.approx(OUTPUTS * right if official else right, rel=1e-12)
    lockstep(settings, "regression")


def test_variants_differ() -> None:
    """Each variant does something here: no test above passes because an option was idle."""

    def last_loss(options: dict[str, Any]) -> float:
        make = partial(AdamQLR, **dataclasses.asdict(Settings(**options)))
        return Loop(network(), make).train(classification(STEPS))[-1]

    plain = last_loss({})
    idle = {name for name, options in VARIANTS.items() if last_loss(options) == plain}
    # The taken step is the derived one where nothing clips it.
    assert idle == {"untuned", "quad-taken"}


def test_one_step_on_least_squares_by_hand() -> None:
    """No autograd in the expectation: J is X for every output."""
    ((x, y),) = regression(1)
    model = nn.Linear(FEATURES, OUTPUTS, bias=False, dtype=torch.float64)
    weight = model.weight.detach().clone()
    n, damping = len(x), 0.3
    residual = x @ weight.T - y
    gradient = residual.T @ x / (n * OUTPUTS)
    direction = gradient / (gradient.abs() + 1e-8)  # the first Adam direction
    curvature = ((x @ direction.T) ** 2).sum() / (n * OUTPUTS)
    kappa = curvature + damping * (direction**2).sum()
    alpha = (gradient * direction).sum() / kappa
    loop = Loop(model, partial(AdamQLR, damping=damping, max_lr=None), half_mse)
    loop.step(x, y)
    torch.testing.assert_close(
        model.weight.detach(), weight - alpha * direction, rtol=1e-12, atol=1e-13
    )
    change = 0.5 * ((x @ model.weight.T - y) ** 2).mean() - 0.5 * (residual**2).mean()
    predicted = -0.5 * alpha * (gradient * direction).sum()
    assert loop.stat("reduction_ratio") == pytest.approx((change / predicted).item(), rel=1e-9)
    assert loop.stat("grad_norm") == pytest.approx(gradient.norm().item(), rel=1e-12)
    assert loop.stat("update_norm") == pytest.approx((alpha * direction.norm()).item(), rel=1e-12)


def test_a_rejected_step_restores_moments_and_counts_bitwise() -> None:
    batches = classification(4)
    options = {"damping_algorithm": "decreasing-loss", "max_lr": None, "amplification": 1.0}
    loop = Loop(network(), partial(AdamQLR, **options))
    loop.train(batches[:3])
    group = loop.optimizer.param_groups[0]
    group["amplification"] = 1e4  # far beyond the minimum: the loss rises
    weights = loop.theta()
    state = [
        {key: value.clone() for key, value in loop.optimizer.state[p].items()}
        for p in loop.model.parameters()
    ]
    damping = loop.optimizer.damping
    loop.step(*batches[3])
    assert loop.stat("new_loss") > loop.stat("loss")
    assert torch.equal(loop.theta(), weights)
    for p, before in zip(loop.model.parameters(), state, strict=True):
        for key, value in before.items():
            assert torch.equal(loop.optimizer.state[p][key], value), key
        assert before["step"] == 3
    assert loop.optimizer.damping == 2 * damping
    group["amplification"] = 1.0
    loop.step(*batches[3])
    assert loop.stat("new_loss") < loop.stat("loss")
    assert all(loop.optimizer.state[p]["step"] == 4 for p in loop.model.parameters())
    assert loop.optimizer.damping == damping


# Reductions


def test_a_tiny_cap_gives_adam() -> None:
    """With the cap always active the update is the cap times Adam's direction."""
    cap = 1e-5
    batches = classification(STEPS)
    loop = Loop(network(), partial(AdamQLR, max_lr=cap))
    adam_model = network()
    adam = torch.optim.Adam(adam_model.parameters(), lr=cap)
    capped = []
    for x, y in batches:
        loop.step(x, y)
        capped.append(loop.stat("step_length"))
        adam.zero_grad()
        F.cross_entropy(adam_model(x), y).backward()
        adam.step()
    assert capped == [pytest.approx(cap, rel=1e-15)] * STEPS
    for ours, theirs in zip(loop.model.parameters(), adam_model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-15)
        for key in ("exp_avg", "exp_avg_sq", "step"):
            torch.testing.assert_close(
                loop.optimizer.state[ours][key],
                adam.state[theirs][key],
                rtol=1e-14,
                atol=0,
                check_dtype=False,
            )


def test_decoupled_weight_decay_is_that_of_adamw() -> None:
    cap, decay = 1e-3, 0.5
    batches = classification(STEPS)
    loop = Loop(network(), partial(AdamQLR, max_lr=cap, weight_decay=decay))
    adam_model = network()
    adamw = torch.optim.AdamW(adam_model.parameters(), lr=cap, weight_decay=decay)
    for x, y in batches:
        loop.step(x, y)
        assert loop.stat("lr") == pytest.approx(cap)
        adamw.zero_grad()
        F.cross_entropy(adam_model(x), y).backward()
        adamw.step()
    # AdamW shrinks before the step and we shrink after it: lr^2 * decay apart in each.
    expected = torch.cat([p.detach().reshape(-1) for p in adam_model.parameters()])
    drift = 2 * STEPS * cap**2 * decay
    assert (loop.theta() - expected).abs().max() < drift
    plain = Loop(network(), partial(AdamQLR, max_lr=cap))
    plain.train(batches)
    assert (plain.theta() - expected).abs().max() > 10 * drift


def test_huge_damping_leaves_the_damping_alone_in_the_model() -> None:
    damping = 1e7
    ((x, y),) = classification(1)
    loop = Loop(network(), partial(AdamQLR, damping=damping, damping_algorithm="fixed"))
    before = loop.theta()
    loop.step(x, y)
    step = before - loop.theta()
    alpha = loop.stat("step_length")
    direction = step / alpha
    expected = loop.stat("slope") / (damping * (direction @ direction).item())
    assert alpha == pytest.approx(expected, rel=1e-6)


def test_fixed_damping_never_asks_for_a_new_loss() -> None:
    loop = Loop(network(), partial(AdamQLR, damping_algorithm="fixed"))
    passes = 0

    def count(*args: Any) -> None:
        nonlocal passes
        passes += 1

    loop.model[0].register_forward_hook(count)
    loop.train(classification(3))
    assert passes == 6  # main pass and curvature
    assert loop.optimizer.damping == 1e-3
    assert "reduction_ratio" not in loop.optimizer.stats


def test_sum_of_curvatures_over_two_losses() -> None:
    """Curvature of a weighted sum: both heads enter, each with its weight."""
    ((x, y),) = regression(1)
    model = network(OUTPUTS)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return half_mse(output, target) + 0.25 * F.cross_entropy(output, target.argmax(dim=1))

    dense = DenseModel(model)
    matrix = dense.ggn((x,), [Head(lambda output: output, lambda output: loss(output, y))])
    loop = Loop(model, AdamQLR, loss)
    before = loop.theta()
    loop.step(x, y)
    direction = (before - loop.theta()) / loop.stat("lr")
    expected = (direction @ matrix @ direction).item()
    assert loop.stat("curvature") == pytest.approx(expected, rel=1e-9)
