"""Tests of lightning_curvature/curvature/factor_window.py: sums of a step through an oracle."""

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_curvature.curvature.factor_window import WindowSums
from tests.helpers.dense import DenseModel, Head
from tests.helpers.kronecker import block_matrix, places, state_of, sums_of, watched_layers
from tests.helpers.kronecker import window_sums as sums_in

EXACT = {"rtol": 1e-9, "atol": 1e-12}


def draw(*shape: int) -> Tensor:
    """Draw normal numbers."""
    return torch.randn(shape, dtype=torch.float64)


def network() -> nn.Sequential:
    """Build a network with layers of several kinds."""
    layers = [nn.Linear(4, 6), nn.LayerNorm(6), nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 3, 2)]
    return nn.Sequential(*layers, nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(6, 3)).double()


def equal(one: WindowSums, other: WindowSums, *, diagonals: bool = True) -> None:
    """Check that sums are the same."""
    assert one.blocks.keys() == other.blocks.keys()
    for name, sums in one.blocks.items():
        for a, b in zip(sums, other.blocks[name], strict=True):
            torch.testing.assert_close(a, b, **EXACT)
    if diagonals:
        assert one.diagonals.keys() == other.diagonals.keys()
        for number, squares in one.diagonals.items():
            torch.testing.assert_close(squares, other.diagonals[number], **EXACT)


@pytest.mark.parametrize("masked", [False, True])
def test_micro_batches_of_any_size_are_one_batch(masked: bool) -> None:
    model, x, y = network(), draw(8, 4), torch.randint(3, (8,))
    y[0] = -100 if masked else y[0]
    count = float((y >= 0).sum())
    _, whole = sums_of(model, F.cross_entropy, (x, y))
    for sizes in ([4, 4], [2] * 4, [3, 5], [7, 1], [1] * 8):
        parts = zip(x.split(sizes), y.split(sizes), strict=True)
        batches = [(a, b, float((b >= 0).sum()) / count) for a, b in parts]
        equal(sums_of(model, F.cross_entropy, *batches)[1], whole)


def test_factors_are_divided_by_no_number_of_their_own() -> None:
    """One example of a sum, of a mean over one, and twice its weight."""
    model, x, y = network(), draw(1, 4), torch.randint(3, (1,))
    _, one = sums_of(model, F.cross_entropy, (x, y))
    _, twice = sums_of(model, lambda z, y: 2 * F.cross_entropy(z, y), (x, y))
    for name, sums in one.blocks.items():
        torch.testing.assert_close(twice.blocks[name].g_sum, 2 * sums.g_sum)
        torch.testing.assert_close(twice.blocks[name].a_sum, 2 * sums.a_sum)
        torch.testing.assert_close(twice.blocks[name].positions, 2 * sums.positions)


def test_scales_are_diagonals_of_single_examples() -> None:
    model, x, y = network(), draw(5, 4), torch.randint(3, (5,))
    window, found = sums_of(model, F.cross_entropy, (x, y))
    heads = [Head(lambda z: z, lambda z: F.cross_entropy(z, y))]
    diagonal = DenseModel(model).ggn((x,), heads).diag()
    parts = diagonal.split([p.numel() for p in window.params])
    assert found.diagonals.keys() == {2, 3}
    for number, squares in found.diagonals.items():
        assert squares.shape == window.params[number].shape
        torch.testing.assert_close(squares.flatten(), parts[number], **EXACT)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize("kind", ["layer", "batch"])
def test_half_frozen_norms(frozen: str, kind: str) -> None:
    norm = nn.LayerNorm(4) if kind == "layer" else nn.BatchNorm1d(4).eval()
    model = nn.Sequential(norm, nn.Linear(4, 3)).double()
    getattr(norm, frozen).requires_grad_(False)
    x, y = draw(5, 4), torch.randint(3, (5,))
    window, found = sums_of(model, F.cross_entropy, (x, y))
    heads = [Head(lambda z: z, lambda z: F.cross_entropy(z, y))]
    diagonal = DenseModel(model).ggn((x,), heads).diag()
    torch.testing.assert_close(found.diagonals[0], diagonal[:4], **EXACT)
    assert list(found.diagonals) == [0]
    assert set(window.parts.blocks) == {"1"}


def test_bias_of_a_transposed_convolution() -> None:
    model = nn.Sequential(nn.ConvTranspose1d(2, 3, 2), nn.Flatten(), nn.Linear(12, 3)).double()
    x, y = draw(4, 2, 3), torch.randint(3, (4,))
    _, found = sums_of(model, F.cross_entropy, (x, y))
    heads = [Head(lambda z: z, lambda z: F.cross_entropy(z, y))]
    diagonal = DenseModel(model).ggn((x,), heads).diag()
    torch.testing.assert_close(found.diagonals[1], diagonal[12:15], **EXACT)


class Tied(nn.Module):
    """A decoder that shares its weight with the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.mix = nn.Linear(4, 4)
        self.decode = nn.Linear(4, 5)
        self.decode.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        found: Tensor = self.decode(torch.tanh(self.mix(self.embed(x))))
        return found


def test_weights_without_a_block() -> None:
    """The squared gradient of the whole batch, for every root."""
    model, x, y = Tied().double(), torch.tensor([1, 3, 3]), torch.tensor([0, 2, 4])
    window, found = sums_of(model, F.cross_entropy, (x, y), fisher_type="empirical")
    assert {window.parts.names[n] for n in found.diagonals} == {"embed.weight", "decode.bias"}
    assert set(found.blocks) == {"mix"}
    # Gradients of the root sum sqrt(1/N) dl.
    grads = torch.autograd.grad(
        F.cross_entropy(model(x), y, reduction="sum") / 3**0.5, window.params
    )
    for number, squares in found.diagonals.items():
        torch.testing.assert_close(squares, grads[number].square(), **EXACT)


class Functional(nn.Module):
    """Uses the weight of a layer without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.used = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return F.linear(torch.tanh(self.first(x)), self.used.weight, self.used.bias)


def test_layers_that_are_bypassed() -> None:
    model, x, y = Functional().double(), draw(4, 4), torch.randint(3, (4,))
    oracle, window = watched_layers(model, F.cross_entropy)
    assert set(window.parts.blocks) == {"first", "used"}
    found = sums_in(oracle, window, (x, y))
    assert found.bypassed == {"used"}
    assert set(window.parts.blocks) == {"first"}
    assert set(window.parts.fallback) == {2, 3}
    assert window.without == {2}
    again = sums_in(oracle, window, (x, y))
    equal(found, again)
    assert set(found.diagonals) == {2, 3}


@pytest.mark.parametrize("repeats", [1, 3])
def test_layers_used_several_times(repeats: int) -> None:
    """One example: inputs and gradients of all calls add up, A is their mean."""

    class Repeated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Any:
            for _ in range(repeats):
                x = self.layer(x)
            return x

    model, x, y = Repeated().double(), draw(1, 3), torch.randint(3, (1,))
    window, found = sums_of(model, F.cross_entropy, (x, y))
    sums = found.blocks["layer"]
    torch.testing.assert_close(sums.positions, torch.tensor(float(repeats)).double())
    inputs, z = [], x
    for _ in range(repeats):
        inputs.append(torch.cat([z, torch.ones(1, 1).double()], 1))
        z = model.layer(z).detach()
    rows = torch.cat(inputs)
    torch.testing.assert_close(sums.a_sum[0, 0], rows.T @ rows, **EXACT)
    p = z.softmax(1)[0]
    hessian = p.diag() - torch.outer(p, p)
    weight = model.layer.weight.detach()
    total = torch.zeros_like(weight)
    for _ in range(repeats):
        total += hessian
        hessian = weight.T @ hessian @ weight
    torch.testing.assert_close(sums.g_sum[0, 0], total, **EXACT)
    assert list(window.parts.blocks) == ["layer"]


@pytest.mark.parametrize("tied", ["self", "cross"])
def test_attention_of_one_token_is_exact(tied: str) -> None:
    """With one key the layer is linear: values and outputs; queries and keys have no curvature."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sizes = {} if tied == "self" else {"kdim": 3, "vdim": 3}
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **sizes)

        def forward(self, x: Tensor) -> Any:
            other = x if tied == "self" else x[..., :3]
            return self.attention(x, other, other)[0][:, 0]

    model, x, y = Model().double(), draw(1, 1, 4), torch.tensor([1])
    nn.init.normal_(model.attention.in_proj_bias)
    window, found = sums_of(model, F.cross_entropy, (x, y))
    heads = [Head(lambda z: z, lambda z: F.cross_entropy(z, y))]
    ggn = DenseModel(model).ggn((x,), heads)
    assert len(window.parts.blocks) == 4
    for name, info in window.parts.blocks.items():
        place = places(window, info)
        block = block_matrix(info, state_of(found.blocks[name]))
        torch.testing.assert_close(block, ggn[place][:, place], **EXACT)


def test_checkpointing_changes_nothing() -> None:
    model, x, y = network(), draw(5, 4), torch.randint(3, (5,))

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Any:
            return checkpoint(self.inner, x, use_reentrant=False)

    _, plain = sums_of(model, F.cross_entropy, (x, y))
    _, found = sums_of(Checkpointed(), F.cross_entropy, (x, y))
    renamed = {name.removeprefix("inner."): sums for name, sums in found.blocks.items()}
    equal(found._replace(blocks=renamed), plain)


def test_forwards_without_a_loss_are_not_mixed_in() -> None:
    model, x, y = network(), draw(5, 4), torch.randint(3, (5,))
    _, expected = sums_of(model, F.cross_entropy, (x, y))
    oracle, window = watched_layers(model, F.cross_entropy)
    oracle.clear()
    model(draw(3, 4))
    with torch.no_grad():
        model(draw(3, 4))
    equal(sums_in(oracle, window, (x, y)), expected)


def test_gradients_set_to_zero_take_their_batches_along() -> None:
    model, x, y = network(), draw(5, 4), torch.randint(3, (5,))
    _, expected = sums_of(model, F.cross_entropy, (x, y))
    oracle, window = watched_layers(model, F.cross_entropy)
    oracle.clear()
    for a, b in ((draw(2, 4), y[:2]), (x, y)):
        model.zero_grad()
        oracle.zeroed()
        oracle.criterion(model(a), b).backward()
    oracle.select(oracle.params)
    oracle.see_layers()
    equal(window.collect(oracle), expected)


def test_no_graph_is_kept_after_a_step() -> None:
    model, x, y = network(), draw(5, 4), torch.randint(3, (5,))
    oracle, window = watched_layers(model, F.cross_entropy)
    sums_in(oracle, window, (x, y))
    hidden: list[Any] = []
    handle = model[0].register_forward_hook(lambda m, a, z: hidden.append(weakref.ref(z)))
    model(x)  # never sees a loss
    oracle.clear()
    handle.remove()
    gc.collect()
    assert hidden[0]() is None


def test_the_graph_is_gone_after_the_backward() -> None:
    model, x, y = network(), draw(5, 4), torch.randint(3, (5,))
    oracle, window = watched_layers(model, F.cross_entropy)
    output = model(x)
    loss = oracle.criterion(output, y)
    node = weakref.ref(output)
    loss.backward()
    del loss, output
    gc.collect()
    assert node() is None
    assert not window._calls


@pytest.mark.parametrize("fisher_type", ["mc", "curvature-propagation", "type-2", "empirical"])
def test_input_factors_do_not_depend_on_the_roots(fisher_type: str) -> None:
    model, x, y = network(), draw(5, 4), torch.randint(3, (5,))
    _, expected = sums_of(model, F.cross_entropy, (x, y))
    _, found = sums_of(model, F.cross_entropy, (x, y), fisher_type=fisher_type)
    for name, sums in found.blocks.items():
        torch.testing.assert_close(sums.a_sum, expected.blocks[name].a_sum, **EXACT)
        torch.testing.assert_close(sums.positions, expected.blocks[name].positions)
        assert sums.g_sum.any()


def test_an_empty_micro_batch_counts_nothing() -> None:
    model, x, y = network(), draw(5, 4), torch.randint(3, (5,))
    _, expected = sums_of(model, F.cross_entropy, (x, y))
    labels = torch.full((2,), -100)

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y, reduction="sum") / max(1, int((y >= 0).sum()))

    _, found = sums_of(model, loss, (draw(2, 4), labels), (x, y))
    equal(found, expected)
