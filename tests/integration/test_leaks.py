"""Two hundred steps take no more memory than fifty, and nothing outlives its fit.

Per step: bytes alive at its end and at its peak, as tests/helpers/storages.py counts them, and the
number of tensors that Python knows. Steps a hundred apart are in the same phase of everything that
comes at intervals (the self-check, reading the counts of failures, bad batches).
"""

import gc
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers.families import every_family
from tests.helpers.modules import MakeOptimizer, StockModule, vectors
from tests.helpers.optimizer_db import Contract
from tests.helpers.plain_loop import Loop, classification, network
from tests.helpers.probing import ROUTES, make_trainer
from tests.helpers.ranks import RankPool
from tests.helpers.resuming import build, for_all_ranks
from tests.helpers.storages import Storages

STEPS, WARM, PERIOD = 200, 50, 100
BAD_EVERY = 10
# A thread of gloo lets go of what it sent a little later; one scalar per step would be 400 bytes.
GLOO_SLACK = 64
# Whoever averages vectors or factors sends some of the size of all parameters and more, which would
# be 40 kB and more.
GLOO_VECTOR_SLACK = 1024

# Nothing has to be learned here.
QUICK = {"num_samples": 1}


def quick(contract: Contract) -> MakeOptimizer:
    """Return what makes the optimizer with as few passes as may be."""
    make: MakeOptimizer = contract.making(**contract.known(QUICK))
    return make


@pytest.fixture(autouse=True)
def small_heap() -> Iterator[None]:
    """Hide from the garbage collector what was there before: collecting takes that long."""
    gc.freeze()
    yield
    gc.unfreeze()


def python_tensors() -> int:
    """Count the tensors that Python knows."""
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


def assert_flat(peaks: list[int], levels: list[int], counts: list[int], slack: int = 0) -> None:
    """Compare steps a period apart, after the warm-up."""
    assert len(peaks) == STEPS
    assert min(peaks) > 0
    for sizes in (levels, peaks):
        early, late = sizes[WARM:PERIOD], sizes[WARM + PERIOD :]
        assert max(abs(a - b) for a, b in zip(early, late, strict=True)) <= slack
    assert max(peaks[PERIOD:]) <= max(peaks[WARM:PERIOD]) + slack
    assert len(counts) == 2
    assert counts[0] == counts[1]


# Plain loop


PLAIN: dict[str, dict[str, Any]] = {
    "jvp": {"directional": "jvp"},
    "fd, accumulation, bad batches": {"directional": "fd", "window": 2, "bad": True},
}


@every_family
@pytest.mark.filterwarnings("ignore:.*skipped:RuntimeWarning")
# Two hundred steps on one batch may end in its minimum, where slopes are but rounding.
@pytest.mark.filterwarnings("ignore:Self-check:RuntimeWarning")
@pytest.mark.parametrize("case", list(PLAIN))
@pytest.mark.feature("Faults", "memory flat over 200 steps")
def test_plain_loop(contract: Contract, case: str) -> None:
    settings = PLAIN[case]
    window, bad = settings.get("window", 1), settings.get("bad", False)
    loop = Loop(network(), quick(contract), directional=settings["directional"])
    (x, y), *_ = classification(1)
    counts = []
    with Storages() as storages:
        for step in range(STEPS):
            loop.optimizer.zero_grad()
            for _ in range(window):
                batch = x.clone()
                if bad and step % BAD_EVERY == 0:
                    batch[0, 0] = torch.nan
                (loop.criterion(loop.model(batch), y.clone()) / window).backward()
            loop.optimizer.step()
            forgotten = weakref.ref(batch)
            del batch
            assert forgotten() is None
            storages.next_step()
            if step in (STEPS - 1 - PERIOD, STEPS - 1):
                counts.append(python_tensors())
    assert_flat(storages.peaks, storages.levels, counts)
    assert loop.is_finite()


def test_a_leak_is_noticed() -> None:
    """What these tests rest on: a tensor kept by anyone, also by a graph, and a larger peak."""
    kept: list[Tensor] = []
    weight = torch.ones(10, requires_grad=True)
    with Storages() as storages:
        for step in range(4):
            graph = (weight * 2).exp().sum()
            if step == 2:
                kept.append(graph)
            if step == 3:
                torch.zeros(1000)
            del graph
            storages.next_step()
    assert storages.levels[0] == storages.levels[1] == 0
    # The result, and what the backward of exp needs.
    assert storages.levels[2] == storages.levels[3] == 4 + 40
    assert storages.peaks[0] == storages.peaks[1]
    assert storages.peaks[3] == 2 * 44 + 4000


# Trainer


class Watch(Callback):
    """Ends a step of the count with each optimizer step.

    Args:
        storages: The count.
    """

    def __init__(self, storages: Storages) -> None:
        self.storages = storages
        self.counts: list[int] = []

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Note where the memory stands after an optimizer step."""
        if trainer.global_step == len(self.storages.peaks):
            return
        self.storages.next_step()
        if trainer.global_step in (STEPS - PERIOD, STEPS):
            self.counts.append(python_tensors())


def batches(windows: int, rows: int, bad: bool) -> DataLoader[Any]:
    """Return batches of which some are not finite."""
    data = vectors(STEPS * windows * rows)
    x = data.tensors[0].clone()
    if bad:
        x[:: BAD_EVERY * windows * rows, 0] = torch.nan
    return DataLoader(TensorDataset(x, data.tensors[1]), batch_size=rows)


def watched_fit(
    contract: Contract, route: str, *, windows: int = 1, bad: bool = False, **settings: Any
) -> tuple[list[int], list[int], list[int]]:
    """Train for some steps and return peaks, levels, and numbers of tensors."""
    settings.update(for_all_ranks(route, settings), use_distributed_sampler=False)
    module = build(contract, contract.known(QUICK))
    storages = Storages()
    watch = Watch(storages)
    trainer = make_trainer(route, callbacks=[watch], accumulate_grad_batches=windows, **settings)
    with storages, warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*skipped", RuntimeWarning)
        trainer.fit(module, batches(windows, 4, bad))
    assert all(p.isfinite().all() for p in module.parameters())
    return storages.peaks, storages.levels, watch.counts


FITS: dict[str, dict[str, Any]] = {
    "strategy, fd": {"route": "strategy", "directional": "fd"},
    "strategy, jvp, accumulation": {"route": "strategy", "directional": "jvp", "windows": 2},
    "callback, fd, accumulation, bad batches": {
        "route": "callback",
        "directional": "fd",
        "windows": 2,
        "bad": True,
    },
}

RANKS: dict[str, dict[str, Any]] = {
    "strategy, jvp": {"route": "strategy", "directional": "jvp"},
    "callback, fd, bad batches": {"route": "callback", "directional": "fd", "bad": True},
}


@every_family
@pytest.mark.parametrize("case", list(FITS))
@pytest.mark.feature("Faults", "memory flat over 200 steps")
def test_trainer(contract: Contract, case: str) -> None:
    assert_flat(*watched_fit(contract, **FITS[case]))


@every_family
@pytest.mark.ddp
@pytest.mark.parametrize("case", list(RANKS))
@pytest.mark.feature("Faults", "memory flat over 200 steps, two ranks")
def test_two_ranks(contract: Contract, case: str, ranks: RankPool) -> None:
    sends_numbers = contract.elementwise or contract.info.asks & {"loss", "directional"}
    small = sends_numbers and contract.info.asks <= {"loss", "directional"}
    slack = GLOO_SLACK if small else GLOO_VECTOR_SLACK
    for measured in ranks.run(watched_fit, contract, **RANKS[case], timeout=240):
        assert_flat(*measured, slack=slack)


# After the fit


class Remembers(StockModule):
    """Remembers its last batch without keeping it, and may fail."""

    fails = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        self.last = weakref.ref(x)
        if self.fails and batch_idx == 2:
            raise ValueError("a bad day")
        return F.cross_entropy(self(x), y)


@every_family
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.feature("Faults", "nothing is kept after a fit")
def test_nothing_is_kept_after_a_fit(contract: Contract, route: str, fails: bool) -> None:
    module = Remembers(build(contract, {}).network, contract.make)
    module.fails = fails
    trainer = make_trainer(route)
    try:
        trainer.fit(module, DataLoader(vectors(), batch_size=4))
    except ValueError:
        assert fails
    optimizer = trainer.optimizers[0]
    assert optimizer.oracle is None
    gc.collect()
    if not fails:  # after an exception Lightning keeps the batch until the Trainer goes
        assert module.last() is None
    left: dict[str, Any] = {
        "trainer": trainer,
        "module": module,
        "strategy": trainer.strategy,
        "optimizer": optimizer,
        "parameter": next(module.parameters()),
        "gradient": next(module.parameters()).grad,
        "batch": module.last(),
        **optimizer.stats,
    }
    watched = {name: weakref.ref(thing) for name, thing in left.items() if thing is not None}
    del left, optimizer, trainer, module
    gc.collect()
    assert [name for name, thing in watched.items() if thing() is not None] == []


@every_family
def test_nothing_is_kept_of_a_plain_loop(contract: Contract) -> None:
    """Also if the user never called ``detach``."""
    loop = Loop(network(), quick(contract))
    loop.train(classification(3))
    things: list[Any] = [loop.model, loop.optimizer, next(loop.model.parameters())]
    watched = [weakref.ref(thing) for thing in things]
    del things, loop
    gc.collect()
    assert [thing() for thing in watched] == [None] * 3
