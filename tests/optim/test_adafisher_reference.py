"""`AdaFisher` in reference mode: the defects of the authors' code, which the other has not."""

import copy
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.adafisher import (
    BOTH,
    EXACT,
    factors,
    inside,
    making,
    theta,
)
from tests.helpers.optimizer_db import identical
from tests.helpers.plain_loop import Loop, classification, network


class Positional(nn.Module):
    """Parameters that the authors' code knows no layer for come first."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(3, 5, dtype=torch.float64))
        self.embedding = nn.Embedding(7, 5, dtype=torch.float64)
        self.linear = nn.Linear(5, 6, dtype=torch.float64)
        self.norm = nn.LayerNorm(6, dtype=torch.float64)
        self.head = nn.Linear(6, 4, dtype=torch.float64)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.linear(self.embedding(tokens) + self.position)
        return self.head(self.norm(hidden).tanh().mean(1))


@BOTH
@pytest.mark.parametrize("mode", ["reference", "corrected"])
def test_the_last_layers_are_never_updated_in_reference_mode(cls: type[Any], mode: str) -> None:
    torch.manual_seed(0)
    loop = Loop(Positional(), making(cls, mode=mode))
    before = theta(loop)
    tokens = torch.randint(7, (4, 8, 3))
    loop.train([(x, x[:, 0] % 4) for x in tokens])
    stuck = {name for name, p in loop.model.named_parameters() if torch.equal(p, before[name])}
    last = {f"{layer}.{role}" for layer in ("norm", "head") for role in ("weight", "bias")}
    assert stuck == (last if mode == "reference" else set())


def test_a_parameter_of_the_shape_of_a_weight_is_paired_wrongly_in_reference_mode() -> None:
    """As in the authors' code; the weight itself then has no layer."""

    class Lookalike(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(5, 5, dtype=torch.float64), nn.Linear(5, 4))
            self.to(torch.float64)
            self.shift = nn.Parameter(torch.zeros(5, 5, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x @ (self.shift + 1))

    model = Lookalike()
    loop = Loop(model, making(mode="reference"), groups=lambda m: [m.shift, *m[0].parameters()])
    before = theta(loop)
    assert inside(loop).fallback_parameters == ["0.weight", "0.bias"]
    loop.train(classification(1))
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert moved == ["shift"]


def test_fisher_vanishes_in_reference_mode() -> None:
    """Beside the damping, after a few refreshes; not in corrected mode."""
    batches = classification(8, batch=64)
    largest = {}
    for mode in ("reference", "corrected"):
        loop = Loop(network(), making(mode=mode, lr=0.0))
        loop.train(batches[:1])
        at_start = loop.stat("fisher_max")
        loop.train(batches)
        largest[mode] = loop.stat("fisher_max")
        if mode == "reference":
            assert at_start == pytest.approx(0.088**2 / 1e-3, rel=0.2)
            assert loop.stat("damped_fraction") == 1
    assert largest["reference"] < 0.077
    assert largest["corrected"] > 3

    def small(output: Tensor, y: Tensor) -> Tensor:
        return 1e-5 * F.cross_entropy(output, y)

    loop = Loop(network(), making(mode="reference", lr=0.0), small)
    loop.train(batches)
    assert loop.stat("fisher_max") < 1e-4


def test_reference_mode_is_momentum_descent() -> None:
    """Once its curvature is gone: with the learning rate lr / damping."""
    batches = classification(30, batch=64)
    loop = Loop(network(), making(mode="reference"))
    loop.train(batches[:5])
    other = copy.deepcopy(loop.model)
    for module in other.modules():
        module._forward_hooks.clear()
    sgd = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    for p, q in zip(loop.model.parameters(), other.parameters(), strict=True):
        average = loop.optimizer.state[p]["exp_avg"]
        sgd.state[q]["momentum_buffer"] = 10 * average
    start = loop.theta()
    loop.train(batches[5:])
    for t, (x, y) in enumerate(batches[5:], start=6):
        sgd.zero_grad()
        F.cross_entropy(other(x), y).backward()
        sgd.param_groups[0]["lr"] = 0.1 / (1 - 0.9**t)
        sgd.step()
    one = loop.theta() - start
    two = torch.cat([p.detach().reshape(-1) for p in other.parameters()]) - start
    assert torch.cosine_similarity(one, two, dim=0) > 0.999
    assert (one - two).norm() < 0.05 * two.norm()


def test_reference_mode_counts_micro_batches_one_by_one() -> None:
    """Before the first step only the last of them counts; later each decays the average."""
    one, two = (Loop(network(), making(mode="reference", lr=0.0)) for _ in range(2))
    batches = classification(4)

    def accumulate(loop: Loop, parts: Iterable[tuple[Tensor, Tensor]]) -> None:
        loop.optimizer.zero_grad()
        for x, y in parts:
            loop.criterion(loop.model(x), y).backward()
        loop.optimizer.step()

    accumulate(one, batches[:2])
    accumulate(two, batches[1:2])
    assert identical(factors(one), factors(two))
    accumulate(one, batches[2:])
    for batch in batches[2:]:
        accumulate(two, [batch])
    for name, entry in factors(one).items():
        torch.testing.assert_close(entry["input"], factors(two)[name]["input"], **EXACT)
