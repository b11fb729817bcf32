"""Tests of lightning_curvature/optim/trajectory*.py."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_curvature.optim.forward_gradient import ForwardGradient
from lightning_curvature.optim.hizoo import HiZOO
from lightning_curvature.optim.hizool import HiZOOL
from lightning_curvature.optim.mezo import MeZO
from lightning_curvature.optim.trajectory import Trajectory
from lightning_curvature.optim.trajectory_replay import replay_trajectory
from lightning_curvature.optim.zo_adam import ZOAdam
from lightning_curvature.optim.zo_conservative import ZOConservative
from lightning_curvature.optim.zo_momentum import ZOMomentum
from lightning_curvature.optim.zo_sign_sgd import ZOSignSGD
from tests.helpers.optimizer_db import identical
from tests.helpers.trajectories import Run, batches, net, state_of, two_groups

FAMILY: tuple[Any, ...] = (
    *(MeZO, ZOMomentum, ZOSignSGD, ZOAdam, ZOConservative, HiZOO, HiZOOL, ForwardGradient),
)
every_optimizer = pytest.mark.parametrize("cls", FAMILY, ids=lambda cls: cls.__name__)
every_restore = pytest.mark.parametrize("restore", ["fused", "inplace", "snapshot"])


# Exactness


@every_optimizer
@every_restore
def test_replay_ends_at_the_same_bits(cls: Any, restore: str, tmp_path: Path) -> None:
    settings = {} if cls is ForwardGradient else {"restore": restore}
    run = Run(cls, **settings)
    run.train()
    assert any(
        not torch.equal(p, q)
        for p, q in zip(run.module.parameters(), net().parameters(), strict=True)
    )
    run.trajectory.save(tmp_path / "log.pt")
    run.check(Trajectory.load(tmp_path / "log.pt"))


@pytest.mark.parametrize("half_precision", ["stochastic", "master", "nearest"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cls", [MeZO, HiZOO, ZOAdam])
def test_replay_in_half_precision(cls: Any, dtype: torch.dtype, half_precision: str) -> None:
    run = Run(cls, dtype=dtype, half_precision=half_precision, perturbation_scale=1e-2)
    run.train()
    run.check()


@pytest.mark.parametrize(
    "settings",
    [
        {"estimator": "one_sided"},
        {"estimator": "residual"},
        {"num_samples": 3, "weight_decay": 0.1},
        {"distribution": "sphere"},
        {"distribution": "rademacher"},
        {"layer_scale": "parameter_norm", "layer_scale_update_interval": 2},
        {"layer_scale": "gradient_norm", "layer_scale_update_interval": 2},
        {"max_projected_grad": 0.1},
        {"foreach": False, "maximize": True},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_replay_of_other_settings(settings: dict[str, Any]) -> None:
    run = Run(MeZO, **settings)
    run.train()
    run.check()


@pytest.mark.parametrize("blockwise", ["coordinate", "joint"])
@pytest.mark.parametrize("cls", [MeZO, HiZOO, ZOConservative])
def test_replay_of_blocks(cls: Any, blockwise: str) -> None:
    def groups(module: nn.Module) -> list[dict[str, Any]]:
        return [{"params": list(part.parameters())} for part in (module[2], module[0])]

    run = Run(cls, groups=groups, blockwise=blockwise)
    run.train()
    run.check()


def test_replay_follows_schedules() -> None:
    def before(step: int, optimizer: Any) -> None:
        for number, group in enumerate(optimizer.param_groups):
            group["lr"] = 0.01 * (number + 1) / (step + 1)
            group["num_samples"] = 1 + step // 2

    def groups(module: nn.Module) -> list[dict[str, Any]]:
        return [
            {"params": list(module[0].parameters()), "weight_decay": 0.1},
            {"params": list(module[2].parameters())},
        ]

    run = Run(MeZO, groups=groups)
    run.train(6, before)
    run.check()
    logged = [step.groups for step in run.trajectory.steps()]
    assert [pair[1]["lr"] for pair in logged] == [0.02 / (step + 1) for step in range(6)]
    assert [pair[0]["num_samples"] for pair in logged] == [1, 1, 2, 2, 3, 3]


@pytest.mark.filterwarnings("ignore:MeZO skipped:RuntimeWarning")
@pytest.mark.parametrize("estimator", ["two_sided", "residual"])
def test_replay_of_skipped_steps(estimator: str) -> None:
    run = Run(MeZO, estimator=estimator, max_failures=2)
    run.train(2)
    given = torch.full((6, 5), torch.nan)
    run.optimizer.step(lambda: run.criterion(run.module(given), torch.zeros(6, dtype=torch.long)))
    run.train(2)
    assert float(run.optimizer.stats["skipped_steps"]) == 1
    run.check()


def test_replay_of_masks_that_change() -> None:
    def before(step: int, optimizer: Any) -> None:
        weight = optimizer.param_groups[0]["params"][0]
        if step in (0, 3):
            optimizer.set_mask(weight, torch.tensor([step, 17, 60]))
        elif step == 5:
            optimizer.set_mask(weight, None)

    run = Run(ZOMomentum)
    run.train(7, before)
    run.check()
    masks = [step.masks[0] for step in run.trajectory.steps()]
    listed = [None if mask is None else mask.tolist() for mask in masks]
    assert listed[2:6] == [
        [0, 17, 60],
        [3, 17, 60],
        [3, 17, 60],
        None,
    ]


def test_masks_that_are_gone_after_a_resume() -> None:
    run = Run(MeZO)
    run.optimizer.set_mask(run.module[0].weight, torch.tensor([1, 2]))
    run.train(2)
    run.trajectory.stop()
    run.optimizer.set_mask(run.module[0].weight, None)
    run.trajectory.record(run.optimizer)
    run.train(1)
    assert [step.masks[0] is None for step in run.trajectory.steps()] == [False, False, True]
    run.check()


def test_weights_loaded_after_recording_was_turned_on() -> None:
    run = Run(MeZO)
    weights = {name: p + 1 for name, p in net().state_dict().items()}
    run.module.load_state_dict(weights)
    run.train(2)
    run.check(prepare=lambda optimizer, module: module.load_state_dict(weights))


def test_replay_of_parameters_that_are_frozen_and_thawed() -> None:
    def before(step: int, optimizer: Any) -> None:
        optimizer.param_groups[0]["params"][0].requires_grad_(step >= 2)

    run = Run(MeZO)
    run.train(4, before)
    run.check()
    assert [step.frozen for step in run.trajectory.steps()] == [(0,), (0,), (), ()]


@every_restore
@pytest.mark.parametrize("in_closure", [True, False])
def test_replay_of_an_ordinary_loop(restore: str, in_closure: bool) -> None:
    """The way from where the parameters are moved to differs, and so does round-off."""
    run = Run(MeZO, restore=restore)
    for x, y in batches(4):
        loss = run.criterion(run.module(x), y)
        if in_closure:
            run.optimizer.step(lambda x=x, y=y: run.criterion(run.module(x), y))
        else:
            loss.backward()
            run.optimizer.step()
    run.check()


@every_restore
def test_replay_of_main_passes_away_from_the_step(restore: str) -> None:
    """As with gradient accumulation: the parameters go to the first point and back."""
    run = Run(MeZO, restore=restore)
    run.train(1)
    for _ in range(3):
        with run.optimizer._main_pass():
            pass
    assert run.optimizer.main_moves[0] == 3
    run.train(2)
    run.check()
    assert [step.moves[0] for step in run.trajectory.steps()] == [0, 3, 0]


def test_replay_with_a_noise_source() -> None:
    def noise(step: int, sample: int, index: int, param: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(100 * step + 10 * sample + index)
        return torch.randn(param.shape, generator=generator)

    run = Run(MeZO)
    run.optimizer.noise_source = noise
    run.train()

    def prepare(optimizer: Any, module: nn.Module) -> None:
        optimizer.noise_source = noise

    run.check(prepare=prepare)
    with pytest.raises(ValueError, match=r"had one in optimizer\.noise_source"):
        run.check()


def test_streams_are_those_of_the_run() -> None:
    """They follow the order of the model, which groups and a bare replay do not know."""

    def groups(module: nn.Module) -> list[dict[str, Any]]:
        return [{"params": list(module[2].parameters())}, {"params": list(module[0].parameters())}]

    run = Run(MeZO, groups=groups)
    run.train()
    assert run.trajectory.header["streams"] == [2, 3, 0, 1]
    run.check()


# Pieces of a run


def test_replay_in_parts_and_from_the_middle() -> None:
    run = Run(ZOAdam)
    run.train(2)
    weights, state = copy.deepcopy(run.module.state_dict()), state_of(run.optimizer)
    run.train(3, seed=5)

    module = net()
    optimizer = run.make(module)
    replay_trajectory(module, optimizer, run.trajectory, steps=2)
    assert identical(module.state_dict(), weights)
    assert identical(state_of(optimizer), state)
    replay_trajectory(module.parameters(), optimizer, run.trajectory, steps=0)
    replay_trajectory(module, optimizer, run.trajectory)
    assert identical(module.state_dict(), run.module.state_dict())
    with pytest.raises(ValueError, match=r"Invalid steps=1: must be in \[0, 0\]"):
        replay_trajectory(module, optimizer, run.trajectory, steps=1)


def test_log_that_begins_in_the_middle() -> None:
    run = Run(ZOMomentum)
    run.train(3)
    checkpoint = copy.deepcopy((run.module.state_dict(), run.optimizer.state_dict()))
    run.trajectory.stop()
    late = Trajectory()
    late.record(run.optimizer)
    run.train(2, seed=5)
    assert (len(run.trajectory), late.first_step, len(late)) == (3, 3, 2)

    def load(optimizer: Any, module: nn.Module) -> None:
        module.load_state_dict(checkpoint[0])
        optimizer.load_state_dict(checkpoint[1])

    run.check(late, load)
    with pytest.raises(ValueError, match=r"has taken 0 steps, but the trajectory covers 3 to 5"):
        run.check(late)


def test_log_goes_on_from_an_earlier_checkpoint(tmp_path: Path) -> None:
    run = Run(ZOMomentum)
    run.train(2)
    checkpoint = copy.deepcopy((run.module.state_dict(), run.optimizer.state_dict()))
    run.train(3, seed=5)
    run.trajectory.save(tmp_path / "log.pt")

    again = Run(ZOMomentum)
    again.trajectory.stop()
    again.trajectory = Trajectory.load(tmp_path / "log.pt")
    assert len(again.trajectory) == 5
    again.module.load_state_dict(checkpoint[0])
    again.optimizer.load_state_dict(checkpoint[1])
    again.trajectory.record(again.optimizer)
    again.train(2, seed=6)
    assert len(again.trajectory) == 4
    again.check()


def test_gaps_are_refused() -> None:
    run = Run(MeZO)
    run.train(1)
    run.trajectory.stop()
    run.train(2)
    run.trajectory.record(run.optimizer)
    with pytest.raises(RuntimeError, match="covers steps 0 to 1, but the optimizer is at step 3"):
        run.train(1)
    run.trajectory.stop()
    with pytest.raises(ValueError, match="begins at step 0"):
        run.trajectory.truncate(-1)


def test_a_step_that_breaks_off_is_not_logged() -> None:
    run = Run(MeZO, restore="snapshot", blockwise="coordinate", groups=two_groups)
    run.train(1)
    calls = 0

    def interrupt(answer: Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise KeyboardInterrupt

    note = run.optimizer.on_answer

    def both(answer: Tensor) -> None:
        note(answer)
        interrupt(answer)

    run.optimizer.on_answer = both
    with pytest.raises(KeyboardInterrupt):
        run.train(1)
    run.train(2)
    assert len(run.trajectory) == 3
    run.check()


def test_another_listener_goes_on_listening() -> None:
    run = Run(MeZO)
    run.trajectory.stop()
    heard: list[Tensor] = []
    run.optimizer.on_answer = heard.append
    run.trajectory.record(run.optimizer)
    run.train(2)
    assert len(heard) == 2
    run.trajectory.stop()
    assert run.optimizer.on_answer == heard.append
    run.train(1)
    assert (len(heard), len(run.trajectory)) == (3, 2)


def test_stopping_under_another_listener() -> None:
    run = Run(MeZO)
    note = run.optimizer.on_answer

    def other(answer: Tensor) -> None:
        note(answer)

    run.optimizer.on_answer = other
    run.train(1)
    run.trajectory.stop()
    run.train(1)
    assert len(run.trajectory) == 1


def test_the_last_step_is_there_without_another_one() -> None:
    run = Run(MeZO)
    assert (len(run.trajectory), repr(run.trajectory)) == (0, "Trajectory(no steps)")
    run.train(1)
    assert len(run.trajectory) == 1
    assert repr(run.trajectory) == "Trajectory(steps 0 to 1 of MeZO)"


def test_replay_of_nothing() -> None:
    module = net()
    replay_trajectory(module, MeZO(module.parameters()), Trajectory())
    assert identical(module.state_dict(), net().state_dict())


def test_copies_do_not_record() -> None:
    run = Run(MeZO)
    run.train(2)
    twin = pickle.loads(pickle.dumps(run.trajectory))
    run.train(1)
    assert (len(twin), len(copy.deepcopy(run.trajectory))) == (2, 3)
