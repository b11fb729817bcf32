"""K steps, a checkpoint and k steps are 2k steps, bit for bit: Trainer on one device.

The resumed run starts from other weights and default options: everything has to come from the
file. Files under test: optim/base.py, optim/qlr.py. Two ranks: test_resume_ranks.py.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_curvature import CurvatureMonitor
from tests.helpers.families import every_family
from tests.helpers.modules import StockModule, vectors
from tests.helpers.optimizer_db import Contract, every_optimizer, identical, numbered
from tests.helpers.plain_loop import Loop
from tests.helpers.resuming import (
    BATCHES,
    SAVERS,
    Run,
    Save,
    Scheduled,
    build,
    run,
    saver,
    tensors_in,
)
from tests.helpers.stateful_loader import StatefulLoader

pytestmark = pytest.mark.filterwarnings(
    # Runs are resumed without the ModelCheckpoint that saved them.
    "ignore:Be aware that when using `ckpt_path`, callbacks used to create:UserWarning"
)

# Batch before which the run is interrupted, right after it was saved.
STOPS = {"epoch": BATCHES, "steps": 3, "callback": 3}
TITLES = {
    "epoch": "checkpoint at the end of an epoch",
    "steps": "checkpoint in the middle of an epoch, stateful loader",
    "callback": "checkpoint in the middle of an epoch, stateful loader",
}
savers = pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.feature("Resume", TITLES[kind]), id=kind)
        for kind in SAVERS
    ],
)
DTYPES = {
    "32-true": torch.float32,
    "64-true": torch.float64,
    "bf16-true": torch.float32,
    "bf16-mixed": torch.float32,
}


def assert_resumed(whole: Run, part: Run, resumed: Run, path: Path) -> None:
    """Compare a run in two parts with one in one piece."""
    # As the spec asks for it of every file: no class of ours is needed to read it.
    file = torch.load(path, weights_only=True)["optimizer_states"][0]
    assert identical(file, part.saved)
    assert identical(resumed.restored, part.saved)
    assert part.losses + resumed.losses == whole.losses
    assert part.rates + resumed.rates == whole.rates
    assert resumed.steps == whole.steps
    for what in ("weights", "state", "stats", "plugin"):
        assert identical(getattr(resumed, what), getattr(whole, what)), what


def floating_dtypes(state: dict[str, Any]) -> set[torch.dtype]:
    """Return the dtypes of the real numbers in an optimizer's state."""
    return {t.dtype for t in tensors_in(state) if t.is_floating_point()}


# Where and how it was saved


@every_optimizer
@savers
@pytest.mark.parametrize("options", ["defaults", "rich"])
def test_resume(contract: Contract, options: str, kind: str, tmp_path: Path) -> None:
    given = contract.rich if options == "rich" else {}
    path = tmp_path / "saved" / "part.ckpt"
    whole = run(contract, given)
    part = run(contract, given, stop_before=STOPS[kind], callbacks=[saver(kind, path, 3)])
    resumed = run(contract, {}, seed=99, ckpt_path=path, weights_only=True)
    assert len(part.losses) == STOPS[kind]
    assert_resumed(whole, part, resumed, path)


@every_family
@pytest.mark.parametrize(
    "precision",
    [
        pytest.param(name, marks=pytest.mark.feature("Resume", f"precision {name}"))
        for name in DTYPES
    ],
)
def test_resume_keeps_dtypes(contract: Contract, precision: str, tmp_path: Path) -> None:
    """Statistics of half-precision parameters stay in float32, which torch alone would cast."""
    given = contract.rich
    path = tmp_path / "part.ckpt"
    whole = run(contract, given, precision=precision)
    part = run(contract, given, precision=precision, stop_before=3, callbacks=[Save(path, 3)])
    resumed = run(contract, {}, precision=precision, seed=99, ckpt_path=path, weights_only=True)
    assert_resumed(whole, part, resumed, path)
    # Slopes are differences of nearly equal losses, so what is measured is float64.
    numbers = {torch.float64} if contract.forward_only or contract.precise else set()
    for state in (part.saved, resumed.restored, resumed.state):
        assert floating_dtypes(state) <= {DTYPES[precision], *numbers}
        assert floating_dtypes(state) == floating_dtypes(whole.state)


@every_family
@pytest.mark.feature("Resume", "precision 16-mixed, GradScaler")
def test_resume_with_a_gradient_scaler(contract: Contract, tmp_path: Path, refused: Any) -> None:
    """The scale has grown by then, and the next growth is due in the middle of the second part."""
    if contract.forward_only:
        with pytest.raises(MisconfigurationException, match="16-mixed precision") as refusal:
            run(contract, {}, scaled=True)
        refused(str(refusal.value))
        return
    path = tmp_path / "part.ckpt"
    whole = run(contract, {}, scaled=True)
    part = run(contract, {}, scaled=True, stop_before=4, callbacks=[Save(path, 4)])
    resumed = run(contract, {}, scaled=True, seed=99, ckpt_path=path, weights_only=True)
    assert part.plugin["scale"] == 2048.0
    assert part.plugin["_growth_tracker"] == 1
    assert resumed.plugin["scale"] > 2048.0
    assert_resumed(whole, part, resumed, path)


@every_family
@pytest.mark.feature("Resume", "accumulated gradients")
@pytest.mark.parametrize("kind", SAVERS)
def test_resume_with_accumulation(contract: Contract, kind: str, tmp_path: Path) -> None:
    """Two steps are four batches; the last window of an epoch has one."""
    path = tmp_path / "saved" / "part.ckpt"
    stop = BATCHES if kind == "epoch" else 4
    given = {**contract.rich, **dict.fromkeys(contract.intervals, 2)}
    settings: dict[str, Any] = {"accumulate_grad_batches": 2}
    whole = run(contract, given, **settings)
    part = run(contract, given, stop_before=stop, callbacks=[saver(kind, path, 2)], **settings)
    resumed = run(contract, {}, seed=99, ckpt_path=path, weights_only=True, **settings)
    assert whole.steps == 6
    assert_resumed(whole, part, resumed, path)


@every_family
@pytest.mark.feature("Resume", "checkpoint inside an accumulation window")
def test_resume_inside_a_window(contract: Contract, tmp_path: Path) -> None:
    """Lightning saves no gradients: the first step has those of the rest of the window."""
    path = tmp_path / "part.ckpt"
    settings: dict[str, Any] = {"accumulate_grad_batches": 3}
    save = Save(path, batch=1)
    run(contract, {}, stop_before=1, callbacks=[save], **settings)
    resumed = run(contract, {}, seed=99, ckpt_path=path, weights_only=True, **settings)
    assert resumed.steps == 4
    assert all(tensor.isfinite().all() for tensor in resumed.weights.values())
    assert min(resumed.losses[-3:]) < max(resumed.losses[:3])


@every_family
@pytest.mark.feature("Resume", "learning-rate scheduler")
def test_resume_with_a_scheduler(contract: Contract, tmp_path: Path) -> None:
    """OneCycleLR keeps numbers of its own in the parameter groups."""
    path = tmp_path / "part.ckpt"
    whole = run(contract, {}, scheduled=True)
    part = run(contract, {}, scheduled=True, stop_before=3, callbacks=[Save(path, 3)])
    resumed = run(contract, {}, scheduled=True, seed=99, ckpt_path=path, weights_only=True)
    assert len(set(whole.rates)) == len(whole.rates)
    assert_resumed(whole, part, resumed, path)


@every_family
@pytest.mark.feature("Resume", "interrupted several times")
def test_resume_twice(contract: Contract, tmp_path: Path) -> None:
    given = contract.rich
    first, second = tmp_path / "first.ckpt", tmp_path / "second.ckpt"
    whole = run(contract, given)
    one = run(contract, given, stop_before=2, callbacks=[Save(first, 2)])
    two = run(contract, {}, seed=98, stop_before=5, callbacks=[Save(second, 7)], ckpt_path=first)
    assert len(two.losses) == 5
    three = run(contract, {}, seed=99, ckpt_path=second)
    assert one.losses + two.losses + three.losses == whole.losses
    assert identical(three.weights, whole.weights)
    assert identical(three.state, whole.state)


@every_family
@pytest.mark.parametrize("weights_only", [None, False])
def test_resume_with_other_readers(
    contract: Contract, weights_only: bool | None, tmp_path: Path
) -> None:
    path = tmp_path / "part.ckpt"
    whole = run(contract, {})
    part = run(contract, {}, stop_before=3, callbacks=[Save(path, 3)])
    resumed = run(contract, {}, seed=99, ckpt_path=path, weights_only=weights_only)
    assert_resumed(whole, part, resumed, path)


# Who attaches


@every_family
@pytest.mark.feature("Resume", "another route than before")
@pytest.mark.parametrize(
    ("before", "after"), [("strategy", "callback"), ("callback", "auto"), ("auto", "strategy")]
)
def test_resume_by_another_route(
    contract: Contract, before: str, after: str, tmp_path: Path
) -> None:
    path = tmp_path / "part.ckpt"
    whole = run(contract, {}, route=after)
    part = run(contract, {}, route=before, stop_before=3, callbacks=[Save(path, 3)])
    resumed = run(contract, {}, route=after, seed=99, ckpt_path=path, weights_only=True)
    assert_resumed(whole, part, resumed, path)


@every_family
@pytest.mark.feature("Resume", "other callbacks than before")
@pytest.mark.parametrize("monitored", ["before", "after"])
def test_resume_with_other_callbacks(
    contract: Contract, monitored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No callback holds anything that training depends on."""
    if not contract.info.asks:
        pytest.skip("has nothing to monitor")
    monkeypatch.setenv("LIGHTNING_CURVATURE_AUTO_ATTACH", "0")
    path = tmp_path / "part.ckpt"
    whole = run(contract, {})
    monitors: dict[str, list[Callback]] = {"before": [], "after": []}
    monitors[monitored] = [CurvatureMonitor(plot=False)]
    callbacks = [*monitors["before"], Save(path, 3)]
    part = run(contract, {}, stop_before=3, callbacks=callbacks)
    resumed = run(contract, {}, seed=99, ckpt_path=path, callbacks=monitors["after"])
    assert_resumed(whole, part, resumed, path)


# Outside of Lightning


@every_family
@pytest.mark.feature("Resume", "Lightning's checkpoint in a plain loop")
@pytest.mark.parametrize("scheduled", [False, True])
def test_continue_in_a_plain_loop(contract: Contract, scheduled: bool, tmp_path: Path) -> None:
    path = tmp_path / "part.ckpt"
    given = contract.rich
    whole = run(contract, given, scheduled=scheduled)
    part = run(contract, given, scheduled=scheduled, stop_before=3, callbacks=[Save(path, 3)])

    saved = torch.load(path, weights_only=True)
    model = build(contract, {}, seed=99).network
    model.load_state_dict(
        {name.removeprefix("network."): tensor for name, tensor in saved["state_dict"].items()}
    )
    loop = Loop(model, contract.make, directional="auto")
    schedule = None
    if scheduled:
        schedule = Scheduled.schedule(loop.optimizer)
        schedule.load_state_dict(saved["lr_schedulers"][0])
    loop.optimizer.load_state_dict(saved["optimizer_states"][0])
    batches = StatefulLoader(vectors())
    batches.load_state_dict(saved["loops"]["fit_loop"]["state_dict"]["combined_loader"][0])
    losses = list(part.losses)
    for epoch in (0, 1):
        batches.set_epoch(epoch)
        for batch in batches:
            losses.append(loop.step(*batch))
            if schedule is not None:
                schedule.step()
    assert losses == whole.losses
    assert identical(model.state_dict(), whole.weights)
    assert identical(numbered(loop.optimizer.state_dict()), numbered(whole.state))


@every_family
@pytest.mark.feature("Resume", "plain torch.save of the optimizer in a Trainer")
@pytest.mark.parametrize("where", ["configure_optimizers", "on_fit_start"])
@pytest.mark.parametrize("route", ["strategy", "callback"])
def test_continue_from_a_plain_loop(
    contract: Contract, route: str, where: str, tmp_path: Path
) -> None:
    given = contract.rich
    whole = run(contract, given, route=route)
    loop = Loop(build(contract, {}).network, contract.making(**given), directional="auto")
    losses = loop.train(StatefulLoader(vectors()))
    torch.save(
        {"model": loop.model.state_dict(), "optimizer": loop.optimizer.state_dict()},
        tmp_path / "plain.pt",
    )

    saved = torch.load(tmp_path / "plain.pt", weights_only=True)

    class Loads(Callback):
        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.optimizers[0].load_state_dict(saved["optimizer"])

    def load(module: StockModule, trainer: Trainer) -> None:
        module.network.load_state_dict(saved["model"])
        if where == "configure_optimizers":

            def make_loaded(params: Any) -> Any:
                optimizer = contract.make(params)
                optimizer.load_state_dict(saved["optimizer"])
                return optimizer

            module.make_optimizer = make_loaded

    resumed = run(
        contract,
        {},
        route=route,
        seed=99,
        epochs=1,
        before_fit=load,
        callbacks=[Loads()] if where == "on_fit_start" else [],
        batches=StatefulLoader(vectors(), seed=8),  # the order of the second epoch
    )
    assert losses + resumed.losses == whole.losses
    assert identical(resumed.weights, whole.weights)
    assert identical(resumed.state, whole.state)
