"""`AdaFisher` and `AdaFisherW`: the corrected rule, arguments, stats, ways to compute the same."""

import copy
import re
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature import AdaFisher, AdaFisherW
from lightning_curvature.optim import denominators
from lightning_curvature.optim.diagonal import DiagonalOptimizer
from tests.helpers.adafisher import (
    BOTH,
    EXACT,
    Zoo,
    factors,
    inside,
    making,
    sentences,
    theta,
)
from tests.helpers.plain_loop import CLASSES, FEATURES, HIDDEN, Loop, classification, network

# The rule


def dense_diagonal(layer: nn.Linear, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Form the diagonal of a layer in full, divided by its mean."""
    h = torch.cat([x.square().mean(0), x.new_ones(1)])
    full = torch.outer(grad.square().mean(0), h)
    full /= full.mean()
    return {"weight": full[:, :-1], "bias": full[:, -1]}


@BOTH
@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
def test_first_step_by_hand(cls: type[Any], weight_decay: float) -> None:
    lr, damping = 0.3, 0.7
    layer = nn.Linear(3, 4, dtype=torch.float64)
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randint(4, (6,))
    options = {"lr": lr, "damping": damping, "weight_decay": weight_decay}
    loop = Loop(layer, making(cls, **options))
    output = layer(x)
    (delta,) = torch.autograd.grad(F.cross_entropy(output, y), output)
    diagonal, before = dense_diagonal(layer, x, delta), theta(loop)
    loop.step(x, y)
    for name, p in layer.named_parameters():
        g, old = p.grad, before[name]
        assert g is not None
        coupled = 0.0 if cls is AdaFisherW else weight_decay
        step = (1 + damping) / (diagonal[name] + damping) * (g + coupled * old)
        step = step + (weight_decay - coupled) * old
        torch.testing.assert_close(p.detach(), old - lr * step, **EXACT)


def test_averages_have_weights_that_sum_to_one() -> None:
    """Of factors and gradient: bias-corrected."""
    gamma, beta, steps = 0.6, 0.5, 4
    loop = Loop(network(), making(lr=0.0, factor_decay=gamma, beta=beta))
    batches = classification(steps)
    seen = []
    for x, y in batches:
        single = Loop(network(), making(lr=0.0))
        single.step(x, y)
        seen.append(factors(single)["0"]["input"])
        loop.step(x, y)
    weights = [gamma ** (steps - 1 - t) for t in range(steps)]
    expected = sum(w * h for w, h in zip(weights, seen, strict=True)) / sum(weights)
    torch.testing.assert_close(factors(loop)["0"]["input"], expected, **EXACT)
    assert factors(loop)["0"]["updates"] == steps


def test_a_coordinate_of_average_curvature_descends_whatever_the_damping() -> None:
    """One output with inputs of size 1: all of F is 1, so the step is that of momentum SGD."""
    batches = [(x.sign(), y) for x, y in classification(6)]
    model = nn.Linear(FEATURES, 1, dtype=torch.float64)
    other = copy.deepcopy(model)

    def loss(output: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(output[:, 0], y.double())

    loop = Loop(model, making(lr=0.1, beta=0.5, damping=1e-3), loss)
    reference = torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.5)
    for t, (x, y) in enumerate(batches, start=1):
        loop.step(x, y)
        reference.zero_grad()
        loss(other(x), y).backward()
        reference.param_groups[0]["lr"] = 0.05 / (1 - 0.5**t)
        reference.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, **EXACT)


def test_scale_of_the_loss_does_not_reach_the_diagonal() -> None:
    """A small loss, or a sum in the place of a mean, changes no factor."""
    found = []
    for scale in (1.0, 1e-7, 1e4):

        def loss(output: Tensor, y: Tensor, scale: float = scale) -> Tensor:
            return scale * F.cross_entropy(output, y)

        loop = Loop(network(), making(lr=0.0), loss)
        loop.train(classification(3))
        found.append(factors(loop))
    for other in found[1:]:
        for name, entry in found[0].items():
            torch.testing.assert_close(other[name], entry, rtol=1e-9, atol=0)


@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_make_one_batch(parts: int) -> None:
    """All of them count, and the division of their losses cancels."""
    whole, cut = (Loop(network(), making(lr=0.1)) for _ in range(2))
    for x, y in classification(4):
        whole.step(x, y)
        cut.optimizer.zero_grad()
        for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (cut.criterion(cut.model(xs), ys) / parts).backward()
        cut.optimizer.step()
    torch.testing.assert_close(whole.theta(), cut.theta(), **EXACT)
    for name, entry in factors(whole).items():
        torch.testing.assert_close(factors(cut)[name], entry, **EXACT)


def test_normalization_by_range() -> None:
    loop = Loop(network(), making(lr=0.1, normalization="min-max", damping=1.0))
    losses = loop.train(classification(1, batch=32) * 30)
    assert losses[-1] < 0.8 * losses[0]
    (rows, columns), *_ = inside(loop)._diagonals.values()  # type: ignore[union-attr]
    assert rows.min() == columns.min() == 0


# Ways to compute the same


@BOTH
@pytest.mark.parametrize("way", ["blocks", "one by one", "without looking"])
@pytest.mark.parametrize("mode", ["reference", "corrected"])
def test_ways(cls: type[Any], way: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"mode": mode, "weight_decay": 0.1, "lr": 1e-3, "factor_update_interval": 2}
    torch.manual_seed(0)
    model = Zoo()
    plain = Loop(copy.deepcopy(model), making(cls, **options))
    plain.train(sentences(5))
    if way == "blocks":
        monkeypatch.setattr(denominators, "_BLOCK", 8)
    if way == "without looking":
        monkeypatch.setattr(DiagonalOptimizer, "_can_look", lambda self, scalar: False)
    other = Loop(model, making(cls, **options, foreach=False if way == "one by one" else None))
    other.train(sentences(5))
    torch.testing.assert_close(plain.theta(), other.theta(), **EXACT)


def test_channels_last() -> None:
    def net() -> nn.Module:
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(20, CLASSES)]
        return nn.Sequential(*layers).to(torch.float64)

    loops = [Loop(net(), making()), Loop(net().to(memory_format=torch.channels_last), making())]
    x = torch.randn(4, 3, 4, 4, dtype=torch.float64)
    for loop in loops:
        loop.train([(x, torch.arange(4))] * 3)
    one, two = loops
    torch.testing.assert_close(one.theta(), two.theta(), **EXACT)


def test_half_precision_parameters() -> None:
    model = network(dtype=torch.float32).to(torch.bfloat16)
    loop = Loop(model, making())
    data = [(x.bfloat16(), y) for x, y in classification(1, batch=32)]
    losses = loop.train(data * 30)
    assert losses[-1] < 0.8 * losses[0]
    assert {entry["input"].dtype for entry in factors(loop).values()} == {torch.float32}


# Arguments and stats


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lr": -0.1}, "Invalid lr=-0.1: must be >= 0."),
        ({"beta": 1.0}, "Invalid beta=1.0: must be in [0, 1)."),
        ({"damping": 0.0}, "Invalid damping=0.0: must be > 0."),
        (
            {"factor_update_interval": 0},
            "Invalid factor_update_interval=0: must be an integer >= 1, in optimizer steps.",
        ),
        ({"factor_decay": 1.0}, "Invalid factor_decay=1.0: must be in [0, 1)."),
        ({"weight_decay": -1.0}, "Invalid weight_decay=-1.0: must be >= 0."),
        ({"mode": "paper"}, "Invalid mode='paper': must be one of 'corrected', 'reference'."),
        (
            {"normalization": "max"},
            "Invalid normalization='max': must be one of 'mean', 'min-max'.",
        ),
    ],
)
@BOTH
def test_arguments(cls: type[Any], options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        cls(network().parameters(), **options)


@BOTH
@pytest.mark.parametrize(("mode", "expected"), [("corrected", 0.3), ("reference", 1e-3)])
def test_defaults_go_with_the_mode(cls: type[Any], mode: str, expected: float) -> None:
    optimizer = cls(network().parameters(), mode=mode)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["damping"]) == (expected, expected)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    assert optimizer.param_groups[1]["lr"] == expected


def test_stats() -> None:
    loop = Loop(network(), making(damping=2.0))
    loop.train(classification(3))
    own = inside(loop)
    assert own._diagonals is not None
    full = [
        torch.outer(d.rows, d.columns) if isinstance(d, tuple) else d
        for d in own._diagonals.values()
    ]
    ratios = torch.cat([f.flatten() for f in full]) / 2
    assert loop.stat("fisher_max") == pytest.approx(float(ratios.max()))
    assert loop.stat("fisher_median") == pytest.approx(float(ratios.median()), rel=0.1)
    assert loop.stat("damped_fraction") == pytest.approx(
        float((ratios < 1).double().mean()), abs=0.05
    )
    drift = loop.stat("curvature_drift")
    before = [f / 2 for f in full]
    loop.train(classification(1, seed=9))
    assert 0 < drift < 2
    assert 0 < loop.stat("curvature_drift") < 2
    after = [
        torch.outer(d.rows, d.columns) if isinstance(d, tuple) else d
        for d in own._diagonals.values()
    ]
    # Of layers, the bias included: these are all parameters of them.
    change = sum((2 * a - b).square().sum() for a, b in zip(before, after, strict=True))
    size = sum((2 * a).square().sum() for a in before)
    expected = float((change / size).sqrt())
    assert loop.stat("curvature_drift") == pytest.approx(expected, rel=1e-6)


def test_a_default_run_is_quiet() -> None:
    loop = Loop(network(HIDDEN), AdaFisher, F.mse_loss)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = torch.randn(16, FEATURES, dtype=torch.float64)
        losses = loop.train([(x, x @ torch.ones(FEATURES, HIDDEN, dtype=torch.float64))] * 40)
    assert losses[-1] < 0.5 * losses[0]
