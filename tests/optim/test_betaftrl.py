"""Tests of lightning_curvature/optim/betaftrl.py."""

import copy
import io
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_curvature import BetaFTRL
from lightning_curvature.optim import per_tensor
from lightning_curvature.optim.diagonal import DiagonalOptimizer

EXACT = {"rtol": 1e-12, "atol": 1e-14}
ROUTES = ["blocks", "small blocks", "one tensor at a time", "branch-free"]
SHAPES = ((9, 4), (6,), ())
DRAWS = 1500

Grads = list[list[Any]]


def draw(steps: int, *shapes: tuple[int, ...], size: float = 1.0, seed: int = 0) -> Grads:
    """Draw gradients of parameters, for several steps."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [size * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        for _ in range(steps)
    ]


def start(grads: Grads, dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(9)
    return [
        nn.Parameter(torch.randn(g.shape, generator=generator, dtype=torch.float64).to(dtype))
        for g in grads[0]
    ]


def run(optimizer: torch.optim.Optimizer, grads: Grads) -> list[Tensor]:
    """Take a step per row of gradients, None for none; return the parameters."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for row in grads:
        for p, grad in zip(params, row, strict=True):
            p.grad = None if grad is None else grad.to(p.dtype, copy=True)
        optimizer.step()
    return [p.detach() for p in params]


def train(grads: Grads, **options: Any) -> list[Tensor]:
    return run(BetaFTRL(start(grads), **options), grads)


def update(grads: Grads, **options: Any) -> list[Tensor]:
    """Return what the last step changed."""
    optimizer = BetaFTRL([nn.Parameter(torch.zeros_like(g)) for g in grads[0]], **options)
    before = [x.clone() for x in run(optimizer, grads[:-1])]
    return [x - y for x, y in zip(run(optimizer, grads[-1:]), before, strict=True)]


def force(route: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Make the optimizer take a route; return the arguments that belong to it."""
    if route == "small blocks":
        monkeypatch.setattr(per_tensor, "_PART", 7)
    if route == "branch-free":
        monkeypatch.setattr(DiagonalOptimizer, "_can_look", lambda *_: False)
    return {"foreach": False} if route == "one tensor at a time" else {}


# Adam


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, None), (0.5, 0.95), (0.0, 0.9)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("route", ROUTES)
def test_it_is_adamw(
    betas: Any, weight_decay: float, route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    grads = draw(25, *SHAPES)
    options = {"lr": 0.01, "eps": 1e-3, "weight_decay": weight_decay}
    found = train(grads, betas=betas, scale="adam", **options, **force(route, monkeypatch))
    theirs = (betas[0], betas[0] ** 2 if betas[1] is None else betas[1])
    expected = run(torch.optim.AdamW(start(grads), betas=theirs, **options), grads)
    torch.testing.assert_close(found, expected, **EXACT)


def test_it_is_adam() -> None:
    grads = draw(25, *SHAPES)
    expected = run(torch.optim.Adam(start(grads), lr=0.01), grads)
    found = train(grads, lr=0.01, betas=(0.9, 0.999), eps=1e-8, scale="adam")
    torch.testing.assert_close(found, expected, **EXACT)


def test_the_constant_step_is_adam_without_bias_correction() -> None:
    grads = draw(400, (5,))
    lr = 0.01 * (1 - 0.9) / math.sqrt(1 - 0.99)
    options: dict[str, Any] = {"betas": (0.9, 0.99), "eps": 0.0}
    found = update(grads, lr=lr, **options)
    corrected = update(grads, lr=0.01, scale="adam", **options)
    torch.testing.assert_close(found, corrected, rtol=0.01, atol=0.0)
    # Not yet after one step.
    early = update(grads[:1], lr=lr, **options)[0] / update(grads[:1], lr=0.01, scale="adam")[0]
    torch.testing.assert_close(early, torch.full_like(early, 0.1 / math.sqrt(0.01)))


# The leader


@pytest.mark.parametrize("max_update", [None, 0.02])
@pytest.mark.parametrize("damping", [0.0, 30.0])
@pytest.mark.parametrize("betas", [(0.9, None), (0.7, 0.95), (1.0, 1.0)])
def test_it_follows_the_leader(max_update: float | None, damping: float, betas: Any) -> None:
    """The closed form against a search on a grid."""
    grads = draw(7, (4,), seed=2)
    lr, beta1 = 0.05, betas[0]
    beta2 = beta1**2 if betas[1] is None else betas[1]
    found = update(grads, lr=lr, betas=betas, max_update=max_update, damping=damping)[0]
    bound = 0.2 if max_update is None else max_update
    grid = torch.linspace(-bound, bound, 200_001, dtype=torch.float64)
    for index in range(4):
        g = [float(row[0][index]) for row in grads]
        ages = range(len(g) - 1, -1, -1)
        linear = sum(beta1**age * x for age, x in zip(ages, g, strict=True))
        penalty = sum(beta1**age * damping / 2 for age in ages)
        root = math.sqrt(sum(beta2**age * x * x for age, x in zip(ages, g, strict=True)))
        objective = (penalty + root / (2 * lr)) * grid**2 + linear * grid
        # Between the points of the grid a parabola is exact.
        best = int(objective.argmin())
        at = float(grid[best])
        if 0 < best < len(grid) - 1:
            low, mid, high = objective[best - 1 : best + 2].tolist()
            step = 2 * bound / 200_000
            at += step * 0.5 * (low - high) / (low - 2 * mid + high)
        assert float(found[index]) == pytest.approx(at, abs=1e-7)


@pytest.mark.parametrize("options", [{}, {"max_update": 0.01}, {"betas": (0.8, 0.9)}], ids=str)
@pytest.mark.parametrize("route", ROUTES)
def test_gradients_have_no_scale(
    options: dict[str, Any], route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit for powers of two."""
    options = {**options, **force(route, monkeypatch)}
    grads = draw(8, (40,))
    scale = 2.0 ** torch.arange(-20, 20, dtype=torch.float64)
    expected = train(grads, lr=0.01, **options)
    assert torch.equal(train([[scale * row[0]] for row in grads], lr=0.01, **options)[0], *expected)
    other = torch.logspace(-9, 9, 40, dtype=torch.float64)
    found = train([[other * row[0]] for row in grads], lr=0.01, **options)
    torch.testing.assert_close(found, expected, **EXACT)
    with_eps = train([[other * row[0]] for row in grads], lr=0.01, eps=1e-3, **options)
    assert not torch.allclose(*with_eps, *expected, rtol=1e-3)


def test_limits() -> None:
    """D always; without it, that of Cauchy and Schwarz."""
    for t in (1, 2, 5, 30):
        grads = draw(t, (200,), seed=t)
        grads = [[row[0].abs()] for row in grads]
        assert float(update(grads, lr=0.1, max_update=0.15)[0].abs().max()) <= 0.15 + 1e-12
        largest = float(update(grads, lr=0.1)[0].abs().max())
        assert largest <= 0.1 * math.sqrt(t) + 1e-12
        assert t == 1 or largest > 0.15 - 1e-12 or t < 3


def test_a_constant_gradient() -> None:
    grads = [[torch.full((3,), 7.0, dtype=torch.float64)]] * 300
    expected = 0.1 * math.sqrt(1.9 / 0.1)
    assert expected == pytest.approx(0.436, abs=1e-3)
    found = update(grads, lr=0.1)[0]
    torch.testing.assert_close(found, torch.full_like(found, -expected), rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("limit", [None, 0.01, 0.5])
def test_the_first_step(limit: float | None) -> None:
    grads = draw(1, (30,))
    found = update(grads, lr=0.1, max_update=limit)[0]
    expected = -min(0.1, limit or math.inf) * grads[0][0].sign()
    torch.testing.assert_close(found, expected, **EXACT)


def test_ends_of_the_range_of_beta() -> None:
    """0 is descent along the sign, 1 forgets nothing."""
    grads = draw(6, (30,))
    last = grads[-1][0]
    (found,) = update(grads, lr=0.1, betas=(0.0, None), max_update=0.3)
    torch.testing.assert_close(found, -0.1 * last.sign(), **EXACT)
    every = torch.stack([row[0] for row in grads])
    expected = -0.1 * every.sum(0) / every.square().sum(0).sqrt()
    torch.testing.assert_close(update(grads, lr=0.1, betas=(1.0, None))[0], expected, **EXACT)
    # Adam's corrections are finite there: averages over all steps.
    expected = -0.1 * every.mean(0) / every.square().mean(0).sqrt()
    (found,) = update(grads, lr=0.1, betas=(1.0, 1.0), scale="adam")
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"max_update": 1.0}, {"damping": 1.0}], ids=str)
@pytest.mark.parametrize("mode", ["coordinate", "norm"])
@pytest.mark.parametrize("lr", [0.0, 0.25])
@pytest.mark.parametrize("route", ["blocks", "branch-free"])
def test_nothing_by_nothing_is_nothing(
    dtype: torch.dtype,
    options: dict[str, Any],
    mode: Any,
    lr: float,
    route: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where a warm-up starts from a learning rate of 0."""
    force(route, monkeypatch)
    p = nn.Parameter(torch.ones(3, dtype=dtype))
    optimizer = BetaFTRL([p], lr=lr, clip_mode=mode, **options)
    (found,) = run(optimizer, [[torch.zeros(3)]] * 2)
    assert found.tolist() == [1.0] * 3
    (found,) = run(optimizer, [[torch.tensor([0.0, 1.0, -1.0])]])
    assert bool(torch.isfinite(found).all())
    assert float(found[0]) == 1.0


def test_gradients_too_small_to_be_squared() -> None:
    """They move less, never more."""
    p = nn.Parameter(torch.zeros(3))
    (found,) = run(BetaFTRL([p], lr=0.5), [[torch.tensor([1e-15, 1e-21, 1e-30])]])
    assert float(found[0]) == -0.5
    assert -0.5 < float(found[1]) < 0.0
    assert -1e-10 < float(found[2]) < 0.0


# Routes


OPTIONS: list[dict[str, Any]] = [
    {},
    {"max_update": 2e-4, "random_scaling": True},
    {"weight_decay": 0.5, "eps": 0.1, "maximize": True},
    {"scale": "adam", "damping": 0.7, "betas": (0.8, 0.99), "random_scaling": True, "seed": 3},
    {"clip_mode": "norm"},
    {"clip_mode": "norm", "max_update": 1e-3, "weight_decay": 0.5, "maximize": True},
    {"clip_mode": "norm", "scale": "adam", "damping": 0.7, "random_scaling": True, "eps": 0.1},
]


@pytest.mark.parametrize("route", ROUTES[1:])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_all_routes_are_the_same(
    route: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second parameter has no gradient now and then."""
    grads = draw(5, *SHAPES, (0,))
    expected = BetaFTRL(start(grads), **options)
    found = BetaFTRL(start(grads), **options, **force(route, monkeypatch))
    grads[2][1] = grads[3][1] = None
    torch.testing.assert_close(run(found, grads), run(expected, grads), **EXACT)
    for p, q in zip(found.state.values(), expected.state.values(), strict=True):
        torch.testing.assert_close(dict(p), dict(q), **EXACT)
    torch.testing.assert_close(found.stats, expected.stats, rtol=1e-12, atol=0.0)
    assert [float(s["step"]) for s in found.state.values()] == [5, 3, 5, 5]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("mode", ["coordinate", "norm"])
def test_climbing(route: str, mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    grads = draw(3, *SHAPES)
    turned = [[-g for g in row] for row in grads]
    expected = train(grads, weight_decay=0.5, clip_mode=mode)
    options = {"maximize": True, **force(route, monkeypatch)}
    found = train(turned, weight_decay=0.5, clip_mode=mode, **options)
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("layout", ["channels last", "gradients in another layout", "transposed"])
@pytest.mark.parametrize("max_update", [None, 1e-4])
def test_layouts(
    route: str, layout: str, max_update: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    grads = draw(3, (4, 3, 2, 5))
    expected = train(grads, max_update=max_update)
    if layout == "transposed":
        params = [nn.Parameter(p.detach().clone().mT.contiguous().mT) for p in start(grads)]
    else:
        kind = torch.channels_last
        params = [nn.Parameter(p.detach().to(memory_format=kind)) for p in start(grads)]
        if layout == "channels last":
            grads = [[g.to(memory_format=kind) for g in row] for row in grads]
    options = force(route, monkeypatch)
    found = run(BetaFTRL(params, max_update=max_update, **options), grads)
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("mode", ["coordinate", "norm"])
def test_a_bad_gradient_changes_nothing(
    route: str, mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    grads = draw(4, (5, 3), (4,))
    bad = [list(row) for row in grads]
    bad.insert(2, [torch.full_like(g, math.nan) for g in grads[0]])
    bad.insert(0, [torch.full_like(g, math.inf) for g in grads[0]])
    options: dict[str, Any] = {"clip_mode": mode, "max_update": 0.01, "weight_decay": 0.1}
    expected = train(grads, **options)
    optimizer = BetaFTRL(start(grads), **options, **force(route, monkeypatch))
    torch.testing.assert_close(run(optimizer, bad), expected, **EXACT)
    assert optimizer.stats["skipped_steps"] == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("route", ROUTES)
def test_half_precision(
    dtype: torch.dtype, options: dict[str, Any], route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """State and arithmetic are float32."""
    grads = [[g.to(dtype).double() for g in row] for row in draw(1, *SHAPES)]
    options = {**options, "lr": 0.1, **force(route, monkeypatch)}
    halves = BetaFTRL(start(grads, dtype), **options)
    wide = BetaFTRL([nn.Parameter(p.detach().double()) for p in start(grads, dtype)], **options)
    for found, expected in zip(run(halves, grads), run(wide, grads), strict=True):
        assert found.dtype == dtype
        # Rounded once.
        torch.testing.assert_close(found, expected.to(dtype), rtol=1e-6, atol=1e-6)
    for state in halves.state.values():
        assert {x.dtype for x in state.values()} == {torch.float32}


# The whole update at once


def test_the_norm_form() -> None:
    """Momentum over the root of one sum of squares; the limit is that of the whole update."""
    grads = draw(6, (5, 3), (4,))
    for limit in (None, 0.05):
        found = update(grads, lr=0.1, clip_mode="norm", max_update=limit)
        total = sum(0.81 ** (5 - t) * sum(g.square().sum() for g in r) for t, r in enumerate(grads))
        sums = [sum(0.9 ** (5 - t) * row[i] for t, row in enumerate(grads)) for i in range(2)]
        expected = [-0.1 * m / total.sqrt() for m in sums]
        length = float(torch.cat([x.flatten() for x in expected]).norm())
        assert length > 0.05
        if limit is not None:
            expected = [x * limit / length for x in expected]
        torch.testing.assert_close(found, expected, **EXACT)


def test_the_norm_form_with_groups() -> None:
    """They share the sum of squares and the limit."""
    grads = draw(4, (5, 3), (4,))
    one, two = start(grads)
    groups = [{"params": [one]}, {"params": [two], "lr": 0.3}]
    options: dict[str, Any] = {"clip_mode": "norm", "max_update": 0.05}
    apart = BetaFTRL(groups, lr=0.1, **options)
    run(apart, grads[:3])
    before = [one.detach().clone(), two.detach().clone()]
    run(apart, grads[3:])
    moved = [one.detach() - before[0], two.detach() - before[1]]
    assert float(torch.cat([x.flatten() for x in moved]).norm()) == pytest.approx(0.05)
    free = update(grads, lr=0.1, clip_mode="norm")
    ratio = float(moved[0].norm() / free[0].norm())
    torch.testing.assert_close(moved[0], ratio * free[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(moved[1], 3 * ratio * free[1], rtol=1e-9, atol=1e-12)


def test_win_rate() -> None:
    """The share of coordinates within the limit, or whether the whole update is."""
    grads = draw(3, (50, 4), (30,))
    optimizer = BetaFTRL(start(grads), lr=0.1, max_update=0.1)
    run(optimizer, grads)
    moved = update(grads, lr=0.1)
    inside = sum(int((x.abs() < 0.1).sum()) for x in moved) / 230
    assert 0.2 < inside < 0.8
    assert float(optimizer.stats["win_rate"]) == pytest.approx(inside)
    for limit, expected in ((1e-3, 0.0), (1e3, 1.0)):
        whole = BetaFTRL(start(grads), lr=0.1, clip_mode="norm", max_update=limit)
        run(whole, grads)
        assert whole.stats["win_rate"] == expected
    free = BetaFTRL(start(grads))
    run(free, grads)
    assert "win_rate" not in free.stats


# Random step lengths


def lengths(count: int, **options: Any) -> list[float]:
    """Return by what updates are multiplied."""
    optimizer = BetaFTRL([nn.Parameter(torch.zeros(1, dtype=torch.float64))], lr=1.0, **options)
    grads = [[torch.ones(1, dtype=torch.float64)]]
    positions = [float(run(optimizer, grads)[0]) for _ in range(count)]
    return [a - b for a, b in zip([0.0, *positions], positions, strict=False)]


def test_random_lengths_are_exponential() -> None:
    drawn = torch.tensor(lengths(DRAWS, random_scaling=True, betas=(0.0, None)))
    assert bool((drawn >= 0).all())
    # Five standard errors of the first two moments, and of the median.
    assert float(drawn.mean()) == pytest.approx(1.0, abs=5 / math.sqrt(DRAWS))
    assert float(drawn.square().mean()) == pytest.approx(2.0, abs=5 * math.sqrt(20 / DRAWS))
    assert float((drawn < math.log(2)).double().mean()) == pytest.approx(
        0.5, abs=2.5 / math.sqrt(DRAWS)
    )
    pairs = torch.stack([drawn[:-1], drawn[1:]])
    assert abs(float(torch.corrcoef(pairs)[0, 1])) < 5 / math.sqrt(DRAWS)


def test_random_lengths_follow_the_limit() -> None:
    """The limit is on what is multiplied."""
    options: dict[str, Any] = {"betas": (0.0, None), "random_scaling": True}
    free = lengths(20, **options)
    assert lengths(20, max_update=0.25, **options) == pytest.approx([x / 4 for x in free])
    found = lengths(20, clip_mode="norm", max_update=0.25, **options)
    assert found == pytest.approx([x / 4 for x in free])


def test_random_lengths_belong_to_seed_and_step() -> None:
    """Not to the global generators, which go on as if nothing had been drawn."""
    state = torch.get_rng_state()
    first = lengths(5, random_scaling=True)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    assert lengths(5, random_scaling=True) == first
    assert lengths(5, random_scaling=True, seed=1) != first
    assert len(set(first)) == 5


@pytest.mark.parametrize("mode", ["coordinate", "norm"])
def test_resume(mode: Any) -> None:
    """Bit for bit, also the sum of squares of the norm form and the random lengths."""
    options: dict[str, Any] = {
        "clip_mode": mode,
        "random_scaling": True,
        "max_update": 3e-4,
        "damping": 0.1,
    }
    grads = draw(8, *SHAPES)
    whole = BetaFTRL(start(grads), **options)
    half = [x.clone() for x in run(whole, grads[:4])]
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    expected = run(whole, grads[4:])
    file.seek(0)
    # The mode comes with the state.
    resumed = BetaFTRL([nn.Parameter(x) for x in half])
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for found, wanted in zip(run(resumed, grads[4:]), expected, strict=True):
        assert torch.equal(found, wanted)
    ours, theirs = resumed.state_dict(), whole.state_dict()
    torch.testing.assert_close(ours["state"], theirs["state"], rtol=0.0, atol=0.0)
    assert ours["curvature"]["scalars"] == theirs["curvature"]["scalars"]


def test_a_state_without_its_sums_is_refused() -> None:
    grads = draw(2, *SHAPES)
    optimizer = BetaFTRL(start(grads))
    run(optimizer, grads)
    cut = copy.deepcopy(optimizer.state_dict())
    del cut["state"][1]["grad_sq_sum"]
    text = r"^Cannot load the state into BetaFTRL: parameter 1 has no 'grad_sq_sum'\.$"
    for mode in ("coordinate", "norm"):
        fresh = BetaFTRL(start(grads), clip_mode=mode)
        with pytest.raises(ValueError, match=text):
            fresh.load_state_dict(cut)
        fresh.load_state_dict(optimizer.state_dict())
    whole = BetaFTRL(start(grads), clip_mode="norm")
    run(whole, grads)
    cut = copy.deepcopy(whole.state_dict())
    del cut["curvature"]["scalars"]["grad_sq_sum"]
    text = (
        "Cannot load the state into BetaFTRL: 'scalars' has no 'grad_sq_sum', which "
        "clip_mode='norm' needs. The state is cut off."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        whole.load_state_dict(cut)
    whole.load_state_dict(whole.state_dict())
    BetaFTRL(start(grads), clip_mode="norm").load_state_dict(
        BetaFTRL(start(grads), clip_mode="norm").state_dict()
    )


def test_schedulers_may_cycle_the_first_beta() -> None:
    """The second one follows where it is the square."""
    optimizer = BetaFTRL(start(draw(1, (3,))), lr=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=4)
    run(optimizer, draw(1, (3,)))
    schedule.step()
    beta1, beta2 = optimizer.param_groups[0]["betas"]
    assert beta1 != 0.9
    assert beta2 is None
    run(optimizer, draw(1, (3,)))


# Errors


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"lr": -1.0}, ValueError, "Invalid lr=-1.0: must be >= 0."),
        (
            {"betas": 0.9},
            ValueError,
            "Invalid betas=0.9: must be two numbers in [0, 1], the second may be None.",
        ),
        ({"betas": (1.5, None)}, ValueError, "Invalid betas[0]=1.5: must be in [0, 1]."),
        ({"betas": (0.9, -1.0)}, ValueError, "Invalid betas[1]=-1.0: must be in [0, 1]."),
        (
            {"scale": "sgd"},
            ValueError,
            "Invalid scale='sgd': must be one of 'ftrl', 'adam'.",
        ),
        ({"max_update": 0.0}, ValueError, "Invalid max_update=0.0: must be > 0."),
        (
            {"clip_mode": "global"},
            ValueError,
            "Invalid clip_mode='global': must be one of 'coordinate', 'norm'.",
        ),
        ({"eps": -1.0}, ValueError, "Invalid eps=-1.0: must be >= 0."),
        ({"damping": -1.0}, ValueError, "Invalid damping=-1.0: must be >= 0."),
        ({"seed": 1.5}, TypeError, "Invalid seed=1.5: must be an integer, got float."),
        ({"weight_decay": -0.1}, ValueError, "Invalid weight_decay=-0.1: must be >= 0."),
        (
            {"max_failures": 0},
            ValueError,
            "Invalid max_failures=0: must be an integer >= 1, in optimizer steps.",
        ),
    ],
)
def test_errors(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        BetaFTRL([nn.Parameter(torch.ones(2))], **options)


@pytest.mark.parametrize(
    ("name", "value", "common"),
    [
        ("betas", (0.5, None), "(0.9, None)"),
        ("max_update", 0.5, "None"),
        ("clip_mode", "norm", "'coordinate'"),
        ("random_scaling", True, "False"),
        ("seed", 4, "0"),
    ],
)
def test_what_all_groups_share(name: str, value: Any, common: str) -> None:
    optimizer = BetaFTRL([nn.Parameter(torch.ones(2))])
    text = (
        f"Invalid {name}={value!r} in a parameter group: it is one value for all groups, here "
        f"{common}. Leave it out of the group."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], name: value})
    assert len(optimizer.param_groups) == 1
