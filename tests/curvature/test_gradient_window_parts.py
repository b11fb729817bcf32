"""Tests of curvature/gradient_window.py: half precision, shards, states, failures."""

import copy
import io
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_curvature import GradientWindow

ROW_DTYPES = ["auto", "bfloat16", "float16"]
HALF = {"bfloat16": 0.9998, "float16": 0.99999}


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def filled(gradients: Tensor, m: int | None = None, **options: Any) -> GradientWindow:
    """Insert gradients, from the first to the last."""
    m = len(gradients) if m is None else m
    window = GradientWindow(m, gradients.shape[1], **{"dtype": gradients.dtype, **options})
    for gradient in gradients:
        window.insert(gradient)
    return window


def correlated(m: int, d: int) -> Tensor:
    """Return gradients of length about 1 that differ by little."""
    rows = drawn(1, d) + 0.1 * drawn(m, d, seed=1)
    unit: Tensor = rows / rows.norm(dim=1, keepdim=True)
    return unit


def direction(rows: Tensor, damping: float) -> Tensor:
    """Return H^{-1} g of the last row by singular values, none of which is a difference."""
    u, s, v = torch.linalg.svd(rows.double(), full_matrices=False)
    found: Tensor = v.T @ (u[-1] * s / (damping + s.square() / len(rows)))
    return found


# Rows in half precision


@pytest.mark.parametrize("row_dtype", HALF)
@pytest.mark.parametrize("damping", [1e-6, 1e-5, 1e-3])
@pytest.mark.parametrize("m", [16, 64])
@pytest.mark.parametrize("kind", ["independent", "correlated"])
def test_half_precision(row_dtype: Any, damping: float, m: int, kind: str) -> None:
    """The problem of the rounded rows is solved exactly, and its answer is the right direction."""
    gradients = drawn(m, 2000) / 2000**0.5 if kind == "independent" else correlated(m, 2000)
    window = filled(gradients, row_dtype=row_dtype)
    assert window.nbytes == 2 * m * 2000
    found = window.newest_direction(damping)
    assert found.dtype == torch.float32
    rounded = direction(window.rows(), damping)
    torch.testing.assert_close(
        found.double(), rounded, rtol=1e-4, atol=3e-6 * float(rounded.abs().max())
    )
    cosines = {}
    for name, exact in (("own", rounded), ("float32", direction(gradients, damping))):
        cosines[name] = float(torch.cosine_similarity(found.double(), exact, dim=0))
    assert cosines["own"] > 1 - 1e-10
    assert cosines["float32"] >= HALF[row_dtype]
    assert float(found.norm() / direction(gradients, damping).norm()) == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("row_dtype", HALF)
@pytest.mark.parametrize("size", [1e-30, 1e-15, 1e15, 1e30])
def test_tiny_and_huge_gradients(row_dtype: Any, size: float) -> None:
    """Beside each other, and far out of the range of float16."""
    gradients = drawn(4, 60)
    gradients[1] *= size
    gradients[3] *= size
    window = filled(gradients, row_dtype=row_dtype)
    error = (window.rows() - gradients).abs().amax(1) / gradients.abs().amax(1)
    assert error.max() <= torch.finfo(getattr(torch, row_dtype)).eps / 2
    found = window.newest_direction(1e-3).double()
    # Of two that are long or short alike, and two that are not.
    rows = window.rows().double()
    core = 4e-3 * torch.eye(4, dtype=torch.float64) + rows @ rows.T
    scale = core.diagonal().rsqrt()
    solved = torch.linalg.inv(core * scale * scale.unsqueeze(1))[:, 3] * scale[3]
    expected = 4 * rows.T @ (scale * solved)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


# Columns on several ranks


class Ranks:
    """Sums tensors of as many threads as there are ranks, in order of the ranks."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.parts: list[Any] = [None] * count
        self.sent: list[tuple[torch.dtype, tuple[int, ...]]] = []
        self._barrier = threading.Barrier(count, timeout=30)

    def summing(self, rank: int) -> Callable[[Tensor], Tensor]:
        """Return what sums a tensor of this rank and those of the others."""

        def total(x: Tensor) -> Tensor:
            self.parts[rank] = x
            self._barrier.wait()
            found = torch.stack(self.parts).sum(0)
            if self._barrier.wait() == 0:
                self.sent.append((x.dtype, tuple(x.shape)))
            return found

        return total

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        """Call a function on every rank."""
        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(function, range(self.count)))


@pytest.mark.parametrize("row_dtype", ROW_DTYPES)
@pytest.mark.parametrize("widths", [[10, 10], [1, 19], [7, 7, 6]])
def test_shards_of_columns_are_the_whole(row_dtype: Any, widths: list[int]) -> None:
    dtype = torch.float64 if row_dtype == "auto" else torch.float32
    gradients, x = drawn(7, 20, dtype=dtype), drawn(20, 2, dtype=dtype, seed=1)
    gradients[3] *= 1e5
    options: dict[str, Any] = {"dtype": dtype, "row_dtype": row_dtype}
    whole = filled(gradients, m=4, **options)
    ranks = Ranks(len(widths))
    columns = torch.arange(20).split(widths)

    def one_rank(rank: int) -> Any:
        own = columns[rank]
        window = GradientWindow(4, len(own), sum_over_ranks=ranks.summing(rank), **options)
        for g in gradients:
            window.insert(g[own], largest=g.abs().max())
        inverse = window.inverse(0.1)
        products = [inverse @ x[own], inverse.newest_direction_and(x[own, 0])]
        return window, inverse.newest_direction(), *products

    found = ranks.run(one_rank)
    for window, *_ in found:
        assert torch.equal(window.gram, found[0][0].gram)
        torch.testing.assert_close(window.gram, whole.gram, rtol=1e-12, atol=1e-12)
    close: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11} if dtype == torch.float64 else {}
    inverse = whole.inverse(0.1)
    expected = [whole.newest_direction(0.1), inverse @ x, inverse.newest_direction_and(x[:, 0])]
    for number, exact in enumerate(expected, start=1):
        torch.testing.assert_close(torch.cat([each[number] for each in found]), exact, **close)
    assert torch.equal(torch.cat([each[0].rows() for each in found], 1), whole.rows())
    # m numbers per gradient; as many for each other vector.
    assert ranks.sent == [
        *[(torch.float64, (4,))] * 7,
        (torch.float64, (4, 2)),
        (torch.float64, (4,)),
    ]


# States


@pytest.mark.parametrize("row_dtype", ROW_DTYPES)
@pytest.mark.parametrize("count", [0, 3, 5, 12])
def test_a_state_goes_on(row_dtype: Any, count: int) -> None:
    """Bit for bit, through a file that is loaded with weights only, and with memory of its own."""
    gradients = drawn(17, 40)
    window = filled(gradients[:count], m=5, row_dtype=row_dtype)
    file = io.BytesIO()
    torch.save(window.state(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    kept = copy.deepcopy(saved)
    other = filled(gradients[3:12], m=5, row_dtype=row_dtype)
    other.load_state(saved)
    for gradient in gradients[12:]:
        for one in (window, other):
            one.insert(gradient)
        assert torch.equal(window.newest_direction(1e-3), other.newest_direction(1e-3))
    assert all(torch.equal(x, other.state()[key]) for key, x in window.state().items())
    assert all(torch.equal(x, kept[key]) for key, x in saved.items())


def test_a_state_is_a_copy() -> None:
    window = filled(drawn(4, 10), m=3)
    state = window.state()
    before = copy.deepcopy(state)
    window.insert(drawn(10, seed=2))
    assert all(torch.equal(x, before[key]) for key, x in state.items())


# A core that cannot be factorized


def no_factor(core: Tensor) -> tuple[Tensor, Tensor]:
    """Fail as `torch.linalg.cholesky_ex` does."""
    return torch.full_like(core, torch.nan), torch.tensor(2)


def test_without_a_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the direction of the newest gradient alone; what else is asked for is divided only."""
    gradients, x = drawn(6, 9, dtype=torch.float64), drawn(9, 2, dtype=torch.float64, seed=1)
    window = filled(gradients, m=4)
    assert window.inverse(0.1).good
    monkeypatch.setattr(torch.linalg, "cholesky_ex", no_factor)
    inverse = window.inverse(0.1)
    assert not inverse.good
    g = gradients[-1]
    alone = g / (0.1 + g.dot(g) / 4)
    torch.testing.assert_close(inverse.newest_direction(), alone, rtol=1e-13, atol=0.0)
    torch.testing.assert_close(inverse @ x, x / 0.1, rtol=1e-13, atol=1e-13)
    both = inverse.newest_direction_and(x[:, 0])
    torch.testing.assert_close(both, alone, rtol=1e-12, atol=1e-12)


def test_a_factor_that_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some libraries do not say that they failed."""
    window = filled(drawn(3, 5))
    silent: Any = lambda core: (torch.full_like(core, torch.nan), torch.tensor(0))  # noqa: E731
    monkeypatch.setattr(torch.linalg, "cholesky_ex", silent)
    inverse = window.inverse(0.1)
    assert not inverse.good
    assert inverse.newest_direction().isfinite().all()


def test_gradients_that_are_the_same_with_hardly_any_damping() -> None:
    """The core is singular, in these numbers without any rounding."""
    g = torch.ones(4, dtype=torch.float64)
    window = filled(g.expand(8, 4))
    for damping in (1e-20, 1e-300):
        assert not window.inverse(damping).good
        # As if the others were zeros.
        torch.testing.assert_close(window.newest_direction(damping), 2 * g, rtol=1e-13, atol=0.0)
    assert window.inverse(1e-8).good
    torch.testing.assert_close(window.newest_direction(1e-8), g / 4, rtol=1e-6, atol=0.0)
    # With rounding there may be a factor or not. Either answer is along the gradient.
    g = drawn(50, dtype=torch.float64)
    window = filled(g.expand(8, 50))
    for damping in (1e-12, 1e-18, 1e-300):
        found = window.newest_direction(damping)
        assert float(torch.cosine_similarity(found, g, dim=0)) > 1 - 1e-4
        assert 0.9 < float(found.dot(g)) < 8.1


def test_an_inverse_of_a_window_that_has_changed() -> None:
    window = filled(drawn(3, 5))
    inverse = window.inverse(0.1)
    window.insert(drawn(1, 5)[0])
    for use in (inverse.newest_direction, lambda: inverse @ torch.ones(5)):
        with pytest.raises(RuntimeError, match=r"Call window\.inverse\(damping\) after"):
            use()


@pytest.mark.parametrize("shape", [[1], [6], [5, 2, 2]])
def test_vectors_of_another_shape(shape: list[int]) -> None:
    inverse = filled(drawn(3, 5)).inverse(0.1)
    with pytest.raises(ValueError, match=r"must be \[5\] or \[5, k\]"):
        inverse @ torch.ones(shape)


def test_a_vector_that_requires_a_gradient() -> None:
    inverse, x = filled(drawn(3, 5)).inverse(0.1), torch.ones(5)
    found = inverse @ x.clone().requires_grad_()
    assert torch.equal(found, inverse @ x)
    assert not found.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64])
def test_precisions_that_are_not_enough(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"must be torch\.float32 or torch\.float64"):
        GradientWindow(2, 3, dtype=dtype)
