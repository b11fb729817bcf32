"""What the tests of pruning run on two ranks, and likewise in one process."""

import warnings
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from lightning_curvature.pruning import FisherPruner, PruningReport
from lightning_curvature.pruning import exchange as exchanging
from lightning_curvature.pruning.exchange import Columns
from tests.helpers.ranks import world
from tests.pruning.dense import rows_for, small_net


@dataclass
class Pruned:
    """Weights, masks and reports after each event."""

    weights: list[Tensor]
    keep: list[Tensor]
    reports: list[PruningReport]


def own_rows(rows: Tensor, counts: tuple[int, int]) -> Tensor:
    """Return the rows of this rank."""
    rank, ranks = world()
    return rows if ranks == 1 else torch.split(rows, list(counts))[rank]


def pruned(counts: tuple[int, int], **kwargs: Any) -> Pruned:
    """Prune in two events with so many gradients on each rank, in 3 of a tile at most."""
    pruner = FisherPruner(small_net(), **{"damping": 1e-3, **kwargs})
    parameters = pruner.parameters
    outcome = Pruned([], [], [])
    tile = 3 * parameters.total * 8
    with warnings.catch_warnings(), mock.patch.object(exchanging, "_TILE_BYTES", tile):
        warnings.simplefilter("ignore")
        for event, sparsity in enumerate((0.25, 0.45)):
            rows = own_rows(rows_for(parameters, sum(counts), seed=event), counts)
            outcome.reports.append(pruner.prune(sparsity, rows))
            outcome.weights.append(parameters.weights())
            outcome.keep.append(parameters.keep())
    return outcome


def exchanged(
    counts: tuple[int, int], num: int, unit: int, dtype: torch.dtype, permuted: bool
) -> tuple[int, int, Tensor]:
    """Exchange numbered rows; return which columns this rank has, and what it has of them."""
    rank, ranks = world()
    rows = torch.arange(sum(counts) * num).view(-1, num).to(dtype)
    source = None
    if permuted:
        source = torch.arange(num).flip(0)
        source[1] = -1
    columns = Columns(num, unit)
    own = torch.split(rows, list(counts))[rank] if ranks > 1 else rows
    return columns.own.start, columns.own.stop, columns.exchange(own, source)


def gathered(sizes: list[int]) -> Tensor:
    """Gather parts of different lengths that say where they are from."""
    rank, _ = world()
    own = torch.full((sizes[rank], 2), float(rank), dtype=torch.float64)
    return Columns.gather(own, sizes)


def failing(kind: str) -> str:
    """Prune with something wrong on the second rank; return what is raised here."""
    rank, _ = world()
    model = small_net()
    pruner = FisherPruner(model, block_size=8, criterion="magnitude")
    rows: Tensor | None = rows_for(pruner.parameters, 4)
    assert rows is not None
    if kind == "nan" and rank == 1:
        rows[2, 3] = torch.nan
    elif kind == "absent" and rank == 1:
        rows = None
    elif kind == "empty":
        rows = rows[:0]
    elif kind == "shape" and rank == 1:
        rows = rows[:, :7]
    try:
        pruner.prune(0.5, rows)
    except (ValueError, RuntimeError) as error:
        assert not hasattr(model[0], "weight_mask")
        return f"{type(error).__name__}: {error}"
    return ""


def failing_inverse() -> str:
    """Let the inverse fail on the second rank; return what is raised here."""
    rank, _ = world()
    model = small_net()
    pruner = FisherPruner(model, block_size=8)
    broken = mock.Mock(side_effect=RuntimeError("no inverse"))
    name = "lightning_curvature.pruning.event.InverseFisher"
    rows = rows_for(pruner.parameters, 4)
    try:
        if rank == 1:
            with mock.patch(name, broken):
                pruner.prune(0.5, rows)
        else:
            pruner.prune(0.5, rows)
    except RuntimeError as error:
        assert not hasattr(model[0], "weight_mask")
        return str(error)
    return ""


def collected(num_grads: int) -> list[int]:
    """Return the numbers of the batches that this rank looks at."""
    model = small_net()
    pruner = FisherPruner(model, num_grads=num_grads)
    numbers: list[int] = []

    def loss(number: int) -> Tensor:
        numbers.append(number)
        return model(torch.ones(1, 4, 3, 3, dtype=torch.float64)).sum()

    assert len(pruner.collect(loss)) == len(numbers)
    return numbers
