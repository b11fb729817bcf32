"""FAdam against trajectories of the official code (arXiv:2405.12807)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_curvature.optim.diagonal import DiagonalOptimizer
from tests.golden.fadam_files import Trajectory

FAMILY = "fadam"
# The loss is that before an update; the states are compared relative to their size.
LOSS = 1e-10


def compare(trajectory: Trajectory, step: int, model: nn.Module, optimizer: Any) -> None:
    """Compare parameters, buffers and states after a step (counted from 1)."""
    stored = trajectory.below(f"params@{step}")
    found = model.state_dict()
    assert not stored or stored.keys() == found.keys()
    for name, expected in stored.items():
        if expected.is_floating_point():
            difference = float((found[name] - expected).abs().max())
            assert difference <= trajectory.tolerance, (name, step)
        else:
            assert torch.equal(found[name], expected), (name, step)
    for name, norms in trajectory.state_norms(optimizer).items():
        expected_norms = trajectory.arrays[f"state_norm/{name}"][step - 1]
        scale = max(1.0, float(expected_norms.max()))
        np.testing.assert_allclose(norms, expected_norms, rtol=1e-9, atol=1e-9 * scale)


@pytest.mark.parametrize("route", ["blocks", "one tensor at a time", "branch-free"])
def test_stored_gradients(golden_file: Path, route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The update rule alone."""
    trajectory = Trajectory(golden_file)
    grads = trajectory.below("grad")
    if not grads:
        assert trajectory.stored_steps(), "neither gradients nor parameters"
        return
    if route == "branch-free":
        monkeypatch.setattr(DiagonalOptimizer, "_can_look", lambda *_: False)
    foreach = False if route == "one tensor at a time" else None
    model = trajectory.model()
    named = dict(model.named_parameters())
    assert grads.keys() == named.keys()
    optimizer = trajectory.optimizer(model.parameters(), foreach=foreach)
    for step in range(1, trajectory.steps + 1):
        for name, p in named.items():
            p.grad = grads[name][step - 1].clone()
        optimizer.step()
        # Buffers belong to forward passes, which there are none of here.
        for name, buffer in model.named_buffers():
            buffer.copy_(trajectory.below(f"params@{step}").get(name, buffer))
        compare(trajectory, step, model, optimizer)
    assert trajectory.stored_steps()[-1] == trajectory.steps


def test_end_to_end(golden_file: Path) -> None:
    """With gradients of our own."""
    trajectory = Trajectory(golden_file)
    model = trajectory.model()
    optimizer = trajectory.optimizer(model.parameters())
    losses = []
    for step, (x, y) in enumerate(trajectory.epochs(), start=1):
        optimizer.zero_grad()
        loss = trajectory.loss_fn(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        compare(trajectory, step, model, optimizer)
    np.testing.assert_allclose(losses, trajectory.arrays["loss"], rtol=LOSS, atol=LOSS)
    assert trajectory.stored_steps()[-1] == trajectory.steps
