"""Two ranks with half the batch each take the same steps as one process with all of it.

By every route, and whatever the flags of ``DDPStrategy``. Which names there are, and how they start
processes, is in test_ddp_launchers.py.
"""

from typing import Any

import pytest
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from tests.helpers.families import every_family
from tests.helpers.optimizer_db import Contract, every_optimizer
from tests.helpers.rank_callbacks import HOOKS, Compressed
from tests.helpers.rank_modules import LayerOfOnePart, UnusedLayer
from tests.helpers.ranks import RankPool
from tests.helpers.two_ranks import (
    ROUTES,
    assert_same_on_all,
    compare,
    deviation,
    fit,
    loop,
)

pytestmark = [pytest.mark.ddp]

FIND_UNUSED = {"find_unused_parameters": True}
# Everything by which unused parameters can be allowed.
ALLOWING: list[dict[str, Any]] = [
    {"route": "strategy", "flags": FIND_UNUSED},
    {"route": "built", "flags": FIND_UNUSED},
    {"route": "ddp_curvature_find_unused_parameters_true"},
    {"route": "ddp_find_unused_parameters_true"},
]


def _name(settings: dict[str, Any]) -> str:
    return "-".join([settings["route"], *settings.get("flags", {})])


@every_optimizer
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.feature("Distributed", "Two ranks equal one process with twice the batch")
def test_every_route(contract: Contract, route: str, ranks: RankPool) -> None:
    first, _, _ = compare(ranks, fit, contract, route=route, max_epochs=2)
    assert first.steps == 10
    if contract.info.asks >= {"directional"}:
        assert first.method == "jvp"


@every_family
@pytest.mark.parametrize("wrapped", [False, True], ids=["network", "wrapper"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.feature("Distributed", "Plain loop with DistributedDataParallel")
def test_plain_loop(contract: Contract, wrapped: bool, accumulate: int, ranks: RankPool) -> None:
    """Attached to the network inside or to the wrapper around it."""
    compare(ranks, loop, contract, wrapped=wrapped, accumulate=accumulate)


@every_family
@pytest.mark.parametrize("settings", ALLOWING, ids=_name)
@pytest.mark.parametrize("make_module", [UnusedLayer, LayerOfOnePart])
@pytest.mark.feature("Distributed", "`find_unused_parameters`")
def test_unused_parameters(
    contract: Contract, make_module: Any, settings: dict[str, Any], ranks: RankPool
) -> None:
    """A layer without a gradient; one that has a gradient because of the other rank only."""
    # Whose steps need all gradients says so where one is gone.
    warns = "no gradient in this step" if contract.info.cls.needs_whole_params else None
    compare(ranks, fit, contract, make_module, max_epochs=2, warns=warns, **settings)


@every_family
@pytest.mark.parametrize("route", ["strategy", "built"])
@pytest.mark.parametrize("schedule", [{0: 1}, {0: 1, 1: 2}], ids=["plain", "accumulation"])
@pytest.mark.feature("Distributed", "`static_graph`")
def test_static_graph(
    contract: Contract, route: str, schedule: dict[int, int], ranks: RankPool
) -> None:
    """Where a gradient taken through DDP's output would keep gradients from being reduced.

    Accumulation from the first batch on is more than torch's DDP can do here.
    """
    compare(
        ranks,
        fit,
        contract,
        route=route,
        flags={"static_graph": True},
        callbacks=[GradientAccumulationScheduler(schedule)],
        max_epochs=2,
    )


@every_family
@pytest.mark.feature("Distributed", "`static_graph`")
def test_static_graph_with_an_unused_layer(contract: Contract, ranks: RankPool) -> None:
    compare(ranks, fit, contract, UnusedLayer, flags={"static_graph": True}, max_epochs=2)


@every_family
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.feature("Distributed", "`gradient_as_bucket_view`")
def test_gradients_are_views_of_buckets(
    contract: Contract, accumulate: int, ranks: RankPool
) -> None:
    flags = {"gradient_as_bucket_view": True}
    compare(ranks, fit, contract, flags=flags, accumulate_grad_batches=accumulate, max_epochs=2)


@every_family
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.feature(
    "Distributed", "DDP communication hooks (fp16_compress_hook, bf16_compress_hook)"
)
def test_compressed_gradients(contract: Contract, hook: str, ranks: RankPool) -> None:
    """All ranks see the same inexact gradient, near enough to the measured slope."""
    settings: dict[str, Any] = {"batch_size": 20, "max_epochs": 10}
    outcomes = ranks.run(fit, contract, callbacks=[Compressed(hook)], **settings)
    assert_same_on_all(outcomes)
    first, exact = outcomes[0], fit(contract, **settings)
    assert first.warnings == []
    if contract.forward_only:  # no gradients, no wrapper
        assert deviation(first, exact) < 1e-12
        return
    assert deviation(first, exact) > 1e-9, "the hook was not used"
    if contract.sampler is None:  # other gradients may lead to other labels
        assert deviation(first, exact) < 0.2
    assert sum(first.losses[-2:]) < sum(first.losses[:2])
