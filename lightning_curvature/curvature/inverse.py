"""Inverses, Cholesky factors and eigenvectors of curvature factors, without exceptions.

A factor is symmetric and positive semi-definite but for rounding, which in float32 can leave
eigenvalues of either sign near 1e-7 of the largest. With a damping below that a decomposition
fails, or succeeds with a meaningless answer. Both are noticed, and such a matrix is decomposed
again in float64 on the CPU, with a growing multiple of the identity on top if need be. What cannot
be decomposed even so is reported, not raised: the caller has a last good result to go on with.

`inverse_of` and `cholesky_of` read one flag per matrix from the device, once a call, which waits
for it; not so for matrices of one row. `eigenbasis_of` waits several times, as eigensolvers do.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

__all__ = ["Eigenbasis", "Inversion", "cholesky_of", "eigenbasis_of", "inverse_of"]

# Multiples of the mean of the diagonal that are added to it in turn, after float64 alone failed.
_JITTERS = (1e-10, 1e-8, 1e-6, 1e-4)
# A pivot of a Cholesky decomposition is a difference of numbers as large as the diagonal entry:
# below this multiple of the machine epsilon, relative to the entry, no digit of it is right.
_LOST_PIVOT = 8.0
# Eigenvectors of matrices up to this size are found in float64 on a CPU, where they take little.
_DOUBLE_SIZE = 512
# From this size on LAPACK on a CPU takes a third longer if the rows are a multiple of 1 KiB apart,
# because they then compete for the same few lines of its cache.
_ALIASED_BYTES = 1024
_ALIASED_SIZE = 1024


class Inversion(NamedTuple):
    """Answer of `inverse_of` and `cholesky_of`.

    Attributes:
        value: Inverses or Cholesky factors, in the shape and dtype of the matrices; zeros for one
            that could not be decomposed, or not finite for an inverse that overflows.
        good: Boolean 0-dim tensor: whether all of them can be used.
        retries: Decompositions in float64 that it took, beyond the first attempt.
    """

    value: Tensor
    good: Tensor
    retries: int


class Eigenbasis(NamedTuple):
    """Answer of `eigenbasis_of`.

    Attributes:
        values: Eigenvalues in ascending order, at least 0, ``[..., n]``.
        vectors: Eigenvectors, as columns, ``[..., n, n]``; zeros for a matrix that has none.
        good: Boolean 0-dim tensor: whether all of them can be used.
        retries: Decompositions in float64 that it took, beyond the first attempt.
    """

    values: Tensor
    vectors: Tensor
    good: Tensor
    retries: int


def inverse_of(matrix: Tensor, damping: Tensor | float, scale: Tensor | float = 1.0) -> Inversion:
    """Return the inverse of ``scale * matrix + damping * I``, exactly symmetric.

    Args:
        matrix: Symmetric matrices ``[..., n, n]`` in float32 or float64; of two mirrored entries
            only the lower one is read.
        damping: Damping of all matrices, or of each, ``[...]``.
        scale: Factor of all matrices, or of each, ``[...]``.

    Examples:
        >>> inverse_of(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), damping=2.0).value * 15
        tensor([[ 4.0000, -1.0000],
                [-1.0000,  4.0000]])
    """
    answer = _decomposed(matrix, damping, scale, _inverse_from, power=-1.0)
    return answer._replace(value=answer.value.contiguous())


def cholesky_of(matrix: Tensor, damping: Tensor | float, scale: Tensor | float = 1.0) -> Inversion:
    """Return the lower Cholesky factor of ``scale * matrix + damping * I``.

    It serves `torch.cholesky_solve`, which is faster than an inverse that is used only once, much
    so with few right-hand sides.

    Args:
        matrix: Symmetric matrices ``[..., n, n]`` in float32 or float64; of two mirrored entries
            only the lower one is read.
        damping: Damping of all matrices, or of each, ``[...]``.
        scale: Factor of all matrices, or of each, ``[...]``.

    Examples:
        >>> cholesky_of(torch.tensor([[2.0, 4.0], [4.0, 10.0]]), damping=2.0).value
        tensor([[2.0000, 0.0000],
                [2.0000, 2.8284]])
    """
    return _decomposed(matrix, damping, scale, lambda factors: factors, power=0.5)


def _decomposed(
    matrix: Tensor,
    damping: Tensor | float,
    scale: Tensor | float,
    finish: Callable[[Tensor], Tensor],
    *,
    power: float,
) -> Inversion:
    n = matrix.shape[-1]
    matrix = matrix.detach()
    matrices = matrix.reshape(-1, n, n)
    shifts, scales = (_each(value, matrix) for value in (damping, scale))
    if n == 1:
        damped = matrices * scales[:, None, None].to(matrix.dtype)
        damped = damped + shifts[:, None, None].to(matrix.dtype)
        value = damped.pow(power)
        usable = (damped > 0) & damped.isfinite() & value.isfinite()
        value = torch.where(usable, value, 0.0)
        return Inversion(value.view(matrix.shape), usable.all(), 0)

    value, failed = _attempt(matrices, shifts, scales, finish)
    good, retries = True, 0
    for index in failed:
        again, tries = _retried(matrices[index], shifts[index], scales[index], finish)
        retries += tries
        if again is None:
            good = False
        else:
            value[index] = again.to(value)
    finite = value.diagonal(dim1=-2, dim2=-1).isfinite().all()
    return Inversion(value.view(matrix.shape), finite if good else finite.new_zeros(()), retries)


def _each(value: Tensor | float, matrix: Tensor) -> Tensor:
    """Return one number per matrix of a batch."""
    if not isinstance(value, Tensor):
        value = torch.tensor(value, dtype=matrix.dtype)
    return value.detach().to(matrix.device).expand(matrix.shape[:-2]).reshape(-1)


def _attempt(
    matrices: Tensor, shifts: Tensor, scales: Tensor, finish: Callable[[Tensor], Tensor]
) -> tuple[Tensor, list[int]]:
    """Return the finished decompositions, zeros where they failed, and which failed."""
    n = matrices.shape[-1]
    damped = _damped(matrices, shifts, scales)
    least = damped.diagonal(dim1=-2, dim2=-1) * (_LOST_PIVOT * torch.finfo(damped.dtype).eps)
    factors, info = torch.linalg.cholesky_ex(damped)
    pivots = factors.diagonal(dim1=-2, dim2=-1).square()
    # A number that is not finite anywhere in a row makes the pivot of the row NaN. Comparisons
    # with NaN are False.
    sound = (info == 0) & ((pivots > least) & pivots.isfinite()).all(-1)
    flags: list[bool] = sound.tolist()
    failed = [index for index, fine in enumerate(flags) if not fine]
    if not failed:
        return finish(factors)[:, :n, :n], failed
    value = matrices.new_zeros(matrices.shape)
    if len(failed) < len(flags):
        value[sound] = finish(factors[sound])[:, :n, :n]
    return value, failed


def _damped(matrices: Tensor, shifts: Tensor, scales: Tensor) -> Tensor:
    """Return a damped copy, with one more row and column of the identity where that is faster."""
    count, n, _ = matrices.shape
    factors = scales.to(matrices.dtype)[:, None, None]
    aliased = (n * matrices.element_size()) % _ALIASED_BYTES == 0
    if matrices.device.type == "cpu" and n >= _ALIASED_SIZE and aliased:
        damped = matrices.new_zeros(count, n + 1, n + 1)
        torch.mul(matrices, factors, out=damped[:, :n, :n])
        damped[:, n, n] = 1
    else:
        damped = matrices * factors
    damped.diagonal(dim1=-2, dim2=-1)[:, :n].add_(shifts[:, None])
    return damped


def _retried(
    matrix: Tensor, shift: Tensor, scale: Tensor, finish: Callable[[Tensor], Tensor]
) -> tuple[Tensor | None, int]:
    """Return a decomposition of one matrix in float64, None if there is none, and the attempts."""
    exact = matrix.to("cpu", torch.float64)[None] * scale.to("cpu", torch.float64)
    shifts = shift.to("cpu", torch.float64)[None]
    size = exact.diagonal(dim1=-2, dim2=-1).mean() + shifts
    if not (exact.isfinite().all() and size.isfinite()):
        return None, 0
    jitters = _JITTERS if matrix.dtype == torch.float64 else (0.0, *_JITTERS)
    for tries, jitter in enumerate(jitters, start=1):
        value, failed = _attempt(exact, shifts + jitter * size, torch.ones_like(shifts), finish)
        if not failed:
            return value[0], tries
    return None, len(jitters)


def _inverse_from(factors: Tensor) -> Tensor:
    if factors.device.type == "cpu":
        # Mirrored by the function itself. The result is laid out by columns.
        return torch.cholesky_inverse(factors).mT
    # `torch.cholesky_inverse` would wait for the device once more, to look for errors.
    identity = torch.eye(factors.shape[-1], dtype=factors.dtype, device=factors.device)
    inverse = torch.cholesky_solve(identity.expand_as(factors), factors)
    return (inverse + inverse.mT).mul_(0.5)


def eigenbasis_of(matrix: Tensor) -> Eigenbasis:
    """Return eigenvalues, negative ones set to 0, and eigenvectors of symmetric matrices.

    Args:
        matrix: Symmetric matrices ``[..., n, n]`` in float32 or float64; of two mirrored entries
            only the lower one is read.

    Examples:
        >>> eigenbasis_of(torch.tensor([[2.0, 1.0], [1.0, 2.0]])).values
        tensor([1., 3.])
    """
    n = matrix.shape[-1]
    matrices = matrix.detach().reshape(-1, n, n)
    finite: list[bool] = matrices.isfinite().flatten(1).all(1).tolist()
    # Of a matrix with NaN LAPACK may return anything, or never return.
    wanted = [index for index, fine in enumerate(finite) if fine]
    chosen = matrices if all(finite) else matrices[wanted]
    precise = matrices.device.type == "cpu" and n <= _DOUBLE_SIZE
    answers = _eigh(chosen.double() if precise else chosen)
    if len(wanted) == len(finite) and len(answers[2]) == 0:
        values, vectors, _ = answers
        good, retries = True, 0
    else:
        values, vectors = matrices.new_zeros(len(finite), n), torch.zeros_like(matrices)
        values[wanted] = answers[0].to(values)
        vectors[wanted] = answers[1].to(vectors)
        good, retries = all(finite), len(answers[2])
        for number in answers[2]:
            index = wanted[number]
            again = _eigh(matrices[index].to("cpu", torch.float64)[None])
            good = good and not again[2]
            values[index] = again[0][0].to(values)
            vectors[index] = again[1][0].to(vectors)
    return Eigenbasis(
        values.clamp(min=0).to(matrix.dtype).view(matrix.shape[:-1]),
        vectors.to(matrix.dtype).contiguous().view(matrix.shape),
        torch.tensor(good, device=matrix.device),
        retries,
    )


def _eigh(matrices: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """Return eigenvalues and eigenvectors, zeros where there are none, and which have none."""
    try:
        values, vectors = torch.linalg.eigh(matrices)
    except LinAlgError:  # one matrix fails the whole batch
        empty = matrices.new_zeros(matrices.shape[:-1])
        return empty, torch.zeros_like(matrices), list(range(len(matrices)))
    sound = values.isfinite().all(-1) & vectors.isfinite().flatten(1).all(1)
    flags: list[bool] = sound.tolist()
    failed = [index for index, fine in enumerate(flags) if not fine]
    if failed:
        values = torch.where(sound[:, None], values, 0.0)
        vectors = torch.where(sound[:, None, None], vectors, 0.0)
    return values, vectors, failed
