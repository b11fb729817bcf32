"""The two diagonals of a layer against gradients of single rows, by autograd, in float64."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature.curvature.layers import (
    Factors,
    bias_diagonal,
    factor_shapes,
    layer_inner,
    layer_kind,
    layer_mean,
    layer_moments,
    min_max,
    reference_factors,
    weight_factors,
)

EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-14}


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def signs(*shape: int) -> Tensor:
    return draw(*shape, seed=9).sign()


def factors_of(layer: nn.Module, x: Tensor, grad: Tensor) -> Factors:
    """Return means over the rows."""
    moments = layer_moments(layer, x, grad)
    return Factors(moments.input / moments.rows, moments.output / moments.rows)


def diagonal(layer: nn.Module, factors: Factors) -> dict[str, Tensor]:
    """Return the diagonal in the shapes of the parameters."""
    has_bias = getattr(layer, "bias", None) is not None
    rows, columns = weight_factors(layer_kind(layer), factors, has_bias=has_bias)
    weight = rows.unsqueeze(-1) * columns.unsqueeze(-2)
    found = {"weight": weight.reshape(layer.weight.shape)}
    if has_bias:
        found["bias"] = bias_diagonal(factors).reshape(layer.bias.shape)
    return found


def squared_gradients(layer: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Return the squares of the gradients that the rows ``x[i]``, ``grad[i]`` have, averaged."""
    named = dict(layer.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in named.items()}
    for one, s in zip(x.split(1), grad.split(1), strict=True):
        found = torch.autograd.grad(layer(one), list(named.values()), s)
        for name, g in zip(named, found, strict=True):
            total[name] += g.square() / len(x)
    return total


# One row, or inputs of constant size: the factorization is exact


ONE_ROW: list[tuple[str, Callable[[], nn.Module], Callable[[], Tensor]]] = [
    ("linear", lambda: nn.Linear(3, 4), lambda: draw(1, 3)),
    ("linear-no-bias", lambda: nn.Linear(3, 4, bias=False), lambda: draw(1, 3)),
    ("conv1d", lambda: nn.Conv1d(2, 3, 5), lambda: draw(1, 2, 5)),
    ("conv2d", lambda: nn.Conv2d(2, 3, (3, 2)), lambda: draw(1, 2, 3, 2)),
    ("depthwise", lambda: nn.Conv2d(4, 4, 2, groups=4), lambda: draw(1, 4, 2, 2)),
    ("grouped", lambda: nn.Conv2d(4, 6, 2, groups=2, bias=False), lambda: draw(1, 4, 2, 2)),
    ("embedding", lambda: nn.Embedding(5, 3), lambda: torch.tensor([2])),
    ("layernorm", lambda: nn.LayerNorm((2, 3)), lambda: draw(1, 2, 3)),
    ("layernorm-no-bias", lambda: nn.LayerNorm(6, bias=False), lambda: draw(1, 6)),
    ("groupnorm", lambda: nn.GroupNorm(2, 4), lambda: draw(1, 4)),
    ("batchnorm-eval", lambda: nn.BatchNorm1d(4).eval(), lambda: draw(1, 4)),
]


@pytest.mark.parametrize(
    ("make", "inputs"), [row[1:] for row in ONE_ROW], ids=[r[0] for r in ONE_ROW]
)
def test_exact_for_one_row(make: Callable[[], nn.Module], inputs: Callable[[], Tensor]) -> None:
    torch.manual_seed(0)
    layer, x = make().to(torch.float64), inputs()
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
        for name in ("running_mean", "running_var"):
            if hasattr(layer, name):
                getattr(layer, name).uniform_(0.5, 2.0)
    grad = draw(*layer(x).shape, seed=1)
    found = diagonal(layer, factors_of(layer, x, grad))
    expected = squared_gradients(layer, x, grad)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **EXACT)


@pytest.mark.parametrize("leading", [(6,), (2, 3)])
def test_linear_with_inputs_of_constant_size(leading: tuple[int, ...]) -> None:
    layer = nn.Linear(3, 4, dtype=torch.float64)
    x, grad = signs(*leading, 3), draw(*leading, 4)
    expected = squared_gradients(layer, x.view(-1, 3), grad.view(-1, 4))
    for name, value in diagonal(layer, factors_of(layer, x, grad)).items():
        torch.testing.assert_close(value, expected[name], **EXACT)


def test_embedding_counts_without_padding() -> None:
    layer = nn.Embedding(5, 3, padding_idx=1, dtype=torch.float64)
    indices, grad = torch.tensor([[0, 1, 4], [4, 1, 4]]), draw(2, 3, 3)
    moments = layer_moments(layer, indices, grad)
    assert moments.input.tolist() == [1, 0, 0, 0, 3]
    assert moments.rows == 4
    kept = grad.reshape(-1, 3)[indices.flatten() != 1]
    torch.testing.assert_close(moments.output, kept.square().sum(0), **EXACT)


# All options of convolutions: they are linear, so squared patches are the weight's gradient


CONVOLUTIONS: list[tuple[type[Any], dict[str, Any]]] = [
    (nn.Conv2d, {}),
    (nn.Conv2d, {"stride": 2, "padding": 1}),
    (nn.Conv2d, {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)}),
    (nn.Conv2d, {"padding": "same"}),
    (nn.Conv2d, {"padding": "valid", "dilation": 2}),
    (nn.Conv2d, {"padding": 1, "padding_mode": "reflect"}),
    (nn.Conv2d, {"padding": "same", "padding_mode": "circular"}),
    (nn.Conv2d, {"groups": 2, "padding": 1, "bias": False}),
    (nn.Conv2d, {"groups": 4, "padding": 1, "padding_mode": "replicate"}),
    (nn.Conv1d, {}),
    (nn.Conv1d, {"stride": 2, "padding": 2, "dilation": 2}),
    (nn.Conv1d, {"padding": "same", "groups": 2}),
]


@pytest.mark.parametrize(
    ("kind", "options"), CONVOLUTIONS, ids=[f"{k.__name__}-{o}" for k, o in CONVOLUTIONS]
)
def test_convolutions(kind: type[Any], options: dict[str, Any]) -> None:
    layer = kind(4, 8, 3, **options, dtype=torch.float64)
    axes = len(layer.kernel_size)
    x = draw(2, 4, *(7, 8)[:axes])
    output = layer(x)
    grad = draw(*output.shape, seed=1)
    moments = layer_moments(layer, x, grad)
    shapes = (tuple(moments.input.shape), tuple(moments.output.shape))
    assert shapes == factor_shapes(layer)
    assert moments.rows == output.numel() / 8
    squares = layer(x.square())
    (patches,) = torch.autograd.grad(squares, layer.weight, torch.ones_like(squares))
    per_group = patches.view(layer.groups, 8 // layer.groups, -1)[:, 0]
    rest = [axis for axis in range(grad.ndim) if axis != 1]
    bias = layer.bias is not None
    inputs = moments.input.view(layer.groups, -1)
    torch.testing.assert_close(inputs[:, :-1] if bias else inputs, per_group, **EXACT)
    torch.testing.assert_close(moments.output.flatten(), grad.square().sum(rest), **EXACT)
    if bias:
        assert (inputs[:, -1] == moments.rows).all()


def test_unbatched_convolution() -> None:
    layer = nn.Conv2d(2, 3, 2, dtype=torch.float64)
    x = draw(2, 4, 4)
    grad = draw(*layer(x).shape)
    one, many = layer_moments(layer, x, grad), layer_moments(layer, x[None], grad[None])
    torch.testing.assert_close(one, many, **EXACT)


# Normalization layers


NORMS: list[tuple[Callable[[], nn.Module], tuple[int, ...], int]] = [
    (lambda: nn.BatchNorm1d(4), (5, 4), 1),
    (lambda: nn.BatchNorm1d(4), (5, 4, 3), 1),
    (lambda: nn.BatchNorm2d(4), (3, 4, 2, 3), 1),
    (lambda: nn.BatchNorm3d(4), (2, 4, 2, 2, 2), 1),
    (lambda: nn.BatchNorm2d(4, track_running_stats=False).eval(), (3, 4, 2, 3), 1),
    (lambda: nn.GroupNorm(2, 4), (3, 4, 5), 1),
    (lambda: nn.LayerNorm(4), (3, 5, 4), 2),
]


@pytest.mark.parametrize(("make", "shape", "channels"), NORMS)
def test_normalization(
    make: Callable[[], nn.Module], shape: tuple[int, ...], channels: int
) -> None:
    layer = make().to(torch.float64)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2.0)
        layer.bias.normal_()
    x = 3 * draw(*shape) + 1
    output = layer(x)
    normalized = ((output.movedim(channels, -1) - layer.bias) / layer.weight).detach()
    grad = draw(*shape, seed=1)
    buffers = [b.clone() for b in layer.buffers()]
    factors = factors_of(layer, x, grad)
    rows = grad.movedim(channels, -1).reshape(-1, 4)
    torch.testing.assert_close(factors.output, rows.square().mean(0), **EXACT)
    inputs = normalized.reshape(-1, 4).square().mean(0)
    torch.testing.assert_close(factors.input[:-1], inputs, rtol=1e-9, atol=1e-12)
    assert factors.input[-1] == 1
    found = diagonal(layer, factors)
    torch.testing.assert_close(found["weight"], factors.output * inputs, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found["bias"], factors.output, **EXACT)
    for before, after in zip(buffers, layer.buffers(), strict=True):
        assert torch.equal(before, after)


# Precision and sums


def test_half_precision_is_summed_in_float32() -> None:
    layer = nn.Linear(3, 2)
    x, grad = draw(4, 3).to(torch.bfloat16), (1e-3 * draw(4, 2)).to(torch.float16)
    moments = layer_moments(layer, x, grad)
    assert {m.dtype for m in moments} == {torch.float32}
    torch.testing.assert_close(moments.output, grad.float().square().sum(0))


@pytest.mark.parametrize("name", [row[0] for row in ONE_ROW])
def test_shapes_means_and_inner_products(name: str) -> None:
    """Of the diagonal that nobody forms, against the formed one."""
    make = next(row[1] for row in ONE_ROW if row[0] == name)
    layer = make().to(torch.float64)
    shapes = factor_shapes(layer)
    one, two = (Factors(*(draw(*s, seed=i).abs() for s in shapes)) for i in (1, 2))
    has_bias = getattr(layer, "bias", None) is not None
    flat = [torch.cat([d.flatten() for d in diagonal(layer, f).values()]) for f in (one, two)]
    kind = layer_kind(layer)
    mean = layer_mean(kind, one, has_bias=has_bias)
    torch.testing.assert_close(mean, flat[0].mean(), **EXACT)
    inner = layer_inner(kind, one, two, has_bias=has_bias)
    torch.testing.assert_close(inner, flat[0] @ flat[1], **EXACT)


def test_min_max() -> None:
    values = torch.tensor([1.0, 3.0, 2.0])
    assert min_max(values).tolist() == [0.0, 1.0, 0.5]
    assert min_max(1e-9 * values).tolist() == pytest.approx([0.0, 1.0, 0.5])
    assert min_max(torch.ones(2, 3)).tolist() == [[1.0] * 3] * 2
    assert min_max(1e-9 * values, 1e-6).max() < 0.003
    assert min_max(torch.tensor([math.inf, 0.5, -math.inf]), 1e-6)[1] == pytest.approx(0.5)
    assert min_max(torch.tensor([math.nan, 0.5]), 1e-6).isnan().all()


# The authors' formulas, where the recordings have no example


def test_reference_convolution_pools_groups_and_ignores_dilation() -> None:
    layer = nn.Conv2d(4, 6, 3, groups=2, stride=2, padding=1, dilation=2, dtype=torch.float64)
    x = draw(3, 4, 7, 7)
    grad = draw(*layer(x).shape)
    patches = F.unfold(x, 3, padding=1, stride=2).view(3, 2, 18, -1)
    found = reference_factors(layer, x, grad)
    expected = patches.square().mean((0, 1, 3)) / 18
    torch.testing.assert_close(found.input, torch.cat([expected, expected.new_tensor([1 / 18])]))
    torch.testing.assert_close(found.output, grad.square().mean((0, 2, 3)))


def test_reference_layer_norm_reduces_all_but_axis_one() -> None:
    layer = nn.LayerNorm((2, 3), dtype=torch.float64)
    x, grad = draw(4, 5, 2, 3), draw(4, 5, 2, 3, seed=1)
    found = reference_factors(layer, x, grad)
    sums = x.sum((0, 2, 3)) / 36
    torch.testing.assert_close(found.input, torch.stack([sums @ sums, sums.new_tensor(5)]) / 16)
    last = grad.sum((0, 1, 2)).square() / 4
    torch.testing.assert_close(found.output, last.repeat(2))
