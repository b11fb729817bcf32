"""Tests of lightning_curvature/curvature/kronecker_blocks.py: what gets a block."""

import pytest
import torch
from torch import Tensor, nn

from lightning_curvature.curvature.kronecker_blocks import Blocks, Piece, Side, find_blocks
from tests.helpers.dense import Aliased, TiedWeights


def found(module: nn.Module, **options: int) -> Blocks:
    """Cut all trained parameters of a module into blocks."""
    return find_blocks(module, list(module.parameters()), **options)


def names_of(parts: Blocks) -> set[str]:
    """Return the names of the parameters in the fallback."""
    return {parts.names[number] for number in parts.fallback}


def test_every_parameter_is_in_one_place() -> None:
    model = nn.Sequential(
        nn.Embedding(7, 4),
        nn.Linear(4, 4),
        nn.LayerNorm(4),
        nn.Conv2d(4, 6, 3, groups=2),
        nn.ConvTranspose1d(4, 2, 3),
        nn.MultiheadAttention(4, 2),
        nn.GRUCell(4, 3),
        nn.PReLU(),
        nn.BatchNorm2d(6, affine=False),
    )
    parts = found(model)
    assert set(parts.blocks) == {
        *"0134",
        *(f"5.{role}" for role in ("q_proj", "k_proj", "v_proj", "out_proj")),
    }
    assert set(parts.scales) == {"2", "4"}
    names = [name for name, _ in model.named_parameters()]
    assert parts.names == dict(enumerate(names))
    assert names_of(parts) == {n for n in names if n[0] in "67"}
    assert set(parts.fallback.values()) == {"GRUCell", "PReLU"}
    assert parts.blocks["3"].groups == 2
    assert (parts.blocks["3"].output.size, parts.blocks["3"].input.size) == (3, 19)
    assert parts.blocks["4"].bias is None
    assert parts.scales["4"].weight is None
    assert names[parts.scales["4"].bias or -1] == "4.bias"
    assert parts.blocks["0"].input == Side(7, 7)
    # The rows of the joint weight of an attention layer are shared out.
    pieces = [parts.blocks[f"5.{role}"].weight for role in ("q_proj", "k_proj", "v_proj")]
    assert [(p.start, p.stop) for p in pieces] == [(0, 4), (4, 8), (8, 12)]
    assert list(parts.attentions) == ["5"]
    assert set(parts.layers) == set("01234")


def test_attention_with_other_sizes() -> None:
    parts = found(nn.ModuleDict({"a": nn.MultiheadAttention(4, 2, kdim=3, vdim=5, bias=False)}))
    inputs = {name: block.input.size for name, block in parts.blocks.items()}
    assert inputs == {"a.q_proj": 4, "a.k_proj": 3, "a.v_proj": 5, "a.out_proj": 4}
    assert not parts.fallback
    assert all(block.bias is None for block in parts.blocks.values())


def test_frozen_weights_and_biases() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3), nn.LayerNorm(3))
    model[0].weight.requires_grad_(False)
    model[1].bias.requires_grad_(False)
    model[2].requires_grad_(False)
    model[3].weight.requires_grad_(False)
    parts = found(model)
    assert list(parts.blocks) == ["1"]
    assert parts.blocks["1"].bias is None
    assert parts.blocks["1"].input.size == 3
    assert names_of(parts) == {"0.bias"}
    assert parts.scales["3"].weight is None
    assert parts.scales["3"].bias is not None


def test_only_parameters_of_the_optimizer() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    parts = find_blocks(model, [model[1].bias, model[1].weight])
    assert list(parts.blocks) == ["1"]
    assert (parts.blocks["1"].weight, parts.blocks["1"].bias) == (Piece(1), Piece(0))


def test_layers_that_share_a_weight_and_a_bias() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight, model[1].bias = model[0].weight, model[0].bias
    parts = found(model)
    assert parts.blocks["0"].calls == ("0", "1")
    assert parts.blocks["0"].bias is not None
    assert not parts.fallback


def test_layers_that_share_a_bias_only() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].bias = model[0].bias
    parts = found(model)
    assert list(parts.blocks) == ["0", "1"]
    assert all(block.bias is None for block in parts.blocks.values())
    assert names_of(parts) == {"0.bias"}


def test_a_bias_shared_with_something_else() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    model[1].bias = model[0].bias
    parts = found(model)
    assert parts.blocks["0"].bias is None
    assert names_of(parts) == {"0.bias", "1.weight"}


def test_unlike_layers_with_one_weight() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5))
    model[1].weight = model[0].weight
    parts = found(model)
    assert not parts.blocks
    assert names_of(parts) == {"0.weight", "1.bias"}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"stride": 2}),
        ({}, {"padding": 1}),
        ({}, {"dilation": 2}),
        ({"padding": 1}, {"padding": 1, "padding_mode": "circular"}),
    ],
)
def test_convolutions_of_other_geometry_with_one_weight(
    one: dict[str, object], other: dict[str, object]
) -> None:
    """Rows are made as the first layer does: the others have to do the same."""
    model = nn.Sequential(
        nn.Conv1d(2, 2, 3, bias=False, **one),  # type: ignore[arg-type]
        nn.Conv1d(2, 2, 3, bias=False, **other),  # type: ignore[arg-type]
    )
    model[1].weight = model[0].weight
    assert not found(model).blocks
    model[1] = nn.Conv1d(2, 2, 3, bias=False, **one)  # type: ignore[arg-type]
    model[1].weight = model[0].weight
    assert found(model).blocks["0"].calls == ("0", "1")


def test_embeddings_of_other_padding_with_one_weight() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Embedding(5, 3, padding_idx=0))
    model[1].weight = model[0].weight
    assert not found(model).blocks


def test_layers_used_several_times_and_under_several_names() -> None:
    parts = found(Aliased())
    assert set(parts.blocks) == {"layers.0", "layers.1"}
    assert not parts.fallback


def test_a_weight_used_with_and_without_bias() -> None:
    parts = found(TiedWeights())
    assert names_of(parts) >= {"first.weight"} or "first" in parts.blocks
    assert "out" in parts.blocks


def test_parametrized_weights_have_no_block() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
    parts = found(model)
    assert not parts.blocks
    assert len(parts.fallback) == 3


@pytest.mark.parametrize("limit", range(1, 30))
def test_sides(limit: int) -> None:
    for size in range(1, 70):
        model = nn.Linear(size, 1, bias=False)
        side = found(model, max_factor_dim=limit).blocks[""].input
        assert side.size == size
        assert side.width <= limit
        assert side.filled >= size
        assert side.filled - size < side.width
        if size <= limit:
            assert side.kind == "dense"
        elif size > 8 * limit:
            assert side.kind == "diagonal"
        if side.kind == "blocked":
            assert 2 <= side.cuts <= 8
        if side.kind == "diagonal":
            assert side.cuts == size


def test_pieces() -> None:
    x = torch.arange(12.0).view(6, 2)
    assert Piece(0).of(x) is x
    part: Tensor = Piece(0, 2, 4).of(x)
    assert torch.equal(part, x[2:4])
    assert part.data_ptr() == x[2:].data_ptr()
