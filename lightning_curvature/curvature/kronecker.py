r"""Kronecker factors of a block: running averages, damped inverses, eigenbases, products.

The state of a block is a dictionary of tensors:

    key               shape                            meaning
    a_factor          [groups, cuts, width, width]     average of A, see `kronecker_sums.py`
    g_factor          likewise, of the outputs         average of G
    positions         []                               average of M
    mass              []                               weight of all that was averaged
    a_inverse         like a_factor                    inverse of the damped factor
    g_inverse         like g_factor
    a_cholesky        like a_factor                    its Cholesky factor, where the inverse
    g_cholesky        like g_factor                    would be used only once
    a_vectors         like a_factor                    eigenvectors, as columns
    a_values          [groups, cuts, width]            eigenvalues of A / M
    g_vectors, g_values
    eigenvalue_correction  [groups, output, input]     average of squared gradients in that basis
    correction_mass   []                               weight of all that was averaged in it

Factors that are kept as a diagonal have width 1. The block is C = (A / M) (x) G, so that C V is
G V A / M for V of shape [groups, output, input].

Damping mu is added in one of two ways. Factored (Martens and Grosse, arXiv:1503.05671, 6.3):

    (sqrt(nu_G / nu_A) A + sqrt(mu) I)^-1 (x) (sqrt(nu_A / nu_G) G + sqrt(mu) I)^-1

with nu the mean of the diagonal, A divided by M already. Exact, in the eigenbasis:

    Q_G [ (Q_G^T V Q_A) / (s + mu) ] Q_A^T

where s are the products of the eigenvalues, or, with the correction of George et al.,
arXiv:1806.03884 (EK-FAC), the second moments of the gradient in that basis.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_curvature.curvature.inverse import cholesky_of, eigenbasis_of, inverse_of
from lightning_curvature.curvature.kronecker_blocks import BlockInfo, Side
from lightning_curvature.curvature.kronecker_sums import (
    Basis,
    BlockSums,
    joined,
    rotated,
    split,
)

__all__ = [
    "FACTORS",
    "Refreshed",
    "State",
    "averaged",
    "averaged_diagonal",
    "basis_of",
    "eigen_state",
    "factored_inverse_state",
    "inverse_shapes",
    "multiplied",
    "preconditioned",
    "rounded",
]

State = dict[str, Tensor]

FACTORS = ("a_factor", "g_factor", "positions", "mass")


def averaged(
    state: State, sums: BlockSums, decay: float, usable: Tensor | None, dtype: torch.dtype
) -> State:
    """Return the state with new sums in its averages.

    The average has weights that sum to one: the first observation counts fully.

    Args:
        state: The old state, whose tensors may be changed. Empty before the first observation.
        sums: Sums of a step over all ranks; without positions nothing changes.
        decay: What the weight of old observations is multiplied with.
        usable: Boolean 0-dim tensor: if False nothing changes. None for True.
        dtype: In which factors are kept.
    """
    found = sums.positions > 0
    if usable is not None:
        found = found & usable.to(found.device)
    new = dict(state)
    old_mass = state["mass"] if "mass" in state else torch.zeros_like(sums.positions)
    mass = decay * old_mass + 1
    pairs = {"a_factor": sums.a_sum, "g_factor": sums.g_sum, "positions": sums.positions}
    for key, value in pairs.items():
        kept = value.dtype if key == "positions" else dtype
        new[key] = _mixed(state.get(key), value, 1 / mass, found, kept)
    new["mass"] = torch.where(found, mass, old_mass)
    if sums.squares is not None and "eigenvalue_correction" in state:
        old = state["correction_mass"]
        mass = decay * old + 1
        key = "eigenvalue_correction"
        new[key] = _mixed(state[key], sums.squares, 1 / mass, found, state[key].dtype)
        new["correction_mass"] = torch.where(found, mass, old)
    return new


def _mixed(
    old: Tensor | None, value: Tensor, share: Tensor, found: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return ``old + share * (value - old)``, the old one where nothing was found."""
    if _can_look(value) and old is not None and old.dtype == value.dtype == dtype:
        # Where looking costs nothing, and memory is what takes time.
        return old.lerp_(value, float(share)) if found else old
    old = torch.zeros_like(value) if old is None else old.to(value.dtype)
    share = torch.where(found, share, torch.zeros_like(share)).to(value.dtype)
    # Not finite times zero would not be zero.
    value = torch.where(found, value, old)
    return torch.lerp(old, value, share).to(dtype)


def _can_look(value: Tensor) -> bool:
    return value.device.type == "cpu"


def averaged_diagonal(state: State, squares: Tensor, decay: float, usable: Tensor | None) -> State:
    """Return the state of a diagonal with new squares in its average.

    Args:
        state: "diagonal" and "mass", which may be changed. Empty before the first observation.
        squares: Of a step over all ranks, of the shape of the parameter.
        decay: What the weight of old observations is multiplied with.
        usable: Boolean 0-dim tensor: if False nothing changes. None for True.
    """
    old_mass = state["mass"] if state else squares.new_zeros(())
    found = torch.ones_like(old_mass, dtype=torch.bool)
    if usable is not None:
        found = found & usable.to(found.device)
    mass = decay * old_mass + 1
    diagonal = _mixed(state.get("diagonal"), squares, 1 / mass, found, squares.dtype)
    return {"diagonal": diagonal, "mass": torch.where(found, mass, old_mass)}


def inverse_shapes(
    info: BlockInfo, *, in_eigenbasis: bool, corrected: bool
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what a block keeps besides its factors, by key.

    Args:
        info: The block.
        in_eigenbasis: Whether it keeps eigenbases, not inverses.
        corrected: Whether eigenvalues are corrected.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for key, side in (("a", info.input), ("g", info.output)):
        values = (info.groups, side.cuts, side.width)
        if not in_eigenbasis:
            shapes[f"{key}_inverse"] = (*values, side.width)
            continue
        shapes[f"{key}_values"] = values
        if side.kind != "diagonal":
            shapes[f"{key}_vectors"] = (*values, side.width)
    if corrected:
        shapes["eigenvalue_correction"] = (info.groups, info.output.filled, info.input.filled)
        shapes["correction_mass"] = ()
    return shapes


class _Factors(NamedTuple):
    """Factors in the precision to compute in.

    Attributes:
        a: A.
        g: G.
        positions: M.
        nu_a: Means of the diagonal of A / M, ``[groups]``.
        nu_g: Those of G.
        a_rounding: How negative rounding may have made eigenvalues of A, ``[groups, cuts]``.
        g_rounding: Likewise.
    """

    a: Tensor
    g: Tensor
    positions: Tensor
    nu_a: Tensor
    nu_g: Tensor
    a_rounding: Tensor
    g_rounding: Tensor


def _factors(info: BlockInfo, state: State, dtype: torch.dtype) -> _Factors:
    positions = state["positions"].to(dtype)
    positions = torch.where(positions > 0, positions, 1.0)
    a, g = state["a_factor"].to(dtype), state["g_factor"].to(dtype)
    nu_a = _mean_diagonal(a, info.input) / positions
    roundings = (_rounding(state[f"{key}_factor"], dtype) for key in "ag")
    return _Factors(a, g, positions, nu_a, _mean_diagonal(g, info.output), *roundings)


def _rounding(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Bound what storing a factor in less than the precision to compute in has done to it."""
    if factor.dtype == dtype or torch.finfo(factor.dtype).eps <= torch.finfo(dtype).eps:
        return torch.zeros(factor.shape[:2], dtype=dtype, device=factor.device)
    # Errors of the entries are independent, so the norm of their matrix is that of a row.
    longest: Tensor = torch.linalg.vector_norm(factor, dim=-1, dtype=dtype).amax(-1)
    return longest * torch.finfo(factor.dtype).eps


def _mean_diagonal(factor: Tensor, side: Side) -> Tensor:
    """Return the mean of the diagonal per group, ``[groups]``."""
    return factor.diagonal(dim1=-2, dim2=-1).sum((-2, -1)) / side.size


def rounded(refreshed: "Refreshed", dtype: torch.dtype) -> "Refreshed":
    """Return new inverses or eigenvectors in the dtype they are to be kept in.

    Args:
        refreshed: What a refresh gave.
        dtype: Of matrices; eigenvalues stay as they are.
    """
    state = {
        key: x.to(dtype) if key.endswith(("_inverse", "_vectors")) else x
        for key, x in refreshed.state.items()
    }
    return refreshed._replace(state=state)


class Refreshed(NamedTuple):
    """New inverses or eigenbases.

    Attributes:
        state: By key.
        good: Boolean 0-dim tensor: whether they can be used.
        retries: Decompositions that had to be repeated.
    """

    state: State
    good: Tensor
    retries: int


def factored_inverse_state(
    info: BlockInfo, state: State, damping: Tensor, dtype: torch.dtype, *, once: bool = False
) -> Refreshed:
    """Return the inverses of the damped factors.

    A factor of one entry gets no damping: all of it goes to the other one, so that the result is
    exact. A block of which nothing is known has the inverse I / mu.

    Args:
        info: The block.
        state: Its state.
        damping: mu, a 0-dim tensor above 0.
        dtype: To compute in.
        once: Whether they are used for one product only, for which a Cholesky factor is faster.
    """
    a, g, positions, nu_a, nu_g, a_rounding, g_rounding = _factors(info, state, dtype)
    mu = damping.to(dtype)
    alive = (nu_a > 0) & (nu_g > 0)
    one = torch.ones_like(nu_a)
    if info.input.size == 1 or info.output.size == 1:
        # Either is 1 after division by itself.
        a_scale, g_scale = torch.where(alive, 1 / nu_a, one), torch.where(alive, nu_a, one)
        a_damping, g_damping = torch.zeros_like(mu), mu
        if info.input.size > 1:
            a_scale, g_scale = torch.where(alive, nu_g, one), torch.where(alive, 1 / nu_g, one)
            a_damping, g_damping = mu, torch.zeros_like(mu)
        # Of a dead block the entry is 0: made 1 by the damping.
        dead = torch.where(alive, torch.zeros_like(nu_a), one)
        a_extra, g_extra = (dead, 0 * dead) if info.input.size == 1 else (0 * dead, dead)
    else:
        ratio = torch.where(alive, (nu_g / nu_a).sqrt(), one)
        a_scale, g_scale = ratio, torch.where(alive, 1 / ratio, one)
        a_damping = g_damping = mu.sqrt()
        a_extra = g_extra = torch.zeros_like(nu_a)
    zero = torch.zeros_like(nu_a)
    a_scale, g_scale = torch.where(alive, a_scale, zero), torch.where(alive, g_scale, zero)
    inverses = {}
    good, retries = torch.ones_like(alive).all(), 0
    for key, side, factor, scale, shift, rounding in (
        ("a", info.input, a, a_scale / positions, a_damping + a_extra, a_rounding),
        ("g", info.output, g, g_scale, g_damping + g_extra, g_rounding),
    ):
        name, find = "inverse", inverse_of
        if once and side.kind != "diagonal":
            name, find = "cholesky", cholesky_of
        scales = scale[:, None]
        answer = find(factor, shift[:, None] + scales * rounding, scales)
        inverses[f"{key}_{name}"] = answer.value
        good, retries = good & answer.good, retries + answer.retries
    return Refreshed(inverses, good, retries)


def eigen_state(info: BlockInfo, state: State, dtype: torch.dtype, *, corrected: bool) -> Refreshed:
    """Return the eigenbases of the factors.

    Args:
        info: The block.
        state: Its state.
        dtype: To compute in.
        corrected: Whether to carry the second moments of the gradient over into the new basis.
    """
    a, g, positions, *_ = _factors(info, state, dtype)
    new: State = {}
    good, retries = torch.ones((), dtype=torch.bool, device=a.device), 0
    for key, whole, side in (("a", a / positions, info.input), ("g", g, info.output)):
        factor = _without_filler(whole, side)
        if side.kind == "diagonal":
            new[f"{key}_values"] = factor[..., 0].clamp_min(0)
            good = good & torch.isfinite(factor).all()
            continue
        answer = eigenbasis_of(factor)
        new[f"{key}_values"], new[f"{key}_vectors"] = answer.values, answer.vectors
        good, retries = good & answer.good, retries + answer.retries
    if corrected:
        if "eigenvalue_correction" in state:
            new["eigenvalue_correction"] = _carried(info, state, new)
            new["correction_mass"] = state["correction_mass"]
        else:
            new["eigenvalue_correction"] = _products(new)
            new["correction_mass"] = state["mass"]
    return Refreshed(new, good, retries)


def _without_filler(factor: Tensor, side: Side) -> Tensor:
    """Give coordinates that only fill a side up an eigenvalue of their own, clipped to 0 later."""
    missing = side.filled - side.size
    if missing == 0:
        return factor
    factor = factor.clone()
    factor[:, -1].diagonal(dim1=-2, dim2=-1)[:, side.width - missing :] = -1.0
    return factor


def _products(state: State) -> Tensor:
    """Return the eigenvalues of the block, ``[groups, output, input]``."""
    return state["g_values"].flatten(1)[:, :, None] * state["a_values"].flatten(1)[:, None]


def _carried(info: BlockInfo, old: State, new: State) -> Tensor:
    """Return the diagonal that the old approximation has in a new basis."""
    moments = old["eigenvalue_correction"]
    for key, side, axis in (("g", info.output, -2), ("a", info.input, -1)):
        name = f"{key}_vectors"
        if name not in new:
            continue
        shares = (new[name].mT @ old[name].to(new[name].dtype)).square_()
        rows = moments.movedim(axis, -1)
        parts = rows.reshape(*rows.shape[:-1], side.cuts, side.width).movedim(-2, 1)
        moments = (parts @ shares.mT).movedim(1, -2).flatten(-2).movedim(-1, axis)
    return moments.contiguous()


def basis_of(state: State) -> Basis | None:
    """Return the eigenbasis of a state, None if it has none."""
    if "a_values" not in state:
        return None
    return Basis(state.get("a_vectors"), state.get("g_vectors"))


def preconditioned(info: BlockInfo, state: State, matrix: Tensor, damping: Tensor) -> Tensor:
    """Return the inverse of the damped block times a matrix.

    Args:
        info: The block.
        state: Its state, with inverses or an eigenbasis.
        matrix: Gradient of the block, ``[groups, d_out, d_in]``.
        damping: mu, a 0-dim tensor; inverses have theirs inside.
    """
    if "a_values" not in state:
        half = _divided(matrix, info.input, "a", state)
        return _divided(half.mT, info.output, "g", state).mT
    moments = state.get("eigenvalue_correction")
    if moments is None:
        moments = _products(state)
    inner = _to_basis(info, state, matrix)
    inner = inner / (moments.to(inner.dtype) + damping.to(inner.dtype))
    return _from_basis(info, state, inner)


def multiplied(info: BlockInfo, state: State, matrix: Tensor) -> Tensor:
    """Return the block, without damping, times a matrix.

    Args:
        info: The block.
        state: Its state.
        matrix: ``[groups, d_out, d_in]``.
    """
    if "eigenvalue_correction" in state:
        inner = _to_basis(info, state, matrix) * state["eigenvalue_correction"].to(matrix.dtype)
        return _from_basis(info, state, inner)
    a, g, positions, *_ = _factors(info, state, matrix.dtype)
    return _along(_along(matrix, info.input, a).mT, info.output, g).mT / positions


def _along(x: Tensor, side: Side, factor: Tensor) -> Tensor:
    """Multiply the last axis of ``[groups, rows, size]`` with a symmetric factor."""
    if side.kind == "diagonal":
        return x * factor[:, :, 0, 0][:, None].to(x.dtype)
    # In the precision of the factor: products are what low precision is fast at.
    y = x.to(factor.dtype)
    y = y @ factor[:, 0] if side.cuts == 1 else joined(split(y, side) @ factor, side)
    return y.to(x.dtype)


def _divided(x: Tensor, side: Side, key: str, state: State) -> Tensor:
    """Multiply the last axis of ``[groups, rows, size]`` with the inverse of a damped factor."""
    root = state.get(f"{key}_cholesky")
    if root is None:
        return _along(x, side, state[f"{key}_inverse"])
    parts = torch.cholesky_solve(split(x, side).mT, root.to(x.dtype)).mT
    return joined(parts, side)


def _to_basis(info: BlockInfo, state: State, matrix: Tensor) -> Tensor:
    half = rotated(matrix, info.input, state.get("a_vectors"))
    return rotated(half.mT, info.output, state.get("g_vectors")).mT


def _from_basis(info: BlockInfo, state: State, inner: Tensor) -> Tensor:
    half = _back(inner, info.input, state.get("a_vectors"))
    return _back(half.mT, info.output, state.get("g_vectors")).mT


def _back(x: Tensor, side: Side, vectors: Tensor | None) -> Tensor:
    if vectors is None:
        return x
    if side.cuts == 1:
        return (x.to(vectors.dtype) @ vectors[:, 0].mT).to(x.dtype)
    parts = x.reshape(*x.shape[:-1], side.cuts, side.width).movedim(-2, 1)
    return joined(parts @ vectors.mT.to(x.dtype), side)
