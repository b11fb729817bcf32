"""Tests of lightning_curvature/curvature/kronecker.py against dense matrices in float64."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature.curvature.kronecker import (
    Refreshed,
    State,
    averaged,
    averaged_diagonal,
    basis_of,
    eigen_state,
    factored_inverse_state,
    inverse_shapes,
    multiplied,
    preconditioned,
)
from lightning_curvature.curvature.kronecker_blocks import BlockInfo, Side, find_blocks
from lightning_curvature.curvature.kronecker_sums import BlockSums
from tests.helpers.dense import DenseModel, Head
from tests.helpers.kronecker import (
    block_matrix,
    half_squared,
    matrix_of,
    places,
    state_of,
    sums_of,
    watched_layers,
    window_sums,
)

DOUBLE = torch.float64
EXACT = {"rtol": 1e-9, "atol": 1e-11}


def info_of(output: int, given: int, *, limit: int = 100, groups: int = 1) -> BlockInfo:
    """Return a block of some sides."""
    layer: nn.Module = nn.Linear(given, output, bias=False)
    if groups > 1:
        layer = nn.Conv1d(groups * given, groups * output, 1, groups=groups, bias=False)
    return find_blocks(layer, list(layer.parameters()), max_factor_dim=limit).blocks[""]


def factor(groups: int, side: Side, seed: int, rank: int | None = None) -> Tensor:
    """Draw a factor as it is kept, zeros where the side is filled up."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(
        groups, side.cuts, rank or side.width + 2, side.width, generator=generator, dtype=DOUBLE
    )
    rows[:, -1, :, side.width - (side.filled - side.size) :] = 0
    return rows.mT @ rows


def state(info: BlockInfo, rank: int | None = None) -> State:
    """Draw a state with two positions per example."""
    return {
        "a_factor": factor(info.groups, info.input, 1, rank),
        "g_factor": factor(info.groups, info.output, 2, rank),
        "positions": torch.tensor(2.0, dtype=DOUBLE),
        "mass": torch.tensor(1.0, dtype=DOUBLE),
    }


def whole(part: Tensor, side: Side) -> Tensor:
    """Return a factor of one group as a dense matrix."""
    return torch.block_diag(*part)[: side.size, : side.size]


def factors(info: BlockInfo, kept: State) -> list[tuple[Tensor, Tensor]]:
    """Return dense A / M and G of each group."""
    return [
        (whole(a, info.input) / kept["positions"], whole(g, info.output))
        for a, g in zip(kept["a_factor"], kept["g_factor"], strict=True)
    ]


def eye_like(x: Tensor) -> Tensor:
    """Return the identity."""
    return torch.eye(len(x), dtype=x.dtype)


SIDES = [
    {"output": 5, "given": 7},
    {"output": 5, "given": 7, "limit": 3},
    {"output": 5, "given": 8, "limit": 4},
    {"output": 11, "given": 4, "limit": 1},
    {"output": 3, "given": 4, "groups": 2},
    {"output": 4, "given": 7, "groups": 3, "limit": 3},
]


@pytest.mark.parametrize("sides", SIDES)
def test_products_with_the_block(sides: dict[str, int]) -> None:
    info = info_of(**sides)
    kept = state(info)
    expected = torch.block_diag(*[torch.kron(g, a) for a, g in factors(info, kept)])
    torch.testing.assert_close(block_matrix(info, kept), expected, **EXACT)


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("once", [True, False])
def test_factored_damping(sides: dict[str, int], once: bool) -> None:
    """The formula of the papers, with the mean of the diagonal of the whole factor."""
    info = info_of(**sides)
    kept, mu = state(info), torch.tensor(0.3, dtype=DOUBLE)
    new = factored_inverse_state(info, kept, mu, DOUBLE, once=once)
    assert new.good
    parts = []
    for a, g in factors(info, kept):
        nu_a, nu_g = a.diagonal().mean(), g.diagonal().mean()
        a_damped = (nu_g / nu_a).sqrt() * a + mu.sqrt() * eye_like(a)
        g_damped = (nu_a / nu_g).sqrt() * g + mu.sqrt() * eye_like(g)
        parts.append(torch.kron(g_damped, a_damped).inverse())
    found = matrix_of(info, lambda v: preconditioned(info, {**kept, **new.state}, v, mu))
    torch.testing.assert_close(found, torch.block_diag(*parts), **EXACT)


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("rank", [None, 1])
def test_exact_damping(sides: dict[str, int], rank: int | None) -> None:
    info = info_of(**sides)
    kept, mu = state(info, rank), torch.tensor(0.3, dtype=DOUBLE)
    new = eigen_state(info, kept, DOUBLE, corrected=False)
    assert new.good
    dense = [torch.kron(g, a) for a, g in factors(info, kept)]
    expected = torch.block_diag(*[(c + mu * eye_like(c)).inverse() for c in dense])
    found = matrix_of(info, lambda v: preconditioned(info, {**kept, **new.state}, v, mu))
    torch.testing.assert_close(found, expected, **EXACT)
    # The damping is that of the call.
    other = 2 * mu
    expected = torch.block_diag(*[(c + other * eye_like(c)).inverse() for c in dense])
    found = matrix_of(info, lambda v: preconditioned(info, {**kept, **new.state}, v, other))
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize(("output", "given"), [(1, 4), (4, 1), (1, 1)])
@pytest.mark.parametrize("once", [True, False])
def test_factors_of_one_entry_are_exact(output: int, given: int, once: bool) -> None:
    """All the damping goes to the other factor."""
    info = info_of(output, given)
    kept, mu = state(info), torch.tensor(0.3, dtype=DOUBLE)
    new = factored_inverse_state(info, kept, mu, DOUBLE, once=once)
    ((a, g),) = factors(info, kept)
    dense = torch.kron(g, a)
    found = matrix_of(info, lambda v: preconditioned(info, {**kept, **new.state}, v, mu))
    torch.testing.assert_close(found, (dense + mu * eye_like(dense)).inverse(), **EXACT)


@pytest.mark.parametrize(("output", "given"), [(3, 4), (1, 4), (4, 1), (1, 1)])
@pytest.mark.parametrize("dead", ["a", "g", "both"])
@pytest.mark.parametrize("once", [True, False])
def test_dead_layers(output: int, given: int, dead: str, once: bool) -> None:
    """A layer without inputs or gradients has the inverse I / mu."""
    info = info_of(output, given)
    kept, mu = state(info), torch.tensor(0.3, dtype=DOUBLE)
    for key in ("a", "g") if dead == "both" else (dead,):
        kept[f"{key}_factor"] = torch.zeros_like(kept[f"{key}_factor"])
    new = factored_inverse_state(info, kept, mu, DOUBLE, once=once)
    assert new.good
    v = torch.randn(1, output, given, dtype=DOUBLE)
    torch.testing.assert_close(preconditioned(info, {**kept, **new.state}, v, mu), v / mu)
    new = eigen_state(info, kept, DOUBLE, corrected=True)
    assert new.good
    torch.testing.assert_close(preconditioned(info, {**kept, **new.state}, v, mu), v / mu)


def test_one_dead_group_leaves_the_others() -> None:
    info, mu = info_of(3, 4, groups=2), torch.tensor(0.3, dtype=DOUBLE)
    kept = state(info)
    kept["g_factor"][0] = 0
    new = factored_inverse_state(info, kept, mu, DOUBLE)
    v = torch.randn(2, 3, 4, dtype=DOUBLE)
    found = preconditioned(info, {**kept, **new.state}, v, mu)
    torch.testing.assert_close(found[0], v[0] / mu)
    alive = factored_inverse_state(info, state(info), mu, DOUBLE)
    torch.testing.assert_close(found[1], preconditioned(info, alive.state, v, mu)[1])


@pytest.mark.parametrize("key", ["a_factor", "g_factor"])
@pytest.mark.parametrize("limit", [100, 3, 1])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_factors_that_are_not_finite_are_no_good(key: str, limit: int, value: float) -> None:
    info, mu = info_of(9, 10, limit=limit), torch.tensor(0.3, dtype=DOUBLE)
    kept = state(info)
    kept[key][0, 0, 0, 0] = value
    assert not factored_inverse_state(info, kept, mu, DOUBLE).good
    assert not eigen_state(info, kept, DOUBLE, corrected=False).good


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("in_eigenbasis", [True, False])
def test_shapes_told_in_advance(
    sides: dict[str, int], corrected: bool, in_eigenbasis: bool
) -> None:
    if corrected and not in_eigenbasis:
        return
    info = info_of(**sides)
    kept, mu = state(info), torch.tensor(0.3, dtype=DOUBLE)
    if in_eigenbasis:
        new = eigen_state(info, kept, DOUBLE, corrected=corrected)
    else:
        new = factored_inverse_state(info, kept, mu, DOUBLE)
    shapes = inverse_shapes(info, in_eigenbasis=in_eigenbasis, corrected=corrected)
    assert {key: tuple(x.shape) for key, x in new.state.items()} == shapes
    assert (basis_of(new.state) is None) != in_eigenbasis


# Corrected eigenvalues


def corrected(info: BlockInfo, kept: State) -> State:
    """Return a state with an eigenbasis and corrected eigenvalues."""
    new: Refreshed = eigen_state(info, kept, DOUBLE, corrected=True)
    assert new.good
    return {**kept, **new.state}


@pytest.mark.parametrize("sides", SIDES)
def test_the_first_correction_is_none(sides: dict[str, int]) -> None:
    """It is the eigenvalues themselves, with the weight of what they were made of."""
    info, mu = info_of(**sides), torch.tensor(0.3, dtype=DOUBLE)
    kept = state(info)
    kept["mass"] = torch.tensor(1.95, dtype=DOUBLE)
    new = corrected(info, kept)
    assert new["correction_mass"] == kept["mass"]
    torch.testing.assert_close(block_matrix(info, new), block_matrix(info, kept), **EXACT)
    plain = {**kept, **eigen_state(info, kept, DOUBLE, corrected=False).state}
    v = torch.randn(info.groups, info.output.size, info.input.size, dtype=DOUBLE)
    torch.testing.assert_close(
        preconditioned(info, new, v, mu), preconditioned(info, plain, v, mu), **EXACT
    )


def test_corrected_eigenvalues_are_used() -> None:
    info, mu = info_of(3, 4), torch.tensor(0.3, dtype=DOUBLE)
    new = corrected(info, state(info))
    moments = torch.rand(1, 3, 4, dtype=DOUBLE)
    new["eigenvalue_correction"] = moments
    q = torch.kron(new["g_vectors"][0, 0], new["a_vectors"][0, 0])
    dense = q @ moments.flatten().diag() @ q.T
    torch.testing.assert_close(block_matrix(info, new), dense, **EXACT)
    found = matrix_of(info, lambda v: preconditioned(info, new, v, mu))
    torch.testing.assert_close(found, (dense + mu * eye_like(dense)).inverse(), **EXACT)


@pytest.mark.parametrize("limit", [100, 4, 3, 1])
def test_moments_are_carried_into_a_new_basis(limit: int) -> None:
    """They become the diagonal that the old approximation has there."""
    info = info_of(7, 9, limit=limit)
    old = corrected(info, state(info))
    old["eigenvalue_correction"] = torch.rand_like(old["eigenvalue_correction"])
    moved = {**old, "a_factor": factor(1, info.input, 5), "g_factor": factor(1, info.output, 6)}
    new = corrected(info, moved)

    def dense(kept: State) -> Tensor:
        vectors = []
        for key, side in (("g", info.output), ("a", info.input)):
            q = kept.get(f"{key}_vectors")
            eye = torch.eye(side.filled, dtype=DOUBLE)
            vectors.append(eye if q is None else torch.block_diag(*q[0]))
        return torch.kron(*vectors)

    rotation = dense(new).T @ dense(old)
    approximation = rotation @ old["eigenvalue_correction"].flatten().diag() @ rotation.T
    torch.testing.assert_close(
        new["eigenvalue_correction"].flatten(), approximation.diagonal(), **EXACT
    )
    torch.testing.assert_close(
        new["eigenvalue_correction"].sum(), old["eigenvalue_correction"].sum()
    )
    assert new["correction_mass"] == old["correction_mass"]


def test_moments_in_the_same_basis_stay() -> None:
    """Other signs and another order of the eigenvectors are the same basis."""
    info = info_of(5, 6)
    old = corrected(info, state(info))
    old["eigenvalue_correction"] = torch.rand_like(old["eigenvalue_correction"])
    before = block_matrix(info, old)
    order = {key: torch.randperm(n) for key, n in (("a", 6), ("g", 5))}
    for key, axis in (("a", -1), ("g", -2)):
        signs = torch.where(torch.rand(len(order[key])) < 0.5, -1.0, 1.0).double()
        old[f"{key}_vectors"] = old[f"{key}_vectors"][..., order[key]] * signs
        old["eigenvalue_correction"] = old["eigenvalue_correction"].index_select(axis, order[key])
    torch.testing.assert_close(block_matrix(info, old), before, **EXACT)
    torch.testing.assert_close(block_matrix(info, corrected(info, old)), before, **EXACT)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("limit", [100, 3])
@pytest.mark.parametrize("positions", [(), (2,)])
def test_corrected_blocks_are_nearer_to_the_fisher(
    seed: int, limit: int, positions: tuple[int, ...]
) -> None:
    """Frobenius error to the dense empirical Fisher block, of EK-FAC and of K-FAC."""
    torch.manual_seed(seed)
    layers = [nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)]
    model = nn.Sequential(*layers).double()
    x = torch.randn(8, *positions, 4, dtype=DOUBLE)
    y = torch.randint(3, (8,))

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z if z.dim() == 2 else z.mean(1), y)

    oracle, window = watched_layers(model, loss, "empirical", max_factor_dim=limit)
    first = window_sums(oracle, window, (x, y))
    states = {}
    for name, info in window.parts.blocks.items():
        kept = state_of(first.blocks[name])
        states[name] = {**kept, **eigen_state(info, kept, DOUBLE, corrected=True).state}
    window.bases = {name: basis_of(kept) for name, kept in states.items()}
    second = window_sums(oracle, window, (x, y))
    dense = DenseModel(model)
    grads = torch.stack(
        [dense.gradient((x[i : i + 1],), lambda z, i=i: loss(z, y[i : i + 1])) for i in range(8)]
    )
    fisher = grads.T @ grads / 8
    for name, info in window.parts.blocks.items():
        place = places(window, info)
        block = fisher[place][:, place]
        kfac = block_matrix(info, {k: v for k, v in states[name].items() if "eigen" not in k})
        new = averaged(states[name], second.blocks[name], 0.0, None, DOUBLE)
        ekfac = block_matrix(info, new)
        if limit == 100:  # else rows that fill a side up take part of the moments
            torch.testing.assert_close(ekfac.trace(), block.trace())
        assert (ekfac - block).norm() <= (kfac - block).norm() * (1 + 1e-9)


# Averages


def sums(value: float, squares: float | None = None) -> BlockSums:
    """Return sums of one number."""
    x = torch.full((1, 1, 2, 2), value, dtype=DOUBLE)
    moments = None if squares is None else torch.full((1, 2, 2), squares, dtype=DOUBLE)
    return BlockSums(x, 2 * x, torch.tensor(3 * value, dtype=DOUBLE), moments)


@pytest.mark.parametrize("decay", [0.95, 0.5, 1.0, 0.0])
def test_averages_have_weights_that_sum_to_one(decay: float) -> None:
    values = [1.0, 4.0, 2.0, 7.0]
    kept: State = {}
    for number, value in enumerate(values):
        before = dict(kept)
        new = averaged(kept, sums(value), decay, None, DOUBLE)
        assert kept == before  # not changed
        kept = new
        weights = [decay ** (number - i) for i in range(number + 1)]
        mean = sum(w * v for w, v in zip(weights, values, strict=False)) / sum(weights)
        assert kept["a_factor"][0, 0, 0, 0].item() == pytest.approx(mean, rel=1e-14)
        assert kept["g_factor"][0, 0, 0, 0].item() == pytest.approx(2 * mean, rel=1e-14)
        assert kept["positions"].item() == pytest.approx(3 * mean, rel=1e-14)
        assert kept["mass"].item() == pytest.approx(sum(weights), rel=1e-14)


def test_the_first_observation_counts_fully() -> None:
    """Exactly, also in low precision, where 1 - decay would be rounded."""
    kept = averaged({}, sums(0.1), 0.95, None, DOUBLE)
    assert (kept["a_factor"] == 0.1).all()


@pytest.mark.parametrize("how", ["unusable", "empty"])
def test_nothing_changes(how: str) -> None:
    kept = averaged({}, sums(2.0), 0.95, None, DOUBLE)
    kept |= {
        "eigenvalue_correction": torch.ones(1, 2, 2, dtype=DOUBLE),
        "correction_mass": torch.tensor(1.5, dtype=DOUBLE),
    }
    new = sums(math.nan, 1.0)
    usable = torch.tensor(False)
    if how == "empty":
        new, usable = sums(5.0, 1.0)._replace(positions=torch.zeros((), dtype=DOUBLE)), None
    after = averaged(kept, new, 0.95, usable, DOUBLE)
    assert after.keys() == kept.keys()
    assert all(torch.equal(after[key], kept[key]) for key in kept)


def test_moments_have_a_mass_of_their_own() -> None:
    kept = averaged({}, sums(2.0), 0.5, None, DOUBLE)
    assert "eigenvalue_correction" not in averaged(kept, sums(2.0, 5.0), 0.5, None, DOUBLE)
    kept |= {
        "eigenvalue_correction": torch.ones(1, 2, 2, dtype=DOUBLE),
        "correction_mass": torch.tensor(2.0, dtype=DOUBLE),
    }
    after = averaged(kept, sums(2.0, 5.0), 0.5, None, DOUBLE)
    assert after["correction_mass"] == 2.0
    torch.testing.assert_close(after["eigenvalue_correction"], torch.full((1, 2, 2), 3.0).double())
    again = averaged(after, sums(2.0), 0.5, None, DOUBLE)
    assert again["correction_mass"] == 2.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_in_low_precision(dtype: torch.dtype) -> None:
    kept: State = {}
    for value in (1.0, 2.0, 4.0):
        kept = averaged(kept, sums(value), 1.0, None, dtype)
    assert kept["a_factor"].dtype == dtype
    assert kept["positions"].dtype == DOUBLE
    assert kept["a_factor"].float().mean().item() == pytest.approx(7 / 3, rel=1e-2)


def test_averages_of_a_diagonal() -> None:
    kept: State = {}
    for value in (1.0, 4.0, 2.0):
        kept = averaged_diagonal(kept, torch.full((3,), value, dtype=DOUBLE), 0.5, None)
    expected = (0.25 + 2 + 2) / 1.75
    torch.testing.assert_close(kept["diagonal"], torch.full((3,), expected, dtype=DOUBLE))
    new = averaged_diagonal(
        kept, torch.full_like(kept["diagonal"], math.nan), 0.5, torch.tensor(False)
    )
    assert all(torch.equal(new[key], kept[key]) for key in kept)


# Blocks of models


def exact(model: nn.Module, loss: Any, *batch: Tensor, head: Any = None) -> None:
    """Check all blocks of a model against its dense GGN."""
    window, found = sums_of(model, loss, batch)
    x, *targets = batch
    heads = [Head(lambda z: z, lambda z: loss(z, *targets))] if head is None else [head]
    ggn = DenseModel(model, window.params).ggn((x,), heads)
    assert window.parts.blocks
    for name, info in window.parts.blocks.items():
        place = places(window, info)
        block = block_matrix(info, state_of(found.blocks[name]))
        torch.testing.assert_close(block, ggn[place][:, place], **EXACT)


def test_softmax_of_one_datum() -> None:
    exact(nn.Linear(4, 3).double(), F.cross_entropy, draw(1, 4), torch.tensor([2]))


def test_deep_network_of_one_datum() -> None:
    """With one example and one position nothing is approximated, whatever the activations."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    exact(model.double(), F.cross_entropy, draw(1, 4), torch.tensor([1]))


@pytest.mark.parametrize("shape", [(1, 4), (6, 4), (3, 2, 4)])
@pytest.mark.parametrize("loss", [half_squared, F.mse_loss])
def test_deep_linear_network(shape: tuple[int, ...], loss: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4, bias=False), nn.Linear(4, 2)).double()
    exact(model, loss, draw(*shape), draw(*shape[:-1], 2))


@pytest.mark.parametrize("options", [{}, {"groups": 2, "stride": 2}, {"padding": 1, "dilation": 2}])
def test_convolution_with_squared_error(options: dict[str, int]) -> None:
    model = nn.Conv2d(2, 4, 2, **options).double()  # type: ignore[arg-type]
    x = draw(3, 2, 4, 4)
    exact(model, F.mse_loss, x, draw(*model(x).shape))


def test_embedding_with_squared_error() -> None:
    exact(nn.Embedding(5, 3).double(), F.mse_loss, torch.tensor([[0, 1], [1, 4]]), draw(2, 2, 3))


def test_masked_linear_model() -> None:
    """Examples without a label are left out, the 1 of their bias as well."""
    x = draw(1, 4).expand(5, 4).clone()
    x[1:] = 7.0
    y = torch.tensor([2, -100, -100, -100, -100])
    exact(nn.Linear(4, 3).double(), F.cross_entropy, x, y)


def test_class_weights() -> None:
    """Examples with the same logits: only their inputs have weights."""
    model = nn.Linear(4, 3).double()
    nn.init.zeros_(model.weight)
    weight = torch.tensor([0.2, 1.0, 3.0], dtype=DOUBLE)
    x, y = draw(5, 4), torch.tensor([0, 1, 2, 2, 0])
    exact(model, lambda z, y: F.cross_entropy(z, y, weight), x, y)


def draw(*shape: int) -> Tensor:
    """Draw normal numbers."""
    return torch.randn(shape, dtype=DOUBLE)


def test_products_keep_what_is_not_theirs() -> None:
    """Arguments are not changed in place."""
    info, mu = info_of(5, 7, limit=3), torch.tensor(0.3, dtype=DOUBLE)
    kept = state(info)
    for new in (
        factored_inverse_state(info, kept, mu, DOUBLE).state,
        eigen_state(info, kept, DOUBLE, corrected=True).state,
    ):
        both = {**kept, **new}
        copies = {key: x.clone() for key, x in both.items()}
        v = torch.randn(1, 5, 7, dtype=DOUBLE)
        given = v.clone()
        preconditioned(info, both, v, mu)
        multiplied(info, both, v)
        assert torch.equal(v, given)
        assert all(torch.equal(both[key], copies[key]) for key in both)
