"""Tests of lightning_curvature/curvature/inverse.py."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.linalg import LinAlgError

from lightning_curvature.curvature import inverse
from lightning_curvature.curvature.inverse import cholesky_of, eigenbasis_of, inverse_of

TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-11}


def semidefinite(
    *shape: int, dtype: torch.dtype = torch.float64, rank: int | None = None
) -> Tensor:
    """Return random symmetric matrices ``[*shape, shape[-1]]`` with eigenvalues of order 1."""
    n = shape[-1]
    x = torch.randn(*shape[:-1], rank or 2 * n, n, dtype=torch.float64) / math.sqrt(n)
    matrix = x.mT @ x
    return (0.5 * (matrix + matrix.mT)).to(dtype)


def damped(matrix: Tensor, damping: float) -> Tensor:
    """Return ``matrix + damping * I``."""
    return matrix + damping * torch.eye(matrix.shape[-1], dtype=matrix.dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("shape", [(1,), (2,), (7,), (4, 1), (3, 5), (2, 3, 4)])
def test_inverse_and_cholesky(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    matrix = semidefinite(*shape, dtype=dtype)
    before = matrix.clone()
    expected = damped(matrix, 0.1)
    answer, factor = inverse_of(matrix, torch.tensor(0.1)), cholesky_of(matrix, 0.1)
    tolerance = TOLERANCES[dtype]
    if dtype == torch.float64:  # the damping tensor is float32
        answer = inverse_of(matrix, torch.tensor(0.1, dtype=dtype))

    identity = torch.eye(shape[-1], dtype=dtype).expand_as(matrix)
    torch.testing.assert_close(answer.value @ expected, identity, atol=tolerance, rtol=0)
    product = factor.value @ factor.value.mT
    torch.testing.assert_close(product, expected, atol=tolerance, rtol=0)
    assert torch.equal(answer.value, answer.value.mT)
    assert torch.equal(factor.value, factor.value.tril())
    assert answer.value.is_contiguous()
    for good, retries in (answer[1:], factor[1:]):
        assert (good.dim(), good.item(), retries) == (0, True, 0)
    assert torch.equal(matrix, before)


def test_each_matrix_has_its_damping() -> None:
    matrix = semidefinite(2, 3, 4)
    damping = torch.tensor([[0.1], [2.0]], dtype=torch.float64)  # broadcast over the groups
    value = inverse_of(matrix, damping).value
    for i, shift in enumerate((0.1, 2.0)):
        expected = torch.linalg.inv(damped(matrix[i], shift))
        torch.testing.assert_close(value[i], expected)
    ones = inverse_of(torch.tensor([[[1.0]], [[2.0]]]), torch.tensor([1.0, 2.0]))
    assert ones.value.flatten().tolist() == [0.5, 0.25]
    assert cholesky_of(torch.tensor([[3.0]]), 1.0).value.item() == 2.0


def test_only_the_lower_entries_are_read() -> None:
    matrix = semidefinite(5)
    wrong = matrix + torch.full_like(matrix, 7.0).triu(1)
    assert torch.equal(inverse_of(wrong, 0.1).value, inverse_of(matrix, 0.1).value)
    assert torch.equal(eigenbasis_of(wrong).values, eigenbasis_of(matrix).values)


def test_aliased_sizes_are_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = semidefinite(2, 8)
    plain = inverse_of(matrix, 0.1).value, cholesky_of(matrix, 0.1).value
    seen: list[torch.Size] = []
    decompose = torch.linalg.cholesky_ex

    def spy(matrices: Tensor) -> Any:
        seen.append(matrices.shape)
        return decompose(matrices)

    monkeypatch.setattr(inverse, "_ALIASED_SIZE", 8)
    monkeypatch.setattr(inverse, "_ALIASED_BYTES", 64)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", spy)
    padded = inverse_of(matrix, 0.1).value, cholesky_of(matrix, 0.1).value
    assert seen == [(2, 9, 9)] * 2
    for one, other in zip(plain, padded, strict=True):
        torch.testing.assert_close(one, other)
    assert padded[0].is_contiguous()
    assert torch.equal(padded[0], padded[0].mT)
    right = torch.randn(2, 8, 3, dtype=torch.float64)
    torch.testing.assert_close(torch.cholesky_solve(right, padded[1]), padded[0] @ right)


def test_a_tiny_damping_is_kept_by_float64() -> None:
    # In float32 1 + 1e-9 is 1, and this matrix is singular: both pivots but the first are lost.
    matrix = torch.ones(3, 3)
    answer = inverse_of(matrix, torch.tensor(1e-9, dtype=torch.float64))
    assert answer.good.item()
    assert answer.retries == 1
    assert answer.value.dtype == torch.float32
    expected = torch.linalg.inv(damped(matrix.double(), 1e-9)).float()
    torch.testing.assert_close(answer.value, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_meaningless_success_is_noticed(dtype: torch.dtype) -> None:
    # Cholesky succeeds, on a second pivot that is nothing but rounding.
    eps = torch.finfo(dtype).eps
    matrix = torch.tensor([[1.0, 1.0], [1.0, 1.0 + eps]], dtype=dtype)
    factor, info = torch.linalg.cholesky_ex(matrix)
    assert info.item() == 0
    assert factor.isfinite().all()
    assert inverse_of(matrix, 0.0).retries == 1


def test_ladder_of_jitters() -> None:
    # An eigenvalue of -3e-7 of the mean of the diagonal: 0, 1e-10 and 1e-8 do not suffice.
    matrix = torch.tensor([[1.0, 1.0], [1.0, 1.0 - 6e-7]])
    for decompose in (inverse_of, cholesky_of):
        answer = decompose(matrix, 0.0)
        assert (answer.good.item(), answer.retries) == (True, 4)
        assert decompose(matrix.double(), 0.0).retries == 3
        # The jitter is relative.
        assert decompose(matrix * 1e6, 0.0).retries == 4
    inverted = inverse_of(matrix.double(), 0.0).value
    scale = matrix.double().diagonal().mean().item()
    torch.testing.assert_close(inverted, torch.linalg.inv(damped(matrix.double(), 1e-6 * scale)))


def test_only_the_failing_matrices_are_retried() -> None:
    matrix = semidefinite(4, 4, dtype=torch.float32)
    matrix[1::2] = torch.ones(4, 4)
    calls = inverse_of(matrix, 1e-9), cholesky_of(matrix, 1e-9)
    for answer, decompose in zip(calls, (inverse_of, cholesky_of), strict=True):
        assert (answer.good.item(), answer.retries) == (True, 2)
        for i in range(4):
            assert torch.equal(answer.value[i], decompose(matrix[i], 1e-9).value)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -5.0, 0.0])
@pytest.mark.parametrize("decompose", [inverse_of, cholesky_of])
def test_what_cannot_be_inverted_is_reported(decompose: Any, bad: float, n: int) -> None:
    matrix = semidefinite(2, n, dtype=torch.float32) + torch.eye(n)
    expected = decompose(matrix[0], 0.0).value
    matrix[1, -1, 0] = matrix[1, 0, -1] = bad
    if bad == 0.0:
        matrix[1] = 0.0
    answer = decompose(matrix, 0.0)
    assert not answer.good.item()
    assert answer.retries == (0 if n == 1 or not math.isfinite(bad) else 5)
    assert torch.equal(answer.value[0], expected)
    assert not answer.value[1].any()


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("damping", [math.nan, math.inf, -100.0])
def test_a_bad_damping_is_reported(damping: float, n: int) -> None:
    answer = inverse_of(semidefinite(n, dtype=torch.float32), damping)
    assert not answer.good.item()
    assert not answer.value.any()


def test_an_inverse_that_overflows_is_reported() -> None:
    assert not inverse_of(torch.eye(3) * 1e-39, 0.0).good.item()
    assert not inverse_of(torch.full((1, 1), 1e-39), 0.0).good.item()


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("limit", [0, 512])
@pytest.mark.parametrize("shape", [(1,), (6,), (3, 5), (2, 3, 4)])
def test_eigenbasis(
    shape: tuple[int, ...], dtype: torch.dtype, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inverse, "_DOUBLE_SIZE", limit)
    matrix = semidefinite(*shape, dtype=dtype)
    values, vectors, good, retries = eigenbasis_of(matrix)
    assert (values.dtype, vectors.dtype, good.item(), retries) == (dtype, dtype, True, 0)
    tolerance = TOLERANCES[dtype]
    product = vectors * values[..., None, :] @ vectors.mT
    torch.testing.assert_close(product, matrix, atol=tolerance, rtol=0)
    identity = torch.eye(shape[-1], dtype=dtype).expand_as(matrix)
    torch.testing.assert_close(vectors.mT @ vectors, identity, atol=tolerance, rtol=0)
    assert torch.equal(values, values.sort(-1).values)
    assert vectors.is_contiguous()


def test_small_eigenbases_are_found_in_float64() -> None:
    matrix = semidefinite(6, dtype=torch.float32)
    values, vectors, _, _ = eigenbasis_of(matrix)
    expected, _ = torch.linalg.eigh(matrix.double())
    assert torch.equal(values, expected.float())
    identity = torch.eye(6, dtype=torch.float64)
    product = vectors.double().mT @ vectors.double()
    torch.testing.assert_close(product, identity, atol=2e-7, rtol=0)


def test_negative_eigenvalues_are_clipped() -> None:
    values = eigenbasis_of(torch.tensor([[1.0, 2.0], [2.0, 1.0]])).values
    assert values.tolist() == [0.0, 3.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_eigenbasis_of_nan_is_reported(bad: float) -> None:
    matrix = semidefinite(2, 3, 4)
    matrix[1, 2, 3, 3] = bad
    values, vectors, good, retries = eigenbasis_of(matrix)
    assert (good.item(), retries) == (False, 0)
    assert not values[1, 2].any()
    assert not vectors[1, 2].any()
    expected = eigenbasis_of(matrix[0, 1])
    assert torch.equal(values[0, 1], expected.values)
    assert torch.equal(vectors[0, 1], expected.vectors)
    assert not eigenbasis_of(matrix[1, 2]).good.item()


@pytest.mark.parametrize("failure", ["raises", "nan"])
@pytest.mark.parametrize("recovers", [True, False])
def test_eigenbasis_falls_back_to_float64(
    failure: str, recovers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = semidefinite(3, 4, dtype=torch.float32)
    expected = eigenbasis_of(matrix)
    eigh = torch.linalg.eigh

    def failing(matrices: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = eigh(matrices)
        if matrices.dtype == torch.float32 or not recovers:
            if failure == "raises":
                raise LinAlgError("did not converge")
            values[-1, 0] = math.nan
        return values, vectors

    monkeypatch.setattr(inverse, "_DOUBLE_SIZE", 0)
    monkeypatch.setattr(torch.linalg, "eigh", failing)
    values, vectors, good, retries = eigenbasis_of(matrix)
    assert good.item() is recovers
    assert retries == (3 if failure == "raises" else 1)
    if recovers:
        torch.testing.assert_close(values, expected.values)
    else:
        assert not values[-1].any()
        assert not vectors[-1].any()


def test_no_graph_is_kept() -> None:
    matrix = semidefinite(3).requires_grad_()
    damping = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    answers = inverse_of(matrix, damping), cholesky_of(matrix, damping), eigenbasis_of(matrix)
    assert not any(answer[0].requires_grad for answer in answers)
