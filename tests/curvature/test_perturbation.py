"""Tests of lightning_curvature/curvature/perturbation.py."""

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_curvature.curvature import perturbation
from lightning_curvature.curvature.noise import SingleStreamNoise
from lightning_curvature.curvature.perturbation import Directions, Piece, direction_seed

SHAPES = ((3, 4), (5,), (), (2, 3, 2, 2), (40, 50), (0, 3), (7, 1), (1, 2000))
DISTRIBUTIONS = ("normal", "rademacher", "sphere")


def parameters(shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: Any = None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def noise(
    params: Sequence[Tensor],
    indices: Sequence[int] | None = None,
    step: int = 4,
    sample: int = 0,
    positions: Sequence[int] | None = None,
    **options: Any,
) -> dict[int, Tensor]:
    """Collect a direction from its pieces: index of the parameter -> noise."""
    indices = list(range(len(params)) if indices is None else indices)
    directions = Directions(params, indices, seed=options.pop("seed", 11), **options)
    found: dict[int, Tensor] = {}
    for piece in directions.sweep(step, sample, positions):
        assert len(piece.positions) == len(piece.values) == len(piece.noise)
        for position in piece.positions:
            shape = directions.shape(position)
            dtype = piece.noise[0].dtype
            found.setdefault(indices[position], torch.full(shape, torch.nan, dtype=dtype))
        outs = piece.of([found[indices[position]] for position in piece.positions])
        for out, part, value in zip(outs, piece.noise, piece.values, strict=True):
            assert out.shape == part.shape == value.shape
            assert out.isnan().all(), "visited twice"
            out.copy_(part)
    assert not any(x.isnan().any() for x in found.values())
    return found


def assert_same(found: dict[int, Tensor], expected: dict[int, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for index, x in found.items():
        assert torch.equal(x, expected[index]), index


@pytest.fixture
def small_chunk(monkeypatch: pytest.MonkeyPatch) -> int:
    """Cut tensors of more than 64 entries."""
    monkeypatch.setattr(perturbation, "_CHUNK", {"cpu": 64})
    return 64


# What a direction depends on


def test_seeds_differ() -> None:
    keys = itertools.product((0, 1, 2**40), (0, 1, 7), (-1, 0, 1), (0, 1, 2))
    seeds = [direction_seed(*key) for key in keys]
    assert len(set(seeds)) == 81
    assert all(0 <= seed < 2**63 for seed in seeds)
    # Checkpoints and logs of answers are of this stream: a change needs a new STREAM_VERSION.
    assert perturbation.STREAM_VERSION == 1
    assert direction_seed(0, 1, 2, 3) == 3_692_720_122_371_258_780


def test_first_numbers_of_the_stream() -> None:
    """The same key gives the same numbers in all versions."""
    (found,) = noise([torch.zeros(4)], [2], step=3, sample=1, seed=5).values()
    generator = torch.Generator().manual_seed(direction_seed(5, 3, 1, 2))
    assert torch.equal(found, torch.randn(4, generator=generator))


@pytest.mark.parametrize("changed", ["seed", "step", "sample", "index"])
def test_every_part_of_the_key_counts(changed: str) -> None:
    p = torch.zeros(100)
    key = {"seed": 1, "step": 2, "sample": 3, "index": 4}
    results = []
    for value in (key[changed], key[changed] + 1):
        k = {**key, changed: value}
        drawn = noise([p], [k["index"]], step=k["step"], sample=k["sample"], seed=k["seed"])
        results.append(drawn[k["index"]])
    correlation = float((results[0] * results[1]).mean())
    assert abs(correlation) < 0.4
    assert not torch.equal(*results)


def test_equal_shapes_get_unrelated_numbers() -> None:
    found = noise([torch.zeros(10_000), torch.zeros(10_000)])
    assert abs(float((found[0] * found[1]).mean())) < 0.05


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_order_groups_and_frozen_parameters_do_not_matter(
    distribution: Any, small_chunk: int
) -> None:
    """What counts is the index of a parameter, not its place nor its company."""
    params = parameters()
    expected = noise(params, distribution=distribution)
    order = list(reversed(range(len(params))))
    assert_same(noise([params[i] for i in order], order, distribution=distribution), expected)
    some = [4, 1, 6]
    found = noise([params[i] for i in some], some, distribution=distribution)
    assert_same(found, {i: expected[i] for i in some})
    found = noise(params, positions=some, distribution=distribution)
    assert_same(found, {i: expected[i] for i in some})


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_foreach_does_not_matter(distribution: Any, small_chunk: int) -> None:
    params = parameters()
    found = noise(params, distribution=distribution, foreach=False)
    assert_same(found, noise(params, distribution=distribution))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_sweeps_repeat(distribution: Any, small_chunk: int) -> None:
    """Also after others, in the same pieces."""
    params = parameters()
    directions = Directions(params, range(len(params)), seed=1, distribution=distribution)

    def look(step: int, sample: int) -> list[Any]:
        return [
            (piece.positions, piece.part, piece.as_vector, [x.clone() for x in piece.noise])
            for piece in directions.sweep(step, sample)
        ]

    first = look(3, 1)
    look(3, 0)
    look(4, 1)
    again = look(3, 1)
    assert [x[:3] for x in first] == [x[:3] for x in again]
    for one, other in zip(first, again, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one[3], other[3], strict=True))


def test_sweeps_side_by_side(small_chunk: int) -> None:
    """Several directions at once, as for an average over them."""
    params = parameters()
    directions = Directions(params, range(len(params)), seed=11)
    expected = [noise(params, sample=sample) for sample in range(3)]
    sweeps = [directions.sweep(4, sample) for sample in range(3)]
    for pieces in zip(*sweeps, strict=True):
        for sample, piece in enumerate(pieces):
            whole = piece.of([expected[sample][position] for position in piece.positions])
            assert all(torch.equal(x, y) for x, y in zip(whole, piece.noise, strict=True))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda x: (
        x.to(memory_format=torch.channels_last) if x.ndim == 4 else x.clone()
    ),
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1) if x.ndim > 1 else x,
    "strided": lambda x: torch.stack([x, x], dim=-1)[..., 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("chunk", [1 << 16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layouts_get_the_same_numbers(
    layout: str, chunk: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints do not keep the layout of a parameter; rows longer than a chunk included."""
    monkeypatch.setattr(perturbation, "_CHUNK", {"cpu": chunk})
    shapes = [*SHAPES, (3, 5, 7, 4), (2, 1003), (2, 515), (1031,), (2, 11, 7, 13)]
    params = parameters(shapes, dtype)
    others = [LAYOUTS[layout](p) for p in params]
    assert any(not p.is_contiguous() for p in others)
    assert_same(noise(others), noise(params))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_are_the_parameters(layout: str, small_chunk: int) -> None:
    """Every entry once, changed in place, whatever the layout."""
    params = [LAYOUTS[layout](p) for p in parameters()]
    before = [p.clone() for p in params]
    directions = Directions(params, range(len(params)), seed=11)
    for piece in directions.sweep(4, 0):
        torch._foreach_add_(piece.values, piece.noise)
    drawn = noise(params)
    for index, (p, x) in enumerate(zip(params, before, strict=True)):
        torch.testing.assert_close(p, x + drawn[index], rtol=0, atol=0)


# Pieces


def test_large_parameters_are_cut(small_chunk: int) -> None:
    shapes = ((30, 10), (1000,), (3, 500), (8, 8), (65, 1))
    params = parameters(shapes)
    directions = Directions(params, range(len(params)), seed=1)
    seen: dict[int, list[Piece]] = {}
    for piece in directions.sweep(0, 0):
        assert sum(x.numel() for x in piece.noise) <= small_chunk
        for position in piece.positions:
            seen.setdefault(position, []).append(piece)
    rows, vector, wide, whole, tall = (seen[i] for i in range(5))
    assert {(p.as_vector, p.values[0].shape[1:]) for p in rows} == {(False, (10,))}
    assert len(rows) == 5
    assert all(p.as_vector and p.values[0].ndim == 1 for p in [*vector, *wide])
    assert (len(vector), len(wide)) == (16, 24)
    assert [p.part for p in whole] == [None]
    assert [len(p.values[0]) for p in tall] == [64, 1]


def test_cut_of_other_tensors(small_chunk: int) -> None:
    """`Piece.of` gives the parts of state tensors that belong to the values."""
    params = parameters(((30, 10), (1000,), (3, 500), (8, 8)))
    states = [p.clone() for p in params]
    directions = Directions(params, range(len(params)), seed=1)
    for piece in directions.sweep(0, 0):
        parts = piece.of([states[position] for position in piece.positions])
        for part, value in zip(parts, piece.values, strict=True):
            assert torch.equal(part, value)
            part.add_(1)
    assert all(torch.equal(s, p + 1) for s, p in zip(states, params, strict=True))


def test_small_parameters_are_together() -> None:
    params = parameters(((3, 4), (5,), (), (2, 2)))
    pieces = list(Directions(params, range(4), seed=1).sweep(0, 0))
    assert [piece.positions for piece in pieces] == [[0, 1, 2, 3]]
    alone = list(Directions(params, range(4), seed=1, foreach=False).sweep(0, 0))
    assert [piece.positions for piece in alone] == [[0], [1], [2], [3]]
    mixed = [params[0], params[1].double(), params[2].double(), params[3]]
    pieces = list(Directions(mixed, range(4), seed=1).sweep(0, 0))
    assert [piece.positions for piece in pieces] == [[0], [1, 2], [3]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_noise_of_half_precision_is_float32(dtype: torch.dtype) -> None:
    """The same numbers in all dtypes but float64."""
    found = noise(parameters(dtype=dtype))
    assert {x.dtype for x in found.values()} == {torch.float32}
    assert_same(found, noise(parameters()))
    assert {x.dtype for x in noise(parameters(dtype=torch.float64)).values()} == {torch.float64}


# Distributions


def moments(x: Tensor) -> list[float]:
    return [float((x.double() ** k).mean()) for k in (1, 2, 4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_normal(dtype: torch.dtype) -> None:
    (x,) = noise([torch.zeros(200_000, dtype=dtype)]).values()
    assert moments(x) == pytest.approx([0, 1, 3], abs=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rademacher(dtype: torch.dtype) -> None:
    (x,) = noise([torch.zeros(200_000, dtype=dtype)], distribution="rademacher").values()
    assert set(x.unique().tolist()) == {-1.0, 1.0}
    assert float(x.mean()) == pytest.approx(0, abs=0.01)
    # Signs next to each other, and those at the same place of two samples, are independent.
    assert float((x[1:] * x[:-1]).mean()) == pytest.approx(0, abs=0.01)


def test_sphere(small_chunk: int) -> None:
    """Normal numbers, all parameters together of the norm sqrt(d)."""
    params = parameters()
    count = sum(p.numel() for p in params)
    for sample in range(3):
        found = noise(params, sample=sample, distribution="sphere")
        x = torch.cat([v.reshape(-1) for v in found.values()]).double()
        assert float(x.norm()) == pytest.approx(count**0.5, rel=1e-5)
        plain = noise(params, sample=sample)
        factors = [found[i] / plain[i] for i in found if found[i].numel()]
        spread = torch.cat([f.reshape(-1) for f in factors])
        torch.testing.assert_close(spread, spread[:1].expand_as(spread), rtol=1e-5, atol=0)
    some = noise(params, positions=[0, 4], distribution="sphere", sample=2)
    assert_same(some, {i: found[i] for i in (0, 4)})


def test_sphere_does_not_depend_on_the_order() -> None:
    params = parameters()
    order = list(reversed(range(len(params))))
    found = noise([params[i] for i in order], order, distribution="sphere")
    for index, x in noise(params, distribution="sphere").items():
        torch.testing.assert_close(found[index], x, rtol=1e-6, atol=0)


def test_samples_are_independent() -> None:
    p = torch.zeros(50)
    draws = torch.stack([noise([p], step=s, sample=k)[0] for s in range(60) for k in range(10)])
    covariance = draws.T @ draws / len(draws)
    # Entries of the sample covariance deviate by 1/sqrt(600) and, on the diagonal, sqrt(2/600).
    assert float((covariance - torch.eye(50)).abs().max()) < 0.25
    assert float((covariance - torch.eye(50)).square().mean()) == pytest.approx(1 / 600, rel=0.15)


# Masks


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_masks(distribution: Any, small_chunk: int) -> None:
    """Only the entries named are visited, copied back when the piece is left."""
    params = [LAYOUTS["transposed"](p) for p in parameters()]
    mask = torch.tensor([0, 7, 1999, 44])
    before = [p.clone() for p in params]
    masks = {4: mask, 0: torch.tensor([11])}
    directions = Directions(
        params, range(len(params)), seed=11, distribution=distribution, masks=masks
    )
    assert directions.size == sum(p.numel() for p in params) - 2000 - 12 + 5
    assert directions.shape(4) == (4,)
    assert directions.shape(1) == (5,)
    moved: dict[int, Tensor] = {}
    for piece in directions.sweep(4, 0):
        for position, value, x in zip(piece.positions, piece.values, piece.noise, strict=True):
            value.add_(x)
            if position in masks:
                assert piece.positions == [position]
                moved[position] = x.clone()
    for position, positions in masks.items():
        expected = before[position].clone().reshape(-1)
        expected[positions] += moved[position]
        assert torch.equal(params[position].reshape(-1), expected)
    if distribution == "sphere":
        found = noise(params, masks=masks, distribution=distribution)
        norm = torch.cat([x.reshape(-1) for x in found.values()]).norm()
        assert float(norm) == pytest.approx(directions.size**0.5, rel=1e-5)


def test_masked_values_without_writing(small_chunk: int) -> None:
    params = parameters()
    before = params[4].clone()
    directions = Directions(params, range(len(params)), seed=1, masks={4: torch.tensor([3, 5])})
    for piece in directions.sweep(0, 0, [4], write=False):
        piece.values[0].add_(1)
    assert torch.equal(params[4], before)


def test_masks_leave_other_parameters_alone() -> None:
    params = parameters()
    found = noise(params, masks={4: torch.tensor([3, 5])})
    expected = noise(params)
    assert_same(
        {i: x for i, x in found.items() if i != 4}, {i: expected[i] for i in found if i != 4}
    )


# Sources


@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize("mask", [None, torch.tensor([1, 66, 5])])
def test_source(foreach: bool | None, mask: Tensor | None, small_chunk: int) -> None:
    """Its noise is that of the whole parameter, whatever the pieces are."""
    params = [LAYOUTS["transposed"](p) for p in parameters(((30, 10), (1000,), (3, 500), (8, 8)))]
    asked = []

    def source(step: int, sample: int, index: int, param: Tensor) -> Tensor:
        asked.append((step, sample, index))
        assert param is params[index - 5]
        return torch.arange(param.numel(), dtype=torch.float64).view(param.shape) + index

    found = noise(
        params,
        [5, 6, 7, 8],
        source=source,
        foreach=foreach,
        masks={} if mask is None else {2: mask},
        sample=2,
    )
    assert sorted(asked) == [(4, 2, 5), (4, 2, 6), (4, 2, 7), (4, 2, 8)]
    for index, x in found.items():
        whole = torch.arange(params[index - 5].numel(), dtype=torch.float32) + index
        expected = whole[mask] if mask is not None and index == 7 else whole.view(x.shape)
        assert torch.equal(x, expected)
        assert x.dtype == torch.float32


def test_single_stream_noise() -> None:
    """One generator per direction; parameters may be asked for in any order."""
    params = parameters(((3, 4), (5,), (20, 3)), torch.float64)
    source = SingleStreamNoise([[5, 6], [7, 8]], params)
    generator = torch.Generator().manual_seed(6)
    expected = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in params]
    for order in ((0, 1, 2), (2, 1, 0), (1,), (1, 1), (2, 0)):
        for i in order:
            source(0, 0, i, params[i])
            assert torch.equal(source(0, 1, i, params[i]), expected[i])
    found = noise(params, step=0, sample=1, source=source)
    assert all(torch.equal(found[i], x) for i, x in enumerate(expected))


def test_single_stream_noise_of_blocks() -> None:
    """Every block starts the stream anew: equal blocks get equal numbers."""
    params = parameters(((3, 4), (5,), (3, 4), (5,)))
    source = SingleStreamNoise([9], params, block_sizes=[2, 2])
    drawn = [source(0, 0, i, p) for i, p in enumerate(params)]
    assert torch.equal(drawn[0], drawn[2])
    assert torch.equal(drawn[1], drawn[3])
    plain = SingleStreamNoise([9], params)
    assert torch.equal(plain(0, 0, 0, params[0]), drawn[0])
    assert not torch.equal(plain(0, 0, 2, params[2]), drawn[2])


def test_single_stream_noise_refuses() -> None:
    params = parameters(((3, 4), (5,)))
    source = SingleStreamNoise([9], params)
    with pytest.raises(ValueError, match="no seed of step 1: 1 were given"):
        source(1, 0, 0, params[0])
    with pytest.raises(ValueError, match="no seed of direction 1 of step 0: 1 were given"):
        source(0, 1, 0, params[0])
    with pytest.raises(ValueError, match=r"shape \[3, 4\] is not one of those"):
        source(0, 0, 0, params[0].clone())
    for sizes in ([1], [2, 0], [3, -1]):
        with pytest.raises(ValueError, match=r"Invalid block_sizes=\["):
            SingleStreamNoise([9], params, block_sizes=sizes)


# Global generators


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_global_generators_are_left_alone(distribution: Any) -> None:
    params = parameters()
    torch.manual_seed(1)
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())  # noqa: NPY002
    first = noise(params, distribution=distribution)
    now = torch.get_rng_state(), random.getstate(), str(np.random.get_state())  # noqa: NPY002
    assert torch.equal(states[0], now[0])
    assert states[1:] == now[1:]
    torch.manual_seed(2)
    assert_same(noise(params, distribution=distribution), first)
