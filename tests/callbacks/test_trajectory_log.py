"""Tests of lightning_curvature/callbacks/trajectory_log.py."""

import contextlib
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_curvature import (
    MeZO,
    SampleSchedule,
    SophiaG,
    Trajectory,
    TrajectoryLog,
    ZOMomentum,
    replay_trajectory,
)
from tests.helpers.modules import StockModule, loader, mlp_module, norm_dropout_module, vectors
from tests.helpers.optimizer_db import identical
from tests.helpers.probing import ROUTES, make_trainer
from tests.helpers.ranks import RankPool
from tests.helpers.resuming import Interrupted, Interruption, Save
from tests.helpers.stateful_loader import StatefulLoader
from tests.helpers.two_ranks import shared_loader

pytestmark = pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`, callbacks used to create:UserWarning"
)

# 20 rows in batches of 4.
BATCHES = 5


def mezo(params: Any) -> MeZO:
    return MeZO(params, lr=1e-2, seed=5)


def momentum(params: Any) -> ZOMomentum:
    return ZOMomentum(params, lr=1e-2, seed=5)


def build(make: Any = mezo, seed: int = 1) -> StockModule:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return mlp_module(make)


def fit(
    log: TrajectoryLog,
    *callbacks: Callback,
    module: LightningModule | None = None,
    route: str = "strategy",
    ckpt_path: Path | None = None,
    **settings: Any,
) -> LightningModule:
    """Train, perhaps until interrupted."""
    module = build() if module is None else module
    trainer = make_trainer(route, callbacks=[log, *callbacks], **settings)
    with contextlib.suppress(Interrupted):
        trainer.fit(module, StatefulLoader(vectors()), ckpt_path=ckpt_path)
    return module


def replay(path: Any, trained: nn.Module, module: StockModule | None = None) -> None:
    """Replay a file and compare weights and state bit for bit."""
    module = build() if module is None else module
    optimizer = module.make_optimizer(module.parameters())
    replay_trajectory(module, optimizer, Trajectory.load(path))
    assert identical(module.state_dict(), trained.state_dict())


# What it writes


@pytest.mark.parametrize("route", ROUTES)
def test_log_and_first_weights_are_a_checkpoint(route: str, tmp_path: Path) -> None:
    log = TrajectoryLog()
    module = fit(log, route=route, max_epochs=2, default_root_dir=tmp_path)
    assert log.path == str(tmp_path / "trajectory.pt")
    assert not identical(module.state_dict(), build().state_dict())
    assert len(Trajectory.load(log.path)) == len(log.trajectory) == 2 * BATCHES
    replay(log.path, module)
    assert [file.name for file in tmp_path.iterdir()] == ["trajectory.pt"]


@pytest.mark.parametrize("restore", ["fused", "inplace", "snapshot"])
def test_accumulation(restore: str) -> None:
    """Displacements of the first micro-batches are on the way to the same bits."""

    def make(params: Any) -> MeZO:
        return MeZO(params, lr=1e-2, restore=restore)

    log = TrajectoryLog()
    module = fit(log, module=build(make), max_epochs=2, accumulate_grad_batches=2)
    moves = [step.moves for step in log.trajectory.steps()]
    assert moves == [(1, True), (1, True), (0, True)] * 2
    replay(log.path, module, build(make))


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_precision(precision: Any) -> None:
    module = build()
    if precision == "64-true":
        module.double()
    log = TrajectoryLog()
    fit(log, module=module, precision=precision)
    fresh = build()
    dtype = {"64-true": torch.float64, "bf16-true": torch.bfloat16}.get(precision, torch.float32)
    replay(log.path, module.to(dtype), fresh.to(dtype))


def test_schedules_are_followed() -> None:
    class Scheduled(StockModule):
        def configure_optimizers(self) -> Any:
            optimizer = self.make_optimizer(self.parameters())
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    log = TrajectoryLog()
    module = Scheduled(build().network, mezo)
    fit(log, SampleSchedule("linear", largest=3), module=module)
    steps = list(log.trajectory.steps())
    assert [step.groups[0]["lr"] for step in steps] == pytest.approx(
        [0.01 * 0.8**n for n in range(5)]
    )
    assert [len(step.answers[0]) for step in steps] == [1, 1, 1, 1, 2]
    replay(log.path, module)


def test_batch_norm_is_left_out() -> None:
    """Parameters are right; running statistics are those of the first weights."""

    def fresh() -> StockModule:
        torch.manual_seed(2)
        return norm_dropout_module(mezo)

    log = TrajectoryLog()
    module = fresh()
    fit(log, module=module)
    again = fresh()
    replay_trajectory(again, mezo(again.parameters()), Trajectory.load(log.path))
    pairs = zip(again.parameters(), module.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)
    assert not identical(again.state_dict(), module.state_dict())


def test_base_is_written_once(tmp_path: Path) -> None:
    log = TrajectoryLog(filename="log.pt", dirpath=str(tmp_path / "logs"), save_base=True)
    module = fit(log)
    assert log.base_path == str(tmp_path / "logs" / "log_base.pt")
    base = torch.load(log.base_path, weights_only=True)
    again = build(seed=9)
    again.load_state_dict(base["state_dict"])
    replay(log.path, module, again)


class Lengths(Callback):
    """Notes how many steps the file holds after every batch."""

    def __init__(self, log: TrajectoryLog) -> None:
        self.written = log  # the Trainer gives callbacks a ``log`` of its own
        self.found: list[int] = []

    def on_train_batch_end(self, *args: Any) -> None:
        """Read it."""
        path = Path(self.written.path)
        self.found.append(len(Trajectory.load(path)) if path.exists() else 0)


@pytest.mark.parametrize(
    ("interval", "expected"), [(2, [0, 2, 2, 4, 4]), (None, [0] * 5), (1, [1, 2, 3, 4, 5])]
)
def test_interval(interval: int | None, expected: list[int]) -> None:
    log = TrajectoryLog(every_n_steps=interval)
    lengths = Lengths(log)
    fit(log, lengths)
    assert lengths.found == expected
    assert len(Trajectory.load(log.path)) == 5


def test_trial_runs_leave_no_files(tmp_path: Path) -> None:
    fit(TrajectoryLog(save_base=True), fast_dev_run=True, default_root_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_has_its_own_file(tmp_path: Path) -> None:
    fit(TrajectoryLog(), default_root_dir=tmp_path)
    content = (tmp_path / "trajectory.pt").read_bytes()
    again = TrajectoryLog()
    module = fit(again, max_epochs=2, default_root_dir=tmp_path)
    assert again.path == str(tmp_path / "trajectory-v1.pt")
    assert (tmp_path / "trajectory.pt").read_bytes() == content
    module = fit(again, default_root_dir=tmp_path)  # the same callback, another run
    assert again.path == str(tmp_path / "trajectory-v2.pt")
    replay(again.path, module)


def test_remote_folders() -> None:
    import fsspec

    log = TrajectoryLog(dirpath="memory://logs", save_base=True)
    fit(log)
    assert log.path == "memory://logs/trajectory.pt"
    with fsspec.open(log.path) as file:
        state = torch.load(file, weights_only=True)
    assert len(Trajectory.from_state_dict(state)) == BATCHES
    assert fsspec.filesystem("memory").exists(log.base_path)


def fit_on_a_rank(folder: str) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Train on this rank; return the log, the weights and the file."""
    log = TrajectoryLog(dirpath=folder, every_n_steps=2)
    module = build()
    trainer = make_trainer(
        "none",
        strategy="ddp_curvature",
        devices=2,
        callbacks=[log],
        use_distributed_sampler=False,
    )
    trainer.fit(module, shared_loader(vectors(), 4))
    return log.trajectory.state_dict(), module.state_dict(), log.path


@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore")
def test_two_ranks_write_one_log(ranks: RankPool, tmp_path: Path) -> None:
    for name in ("trajectory.pt", "trajectory-v1.pt"):
        (one, weights, path), (other, other_weights, other_path) = ranks.run(
            fit_on_a_rank, str(tmp_path)
        )
        assert identical(one, other)
        assert identical(weights, other_weights)
        assert path == other_path == str(tmp_path / name)
        fresh = build()
        replay(path, _loaded(weights), fresh)


def _loaded(weights: dict[str, Any]) -> StockModule:
    module = build()
    module.load_state_dict(weights)
    return module


# Ends and resumes


def test_exceptions_leave_a_log() -> None:
    log = TrajectoryLog(every_n_steps=None)
    module = fit(log, Interruption(3))
    assert len(Trajectory.load(log.path)) == 3
    replay(log.path, module)


def test_failures_to_write_do_not_hide_the_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise OSError("no room")

    monkeypatch.setattr("lightning_curvature.callbacks.trajectory_log.write_whole", fail)
    with pytest.warns(UserWarning, match="could not write .*: no room"):
        fit(TrajectoryLog(every_n_steps=None), Interruption(3))


@pytest.mark.parametrize("crash", [9, None])
@pytest.mark.parametrize("same_folder", [True, False])
def test_resume(crash: int | None, same_folder: bool, tmp_path: Path) -> None:
    """Steps after the checkpoint are dropped, those before it are kept."""
    whole = fit(TrajectoryLog(), module=build(momentum), max_epochs=3)
    path, folder = tmp_path / "some.ckpt", str(tmp_path / "log")
    first = TrajectoryLog(dirpath=folder, save_base=True)
    fit(first, Save(path, 7), Interruption(crash), module=build(momentum), max_epochs=3)
    assert len(Trajectory.load(first.path)) == (crash or 15)

    second = TrajectoryLog(dirpath=folder if same_folder else str(tmp_path / "other"))
    module = fit(second, module=build(momentum, seed=8), max_epochs=3, ckpt_path=path)
    assert second.path.endswith("trajectory.pt")
    assert len(Trajectory.load(second.path)) == 15
    replay(second.path, whole, build(momentum))
    assert identical(module.state_dict(), whole.state_dict())


def test_resume_in_the_middle_of_an_accumulation_window(tmp_path: Path) -> None:
    """Weights of the checkpoint have gone to the first point and back once."""
    path = tmp_path / "some.ckpt"
    settings: dict[str, Any] = {"max_epochs": 2, "accumulate_grad_batches": 2}
    fit(TrajectoryLog(), Save(path, batch=3), **settings)
    log = TrajectoryLog(dirpath=str(tmp_path / "other"))
    module = fit(log, ckpt_path=path, **settings)
    assert [step.moves for step in log.trajectory.steps()][:3] == [(1, True), (1, True), (0, True)]
    replay(log.path, module)


def test_resume_on_another_device_begins_a_new_log(tmp_path: Path) -> None:
    path = tmp_path / "some.ckpt"
    fit(TrajectoryLog(), Save(path, 2))
    checkpoint = torch.load(path, weights_only=False)
    (state,) = [x for name, x in checkpoint["callbacks"].items() if "TrajectoryLog" in name]
    state["trajectory"]["header"]["device_name"] = "other"
    torch.save(checkpoint, path)
    log = TrajectoryLog(save_base=True)
    with pytest.warns(UserWarning, match="begins a new log with this checkpoint: the old one is"):
        fit(log, ckpt_path=path)
    assert log.path.endswith("trajectory-v1.pt")
    assert (log.trajectory.first_step, len(log.trajectory)) == (2, 3)


def test_log_that_begins_with_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "some.ckpt"
    module = build(momentum)
    trainer = make_trainer("strategy", callbacks=[Save(path, 7)], max_epochs=2)
    trainer.fit(module, StatefulLoader(vectors()))
    log = TrajectoryLog(save_base=True)
    module = fit(log, module=build(momentum), ckpt_path=path, max_epochs=3)
    assert (log.trajectory.first_step, len(log.trajectory)) == (7, 8)
    base = torch.load(log.base_path, weights_only=True)
    again = build(momentum)
    again.load_state_dict(base["state_dict"])
    optimizer = momentum(again.parameters())
    optimizer.load_state_dict(base["optimizer"])
    replay_trajectory(again, optimizer, Trajectory.load(log.path))
    assert identical(again.state_dict(), module.state_dict())


def test_fit_that_goes_on() -> None:
    log = TrajectoryLog()
    module = build()
    trainer = make_trainer("strategy", callbacks=[log])
    trainer.fit(module, loader(vectors()))
    twin = pickle.loads(pickle.dumps(log))
    assert len(twin.trajectory) == BATCHES
    (optimizer,) = trainer.optimizers
    assert optimizer.on_answer is None


# Refusals


@pytest.mark.parametrize("make", [SophiaG, torch.optim.SGD])
def test_other_optimizers_are_refused(make: Any) -> None:
    with pytest.raises(MisconfigurationException, match="needs one zeroth-order optimizer"):
        fit(TrajectoryLog(), module=build(make))


def test_groups_with_gradients_are_refused() -> None:
    def make(params: Any) -> MeZO:
        first, *rest = params
        return MeZO([{"params": [first]}, {"params": rest, "first_order": True}])

    with pytest.raises(MisconfigurationException, match="first_order=True groups"):
        fit(TrajectoryLog(), module=build(make))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"filename": ""}, ValueError, "Invalid filename=''"),
        ({"every_n_steps": 0}, ValueError, "Invalid every_n_steps=0"),
        ({"every_n_steps": 1.5}, TypeError, r"Invalid every_n_steps=1\.5"),
    ],
)
def test_arguments(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TrajectoryLog(**arguments)


def test_paths_before_fit() -> None:
    log = TrajectoryLog()
    assert (log.path, log.base_path, log.state_dict()) == ("", "", {})
