"""Guards of lightning_curvature/optim/qlr.py under random accidents and saturation."""

import math
import warnings
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_curvature import SGDQLR, AdamQLR
from tests.helpers.plain_loop import Loop, classification, network

POISONS = ["none", "nan-x", "inf-x", "huge-x", "nan-grad", "inf-grad", "huge-grad", "zero-grad"]


def poisoned_step(loop: Loop, x: Tensor, y: Tensor, poison: str) -> None:
    """Take a step with a bad number somewhere."""
    kind, _, place = poison.partition("-")
    value = {"nan": math.nan, "inf": math.inf, "huge": 1e30, "zero": 0.0, "none": 0.0}[kind]
    if place == "x":
        x = x.clone()
        x[0, 0] = value
    loop.backward(x, y)
    if place == "grad":
        loop.model[0].weight.grad[0, 0] = value
    loop.optimizer.step()


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    cls=st.sampled_from([AdamQLR, SGDQLR]),
    poisons=st.lists(st.sampled_from(POISONS), min_size=20, max_size=20),
    options=st.fixed_dictionaries(
        {
            "damping_algorithm": st.sampled_from(
                ["levenberg-marquardt", "decreasing-loss", "fixed"]
            ),
            "damping": st.sampled_from([0.0, 1e-3]),
            "min_damping": st.sampled_from([0.0, 1e-8]),
            "curvature": st.sampled_from(["fisher", "hessian"]),
            "max_lr": st.sampled_from([None, 0.1]),
            "curvature_update_interval": st.sampled_from([1, 3]),
            "damping_update_interval": st.sampled_from([1, 2]),
            "weight_decay": st.sampled_from([0.0, 0.01]),
            "decoupled_weight_decay": st.booleans(),
            "grad_clip_norm": st.sampled_from([None, 1.0]),
            "direction_clip": st.sampled_from([None, 1.0]),
            "update_clip_norm": st.sampled_from([None, 1.0]),
            "lr_ema": st.sampled_from([0.0, 0.5]),
            "curvature_ema": st.sampled_from([0.0, 0.5]),
            "curvature_guard": st.booleans(),
        }
    ),
    directional=st.sampled_from(["jvp", "fd"]),
)
def test_nothing_bad_ever_reaches_a_weight(
    cls: type, poisons: list[str], options: dict[str, Any], directional: str
) -> None:
    make = partial(cls, **options, max_failures=1000)
    loop = Loop(network(dtype=torch.float32), make, directional=directional)
    with warnings.catch_warnings():
        # The self-check notices gradients that were changed by hand.
        warnings.simplefilter("ignore", RuntimeWarning)
        for (x, y), poison in zip(classification(20, dtype=torch.float32), poisons, strict=True):
            poisoned_step(loop, x, y, poison)
            assert loop.is_finite(), poison


def saturating_run(seed: int, **options: Any) -> float:
    """Train on small batches for 20 steps and return the loss over all data."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(10, 40), nn.ReLU(), nn.Linear(40, 4)).double()
    x = torch.randn(200, 10, dtype=torch.float64)
    y = (x @ torch.randn(10, 4, dtype=torch.float64)).argmax(dim=1)
    loop = Loop(model, partial(AdamQLR, **options), directional="jvp")
    for step in range(20):
        rows = torch.arange(40) + 40 * (step % 5)
        loop.step(x[rows], y[rows])
    with torch.no_grad():
        return F.cross_entropy(model(x), y).item()


@pytest.mark.filterwarnings("ignore:AdamQLR derived a step length:RuntimeWarning")
def test_the_default_cap_prevents_the_blow_up_of_saturated_predictions() -> None:
    seeds = range(8)
    uncapped = [saturating_run(seed, max_lr=None) for seed in seeds]
    capped = [saturating_run(seed) for seed in seeds]
    assert sum(loss > 4 for loss in uncapped) >= 5, uncapped
    assert max(capped) < 1.0, capped
