"""Tests of lightning_curvature/optim/displacement.py and zeroth_storage.py."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_curvature.curvature import perturbation
from lightning_curvature.curvature.perturbation import Directions, Piece
from lightning_curvature.optim.displacement import Displacement, Point
from lightning_curvature.optim.zeroth_storage import Storage

SHAPES = ((6, 7), (5,), (), (30, 10), (3, 90), (4,))
RESTORES = ("fused", "inplace", "snapshot")
HALF = (torch.bfloat16, torch.float16)
# A step is theta + eps z, theta - eps z, and back.
EPS = 1e-3


@pytest.fixture(autouse=True)
def small_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut what is large for a test."""
    monkeypatch.setattr(perturbation, "_CHUNK", {"cpu": 64})


def parameters(
    shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: Any = torch.float32, scale: float = 1.0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [(scale * torch.randn(shape, generator=generator)).to(dtype) for shape in shapes]


def make(
    params: Sequence[Tensor],
    restore: Any = "fused",
    half_precision: Any = "stochastic",
    blocks: Sequence[Sequence[int]] | None = None,
    displacing: Callable[[Piece], list[Tensor]] = lambda piece: piece.noise,
    **options: Any,
) -> Displacement:
    directions = Directions(params, range(len(params)), seed=1, **options)
    state: dict[Any, Any] = {p: {} for p in params}
    storage = Storage(directions, restore, half_precision, state)
    moving = Displacement(directions, storage, displacing)
    moving.begin(0, [list(block) for block in blocks or [range(len(params))]])
    return moving


def clones(params: Sequence[Tensor]) -> list[Tensor]:
    return [p.clone() for p in params]


def direction(moving: Displacement, sample: int = 0) -> list[Tensor]:
    return moving.whole(sample, range(len(moving.directions.params)))


def assert_at(
    params: Sequence[Tensor], expected: Sequence[Tensor], atol: float = 0.0, rtol: float = 0.0
) -> None:
    for p, x in zip(params, expected, strict=True):
        torch.testing.assert_close(p, x.to(p.dtype), rtol=rtol, atol=atol)


# Going and returning


@pytest.mark.parametrize("restore", RESTORES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_go_and_home(restore: str, dtype: torch.dtype) -> None:
    params = parameters(dtype=dtype)
    moving, start = make(params, restore), clones(params)
    rounding = 0 if restore == "snapshot" else 10 * torch.finfo(dtype).eps
    for coefficient in (0.5, -0.5, 0.25):
        moving.go(Point(0, coefficient))
        z = direction(moving)
        assert moving.away == Point(0, coefficient)
        expected = [x.double() + coefficient * d.double() for x, d in zip(start, z, strict=True)]
        near = 20 * torch.finfo(dtype).eps
        assert_at(params, expected, atol=near, rtol=near)
    moving.home()
    assert moving.away is None
    assert_at(params, start, atol=rounding, rtol=rounding)
    moving.home()
    assert_at(params, start, atol=rounding, rtol=rounding)


@pytest.mark.parametrize("restore", RESTORES)
def test_another_direction_starts_at_home(restore: str) -> None:
    params = parameters(dtype=torch.float64)
    moving, start = make(params, restore, blocks=[[0, 3, 5], [1, 2, 4]]), clones(params)
    for sample, block in ((0, 0), (1, 0), (1, 1), (0, 1)):
        moving.go(Point(sample, 0.3, block))
        z = direction(moving, sample)
        moved = moving.blocks[block]
        expected = [x + 0.3 * z[i] * (i in moved) for i, x in enumerate(start)]
        assert_at(params, expected, atol=1e-14)
    moving.home()
    assert_at(params, start, atol=1e-14)


@pytest.mark.parametrize("restore", RESTORES)
def test_displacing_along_something_else(restore: str) -> None:
    """A metric, say; and a coefficient that is a tensor."""
    params = parameters(dtype=torch.float64)
    moving, start = (
        make(params, restore, displacing=lambda p: [3 * x for x in p.noise]),
        clones(params),
    )
    z = direction(moving)
    moving.go(Point(0, torch.tensor(0.5, dtype=torch.float64)))
    assert_at(params, [x + 1.5 * d for x, d in zip(start, z, strict=True)], atol=1e-14)
    moving.go(Point(0, torch.tensor(-0.5, dtype=torch.float64)))
    assert_at(params, [x - 1.5 * d for x, d in zip(start, z, strict=True)], atol=1e-14)
    moving.home()
    assert_at(params, start, atol=1e-14)


@pytest.mark.parametrize("restore", RESTORES)
def test_steps_have_their_own_directions(restore: str) -> None:
    params = parameters()
    moving = make(params, restore)
    first = direction(moving)
    moving.step = 1
    assert all(not torch.equal(x, y) for x, y in zip(first, direction(moving), strict=True))


def test_whole_direction_of_masks() -> None:
    params = parameters()
    moving = make(params, masks={3: torch.tensor([2, 7, 299])})
    z = direction(moving)[3].reshape(-1)
    assert z.nonzero().reshape(-1).tolist() == [2, 7, 299]


# Exactness


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
def test_snapshot_is_exact(dtype: torch.dtype) -> None:
    params = parameters(dtype=dtype)
    moving, start = make(params, "snapshot"), clones(params)
    for step in range(10):
        moving.step = step
        moving.go(Point(0, 0.1))
        moving.go(Point(0, -0.1))
        moving.home()
    assert_at(params, start)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("restore", RESTORES)
def test_master_copies_are_exact(restore: str, dtype: torch.dtype) -> None:
    params = parameters(dtype=dtype)
    moving, start = make(params, restore, "master"), clones(params)
    for step in range(10):
        moving.step = step
        moving.go(Point(0, 0.1))
        moving.go(Point(0, -0.1))
        moving.home()
    assert_at(params, start)


def drift(dtype: torch.dtype, cycles: int) -> float:
    """Return the rms deviation after displacements without updates."""
    params = parameters(((200, 100),), dtype, scale=0.02)
    moving, start = make(params), clones(params)
    for step in range(cycles):
        moving.step = step
        moving.go(Point(0, EPS))
        moving.go(Point(0, -EPS))
        moving.home()
    return float((params[0].double() - start[0].double()).square().mean().sqrt())


@pytest.mark.parametrize(
    ("dtype", "once", "often"),
    [
        (torch.float64, 2e-18, 2e-17),
        (torch.float32, 1.2e-9, 1.2e-8),
        (torch.float16, 9.5e-6, 9.5e-5),
        (torch.bfloat16, 7.5e-5, 7.5e-4),
    ],
    ids=["float64", "float32", "float16", "bfloat16"],
)
def test_drift_without_a_copy(
    dtype: torch.dtype, once: float, often: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A random walk, of the size that the official code has for weights of 0.02."""
    monkeypatch.setattr(perturbation, "_CHUNK", {"cpu": 1 << 16})
    assert drift(dtype, 1) == pytest.approx(once, rel=0.25)
    assert drift(dtype, 100) == pytest.approx(often, rel=0.25)


def test_values_changed_by_others() -> None:
    """The values at the beginning of the first displacement are those that come back."""
    params = parameters()
    moving = make(params, "snapshot")
    moving.go(Point(0, 0.1))
    moving.home()
    for p in params:
        p.mul_(2)
    changed = clones(params)
    moving.go(Point(0, 0.1))
    moving.home()
    assert_at(params, changed)


def test_master_copies_of_changed_values() -> None:
    """Digits below half precision are kept where nobody else has changed the parameter."""
    params = parameters(((8,),), torch.bfloat16)
    moving = make(params, half_precision="master")
    (p,), (master,) = params, moving.storage._masters.values()
    master.add_(1e-4 * p.float().abs())
    digits = master.clone()
    p[3] = 7.0
    moving.go(Point(0, 0.1))
    expected = torch.where(torch.arange(8) == 3, 7.0, digits)
    assert torch.equal(moving.storage._masters[0], expected)
    moving.home()
    assert torch.equal(p, expected.to(torch.bfloat16))


# Returning with an update


def visit(
    moving: Displacement, num_samples: int, positions: Sequence[int], block: int = 0
) -> Iterator[tuple[Piece, ...]]:
    with closing(moving.returning(num_samples, positions, block)) as visited:
        yield from visited


@pytest.mark.parametrize("restore", RESTORES)
@pytest.mark.parametrize("away", [None, Point(0, 0.1), Point(1, -0.1), Point(2, 0.1)])
def test_returning(restore: str, away: Point | None) -> None:
    """Every part once, at home, with the noise of all directions."""
    params = parameters(dtype=torch.float64)
    moving, start = make(params, restore), clones(params)
    z = [direction(moving, sample) for sample in range(3)]
    if away is not None:
        moving.go(away)
    visited = [torch.zeros_like(p) for p in params]
    for pieces in visit(moving, 2, range(len(params))):
        assert len(pieces) == 2
        first = pieces[0]
        homes = first.of([start[i] for i in first.positions])
        counts = first.of([visited[i] for i in first.positions])
        for value, home, count in zip(first.values, homes, counts, strict=True):
            torch.testing.assert_close(value, home, rtol=0, atol=1e-14)
            count.add_(1)
        for sample, piece in enumerate(pieces):
            parts = piece.of([z[sample][i] for i in piece.positions])
            assert all(torch.equal(x, y) for x, y in zip(parts, piece.noise, strict=True))
        values = moving.storage.opened(first)
        torch._foreach_add_(values, 1.0)
        moving.storage.commit(first, values, torch.Generator())
    assert moving.away is None
    assert all(bool((count == 1).all()) for count in visited)
    assert_at(params, [x + 1 for x in start], atol=1e-14)


@pytest.mark.parametrize("restore", RESTORES)
def test_returning_by_groups(restore: str) -> None:
    """Groups of one block are visited one after the other; the rest stays away meanwhile."""
    params = parameters(dtype=torch.float64)
    moving, start = make(params, restore), clones(params)
    moving.go(Point(0, 0.1))
    list(visit(moving, 1, [0, 2, 3]))
    assert moving.away is not None
    assert_at([params[i] for i in (0, 2, 3)], [start[i] for i in (0, 2, 3)], atol=1e-14)
    assert not torch.equal(params[1], start[1])
    moving.home()
    assert moving.away is None
    assert_at(params, start, atol=1e-14)


@pytest.mark.parametrize("restore", RESTORES)
def test_returning_to_another_block(restore: str) -> None:
    params = parameters(dtype=torch.float64)
    moving, start = make(params, restore, blocks=[[0, 1, 2], [3, 4, 5]]), clones(params)
    moving.go(Point(0, 0.1, 1))
    list(visit(moving, 1, [0, 1, 2], block=0))
    assert moving.away is None
    assert_at(params, start, atol=1e-14)


def steps(restore: str, half_precision: str, dtype: torch.dtype, **options: Any) -> list[Tensor]:
    """Take a few steps of MeZO with prescribed slopes."""
    params = parameters(dtype=dtype)
    moving = make(params, restore, half_precision, **options)
    for step in range(5):
        moving.begin(step, [list(range(len(params)))])
        moving.go(Point(0, EPS))
        moving.go(Point(0, -EPS))
        generator = torch.Generator().manual_seed(step)
        for (piece,) in visit(moving, 1, range(len(params))):
            values = moving.storage.opened(piece)
            torch._foreach_add_(values, piece.noise, alpha=-0.01 * (step - 1.7))
            moving.storage.commit(piece, values, generator)
    return params


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
@pytest.mark.parametrize("half_precision", ["stochastic", "master", "nearest"])
def test_fused_is_inplace(half_precision: str, dtype: torch.dtype) -> None:
    """The sweep that updates returns with the same operations as one of its own."""
    found, expected = (steps(restore, half_precision, dtype) for restore in RESTORES[:2])
    assert_at(found, expected)


@pytest.mark.parametrize("half_precision", ["stochastic", "master", "nearest"])
@pytest.mark.parametrize("mask", [False, True])
def test_snapshot_takes_the_same_steps(half_precision: str, mask: bool) -> None:
    """Up to the rounding of going and returning."""
    options = {"masks": {3: torch.tensor([1, 7, 90])}} if mask else {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        found = steps("snapshot", half_precision, dtype, **options)
        expected = steps("fused", half_precision, dtype, **options)
        eps = torch.finfo(dtype).eps
        assert_at(found, expected, atol=20 * eps, rtol=20 * eps)
    if mask:
        changed = (found[3] != parameters(dtype=dtype)[3]).reshape(-1).nonzero().reshape(-1)
        assert set(changed.tolist()) <= {1, 7, 90}
        assert len(changed)


@pytest.mark.parametrize("dtype", HALF)
def test_small_updates_of_half_precision(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lost by "nearest"; kept on average, or exactly."""
    monkeypatch.setattr(perturbation, "_CHUNK", {"cpu": 1 << 14})
    found = {}
    for half_precision in ("stochastic", "master", "nearest"):
        params = [torch.ones(60_000, dtype=dtype)]
        moving = make(params, "snapshot", half_precision)
        generator = torch.Generator().manual_seed(1)
        for step in range(20):
            moving.begin(step, [[0]])
            for (piece,) in visit(moving, 1, [0]):
                values = moving.storage.opened(piece)
                assert all(x.dtype == torch.float32 for x in values)
                torch._foreach_add_(values, 1e-5)
                moving.storage.commit(piece, values, generator)
        masters = moving.storage._masters
        found[half_precision] = float((masters[0] if masters else params[0].double()).mean()) - 1
    assert found["nearest"] == 0
    assert found["master"] == pytest.approx(2e-4, rel=1e-2)
    assert found["stochastic"] == pytest.approx(2e-4, rel=0.2)


# Interruptions


class Interrupting:
    """A noise source that raises when it is asked for a parameter for the n-th time."""

    def __init__(self, error: type[BaseException], count: int) -> None:
        self.error = error
        self.count = count

    def __call__(self, step: int, sample: int, index: int, param: Tensor) -> Tensor:
        self.count -= 1
        if self.count == 0:
            raise self.error
        generator = torch.Generator().manual_seed(1000 * step + 100 * sample + index)
        return torch.randn(param.shape, generator=generator, dtype=param.dtype)


@pytest.mark.parametrize("restore", RESTORES)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("count", [1, 2, 4, 6])
def test_interrupted_on_the_way_out(count: int, error: type[BaseException], restore: str) -> None:
    """What has moved goes back."""
    params, source = parameters(dtype=torch.float64), Interrupting(error, count)
    moving, start = make(params, restore, source=source), clones(params)
    with pytest.raises(error):
        moving.go(Point(0, 0.5))
    assert_at(params, start, atol=1e-14)
    assert moving.away is None


@pytest.mark.parametrize("restore", RESTORES)
@pytest.mark.parametrize("mask", [{}, {0: torch.tensor([3, 5]), 3: torch.tensor([3, 290])}])
@pytest.mark.parametrize("count", [7, 8, 10, 12])
def test_interrupted_on_the_way_to_the_other_side(
    count: int, mask: dict[int, Tensor], restore: str
) -> None:
    """The parameters are still where ``away`` says, so that going home is right."""
    params = parameters(dtype=torch.float64)
    source = Interrupting(KeyboardInterrupt, count)
    moving, start = make(params, restore, source=source, masks=mask), clones(params)
    moving.go(Point(0, 0.5))
    there = clones(params)
    with pytest.raises(KeyboardInterrupt):
        moving.go(Point(0, -0.5))
    assert moving.away == Point(0, 0.5)
    assert_at(params, there, atol=1e-14)
    moving.home()
    assert_at(params, start, atol=1e-14)


@pytest.mark.parametrize("restore", RESTORES)
@pytest.mark.parametrize("where", ["consumer", "source"])
@pytest.mark.parametrize("mask", [{}, {0: torch.tensor([3, 5]), 3: torch.tensor([3, 290])}])
@pytest.mark.parametrize("num_samples", [1, 2])
def test_interrupted_while_returning(
    num_samples: int, mask: dict[int, Tensor], where: str, restore: str
) -> None:
    """What was visited keeps its update, the rest goes home without."""
    params = parameters(dtype=torch.float64)
    source = Interrupting(KeyboardInterrupt, -1)
    moving, start = make(params, restore, source=source, masks=mask), clones(params)
    moving.go(Point(0, 0.5))
    if where == "source":
        source.count = 4 * num_samples
    visited: list[Piece] = []

    def update() -> None:
        for pieces in visit(moving, num_samples, range(len(params))):
            values = moving.storage.opened(pieces[0])
            torch._foreach_add_(values, 10.0)
            moving.storage.commit(pieces[0], values, torch.Generator())
            visited.append(pieces[0])
            if where == "consumer" and len(visited) == 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        update()
    assert moving.away is None
    assert visited
    expected = clones(start)
    for piece in visited:
        for position, part in zip(
            piece.positions, piece.of([expected[i] for i in piece.positions]), strict=True
        ):
            if position in mask:
                expected[position].view(-1)[mask[position]] += 10
            else:
                part.add_(10)
    assert_at(params, expected, atol=1e-13)
    moving.home()
    assert_at(params, expected, atol=1e-13)
