"""Tests of lightning_curvature/optim/adahessian.py."""

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature import AdaHessian
from lightning_curvature.curvature.diagonal import ProbeSampler
from lightning_curvature.optim.diagonal import DiagonalOptimizer
from tests.helpers.dense import DenseModel
from tests.helpers.estimates import flat
from tests.helpers.plain_loop import OUTPUTS, Loop, classification, network, regression
from tests.helpers.ranks import RankPool
from tests.helpers.scripted import (
    Scripted,
    follow,
    parameters,
    saved_and_loaded,
    script,
)

EXACT = 1e-12
STEPS = 6


def kernel_mean(d: Tensor) -> Tensor:
    """Average over all axes from the third on, one entry at a time."""
    if d.dim() < 3:
        return d
    out = d.clone()
    for i in range(d.shape[0]):
        for j in range(d.shape[1]):
            out[i, j] = sum(d[i, j].reshape(-1).tolist()) / d[i, j].numel()
    return out


def reference(
    theta: Tensor,
    grads: Sequence[Tensor],
    new: Sequence[Tensor],
    *,
    lr: float = 0.15,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-4,
    hessian_power: float = 1.0,
    weight_decay: float = 0.0,
    hessian_update_interval: int = 1,
    spatial_average: bool = True,
    maximize: bool = False,
) -> Tensor:
    """Return one parameter after all steps, by the rule as it is written down."""
    (beta1, beta2), count = betas, 0
    m, v = torch.zeros_like(theta), torch.zeros_like(theta)
    waiting = list(new)
    for t, g in enumerate(grads, start=1):
        if (t - 1) % hessian_update_interval == 0:
            d = waiting.pop(0).abs()
            d = kernel_mean(d) if spatial_average else d
            v = beta2 * v + (1 - beta2) * d**2
            count += 1
        m = beta1 * m + (1 - beta1) * (-g if maximize else g)
        m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**count)
        update = m_hat / (v_hat.sqrt() ** hessian_power + eps)
        theta = theta - lr * (update + weight_decay * theta)
    return theta


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "interval": {"hessian_update_interval": 3},
    "half-power": {"hessian_power": 0.5},
    "odd-power": {"hessian_power": 0.3},
    "no-power": {"hessian_power": 0.0},
    "decay": {"weight_decay": 0.3},
    "eps": {"eps": 0.5},
    "betas": {"betas": (0.5, 0.7)},
    "no-memory": {"betas": (0.0, 0.0)},
    "entries": {"spatial_average": False},
    "maximize": {"maximize": True},
}
SHAPES = ((3, 4), (2,), (), (2, 3, 5), (2, 3, 2, 2), (2, 1, 2, 2, 2), (2, 3, 1))


@pytest.mark.parametrize("name", VARIANTS)
def test_reference(name: str) -> None:
    """Vectors, matrices, and kernels of one, two and three dimensions."""
    options = {"lr": 0.02, **VARIANTS[name]}
    params = parameters(SHAPES)
    grads, new = script(STEPS, shapes=SHAPES), script(STEPS, seed=8, shapes=SHAPES)
    expected = [
        reference(p.detach().clone(), [g[i] for g in grads], [d[i] for d in new], **options)
        for i, p in enumerate(params)
    ]
    optimizer = AdaHessian(params, **options)
    oracle = Scripted(new)
    optimizer.attach(oracle)
    follow(optimizer, params, grads)
    for p, theta in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), theta, rtol=EXACT, atol=EXACT)
    assert oracle.asked == -(-STEPS // options.get("hessian_update_interval", 1))


def test_no_power_is_adams_momentum() -> None:
    params, grads = parameters(), script(STEPS)
    optimizer = AdaHessian(params, lr=0.02, hessian_power=0.0, eps=1e-12)
    optimizer.attach(Scripted(script(STEPS, scale=0.0)))
    others = parameters()
    plain = torch.optim.SGD(others, lr=0.02)
    follow(optimizer, params, grads)
    m = [torch.zeros_like(p) for p in others]
    for t, given in enumerate(grads, start=1):
        for p, x, g in zip(others, m, given, strict=True):
            x.mul_(0.9).add_(g, alpha=0.1)
            p.grad = x / (1 - 0.9**t)
        plain.step()
    torch.testing.assert_close(flat(params), flat(others))


def test_newton_steps() -> None:
    """Of a quadratic function, with the exact diagonal, one step finds the minimum."""
    (p,) = params = parameters([(6,)])
    h = torch.tensor([0.5, 1.0, 2.0, -0.5, -1.0, -2.0], dtype=torch.float64)
    goal = torch.linspace(-1.0, 1.0, 6, dtype=torch.float64)
    optimizer = AdaHessian(params, lr=1.0, eps=1e-14)
    optimizer.attach(Scripted([[h]]))
    # Where the curvature is negative its size counts: downhill, not to the maximum.
    p.grad = h.abs() * (p.detach() - goal)
    optimizer.step()
    torch.testing.assert_close(p.detach(), goal)


@pytest.mark.parametrize(
    "layer",
    [nn.Conv1d(2, 3, 4), nn.Conv2d(2, 3, (2, 3)), nn.Conv3d(1, 2, (2, 1, 2)), nn.Linear(4, 3)],
    ids=lambda layer: type(layer).__name__,
)
@pytest.mark.parametrize("spatial_average", [True, False])
def test_layers(layer: nn.Module, spatial_average: bool) -> None:
    """The diagonal of |z * (H z)|, averaged over each kernel, by the exact Hessian."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        shape = {"Conv1d": (5, 2, 6), "Conv2d": (5, 2, 4, 4), "Conv3d": (5, 1, 3, 2, 3)}
        x = torch.randn(*shape.get(type(layer).__name__, (5, 4)), dtype=torch.float64)
    model = nn.Sequential(layer, nn.Tanh(), nn.Flatten()).double()
    options = {"betas": (0.9, 0.0), "lr": 0.0, "spatial_average": spatial_average}
    loop = Loop(model, lambda p: AdaHessian(p, **options), lambda z, _: z.square().mean())
    params = list(model.parameters())
    hessian = DenseModel(model).hessian((x,), lambda z: z.square().mean())
    sampler = ProbeSampler("rademacher", 0, 0)
    z = flat(sampler.draw(params, 0))
    loop.step(x, torch.zeros(5))
    parts = (z * (hessian @ z)).abs().split([p.numel() for p in params])
    for p, part in zip(params, parts, strict=True):
        d = part.view_as(p)
        d = kernel_mean(d) if spatial_average else d
        found = loop.optimizer.state[p]["hess_diag_sq"]
        torch.testing.assert_close(found, d.square(), rtol=1e-10, atol=1e-14)


def test_several_probes_are_averaged_before_their_size_is_taken() -> None:
    model = network(OUTPUTS)
    options = {"betas": (0.9, 0.0), "lr": 0.0, "num_probes": 3, "distribution": "normal"}
    loop = Loop(model, lambda p: AdaHessian(p, **options), lambda z, t: F.mse_loss(z, 5 * t))
    ((x, t),) = regression(1)
    hessian = DenseModel(model).hessian((x,), lambda z: F.mse_loss(z, 5 * t))
    params = list(model.parameters())
    zs = [flat(ProbeSampler("normal", 0, 0).draw(params, i)) for i in range(3)]
    expected = torch.stack([z * (hessian @ z) for z in zs]).mean(0).square()
    loop.step(x, t)
    found = flat([loop.optimizer.state[p]["hess_diag_sq"] for p in params])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


# Parameters without an estimate


@pytest.mark.parametrize("can_look", [True, False])
@pytest.mark.parametrize("foreach", [None, False])
def test_without_an_estimate_nothing_moves(
    can_look: bool, foreach: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no scale to move by; the momentum is kept, and its correction is that of Adam."""
    monkeypatch.setattr(DiagonalOptimizer, "_can_look", lambda self, scalar: can_look)
    shapes = [(3,), (2,)]
    params, grads = parameters(shapes), script(4, shapes=shapes)
    new = script(2, seed=8, shapes=shapes)
    optimizer = AdaHessian(params, lr=0.02, hessian_update_interval=3, foreach=foreach)
    optimizer.attach(Scripted([new[0][:1], new[1]]))
    given: list[list[Tensor | None]] = [[*g] for g in grads]
    given[0][1] = None
    start = params[1].detach().clone()

    def check(step: int) -> None:
        assert torch.equal(params[1].detach(), start) == (step < 3)

    follow(optimizer, params, given, check)
    expected = reference(
        parameters(shapes)[0].detach(),
        [g[0] for g in grads],
        [d[0] for d in new],
        lr=0.02,
        hessian_update_interval=3,
    )
    torch.testing.assert_close(params[0].detach(), expected, rtol=EXACT, atol=EXACT)
    m, weight = torch.zeros(2, dtype=torch.float64), 1 - 0.9**3
    for g in grads[1:]:
        m = 0.9 * m + 0.1 * g[1]
    moved = start - 0.02 * (m / weight) / (new[1][1].abs() + 1e-4)
    torch.testing.assert_close(params[1].detach(), moved, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("can_look", [True, False])
def test_an_estimate_that_is_not_finite(can_look: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first leaves nothing to scale by; later the old average stays in use."""
    monkeypatch.setattr(DiagonalOptimizer, "_can_look", lambda self, scalar: can_look)
    params, grads, new = parameters(), script(4), script(4, seed=8)
    new[0][0][0, 0] = math.nan
    new[2][1][0] = math.inf
    optimizer = AdaHessian(params, lr=0.02, max_failures=1)
    optimizer.attach(Scripted(new))
    start = flat(params)
    message = (
        r"^AdaHessian kept an old estimate of the Hessian's diagonal 1 times: the new one was not "
        r"finite\. stats\['skipped_refreshes'\] goes on counting\.$"
    )
    with pytest.warns(RuntimeWarning, match=message):
        follow(optimizer, params, grads[:1])
    assert torch.equal(flat(params), start)
    follow(optimizer, params, grads[1:])
    assert float(optimizer.stats["skipped_refreshes"]) == 2
    assert {float(optimizer.state[p]["num_estimates"]) for p in params} == {2.0}
    m = v = torch.zeros_like(start)
    theta, count = start, 0
    for t, (g, d) in enumerate(zip(grads, (None, new[1], None, new[3]), strict=True), start=1):
        m = 0.9 * m + 0.1 * flat(g)
        if d is not None:
            averaged = [kernel_mean(x.abs()) for x in d]
            v, count = 0.999 * v + 0.001 * flat(averaged).square(), count + 1
        if count:
            v_hat = v / (1 - 0.999**count)
            theta = theta - 0.02 * (m / (1 - 0.9**t)) / (v_hat.sqrt() + 1e-4)
    torch.testing.assert_close(flat(params), theta, rtol=EXACT, atol=EXACT)


# Routes, groups, precision


@pytest.mark.parametrize("shapes", [SHAPES, ((300, 200), (5,), (8, 5, 3, 3), (4, 2, 700))])
@pytest.mark.parametrize("power", [1.0, 0.5])
def test_routes_agree(shapes: Any, power: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """One tensor at a time, in blocks, and without looking at the gradient; bad values too."""
    grads, new = script(6, shapes=shapes), script(6, seed=8, shapes=shapes)
    grads[3][0].view(-1)[0] = math.nan
    new[2][1][0] = math.inf
    outcomes = []
    for foreach, can_look in ((None, True), (False, True), (True, True), (None, False)):
        params = parameters(shapes)
        options = {"lr": 0.02, "hessian_power": power, "weight_decay": 0.1, "foreach": foreach}
        optimizer = AdaHessian(params, **options)
        optimizer.attach(Scripted([new[i] for i in range(6) if i != 3 or not can_look]))
        with monkeypatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            patch.setattr(DiagonalOptimizer, "_can_look", lambda self, x, can=can_look: can)
            follow(optimizer, params, grads)
        state = [optimizer.state[p][name] for p in params for name in optimizer.state_names]
        counts = [optimizer.stats[k] for k in ("skipped_steps", "skipped_refreshes")]
        outcomes.append([flat(params), flat(state), torch.stack(counts)])
    assert outcomes[0][2].tolist() == [1.0, 1.0]
    for other in outcomes[1:]:
        for found, expected in zip(other, outcomes[0], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_groups_have_their_own() -> None:
    own: list[dict[str, Any]] = [
        {"lr": 0.02, "betas": (0.9, 0.7), "hessian_power": 1.0, "eps": 1e-4},
        {"lr": 0.1, "betas": (0.3, 0.2), "hessian_power": 0.5, "eps": 0.1, "weight_decay": 0.2},
    ]
    params, grads, new = parameters(), script(STEPS), script(STEPS, seed=8)
    optimizer = AdaHessian([{"params": params[:2], **own[0]}, {"params": params[2:], **own[1]}])
    optimizer.attach(Scripted(new))
    start = parameters()
    follow(optimizer, params, grads)
    for i, p in enumerate(params):
        expected = reference(
            start[i].detach(), [g[i] for g in grads], [d[i] for d in new], **own[i // 2]
        )
        torch.testing.assert_close(p.detach(), expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """State and arithmetic are float32: in float16 the square of 1e-4 is zero."""
    params, grads = parameters(dtype=dtype), script(STEPS, scale=1e-4, dtype=torch.float32)
    new = script(STEPS, seed=8, scale=1e-4, dtype=torch.float32)
    options: dict[str, Any] = {"lr": 0.02, "eps": 1e-8}
    rounded = [[g.to(dtype).float() for g in gs] for gs in grads]
    expected = [
        reference(p.detach().float(), [g[i] for g in rounded], [d[i] for d in new], **options)
        for i, p in enumerate(params)
    ]
    optimizer = AdaHessian(params, **options)
    optimizer.attach(Scripted(new))
    follow(optimizer, params, grads)
    for p, theta in zip(params, expected, strict=True):
        state = optimizer.state[p]
        assert {state[name].dtype for name in optimizer.state_names} == {torch.float32}
        assert bool((state["hess_diag_sq"] > 0).all())
        tolerance = 0.05 if dtype is torch.bfloat16 else 0.01
        torch.testing.assert_close(p.detach().float(), theta, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_trains(dtype: torch.dtype) -> None:
    model = network(dtype=dtype)
    loop = Loop(model, lambda p: AdaHessian(p, lr=0.05))
    losses = loop.train(classification(1, batch=32, dtype=dtype) * 60)
    assert losses[-1] < 0.5 * losses[0]
    assert loop.is_finite()


def test_accumulation() -> None:
    """Products are linear: one batch of eight is four of two."""
    found = []
    for parts in (1, 4):
        model = network()
        loop = Loop(model, lambda p: AdaHessian(p, lr=0.01))
        for x, y in classification(4):
            loop.optimizer.zero_grad()
            for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (loop.criterion(model(a), b) / parts).backward()
            loop.optimizer.step()
        found.append(loop.theta())
    torch.testing.assert_close(found[0], found[1], rtol=1e-8, atol=1e-10)


def test_resuming_within_an_interval(tmp_path: Path) -> None:
    def loop(model: nn.Module) -> Loop:
        return Loop(model, lambda p: AdaHessian(p, lr=0.02, hessian_update_interval=3))

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
    assert torch.equal(
        second.optimizer.stats["hess_diag_norm"], whole.optimizer.stats["hess_diag_norm"]
    )


def train_rank() -> list[float]:
    """Train this rank's half of each batch; runs on the ranks."""
    from tests.helpers.ranks import world

    rank, size = world()
    model = network()
    loop = Loop(model, lambda p: AdaHessian(p, lr=0.02))
    torch.manual_seed(rank)
    for x, y in classification(3):
        loop.backward(x.chunk(size)[rank], y.chunk(size)[rank])
        if size > 1:
            for p in model.parameters():
                torch.distributed.all_reduce(p.grad)
                p.grad /= size
        loop.optimizer.step()
    return loop.theta().tolist()


@pytest.mark.ddp
def test_two_ranks(ranks: RankPool) -> None:
    """The size is taken after the average over the ranks."""
    theta, other = ranks.run(train_rank)
    assert theta == other
    torch.testing.assert_close(
        torch.tensor(theta), torch.tensor(train_rank()), rtol=1e-8, atol=1e-10
    )


ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"lr": -0.1}, ValueError, "Invalid lr=-0.1: must be >= 0."),
    ({"betas": (0.9, 1.0)}, ValueError, "Invalid betas[1]=1.0: must be in [0, 1)."),
    ({"eps": 0.0}, ValueError, "Invalid eps=0.0: must be > 0."),
    ({"hessian_power": 1.5}, ValueError, "Invalid hessian_power=1.5: must be in [0, 1]."),
    ({"weight_decay": -1.0}, ValueError, "Invalid weight_decay=-1.0: must be >= 0."),
    (
        {"hessian_update_interval": 0},
        ValueError,
        "Invalid hessian_update_interval=0: must be an integer >= 1, in optimizer steps.",
    ),
    (
        {"distribution": "uniform"},
        ValueError,
        "Invalid distribution='uniform': must be one of 'rademacher', 'normal'.",
    ),
    ({"num_probes": 0}, ValueError, "Invalid num_probes=0: must be an integer >= 1."),
    (
        {"hvp_method": "exact"},
        ValueError,
        "Invalid hvp_method='exact': must be one of 'double-backward', 'fd'.",
    ),
    ({"seed": -1}, ValueError, "Invalid seed=-1: must be in [0, inf)."),
]


@pytest.mark.parametrize(("options", "error", "message"), ERRORS)
def test_errors(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        AdaHessian(parameters(), **options)
    assert str(caught.value) == message
