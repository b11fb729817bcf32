"""K steps, a checkpoint and k steps are 2k steps, bit for bit: two ranks.

One device: test_resume.py, which also says how. Files under test: optim/base.py, strategies/.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.families import every_family
from tests.helpers.optimizer_db import Contract, identical, same_on_all_ranks
from tests.helpers.ranks import RankPool
from tests.helpers.resuming import BATCHES, Run, run, saver

pytestmark = [
    pytest.mark.ddp,
    pytest.mark.filterwarnings(
        "ignore:Be aware that when using `ckpt_path`, callbacks used to create:UserWarning"
    ),
]

ROUTES = ("strategy", "callback")
# Batch before which the run is interrupted, right after it was saved.
STOPS = {"epoch": BATCHES, "steps": 3}


def trained(
    contract: Contract, options: dict[str, Any], save: str, path: Path | None, **settings: Any
) -> Run:
    """Train on this rank; save as `saver` does if there is a path to save to."""
    callbacks = [] if path is None else [saver(save, path, 3)]
    return run(contract, options, callbacks=callbacks, **settings)


def assert_same_everywhere(results: list[Run]) -> Run:
    """Check that the ranks took the same steps, and return what the first left behind."""
    first, second = (
        replace(
            result,
            state=same_on_all_ranks(result.state),
            restored=result.restored and same_on_all_ranks(result.restored),
        )
        for result in results
    )
    for what in ("weights", "state", "steps", "rates", "restored"):
        assert identical(getattr(first, what), getattr(second, what)), what
    assert first.losses != second.losses, "the ranks saw the same data"
    return results[0]


@every_family
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(
            "epoch", marks=pytest.mark.feature("Resume", "two ranks, at the end of an epoch")
        ),
        pytest.param(
            "steps", marks=pytest.mark.feature("Resume", "two ranks, in the middle of an epoch")
        ),
    ],
)
def test_resume(contract: Contract, kind: str, route: str, ranks: RankPool, tmp_path: Path) -> None:
    given = contract.rich
    path = tmp_path / "saved" / "part.ckpt"
    wholes = ranks.run(trained, contract, given, kind, None, route=route)
    parts = ranks.run(trained, contract, given, kind, path, route=route, stop_before=STOPS[kind])
    resumed = ranks.run(
        trained, contract, {}, kind, None, route=route, seed=99, ckpt_path=path, weights_only=True
    )
    for results in (wholes, parts, resumed):
        assert_same_everywhere(results)
    for whole, part, rest in zip(wholes, parts, resumed, strict=True):
        assert part.losses + rest.losses == whole.losses
        for what in ("weights", "state", "stats", "steps"):
            assert identical(getattr(rest, what), getattr(whole, what)), what
    restored, saved = (same_on_all_ranks(x) for x in (resumed[1].restored, parts[0].saved))
    assert identical(restored, saved), "what rank 0 saved is for all ranks"


@every_family
@pytest.mark.feature("Resume", "two ranks, accumulated gradients")
def test_resume_with_accumulation(contract: Contract, ranks: RankPool, tmp_path: Path) -> None:
    path = tmp_path / "saved" / "part.ckpt"
    settings: dict[str, Any] = {"accumulate_grad_batches": 2}
    wholes = ranks.run(trained, contract, {}, "steps", None, **settings)
    # The third step is the ragged last window of the epoch.
    ranks.run(trained, contract, {}, "steps", path, stop_before=BATCHES, **settings)
    resumed = ranks.run(
        trained, contract, {}, "steps", None, seed=99, ckpt_path=path, weights_only=True, **settings
    )
    whole, rest = assert_same_everywhere(wholes), assert_same_everywhere(resumed)
    assert whole.steps == rest.steps == 6
    for what in ("weights", "state", "stats"):
        assert identical(getattr(rest, what), getattr(whole, what)), what


@every_family
@pytest.mark.feature("Resume", "saved on two ranks, resumed on one, and the reverse")
@pytest.mark.parametrize("first", ["two", "one"])
def test_resume_on_another_number_of_ranks(
    contract: Contract, first: str, ranks: RankPool, tmp_path: Path
) -> None:
    """The batches are the same as a whole, so the steps are, but for the order of sums."""
    contract = contract.exactly()
    path = tmp_path / "saved" / "part.ckpt"
    given = contract.rich
    settings: dict[str, Any] = {"precision": "64-true", "directional": "jvp"}
    whole = trained(contract, given, "steps", None, **settings)
    if first == "two":
        ranks.run(trained, contract, given, "steps", path, stop_before=3, **settings)
        resumed = trained(contract, {}, "steps", None, seed=99, ckpt_path=path, **settings)
    else:
        trained(contract, given, "steps", path, stop_before=3, **settings)
        resumed = assert_same_everywhere(
            ranks.run(trained, contract, {}, "steps", None, seed=99, ckpt_path=path, **settings)
        )
    assert resumed.steps == whole.steps
    # So few examples determine a part of EK-FAC's basis only: rounding decides about the rest.
    near = {"rtol": 1e-10, "atol": 1e-12 if contract.info.name != "ekfac" else 1e-3}
    for name, tensor in whole.weights.items():
        torch.testing.assert_close(resumed.weights[name], tensor, **near)
    for name, value in whole.state["curvature"]["scalars"].items():
        again = resumed.state["curvature"]["scalars"][name]
        torch.testing.assert_close(again, value, **near)
