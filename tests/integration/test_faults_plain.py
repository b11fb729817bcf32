"""Fault drill: exceptions and interrupts inside the extra passes of a plain PyTorch loop.

Files under test: optim/base.py, optim/qlr.py, oracle/plain.py, oracle/closure.py.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature import CurvatureOptimizer, in_extra_pass
from tests.helpers.families import every_family
from tests.helpers.faults import Fault, assert_finite, assert_same_scene, exact_maker, scene
from tests.helpers.modules import loader, vectors
from tests.helpers.optimizer_db import PERIOD, Contract

ERRORS = {
    "exception": Fault("boom"),
    "runtime": RuntimeError("boom"),
    "memory": torch.OutOfMemoryError("boom"),
    "unsupported": NotImplementedError("boom"),
    "ctrl-c": KeyboardInterrupt(),
}
WARM_UP = 2
"""Steps before the fault, so that there is a state."""


class Network(nn.Module):
    """Batch norm and dropout; fails in chosen extra passes, half-way."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2))
        self.last = nn.Linear(8, 4)
        self.extra = 0
        self.fail_at: int | None = None
        self.error: BaseException = Fault("boom")

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        hidden = self.first(x)
        if in_extra_pass():
            self.extra += 1
            if self.extra - 1 == self.fail_at:
                raise self.error
        return self.last(hidden + torch.randn(()) * 0.01)


class AttachedLoop:
    """The loop with ``attach_model``.

    Args:
        make: Makes the optimizer.
        directional: See `CurvatureOptimizer.attach_model`.

    Attributes:
        before: The scene before the step.
        failed: Whether a step has failed.
    """

    def __init__(self, make: Callable[..., CurvatureOptimizer], directional: Any) -> None:
        torch.manual_seed(3)
        self.model = Network()
        self.optimizer = make(self.model.parameters())
        self.before: dict[str, Any] = {}
        self.failed = False
        self.attach(directional)

    def attach(self, directional: Any) -> None:
        """Attach the model."""
        self.criterion = self.optimizer.attach_model(
            self.model, F.cross_entropy, directional=directional
        )

    def step(self, batch: Any) -> float:
        """Take a step; remember the scene before it."""
        x, y = batch
        self.optimizer.zero_grad()
        # Extra passes recreate what the main pass found, and put back what they find themselves.
        torch.set_default_dtype(torch.float64)
        self.model.train()
        loss = self.criterion(self.model(x), y)
        loss.backward()
        torch.set_default_dtype(torch.float32)
        self.model.first.eval()
        self.before = scene(self.model)
        self.optimizer.step()
        return float(loss.detach())


class ClosureLoop(AttachedLoop):
    """The loop with a bare closure."""

    def attach(self, directional: Any) -> None:
        """There is nothing to attach."""

    def step(self, batch: Any) -> float:
        """Take a step; remember the scene after the main pass."""
        x, y = batch

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.model(x), y)
            loss.backward()
            if not in_extra_pass():
                self.before = scene(self.model)
            return loss

        return float(self.optimizer.step(closure).detach())


def passes_per_step(make: Callable[[], AttachedLoop]) -> int:
    """Return how often a step of the trained optimizer evaluates the model again."""
    loop, counts = make(), [0]
    for batch in list(loader(vectors(40), 8))[: WARM_UP + 1]:
        loop.step(batch)
        counts.append(loop.model.extra)
    return counts[-1] - counts[-2]


def drill(make: Callable[[], AttachedLoop], position: str, error: BaseException) -> AttachedLoop:
    """Warm up and fail once, in the first or the last extra pass of a step."""
    passes = passes_per_step(make)
    loop = make()
    batches = list(loader(vectors(40), 8))
    for batch in batches[:WARM_UP]:
        loop.step(batch)
    if "directional" in loop.optimizer.asks:
        assert passes >= 2
    if passes == 0:
        return loop
    loop.model.error = error
    loop.model.fail_at = loop.model.extra + (0 if position == "first" else passes - 1)
    with pytest.raises(type(error)) as caught:
        loop.step(batches[WARM_UP])
    assert caught.value is error
    loop.model.fail_at = None
    loop.failed = True
    return loop


def assert_goes_on(loop: AttachedLoop) -> None:
    """Assert that the very same optimizer trains."""
    data = vectors(40)
    losses = [loop.step(data.tensors) for _ in range(8)]
    assert_finite(loop.model, loop.optimizer)
    assert sum(losses[-3:]) < sum(losses[:3])


@every_family
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("position", ["first", "last"])
@pytest.mark.parametrize("directional", ["fd", "jvp"])
@pytest.mark.feature("Faults", "Exception inside an extra pass")
def test_attached_model(contract: Contract, directional: str, position: str, error: str) -> None:
    """Everything is as before the step, and the same optimizer goes on."""
    loop = drill(lambda: AttachedLoop(exact_maker(contract), directional), position, ERRORS[error])
    if loop.failed:
        assert_same_scene(scene(loop.model), loop.before)
    assert_goes_on(loop)


# What a bare closure cannot give is said once.
@pytest.mark.filterwarnings("ignore:.*has only a closure to ask:RuntimeWarning")
@every_family
@pytest.mark.parametrize("error", ["exception", "ctrl-c"])
@pytest.mark.parametrize("position", ["first", "last"])
def test_bare_closure(contract: Contract, position: str, error: str) -> None:
    """Buffers are not protected there; everything else is."""
    if contract.needs_module:
        pytest.skip("needs a model")
    backward = torch.autograd.backward
    loop = drill(lambda: ClosureLoop(exact_maker(contract), "fd"), position, ERRORS[error])
    if loop.failed:
        but = ("buffers", "function modes", "backward")
        assert_same_scene(scene(loop.model), loop.before, *but)
        assert scene(loop.model)["function modes"] == 0
    assert torch.autograd.backward is backward
    assert_goes_on(loop)


@every_family
@pytest.mark.parametrize(
    "options",
    [
        {"damping_algorithm": "decreasing-loss"},
        {
            "damping_algorithm": "decreasing-loss",
            "weight_decay": 0.1,
            "decoupled_weight_decay": False,
        },
        {"step_rejection": True},
    ],
)
def test_a_step_that_can_be_rejected(contract: Contract, options: dict[str, Any]) -> None:
    """Weights that the optimizer had moved and backed up itself."""
    if not contract.accepts(**options):
        pytest.skip("rejects no step")
    loop = drill(
        lambda: AttachedLoop(contract.making(**options), "jvp"), "last", KeyboardInterrupt()
    )
    assert_same_scene(scene(loop.model), loop.before)
    assert_goes_on(loop)


@every_family
def test_exception_in_the_main_pass(contract: Contract) -> None:
    """What was recorded of a batch that never came to its step does not get into the next one."""
    loop = AttachedLoop(contract.make, "jvp")
    first, second, *others = loader(vectors(40), 8)
    loop.step(first)
    output = loop.model(second[0])
    with pytest.raises(RuntimeError):
        loop.criterion(output, second[1].float()).backward()
    assert_same_scene(scene(loop.model), loop.before, "parameters", "buffers", "random")
    for batch in others[:PERIOD]:
        asks = contract.info.asks and loop.optimizer.wants_record()
        loss = loop.step(batch)
        if asks:
            assert loop.optimizer.stats["loss"].item() == loss
    assert_goes_on(loop)
