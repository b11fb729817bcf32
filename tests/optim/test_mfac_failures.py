"""Tests of lightning_curvature/optim/mfac.py: what cannot be used, and what is left out."""

import copy
import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature import MFAC
from lightning_curvature.curvature.gradient_window import WindowInverse
from tests.helpers.mfac_steps import (
    USUAL,
    both_routes,
    draw,
    force,
    start,
    step,
    train,
    trained,
    window_of,
)
from tests.helpers.optimizer_db import identical

EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.6, "l2_reg": 0.2, "weight_decay": 0.1},
    {"momentum": 0.6, "momentum_type": "heavy_ball", "l2_reg": 0.2, "l2_in_window": False},
    {"row_dtype": "bfloat16", "window_normalization": "count"},
    {"row_dtype": "float16", "gram_dtype": "float32", "num_grads": 2},
]


# Gradients that are not finite


@both_routes
@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_they_never_enter_the_window(
    options: dict[str, Any],
    value: float,
    dtype: torch.dtype,
    route: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Weights, momentum and window are those of a run without such steps, bit for bit."""
    force(route, monkeypatch)
    shapes = ((30, 7), (11,))
    rows = draw(9, *shapes)
    bad = [[g.clone() for g in row] for row in draw(9, *shapes, seed=1)]
    for row in bad:
        row[1][4] = value
    # At the very start, while the window fills, after it has come around, and several in a row.
    mixed = [bad[0], *rows[:3], bad[1], *rows[3:7], bad[2], bad[3], rows[7], bad[4], rows[8]]
    expected = trained(rows, start(*shapes, dtype=dtype), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        found = trained(mixed, start(*shapes, dtype=dtype), **options)
    assert all(torch.equal(p, q) for p, q in zip(found[1], expected[1], strict=True))
    assert identical(window_of(found[0]), window_of(expected[0]))
    states = [optimizer.state_dict()["state"] for optimizer in (found[0], expected[0])]
    assert identical(*states)
    assert found[0].stats["skipped_steps"] == 5
    assert found[0].stats["skipped_windows"] == found[0].stats["skipped_directions"] == 0


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randn(8, 5, generator=generator), torch.randint(3, (8,), generator=generator))
        for _ in range(count)
    ]


def model() -> nn.Linear:
    made = nn.Linear(5, 3)
    with torch.no_grad():
        made.weight.copy_(torch.linspace(-1, 1, 15).view(3, 5))
        made.bias.zero_()
    return made


@pytest.mark.parametrize("unscale", [True, False], ids=["unscaled before", "unscaled by step"])
def test_scaled_losses(unscale: bool) -> None:
    """Rows are unscaled gradients, and no row is that of an overflow."""
    data, ends = batches(8), []
    for scaled in (True, False):
        net = model()
        optimizer = MFAC(net.parameters(), **USUAL, momentum=0.5)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
        scaler = scaler if scaled else torch.amp.GradScaler("cpu", enabled=False)
        for number, (x, y) in enumerate(data):
            overflows = number in (0, 4)
            if overflows and not scaled:
                continue
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x), y) * (1e38 if overflows else 1.0)
            scaler.scale(loss).backward()
            if unscale:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
        ends.append((net, optimizer))
    for p, q in zip(ends[0][0].parameters(), ends[1][0].parameters(), strict=True):
        assert torch.equal(p, q)
    assert identical(window_of(ends[0][1]), window_of(ends[1][1]))
    rows = window_of(ends[0][1])["rows"]
    assert (rows.norm(dim=1) <= 0.1 + 1e-6).all() == unscale


# Windows and directions that cannot be used


@both_routes
@pytest.mark.parametrize("in_window", [True, False])
def test_a_core_without_a_factor(
    in_window: bool, route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step goes along the newest gradient alone, is counted, and told once."""
    force(route, monkeypatch)
    rows = draw(6)
    params = start()
    options = {**USUAL, "l2_reg": 0.2, "l2_in_window": in_window, "max_failures": 1}
    optimizer = MFAC(params, **options)
    for row in rows[:3]:
        step(optimizer, params, row)
    real = torch.linalg.cholesky_ex
    failing: Any = lambda core: (real(core).L, torch.tensor(1))  # noqa: E731
    monkeypatch.setattr(torch.linalg, "cholesky_ex", failing)
    text = "MFAC took 1 steps along the newest gradient alone.* Raise damping"
    for number, row in enumerate(rows[3:5]):
        before = [p.detach().clone() for p in params]
        if number == 0:
            with pytest.warns(RuntimeWarning, match=text):
                step(optimizer, params, row)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                step(optimizer, params, row)
        penalty = torch.cat([0.2 * x.view(-1) for x in before])
        g = torch.cat([x.reshape(-1) for x in row])
        x = g + penalty if in_window else g
        u = x / (0.05 + x.dot(x) / 4)
        moved = torch.cat([(b - p).view(-1) for b, p in zip(before, params, strict=True)])
        torch.testing.assert_close(moved, 0.3 * u, **EXACT)
    assert optimizer.stats["skipped_windows"] == 2
    # The gradients are in the window all the same.
    monkeypatch.setattr(torch.linalg, "cholesky_ex", real)
    step(optimizer, params, rows[5])
    assert optimizer.stats["skipped_windows"] == 2
    assert optimizer.stats["skipped_directions"] == 0
    assert window_of(optimizer)["inserted"] == 6


@both_routes
def test_gradients_that_are_the_same_and_hardly_any_damping(
    route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The core is singular without any rounding; an m-th of a step of the first one's is left."""
    force(route, monkeypatch)
    row = [torch.ones(4, dtype=torch.float64)]
    with pytest.warns(RuntimeWarning, match="Raise damping"):
        optimizer, (p,) = trained(
            [row] * 3, start((4,)), damping=1e-300, num_grads=8, max_failures=1
        )
    expected = start((4,))[0].detach() - 3 * 0.3 * 8 / 4
    torch.testing.assert_close(p.detach(), expected, **EXACT)
    assert optimizer.stats["skipped_windows"] == 2


@both_routes
def test_a_direction_that_is_not_finite(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is left out and counted; decay goes on, and so does training."""
    force(route, monkeypatch)
    rows = draw(4)
    params = start()
    optimizer = MFAC(params, **USUAL, weight_decay=0.5, max_failures=1)
    step(optimizer, params, rows[0])
    before = [p.detach().clone() for p in params]
    with monkeypatch.context() as patched:
        real = WindowInverse.newest_direction
        patched.setattr(WindowInverse, "newest_direction", lambda self: real(self) * math.inf)
        with pytest.warns(RuntimeWarning, match="MFAC left out 1 directions"):
            step(optimizer, params, rows[1])
    for p, q in zip(params, before, strict=True):
        torch.testing.assert_close(p.detach(), 0.85 * q, rtol=1e-14, atol=0.0)
    step(optimizer, params, rows[2])
    assert optimizer.stats["skipped_directions"] == 1
    assert all(p.isfinite().all() for p in params)
    assert not torch.equal(params[0], 0.85 * before[0])


# Sparse


def sparse_start() -> list[nn.Parameter]:
    """Make parameters of which some entries are zero: 0 in the second all of them."""
    params = start((3, 4), (5,), (6,))
    with torch.no_grad():
        params[0][1:, ::2] = 0.0
        params[1].zero_()
        params[2][3] = -0.0
    return params


def masked(rows: list[list[Tensor]]) -> list[list[Tensor]]:
    """Take gradients away where weights are zero at the start."""
    kept = [p.detach() != 0 for p in sparse_start()]
    return [[g * keep for g, keep in zip(row, kept, strict=True)] for row in rows]


@both_routes
@pytest.mark.parametrize("options", SETTINGS[:3], ids=str)
def test_zeros_stay_zero(
    options: dict[str, Any], route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have no columns; the others move as if those gradients were zero."""
    force(route, monkeypatch)
    rows = draw(7, (3, 4), (5,), (6,))
    optimizer, params = trained(rows, sparse_start(), sparse=True, **options)
    for p, first in zip(params, sparse_start(), strict=True):
        assert not p[first == 0].any()
        assert (p[first != 0] != first[first != 0]).all()
    torch.testing.assert_close(
        [p.detach() for p in params], train(masked(rows), sparse_start(), **options), **EXACT
    )
    window = window_of(optimizer)
    assert window["num_columns"] == window["rows"].shape[1] == 8 + 5
    assert int(window["kept"].sum()) == 13


def test_zeros_stay_zero_after_resuming() -> None:
    """Those of the first step, not those of the day: a weight that crosses zero goes on."""
    rows = draw(8, (3, 4), (5,), (6,))
    whole, params = trained(rows[:4], sparse_start(), sparse=True, momentum=0.5)
    with torch.no_grad():
        params[2][0] = 0.0
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    other = MFAC(copies, lr=9.0, sparse=True)
    other.load_state_dict(copy.deepcopy(whole.state_dict()))
    for row in rows[4:]:
        step(whole, params, row)
        step(other, copies, row)
    assert all(torch.equal(p, q) for p, q in zip(params, copies, strict=True))
    assert copies[2][0] != 0
    assert all(not p[q == 0].any() for p, q in zip(copies, sparse_start(), strict=True))


def test_a_sparse_parameter_that_is_freed_later() -> None:
    """The others keep their columns, also one whose weight is zero at that moment."""
    rows = draw(7, (3, 4), (5,), (6,))
    params = sparse_start()
    late = [[torch.zeros_like(row[0]), *row[1:]] for row in masked(rows)[:3]]
    optimizer = MFAC(params, **USUAL, sparse=True)
    for row in rows[:3]:
        step(optimizer, params, [None, *row[1:]])
    assert window_of(optimizer)["num_columns"] == 5
    dense, expected = trained(late, sparse_start())
    with torch.no_grad():
        params[2][0] = expected[2][0] = 0.0
    for row, kept in zip(rows[3:], masked(rows)[3:], strict=True):
        step(optimizer, params, row)
        step(dense, expected, kept)
    assert window_of(optimizer)["num_columns"] == 13
    torch.testing.assert_close(params, expected, **EXACT)


def test_nothing_but_zeros() -> None:
    """No columns at all is no error; nothing moves."""
    params = [nn.Parameter(torch.zeros(3))]
    optimizer, (p,) = trained([[torch.ones(3)]] * 3, params, sparse=True)
    assert not p.any()
    assert window_of(optimizer)["num_columns"] == 0
    other = MFAC([nn.Parameter(torch.zeros(3))], sparse=True)
    other.load_state_dict(optimizer.state_dict())
    assert identical(window_of(other), window_of(optimizer))


# Penalties that are not finite


@both_routes
@pytest.mark.parametrize("in_window", [True, False])
def test_a_penalty_that_overflows(
    in_window: bool, route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient is finite: the step is left out and counted, the window stays as it was."""
    force(route, monkeypatch)
    p = nn.Parameter(torch.tensor([1e10, 1.0]))
    optimizer = MFAC([p], lr=0.1, damping=1.0, l2_reg=0.1, l2_in_window=in_window)
    p.grad = torch.tensor([0.5, -0.25])
    optimizer.step()
    before, window = p.detach().clone(), copy.deepcopy(optimizer.state_dict()["curvature"])
    optimizer.param_groups[0]["l2_reg"] = 1e30
    optimizer.step()
    assert torch.equal(p, before)
    assert int(optimizer.stats["skipped_directions"]) == 1
    assert int(optimizer.stats["skipped_steps"]) == 0
    after = optimizer.state_dict()["curvature"]["window"]
    assert identical(after, window["window"])
    with torch.no_grad():
        p.fill_(1.0)
    optimizer.param_groups[0]["l2_reg"] = 0.0
    optimizer.step()
    assert torch.isfinite(p).all()
    assert not torch.equal(p, torch.ones(2))


def test_parameters_on_two_devices_are_refused() -> None:
    here, there = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, device="meta"))
    with pytest.raises(ValueError, match="all parameters on one device, got cpu, meta"):
        MFAC([here, there])
    optimizer = MFAC([here])
    with pytest.raises(ValueError, match="all parameters on one device"):
        optimizer.add_param_group({"params": [there]})
    assert len(optimizer.param_groups) == 1


def test_a_penalty_that_grows_without_end_is_told_before() -> None:
    p = nn.Parameter(torch.ones(2))
    with pytest.warns(RuntimeWarning, match=r"by lr \* l2_reg / damping = 3 of their size"):
        MFAC([p], lr=0.1, l2_reg=0.03, damping=1e-3, l2_in_window=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MFAC([p], lr=0.1, l2_reg=0.03, damping=1e-3)


def test_damping_of_a_schedule_is_looked_at_before_the_window_changes() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = MFAC([p])
    p.grad = torch.ones(2)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict()["curvature"]["window"])
    optimizer.param_groups[0]["damping"] = 0.0
    with pytest.raises(ValueError, match=r"Invalid damping=0\.0"):
        optimizer.step()
    assert identical(optimizer.state_dict()["curvature"]["window"], before)


def test_momentum_of_a_checkpoint_is_looked_at() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = MFAC([p], momentum=0.9)
    p.grad = torch.ones(2)
    optimizer.step()
    for bad in (torch.tensor([1.0, torch.nan]), torch.ones(3), "text"):
        state = copy.deepcopy(optimizer.state_dict())
        state["state"][0]["momentum_buffer"] = bad
        with pytest.raises(ValueError, match="'momentum_buffer' of parameter 0 must be"):
            optimizer.load_state_dict(state)


def test_parameters_in_two_precisions() -> None:
    params = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, dtype=torch.float64))]
    optimizer = MFAC(params, momentum=0.9)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all(bool((p < 1).all()) for p in params)
