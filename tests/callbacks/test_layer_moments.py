"""Tests of lightning_curvature/callbacks/layer_moments.py: numbers against direct computation."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_curvature.callbacks.layer_moments import (
    SIDES,
    STATISTICS,
    LayerMoments,
    effective_rank,
)

HEADER = torch.zeros(1, dtype=torch.float64)

# Layer, shape of what goes in, and the axes of examples and positions of input and output.
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 3), (6, 4)),
    "linear at positions": (lambda: nn.Linear(4, 3), (2, 3, 4)),
    "linear, one example": (lambda: nn.Linear(4, 3), (4,)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, groups=2), (3, 4, 7)),
    "conv2d": (lambda: nn.Conv2d(2, 3, 3, stride=2), (4, 2, 6, 5)),
    "conv2d, one example": (lambda: nn.Conv2d(2, 3, 3), (2, 6, 5)),
    "batch norm": (lambda: nn.BatchNorm2d(3), (4, 3, 2, 5)),
    "layer norm": (lambda: nn.LayerNorm((3, 4)), (5, 2, 3, 4)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (5, 4, 3)),
}


def rows_of(layer: nn.Module, x: Tensor) -> Tensor:
    """Return the rows as a matrix, by a way of its own."""
    if isinstance(layer, nn.LayerNorm):
        return torch.stack([part.flatten() for part in x.flatten(0, 1)])
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    if isinstance(layer, (nn.Conv1d, nn.Conv2d)) and x.dim() < len(layer.kernel_size) + 2:
        x = x[None]
    return torch.cat([example.flatten(1).T for example in x])


def expected(rows: Tensor) -> dict[str, float]:
    """Return all statistics of a matrix of rows."""
    second = rows.T @ rows / len(rows)
    eigenvalues = torch.linalg.eigvalsh(second)
    dead = [bool((column == 0).all()) for column in rows.T]
    values = {
        "mean": rows.mean(),
        "std": ((rows - rows.mean()) ** 2).mean().sqrt(),
        "sparsity": (rows == 0).double().mean(),
        "dead_fraction": torch.tensor(dead).double().mean(),
        "norm": second.trace().sqrt(),
        "effective_rank": eigenvalues.sum() ** 2 / (eigenvalues**2).sum(),
    }
    assert tuple(values) == STATISTICS
    return {name: float(value) for name, value in values.items()}


def draw(shape: tuple[int, ...]) -> Tensor:
    """Draw rectified values in float64."""
    return torch.randn(shape, dtype=torch.float64).relu() + 1.0 * (torch.rand(shape) < 0.1)


def assert_statistics(
    found: dict[str, dict[str, float]], name: str, layer: nn.Module, calls: list[tuple[Tensor, ...]]
) -> None:
    for side, tensors in zip(SIDES, zip(*calls, strict=True), strict=True):
        rows = torch.cat([rows_of(layer, x) for x in tensors])
        for statistic, value in expected(rows).items():
            got = found[f"{side}_{statistic}"][name]
            assert got == pytest.approx(value, rel=1e-12, abs=1e-14), (side, statistic)


@pytest.mark.parametrize("case", LAYERS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_numbers(case: str, channels_last: bool) -> None:
    make, shape = LAYERS[case]
    layer = make().double()
    calls = []
    moments = LayerMoments({"x": layer}, max_rows=1000, micro_batches=3)
    for _ in range(3):
        given = draw(shape)
        if channels_last and given.dim() == 4:
            given = given.contiguous(memory_format=torch.channels_last)
        grad = draw(tuple(layer(given).shape))
        moments.add("x", given, 4.0 * grad, 0.25)
        calls.append((given, grad))
    found = moments.statistics(moments.packed(HEADER)[None])
    assert_statistics(found, "x", layer, calls)


def test_ranks_are_exact_together() -> None:
    """Three ranks with different numbers of rows, one of them with none of the second layer."""
    layers = {"a": nn.Linear(4, 3).double(), "b": nn.Linear(3, 5).double()}
    calls: dict[str, list[tuple[Tensor, ...]]] = {"a": [], "b": []}
    packed = []
    for rank, count in enumerate((2, 7, 4)):
        moments = LayerMoments(layers, max_rows=8)
        for name, layer in layers.items():
            if (rank, name) != (1, "b"):
                given = 10.0 * rank + draw((count, layer.in_features))
                call = (given, draw((count, layer.out_features)))
                moments.add(name, *call, 1.0)
                calls[name].append(call)
        packed.append(moments.packed(HEADER))
    assert len({x.numel() for x in packed}) == 1
    found = LayerMoments(layers, max_rows=8).statistics(torch.stack(packed))
    for name, layer in layers.items():
        assert_statistics(found, name, layer, calls[name])


def test_dead_on_one_rank_only_is_not_dead() -> None:
    layer = nn.Linear(2, 2).double()
    packed = []
    for rank in range(2):
        moments = LayerMoments({"x": layer}, max_rows=4)
        x = torch.zeros(3, 2, dtype=torch.float64)
        x[0, rank] = 1.0
        moments.add("x", x, torch.zeros_like(x), 1.0)
        packed.append(moments.packed(HEADER))
    found = LayerMoments({"x": layer}, max_rows=4).statistics(torch.stack(packed))
    assert found["activation_dead_fraction"]["x"] == 0.0
    assert found["activation_sparsity"]["x"] == pytest.approx(10 / 12)
    assert found["output_grad_dead_fraction"]["x"] == 1.0
    assert found["output_grad_effective_rank"]["x"] == 0.0
    assert found["output_grad_norm"]["x"] == 0.0


def test_embedding_has_no_activation() -> None:
    layer = nn.Embedding(7, 3)
    moments = LayerMoments({"x": layer}, max_rows=9)
    grad = draw((2, 5, 3))
    moments.add("x", torch.randint(7, (2, 5)), grad, 1.0)
    found = moments.statistics(moments.packed(HEADER)[None])
    assert found["activation_mean"] == {}
    assert found["output_grad_mean"]["x"] == pytest.approx(float(grad.mean()))


def test_silent_layers_and_empty_batches_are_left_out() -> None:
    layers = {"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}
    moments = LayerMoments(layers, max_rows=4)
    moments.add("b", torch.zeros(0, 2), torch.zeros(0, 2), 1.0)
    found = moments.statistics(moments.packed(torch.zeros(1))[None])
    assert all(values == {} for values in found.values())


def test_half_precision_is_summed_in_single() -> None:
    layer = nn.Linear(256, 256)
    x = (100 + torch.rand(512, 256)).half()
    grad = (1e-3 * torch.randn(512, 256)).half()
    moments = LayerMoments({"x": layer}, max_rows=4)
    moments.add("x", x, grad, 1.0)
    found = moments.statistics(moments.packed(torch.zeros(1))[None])
    assert found["activation_std"]["x"] == pytest.approx(float(x.double().std()), rel=1e-3)
    assert found["output_grad_std"]["x"] == pytest.approx(float(grad.double().std()), rel=1e-3)


# Effective rank


@pytest.mark.parametrize("shape", [(3, 50), (50, 3), (7, 7)])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e25])
def test_effective_rank_of_eigenvalues(shape: tuple[int, int], scale: float) -> None:
    rows = torch.randn(shape) * torch.rand(shape[1])
    eigenvalues = torch.linalg.eigvalsh(rows.double().T @ rows.double())
    value = eigenvalues.sum() ** 2 / (eigenvalues**2).sum()
    assert float(effective_rank(scale * rows)) == pytest.approx(float(value), rel=1e-5)


def test_no_matrix_is_larger_than_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    original = Tensor.trace

    def trace(matrix: Tensor) -> Tensor:
        sizes.append(tuple(matrix.shape))
        return original(matrix)

    monkeypatch.setattr(Tensor, "trace", trace)
    effective_rank(torch.randn(4, 3000))
    effective_rank(torch.randn(3000, 4))
    assert sizes == [(4, 4), (4, 4)]


def test_rows_are_limited_and_spread() -> None:
    """Rows are unit vectors of their position: a sample of few positions has a small rank."""
    positions, examples, limit = 8, 128, 64
    layer = nn.Conv1d(positions, 2, 1).double()
    x = torch.eye(positions, dtype=torch.float64).expand(examples, -1, -1)
    moments = LayerMoments({"x": layer}, max_rows=limit)
    moments.add("x", x, draw((examples, 2, positions)), 1.0)
    (part, _) = moments._parts.values()
    assert sum(len(rows) for rows in part.rows) == limit
    found = moments.statistics(moments.packed(HEADER)[None])
    # Not the same position of every example, though their number is a multiple of the limit.
    assert found["activation_effective_rank"]["x"] > 0.8 * positions


def test_micro_batches_share_the_rows() -> None:
    layer = nn.Linear(3, 3).double()
    moments = LayerMoments({"x": layer}, max_rows=8, micro_batches=4)
    for _ in range(9):  # used several times in each
        moments.add("x", draw((5, 3)), draw((5, 3)), 1.0)
    (part, _) = moments._parts.values()
    assert [len(rows) for rows in part.rows] == [2] * 9
    packed = moments.packed(HEADER)
    assert packed.numel() == 2 * (4 + 3 + 8 * 3)
    assert moments.statistics(packed[None])["activation_effective_rank"]["x"] > 1


def test_unknown_layer() -> None:
    with pytest.raises(TypeError, match="does not know the features of Bilinear"):
        LayerMoments({"x": nn.Bilinear(2, 2, 2)}, max_rows=4)
