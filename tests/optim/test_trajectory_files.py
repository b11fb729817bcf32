"""Tests of lightning_curvature/optim/trajectory*.py: what is refused, and files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_curvature.optim.mezo import MeZO
from lightning_curvature.optim.sophiag import SophiaG
from lightning_curvature.optim.trajectory import Trajectory
from lightning_curvature.optim.trajectory_changes import Changes, checksum
from lightning_curvature.optim.trajectory_replay import replay_trajectory
from lightning_curvature.optim.zo_conservative import ZOConservative
from lightning_curvature.optim.zo_momentum import ZOMomentum
from tests.helpers.optimizer_db import identical
from tests.helpers.trajectories import Run, net, two_groups

# Refusals


def test_other_optimizers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Only zeroth-order optimizers such as MeZO .* SophiaG"):
        Trajectory().record(SophiaG(net().parameters()))
    run = Run(MeZO)
    run.train(1)
    run.trajectory.stop()
    module = net()
    with pytest.raises(ValueError, match="that of an optimizer MeZO, got ZOMomentum"):
        replay_trajectory(module, ZOMomentum(module.parameters()), run.trajectory)
    with pytest.raises(ValueError, match="that of an optimizer MeZO, got ZOMomentum"):
        run.trajectory.record(ZOMomentum(module.parameters()))
    with pytest.raises(ValueError, match=r"groups of the sizes \[4\], got \[2, 2\]"):
        replay_trajectory(module, MeZO(two_groups(module)), run.trajectory)
    with pytest.raises(ValueError, match="not among those given"):
        replay_trajectory(net(), MeZO(module.parameters()), run.trajectory)


def test_other_parameters_are_refused() -> None:
    run = Run(MeZO)
    run.train(1)
    wide = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4))
    with pytest.raises(ValueError, match=r"Parameter 0 has the shape \[24, 5\] in the trajectory"):
        replay_trajectory(wide, MeZO(wide.parameters()), run.trajectory)
    double = net(torch.float64)
    with pytest.raises(ValueError, match="Parameter 0 has the dtype float32 in the trajectory"):
        replay_trajectory(double, MeZO(double.parameters()), run.trajectory)
    other = net()
    with torch.no_grad():
        other[0].weight[3, 1] += 1e-6
    with pytest.raises(ValueError, match="not those that the trajectory begins with"):
        replay_trajectory(other, MeZO(other.parameters()), run.trajectory)


def test_groups_with_gradients_are_refused() -> None:
    module = net()
    groups = two_groups(module)
    groups[1]["first_order"] = True
    with pytest.raises(ValueError, match="cannot hold MeZO with first_order=True groups"):
        Trajectory().record(MeZO(groups))


def test_new_groups_are_refused() -> None:
    run = Run(MeZO, groups=lambda module: module[0].parameters())
    run.train(1)
    run.optimizer.add_param_group({"params": run.module[2].parameters()})
    with pytest.raises((RuntimeError, ValueError), match="add_param_group"):
        run.train(1)


def test_recording_twice_is_refused() -> None:
    run = Run(MeZO)
    with pytest.raises(RuntimeError, match="recording already"):
        run.trajectory.record(run.optimizer)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"device": "cuda", "device_name": "A"}, "The run was on cuda A, the model is on cpu. Dir"),
        ({"device": "cpu", "device_name": "other"}, "set other_device=True for a replay up to"),
        ({"stream_version": 0}, "directions of the run were version 0"),
    ],
)
def test_other_devices_and_streams_are_refused(changed: dict[str, Any], message: str) -> None:
    run = Run(MeZO)
    run.train(1)
    run.trajectory.header.update(changed)
    with pytest.raises(ValueError, match=message):
        run.check()


def test_another_version_of_torch_is_told() -> None:
    run = Run(MeZO)
    run.train(1)
    run.trajectory.header["torch"] = "1.0"
    with pytest.warns(RuntimeWarning, match="The run used torch 1.0"):
        run.check()


@pytest.mark.parametrize("distribution", ["normal", "rademacher", "sphere"])
@pytest.mark.parametrize("masked", [False, True])
def test_directions_of_a_cpu_can_be_drawn_for_another_device(
    distribution: str, masked: bool
) -> None:
    """Shown on a CPU that pretends to be another one, where the replay is then exact."""
    run = Run(MeZO, distribution=distribution)
    if masked:
        run.optimizer.set_mask(run.module[0].weight, torch.tensor([3, 9, 11, 80]))
    run.train(3)
    run.trajectory.header["device_name"] = "other"
    module = net()
    optimizer = run.make(module)
    replay_trajectory(module, optimizer, run.trajectory, other_device=True)
    assert identical(module.state_dict(), run.module.state_dict())
    assert optimizer.noise_source is None


def test_large_parameters_and_other_devices() -> None:
    """Drawn in several parts: as rows, and as a vector."""

    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.linspace(0, 1, 300 * 260).view(300, 260))
            self.vector = nn.Parameter(torch.linspace(1, 2, 70_001))

        def forward(self) -> Tensor:
            return self.matrix.square().mean() + self.vector.square().mean()

    modules = [Large() for _ in range(3)]
    optimizer = MeZO(modules[0].parameters(), lr=1e-2)
    criterion = optimizer.attach_model(modules[0], lambda value: value)
    trajectory = Trajectory()
    trajectory.record(optimizer)
    for _ in range(3):
        optimizer.step(lambda: criterion(modules[0]()))
    replay_trajectory(modules[1], MeZO(modules[1].parameters()), trajectory)
    trajectory.header["device_name"] = "other"
    replay_trajectory(modules[2], MeZO(modules[2].parameters()), trajectory, other_device=True)
    for module in modules[1:]:
        assert identical(module.state_dict(), modules[0].state_dict())


def test_a_run_does_not_go_on_elsewhere() -> None:
    run = Run(MeZO)
    run.train(1)
    run.trajectory.stop()
    run.trajectory.header["device_name"] = "other"
    with pytest.raises(ValueError, match="begin a new one on this device"):
        run.trajectory.record(run.optimizer)


def test_a_run_does_not_go_on_with_other_streams() -> None:
    run = Run(MeZO)
    run.train(1)
    run.optimizer.stream_indices = [4, 5, 6, 7]
    with pytest.raises(RuntimeError, match="random streams are not those of the trajectory"):
        run.train(1)


def test_weights_that_somebody_else_wrote_are_told() -> None:
    run = Run(MeZO)
    run.train(2)
    with torch.no_grad():
        run.module[0].weight.mul_(0.5)
    run.train(1)
    run.trajectory.stop()
    module = net()
    with pytest.warns(RuntimeWarning, match="ended at other weights than the run"):
        replay_trajectory(module, run.make(module), run.trajectory)


# Files


def test_bytes_per_step(tmp_path: Path) -> None:
    """Eight for a constant learning rate, twelve more where it always changes."""

    def size(count: int, decay: float) -> int:
        run = Run(MeZO)
        for _ in range(count):  # what a step does to the log
            run.optimizer.on_answer(torch.ones(1, 1, dtype=torch.float64))
            run.optimizer._steps_done += 1
            run.optimizer.param_groups[0]["lr"] *= decay
        assert len(run.trajectory) == count
        run.trajectory.save(tmp_path / "log.pt")
        return (tmp_path / "log.pt").stat().st_size

    assert (size(3000, 1.0) - size(1000, 1.0)) / 2000 == pytest.approx(8, abs=0.1)
    assert (size(3000, 0.999) - size(1000, 0.999)) / 2000 == pytest.approx(20, abs=0.1)
    assert size(1000, 1.0) < 14_000


def test_answers_are_read_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_curvature.optim.trajectory._WAITING", 3)
    run = Run(ZOConservative)
    run.train(7)
    run.check()
    run.trajectory.truncate(4)
    run.trajectory.truncate(4)
    steps = list(run.trajectory.steps(2))
    assert len(run.trajectory) == 4
    assert [len(step.answers) for step in steps] == [2, 2]


def test_save_leaves_a_whole_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(MeZO)
    run.train(2)
    path = tmp_path / "logs" / "log.pt"
    run.trajectory.save(path)
    content = path.read_bytes()
    run.train(1)

    def fail(*args: Any) -> None:
        raise OSError("no room")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="no room"):
        run.trajectory.save(path)
    assert path.read_bytes() == content
    assert [file.name for file in path.parent.iterdir()] == ["log.pt"]


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    run = Run(MeZO)
    run.train(20)
    path = tmp_path / "log.pt"
    run.trajectory.save(path)
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"hello", content[:-40]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"Cannot read the trajectory .*log\.pt"):
            Trajectory.load(path)
    with pytest.raises(FileNotFoundError):
        Trajectory.load(tmp_path / "nothing.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "it is no trajectory"),
        ({"version": 2}, "it has version 2 and this release knows 1; update"),
        ({"version": None}, "it has version None"),
        ({"values": torch.zeros(3, dtype=torch.float64)}, "it is damaged"),
        ({"checksum": 1}, "its numbers changed after it was written"),
        ({"length": 7}, "it holds another number of answers than of steps"),
        ({"length": "x"}, "it is damaged"),
        ({"header": {}}, "it is damaged"),
        ({"changes": {}}, "it is damaged|another number"),
        ({"changes": {"layout": (torch.tensor([3, 1]), [1, 2])}}, "steps of 'layout' are not"),
    ],
)
def test_foreign_contents_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    run = Run(MeZO)
    run.train(2)
    torch.save({**run.trajectory.state_dict(), **change}, tmp_path / "log.pt")
    with pytest.raises(ValueError, match=f"(?s)Cannot read the trajectory .*{message}"):
        Trajectory.load(tmp_path / "log.pt")
    torch.save([1, 2], tmp_path / "log.pt")
    with pytest.raises(ValueError, match="it is no trajectory"):
        Trajectory.load(tmp_path / "log.pt")


def test_numbers_of_other_libraries_become_plain(tmp_path: Path) -> None:
    import numpy as np

    run = Run(MeZO)
    run.optimizer.param_groups[0]["lr"] = np.float64(0.01)
    run.optimizer.param_groups[0]["num_samples"] = 2
    run.train(2)
    run.trajectory.save(tmp_path / "log.pt")
    (first, _) = Trajectory.load(tmp_path / "log.pt").steps()
    assert type(first.groups[0]["lr"]) is float


# Changes


def test_changes() -> None:
    changes = Changes()
    mask = torch.tensor([1, 2])
    changes.set(0, {"lr": 0.5, "mask": None, "kind": "a"})
    changes.set(1, {"lr": 0.5, "mask": mask, "kind": "a"})
    changes.set(2, {"lr": 0.25, "mask": mask.clone(), "kind": "b"})
    changes.set(3, {"late": 1})
    twin = Changes.from_state_dict(changes.state_dict(), 4)
    for found in (changes, twin):
        assert found.at(1) == {"lr": 0.5, "mask": found.at(1)["mask"], "kind": "a"}
        assert torch.equal(found.at(3)["mask"], mask)
        assert found.runs("lr", 5) == [(2, 0.5), (3, 0.25)]
        assert "late" not in found.at(2)
        found.truncate(2)
        assert "late" not in found.at(5)
        assert found.runs("kind", 2) == [(2, "a")]
    assert checksum(torch.tensor([1.0, 2.0])) != checksum(torch.tensor([1.0, 2.0 + 3e-7]))
