"""K-FAC and EK-FAC on two ranks: who inverts what, what is sent, and that no number changes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_curvature.optim.kronecker import KroneckerOptimizer
from tests.helpers.modules import CLASSES, MakeOptimizer
from tests.helpers.optimizer_db import CONTRACTS, Contract
from tests.helpers.rank_modules import LayerOfOnePart, Parts, UnusedLayer
from tests.helpers.ranks import RankPool
from tests.helpers.two_ranks import Outcome, assert_same_on_all, compare, deviation, fit

pytestmark = [pytest.mark.ddp]

KFAC, EKFAC = (
    next(contract for contract in CONTRACTS if contract.info.name == name)
    for name in ("kfac", "ekfac")
)
BOTH = pytest.mark.parametrize("contract", [KFAC, EKFAC], ids=["kfac", "ekfac"])
# Every sharding with every kind of inverse.
SHARDED: list[Any] = [
    (KFAC, {"inverse_sharding": "compute"}),
    (KFAC, {"inverse_sharding": "memory"}),
    (KFAC, {"inverse_sharding": "compute", "damping_method": "exact"}),
    (KFAC, {"inverse_sharding": "memory", "damping_method": "exact"}),
    (EKFAC, {"inverse_sharding": "compute"}),
]
BLOCKS = ["network.0", "network.2"]
FIND_UNUSED = {"find_unused_parameters": True}


def _half(size: int) -> int:
    return size * (size + 1) // 2


# Inputs with a one for the bias, and outputs, of both layers of `small_network`.
HALVES = _half(6) + _half(8) + _half(9) + _half(CLASSES)
WEIGHTS = 6 * 8 + 9 * CLASSES


class Watching(Callback):
    """Notes which blocks are inverted, and how many numbers are sent at once, step by step."""

    def __init__(self, failing: str | None = None) -> None:
        self.failing = failing
        self.seen: dict[str, Any] = {"inverted": [], "sent": [], "kept": []}
        self._inverted: list[str] = []
        self._sent: list[int] = []

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch the optimizer and its oracle."""
        optimizer: Any = trainer.optimizers[0]
        invert, mean = optimizer._refreshed_block, optimizer.oracle._mean

        def inverted(info: Any, *args: Any) -> Any:
            self._inverted.append(info.name)
            answer = invert(info, *args)
            bad = info.name == self.failing and len(self.seen["sent"]) in (0, 1)
            return answer._replace(good=torch.tensor(False)) if bad else answer

        def sent(packed: Tensor) -> Tensor:
            self._sent.append(packed.numel())
            return mean(packed)

        optimizer._refreshed_block = inverted
        if mean is not None:
            optimizer.oracle._mean = sent

    @override
    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """End a step."""
        self.seen["inverted"].append(self._inverted)
        self.seen["sent"].append(self._sent)
        self._inverted, self._sent = [], []
        optimizer = trainer.optimizers[0]
        assert isinstance(optimizer, KroneckerOptimizer)
        self.seen["kept"] = [n for n in BLOCKS if not optimizer._lacks_inverse(n)]


def run(pool: RankPool, contract: Contract, **arguments: Any) -> list[Outcome]:
    """Fit on two ranks."""
    return pool.run(fit, contract, Parts, callbacks=[Watching()], **arguments)


# Shares


@pytest.mark.parametrize(("contract", "options"), SHARDED)
def test_shares_change_no_number(
    contract: Contract, options: dict[str, Any], ranks: RankPool
) -> None:
    """Bit for bit the same weights on both ranks, and those of ranks that all invert everything."""
    first, second = run(ranks, contract, options=options, max_epochs=2)
    assert torch.equal(first.weights, second.weights)
    assert first.warnings == second.warnings == []
    alone = {**options, "inverse_sharding": "none"}
    whole = fit(contract, Parts, options=alone, max_epochs=2)
    assert deviation(first, whole) <= 1e-6 * whole.weights.abs().max()


@pytest.mark.parametrize("sharding", ["none", "compute", "memory"])
def test_each_rank_inverts_its_own_blocks(sharding: str, ranks: RankPool) -> None:
    """The larger block on the first rank; with "memory" inverses stay there."""
    outcomes = run(ranks, KFAC, options={"inverse_sharding": sharding})
    own = [BLOCKS, BLOCKS] if sharding == "none" else [BLOCKS[1:], BLOCKS[:1]]
    for outcome, blocks in zip(outcomes, own, strict=True):
        steps = outcome.seen["inverted"]
        # Two steps of warm-up, then every second.
        assert steps == [blocks, blocks, blocks, [], blocks]
        assert outcome.seen["kept"] == (blocks if sharding == "memory" else BLOCKS)


@pytest.mark.parametrize("sharding", ["none", "compute", "memory"])
def test_halves_of_symmetric_matrices_are_sent(sharding: str, ranks: RankPool) -> None:
    """Factors, inverses after each refresh or preconditioned gradients at every step."""
    first, second = run(ranks, KFAC, options={"inverse_sharding": sharding})
    assert first.seen["sent"] == second.seen["sent"]
    # M of each block; whether it was seen, whether it was bypassed.
    factors = HALVES + 3 * len(BLOCKS)
    for number, sent in enumerate(first.seen["sent"]):
        refreshed = number != 3
        expected = [factors]
        if sharding == "compute" and refreshed:
            expected += [HALVES + len(BLOCKS)]
        if sharding == "memory":
            expected += [len(BLOCKS)] * refreshed + [WEIGHTS]
        large = [size for size in sent if size >= WEIGHTS or size == len(BLOCKS)]
        assert large == expected
        assert len(sent) <= len(expected) + 2 + (number == 0)


@pytest.mark.parametrize("sharding", ["compute", "memory"])
@pytest.mark.parametrize("block", BLOCKS)
def test_a_failed_inversion_is_known_to_all_ranks(
    block: str, sharding: str, ranks: RankPool
) -> None:
    """All try again together, though the block is that of one rank; nobody waits in vain."""
    options = {"inverse_sharding": sharding, "factor_warmup": 0, "inverse_update_interval": 4}
    outcomes = ranks.run(
        fit, KFAC, Parts, options=options, callbacks=[Watching(failing=block)], timeout=30.0
    )
    first, second = outcomes
    assert torch.equal(first.weights, second.weights)
    for outcome in outcomes:
        assert [bool(names) for names in outcome.seen["inverted"]] == [True] * 3 + [False, True]
        (text,) = outcome.warnings
        assert block in text
        assert float(outcome.stats["inverse_failures"]) == 2


# Ranks that see different things


class Bypassing(Parts):
    """Uses the weights of the first layer without calling it."""

    def part_loss(self, x: Tensor, y: Tensor, part: int, batch_idx: int) -> Tensor:
        """Compute the same by hand."""
        first, activation, second = self.network
        hidden = F.linear(x, first.weight, first.bias)
        return F.cross_entropy(second(activation(hidden)), y)


@BOTH
@pytest.mark.parametrize("make_module", [UnusedLayer, LayerOfOnePart, Bypassing])
def test_ranks_equal_one_process(contract: Contract, make_module: Any, ranks: RankPool) -> None:
    """A layer nobody calls, one that one rank calls, and weights used without their layer."""
    first, _, single = compare(
        ranks, fit, contract, make_module, within=1e-9, flags=FIND_UNUSED, max_epochs=2
    )
    own = [outcome.state["curvature"] for outcome in (first, single)]
    assert own[0]["blocks"].keys() == own[1]["blocks"].keys()
    assert own[0]["diagonals"].keys() == own[1]["diagonals"].keys()
    assert own[0]["bypassed"] == own[1]["bypassed"]
    assert bool(own[0]["diagonals"]) == (make_module is Bypassing)
    assert "unused" not in own[0]["blocks"]


class UnusedFallback(Parts):
    """A bare parameter that only the second part uses, in the first two batches."""

    def __init__(self, make_optimizer: MakeOptimizer) -> None:
        super().__init__(make_optimizer)
        self.scale = torch.nn.Parameter(torch.ones(5))
        self.never = torch.nn.Parameter(torch.ones(5))

    def part_loss(self, x: Tensor, y: Tensor, part: int, batch_idx: int) -> Tensor:
        """Scale the second part."""
        return super().part_loss(x * self.scale if part and batch_idx < 2 else x, y, part, 0)


@BOTH
def test_diagonals_nobody_sees_stay_as_they_are(contract: Contract, ranks: RankPool) -> None:
    first, *_ = compare(ranks, fit, contract, UnusedFallback, within=1e-9, flags=FIND_UNUSED)
    ((number, entry),) = first.state["curvature"]["diagonals"].items()
    assert number == "0"
    assert float(entry["mass"]) == 2


class TwoLosses(Parts):
    """Two heads on one trunk, whose targets are missing in different rows."""

    def part_loss(self, x: Tensor, y: Tensor, part: int, batch_idx: int) -> Tensor:
        """Return the sum of two losses."""
        missing = torch.where(torch.arange(len(y)) == 0, torch.full_like(y, -100), y)
        return super().part_loss(x, y, part, batch_idx) + F.cross_entropy(
            self(x.flip(0)), missing, ignore_index=-100
        )


def test_each_call_has_the_weights_of_its_own_losses(ranks: RankPool) -> None:
    """With several losses, and calls of a layer that only one of them depends on."""
    first, *_ = compare(ranks, fit, KFAC, TwoLosses, within=1e-9, max_epochs=2)
    positions = first.state["curvature"]["blocks"]["network.0"]["positions"]
    # Each loss has a weight of one in all, as one call of the layer is its own.
    torch.testing.assert_close(positions, torch.full_like(positions, 2.0))


@BOTH
def test_the_same_on_both_ranks_with_drawn_labels(contract: Contract, ranks: RankPool) -> None:
    """Each rank draws its own labels; what comes of them is averaged."""
    outcomes = ranks.run(fit, contract, Parts, options={"fisher_type": "mc"}, max_epochs=2)
    assert_same_on_all(outcomes)
