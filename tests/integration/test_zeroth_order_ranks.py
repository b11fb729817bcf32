"""Optimizers that run no backward on two ranks: one collective, one step, the same bits.

Files under test: strategies/forward_only.py, optim/zeroth_order.py, oracle/ranks.py.
"""

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.helpers.forward_only import maker
from tests.helpers.modules import MakeOptimizer, images, vectors
from tests.helpers.optimizer_db import CONTRACTS, Contract
from tests.helpers.probing import make_trainer, parameters_and_buffers
from tests.helpers.rank_modules import Augmented, Parts
from tests.helpers.ranks import RankPool, world
from tests.helpers.two_ranks import assert_same_on_all, compare, fit, shared_loader, unlike

pytestmark = pytest.mark.ddp

NAMED = {contract.info.name: contract for contract in CONTRACTS}
# The wide tests have HiZOO, whose first evaluation is at the parameters.
MEZO = NAMED["mezo"]
OTHERS = [MEZO, *(NAMED[name] for name in ("zoadam", "zoconservative", "forwardgradient"))]
every_other = pytest.mark.parametrize("contract", OTHERS, ids=[c.info.name for c in OTHERS])


class Wrapping(Callback):
    """Notes what is around the module, and whether there are gradients."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Note."""
        model = trainer.strategy.model
        self.seen["wrapped"] = isinstance(model, DistributedDataParallel)
        self.seen["gradients"] = [p.grad is not None for p in pl_module.parameters()]


@every_other
def test_two_ranks_are_one_process(contract: Contract, ranks: RankPool) -> None:
    """Also in windows with a short one at the end; there is no wrapper and no gradient."""
    for accumulate in (1, 2):
        outcomes = compare(
            ranks,
            fit,
            contract,
            callbacks=[Wrapping()],
            accumulate_grad_batches=accumulate,
            max_epochs=2,
        )
        for outcome in outcomes:
            assert not outcome.seen["wrapped"]
            assert not any(outcome.seen["gradients"])


@pytest.mark.parametrize("route", ["callback", "auto", "built"])
def test_every_route_takes_the_wrapper_away(route: str, ranks: RankPool) -> None:
    first, _, _ = compare(ranks, fit, MEZO, route=route, callbacks=[Wrapping()])
    assert not first.seen["wrapped"]


def test_running_statistics_are_kept_equal(ranks: RankPool) -> None:
    """The wrapper stays where it has something to do."""
    settings = {"data": images(20), "own_seeds": True, "callbacks": [Wrapping()]}
    outcomes = ranks.run(fit, MEZO, Augmented, **settings)
    assert_same_on_all(outcomes)
    for outcome in outcomes:
        assert outcome.seen["wrapped"]
        assert not any(outcome.seen["gradients"])


class Hybrid(Parts):
    """Trains its last layer by gradients."""

    def configure_optimizers(self) -> Any:
        """Make two groups."""
        first, last = self.network[0].parameters(), self.network[2].parameters()
        return self.make_optimizer([{"params": first}, {"params": last, "first_order": True}])


@pytest.mark.parametrize(("name", "accumulate"), [("mezo", 1), ("mezo", 2), ("hizoo", 2)])
def test_groups_with_gradients(name: str, accumulate: int, ranks: RankPool) -> None:
    """They are averaged, by a wrapper that knows of no others."""
    first, second, single = compare(
        ranks,
        fit,
        NAMED[name],
        Hybrid,
        callbacks=[Wrapping()],
        accumulate_grad_batches=accumulate,
        max_epochs=2,
    )
    assert [o.seen["wrapped"] for o in (first, second, single)] == [True, True, False]
    assert first.seen["gradients"] == single.seen["gradients"] == [False, False, True, True]


# What is sent


class Listening(TorchDispatchMode):
    """Hears how many bytes each collective of this process has, also those started in C++."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Note."""
        if func.name() == "c10d::allreduce_":
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            self.heard.append(sum(x.numel() * x.element_size() for x in tensors))
        return func(*args, **(kwargs or {}))


def listen(make: Callable[..., Any], options: dict[str, Any], kind: type[Parts]) -> list[int]:
    """Train four batches and return the bytes of each sum over the ranks."""
    with Listening() as listening:
        trainer = make_trainer(
            "none", devices=2, strategy="ddp_curvature", use_distributed_sampler=False
        )
        module = kind(make(**options))
        data = shared_loader(vectors(32), 8)
        # The wrapper agrees on parameters while it is set up.
        module.on_train_start = listening.heard.clear  # type: ignore[method-assign]
        trainer.fit(module, data)
    return listening.heard


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, 16),
        ({"num_samples": 4}, 64),
        ({"kind": "one-sided"}, 16),
        ({"kind": "hizoo"}, 24),
        ({"kind": "forward gradient"}, 16),
    ],
)
def test_one_collective_per_step(options: dict[str, Any], size: int, ranks: RankPool) -> None:
    """Of a few losses in double precision; nothing grows with the model."""
    first, second = ranks.run(listen, maker, options, Parts)
    assert first == second == [size] * 4


def test_hybrid_groups_send_their_gradients_only(ranks: RankPool) -> None:
    head = sum(p.numel() * p.element_size() for p in nn.Linear(8, 4).parameters())
    first, second = ranks.run(listen, maker, {}, Hybrid)
    assert first == second == [head, 16] * 4


# What differs between the ranks


class Spoils(Parts):
    """The loss of one rank is NaN in the second pass of the third batch."""

    def __init__(self, make_optimizer: MakeOptimizer) -> None:
        super().__init__(make_optimizer)
        self.passes = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss."""
        self.passes += 1
        loss = super().training_step(batch, batch_idx)
        return loss * torch.nan if world()[0] == 1 and self.passes == 6 else loss


def test_nan_on_one_rank_in_the_second_pass(ranks: RankPool) -> None:
    """Nobody steps, and everybody's weights are where they were, to the bit."""
    options = {"restore": "snapshot", "num_samples": 1}
    outcomes = ranks.run(fit, MEZO, Spoils, options=options, callbacks=[Kept()])
    assert_same_on_all(outcomes)
    weights = outcomes[0].seen["weights"]
    still = [unlike(one, other) == [] for one, other in itertools.pairwise(weights)]
    assert still == [False, True, False, False]
    assert outcomes[0].stats["skipped_steps"] == 1


class Kept(Callback):
    """Keeps the weights after every batch."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {"weights": []}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Keep."""
        self.seen["weights"].append(copy.deepcopy(parameters_and_buffers(pl_module)))
