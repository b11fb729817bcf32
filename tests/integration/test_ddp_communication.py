"""What the ranks send each other for an optimizer's questions, besides what DDP sends anyway."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from tests.helpers.families import every_family
from tests.helpers.modules import MakeOptimizer, mlp_module, vectors
from tests.helpers.optimizer_db import Contract
from tests.helpers.probing import make_trainer, the_optimizer
from tests.helpers.ranks import RankPool
from tests.helpers.two_ranks import shared_loader

pytestmark = pytest.mark.ddp

STEPS = 6
BATCH = 8
ROUTES = {"strategy": "ddp_curvature", "auto": "ddp"}
MAX_BYTES = 100
# Numbers of one step: at most three losses in double precision.
ONE_DIRECTION = {"num_samples": 1}
MAX_BYTES_FORWARD = 64

Collective = tuple[str, int]  # name, bytes


class Listening(TorchDispatchMode):
    """Hears the collectives of this process, also those that DDP starts in C++."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[Collective] = []

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "c10d":
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            size = sum(x.numel() * x.element_size() for x in tensors)
            self.heard.append((func.name(), size))
        return func(*args, **(kwargs or {}))


@dataclass
class Step:
    """What was sent in one optimizer step, and whether the optimizer announced a question."""

    sent: Counter[Collective]
    asked: bool


class Steps(Callback):
    """Cuts what is heard into optimizer steps."""

    def __init__(self, listening: Listening) -> None:
        self.listening = listening
        self.steps: list[Step] = []
        self._asked = False

    @override
    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Forget what the set-up sent."""
        self.listening.heard.clear()

    @override
    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
        """Note whether the coming step will ask."""
        optimizer = the_optimizer(module)
        self._asked = bool(getattr(optimizer, "asks", ())) and (
            # Layers are watched on all steps, and asked about on some.
            any(map(optimizer._due, optimizer.intervals))
            if optimizer.asks == {"layers"}
            else optimizer.wants_record()
        )

    @override
    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
        """End a step where one was taken."""
        if trainer.global_step > len(self.steps):
            self.steps.append(Step(Counter(self.listening.heard), self._asked))
            self.listening.heard.clear()


def listen(make_optimizer: MakeOptimizer, strategy: str, accumulate: int) -> list[Step]:
    """Train and return what this rank took part in, step by step."""
    with Listening() as listening:
        steps = Steps(listening)
        trainer = make_trainer(
            "none",
            devices=2,
            strategy=strategy,
            callbacks=[steps],
            accumulate_grad_batches=accumulate,
            use_distributed_sampler=False,
        )
        torch.manual_seed(0)
        module = mlp_module(make_optimizer)
        data = vectors(STEPS * accumulate * BATCH)
        trainer.fit(module, shared_loader(data, BATCH))
    return steps.steps


def beyond_ddp(
    ranks: RankPool,
    make_optimizer: MakeOptimizer,
    route: str,
    accumulate: int = 1,
    *,
    forward_only: bool = False,
) -> list[tuple[list[Collective], bool]]:
    """Return what each step sent that AdamW's did not, the same on both ranks, and who asked."""
    own, other = ranks.run(listen, make_optimizer, ROUTES[route], accumulate)
    assert own == other
    plain, _ = ranks.run(listen, torch.optim.AdamW, "ddp", accumulate)
    assert len(own) == len(plain) == STEPS
    assert all(sum(step.sent.values()) >= 1 for step in plain), "the gradient was not heard"
    found = []
    for step, rival in zip(own, plain, strict=True):
        unsent = [name for name, _ in (rival.sent - step.sent).elements()]
        if forward_only:  # no gradient, and no wrapper that would agree on its buckets at first
            assert [name for name in unsent if name != "c10d::broadcast_"] == ["c10d::allreduce_"]
        else:
            assert not unsent
        found.append((list((step.sent - rival.sent).elements()), step.asked))
    return found


def max_collectives(contract: Contract) -> int:
    """Return how many collectives a step may cost.

    What is averaged over two directions and the new loss are two, of less than 100 bytes in all.
    K-FAC averages its factors, too: half of each symmetric matrix, 4 (n^2 + n) / 2 bytes of one of
    n rows in float32, on the steps of ``factor_update_interval``. Where ``inverse_sharding`` is not
    "none" there is one more: the inverses, as large as the factors.
    """
    return 3 if "layers" in contract.info.asks and contract.runs_again else 2


def check(steps: list[tuple[list[Collective], bool]], contract: Contract) -> None:
    """Assert that steps send little where they ask, and nothing where they do not."""
    if contract.info.cls.needs_whole_params:  # the sum of inner products, and its part of the step
        (num_grads,) = {contract.options["num_grads"]}
        for number, (sent, _) in enumerate(steps):
            if number == 0:  # whether it fits, and whether the ranks have the same gradient
                sent.remove(("c10d::allreduce_", 4))
                sent.remove(("c10d::allgather_", 24))
            assert sent[0] == ("c10d::allreduce_", 8 * num_grads)
            assert [name for name, _ in sent[1:]] == ["c10d::allgather_"]
        return
    for number, (sent, asked) in enumerate(steps):
        assert asked or not sent
        assert all(name == "c10d::allreduce_" for name, _ in sent)
        if contract.forward_only:
            assert len(sent) == 1
            assert sent[0][1] <= MAX_BYTES_FORWARD
            continue
        # Before the first answer the ranks agree once whether a loss function was seen.
        assert len(sent) <= max_collectives(contract) + (number == 0)
        if contract.info.asks <= {"loss", "directional"}:
            assert sum(size for _, size in sent) < MAX_BYTES
        elif contract.runs_again:
            # All but the largest, which has the factors.
            assert sum(sorted(size for _, size in sent)[:-1]) < MAX_BYTES
    assert any(asked for _, asked in steps) == bool(contract.info.asks)
    assert any(sent for sent, _ in steps) == bool(contract.info.asks)


@every_family
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.feature("Distributed", "Communication: at most 2 collectives per step, K-FAC 3")
def test_questions_cost_few_small_collectives(
    contract: Contract, route: str, ranks: RankPool
) -> None:
    make = contract.making(**contract.known(ONE_DIRECTION))
    check(beyond_ddp(ranks, make, route, forward_only=contract.forward_only), contract)


@every_family
@pytest.mark.feature("Distributed", "Communication: at most 2 collectives per step, K-FAC 3")
def test_accumulation_costs_no_more(contract: Contract, ranks: RankPool) -> None:
    make = contract.making(**contract.known(ONE_DIRECTION))
    steps = beyond_ddp(ranks, make, "strategy", accumulate=3, forward_only=contract.forward_only)
    check(steps, contract)


@every_family
@pytest.mark.feature("Distributed", "Communication: none on steps that ask nothing")
def test_steps_that_ask_nothing_send_nothing(contract: Contract, ranks: RankPool) -> None:
    intervals = dict.fromkeys(contract.intervals, 3)
    options: dict[str, Any] = {**contract.known(ONE_DIRECTION), **intervals}
    if contract.takes("factor_warmup"):
        # It adapts its damping at the end of an interval, not where it starts.
        options |= {"factor_warmup": 0, "damping_algorithm": "fixed"}
    make = contract.making(**options)
    steps = beyond_ddp(ranks, make, "strategy", forward_only=contract.forward_only)
    check(steps, contract)
    if intervals:
        assert [asked for _, asked in steps] == [True, False, False] * (STEPS // 3)
