"""SophiaG, SophiaH, AdaHessian and the estimators against recorded numbers of others' code.

arXiv:2305.14342 and arXiv:2006.00719. Labels and probes are those of the recordings.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_curvature.curvature.diagonal import ProbeSampler, hutchinson
from lightning_curvature.oracle import ModelOracle, Oracle
from lightning_curvature.oracle.labels import LabelSampler
from lightning_curvature.oracle.plans import Plan, ProbePlan, SamplePlan
from tests.golden.sophia_files import Recording

FAMILY = "sophia"
ATOL = 1e-10
# The official denominator is rho bs h + 1e-15, ours the larger of the two.
pytestmark = pytest.mark.filterwarnings("ignore:Sophia[GH] clips more than 99%:RuntimeWarning")


def compare(recording: Recording, step: int, model: nn.Module) -> bool:
    """Compare parameters (and buffers) after a step, if they were kept."""
    prefix = f"params@{step}/"
    kept = {k.removeprefix(prefix): v for k, v in recording.arrays.items() if k.startswith(prefix)}
    present = model.state_dict()
    for name, value in kept.items():
        expected = torch.from_numpy(np.array(value))
        torch.testing.assert_close(present[name], expected, rtol=0, atol=ATOL, msg=f"{name}@{step}")
    return bool(kept)


def recorded_labels(recording: Recording) -> type[LabelSampler]:
    """Make a sampler that gives the recorded labels instead of drawing."""
    steps = recording.arrays["hess_steps"].tolist()
    after = recording.hparams["hess_order"] == "after"
    labels = torch.from_numpy(recording.arrays["hess_labels"])

    class Recorded(LabelSampler):
        @property
        def labels(self) -> Tensor:
            _, step, rank, index = self._key
            assert (rank, index) == (0, 0)
            return labels[steps.index(int(step) + 1)]

        def _padded(self, known: Tensor, count: int) -> Tensor:
            # Of the examples beyond the fraction nothing is used.
            return torch.cat([known, known[:1].expand(count - len(known), *known.shape[1:])])

        def categorical(self, probabilities: Tensor, dim: int, call: int) -> Tensor:
            return self._padded(self.labels, len(probabilities))

        def normal(self, mean: Tensor, call: int) -> Tensor:
            drawn = self._padded(self.labels, len(mean))
            return (drawn - mean) / (mean.shape[1] / 2) ** 0.5

    assert all((s % recording.hparams["hess_interval"] == 0) == after for s in steps) or (
        recording.hparams["hess_interval"] == 1
    )
    return Recorded


def recorded_probes(recording: Recording) -> type[ProbeSampler]:
    """Make a sampler that gives the recorded probes."""
    steps = recording.arrays.get("hess_steps", np.arange(1, recording.steps + 1)).tolist()

    class Recorded(ProbeSampler):
        def draw(self, params: Sequence[Tensor], index: int) -> list[Tensor]:
            row = steps.index(self._step + 1)
            return [probe.double() for probe in recording.named("probe", row)]

    return Recorded


def check_end_to_end(recording: Recording) -> None:
    model = recording.model()
    optimizer: Any = recording.optimizer(model.parameters())
    make = recorded_labels if recording.kind == "SophiaG" else recorded_probes
    optimizer.sampler = make(recording)
    criterion = optimizer.attach_model(model, recording.loss_fn)
    clip = recording.hparams.get("grad_clip")
    rates = recording.arrays.get("win_rate")
    norms = next((v for k, v in recording.arrays.items() if k.startswith("state_norm/hess")), None)
    kept = counted = 0
    for step in range(1, recording.steps + 1):
        x, y = recording.batch(step)
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        assert loss.item() == pytest.approx(float(recording.arrays["loss"][step - 1]), abs=ATOL)
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.stats.pop("win_rate", None)
        optimizer.step()
        kept += compare(recording, step, model)
        if norms is not None:
            found = [optimizer.state[p]["hess_diag"].norm() for p in model.parameters()]
            # Ours holds the number of examples; theirs is told it in every step.
            scale = recording.hparams.get("bs", 1)
            expected = torch.from_numpy(norms[step - 1]) * scale
            torch.testing.assert_close(torch.stack(found), expected, rtol=1e-9, atol=ATOL)
        if rates is not None and "win_rate" in optimizer.stats:
            assert float(optimizer.stats["win_rate"]) == pytest.approx(float(rates[step - 1]))
            counted += 1
    assert kept > 1
    if recording.kind == "SophiaG":
        assert counted == len(recording.arrays["hess_steps"])


class Fixed(Oracle):
    """Gives the recorded estimates."""

    capabilities = frozenset({"sampled", "hvp"})
    ready = True

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording
        self.row = 0

    def sampled_squares(self) -> list[Tensor]:
        grads = self.recording.named("hess_grad", self.row)
        self.row += 1
        return [self.recording.hparams["bs"] * g**2 for g in grads]

    def products(self) -> list[tuple[list[Tensor], list[Tensor]]]:
        ones = [torch.ones_like(p) for p in self.recording.named("init")]
        self.row += 1
        return [(ones, self.recording.named("hess_est", self.row - 1))]

    def hvp(self, *args: Any, **kwargs: Any) -> Any: ...

    def mean_vectors(self, *vectors: Sequence[Tensor]) -> list[list[Tensor]]:
        return [list(vector) for vector in vectors]

    def base_loss(self) -> Tensor:
        return torch.zeros(())

    def evaluate(self, closure: Any) -> Any: ...
    def loss(self) -> Tensor: ...  # type: ignore[empty-body]
    def directional(self, *args: Any, **kwargs: Any) -> Any: ...
    def mean_(self, packed: Tensor) -> Tensor:
        return packed

    def grad_slope(self, slope: Tensor) -> Tensor | None: ...
    def select(self, params: Sequence[Tensor]) -> None: ...


def check_update_rule(recording: Recording) -> None:
    """Feed recorded gradients and estimates."""
    model = recording.model()
    optimizer: Any = recording.optimizer(model.parameters())
    optimizer.attach(Fixed(recording))
    for step in range(1, recording.steps + 1):
        for p, grad in zip(model.parameters(), recording.named("grad", step - 1), strict=True):
            p.grad = grad
        optimizer.step()
        compare(recording, step, model)


def check_curvature(recording: Recording) -> None:
    """Check exact products, Hutchinson's estimate, and the mean of sampled squares."""
    model = recording.model()
    params = list(model.parameters())
    oracle = ModelOracle(params, model, recording.loss_fn, wanted=lambda: True)
    plans: list[Plan] = []
    oracle.plan = lambda: plans[-1] if plans else None

    def run() -> Tensor:
        oracle.clear()
        loss = oracle.criterion(model(recording.x), recording.y)
        loss.backward()
        return loss

    def flat(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([t.detach().reshape(-1) for t in tensors])

    expected = {
        key: torch.from_numpy(np.array(recording.arrays[key]))
        for key in ("loss", "grad", "probes", "hvp", "hutchinson", "gauss_newton_diag")
    }
    loss = run()
    close = {"rtol": 0, "atol": ATOL}
    torch.testing.assert_close(loss.detach(), expected["loss"], **close)
    torch.testing.assert_close(flat([p.grad for p in params]), expected["grad"], **close)

    for probe, product, estimate in zip(
        expected["probes"], expected["hvp"], expected["hutchinson"], strict=True
    ):
        sizes = [p.numel() for p in params]
        z = [part.view_as(p) for part, p in zip(probe.split(sizes), params, strict=True)]

        class Given(ProbeSampler):
            def draw(self, params: Sequence[Tensor], index: int, z: Any = z) -> list[Tensor]:
                return list(z)

        torch.testing.assert_close(flat(oracle.hvp(z)), product, **close)
        plans.append(ProbePlan(Given("normal", 0, 0).draw))
        run()
        torch.testing.assert_close(flat(hutchinson(oracle)), estimate, **close)
        # Central differences leave the third derivative and round-off.
        difference = flat(oracle.hvp(z, method="fd")) - product
        assert float(difference.norm() / product.norm()) < 1e-6

    truth = expected["gauss_newton_diag"]
    draws = []
    for step in range(400):
        plans.append(SamplePlan(seed=3, step=step))
        run()
        draws.append(flat(oracle.sampled_squares()))
    stacked = torch.stack(draws)
    error = stacked.std(0) / len(draws) ** 0.5
    assert bool(((stacked.mean(0) - truth).abs() <= 5 * error + 1e-14).all())
    recorded = torch.from_numpy(recording.arrays["gnb_mc_mean"])
    assert float(stacked.mean(0).sum() / recorded.sum()) == pytest.approx(1.0, abs=0.1)


def test_recording(golden_file: Path) -> None:
    recording = Recording(golden_file)
    if recording.kind == "curvature":
        check_curvature(recording)
        return
    check_end_to_end(recording)
    if any(key.startswith("grad/") for key in recording.arrays):
        check_update_rule(recording)
