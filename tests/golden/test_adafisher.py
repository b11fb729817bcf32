"""AdaFisher and AdaFisherW against trajectories of the authors' own code (arXiv:2405.16397)."""

from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_curvature.optim.adafisher_base import AdaFisherOptimizer
from tests.golden.adafisher_files import Trajectory

FAMILY = "adafisher"


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    """Compare absolutely, as the recordings' README says."""
    torch.testing.assert_close(ours.detach(), theirs, rtol=0, atol=tolerance)


def compare(
    trajectory: Trajectory, step: int, model: nn.Module, optimizer: AdaFisherOptimizer
) -> None:
    """Compare one step (counted from 1) with the recording."""
    arrays, tolerance = trajectory.arrays, trajectory.tolerance
    factors = optimizer.state_dict()["curvature"]["factors"]
    assert list(factors) == trajectory.layer_names
    for key, part in (("H_D", "input"), ("S_D", "output")):
        norms = torch.stack([entry[part].norm() for entry in factors.values()])
        close(norms, torch.from_numpy(arrays[f"state_norm/{key}"][step - 1]), tolerance)
    moments = [optimizer.state[p]["exp_avg"].norm() for p in model.parameters()]
    close(torch.stack(moments), torch.from_numpy(arrays["state_norm/exp_avg"][step - 1]), tolerance)
    if step not in trajectory.stored_steps():
        return
    state = model.state_dict()
    for name, value in trajectory.snapshot(f"params@{step}").items():
        close(state[name], value, tolerance)
    for key, part in (("H_D", "input"), ("S_D", "output")):
        snapshot = trajectory.snapshot(f"{key}@{step}")
        assert set(snapshot) == set(factors)
        for name, value in snapshot.items():
            close(factors[name][part], value, tolerance)


def test_end_to_end(golden_file: Path) -> None:
    trajectory = Trajectory(golden_file)
    model = trajectory.model()
    optimizer = trajectory.optimizer(model.parameters())
    criterion = optimizer.attach_model(model, trajectory.loss_fn)
    assert not optimizer.fallback_parameters
    for step, (x, y) in enumerate(trajectory.epochs(), start=1):
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        close(loss, torch.tensor(trajectory.arrays["loss"][step - 1]), trajectory.tolerance)
        optimizer.step()
        compare(trajectory, step, model, optimizer)
    assert trajectory.stored_steps()[-1] == trajectory.steps


def test_recorded_gradients(golden_file: Path) -> None:
    """The gradients handed over are those recorded; the layers see the pass they belong to."""
    trajectory = Trajectory(golden_file)
    model = trajectory.model()
    optimizer = trajectory.optimizer(model.parameters())
    criterion = optimizer.attach_model(model, trajectory.loss_fn)
    recorded = trajectory.snapshot("grad")
    for step, (x, y) in enumerate(trajectory.epochs(), start=1):
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        for name, p in model.named_parameters():
            if name in recorded:
                close(p.grad, recorded[name][step - 1], trajectory.tolerance)
                p.grad = recorded[name][step - 1].clone()
        optimizer.step()
        compare(trajectory, step, model, optimizer)
