"""Tests of Hessian-vector products (oracle/products.py, oracle/window_products.py), exact."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from lightning_curvature import SophiaH
from lightning_curvature.curvature.diagonal import hutchinson
from lightning_curvature.oracle import ClosureOracle, ModelOracle
from lightning_curvature.oracle.plans import ProbePlan, SamplePlan
from tests.helpers.dense import MODELS, DenseModel, build
from tests.helpers.estimates import backward, flat, watched
from tests.helpers.losses import MASK, inputs, labels, values

EXACT = 1e-10
# Central differences of gradients leave the third derivative and round-off.
DIFFERENCES = 1e-7


def draw(params: Sequence[Tensor], index: int) -> list[Tensor]:
    """Draw a probe with a distribution that no symmetry hides."""
    generator = torch.Generator().manual_seed(50 + index)
    return [
        torch.rand(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) + 0.1
        for p in params
    ]


def products(oracle: ModelOracle, *batches: Any) -> list[tuple[Tensor, Tensor]]:
    """Return every probe and its product after one step."""
    backward(oracle, *batches)
    return [(flat(z), flat(h)) for z, h in oracle.products()]


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Compare relative to the whole vector."""
    expected = expected.detach()
    assert float((found - expected).norm()) <= tolerance * float(expected.norm())
    assert expected.any()


METHODS = [
    pytest.param({}, EXACT, id="graph"),
    pytest.param({"again": True}, EXACT, id="again"),
    pytest.param({"method": "fd"}, DIFFERENCES, id="fd"),
]


@pytest.mark.parametrize(("options", "tolerance"), METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_every_model(name: str, options: Any, tolerance: float) -> None:
    """Batch normalization, dropout, shared, frozen and unused parameters; several probes."""
    model = build(name)
    if name == "dead-branch":
        model.live.bias.data += 0.01  # away from the kinks
    y = labels()
    oracle = watched(model, ProbePlan(draw, num_probes=3, **options))
    torch.manual_seed(5)
    pairs = products(oracle, (inputs(), y))
    active = [p for p in model.parameters() if p.grad is not None]
    hessian = DenseModel(model, active, seed=5).hessian(
        (inputs(),), lambda z: F.cross_entropy(z, y)
    )
    assert len(pairs) == 3
    assert not torch.equal(pairs[0][0], pairs[1][0])
    for z, h in pairs:
        assert_close(h, hessian @ z, tolerance)


@pytest.mark.parametrize(("options", "tolerance"), METHODS)
def test_a_window(options: Any, tolerance: float) -> None:
    """Micro-batches count by their weights."""
    model, x, y = build("conv"), inputs(), labels()
    oracle = watched(model, ProbePlan(draw, num_probes=2, **options))
    parts = [(x[:1], y[:1], 0.2), (x[1:3], y[1:3], 1.0), (x[3:], y[3:], -0.7)]
    dense = DenseModel(model)
    hessian = sum(
        w * dense.hessian((a,), lambda z, b=b: F.cross_entropy(z, b)) for a, b, w in parts
    )
    for z, h in products(oracle, *parts):
        assert_close(h, hessian @ z, tolerance)
    # Added up before one backward, with a loss that is only looked at in between.
    backward(oracle)
    losses = [oracle.criterion(model(a), b) * w for a, b, w in parts]
    oracle.criterion(model(x * 2), y).item()
    torch.stack(losses).sum().backward()
    oracle.select(oracle.params)
    for z, h in oracle.products():
        assert_close(flat(h), hessian @ flat(z), tolerance)


@pytest.mark.parametrize("options", [{}, {"again": True}])
def test_the_whole_loss_counts(options: Any) -> None:
    """Also a penalty, and a loss that nobody captures."""
    model, t = build("conv"), values()

    def loss(z: Tensor, t: Tensor) -> Tensor:
        penalty = torch.stack([p.pow(4).sum() for p in model.parameters()]).sum()
        return (z - t).abs().pow(2.5).mean() + penalty

    oracle = watched(model, ProbePlan(draw, **options), loss)
    ((z, h),) = products(oracle, (inputs(), t))
    data = DenseModel(model).hessian((inputs(),), lambda z: (z - t).abs().pow(2.5).mean())
    penalty = 12 * flat(list(model.parameters())).square()
    assert_close(h, data @ z + penalty * z, EXACT)


@pytest.mark.parametrize("options", [{}, {"again": True}, {"method": "fd"}])
def test_where_nothing_is_curved(options: Any) -> None:
    """A linear model with a linear loss: zeros, whatever graph there is."""
    model = build("linear-bias")
    oracle = watched(model, ProbePlan(draw, **options), lambda z, y: (z * MASK[:, None]).sum())
    ((_, h),) = products(oracle, (inputs(), labels()))
    assert float(h.abs().max()) < 1e-8


def test_a_loss_without_parameters() -> None:
    """The batch has a loss, but it leads nowhere."""
    model = build("linear-bias")
    oracle = watched(model, ProbePlan(draw), lambda z, y: z.sum() * 0 if y is None else z.mean())
    outside = torch.ones(1, requires_grad=True, dtype=torch.float64)
    backward(oracle)
    oracle.criterion(model(inputs()), 1).backward()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "forward", lambda x: outside * x.sum())
        oracle.criterion(model(inputs()), 1).backward()
    oracle.select(oracle.params)
    ((_, h),) = oracle.products()
    assert not flat(h).any()


# Tensors that parameters share


class Sum(nn.Module):
    """Adds two weights up, so that their gradients and products are one tensor."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        for name in ("base", "delta"):
            drawn = torch.randn(4, 5, generator=generator, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(drawn))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return x @ (self.base + self.delta).T


@pytest.mark.parametrize("weights", [(1.0,), (0.5, 0.5), (0.25, 0.25, 0.5)])
def test_products_that_are_shared(weights: tuple[float, ...]) -> None:
    """Nothing is changed in place."""
    model, y = Sum(), labels()
    oracle = ClosureOracle(list(model.parameters()), model)
    oracle.plan = lambda: ProbePlan(draw)
    hessian = sum(weights) * DenseModel(model).hessian((inputs(),), lambda z: F.cross_entropy(z, y))

    def run() -> None:
        for w in weights:
            (w * F.cross_entropy(model(inputs()), y)).backward()

    oracle.evaluate(run)
    oracle.select(list(model.parameters()))
    for _ in range(2):
        ((z, h),) = oracle.products()
        assert_close(flat(h), hessian @ flat(z), EXACT)
        assert_close(flat(hutchinson(oracle)), flat(z) * (hessian @ flat(z)), EXACT)
    loop = watched(model, ProbePlan(draw))
    ((z, h),) = products(loop, *[(inputs(), y, w) for w in weights])
    assert_close(h, hessian @ z, EXACT)
    optimizer = SophiaH(model.parameters(), lr=0.0, betas=(0.9, 0.0))
    criterion = optimizer.attach_model(model, F.cross_entropy)
    criterion(model(inputs()), y).backward()
    z = flat(optimizer.plan().draw(list(model.parameters()), 0))
    optimizer.step()
    found = flat([optimizer.state[p]["hess_diag"] for p in model.parameters()])
    assert_close(found, z * (hessian / sum(weights) @ z), EXACT)


def test_products_that_are_expanded() -> None:
    """A sum has a gradient whose entries share their memory."""
    model = nn.Linear(5, 1, bias=False, dtype=torch.float64)
    oracle = watched(model, ProbePlan(draw), lambda *_: model.weight.sum() ** 2)
    ((z, h),) = products(oracle, (inputs(), None, 0.5), (inputs(), None, 0.25))
    assert_close(h, 0.75 * 2 * z.sum().expand(5), EXACT)


def test_frozen_meanwhile() -> None:
    """A parameter may keep an old gradient: it has no curvature."""
    for options in ({}, {"again": True}, {"method": "fd"}):
        model = build("conv")
        oracle = watched(model, ProbePlan(draw, **options))
        backward(oracle, (inputs(), labels()))
        model.conv.weight.requires_grad_(False)
        oracle.clear()
        oracle.criterion(model(inputs()), labels()).backward()
        oracle.select(oracle.params)
        ((_, h),) = oracle.products()
        assert not h[0].any()
        assert all(bool(x.any()) for x in h[1:])


# Where the graph of the main pass cannot be differentiated twice


class Once(torch.autograd.Function):
    """The square, whose author wrote no second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class Squares(nn.Module):
    """A linear map, squared in one of two ways."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.inner = build("linear-bias")
        self.own = own

    def forward(self, x: Tensor) -> Tensor:
        """Return squares."""
        z = self.inner(x)
        return Once.apply(z) if self.own else z * z


def test_an_operation_that_has_no_second_derivative() -> None:
    """Differences of gradients step in, and the user hears of it once."""
    model = Squares(own=True)
    oracle = watched(model, ProbePlan(draw), F.mse_loss)
    dense = DenseModel(Squares(own=False))
    hessian = dense.hessian((inputs(),), lambda z: F.mse_loss(z, values()))
    with pytest.warns(RuntimeWarning) as caught:
        ((z, h),) = products(oracle, (inputs(), values()))
    assert_close(h, hessian @ z, DIFFERENCES)
    (message,) = [str(w.message) for w in caught]
    assert message == (
        "This model cannot be differentiated twice (a custom autograd.Function is marked with "
        "once_differentiable; it has Once); Hessian-vector products come from central "
        "differences of gradients instead, which also count the kinks of activations such as ReLU."
    )
    ((z, h),) = products(oracle, (inputs(), values()))  # no second warning
    assert_close(h, hessian @ z, DIFFERENCES)


class Attention(nn.Module):
    """One head over three positions."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(5, 12)
        self.out = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits for every position."""
        q, k, v = self.qkv(x.view(2, 1, 3, 5)).chunk(3, -1)
        hidden = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(hidden.repeat(1, 1, 1, 3)).view(6, 4)


class Recurrent(nn.Module):
    """An LSTM over three positions."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(5, 3, batch_first=True)
        self.out = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits for every position."""
        return self.out(self.cell(x.view(2, 3, 5))[0]).view(6, 4)


class Checkpointed(nn.Module):
    """Recomputes its hidden layer in the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(5, 6), nn.Tanh())
        self.out = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.out(checkpoint(self.hidden, x, use_reentrant=False))


@pytest.mark.parametrize("kind", [Attention, Recurrent, Checkpointed])
def test_kernels(kind: type[nn.Module]) -> None:
    """Where a fused kernel has no second derivative another is chosen, without a word."""
    torch.manual_seed(2)
    model = kind().double()
    y = labels()
    oracle = watched(model, ProbePlan(draw, num_probes=2))
    pairs = products(oracle, (inputs(), y, 0.5), (inputs().flip(0), y, 0.5))
    params = list(model.parameters())

    def gradient(x: Tensor, shift: Tensor) -> Tensor:
        start = 0
        for p in params:
            p.data += shift[start : start + p.numel()].view(p.shape)
            start += p.numel()
        found = flat(torch.autograd.grad(F.cross_entropy(model(x), y), params))
        start = 0
        for p in params:
            p.data -= shift[start : start + p.numel()].view(p.shape)
            start += p.numel()
        return found

    eps = 1e-4
    for z, h in pairs:
        # Fourth order, since torch.func cannot differentiate these kernels.
        slopes = [
            sum(gradient(x, n * eps * z) for x in (inputs(), inputs().flip(0))) / 2
            for n in (-2, -1, 1, 2)
        ]
        expected = (slopes[0] - 8 * slopes[1] + 8 * slopes[2] - slopes[3]) / (12 * eps)
        assert_close(h, expected, 1e-8)


def test_bare_closure_and_several_backwards() -> None:
    model, y = build("conv"), labels()
    params = list(model.parameters())
    hessian = DenseModel(model).hessian((inputs(),), lambda z: F.cross_entropy(z, y))

    def run() -> None:
        model.zero_grad()
        for weight in (0.5, 0.75):
            (weight * F.cross_entropy(model(inputs()), y)).backward()

    for options, tolerance in (({}, EXACT), ({"again": True}, EXACT), ({"method": "fd"}, 1e-7)):
        oracle = ClosureOracle(params)
        oracle.plan = lambda options=options: ProbePlan(draw, **options)
        oracle.evaluate(run)
        oracle.select(params)
        before = flat([p.grad for p in params])
        ((z, h),) = oracle.products()
        assert_close(flat(h), 1.25 * hessian @ flat(z), tolerance)
        assert torch.equal(flat([p.grad for p in params]), before)


# No trace


@pytest.mark.parametrize("options", [{}, {"again": True}, {"method": "fd"}])
def test_nothing_is_left_behind(options: Any) -> None:
    """Gradients, buffers, random numbers and parameters, bit for bit."""
    outcomes = []
    for plan in (None, ProbePlan(draw, **options)):
        torch.manual_seed(3)
        model = build("batch-norm-dropout")
        oracle = watched(model, plan)
        backward(oracle, (inputs(), labels()))
        if plan is not None:
            oracle.products()
        state = [*[p.grad for p in model.parameters()], *model.parameters(), *model.buffers()]
        outcomes.append((state, torch.get_rng_state(), random.getstate(), _numpy_state()))
        assert all(p.grad is not None and p.grad.grad_fn is None for p in model.parameters())
    (one, *others), (two, *same) = outcomes
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert torch.equal(others[0], same[0])
    assert others[1:] == same[1:]


def _numpy_state() -> list[Any]:
    return [np.asarray(part).tolist() for part in np.random.get_state()]  # noqa: NPY002


@pytest.mark.parametrize("fails_at", [1, 2])
def test_parameters_are_put_back_when_a_difference_fails(fails_at: int) -> None:
    model = build("conv")
    oracle = watched(model, ProbePlan(draw, method="fd"))
    backward(oracle, (inputs(), labels()))
    before = [p.detach().clone() for p in model.parameters()]
    calls = 0

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        assert not torch.equal(before[0], model.conv.weight)
        if calls == fails_at:
            raise FloatingPointError("of the user")

    handle = model.register_forward_pre_hook(fail)
    with pytest.raises(FloatingPointError, match="of the user"):
        oracle.products()
    handle.remove()
    assert calls == fails_at
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_asking_without_a_plan() -> None:
    model = build("linear-bias")
    for plan in (None, SamplePlan(seed=0, step=0)):
        oracle = watched(model, plan)
        backward(oracle, (inputs(), labels()))
        with pytest.raises(RuntimeError, match=r"^Products were not planned for this step\.$"):
            oracle.products()
