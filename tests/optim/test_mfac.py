"""Tests of lightning_curvature/optim/mfac.py: the rule; its state is in test_mfac_state.py."""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_curvature import MFAC
from tests.helpers.mfac_steps import (
    USUAL,
    Row,
    both_routes,
    draw,
    force,
    start,
    step,
    train,
    window_of,
)

EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}


# Exact


def by_the_book(
    rows: Sequence[Sequence[Tensor]],
    lr: float = 0.3,
    num_grads: int = 4,
    damping: float = 0.05,
    momentum: float = 0.0,
    momentum_type: str = "ema",
    l2_reg: float = 0.0,
    l2_in_window: bool = True,
    weight_decay: float = 0.0,
    window_normalization: str = "capacity",
    maximize: bool = False,
) -> Tensor:
    """Write the rule down with a dense matrix; returns all weights as one vector."""
    theta = torch.cat([p.detach().view(-1) for p in start()])
    v = torch.zeros_like(theta)
    window: list[Tensor] = []
    for row in rows:
        g = torch.cat([grad.reshape(-1) for grad in row])
        g = -g if maximize else g
        penalized = g + l2_reg * theta
        window = [*window, penalized if l2_in_window else g][-num_grads:]
        m = num_grads if window_normalization == "capacity" else len(window)
        h = damping * torch.eye(len(theta), dtype=theta.dtype)
        for one in window:
            h += torch.outer(one, one) / m
        u = torch.linalg.solve(h, penalized)
        share = 1 - momentum if momentum_type == "ema" else 1.0
        v = momentum * v + share * u
        theta = theta - lr * weight_decay * theta - lr * v
    return theta


OPTIONS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.8},
    {"momentum": 0.8, "momentum_type": "heavy_ball"},
    {"l2_reg": 0.3},
    {"l2_reg": 0.3, "l2_in_window": False},
    {"weight_decay": 0.2},
    {"l2_reg": 0.3, "weight_decay": 0.2, "momentum": 0.5},
    {"l2_reg": 0.3, "l2_in_window": False, "weight_decay": 0.2, "maximize": True},
    {"maximize": True, "momentum": 0.5, "momentum_type": "heavy_ball", "weight_decay": 0.2},
    {"window_normalization": "count"},
    {"window_normalization": "count", "l2_reg": 0.3, "l2_in_window": False, "num_grads": 20},
    {"num_grads": 1, "momentum": 0.3},
    {"num_grads": 1024, "damping": 1e-4},
    {"lr": 0.0, "weight_decay": 0.2},
    {"damping": 30.0, "lr": 10.0},
]


@both_routes
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_rule(options: dict[str, Any], route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force(route, monkeypatch)
    rows = draw(9)
    found = torch.cat([p.view(-1) for p in train(rows, **options)])
    torch.testing.assert_close(found, by_the_book(rows, **options), **EXACT)


@pytest.mark.parametrize("options", OPTIONS[:8], ids=str)
@pytest.mark.parametrize("foreach", [True, False])
def test_all_at_once_or_one_by_one(options: dict[str, Any], foreach: bool) -> None:
    rows = draw(6)
    expected = train(rows, **options)
    torch.testing.assert_close(train(rows, foreach=foreach, **options), expected, **EXACT)


def test_the_first_step() -> None:
    """Of the length lr m / ||g|| where damping is small."""
    (row,) = rows = draw(1)
    g = torch.cat([grad.reshape(-1) for grad in row])
    found = torch.cat([p.view(-1) for p in train(rows, lr=0.1, num_grads=32, damping=1e-9)])
    moved = torch.cat([p.detach().view(-1) for p in start()]) - found
    assert float(moved.norm()) == pytest.approx(0.1 * 32 / float(g.norm()), rel=1e-6)
    assert float(torch.cosine_similarity(moved, g, dim=0)) == pytest.approx(1.0)


def test_much_damping_is_gradient_descent() -> None:
    rows = draw(5)
    params = start()
    expected = [p - 0.1 * sum(row[i] for row in rows) for i, p in enumerate(params)]
    found = train(rows, params, damping=1e10, lr=1e9)
    torch.testing.assert_close(found, [p.detach() for p in expected], rtol=1e-8, atol=1e-8)


def test_heavy_ball_is_longer() -> None:
    """With a constant direction by 1 / (1 - momentum): 0.5 here."""
    (row,) = draw(1)
    ends = {}
    for kind in ("ema", "heavy_ball"):
        found = train([row] * 6, momentum=0.5, momentum_type=kind, num_grads=1)
        ends[kind] = [p.detach() - q for p, q in zip(start(), found, strict=True)]
    torch.testing.assert_close(ends["heavy_ball"], [2 * x for x in ends["ema"]])


def test_bytes_of_the_window() -> None:
    params = start((100, 50))
    whole = MFAC(params, num_grads=64)
    assert whole.window_bytes > 64 * 5000 * 8
    single = MFAC([p.detach().float().requires_grad_() for p in params], num_grads=64)
    assert 64 * 5000 * 4 < single.window_bytes < whole.window_bytes
    half = MFAC(params, num_grads=64, row_dtype="bfloat16")
    assert 64 * 5000 * 2 < half.window_bytes < single.window_bytes


@pytest.mark.parametrize("row_dtype", ["float32", "bfloat16", "float16"])
def test_rows_in_fewer_bits(row_dtype: str) -> None:
    """Of wide parameters: the steps are nearly the same."""
    rows, shapes = draw(8, (40, 30), (30,)), ((40, 30), (30,))
    found = train(rows, start(*shapes), row_dtype=row_dtype)
    expected = train(rows, start(*shapes))
    digits = {"float32": 1e-6, "bfloat16": 2e-2, "float16": 2e-3}[row_dtype]
    for one, other, first in zip(found, expected, start(*shapes), strict=True):
        assert not torch.equal(one, other)
        assert (one - other).norm() < digits * (other - first).norm()


# Groups


@both_routes
def test_groups_may_differ(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One matrix for all of them; own steps, decays, penalties, and one that climbs."""
    force(route, monkeypatch)
    rows = draw(6)
    own: list[dict[str, Any]] = [
        {"lr": 0.1, "l2_reg": 0.4},
        {"lr": 0.5, "weight_decay": 0.3, "maximize": True},
        {"lr": 0.2, "l2_reg": 0.1, "weight_decay": 0.1},
    ]
    params = start()
    groups = [{"params": [p], **options} for p, options in zip(params, own, strict=True)]
    optimizer = MFAC(groups, num_grads=4, damping=0.05)
    theta = [p.detach().clone() for p in params]
    window: list[Tensor] = []
    for row in rows:
        step(optimizer, params, row)
        g = [
            (-grad if each.get("maximize") else grad) + each.get("l2_reg", 0.0) * value
            for grad, each, value in zip(row, own, theta, strict=True)
        ]
        flat = torch.cat([x.reshape(-1) for x in g])
        window = [*window, flat][-4:]
        h = 0.05 * torch.eye(len(flat), dtype=flat.dtype)
        h += sum(torch.outer(x, x) for x in window) / 4
        parts = torch.linalg.solve(h, flat).split([x.numel() for x in g])
        for index, (each, part) in enumerate(zip(own, parts, strict=True)):
            rate = each["lr"]
            kept = (1 - rate * each.get("weight_decay", 0.0)) * theta[index]
            theta[index] = kept - rate * part.view(kept.shape)
    torch.testing.assert_close([p.detach() for p in params], theta, **EXACT)


def test_what_is_one_value_for_all_groups() -> None:
    one, two, _ = start()
    for name, value in {"num_grads": 7, "damping": 1.0, "momentum": 0.5, "sparse": True}.items():
        with pytest.raises(ValueError, match=f"Invalid {name}=.* in a parameter group"):
            MFAC([{"params": [one]}, {"params": [two], name: value}], **USUAL)


def test_a_group_that_comes_later() -> None:
    """As if its gradients had been zeros up to then."""
    rows = draw(8)
    params = start()
    optimizer = MFAC(params[:2], momentum=0.6, **USUAL)
    for row in rows[:3]:
        step(optimizer, params[:2], row[:2])
    optimizer.add_param_group({"params": [params[2]], "lr": 0.1})
    for row in rows[3:]:
        step(optimizer, params, row)
    late = [[*row[:2], torch.zeros_like(row[2])] for row in rows[:3]]
    expected = start()
    groups = [{"params": expected[:2]}, {"params": [expected[2]], "lr": 0.1}]
    reference = MFAC(groups, momentum=0.6, **USUAL)
    for row in [*late, *rows[3:]]:
        step(reference, expected, row)
    torch.testing.assert_close(params, expected, **EXACT)


# Parameters that have no gradient now and then


@both_routes
@pytest.mark.parametrize("frozen", [True, False])
def test_a_parameter_that_is_freed_later(
    route: str, frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets columns when it first has a gradient; past ones are zero there."""
    force(route, monkeypatch)
    rows = draw(9)
    params = start()
    params[0].requires_grad_(not frozen)
    optimizer = MFAC(params, momentum=0.6, **USUAL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for row in rows[:5]:
            step(optimizer, params, [None, *row[1:]])
        params[0].requires_grad_(True)
        for row in rows[5:]:
            step(optimizer, params, row)
    late: list[Row] = [[torch.zeros_like(row[0]), *row[1:]] for row in rows[:5]]
    torch.testing.assert_close(
        [p.detach() for p in params], train([*late, *rows[5:]], momentum=0.6), **EXACT
    )


@both_routes
@pytest.mark.parametrize("options", [{}, {"l2_reg": 0.3, "weight_decay": 0.1, "momentum": 0.5}])
def test_a_parameter_without_a_gradient(
    options: dict[str, Any], route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stays as it is, its part of the gradient is zeros, and the user is told once."""
    force(route, monkeypatch)
    rows = draw(7)
    params = start()
    optimizer = MFAC(params, **USUAL, **options)
    step(optimizer, params, rows[0])
    still = params[1].detach().clone()
    with pytest.warns(RuntimeWarning, match="1 of 3 parameters of MFAC have no gradient"):
        step(optimizer, params, [rows[1][0], None, rows[1][2]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for row in rows[2:4]:
            step(optimizer, params, [row[0], None, row[2]])
    assert torch.equal(params[1], still)
    window = window_of(optimizer)
    assert window["inserted"] == 4
    assert not window["rows"][1:4, 6:10].any()
    assert window["rows"][0, 6:10].all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(optimizer, params, rows[4])
        step(optimizer, params, [rows[5][0], None, rows[5][2]])
    assert not torch.equal(params[1], still)


def test_a_parameter_that_is_frozen_later() -> None:
    """Nothing is said of it."""
    rows = draw(4)
    params = start()
    optimizer = MFAC(params, **USUAL, weight_decay=0.1)
    step(optimizer, params, rows[0])
    params[0].requires_grad_(False)
    still = params[0].detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for row in rows[1:]:
            step(optimizer, params, [None, *row[1:]])
    assert torch.equal(params[0], still)


# Refused


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"lr": -1.0}, ValueError, "Invalid lr=-1.0: must be"),
        ({"num_grads": 0}, ValueError, "Invalid num_grads=0: must be"),
        ({"num_grads": 2.0}, TypeError, "Invalid num_grads=2.0"),
        ({"damping": 0.0}, ValueError, "Invalid damping=0.0: must be > 0"),
        ({"damping": math.nan}, ValueError, "Invalid damping=nan"),
        ({"momentum": 1.0}, ValueError, r"Invalid momentum=1.0: must be"),
        ({"momentum_type": "nesterov"}, ValueError, "Invalid momentum_type='nesterov'"),
        ({"l2_reg": -0.1}, ValueError, "Invalid l2_reg=-0.1"),
        ({"weight_decay": -0.1}, ValueError, "Invalid weight_decay=-0.1"),
        ({"window_normalization": "none"}, ValueError, "Invalid window_normalization='none'"),
        ({"row_dtype": "int8"}, ValueError, "Invalid row_dtype='int8'"),
        ({"gram_dtype": "float16"}, ValueError, "Invalid gram_dtype='float16'"),
        ({"placement": "disk"}, ValueError, "Invalid placement='disk'"),
        ({"l2_in_window": 1}, TypeError, "Invalid l2_in_window=1: must be True or False"),
        ({"sparse": "yes"}, TypeError, "Invalid sparse='yes': must be True or False"),
        ({"shard_window": None}, TypeError, "Invalid shard_window=None: must be True or False"),
        ({"gather_state": 0}, TypeError, "Invalid gather_state=0: must be True or False"),
        ({"max_failures": 0}, ValueError, "Invalid max_failures=0"),
    ],
    ids=str,
)
def test_refused(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        MFAC(start(), **options)


def test_parameters_on_two_devices() -> None:
    params: list[Tensor] = [nn.Parameter(torch.ones(2, device=kind)) for kind in ("cpu", "meta")]
    with pytest.raises(ValueError, match="on one device, got cpu, meta"):
        MFAC(params)._window_for(params)
