"""Tests of lightning_curvature/pruning/patterns.py."""

import pytest
import torch
from torch import nn

from lightning_curvature.pruning.parameters import PrunableParameters
from lightning_curvature.pruning.patterns import Layout, Pattern, layout_of
from tests.pruning.dense import flags, parameters_of, small_net


def layout(module: nn.Module, pattern: str, *gone: int) -> Layout:
    parameters = parameters_of(module)
    parameters.apply(parameters.weights(), ~flags(parameters.total, *gone))
    return layout_of(parameters, Pattern.parse(pattern))


def positions_of_groups(found: Layout) -> list[list[int]]:
    rows: list[list[int]] = found.positions[found.groups()].tolist()
    return rows


def checked(found: Layout, parameters: PrunableParameters) -> Layout:
    """Check what holds for every layout."""
    real = found.positions[found.positions >= 0]
    assert torch.equal(real.sort().values, parameters.survivors()), "each survivor once"
    assert not (found.first % found.size).any(), "aligned"
    assert torch.equal(found.first, found.first.unique()), "ascending"
    assert bool((found.first.diff() >= found.size).all()), "apart"
    offsets = torch.tensor(parameters.offsets())
    for group, layer in zip(found.positions[found.groups()], found.layer, strict=True):
        inside = group[group >= 0]
        assert bool(((inside >= offsets[layer]) & (inside < offsets[layer + 1])).all())
    return found


@pytest.mark.parametrize(
    ("text", "size", "kept", "most"),
    [("unstructured", 1, 0, 1.0), ("2:4", 4, 2, 0.5), ("1:10", 10, 1, 0.9), ("4x2", 8, 0, 1.0)],
)
def test_parse(text: str, size: int, kept: int, most: float) -> None:
    pattern = Pattern.parse(text)
    assert (pattern.size, pattern.num_kept, pattern.max_sparsity) == (size, kept, most)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("2-4", "must be 'unstructured', 'N:M' such as '2:4', or 'RxC'"),
        ("0:4", "must be 'unstructured'"),
        ("4x0", "must be 'unstructured'"),
        ("", "must be 'unstructured'"),
        (None, "must be 'unstructured'"),
        ("4:4", "Invalid pattern='4:4': must keep fewer"),
        ("8:16", "there are 12870 ways to keep 8 of 16 weights.*at most 1000"),
        ("64x32", "at most 1024 weights"),
    ],
)
def test_parse_refuses(text: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Pattern.parse(text)


# Groups against loops over indices


def numbered(module: nn.Module) -> torch.Tensor:
    weight = module.get_parameter("weight")
    return torch.arange(weight.numel()).view(weight.shape)


def test_consecutive_inputs_of_a_linear_layer() -> None:
    module = nn.Linear(8, 3)
    index = numbered(module)
    expected = [index[o, i : i + 4].tolist() for o in range(3) for i in (0, 4)]
    assert positions_of_groups(layout(module, "2:4")) == expected


def test_consecutive_inputs_of_a_convolution() -> None:
    """Each kernel position of each output has its own groups of input channels."""
    module = nn.Conv2d(8, 2, (2, 3))
    index = numbered(module)
    expected = [
        index[o, i : i + 4, y, x].tolist()
        for o in range(2)
        for y in range(2)
        for x in range(3)
        for i in (0, 4)
    ]
    assert positions_of_groups(layout(module, "2:4")) == expected


def test_inputs_of_a_transposed_convolution() -> None:
    """Stored as (inputs, outputs per group): the groups of layers must not be mixed."""
    module = nn.ConvTranspose1d(8, 6, 3, groups=2)
    index = numbered(module)
    expected = [
        [int(index[part * 4 + i, o, x]) for i in range(4)]
        for part in range(2)
        for o in range(3)
        for x in range(3)
    ]
    assert positions_of_groups(layout(module, "2:4")) == expected


def test_blocks_of_a_convolution() -> None:
    module = nn.Conv1d(4, 6, 2)
    index = numbered(module)
    expected = [
        [int(index[o + a, i + b, x]) for a in range(3) for b in range(2)]
        for o in (0, 3)
        for x in range(2)
        for i in (0, 2)
    ]
    assert positions_of_groups(layout(module, "3x2")) == expected


def test_weights_that_fill_no_group_stay_dense() -> None:
    module = nn.Linear(10, 7)
    index = numbered(module)
    for pattern, dense, rows in (("2:4", index[:, 8:], 7), ("3x4", None, 6), ("1x10", None, 7)):
        found = checked(layout(module, pattern), parameters_of(module))
        inside = found.positions[found.groups()].flatten()
        assert found.dense == [70 - len(inside)]
        assert int(inside.max()) < rows * 10
        if dense is not None:
            assert not torch.isin(dense, inside).any()
            assert found.dense == [dense.numel()]


def test_vectors_and_narrow_layers_stay_dense() -> None:
    module = nn.Conv2d(6, 6, 3, groups=6)
    parameters = PrunableParameters([(module, "weight"), (module, "bias")])
    found = checked(layout_of(parameters, Pattern.parse("2:4")), parameters)
    assert len(found.first) == 0
    assert found.dense == [54, 6]


# What has been pruned before


def test_single_weights() -> None:
    model = small_net()
    found = layout(model, "unstructured", 0, 48, 183)
    assert torch.equal(found.positions, parameters_of(model).survivors())
    assert found.layer.tolist() == [0] * 47 + [1] * 71 + [2] * 24 + [3] * 39
    assert found.dense == [0] * 4


def test_decided_groups_are_none() -> None:
    """Of the first row nothing is left to prune in its first group, one weight in the second."""
    module = nn.Linear(8, 2)
    found = checked(layout(module, "2:4", 0, 3, 5), parameters_of(module))
    assert positions_of_groups(found) == [[4, -1, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert found.positions.tolist()[12:] == [1, 2, -1, -1]
    assert found.dense == [0], "decided is not dense"


def test_blocks_with_gaps() -> None:
    module = nn.Linear(2, 4)
    found = checked(layout(module, "2x1", 0, 2, 4), parameters_of(module))
    assert positions_of_groups(found) == [[1, 3], [-1, 6], [5, 7]]


@pytest.mark.parametrize("pattern", ["2:4", "1:3", "2x2", "5x1", "4x4"])
def test_layers_do_not_disturb_each_other(pattern: str) -> None:
    model = small_net()
    generator = torch.Generator().manual_seed(0)
    gone = torch.randperm(184, generator=generator)[:60].tolist()
    checked(layout(model, pattern, *gone), parameters_of(model))


def test_filled() -> None:
    found = layout(nn.Linear(4, 2), "2:4")
    assert found.filled(8) is found
    more = found.filled(11)
    assert more.positions.tolist() == [*range(8), -1, -1, -1]
    assert torch.equal(more.groups(), found.groups())
