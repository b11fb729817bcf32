"""Layers as rows, against autograd on one example at a time, in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_curvature.curvature.layer_rows import (
    KRONECKER_LAYERS,
    SCALE_LAYERS,
    KfacApprox,
    Rows,
    embedding_counts,
    from_matrix,
    layer_rows,
    matrix_shape,
    scale_squares,
    shift_squares,
    to_matrix,
)

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

CONVOLUTIONS: list[tuple[type[Any], dict[str, Any]]] = [
    (nn.Conv1d, {}),
    (nn.Conv1d, {"stride": 2, "padding": 2, "dilation": 2}),
    (nn.Conv1d, {"padding": "same", "groups": 2, "padding_mode": "reflect"}),
    (nn.Conv2d, {}),
    (nn.Conv2d, {"bias": False}),
    (nn.Conv2d, {"kernel_size": 1}),
    (nn.Conv2d, {"kernel_size": (3, 2), "stride": (2, 3), "padding": (1, 0)}),
    (nn.Conv2d, {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)}),
    (nn.Conv2d, {"kernel_size": (2, 4), "padding": "same"}),
    (nn.Conv2d, {"padding": "valid", "dilation": 2}),
    (nn.Conv2d, {"padding": (2, 1), "padding_mode": "reflect"}),
    (nn.Conv2d, {"padding": "same", "padding_mode": "circular"}),
    (nn.Conv2d, {"groups": 2, "padding": 1, "bias": False}),
    (nn.Conv2d, {"groups": 4, "padding": (1, 2), "padding_mode": "replicate"}),
    (nn.Conv3d, {"kernel_size": (1, 3, 2), "padding": (0, 1, 2), "stride": (1, 2, 1)}),
    (nn.Conv3d, {"kernel_size": 2, "groups": 2, "padding": "same", "padding_mode": "replicate"}),
    (nn.ConvTranspose1d, {"bias": False}),
    (nn.ConvTranspose1d, {"stride": 3, "padding": 1, "output_padding": 2}),
    (nn.ConvTranspose2d, {"stride": 2, "padding": (1, 0), "dilation": (1, 2)}),
    (nn.ConvTranspose2d, {"groups": 2, "stride": (2, 3), "output_padding": (1, 2)}),
    (nn.ConvTranspose2d, {"kernel_size": (2, 3), "groups": 4, "padding": (1, 2)}),
    (nn.ConvTranspose3d, {"kernel_size": 2, "stride": (2, 1, 2), "output_padding": (1, 0, 0)}),
]
Make = Callable[[], nn.Module]


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def conv(kind: type[Any], options: dict[str, Any]) -> nn.Module:
    return kind(4, 8, **{"kernel_size": 3, **options})


def image(layer: Any, n: int = 3) -> Tensor:
    return draw(n, 4, *(7, 5, 6)[: len(layer.kernel_size)])


def column(layer: nn.Module) -> bool:
    """Whether the matrix has a column for a bias."""
    has_bias = getattr(layer, "bias", None) is not None
    return has_bias and not isinstance(layer, TRANSPOSED)


def single_gradients(layer: nn.Module, x: Tensor, grad: Tensor) -> list[list[Tensor]]:
    """Return the gradients of all parameters that every example has."""
    found = []
    for one, s in zip(x.split(1), grad.split(1), strict=True):
        found.append(list(torch.autograd.grad(layer(one), list(layer.parameters()), s)))
    return found


def single_matrices(layer: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    return [
        to_matrix(layer, gradients[0], gradients[1] if column(layer) else None)
        for gradients in single_gradients(layer, x, grad)
    ]


def products(rows: Rows) -> list[Tensor]:
    """Return the sum over rows of s x^T, of every example."""
    inputs, outputs = (x.unflatten(1, (rows.count, -1)) for x in (rows.inputs, rows.outputs))
    return list(torch.einsum("gnti,gnto->ngoi", inputs, outputs))


def agree(layer: nn.Module, x: Tensor, grad: Tensor) -> None:
    (rows,) = layer_rows(layer, x, grad, has_bias=column(layer))
    groups, output, given = matrix_shape(layer)
    assert rows.inputs.shape[::2] == (groups, given + column(layer))
    assert rows.outputs.shape[::2] == (groups, output)
    assert (rows.first, rows.count) == (0, len(x))
    if column(layer):
        assert (rows.inputs[..., -1] == 1).all()
    for found, expected in zip(products(rows), single_matrices(layer, x, grad), strict=True):
        torch.testing.assert_close(found, expected, **EXACT)


@pytest.fixture(autouse=True)
def double() -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# Rows against gradients of single examples


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 4), (3, 5, 4), (2, 3, 2, 4)])
def test_linear(shape: tuple[int, ...], bias: bool) -> None:
    layer = nn.Linear(4, 6, bias=bias)
    agree(layer, draw(*shape), draw(*shape[:-1], 6, seed=1))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize(
    ("kind", "options"), CONVOLUTIONS, ids=[f"{k.__name__}-{o}" for k, o in CONVOLUTIONS]
)
def test_convolutions(kind: type[Any], options: dict[str, Any]) -> None:
    layer = conv(kind, options)
    x = image(layer)
    grad = draw(*layer(x).shape, seed=1)
    agree(layer, x, grad)
    # Channels last in memory, as a layer may well give and get them.
    agree(layer, x.movedim(1, -1).contiguous().movedim(-1, 1), grad)


def test_transposed_convolution_of_a_chosen_size() -> None:
    layer = nn.ConvTranspose2d(4, 8, 3, stride=3)
    x = image(layer)
    size = [20 + 3, 14 + 3]
    grad = draw(*layer(x, output_size=size).shape, seed=1)
    (rows,) = layer_rows(layer, x, grad, has_bias=False)
    weight = torch.autograd.grad(layer(x, output_size=size), layer.weight, grad)[0]
    found, _ = from_matrix(layer, torch.stack(products(rows)).sum(0), has_bias=False)
    torch.testing.assert_close(found, weight, **EXACT)


@pytest.mark.parametrize(
    "options",
    [{}, {"padding_idx": 1}, {"sparse": True, "padding_idx": -1}, {"max_norm": 0.5}],
    ids=str,
)
@pytest.mark.parametrize("shape", [(3,), (3, 4), (3, 2, 2)])
def test_embedding(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    layer = nn.Embedding(5, 3, **options)
    x = torch.arange(12)[: torch.Size(shape).numel()].reshape(shape) * 3 % 5
    grad = draw(*shape, 3, seed=1)
    (rows,) = layer_rows(layer, x, grad, has_bias=False)
    assert torch.equal(rows.inputs, x.view(1, -1))
    one_hot = nn.functional.one_hot(rows.inputs, 5).to(grad.dtype)
    found = products(rows._replace(inputs=one_hot))
    for one, expected in zip(found, single_matrices(layer, x, grad), strict=True):
        torch.testing.assert_close(one, expected, **EXACT)
    weights = draw(3, seed=2).abs()
    kept = one_hot if layer.padding_idx is None else one_hot.clone()
    if layer.padding_idx is not None:
        kept[..., layer.padding_idx] = 0.0
    per_row = weights.repeat_interleave(x[0].numel())
    expected = torch.einsum("gri,r->gi", kept, per_row)
    torch.testing.assert_close(embedding_counts(layer, x, weights), expected, **EXACT)
    found = embedding_counts(layer, x, per_row.view(shape))
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize(
    ("make", "given"),
    [
        (lambda: nn.Linear(4, 3), lambda: draw(4)),
        (lambda: nn.Conv1d(4, 2, 3), lambda: draw(4, 6)),
        (lambda: nn.Conv2d(4, 2, 3, groups=2, padding=1), lambda: draw(4, 6, 5)),
        (lambda: nn.ConvTranspose1d(4, 2, 3, stride=2), lambda: draw(4, 6)),
        (lambda: nn.Embedding(4, 2), lambda: torch.tensor(3)),
    ],
    ids=["linear", "conv1d", "conv2d", "transposed", "embedding"],
)
@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
def test_an_input_without_axis_of_examples_is_one_example(
    make: Make, given: Callable[[], Tensor], kfac_approx: KfacApprox
) -> None:
    layer, x = make(), given()
    grad = draw(*layer(x).shape, seed=1)
    options: dict[str, Any] = {"has_bias": column(layer), "kfac_approx": kfac_approx}
    (one,) = layer_rows(layer, x, grad, **options)
    (many,) = layer_rows(layer, x[None], grad[None], **options)
    assert one.count == many.count == 1
    assert torch.equal(one.inputs, many.inputs)
    assert torch.equal(one.outputs, many.outputs)
    if isinstance(layer, nn.Embedding):
        assert embedding_counts(layer, x, torch.tensor([0.5])).tolist() == [[0, 0, 0, 0.5]]


# Reduced rows


REDUCED: list[tuple[str, Make, tuple[int, ...]]] = [
    ("linear", lambda: nn.Linear(4, 6), (3, 2, 5, 4)),
    ("linear-flat", lambda: nn.Linear(4, 6, bias=False), (3, 4)),
    ("conv2d", lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (3, 4, 6, 5)),
    ("conv1d", lambda: nn.Conv1d(4, 6, 3, bias=False), (3, 4, 6)),
    ("transposed", lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (3, 4, 3, 5)),
]


@pytest.mark.parametrize(("make", "shape"), [r[1:] for r in REDUCED], ids=[r[0] for r in REDUCED])
def test_reduced_rows_are_mean_inputs_and_summed_gradients(
    make: Make, shape: tuple[int, ...]
) -> None:
    layer, x = make(), draw(*shape)
    grad = draw(*layer(x).shape, seed=1)
    (expanded,) = layer_rows(layer, x, grad, has_bias=column(layer))
    (reduced,) = layer_rows(layer, x, grad, has_bias=column(layer), kfac_approx="reduce")
    inputs = expanded.inputs.unflatten(1, (3, -1)).mean(2)
    torch.testing.assert_close(reduced.inputs, inputs, **EXACT)
    outputs = expanded.outputs.unflatten(1, (3, -1)).sum(2)
    torch.testing.assert_close(reduced.outputs, outputs, **EXACT)


@pytest.mark.parametrize("same", ["inputs", "gradients"])
def test_reduced_rows_are_exact_where_positions_are_the_same(same: str) -> None:
    layer = nn.Linear(4, 6)
    x = draw(3, 1 if same == "inputs" else 5, 4).expand(3, 5, 4)
    grad = draw(3, 1 if same == "gradients" else 5, 6, seed=1).expand(3, 5, 6)
    (rows,) = layer_rows(layer, x, grad, has_bias=True, kfac_approx="reduce")
    for found, expected in zip(products(rows), single_matrices(layer, x, grad), strict=True):
        torch.testing.assert_close(found, expected, **EXACT)


# Chunks


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
def test_chunks_are_the_rows_of_one_piece(kind: type[Any], kfac_approx: KfacApprox) -> None:
    layer = kind(4, 8, 3, groups=2, padding=1)
    x = image(layer, 5)
    grad = draw(*layer(x).shape, seed=1)
    options: dict[str, Any] = {"has_bias": column(layer), "kfac_approx": kfac_approx}
    (whole,) = layer_rows(layer, x, grad, **options)
    per_example = 7 * 5 * 2 * (36 if kind is nn.ConvTranspose2d else 19)
    for entries, counts in (
        (5 * per_example, [5]),
        (5 * per_example - 1, [4, 1]),
        (2 * per_example, [2, 2, 1]),
        (1, [1] * 5),
    ):
        chunks = list(layer_rows(layer, x, grad, **options, max_entries=entries))
        assert [rows.count for rows in chunks] == counts
        assert [rows.first for rows in chunks] == [sum(counts[:i]) for i in range(len(counts))]
        inputs = torch.cat([rows.inputs for rows in chunks], dim=1)
        outputs = torch.cat([rows.outputs for rows in chunks], dim=1)
        torch.testing.assert_close(inputs, whole.inputs, **EXACT)
        torch.testing.assert_close(outputs, whole.outputs, **EXACT)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Linear(4, 3), (0, 4)),
        (lambda: nn.Linear(4, 3), (0, 2, 4)),
        (lambda: nn.Conv2d(4, 8, 3, groups=2), (0, 4, 5, 5)),
        (lambda: nn.ConvTranspose1d(4, 8, 3), (0, 4, 5)),
    ],
)
def test_an_empty_batch_has_no_rows(make: Make, shape: tuple[int, ...]) -> None:
    layer, x = make(), draw(*shape)
    grad = torch.zeros_like(layer(x)).detach()
    (rows,) = layer_rows(layer, x, grad, has_bias=column(layer))
    groups, output, given = matrix_shape(layer)
    assert rows.inputs.shape == (groups, 0, given + column(layer))
    assert rows.outputs.shape == (groups, 0, output)
    assert rows.count == 0


# Matrices


ALL: list[Make] = [
    lambda: nn.Linear(4, 6),
    lambda: nn.Linear(4, 6, bias=False),
    lambda: nn.Embedding(5, 3),
    *(lambda row=row: conv(*row) for row in CONVOLUTIONS),  # type: ignore[misc]
]


@pytest.mark.parametrize("number", range(len(ALL)))
def test_matrices_there_and_back(number: int) -> None:
    layer = ALL[number]()
    assert isinstance(layer, KRONECKER_LAYERS)
    has_bias = column(layer)
    weight, bias = layer.weight.detach(), layer.bias.detach() if has_bias else None
    matrix = to_matrix(layer, weight, bias)
    groups, output, given = matrix_shape(layer)
    assert matrix.shape == (groups, output, given + has_bias)
    one, two = from_matrix(layer, matrix, has_bias=has_bias)
    assert torch.equal(one, weight)
    if bias is None:
        assert two is None
    else:
        assert torch.equal(two, bias)


def test_a_bias_without_a_column_is_refused() -> None:
    layer = nn.ConvTranspose1d(2, 3, 2)
    x = draw(1, 2, 4)
    refused = pytest.raises(ValueError, match=r"ConvTranspose1d has no column .* shift_squares")
    with refused:
        to_matrix(layer, layer.weight, layer.bias)
    with refused:
        from_matrix(layer, draw(1, 6, 3), has_bias=True)
    with refused:
        layer_rows(layer, x, layer(x), has_bias=True)
    with pytest.raises(ValueError, match="Embedding has no column for it"):
        to_matrix(nn.Embedding(2, 3), draw(2, 3), draw(3))


def test_other_arguments_are_refused() -> None:
    layer = nn.Linear(2, 3)
    with pytest.raises(TypeError, match="Invalid layer of type LSTM: must be one of Linear, Conv1"):
        matrix_shape(nn.LSTM(2, 3))
    with pytest.raises(TypeError, match="type Linear: must be one of BatchNorm, LayerNorm"):
        scale_squares(layer, draw(1, 2), draw(1, 3))
    with pytest.raises(TypeError, match="type Linear: must be one of Conv1d"):
        shift_squares(layer, draw(1, 3))
    with pytest.raises(ValueError, match="Invalid kfac_approx='sum': must be one of 'expand'"):
        layer_rows(layer, draw(1, 2), draw(1, 3), has_bias=True, kfac_approx="sum")  # type: ignore
    with pytest.raises(ValueError, match="Invalid max_entries=0"):
        layer_rows(layer, draw(1, 2), draw(1, 3), has_bias=True, max_entries=0)


# Scales and shifts


SCALES: list[tuple[str, Make, tuple[int, ...]]] = [
    ("layernorm", lambda: nn.LayerNorm(4), (3, 4)),
    ("layernorm-tokens", lambda: nn.LayerNorm(4), (3, 5, 4)),
    ("layernorm-image", lambda: nn.LayerNorm((2, 3)), (4, 5, 2, 3)),
    ("layernorm-no-bias", lambda: nn.LayerNorm(4, bias=False), (3, 5, 4)),
    ("groupnorm", lambda: nn.GroupNorm(2, 4), (3, 4, 5, 2)),
    ("groupnorm-flat", lambda: nn.GroupNorm(2, 4), (3, 4)),
    ("instancenorm1d", lambda: nn.InstanceNorm1d(4, affine=True), (3, 4, 5)),
    (
        "instancenorm2d-eval",
        lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True).eval(),
        (3, 4, 2, 5),
    ),
    ("rmsnorm", lambda: nn.RMSNorm(4), (3, 5, 4)),
    ("rmsnorm-image", lambda: nn.RMSNorm((2, 3), eps=0.1), (4, 2, 3)),
    ("batchnorm1d-eval", lambda: nn.BatchNorm1d(4).eval(), (3, 4)),
    ("batchnorm2d-eval", lambda: nn.BatchNorm2d(4).eval(), (3, 4, 5, 2)),
    ("syncbatchnorm-eval", lambda: nn.SyncBatchNorm(4).eval(), (3, 4, 5)),
]


def scale_layer(make: Make) -> nn.Module:
    layer = make()
    assert isinstance(layer, SCALE_LAYERS)
    with torch.no_grad():
        for tensor in [*layer.parameters(), *layer.buffers()]:
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 2.0)
    return layer


@pytest.mark.parametrize(("make", "shape"), [r[1:] for r in SCALES], ids=[r[0] for r in SCALES])
def test_squares_of_scales_and_shifts(make: Make, shape: tuple[int, ...]) -> None:
    layer, x, grad = scale_layer(make), 2 * draw(*shape) + 1, draw(*shape, seed=1)
    gradients = single_gradients(layer, x, grad)
    found = scale_squares(layer, x, grad)
    for role, squares in zip(range(len(gradients[0])), found, strict=False):
        expected = sum(one[role].square().flatten() for one in gradients)
        torch.testing.assert_close(squares, expected, **EXACT)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.BatchNorm1d(4), (5, 4)),
        (lambda: nn.BatchNorm2d(4), (3, 4, 2, 3)),
        (lambda: nn.BatchNorm3d(4, track_running_stats=False).eval(), (2, 4, 2, 2, 3)),
    ],
)
def test_batch_normalization_with_statistics_of_the_batch(
    make: Make, shape: tuple[int, ...]
) -> None:
    layer, x, grad = scale_layer(make), 2 * draw(*shape) + 1, draw(*shape, seed=1)
    buffers = [b.clone() for b in layer.buffers()]
    scale, shift = scale_squares(layer, x, grad)
    for before, after in zip(buffers, layer.buffers(), strict=True):
        assert torch.equal(before, after)
    # The examples share the statistics, so they are told apart by their output gradients.
    expected_scale, expected_shift = torch.zeros(4), torch.zeros(4)
    for number in range(len(x)):
        own = torch.zeros_like(grad)
        own[number] = grad[number]
        weight, bias = torch.autograd.grad(layer(x), list(layer.parameters()), own)
        expected_scale += weight.square()
        expected_shift += bias.square()
    torch.testing.assert_close(scale, expected_scale, **EXACT)
    torch.testing.assert_close(shift, expected_shift, **EXACT)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.LayerNorm((4, 3)), (4, 3)),
        (lambda: nn.RMSNorm(4), (4,)),
        (lambda: nn.InstanceNorm1d(4, affine=True), (4, 5)),
        (lambda: nn.InstanceNorm3d(4, affine=True), (4, 2, 3, 2)),
    ],
)
def test_scales_of_an_input_without_axis_of_examples(make: Make, shape: tuple[int, ...]) -> None:
    layer, x, grad = scale_layer(make), draw(*shape), draw(*shape, seed=1)
    gradients = torch.autograd.grad(layer(x), list(layer.parameters()), grad)
    for squares, one in zip(scale_squares(layer, x, grad), gradients, strict=False):
        torch.testing.assert_close(squares, one.square().flatten(), **EXACT)


def test_a_layer_without_scale_and_an_empty_batch() -> None:
    layer = nn.LayerNorm(4, elementwise_affine=False)
    assert scale_squares(layer, draw(3, 4), draw(3, 4))[0] is None
    scale, shift = scale_squares(nn.LayerNorm(4), draw(0, 2, 4), draw(0, 2, 4))
    assert scale is not None
    assert scale.tolist() == shift.tolist() == [0.0] * 4


@pytest.mark.parametrize("batched", [True, False])
def test_bias_of_a_transposed_convolution(batched: bool) -> None:
    layer = nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2)
    x = image(layer)
    grad = draw(*layer(x).shape, seed=1)
    if not batched:
        x, grad = x[:1], grad[:1]
    expected = sum(one[1].square() for one in single_gradients(layer, x, grad))
    found = shift_squares(layer, grad if batched else grad[0])
    torch.testing.assert_close(found, expected, **EXACT)


# Precision


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_becomes_float32(half: torch.dtype) -> None:
    x, grad = draw(3, 4).to(half), draw(3, 6).to(half)
    (rows,) = layer_rows(nn.Linear(4, 6), x, grad, has_bias=True)
    assert rows.inputs.dtype == rows.outputs.dtype == torch.float32
    assert torch.equal(rows.inputs[0, :, :4], x.float())
    squares = scale_squares(nn.LayerNorm(4), x, draw(3, 4).to(half))
    assert [s.dtype for s in squares if s is not None] == [torch.float32] * 2
    counts = embedding_counts(nn.Embedding(4, 2), torch.tensor([1]), torch.ones(1, dtype=half))
    assert counts.dtype == torch.float32


def test_rows_have_no_graph() -> None:
    for layer in (nn.Linear(4, 6), nn.Conv1d(4, 6, 2), nn.ConvTranspose1d(4, 6, 2)):
        x = draw(3, 4, 4).requires_grad_()
        output = layer(x)
        (rows,) = layer_rows(layer, x, output, has_bias=column(layer))
        assert not rows.inputs.requires_grad
        assert not rows.outputs.requires_grad
