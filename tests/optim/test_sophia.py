"""Tests of lightning_curvature/optim/sophia.py: the update, with prescribed estimates."""

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_curvature import SophiaG, SophiaH
from lightning_curvature.curvature.schedule import FixedInterval
from lightning_curvature.optim.diagonal import DiagonalOptimizer
from tests.helpers.estimates import flat
from tests.helpers.plain_loop import Loop, classification, network
from tests.helpers.reference_sophia import KINDS, STEPS, estimates, joined, reference, settings
from tests.helpers.scripted import Scripted, follow, parameters, saved_and_loaded, script

EXACT = 1e-13
NEVER = 10**9

# Of ten estimates in a row none scales more than one entry in a hundred: tests of other things.
quiet = pytest.mark.filterwarnings("ignore:Sophia[GH] clips more than 99%:RuntimeWarning")


# The rule

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "every-step": {"hessian_update_interval": 1},
    "third-step": {"hessian_update_interval": 3},
    "after": {"hessian_timing": "after"},
    "after-every-step": {"hessian_timing": "after", "hessian_update_interval": 1},
    "after-third-step": {"hessian_timing": "after", "hessian_update_interval": 3},
    "bias-correction": {"bias_correction": True},
    "bias-correction-after": {"bias_correction": True, "hessian_timing": "after"},
    "no-decay": {"weight_decay": 0.0},
    "small-rho": {"rho": 0.05},
    "large-rho": {"rho": 30.0},
    "eps": {"eps": 0.3},
    "maximize": {"maximize": True},
    "no-memory": {"betas": (0.0, 0.0)},
}


@quiet
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", VARIANTS)
def test_reference(name: str, kind: type) -> None:
    options = settings(**VARIANTS[name])
    params, grads, new = parameters(), script(STEPS), estimates(kind)
    theta, h, rates = reference(flat(params), joined(grads), joined(new), kind=kind, **options)
    optimizer = kind(params, **options)
    oracle = Scripted(new)
    optimizer.attach(oracle)
    found: list[float] = []

    def note(_: int) -> None:
        if "win_rate" in optimizer.stats:
            found.append(float(optimizer.stats.pop("win_rate")))

    follow(optimizer, params, grads, note)
    torch.testing.assert_close(flat(params), theta, rtol=EXACT, atol=EXACT)
    present = flat([optimizer.state[p]["hess_diag"] for p in params])
    torch.testing.assert_close(present, h, rtol=EXACT, atol=EXACT)
    assert found == pytest.approx(rates)
    assert oracle.asked == len(rates)
    steps = {float(optimizer.state[p]["step"]) for p in params}
    assert steps == {STEPS}
    assert {float(optimizer.state[p]["num_estimates"]) for p in params} == {oracle.asked}


@quiet
@pytest.mark.parametrize(
    ("how", "kind"),
    [
        *((how, kind) for how in ("rho is small", "never", "no curvature") for kind in KINDS),
        ("negative", SophiaH),
    ],
)
def test_sign_descent(how: str, kind: type) -> None:
    """Where curvature says nothing every entry moves by lr along its momentum."""
    scale = {"no curvature": 0.0, "negative": -1.0}.get(how, 1.0)
    options = settings(rho=1e-12 if how == "rho is small" else 1.0)
    if how == "never":
        options |= {"hessian_update_interval": NEVER, "hessian_timing": "after"}
    params, grads = parameters(), script(STEPS)
    optimizer = kind(params, **options)
    new = [[scale * x.abs() for x in xs] for xs in estimates(kind)]
    optimizer.attach(Scripted(new))
    theta, m = flat(params), torch.zeros(sum(p.numel() for p in params), dtype=torch.float64)
    for g in joined(grads):
        m = 0.6 * m + 0.4 * g
        theta = (1 - 0.003) * theta - 0.03 * m.sign()
    follow(optimizer, params, grads)
    torch.testing.assert_close(flat(params), theta, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_newton_steps(kind: type) -> None:
    """Of a quadratic function, with the exact diagonal, one step finds the minimum."""
    (p,) = params = parameters([(6,)])
    h = torch.linspace(0.5, 3.0, 6, dtype=torch.float64)
    goal = torch.linspace(-1.0, 1.0, 6, dtype=torch.float64)
    lr = 10.0  # no entry is further away
    optimizer = kind(params, lr=lr, betas=(0.0, 0.0), rho=lr, weight_decay=0.0)
    optimizer.attach(Scripted([[h]]))
    p.grad = h * (p.detach() - goal)
    optimizer.step()
    torch.testing.assert_close(p.detach(), goal)
    assert float(optimizer.stats["win_rate"]) == 1.0


def test_an_entry_without_gradient_and_curvature_stays() -> None:
    """0 / 0 in half precision, as the official code has it."""
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        params = parameters([(4,)], dtype)
        before = params[0].detach().clone()
        optimizer = SophiaG(params, weight_decay=0.0)
        zeros = torch.zeros(4, dtype=torch.float64 if dtype is torch.float64 else torch.float32)
        optimizer.attach(Scripted([[zeros]]))
        follow(optimizer, params, [[zeros]])
        assert torch.equal(params[0].detach(), before)


# What is told


@pytest.mark.parametrize("kind", KINDS)
def test_the_win_rate(kind: type) -> None:
    """The share of entries that are not clipped; eps plays no part."""
    params = parameters([(2, 3), (4,)])
    h = [
        torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.5, 9.0]], dtype=torch.float64),
        torch.tensor([0.1, 0.0, 1.0, 1.5], dtype=torch.float64),
    ]
    ones = [torch.ones_like(x) for x in h]
    optimizer = kind(params, betas=(0.0, 0.0), rho=1.0, eps=100.0)
    optimizer.attach(Scripted([h]))
    follow(optimizer, params, [ones])
    assert float(optimizer.stats["win_rate"]) == pytest.approx(4 / 10)
    assert float(optimizer.stats["hess_diag_norm"]) == pytest.approx(float(flat(h).norm()))
    follow(optimizer, params, [ones])  # no estimate: the last one's
    assert float(optimizer.stats["win_rate"]) == pytest.approx(4 / 10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("scales", "warned"),
    [
        ([0.0] * 10, True),
        ([0.0] * 9, False),
        ([0.0] * 9 + [1e6] + [0.0] * 9, False),
        ([1e6] * 12, False),
    ],
)
def test_low_win_rates_are_told_once(kind: type, scales: list[float], warned: bool) -> None:
    params = parameters([(5,)])
    ones = torch.ones(5, dtype=torch.float64)
    optimizer = kind(params, betas=(0.0, 0.0), hessian_update_interval=1, max_failures=1)
    optimizer.attach(Scripted([[scale * ones] for scale in [*scales, scales[-1]]]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        follow(optimizer, params, [[ones]] * len(scales))
        told = [str(w.message) for w in caught]
        if warned:
            follow(optimizer, params, [[ones]])
            assert len(caught) == 1
    name = kind.__name__
    expected = (
        f"{name} clips more than 99% of all entries, for 10 estimates in a row by now: it descends "
        "along the sign of the momentum, and the curvature has no effect. Raise rho until "
        "stats['win_rate'] is between 0.1 and 0.5."
    )
    assert told == ([expected] if warned else [])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("can_look", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_estimate_that_is_not_finite(
    kind: type, can_look: bool, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old one stays in use, and the step is taken."""
    monkeypatch.setattr(DiagonalOptimizer, "_can_look", lambda self, scalar: can_look)
    options = settings(hessian_update_interval=1, max_failures=3)
    params, grads, new = parameters(), script(3), estimates(kind, 3)
    good = [new[0], new[2]]
    new[1][1][0] = bad
    optimizer = kind(params, **options)
    optimizer.attach(Scripted(new))
    follow(optimizer, params, grads[:1])
    before = [optimizer.state[p]["hess_diag"].clone() for p in params]
    follow(optimizer, params, grads[1:2])
    assert float(optimizer.stats["skipped_refreshes"]) == 1
    assert float(optimizer.stats["skipped_steps"]) == 0
    for p, h in zip(params, before, strict=True):
        assert torch.equal(optimizer.state[p]["hess_diag"], h)
        assert float(optimizer.state[p]["num_estimates"]) == 1
        assert float(optimizer.state[p]["step"]) == 2
    message = (
        rf"^{kind.__name__} kept an old estimate of the Hessian's diagonal 1 times: the new one "
        r"was not finite\. stats\['skipped_refreshes'\] goes on counting\.$"
    )
    with pytest.warns(RuntimeWarning, match=message):
        follow(optimizer, params, grads[2:])
    expected = flat(parameters())
    m = h = torch.zeros_like(expected)
    for g, d in zip(joined(grads), (good[0], None, good[1]), strict=True):
        m = 0.6 * m + 0.4 * g
        h = h if d is None else 0.8 * h + 0.2 * flat(d)
        update = (m / (0.7 * h).clamp_min(1e-12)).clamp(-1, 1)
        expected = (1 - 0.003) * expected - 0.03 * update
    torch.testing.assert_close(flat(params), expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_a_parameter_whose_gradient_comes_later(kind: type) -> None:
    """Until its first estimate it moves along the sign of its momentum."""
    options = settings(hessian_update_interval=3, weight_decay=0.0, bias_correction=True)
    params, grads, new = parameters([(3,), (2,)]), script(4, shapes=[(3,), (2,)]), []
    new = estimates(kind, 2, shapes=[(3,), (2,)])
    optimizer = kind(params, **options)
    optimizer.attach(Scripted([new[0][:1], new[1]]))
    late = params[1].detach().clone()
    given: list[list[Tensor | None]] = [[*g] for g in grads]
    given[0][1] = None

    def check(step: int) -> None:
        nonlocal late
        if step in (1, 2):
            late = late - 0.03 * optimizer.state[params[1]]["exp_avg"].sign()
        torch.testing.assert_close(params[1].detach(), late) if step < 3 else None

    follow(optimizer, params, given, check)
    assert float(optimizer.state[params[0]]["num_estimates"]) == 2
    assert float(optimizer.state[params[1]]["num_estimates"]) == 1


# Arguments

ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"lr": -1.0}, ValueError, "Invalid lr=-1.0: must be >= 0."),
    ({"betas": (0.9,)}, ValueError, "Invalid betas=(0.9,): must be two numbers in [0, 1)."),
    ({"betas": 0.9}, ValueError, "Invalid betas=0.9: must be two numbers in [0, 1)."),
    ({"betas": (1.0, 0.9)}, ValueError, "Invalid betas[0]=1.0: must be in [0, 1)."),
    ({"betas": (0.9, -0.1)}, ValueError, "Invalid betas[1]=-0.1: must be in [0, 1)."),
    ({"rho": 0.0}, ValueError, "Invalid rho=0.0: must be > 0."),
    ({"rho": math.nan}, ValueError, "Invalid rho=nan: must be > 0."),
    ({"eps": 0.0}, ValueError, "Invalid eps=0.0: must be > 0."),
    ({"weight_decay": -0.1}, ValueError, "Invalid weight_decay=-0.1: must be >= 0."),
    (
        {"hessian_update_interval": 0},
        ValueError,
        "Invalid hessian_update_interval=0: must be an integer >= 1, in optimizer steps.",
    ),
    (
        {"hessian_update_interval": 2.0},
        TypeError,
        "Invalid hessian_update_interval=2.0: must be an integer >= 1, in optimizer steps, got "
        "float.",
    ),
    (
        {"hessian_timing": "later"},
        ValueError,
        "Invalid hessian_timing='later': must be one of 'before', 'after'.",
    ),
    (
        {"max_failures": 0},
        ValueError,
        "Invalid max_failures=0: must be an integer >= 1, in optimizer steps.",
    ),
    ({"seed": -1}, ValueError, "Invalid seed=-1: must be in [0, inf)."),
]


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"),
    [(kind, *row) for kind in KINDS for row in ERRORS],
)
def test_errors(kind: type, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        kind(parameters(), **options)
    assert str(caught.value) == message
    # The same in a group, where the argument may differ between groups.
    optimizer = kind(parameters())
    with pytest.raises((error, ValueError)):
        optimizer.add_param_group({"params": parameters(), **options})
    assert len(optimizer.param_groups) == 1


@quiet
@pytest.mark.parametrize("kind", KINDS)
def test_groups_have_their_own(kind: type) -> None:
    """Rate, weight decay, averages and rho, as if each were alone."""
    own = [
        {"lr": 0.03, "rho": 0.7, "betas": (0.6, 0.8), "weight_decay": 0.1},
        {"lr": 0.1, "rho": 2.0, "betas": (0.1, 0.3), "weight_decay": 0.0},
    ]
    params, grads, new = parameters(), script(STEPS), estimates(kind)
    optimizer = kind(
        [{"params": params[:2], **own[0]}, {"params": params[2:], **own[1]}],
        hessian_update_interval=2,
    )
    optimizer.attach(Scripted(new))
    start = parameters()
    follow(optimizer, params, grads)
    for group, options in zip((slice(0, 2), slice(2, 4)), own, strict=True):
        theta, _, _ = reference(
            flat(start[group]),
            joined([g[group] for g in grads]),
            joined([e[group] for e in new]),
            kind=kind,
            hessian_update_interval=2,
            **options,
        )
        torch.testing.assert_close(flat(params[group]), theta, rtol=EXACT, atol=EXACT)


# Routes of the arithmetic


@quiet
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias_correction", [False, True])
@pytest.mark.parametrize("shapes", [((3, 4), (2,), ()), ((300, 200), (5,), (80, 500))])
def test_routes_agree(
    kind: type,
    bias_correction: bool,
    shapes: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One tensor at a time, in blocks, and without looking at the gradient; bad values too."""
    grads, new = script(6, shapes=shapes), estimates(kind, 6, shapes=shapes)
    grads[3][0].view(-1)[0] = math.nan
    new[2][1][0] = math.inf
    outcomes = []
    for foreach, can_look in ((None, True), (False, True), (True, True), (None, False)):
        params = parameters(shapes)
        options = settings(bias_correction=bias_correction, hessian_update_interval=1)
        optimizer = kind(params, **options, foreach=foreach)
        # A step whose gradient is bad asks for no estimate where it can be looked at.
        given = [new[i] for i in range(6) if i != 3 or not can_look]
        optimizer.attach(Scripted(given))
        with monkeypatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            patch.setattr(DiagonalOptimizer, "_can_look", lambda self, x, can=can_look: can)
            follow(optimizer, params, grads)
        state = [optimizer.state[p][name] for p in params for name in optimizer.state_names]
        counts = [optimizer.stats[k] for k in ("skipped_steps", "skipped_refreshes", "win_rate")]
        outcomes.append([flat(params), flat(state), torch.stack(counts)])
    assert outcomes[0][2][:2].tolist() == [1.0, 1.0]
    for other in outcomes[1:]:
        for found, expected in zip(other, outcomes[0], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind: type, dtype: torch.dtype) -> None:
    """State and arithmetic are float32, and steps below the precision of a sum are not lost."""
    params = parameters(dtype=dtype)
    grads = script(STEPS, scale=1e-4, dtype=torch.float32)
    new = estimates(kind, scale=1e-4, dtype=torch.float32)
    options = settings(weight_decay=0.0)
    # Gradients arrive in half precision.
    rounded = [[g.to(dtype).float() for g in gs] for gs in grads]
    theta, h, _ = reference(
        flat(params).float(), joined(rounded), joined(new), kind=kind, **options
    )
    optimizer = kind(params, **options)
    optimizer.attach(Scripted(new))
    follow(optimizer, params, grads)
    for p in params:
        state = optimizer.state[p]
        assert {state[name].dtype for name in optimizer.state_names} == {torch.float32}
    torch.testing.assert_close(
        flat([optimizer.state[p]["hess_diag"] for p in params]), h, rtol=1e-5, atol=1e-12
    )
    tolerance = 0.05 if dtype is torch.bfloat16 else 0.01
    torch.testing.assert_close(flat(params).float(), theta, rtol=tolerance, atol=tolerance)


@quiet
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_trains(kind: type, dtype: torch.dtype) -> None:
    model = network(dtype=dtype)
    loop = Loop(model, lambda p: kind(p, lr=0.03, rho=1.0, betas=(0.9, 0.9), weight_decay=0.0))
    losses = loop.train(classification(1, batch=32, dtype=dtype) * 60)
    assert losses[-1] < 0.5 * losses[0]
    assert loop.is_finite()


# Resuming, schedules


@quiet
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("timing", ["before", "after"])
def test_resuming_within_an_interval(kind: type, timing: Any, tmp_path: Path) -> None:
    """Weights and statistics, bit for bit, with labels and probes of their own streams."""
    options = settings(hessian_update_interval=3, hessian_timing=timing, rho=0.1)

    def loop(model: nn.Module) -> Loop:
        return Loop(model, lambda p: kind(p, **options))

    batches = classification(9)
    whole = loop(network())
    whole.train(batches)
    first = loop(network())
    first.train(batches[:4])
    loaded = saved_and_loaded(
        (first.model.state_dict(), first.optimizer.state_dict()), tmp_path / "state"
    )
    second = loop(network(seed=5))
    second.model.load_state_dict(loaded[0])
    second.optimizer.load_state_dict(loaded[1])
    torch.manual_seed(99)
    second.train(batches[4:])
    assert torch.equal(second.theta(), whole.theta())
    for name in ("win_rate", "hess_diag_norm", "skipped_refreshes"):
        assert torch.equal(second.optimizer.stats[name], whole.optimizer.stats[name])


def test_the_drift_for_an_owner_of_the_interval() -> None:
    """The relative change of the diagonal; without an owner nobody wants to know."""
    params, new = parameters(), estimates(SophiaG)
    optimizer = SophiaG(params, **settings())
    optimizer.attach(Scripted(new))
    follow(optimizer, params, script(1))
    assert "curvature_drift" not in optimizer.stats
    optimizer.own_interval("hessian_update_interval", FixedInterval(1))
    before = flat([optimizer.state[p]["hess_diag"] for p in params])
    follow(optimizer, params, script(1))
    after = flat([optimizer.state[p]["hess_diag"] for p in params])
    expected = float((after - before).norm() / before.norm())
    assert float(optimizer.stats["curvature_drift"]) == pytest.approx(expected)
