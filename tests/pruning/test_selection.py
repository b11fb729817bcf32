"""Tests of lightning_curvature/pruning/selection.py."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from lightning_curvature.pruning.selection import num_dropped, select, smallest


@given(
    total=st.integers(1, 20_000_000),
    fraction=st.floats(0, 1),
    sparsity=st.floats(0, 1, exclude_max=True),
)
def test_number_of_the_official_code(total: int, fraction: float, sparsity: float) -> None:
    """The floor, with the present sparsity rounded to float32; nothing comes back."""
    pruned = int(total * fraction)
    exact = Fraction(sparsity) * total - pruned
    assume(abs(exact - round(exact)) > Fraction(1, 10**13) * total)
    present = np.float32(pruned) / np.float32(total)
    expected = int(total * (sparsity - float(present)))
    assert num_dropped(total, pruned, sparsity) == max(expected, 0)


@given(total=st.integers(1, 20_000_000), data=st.data())
def test_whole_numbers_are_reached(total: int, data: st.DataObject) -> None:
    """Rounding is no reason to leave one over."""
    wanted = data.draw(st.integers(0, total - 1))
    pruned = data.draw(st.integers(0, wanted))
    assert num_dropped(total, pruned, wanted / total) == wanted - pruned


def test_rounding_that_the_official_code_suffers_from() -> None:
    present = float(np.float32(58) / np.float32(144))
    assert int(144 * (0.5 - present)) == 13
    assert num_dropped(144, 58, 0.5) == 14


@pytest.mark.parametrize(
    ("total", "pruned", "sparsity", "expected"),
    [(10, 0, 0.5, 5), (10, 0, 0.59, 5), (10, 5, 0.5, 0), (10, 6, 0.5, 0), (0, 0, 0.5, 0)],
)
def test_number(total: int, pruned: int, sparsity: float, expected: int) -> None:
    assert num_dropped(total, pruned, sparsity) == expected


@given(values=st.lists(st.integers(0, 4), min_size=1, max_size=30), data=st.data())
def test_smallest_with_ties(values: list[int], data: st.DataObject) -> None:
    """As many as asked for, and of equal ones the first."""
    count = data.draw(st.integers(0, len(values)))
    expected = sorted(range(len(values)), key=lambda place: (values[place], place))[:count]
    taken = smallest(torch.tensor(values, dtype=torch.float64), count)
    assert taken.nonzero().view(-1).tolist() == sorted(expected)


@given(
    groups=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 4)), max_size=30),
    budget=st.integers(0, 80),
)
def test_groups_within_a_budget(groups: list[tuple[int, int]], budget: int) -> None:
    """The first groups in the order of scores whose sizes together fit."""
    expected, spent = [], 0
    for place in sorted(range(len(groups)), key=lambda place: (groups[place][0], place)):
        spent += groups[place][1]
        if spent > budget:
            break
        expected.append(place)
    scores = torch.tensor([score for score, _ in groups], dtype=torch.float64)
    sizes = torch.tensor([size for _, size in groups], dtype=torch.int64)
    assert select(scores, sizes, budget).nonzero().view(-1).tolist() == sorted(expected)
