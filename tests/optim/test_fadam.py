"""Tests of lightning_curvature/optim/fadam.py."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_curvature import FAdam
from lightning_curvature.optim import per_tensor
from lightning_curvature.optim.diagonal import DiagonalOptimizer

EXACT = {"rtol": 1e-12, "atol": 1e-14}
ROUTES = ["blocks", "small blocks", "one tensor at a time", "branch-free"]
# What the official code does, under our names.
OFFICIAL = {"clip_mode": "scale", "skip_unused": False}

Grads = list[list[Tensor]]


def draw(steps: int, *shapes: tuple[int, ...], size: float = 1.0, seed: int = 0) -> Grads:
    """Draw gradients of parameters, for several steps; some coordinates never have any."""
    generator = torch.Generator().manual_seed(seed)
    grads = [
        [size * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        for _ in range(steps)
    ]
    for row in grads:
        row[0].view(-1)[:2] = 0.0
    return grads


def start(grads: Grads, dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(9)
    return [
        nn.Parameter(torch.randn(g.shape, generator=generator, dtype=torch.float64).to(dtype))
        for g in grads[0]
    ]


def train(grads: Grads, params: list[nn.Parameter] | None = None, **options: Any) -> FAdam:
    """Take a step per row of gradients; None skips a parameter."""
    params = start(grads) if params is None else params
    optimizer = FAdam(params, **options)
    for row in grads:
        for p, grad in zip(params, row, strict=True):
            p.grad = None if grad is None else grad.to(p.dtype, copy=True)
        optimizer.step()
    return optimizer


def values(optimizer: FAdam) -> list[Tensor]:
    return [p.detach() for group in optimizer.param_groups for p in group["params"]]


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


# Exact


def by_the_book(
    p: Tensor,
    grads: list[Tensor],
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    clip: float = 1.0,
    clip_mode: str = "limit",
    eps_mode: str = "max",
    power: float = 0.5,
    weight_decay: float = 0.001,
    skip_unused: bool = True,
) -> Tensor:
    """Write the rule down as the paper and its code do, one coordinate after the other."""
    theta = p.detach().reshape(-1).tolist()
    f, m = [1.0] * len(theta), [0.0] * len(theta)

    def limited(z: list[float]) -> list[float]:
        size = math.sqrt(sum(x * x for x in z) / len(z))
        factor = clip / max(1, size) if clip_mode == "scale" else 1 / max(1, size / clip)
        return [x * factor for x in z]

    for t, grad in enumerate(grads, start=1):
        g = grad.reshape(-1).tolist()
        beta2 = betas[1] * (1 - betas[1] ** (t - 1)) / (1 - betas[1] ** t)
        f = [beta2 * a + (1 - beta2) * b * b for a, b in zip(f, g, strict=True)]
        size = math.sqrt(sum(x * x for x in g) / len(g))
        added = eps * max(1, size)
        if eps_mode == "min":
            added = max(min(eps, 0.01 * size) ** (2 * power), 1e-30)
        scales = []
        for fisher in f:
            root = fisher**power
            if not skip_unused:
                scales.append(1 / (root + added))
            else:
                scales.append(1 / (root + added**2 / root) if root > 0 else 0.0)
        n = limited([a * b for a, b in zip(g, scales, strict=True)])
        m = [betas[0] * a + (1 - betas[0]) * b for a, b in zip(m, n, strict=True)]
        w = limited([a * b for a, b in zip(theta, scales, strict=True)])
        theta = [a - lr * (b + weight_decay * c) for a, b, c in zip(theta, m, w, strict=True)]
    return torch.tensor(theta, dtype=torch.float64).view(p.shape)


OPTIONS: list[dict[str, Any]] = [
    {},
    OFFICIAL,
    {"clip": 0.3, "weight_decay": 0.1},
    {"clip": 2.0, "clip_mode": "scale", "lr": 0.1},
    {"eps": 1e-2},
    {"eps": 1e-2, "skip_unused": False},
    {"eps": 1e-2, "eps_mode": "min"},
    {"eps": 1e-2, "eps_mode": "min", "skip_unused": False, "power": 0.7},
    {"power": 1.0, "eps": 1e-4, "betas": (0.5, 0.9)},
    {"power": 0.3, "skip_unused": False, "weight_decay": 0.0},
    {"betas": (0.0, 0.0), "weight_decay": 1.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("size", [1e-2, 10.0])
def test_the_rule(options: dict[str, Any], size: float) -> None:
    grads = draw(6, (5, 3), (4,), (1,), size=size)
    found = values(train(grads, **options))
    for index, p in enumerate(start(grads)):
        expected = by_the_book(p, [row[index] for row in grads], **options)
        torch.testing.assert_close(found[index], expected, **EXACT)


def force(route: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Make the optimizer take a route; return the arguments that belong to it."""
    if route == "small blocks":
        monkeypatch.setattr(per_tensor, "_PART", 7)
    if route == "branch-free":
        monkeypatch.setattr(DiagonalOptimizer, "_can_look", lambda *_: False)
    return {"foreach": False} if route == "one tensor at a time" else {}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("options", [*OPTIONS, {"maximize": True}], ids=str)
def test_all_routes_are_the_same(
    route: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    grads = draw(4, (9, 4), (6,), (), (0,))
    expected = train(grads, **options)
    found = train(grads, **options, **force(route, monkeypatch))
    torch.testing.assert_close(values(found), values(expected), **EXACT)
    for p, q in zip(found.state.values(), expected.state.values(), strict=True):
        torch.testing.assert_close(dict(p), dict(q), **EXACT)
    assert found.stats.keys() == expected.stats.keys()
    torch.testing.assert_close(found.stats, expected.stats, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("layout", ["channels last", "gradients in another layout", "transposed"])
def test_layouts(route: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    grads = draw(3, (4, 3, 2, 5))
    expected = values(train(grads, weight_decay=0.1))
    params = start(grads)
    if layout == "transposed":
        params = [nn.Parameter(p.detach().permute(3, 2, 1, 0).contiguous()) for p in params]
        params = [nn.Parameter(p.detach().permute(3, 2, 1, 0)) for p in params]
    else:
        params = [nn.Parameter(p.detach().to(memory_format=torch.channels_last)) for p in params]
    if layout == "channels last":
        kind = torch.channels_last
        grads = [[g.to(memory_format=kind) for g in row] for row in grads]
    found = train(grads, params, weight_decay=0.1, **force(route, monkeypatch))
    torch.testing.assert_close(values(found), expected, **EXACT)


@pytest.mark.parametrize("route", ROUTES)
def test_a_bad_gradient_changes_nothing(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    grads = draw(4, (5, 3), (4,))
    bad = [[g.clone() for g in row] for row in grads]
    bad.insert(2, [torch.full_like(g, math.nan) for g in grads[0]])
    bad.insert(0, [torch.full_like(g, math.inf) for g in grads[0]])
    expected = train(grads)
    found = train(bad, **force(route, monkeypatch))
    torch.testing.assert_close(values(found), values(expected), **EXACT)
    assert found.stats["skipped_steps"] == 2


def test_parameters_that_had_no_gradient_now_and_then() -> None:
    """Each has its own number of steps."""
    grads = draw(6, (5, 3), (4,))
    some: Any = [[row[0], row[1] if t % 2 else None] for t, row in enumerate(grads)]
    first, second = values(train(some, start(grads)))
    torch.testing.assert_close(first, values(train([[row[0]] for row in grads]))[0], **EXACT)
    alone = [[row[1]] for t, row in enumerate(grads) if t % 2]
    expected = train(alone, [start(grads)[1]])
    torch.testing.assert_close(second, values(expected)[0], **EXACT)


def test_groups_may_differ() -> None:
    grads = draw(4, (5, 3), (4,))
    own = {"lr": 0.1, "betas": (0.5, 0.9), "clip": 0.2, "power": 0.4, "weight_decay": 0.5}
    one, two = start(grads)
    optimizer = FAdam([{"params": [one]}, {"params": [two], **own}])
    for row in grads:
        one.grad, two.grad = row
        optimizer.step()
    torch.testing.assert_close(one, by_the_book(start(grads)[0], [row[0] for row in grads]))
    expected = by_the_book(start(grads)[1], [row[1] for row in grads], **own)
    torch.testing.assert_close(two.detach(), expected, **EXACT)


@pytest.mark.parametrize("route", ROUTES)
def test_climbing(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    grads = draw(3, (9, 4), (6,))
    turned = [[-g for g in row] for row in grads]
    expected = train(grads, weight_decay=0.5)
    found = train(turned, weight_decay=0.5, maximize=True, **force(route, monkeypatch))
    torch.testing.assert_close(values(found), values(expected), **EXACT)


# Reductions


def test_without_averages_and_clip_it_is_adam() -> None:
    """... with beta1 = 0: the order of scaling and averaging is all that differs then."""
    grads = draw(10, (5, 3), (4,), size=0.1)
    options: dict[str, Any] = {"lr": 0.01, "betas": (0.0, 0.99), "eps": 1e-3}
    found = train(grads, clip=1e6, weight_decay=0.0, skip_unused=False, **options)
    params = start(grads)
    adam = torch.optim.Adam(params, **options)
    for row in grads:
        for p, grad in zip(params, row, strict=True):
            p.grad = grad.clone()
        adam.step()
    torch.testing.assert_close(values(found), [p.detach() for p in params], **EXACT)


def test_the_first_step_follows_the_sign() -> None:
    """It is 1 - beta1 of a full one."""
    (row,) = grads = draw(1, (5, 3))
    found = values(train(grads, lr=0.5, weight_decay=0.0))[0]
    expected = start(grads)[0].detach() - 0.5 * 0.1 * row[0].sign()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_the_second_moment_is_adams() -> None:
    grads = draw(5, (5, 3))
    optimizer = train(grads, betas=(0.9, 0.99))
    (state,) = optimizer.state.values()
    expected = sum(0.01 * 0.99 ** (4 - t) * row[0] ** 2 for t, row in enumerate(grads))
    torch.testing.assert_close(state["exp_avg_sq"], expected, **EXACT)
    assert float(state["step"]) == 5


# The clip


def test_a_scaled_gradient_is_limited() -> None:
    """A jump of the gradient is followed by updates of ordinary length."""
    grads = draw(3, (50,), size=1e-3)
    grads += [[1e3 * row[0]] for row in draw(1, (50,), size=1e-3, seed=1)]
    before = values(train(grads[:3], betas=(0.0, 0.999), weight_decay=0.0, lr=1.0))[0]
    optimizer = train(grads, betas=(0.0, 0.999), weight_decay=0.0, lr=1.0)
    assert rms(values(optimizer)[0] - before) == pytest.approx(1.0, rel=1e-6)
    assert optimizer.stats["win_rate"] == 0.0


@pytest.mark.parametrize(("mode", "factor"), [("limit", 1.0), ("scale", 4.0)])
def test_what_is_short_enough(mode: str, factor: float) -> None:
    """... is left alone, or multiplied by the limit all the same."""
    first, second = draw(2, (50,))
    grads = [first, [0.01 * second[0]]]
    options: dict[str, Any] = {"betas": (0.0, 0.9), "weight_decay": 0.0, "lr": 1.0}
    before = values(train(grads[:1], clip=4.0, clip_mode=mode, **options))[0]
    optimizer = train(grads, clip=4.0, clip_mode=mode, **options)
    fisher = (0.9 * grads[0][0] ** 2 + grads[1][0] ** 2) / 1.9
    scaled = torch.where(fisher > 0, grads[1][0] / fisher.sqrt().clamp_min(1e-30), 0.0)
    assert rms(scaled) < 0.5
    moved = before - values(optimizer)[0]
    torch.testing.assert_close(moved, factor * scaled, rtol=1e-6, atol=1e-6)
    assert optimizer.stats["win_rate"] == 1.0


def test_win_rate_counts_tensors() -> None:
    quiet, loud = draw(6, (50,), size=1.0), draw(6, (30,), size=1.0, seed=4)
    grads = [[a[0], b[0]] for a, b in zip(quiet, loud, strict=True)]
    grads.append([0.1 * grads[0][0], 10 * grads[0][1]])
    assert train(grads).stats["win_rate"] == 0.5
    grads = [[grads[0][1].float(), torch.ones(7)]]
    # A first step has RMS 1, up to rounding.
    assert train(grads, start(grads, torch.float32)).stats["win_rate"] == 1.0


# Coordinates without a gradient


def table(optimizer: Callable[[list[Any]], Any]) -> Tensor:
    """Train a table of which no batch contains the last 100 rows."""
    generator = torch.Generator().manual_seed(3)
    p = nn.Parameter(torch.randn(1000, 16, generator=generator, dtype=torch.float64))
    made = optimizer([p])
    for _ in range(100):
        p.grad = 1e-2 * torch.randn(1000, 16, generator=generator, dtype=torch.float64)
        p.grad[900:] = 0.0
        made.step()
    return p.detach()


def decayed(make: Callable[..., Any], **options: Any) -> tuple[float, float]:
    """Return what is left of the unused rows, and how far decay alone moved the others."""
    plain = table(lambda params: make(params, lr=1e-2, weight_decay=0.0, **options))
    found = table(lambda params: make(params, lr=1e-2, weight_decay=0.1, **options))
    left = float(found[900:].norm() / plain[900:].norm())
    return left, float((found[:900] - plain[:900]).norm() / plain[:900].norm())


def test_unused_rows_of_a_table() -> None:
    """In the official rule they take all of the decay."""
    left, moved = decayed(FAdam, **OFFICIAL)
    assert left == pytest.approx(0.680, abs=0.01)
    assert moved < 2e-6
    left, moved = decayed(torch.optim.AdamW)
    assert left == pytest.approx(0.905, abs=0.001)
    assert moved == pytest.approx(0.095, abs=0.03)
    left, moved = decayed(FAdam)
    assert left == 1.0
    assert moved == pytest.approx(0.095, abs=0.03)


def test_gradients_of_rounding_noise_move_nothing() -> None:
    """As those of a bias before a normalization; divided by eps they would."""
    noise = [[1e-18 * row[0]] for row in draw(5, (30,))]
    before = start(noise)[0].detach()
    found = values(train(noise, lr=1.0, weight_decay=0.0))[0]
    torch.testing.assert_close(found, before, rtol=0.0, atol=1e-18)
    found = values(train(noise, lr=1.0, weight_decay=0.1))[0]
    torch.testing.assert_close(found, before, rtol=0.02, atol=0.0)
    official = values(train(noise, lr=1.0, weight_decay=0.1, skip_unused=False))[0]
    assert rms(official - before) > 0.3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("skip_unused", [True, False])
@pytest.mark.parametrize("eps_mode", ["max", "min"])
@pytest.mark.parametrize("power", [0.5, 1.0])
@pytest.mark.parametrize("route", ["blocks", "branch-free"])
def test_no_gradient_is_no_nan(
    dtype: torch.dtype,
    skip_unused: bool,
    eps_mode: Any,
    power: float,
    route: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The paper's eps is 0 where the gradient is."""
    grads = [[torch.zeros(3, 2), torch.ones(2)]] * 3
    options = {"skip_unused": skip_unused, "eps_mode": eps_mode, "power": power}
    optimizer = train(grads, start(grads, dtype), **options, **force(route, monkeypatch))
    for p in values(optimizer):
        assert bool(torch.isfinite(p).all())
    for state in optimizer.state.values():
        assert all(bool(torch.isfinite(x).all()) for x in state.values())


def test_a_gradient_that_vanishes_later() -> None:
    grads = draw(2, (6,)) + [[torch.zeros(6)]] * 3
    for eps_mode in ("max", "min"):
        assert bool(torch.isfinite(values(train(grads, eps_mode=eps_mode))[0]).all())


# Precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("route", ROUTES)
def test_half_precision(dtype: torch.dtype, route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """State and arithmetic are float32, and the parameter is rounded once."""
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.5}
    grads = [[g.to(dtype).double() for g in row] for row in draw(1, (9, 4), (5,))]
    halves = train(grads, start(grads, dtype), **options, **force(route, monkeypatch))
    wide = train(grads, [nn.Parameter(p.detach().double()) for p in start(grads, dtype)], **options)
    for found, expected in zip(values(halves), values(wide), strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected.to(dtype), rtol=1e-5, atol=1e-6)
    for state in halves.state.values():
        assert {x.dtype for x in state.values()} == {torch.float32}


def test_float32_follows_float64() -> None:
    """The correction of the second moment loses no digits near t = 1."""
    grads = draw(20, (40, 3), (7,))
    narrow = train(grads, start(grads, torch.float32), lr=0.01)
    same = [nn.Parameter(p.detach().double()) for p in start(grads, torch.float32)]
    wide = train(grads, same, lr=0.01)
    for found, expected in zip(values(narrow), values(wide), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


def test_mixed_precision_of_parameters() -> None:
    grads = draw(3, (9, 4), (5,))
    one, two = start(grads)
    found = values(train(grads, [nn.Parameter(one.detach().float()), two]))
    expected = values(train(grads))
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1], expected[1], **EXACT)


# Errors


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"lr": -1.0}, ValueError, "Invalid lr=-1.0: must be >= 0."),
        ({"betas": (0.9,)}, ValueError, "Invalid betas=(0.9,): must be two numbers in [0, 1)."),
        ({"betas": (1.0, 0.9)}, ValueError, "Invalid betas[0]=1.0: must be in [0, 1)."),
        ({"betas": (0.9, 1.0)}, ValueError, "Invalid betas[1]=1.0: must be in [0, 1)."),
        ({"eps": 0.0}, ValueError, "Invalid eps=0.0: must be > 0."),
        ({"clip": 0}, ValueError, "Invalid clip=0: must be > 0."),
        (
            {"clip_mode": "paper"},
            ValueError,
            "Invalid clip_mode='paper': must be one of 'limit', 'scale'.",
        ),
        (
            {"eps_mode": "mean"},
            ValueError,
            "Invalid eps_mode='mean': must be one of 'max', 'min'.",
        ),
        ({"power": 0.0}, ValueError, "Invalid power=0.0: must be in (0, 1]."),
        ({"power": 1.5}, ValueError, "Invalid power=1.5: must be in (0, 1]."),
        ({"weight_decay": -0.1}, ValueError, "Invalid weight_decay=-0.1: must be >= 0."),
        (
            {"max_failures": 0},
            ValueError,
            "Invalid max_failures=0: must be an integer >= 1, in optimizer steps.",
        ),
        ({"lr": "x"}, TypeError, "Invalid lr='x': must be a number, got str."),
    ],
)
def test_errors(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        FAdam([nn.Parameter(torch.ones(2))], **options)
    optimizer = FAdam([nn.Parameter(torch.ones(2))])
    if "max_failures" not in options:
        with pytest.raises(error, match=f"^{re.escape(text)}$"):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], **options})
    assert len(optimizer.param_groups) == 1
