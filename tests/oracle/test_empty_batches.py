"""Batches in which no loss function is called, because no example has a target."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_curvature import AdamQLR
from lightning_curvature.oracle import NoLossCapturedError
from tests.helpers.plain_loop import Loop, classification, network

IGNORED = -100


def masked_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Average over the examples that have a target; zero, with a graph, if there are none."""
    if bool((target == IGNORED).all()):
        return 0.0 * logits.sum()
    return F.cross_entropy(logits, target)


def _loop(**options: Any) -> Loop:
    directional = options.pop("directional", "jvp")
    return Loop(
        network(), lambda params: AdamQLR(params, **options), masked_loss, directional=directional
    )


@pytest.mark.parametrize("directional", ["fd", "jvp"])
def test_a_batch_without_targets_stands_still(directional: str) -> None:
    """Its gradient is zero, so nothing is to be descended, though the direction has a memory."""
    loop = _loop(directional=directional)
    batches = classification(6)
    loop.train(batches[:3])
    before = loop.theta()
    x, y = batches[3]
    loop.step(x, torch.full_like(y, IGNORED))
    assert torch.equal(loop.theta(), before)
    assert loop.stat("curvature") == 0.0
    assert loop.stat("skipped_steps") == 0.0
    assert loop.is_finite()
    loop.train(batches[4:])
    assert not torch.equal(loop.theta(), before)


@pytest.mark.parametrize("directional", ["fd", "jvp"])
def test_a_micro_batch_without_targets_counts_in_the_window(directional: str) -> None:
    """One half of the window has no curvature: the mean is half of the other's."""
    (x, y), (x2, y2) = classification(2, batch=4)
    curvatures = []
    for targets in (torch.full_like(y2, IGNORED), None):
        loop = _loop(directional=directional)
        loop.optimizer.zero_grad()
        (loop.criterion(loop.model(x), y) / 2).backward()
        if targets is not None:
            (loop.criterion(loop.model(x2), targets) / 2).backward()
        loop.optimizer.step()
        curvatures.append(loop.stat("curvature"))
    assert math.isclose(curvatures[0], curvatures[1], rel_tol=1e-6)


def test_a_loss_that_never_is_captured_is_an_error() -> None:
    """... from the first batch on."""
    loop = _loop()
    x, y = classification(1)[0]
    before = loop.theta()
    with pytest.raises(NoLossCapturedError, match=r"^The curvature of the loss is unknown"):
        loop.step(x, torch.full_like(y, IGNORED))
    assert torch.equal(loop.theta(), before)


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 2.0, 0.5, 1.0], dtype=torch.float64)])
@pytest.mark.parametrize("directional", ["fd", "jvp"])
def test_a_loss_of_nothing_but_ignored_targets(weight: Tensor | None, directional: str) -> None:
    """In torch it has NaN as its value and zero as its gradient: nothing is to be descended."""

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits, target, weight)

    loop = Loop(network(), AdamQLR, loss, directional=directional)
    batches = classification(4)
    loop.train(batches[:2])
    before = loop.theta()
    x, y = batches[2]
    assert math.isnan(loop.step(x, torch.full_like(y, IGNORED)))
    assert loop.stat("curvature") == 0.0
    assert torch.equal(loop.theta(), before)
    loop.train(batches[3:])
    assert loop.is_finite()


@pytest.mark.parametrize("curvature", ["fisher", "hessian"])
def test_a_stand_in_loss_without_parameters(curvature: str) -> None:
    """A tensor of zero that only satisfies the loop has no slope and no curvature."""

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        if bool((target == IGNORED).all()):
            return torch.zeros((), dtype=torch.float64, requires_grad=True)
        return F.cross_entropy(logits, target)

    (x, y), (x2, y2) = classification(2)
    found = []
    for second in (y2, torch.full_like(y2, IGNORED)):
        loop = Loop(network(), lambda params: AdamQLR(params, curvature=curvature), loss)
        loop.optimizer.zero_grad()
        (loop.criterion(loop.model(x), y) / 2).backward()
        (loop.criterion(loop.model(x2), second) / 2).backward()
        loop.optimizer.step()
        found.append(loop.stat("loss"))
        assert loop.is_finite()
    assert found[1] == pytest.approx(0.5 * F.cross_entropy(network()(x), y).item())
