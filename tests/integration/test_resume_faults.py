"""Checkpoints that cannot be resumed from: cut off, of something else, or damaged.

What `load_state_dict` refuses is in tests/optim/test_contract_damaged.py; here it is a Trainer that
loads. Files under test: optim/base.py, optim/saved_state.py, strategies/recorder.py.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_curvature.optim.saved_state import COPY_KEY
from tests.helpers.families import LEADER, every_family
from tests.helpers.optimizer_db import CONTRACTS, Contract, identical
from tests.helpers.probing import ROUTES
from tests.helpers.ranks import RankPool
from tests.helpers.resuming import Save, run

KINDS = ("adam", "another", "newer", "lost", "replaced")


def spoil(contract: Contract, state: dict[str, Any], kind: str) -> tuple[dict[str, Any], str]:
    """Return what stands in the file instead of an optimizer's state, and what is said of it."""
    name = contract.info.cls.__name__
    own, groups = state["curvature"], state["param_groups"]
    if kind == "adam":
        adams = [{k: v for k, v in group.items() if k != COPY_KEY} for group in groups]
        return (
            {"state": state["state"], "param_groups": adams},
            f"^Cannot load the state of a plain torch optimizer into {name}.$",
        )
    if kind == "another":
        other = next(c for c in CONTRACTS if c.info.cls.__name__ != name).info.cls.__name__
        foreign = {**state, "curvature": {**own, "optimizer": other}}
        return foreign, f"^Cannot load the state of '{other}' into {name}.$"
    if kind == "newer":
        newer = {**state, "curvature": {**own, "version": 999}}
        return newer, f"^Cannot load version 999 of the state of {name}: this release knows"
    if kind == "lost":
        cut = [{k: v for k, v in group.items() if k != "lr"} for group in groups]
        return {**state, "param_groups": cut}, f"^Cannot load the state into {name}: .*has no lr"
    replaced = {**state, "curvature": {**own, "steps_done": "three"}}
    return replaced, f"^Cannot load the state into {name}: steps_done must be .*, got 'three'"


class Kept:
    """Keeps hold of what a run was made of."""

    def __call__(self, module: LightningModule, trainer: Trainer) -> None:
        self.module, self.trainer = module, trainer

    def assert_detached(self) -> None:
        """Check that a fit that failed left nothing behind."""
        assert "_curvature_recorder" not in self.trainer.strategy.__dict__
        for optimizer in self.trainer.strategy.optimizers:
            assert optimizer.oracle is None
        for part in self.module.modules():
            assert not part._forward_hooks
            assert not part._forward_pre_hooks
            assert "training_step" not in part.__dict__


@every_family
@pytest.mark.feature("Faults", "truncated checkpoint: refused, the next fit works")
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_truncated_file(contract: Contract, share: float, route: str, tmp_path: Path) -> None:
    """A file that was being written when the machine went down.

    Under a stock strategy nobody asks this package to read it, and the text is torch's.
    """
    path = tmp_path / "part.ckpt"
    run(contract, {}, route=route, stop_before=3, callbacks=[Save(path, 3)])
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    kept = Kept()
    ours = r"^Cannot read the checkpoint .*part\.ckpt: the file is damaged, or was cut off"
    errors = RuntimeError if route == "strategy" else (RuntimeError, EOFError, OSError)
    with pytest.raises(errors, match=ours if route == "strategy" else None):
        run(contract, {}, route=route, ckpt_path=path, before_fit=kept)
    kept.assert_detached()
    path.write_bytes(content)
    whole = run(contract, {}, route=route)
    resumed = run(contract, {}, route=route, seed=99, ckpt_path=path)
    assert identical(resumed.state, whole.state)


@every_family
@pytest.mark.feature("Faults", "foreign checkpoint: refused, the next fit works")
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", KINDS)
def test_foreign_file(contract: Contract, kind: str, route: str, tmp_path: Path) -> None:
    path, bad_path = tmp_path / "part.ckpt", tmp_path / "bad.ckpt"
    run(contract, {}, route=route, stop_before=3, callbacks=[Save(path, 3)])
    file = torch.load(path, weights_only=True)
    bad, text = spoil(contract, file["optimizer_states"][0], kind)
    torch.save({**file, "optimizer_states": [bad]}, bad_path)
    kept = Kept()
    with pytest.raises(ValueError, match=text):
        run(contract, {}, route=route, ckpt_path=bad_path, before_fit=kept)
    kept.assert_detached()
    optimizer = kept.trainer.optimizers[0]
    new = contract.make(kept.module.parameters())
    new.attach_model(kept.module, F.cross_entropy)
    new.detach()
    for state in (optimizer.state_dict(), new.state_dict()):
        state["curvature"].pop("oracle")  # says how it was attached
    assert identical(optimizer.state_dict(), new.state_dict()), "as new"
    whole = run(contract, {}, route=route)
    resumed = run(contract, {}, route=route, seed=99, ckpt_path=path)
    assert identical(resumed.state, whole.state)


class Tries(Callback):
    """Tries to load states before the third batch, as a user's roll-back might.

    Args:
        contract: The optimizer.
    """

    def __init__(self, contract: Contract) -> None:
        self.contract = contract
        self.refused = 0

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        """Try them all."""
        if trainer.global_step != 3:
            return
        good = trainer.optimizers[0].state_dict()
        for kind in KINDS:
            bad, text = spoil(self.contract, good, kind)
            with pytest.raises(ValueError, match=text):
                trainer.strategy.load_optimizer_state_dict({"optimizer_states": [bad]})
            self.refused += 1


@every_family
@pytest.mark.feature("Faults", "foreign state in the middle of a fit: refused, nothing changes")
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_refused_in_the_middle_of_a_fit(contract: Contract, precision: str) -> None:
    """The run goes on as if nobody had tried, bit for bit."""
    given = contract.rich
    tries = Tries(contract)
    undisturbed = run(contract, given, precision=precision)
    disturbed = run(contract, given, precision=precision, callbacks=[tries])
    assert tries.refused == len(KINDS)
    for what in ("weights", "state", "stats", "losses"):
        assert identical(getattr(disturbed, what), getattr(undisturbed, what)), what


@every_family
@pytest.mark.feature("Faults", "checkpoint of weights only: refused, the next fit works")
def test_weights_only_file(contract: Contract, tmp_path: Path) -> None:
    """``save_weights_only`` keeps no optimizer; Lightning says so."""
    path = tmp_path / "weights.ckpt"
    kept = Kept()
    run(contract, {}, epochs=1, before_fit=kept)
    kept.trainer.save_checkpoint(path, weights_only=True)
    with pytest.raises(KeyError, match="checkpoint contains only the model"):
        run(contract, {}, ckpt_path=path, before_fit=kept)
    kept.assert_detached()


def refused_on_this_rank(contract: Contract, path: Path, kind: str) -> str:
    """Resume from a spoiled copy of a file and return the error's text."""
    file = torch.load(path, weights_only=True)
    bad, _ = spoil(contract, file["optimizer_states"][0], kind)
    own = Path("bad.ckpt")  # the ranks have directories of their own
    torch.save({**file, "optimizer_states": [bad]}, own)
    try:
        run(contract, {}, ckpt_path=own.absolute())
    except ValueError as error:
        return str(error)
    return "loaded"


def saved_on_this_rank(contract: Contract, path: Path) -> None:
    """Save after three steps."""
    run(contract, {}, stop_before=3, callbacks=[Save(path, 3)])


@every_family
@pytest.mark.ddp
@pytest.mark.feature("Faults", "foreign checkpoint on two ranks: refused on both")
def test_foreign_file_on_two_ranks(contract: Contract, ranks: RankPool, tmp_path: Path) -> None:
    """No rank waits for the other, and the group can be used afterwards."""
    path = tmp_path / "part.ckpt"
    ranks.run(saved_on_this_rank, contract, path)
    for kind in KINDS:
        first, second = ranks.run(refused_on_this_rank, contract, path, kind)
        assert first == second
        assert first.startswith("Cannot load ")
    wholes = ranks.run(run, contract, {})
    resumed = ranks.run(run, contract, {}, seed=99, ckpt_path=path)
    for whole, rest in zip(wholes, resumed, strict=True):
        assert identical(rest.state, whole.state)


@every_family
@pytest.mark.feature("Faults", "damaged checkpoint: refused, the next fit works")
@pytest.mark.parametrize("content", [b"\0" * 4096, b"<html>not found</html>", b"x"])
def test_a_file_that_is_no_checkpoint(contract: Contract, content: bytes, tmp_path: Path) -> None:
    """Zeros after a crash of the machine, a page of a proxy: torch's texts tell other stories."""
    path = tmp_path / "bad.ckpt"
    path.write_bytes(content)
    kept = Kept()
    with pytest.raises(RuntimeError, match=r"^Cannot read the checkpoint .*bad\.ckpt: the file is"):
        run(contract, {}, route="strategy", ckpt_path=path, before_fit=kept)
    kept.assert_detached()
    run(contract, {}, route="strategy")


def test_a_missing_file_is_called_missing(tmp_path: Path) -> None:
    """Not damaged."""
    with pytest.raises(FileNotFoundError):
        run(LEADER, {}, route="strategy", ckpt_path=tmp_path / "none.ckpt")
