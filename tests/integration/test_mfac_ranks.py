"""MFAC on two ranks: one window for both, what is sent, and checkpoints of one and two ranks."""

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_curvature import MFAC, join_window_shards
from lightning_curvature.curvature import window_memory
from tests.helpers.mfac_steps import Row, draw, start, step, trained, window_of
from tests.helpers.modules import mlp_module, vectors
from tests.helpers.optimizer_db import CONTRACTS, identical
from tests.helpers.probing import make_trainer
from tests.helpers.rank_modules import Parts, UnusedLayer
from tests.helpers.ranks import RankPool
from tests.helpers.two_ranks import compare, failure, fit, shared_loader

pytestmark = [pytest.mark.ddp]

CONTRACT = next(contract for contract in CONTRACTS if contract.info.name == "mfac")
# An odd number of entries, which two ranks cannot share evenly.
ENTRIES, SHARE = 11, 6
EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.6, "l2_reg": 0.2, "weight_decay": 0.1},
    "not in the window": {"l2_reg": 0.2, "l2_in_window": False, "momentum": 0.3},
    "count": {"window_normalization": "count"},
    "one gradient": {"num_grads": 1},
    "half": {"row_dtype": "bfloat16"},
    "a window each": {"shard_window": False},
}


class Listening(TorchDispatchMode):
    """Hears which collective sends how many numbers of which dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[tuple[str, torch.dtype, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Note."""
        name = func.name()
        if name.startswith("c10d::"):
            sent = tree_leaves(args[1 if "allgather" in name else 0])
            kind = name.removeprefix("c10d::")
            self.heard += [(kind, x.dtype, x.numel()) for x in sent if isinstance(x, Tensor)]
        return func(*args, **(kwargs or {}))


# What the ranks do


def steps(
    rows: Sequence[Row],
    options: dict[str, Any],
    params: list[nn.Parameter] | None = None,
    saved: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Take a step per row, all ranks with the same gradients, as after they were averaged."""
    params = start() if params is None else params
    optimizer = MFAC(params, **{"lr": 0.3, "num_grads": 4, "damping": 0.05, **options})
    if saved is not None:
        optimizer.load_state_dict(saved)
    sent = []
    for row in rows:
        with Listening() as listening:
            step(optimizer, params, row)
        sent.append(listening.heard)
    window = optimizer._window
    assert window is not None
    with Listening() as listening:
        state = copy.deepcopy(optimizer.state_dict())
    return {
        "params": [nn.Parameter(p.detach().clone()) for p in params],
        "state": state,
        "stats": dict(optimizer.stats),
        "sent": sent,
        "gathered": listening.heard,
        "columns": window.window.num_columns,
        "gram": window.window.gram.clone(),
        "nbytes": window.window.nbytes,
    }


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Assert that two ranks have the same bits, but for their parts of the window."""
    for key in ("params", "gram", "stats", "sent", "columns"):
        assert identical(one[key], other[key]), key
    assert identical(one["state"]["state"], other["state"]["state"])
    assert identical(one["state"]["curvature"]["scalars"], other["state"]["curvature"]["scalars"])


def window(outcome: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = outcome["state"]["curvature"]["window"]
    return found


# One window


@pytest.mark.parametrize("setting", list(SETTINGS))
def test_ranks_equal_one_process(setting: str, ranks: RankPool) -> None:
    rows, options = draw(9), SETTINGS[setting]
    first, second = ranks.run(steps, rows, options)
    same(first, second)
    alone = steps(rows, options)
    torch.testing.assert_close(first["params"], alone["params"], **EXACT)
    saved, expected = window(first), window(alone)
    assert saved.keys() == expected.keys()
    close = EXACT if setting != "half" else {"rtol": 0.0, "atol": 0.0}
    torch.testing.assert_close(saved["rows"], expected["rows"], **close)
    assert torch.equal(saved["scales"], expected["scales"])
    torch.testing.assert_close(saved["gram"], expected["gram"], **EXACT)


def test_each_rank_keeps_its_columns(ranks: RankPool) -> None:
    """Half of the memory, and less than that to save."""
    rows = draw(5)
    outcomes = ranks.run(steps, rows, {"gather_state": False})
    alone = steps(rows, {})
    assert alone["nbytes"] == 4 * ENTRIES * 8
    for outcome, columns in zip(outcomes, ([0, SHARE], [SHARE, ENTRIES]), strict=True):
        assert outcome["columns"] == SHARE
        assert outcome["nbytes"] == 4 * SHARE * 8
        assert window(outcome)["columns"] == columns
        torch.testing.assert_close(
            window(outcome)["rows"], window(alone)["rows"][:, slice(*columns)], **EXACT
        )
        assert outcome["gathered"] == []


@pytest.mark.parametrize("setting", ["plain", "momentum", "one gradient", "half"])
def test_what_is_sent(setting: str, ranks: RankPool) -> None:
    """The products in float64, and the direction."""
    options = SETTINGS[setting]
    m = options.get("num_grads", 4)
    for outcome in ranks.run(steps, draw(6), options):
        expected = [("allreduce_", torch.float64, m), ("allgather_", torch.float64, SHARE)]
        # Before the first one the ranks compare whether it fits, and their gradients.
        first, *others = outcome["sent"]
        assert [first[-2:], *others] == [expected] * 6
        # A state is gathered row by row.
        assert [numbers for *_, numbers in outcome["gathered"]] == [SHARE] * m


def test_nothing_is_sent_if_every_rank_has_a_window(ranks: RankPool) -> None:
    for outcome in ranks.run(steps, draw(6), SETTINGS["a window each"]):
        assert outcome["sent"] == [[]] * 6
        assert outcome["gathered"] == []
        assert outcome["columns"] == ENTRIES


@pytest.mark.parametrize("shapes", [((1,),), ((), (2,))], ids=["one column", "three columns"])
def test_few_columns(shapes: Any, ranks: RankPool) -> None:
    """The second rank may have none at all."""
    rows = draw(6, *shapes)
    first, second = ranks.run(steps, rows, {"momentum": 0.5}, start(*shapes))
    same(first, second)
    alone = steps(rows, {"momentum": 0.5}, start(*shapes))
    torch.testing.assert_close(first["params"], alone["params"], **EXACT)
    torch.testing.assert_close(window(first)["rows"], window(alone)["rows"], **EXACT)


def sparse_start() -> list[nn.Parameter]:
    params = start()
    with torch.no_grad():
        params[0][1] = 0.0
        params[1][0] = 0.0
    return params


def test_sparse(ranks: RankPool) -> None:
    rows, options = draw(6), {"sparse": True, "momentum": 0.5}
    first, second = ranks.run(steps, rows, options, sparse_start())
    same(first, second)
    assert first["columns"] == 4
    alone = steps(rows, options, sparse_start())
    torch.testing.assert_close(first["params"], alone["params"], **EXACT)
    assert not any(p[q == 0].any() for p, q in zip(first["params"], sparse_start(), strict=True))


@pytest.mark.parametrize("sparse", [False, True])
def test_a_parameter_that_is_freed_later(sparse: bool, ranks: RankPool) -> None:
    """The columns are dealt out anew."""
    rows = draw(8)
    late: list[Row] = [[None, *row[1:]] for row in rows[:5]]
    options = {"momentum": 0.6, "sparse": sparse}
    mixed = [*late, *rows[5:]]
    first, second = ranks.run(steps, mixed, options, sparse_start())
    same(first, second)
    assert first["columns"] == (4 if sparse else SHARE)
    alone = steps(mixed, options, sparse_start())
    torch.testing.assert_close(first["params"], alone["params"], **EXACT)
    torch.testing.assert_close(window(first)["rows"], window(alone)["rows"], **EXACT)


# Checkpoints


def further(
    outcome: dict[str, Any], state: dict[str, Any], options: dict[str, Any]
) -> tuple[list[Row], dict[str, Any], list[nn.Parameter], dict[str, Any]]:
    """Return the arguments of `steps` for a run that goes on."""
    return draw(7, seed=3), options, outcome["params"], state


@pytest.mark.parametrize("setting", ["momentum", "half"])
@pytest.mark.parametrize("before", [1, 2])
@pytest.mark.parametrize("after", [1, 2])
def test_resuming(setting: str, before: int, after: int, ranks: RankPool) -> None:
    """On any number of ranks: the same numbers as those that never stopped."""
    rows, options = draw(6), SETTINGS[setting]
    half_way = ranks.run(steps, rows, options)[0] if before == 2 else steps(rows, options)
    saved = half_way["state"]
    assert saved["curvature"]["window"]["columns"] == [0, ENTRIES]
    arguments = further(half_way, saved, options)
    outcomes = ranks.run(steps, *arguments) if after == 2 else [steps(*arguments)]
    for outcome in outcomes:
        same(outcome, outcomes[0])
    whole = [*rows, *arguments[0]]
    straight = ranks.run(steps, whole, options)[0] if after == 2 else steps(whole, options)
    torch.testing.assert_close(outcomes[0]["params"], straight["params"], **EXACT)
    if before == after:
        assert identical(outcomes[0]["params"], straight["params"])
        assert identical(outcomes[0]["state"], straight["state"])


@pytest.mark.parametrize("after", [1, 2])
def test_parts_that_are_put_together(after: int, ranks: RankPool) -> None:
    """Bit for bit what `gather_state` gives."""
    rows, options = draw(6), SETTINGS["momentum"]
    apart = ranks.run(steps, rows, {**options, "gather_state": False})
    joined = join_window_shards([outcome["state"] for outcome in apart])
    gathered = ranks.run(steps, rows, options)[0]["state"]
    assert identical(joined["curvature"], gathered["curvature"])
    arguments = further(apart[0], joined, options)
    straight = steps([*rows, *arguments[0]], options)
    outcomes = ranks.run(steps, *arguments) if after == 2 else [steps(*arguments)]
    for outcome in outcomes:
        torch.testing.assert_close(outcome["params"], straight["params"], **EXACT)


def load_own(states: list[dict[str, Any]], turned: bool) -> str | None:
    """Load the part of this rank, or that of the other; return the error."""
    states = states[::-1] if turned else states
    number = torch.distributed.get_rank()
    optimizer = MFAC(start(), lr=0.3, num_grads=4, damping=0.05)
    return failure(optimizer.load_state_dict, states[number])


def test_parts_alone(ranks: RankPool) -> None:
    """Each rank can load its own. Elsewhere the error says what to do."""
    apart = ranks.run(steps, draw(6), {"gather_state": False})
    states = [outcome["state"] for outcome in apart]
    assert ranks.run(load_own, states, False) == [None, None]
    first, second = ranks.run(load_own, states, True)
    assert "holds columns 6 to 11 of 11, but this rank needs 0 to 6. Put the states of" in first
    assert "holds columns 0 to 6 of 11, but this rank needs 6 to 11. Put the states of" in second
    optimizer, _ = trained(draw(2))
    before = window_of(optimizer)
    for state in states:
        with pytest.raises(ValueError, match=r"needs 0 to 11.*join_window_shards"):
            optimizer.load_state_dict(state)
        assert identical(window_of(optimizer), before)


# In a Trainer


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.5, "l2_reg": 0.01},
        {"row_dtype": "float32", "l2_reg": 0.01, "l2_in_window": False, "weight_decay": 0.1},
        {"shard_window": False, "momentum": 0.5, "momentum_type": "heavy_ball"},
    ],
    ids=str,
)
def test_fits(options: dict[str, Any], ranks: RankPool) -> None:
    within = 1e-5 if "row_dtype" in options else 1e-9
    compare(ranks, fit, CONTRACT, Parts, within=within, options=options, max_epochs=2)


def test_a_layer_nobody_calls(ranks: RankPool) -> None:
    """It has no columns on any rank."""
    flags = {"find_unused_parameters": True}
    first, second = ranks.run(fit, CONTRACT, UnusedLayer, flags=flags, max_epochs=2)
    assert torch.equal(first.weights, second.weights)
    single = fit(CONTRACT, UnusedLayer, max_epochs=2)
    torch.testing.assert_close(first.weights, single.weights, **EXACT)
    for outcome in (first, single):
        assert outcome.state["curvature"]["window"]["parameters"] == [0, 1, 2, 3]


# What ranks must have in common


def unlike(seed: int) -> str:
    """Take a step with gradients that were not averaged; return the error."""
    params = start()
    optimizer = MFAC(params, lr=0.3, num_grads=4, damping=0.05)
    try:
        step(optimizer, params, draw(1, seed=seed + torch.distributed.get_rank())[0])
    except RuntimeError as error:
        return str(error)
    return ""


def test_gradients_that_were_not_averaged(ranks: RankPool) -> None:
    """Otherwise every rank would move along parts of different gradients."""
    for text in ranks.run(unlike, 3):
        assert text.startswith("MFAC got another gradient on every rank")
        assert "shard_window=False" in text


def without_room(on: int) -> str:
    """Take a step where one rank has no memory; return the error."""
    params = start()
    optimizer = MFAC(params, num_grads=4)
    free = (lambda _: 10) if torch.distributed.get_rank() == on else (lambda _: None)
    before = window_memory.free_memory
    window_memory.free_memory = free
    try:
        step(optimizer, params, draw(1)[0])
    except ValueError as error:
        return str(error)
    finally:
        window_memory.free_memory = before
    return ""


def test_no_rank_waits_for_one_without_memory(ranks: RankPool) -> None:
    first, second = ranks.run(without_room, 1)
    assert first == "The window of gradients does not fit into the memory of a rank."
    assert second.startswith("Invalid num_grads=4")


def saved_in_parts() -> str:
    """Fit with states in parts under a Trainer; return the refusal."""
    trainer = make_trainer("auto", devices=2, strategy="ddp")
    module = mlp_module(partial(MFAC, gather_state=False))
    try:
        trainer.fit(module, shared_loader(vectors(16), 4))
    except MisconfigurationException as error:
        return str(error)
    return ""


def test_a_trainer_would_save_a_part_only(ranks: RankPool) -> None:
    for text in ranks.run(saved_in_parts):
        assert text.startswith("MFAC(gather_state=False) leaves every rank its part")
