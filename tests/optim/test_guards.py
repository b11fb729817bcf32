"""Guards of lightning_curvature/optim/qlr.py: nothing that is not finite reaches a weight."""

import copy
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature import SGDQLR, AdamQLR
from tests.helpers.plain_loop import CLASSES, FEATURES, Loop, classification, half_mse, network

OPTIMIZERS = pytest.mark.parametrize("cls", [AdamQLR, SGDQLR])
ALGORITHMS = pytest.mark.parametrize(
    "algorithm", ["levenberg-marquardt", "decreasing-loss", "fixed"]
)
PATIENT = {"max_failures": 1000}


def snapshot(loop: Loop) -> dict[str, Any]:
    """Copy everything a bad step must not touch."""
    return copy.deepcopy(
        {
            "weights": loop.theta(),
            "moments": [dict(loop.optimizer.state.get(p, {})) for p in loop.model.parameters()],
            "damping": loop.optimizer.damping,
        }
    )


def assert_unchanged(loop: Loop, before: dict[str, Any]) -> None:
    """Compare with a snapshot, bit for bit."""
    after = snapshot(loop)
    torch.testing.assert_close(after, before, rtol=0, atol=0)


# A bad batch


def nan_batch(x: Tensor) -> Tensor:
    x = x.clone()
    x[1, 2] = math.nan
    return x


def infinite_batch(x: Tensor) -> Tensor:
    x = x.clone()
    x[1, 2] = math.inf
    return x


DECAYS: dict[str, dict[str, Any]] = {
    "no-decay": {},
    "decay": {"weight_decay": 0.1},
    "official-decay": {"weight_decay": 0.1, "decoupled_weight_decay": False},
}


@OPTIMIZERS
@ALGORITHMS
@pytest.mark.parametrize("decay", list(DECAYS))
@pytest.mark.parametrize("spoil", [nan_batch, infinite_batch])
@pytest.mark.parametrize("directional", ["jvp", "fd"])
def test_a_bad_batch_changes_nothing(
    cls: type, algorithm: str, decay: str, spoil: Callable[[Tensor], Tensor], directional: str
) -> None:
    options = {"damping_algorithm": algorithm, **DECAYS[decay], **PATIENT}
    batches = classification(4)
    loop = Loop(network(), partial(cls, **options), directional=directional)
    loop.train(batches[:2])
    before = snapshot(loop)
    x, y = batches[2]
    loop.step(spoil(x), y)
    assert loop.stat("skipped_steps") == 1
    assert_unchanged(loop, before)
    loop.step(*batches[3])
    assert loop.stat("skipped_steps") == 1
    assert loop.is_finite()
    assert not torch.equal(loop.theta(), before["weights"])
    if cls is AdamQLR:
        assert all(loop.optimizer.state[p]["step"] == 3 for p in loop.model.parameters())


@OPTIMIZERS
@pytest.mark.parametrize(
    "averages", [{"lr_ema": 0.5}, {"curvature_ema": 0.5}, {"curvature_update_interval": 2}]
)
def test_a_bad_batch_leaves_no_memory(cls: type, averages: dict[str, Any]) -> None:
    """A run with a bad batch in it goes on as one without."""
    batches = classification(5)
    options = {"damping_algorithm": "fixed", "max_lr": None, **averages, **PATIENT}
    loops = [Loop(network(), partial(cls, **options)) for _ in range(2)]
    clean, spoiled = loops
    # Two bad ones, so that steps with an interval stay in phase.
    for batch in batches[:2]:
        clean.step(*batch)
        spoiled.step(*batch)
    for x, y in batches[2:4]:
        spoiled.step(nan_batch(x), y)
    for batch in batches[2:]:
        clean.step(*batch)
        spoiled.step(*batch)
        torch.testing.assert_close(spoiled.theta(), clean.theta(), rtol=1e-12, atol=1e-12)


@OPTIMIZERS
def test_a_bad_first_batch(cls: type) -> None:
    """Running averages start at the first good step."""
    batches = classification(3)
    options = {"lr_ema": 0.5, "curvature_ema": 0.5, **PATIENT}
    clean = Loop(network(), partial(cls, **options))
    spoiled = Loop(network(), partial(cls, **options))
    x, y = batches[0]
    spoiled.step(nan_batch(x), y)
    for batch in batches:
        clean.step(*batch)
        spoiled.step(*batch)
    torch.testing.assert_close(spoiled.theta(), clean.theta(), rtol=1e-12, atol=1e-12)


@OPTIMIZERS
@ALGORITHMS
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e200])
def test_a_bad_gradient_changes_nothing(cls: type, algorithm: str, value: float) -> None:
    """The loss is finite, but one entry of the gradient is not (or overflows its square)."""
    options = {"damping_algorithm": algorithm, **PATIENT}
    batches = classification(3)
    loop = Loop(network(), partial(cls, **options))
    loop.train(batches[:2])
    before = snapshot(loop)
    loop.backward(*batches[2])
    loop.model[0].weight.grad[1, 1] = value
    loop.optimizer.step()
    assert_unchanged(loop, before)
    assert loop.stat("skipped_steps") == 1


@OPTIMIZERS
def test_a_nan_loss_with_a_finite_gradient_is_survived(cls: type) -> None:
    loop = Loop(
        network(), partial(cls, **PATIENT), lambda z, y: F.cross_entropy(z, y) + float("nan")
    )
    before, damping = loop.theta(), loop.optimizer.damping
    loop.train(classification(3))
    assert loop.is_finite()
    # The gradient can be used; what the model promised cannot be judged.
    assert not torch.equal(loop.theta(), before)
    assert loop.optimizer.damping == damping
    assert loop.stat("skipped_steps") == 0


# Infinite new loss


class Wall(nn.Module):
    """half the square of w, infinite beyond a wall."""

    def __init__(self, wall: float = 0.5) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(1, dtype=torch.float64))
        self.wall = wall

    def forward(self, x: Tensor) -> Tensor:
        # The curvature is not that of the wall: it is met without a warning.
        barrier = torch.where(self.w < self.wall, torch.inf, 0.0).detach()
        return self.w * x + barrier


@OPTIMIZERS
@pytest.mark.parametrize("algorithm", ["levenberg-marquardt", "decreasing-loss"])
def test_an_infinite_new_loss_is_taken_back(cls: type, algorithm: str) -> None:
    options = {"damping": 0.1, "max_lr": None, "damping_algorithm": algorithm, **PATIENT}
    loop = Loop(Wall(), partial(cls, **options), half_mse)
    x, y = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    loop.step(x, y)
    assert math.isinf(loop.stat("new_loss"))
    assert loop.model.w.item() == pytest.approx(1.0, rel=1e-15)
    assert loop.optimizer.damping == pytest.approx(0.2)
    # The damping rises until the step stays before the wall.
    for _ in range(8):
        loop.step(x, y)
        assert 0.5 <= loop.model.w.item() <= 1.0
    assert loop.model.w.item() < 0.9
    assert math.isfinite(loop.stat("loss"))


@OPTIMIZERS
def test_a_taken_back_step_does_not_decay_the_weights(cls: type) -> None:
    loop = Loop(Wall(), partial(cls, max_lr=None, weight_decay=0.1), half_mse)
    x, y = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    loop.step(x, y)
    assert math.isinf(loop.stat("new_loss"))
    assert loop.model.w.item() == pytest.approx(1.0, rel=1e-15)


class Saturated(nn.Module):
    """Two classes, certain and wrong: the softmax Fisher is 1e-40, the gradient is not small."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([9.28]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.w * x, torch.zeros_like(x)], dim=1)


@pytest.mark.parametrize("algorithm", ["levenberg-marquardt", "decreasing-loss", "fixed"])
@pytest.mark.parametrize("interval", [1, 2])
def test_an_update_that_overflows_is_not_applied(algorithm: str, interval: int) -> None:
    """The step length is finite and so is the direction, but not their product."""
    options = {
        "damping": 1e-38,
        "min_damping": 0.0,
        "max_lr": None,
        "damping_algorithm": algorithm,
        "damping_update_interval": interval,
        **PATIENT,
    }
    loop = Loop(Saturated(), partial(SGDQLR, **options), F.cross_entropy)
    x, y = torch.tensor([10.0]), torch.tensor([1])
    if interval == 2:  # the second step does not look at the new loss
        loop.optimizer.param_groups[0]["lr"] = 0.0
        loop.step(x, y)
        loop.optimizer.param_groups[0]["lr"] = 1.0
    before, damping = loop.model.w.item(), loop.optimizer.damping
    loop.step(x, y)
    assert 0.0 < loop.stat("curvature") < 1e-30
    assert loop.model.w.item() == before
    assert loop.stat("skipped_steps") == 1
    # The model was wrong; more damping shortens the next step.
    factor = 1.0 if algorithm == "fixed" else 2.0
    assert loop.optimizer.damping == pytest.approx(factor * damping, rel=1e-5, abs=0.0)


# Curvature


def flat_loss(output: Tensor, target: Tensor) -> Tensor:
    """Absolute error: a slope without curvature."""
    return F.l1_loss(output, target)


@OPTIMIZERS
@pytest.mark.parametrize("curvature", ["fisher", "hessian"])
def test_zero_curvature_without_damping_is_skipped(cls: type, curvature: str) -> None:
    x = classification(1)[0][0]
    model = nn.Linear(FEATURES, CLASSES, dtype=torch.float64)
    options = {"damping": 0.0, "min_damping": 0.0, "curvature": curvature, **PATIENT}
    loop = Loop(model, partial(cls, **options), flat_loss)
    before = loop.theta()
    loop.step(x, torch.full((len(x), CLASSES), 100.0, dtype=torch.float64))
    assert loop.stat("curvature") == 0.0
    assert torch.equal(loop.theta(), before)
    assert loop.stat("skipped_steps") == 1
    assert loop.optimizer.damping == 0.0


@OPTIMIZERS
def test_zero_curvature_without_damping_raises_the_damping_to_its_floor(cls: type) -> None:
    """... from where it can grow, so that training goes on."""
    x = classification(1)[0][0]
    y = torch.full((len(x), CLASSES), 100.0, dtype=torch.float64)
    loop = Loop(
        nn.Linear(FEATURES, CLASSES, dtype=torch.float64), partial(cls, damping=0.0), flat_loss
    )
    losses = loop.train([(x, y)] * 3)
    assert losses[1] == losses[0] > losses[2]
    assert loop.stat("skipped_steps") == 1


@OPTIMIZERS
def test_zero_curvature_with_damping_descends(cls: type) -> None:
    x = classification(1)[0][0]
    y = torch.full((len(x), CLASSES), 100.0, dtype=torch.float64)
    loop = Loop(nn.Linear(FEATURES, CLASSES, dtype=torch.float64), cls, flat_loss)
    losses = loop.train([(x, y)] * 5)
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == 5


@OPTIMIZERS
def test_negative_curvature_descends(cls: type) -> None:
    """At the top of a hill the Newton step would climb; the guard descends."""
    x = torch.ones(1, 1, dtype=torch.float64)
    y = torch.zeros(1, 1, dtype=torch.float64)
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.constant_(model.weight, 1.0)
    loop = Loop(
        model,
        partial(cls, curvature="hessian", **PATIENT),
        lambda output, target: F.mse_loss(torch.tanh(2 * output), target),
    )
    curvatures, losses = [], []
    while not losses or losses[-1] > 0.01:
        losses.append(loop.step(x, y))
        curvatures.append(loop.stat("curvature"))
        assert loop.stat("step_length") > 0
        assert loop.stat("quad_model_change") < 0
        assert len(losses) < 40
    assert curvatures[0] < 0 < curvatures[-1]
    assert loop.stat("skipped_steps") == 0


@OPTIMIZERS
@ALGORITHMS
@pytest.mark.parametrize("scale", [0.0, 1e-25, 1e-20])
def test_a_zero_gradient_is_not_a_failure(cls: type, algorithm: str, scale: float) -> None:
    """Nothing to descend; the square of 1e-20 is below the normal range of float32."""
    loop = Loop(
        network(dtype=torch.float32),
        partial(cls, damping=1.0, damping_algorithm=algorithm, max_failures=2),
        lambda output, target: scale * F.cross_entropy(output, target),
    )
    before = loop.theta()
    # Would warn or raise at the second failure.
    loop.train(classification(4, dtype=torch.float32))
    assert loop.stat("skipped_steps") == 0
    if scale == 0:
        assert torch.equal(loop.theta(), before)
    assert loop.is_finite()


# Counting


@OPTIMIZERS
def test_too_many_failures_in_a_row_stop_training(cls: type) -> None:
    loop = Loop(network(), partial(cls, max_failures=3))
    x, y = classification(1)[0]
    loop.step(nan_batch(x), y)
    loop.step(nan_batch(x), y)
    text = (
        rf"{cls.__name__} found no usable step 3 times in a row: gradient or curvature was not "
        r"finite\. Look for NaN in the data, "
        r"lower max_lr, or raise min_damping\. The last steps:\n"
        r"  step 1: loss nan, (new_loss nan, )?grad_norm nan, .*damping 0\.001, step_length 0\n"
        r"  step 2: loss nan, .*\n  step 3: loss nan, [^\n]*$"
    )
    with pytest.raises(RuntimeError, match=text):
        loop.step(nan_batch(x), y)


@OPTIMIZERS
@pytest.mark.parametrize("good", range(5))
def test_the_limit_is_exact(cls: type, good: int) -> None:
    """Wherever the failures begin between two readings of the counts."""
    loop = Loop(network(), partial(cls, max_failures=3))
    x, y = classification(1)[0]
    loop.train([(x, y)] * good)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loop.train([(nan_batch(x), y)] * 2)
    with pytest.raises(RuntimeError, match="3 times in a row"):
        loop.step(nan_batch(x), y)


@OPTIMIZERS
def test_a_good_step_between_failures_keeps_training(cls: type) -> None:
    loop = Loop(network(), partial(cls, max_failures=2))
    x, y = classification(1)[0]
    with pytest.warns(RuntimeWarning) as record:
        loop.train([(x, y), (nan_batch(x), y)] * 3)
    assert [str(w.message) for w in record] == [
        f"{cls.__name__} skipped 1 of 2 steps: gradient or curvature was not finite. "
        "stats['skipped_steps'] goes on counting."
    ]
    assert loop.stat("skipped_steps") == 3


@OPTIMIZERS
def test_the_count_of_failures_survives_a_checkpoint(cls: type) -> None:
    x, y = classification(1)[0]
    loop = Loop(network(), partial(cls, max_failures=4))
    loop.step(x, y)
    loop.step(nan_batch(x), y)
    again = Loop(network(), partial(cls, max_failures=4))
    again.optimizer.load_state_dict(loop.optimizer.state_dict())
    with pytest.warns(RuntimeWarning, match="skipped 2 of 3 steps"):
        again.step(nan_batch(x), y)
    again.step(nan_batch(x), y)
    with pytest.raises(RuntimeError, match="4 times in a row"):
        again.step(nan_batch(x), y)


# Overlong steps


@pytest.mark.parametrize("max_lr", [None, 0.1])
def test_an_overlong_step_is_announced(max_lr: float | None) -> None:
    """A flat loss with a slope: nothing but the damping, here tiny, limits the step."""
    weight = torch.nn.Parameter(torch.zeros(1, 2))
    optimizer = AdamQLR([weight], damping=1e-8, max_lr=max_lr, max_failures=1)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.l1_loss(torch.ones(4, 2) @ weight.T, torch.full((4, 1), 1e9))
        loss.backward()
        return loss

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step(closure)
    said = [str(w.message) for w in caught if "derived a step length of" in str(w.message)]
    assert len(said) == (max_lr is None)
    assert all("set max_lr" in text for text in said)
