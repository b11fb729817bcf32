"""Tests of lightning_curvature/optim/sgdqlr.py."""

import dataclasses
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature import SGDQLR
from tests.helpers.dense import DenseModel
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
FIRST, ALL = 1e-11, 1e-8
ADAM_ONLY = ("betas", "eps")

VARIANTS: dict[str, dict[str, Any]] = {
    "untuned": {},
    "tuned": {"damping": 1.0, "damping_increase_factor": 1.0526, "damping_decrease_factor": 0.95},
    "decreasing-loss": {"damping": 1.0, "damping_algorithm": "decreasing-loss"},
    "capped": {"max_lr": 0.5},
    "lr-ema": {"lr_ema": 0.7},
    "curvature-ema": {"curvature_ema": 0.6},
    "clips": {"grad_clip_norm": 0.4, "direction_clip": 0.1, "update_clip_norm": 0.2},
    "quad-taken": {"quad_model": "taken", "update_clip_norm": 0.2},
    "decay": {"weight_decay": 0.01},
    "decay-decoupled": {"weight_decay": 0.3, "decoupled_weight_decay": True},
    "official-scaling": {"official_regression_scaling": True},
}


@pytest.mark.parametrize("curvature", ["fisher", "hessian"])
@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("name", list(VARIANTS))
def test_reference(name: str, task: str, curvature: str) -> None:
    settings = Settings(betas=None, curvature=curvature, curvature_guard=True, **VARIANTS[name])
    options = dataclasses.asdict(settings)
    for key in ADAM_ONLY:
        del options[key]
    is_classification = task == "classification"
    loss = F.cross_entropy if is_classification else half_mse
    batches = classification(STEPS) if is_classification else regression(STEPS)
    model = network() if is_classification else network(OUTPUTS)
    reference = ReferenceQLR(DenseModel(model), loss, settings)
    loop = Loop(model, partial(SGDQLR, **options), loss)
    for step, (x, y) in enumerate(batches):
        rtol = FIRST if step == 0 else ALL
        expected = reference.step(x, y)
        loop.step(x, y)
        for key, value in expected.items():
            assert loop.stat(key) == pytest.approx(value, rel=rtol, abs=rtol * 1e-2), (key, step)
        torch.testing.assert_close(loop.theta(), reference.dense.theta, rtol=rtol, atol=rtol)


def bowl() -> tuple[nn.Linear, Tensor, Tensor]:
    """Build linear least squares: a quadratic bowl."""
    ((x, y),) = regression(1, batch=20)
    torch.manual_seed(8)
    return nn.Linear(FEATURES, OUTPUTS, bias=False, dtype=torch.float64), x, y


EXACT_LINE_SEARCH = {
    "damping": 0.0,
    "min_damping": 0.0,
    "damping_algorithm": "fixed",
    "max_lr": None,
}


@pytest.mark.parametrize("curvature", ["fisher", "hessian"])
def test_without_damping_it_is_exact_line_search(curvature: str) -> None:
    """On a bowl the new gradient is orthogonal to the step, and no other length is better."""
    model, x, y = bowl()
    loop = Loop(model, partial(SGDQLR, curvature=curvature, **EXACT_LINE_SEARCH), half_mse)
    for _ in range(5):
        before = loop.theta()
        loop.step(x, y)
        step = loop.theta() - before
        (gradient,) = torch.autograd.grad(half_mse(model(x), y), model.weight)
        cosine = gradient.reshape(-1) @ step / (gradient.norm() * step.norm())
        assert abs(cosine.item()) < 1e-11
        reached = half_mse(model(x), y).item()
        for factor in (0.99, 1.01):
            with torch.no_grad():
                other = nn.functional.linear(x, (before + factor * step).view_as(model.weight))
            assert half_mse(other, y).item() > reached


def test_without_damping_the_prediction_is_exact_on_a_bowl() -> None:
    model, x, y = bowl()
    options = {**EXACT_LINE_SEARCH, "damping_algorithm": "levenberg-marquardt"}
    loop = Loop(model, partial(SGDQLR, **options), half_mse)
    for _ in range(5):
        loop.step(x, y)
        assert loop.stat("reduction_ratio") == pytest.approx(1.0, abs=1e-8)
    assert loop.optimizer.damping == 0.0


def test_converges_like_steepest_descent() -> None:
    """The loss above the minimum shrinks at least by ((k - 1) / (k + 1))^2 each step."""
    model, x, y = bowl()
    solution = torch.linalg.lstsq(x, y).solution
    lowest = half_mse(x @ solution, y).item()
    eigenvalues = torch.linalg.eigvalsh(x.T @ x)
    condition = (eigenvalues[-1] / eigenvalues[0]).item()
    rate = ((condition - 1) / (condition + 1)) ** 2
    loop = Loop(model, partial(SGDQLR, **EXACT_LINE_SEARCH), half_mse)
    above = [loss - lowest for loss in loop.train([(x, y)] * 10)]
    for now, then in pairwise(above):
        assert then <= rate * now + 1e-14
    assert above[-1] < 1e-3 * above[0]


def test_it_keeps_no_state_for_parameters() -> None:
    loop = Loop(network(), SGDQLR)
    loop.train(classification(2))
    assert not loop.optimizer.state
    assert loop.optimizer.state_dict()["state"] == {}
