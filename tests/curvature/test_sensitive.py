"""Tests of lightning_curvature/curvature/sensitive.py."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_curvature.curvature import sensitive
from lightning_curvature.curvature.sensitive import (
    captured_share,
    largest_entries,
    num_chosen,
    random_entries,
)


def chosen_flags(scores: dict[str, Tensor], chosen: dict[str, Tensor]) -> Tensor:
    """Return which entries of all tensors in a row were chosen."""
    flags = {name: torch.zeros(score.numel(), dtype=torch.bool) for name, score in scores.items()}
    for name, positions in chosen.items():
        assert positions.dtype == torch.int64
        assert positions.ndim == 1
        assert torch.equal(positions, positions.unique()), "ascending, without repetition"
        flags[name][positions] = True
    return torch.cat(list(flags.values()))


def some_scores(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "matrix": (40, 30),
        "vector": (17,),
        "kernel": (4, 3, 5, 5),
        "number": (),
        "none": (0,),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


# How many


@pytest.mark.parametrize(
    ("size", "fraction", "expected"),
    [(1000, 0.001, 1), (10, 0.001, 1), (2600, 0.001, 3), (7, 1.0, 7), (7, 0.999, 7), (1, 0.5, 1)],
)
def test_number(size: int, fraction: float, expected: int) -> None:
    assert num_chosen(size, fraction) == expected


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, math.nan])
def test_fraction_out_of_range(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"Invalid fraction=.*must be in \(0, 1\]"):
        largest_entries(some_scores(), fraction)
    with pytest.raises(ValueError, match="fraction"):
        random_entries({"a": 3}, fraction, 0)


def test_nothing_to_choose_from() -> None:
    with pytest.raises(ValueError, match="no entry"):
        largest_entries({"a": torch.empty(0)}, 0.5)


# The largest


@pytest.mark.parametrize("fraction", [1e-9, 0.001, 0.01, 0.3, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("chunk", [7, 1 << 22])
def test_largest_of_all_tensors(
    fraction: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitive, "_CHUNK", chunk)
    scores = some_scores()
    flat = torch.cat([score.flatten() for score in scores.values()]).abs()
    expected = torch.zeros(len(flat), dtype=torch.bool)
    expected[flat.topk(num_chosen(len(flat), fraction)).indices] = True
    chosen = largest_entries(scores, fraction)
    assert list(chosen) == list(scores)
    assert torch.equal(chosen_flags(scores, chosen), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    scores = {name: score.to(dtype) for name, score in some_scores().items()}
    same = {name: score.float() for name, score in scores.items()}
    chosen, expected = largest_entries(scores, 0.1), largest_entries(same, 0.1)
    assert all(torch.equal(chosen[name], expected[name]) for name in scores)


def test_views_are_read_in_their_own_order() -> None:
    scores = torch.arange(12.0).view(3, 4).t()
    assert largest_entries({"a": scores}, 2 / 12)["a"].tolist() == [8, 11]
    assert scores.reshape(-1)[[8, 11]].tolist() == [10, 11]


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, -2.0, 1e-40]), min_size=1, max_size=30), st.data())
def test_first_of_equal_ones(values: list[float], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(values)))
    cut = data.draw(st.integers(0, len(values)))
    scores = {"a": torch.tensor(values[:cut]), "b": torch.tensor(values[cut:])}
    chosen = largest_entries(scores, count / len(values))
    order = sorted(range(len(values)), key=lambda i: (-abs(torch.tensor(values[i])).item(), i))
    flags = chosen_flags(scores, chosen)
    assert flags.nonzero().view(-1).tolist() == sorted(order[:count])


def test_first_of_equal_ones_across_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitive, "_CHUNK", 3)
    chosen = largest_entries({"a": torch.ones(8), "b": torch.ones(8)}, 10 / 16)
    assert chosen["a"].tolist() == list(range(8))
    assert chosen["b"].tolist() == [0, 1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite(bad: float) -> None:
    with pytest.raises(ValueError, match="not all finite"):
        largest_entries({"a": torch.tensor([1.0, bad])}, 0.5)


def test_scores_are_left_alone() -> None:
    scores = {"a": torch.tensor([-3.0, 1.0], requires_grad=True)}
    chosen = largest_entries(scores, 0.5)
    assert scores["a"].tolist() == [-3.0, 1.0]
    assert not chosen["a"].requires_grad


# At random


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.5, 0.51, 0.9, 1.0])
def test_random_number(fraction: float) -> None:
    sizes = {"a": 700, "b": 1, "c": 0, "d": 300}
    chosen = random_entries(sizes, fraction, 3)
    scores = {name: torch.zeros(size) for name, size in sizes.items()}
    assert int(chosen_flags(scores, chosen).sum()) == num_chosen(1001, fraction)


def test_random_is_reproducible_and_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    first = random_entries({"a": 1000}, 0.1, 3)["a"]
    assert torch.equal(first, random_entries({"a": 1000}, 0.1, 3)["a"])
    assert not torch.equal(first, random_entries({"a": 1000}, 0.1, 4)["a"])
    assert not torch.equal(first, random_entries({"a": 1000}, 0.1, 3, 1)["a"])
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("fraction", [0.2, 0.8])
def test_random_is_uniform(fraction: float) -> None:
    runs, size = 2000, 10
    counts = torch.zeros(size)
    for seed in range(runs):
        chosen = random_entries({"a": 4, "b": 6}, fraction, seed)
        counts[chosen["a"]] += 1
        counts[chosen["b"] + 4] += 1
    deviation = math.sqrt(runs * fraction * (1 - fraction))
    assert (counts - runs * fraction).abs().max() < 5 * deviation


# Shares


def test_share() -> None:
    scores = {"a": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b": torch.tensor([10.0])}
    assert captured_share(scores, {"a": torch.tensor([1, 3]), "b": torch.tensor([0])}) == 0.8
    assert captured_share(scores, largest_entries(scores, 1.0)) == 1.0
    assert captured_share({"a": torch.zeros(3)}, {"a": torch.tensor([0])}) == 0.0


def test_share_of_many() -> None:
    scores = {"a": torch.full((300_000,), 0.1)}
    assert captured_share(scores, {"a": torch.arange(100_000)}) == pytest.approx(1 / 3, rel=1e-6)
