"""The contract of the optimizers that run no backward: bad losses, parameters and groups.

Files under test: optim/zeroth_order.py, optim/displaced.py, optim/zeroth_storage.py.
"""

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature.optim.displaced import DisplacedOptimizer
from tests.helpers.families import variants_too
from tests.helpers.optimizer_db import Contract, every_forward_only
from tests.helpers.plain_loop import CLASSES, FEATURES, Loop, classification, network

PATIENT = {"max_failures": 1000}
# What the way there and back may add to a weight of float64.
ROUND_OFF = {"rtol": 0.0, "atol": 1e-14}

# What is not finite


@variants_too
@every_forward_only
@pytest.mark.parametrize(
    ("value", "restore", "looks"),
    [
        (math.nan, "fused", True),
        (math.nan, "snapshot", False),
        (math.inf, "fused", False),
        (-math.inf, "snapshot", True),
        (1e25, "fused", True),
        (1e25, "fused", False),
    ],
)
def test_a_loss_that_is_not_finite_skips_the_step(
    contract: Contract, value: float, restore: str, looks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and state stay, the step is counted; also where the device is not waited for.

    What is finite but far outside of float32 is no better.
    """
    if not looks:
        monkeypatch.setattr(DisplacedOptimizer, "_can_look", lambda *_: False)
    options = {"restore": restore} if contract.takes("restore") else {}
    batches, factor = classification(3), [1.0]
    loop = Loop(network(), contract.making(**options, **PATIENT), _scaled(factor))
    loop.step(*batches[0])
    before = loop.theta()
    names = ("step", "momentum_buffer", "exp_avg", "exp_avg_sq", "hess_diag", "hess_rows")
    state = copy.deepcopy(loop.optimizer.state_dict()["state"])
    factor[0] = value
    loop.step(*batches[1])
    torch.testing.assert_close(loop.theta(), before, **ROUND_OFF)
    after = loop.optimizer.state_dict()["state"]
    for index, kept in state.items():
        for name in set(kept) & set(names):
            torch.testing.assert_close(after[index][name], kept[name], rtol=1e-12, atol=0)
    assert loop.stat("skipped_steps") == 1
    factor[0] = 1.0
    loop.step(*batches[2])
    assert loop.stat("skipped_steps") == 1
    assert loop.is_finite()
    assert not torch.equal(loop.theta(), before)


def _scaled(factor: list[float]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda output, target: factor[0] * F.cross_entropy(output, target)


@every_forward_only
def test_too_many_losses_that_are_not_finite(contract: Contract) -> None:
    loop = Loop(network(), contract.making(max_failures=3), _scaled([math.nan]))
    before = loop.theta()
    text = (
        f"{contract.info.cls.__name__} found no usable step 3 times in a row: a loss was not "
        "finite. Look for NaN in the data, or lower lr or perturbation_scale"
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* skipped . of . steps")
        loop.train(classification(2))
        with pytest.raises(RuntimeError, match=f"^{text}"):
            loop.train(classification(1))
    torch.testing.assert_close(loop.theta(), before, **ROUND_OFF)


@every_forward_only
def test_looking_changes_nothing(contract: Contract, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps on a device, where numbers stay tensors, are those on a CPU."""
    loops = []
    for looks in (True, False):
        if not looks:
            monkeypatch.setattr(DisplacedOptimizer, "_can_look", lambda *_: False)
        loops.append(Loop(network(), contract.make))
        loops[-1].train(classification(4))
    torch.testing.assert_close(loops[1].theta(), loops[0].theta(), rtol=1e-9, atol=1e-12)


# Parameters and groups


@every_forward_only
def test_the_order_of_groups_and_parameters_does_not_matter(contract: Contract) -> None:
    batches = classification(3)
    one = Loop(network(), contract.make)
    two = Loop(
        network(),
        contract.make,
        groups=lambda model: [
            {"params": list(model[2].parameters())[::-1]},
            {"params": model[0].parameters()},
        ],
    )
    one.train(batches)
    two.train(batches)
    torch.testing.assert_close(two.theta(), one.theta(), rtol=1e-12, atol=1e-14)


@every_forward_only
@pytest.mark.parametrize("options", [{"foreach": False}, {"restore": "snapshot"}], ids=str)
def test_options_that_change_no_step(contract: Contract, options: dict[str, Any]) -> None:
    if not contract.takes(*options):
        pytest.skip("does not have it")
    one, two = Loop(network(), contract.make), Loop(network(), contract.making(**options))
    for loop in (one, two):
        loop.train(classification(4))
    torch.testing.assert_close(two.theta(), one.theta(), rtol=1e-9, atol=1e-12)


@every_forward_only
def test_maximize_mirrors_the_loss(contract: Contract) -> None:
    climbing = Loop(network(), contract.making(maximize=True), lambda z, y: -F.cross_entropy(z, y))
    falling = Loop(network(), contract.make)
    for loop in (climbing, falling):
        loop.train(classification(4))
    torch.testing.assert_close(climbing.theta(), falling.theta(), rtol=1e-9, atol=1e-12)


class Tied(nn.Module):
    """Uses a matrix twice, and one that does not lie row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, FEATURES, bias=False, dtype=torch.float64)
        self.again = nn.Linear(FEATURES, FEATURES, bias=False, dtype=torch.float64)
        self.again.weight = self.first.weight
        start = torch.randn(CLASSES, FEATURES, dtype=torch.float64)
        self.out = nn.Parameter(start.t().contiguous().t())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.again(torch.tanh(self.first(x)))), self.out)


@every_forward_only
def test_tied_and_transposed_parameters(contract: Contract) -> None:
    torch.manual_seed(4)
    loop = Loop(Tied(), contract.make)
    assert not loop.model.out.is_contiguous()
    losses = loop.train(classification(1, batch=32) * 20)
    assert losses[-1] < 0.95 * losses[0]
    assert loop.model.again.weight is loop.model.first.weight


@every_forward_only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("half_precision", ["stochastic", "master"])
def test_half_precision(contract: Contract, dtype: torch.dtype, half_precision: str) -> None:
    """Weights keep their dtype, the loss is computed in float32, and falls."""
    options: dict[str, Any] = {"half_precision": half_precision}
    if contract.takes("perturbation_scale"):
        options["perturbation_scale"] = 0.02
    loop = Loop(network(dtype=dtype), contract.making(**options))
    losses = loop.train(classification(1, batch=32, dtype=dtype) * 20)
    assert losses[-1] < 0.95 * losses[0]
    assert {p.dtype for p in loop.model.parameters()} == {dtype}
    assert loop.is_finite()


@every_forward_only
@pytest.mark.parametrize("restore", ["fused", "snapshot"])
def test_weights_that_others_change_between_steps(contract: Contract, restore: str) -> None:
    """Nothing remembers old values: loaded weights are where the next step starts."""
    options = {"restore": restore} if contract.takes("restore") else {}
    batches = classification(4)
    loop = Loop(network(), contract.making(lr=0.0, **options))
    loop.train(batches[:2])
    fresh = network(seed=9)
    loop.model.load_state_dict(fresh.state_dict())
    before = loop.theta()
    loop.train(batches[2:])
    torch.testing.assert_close(loop.theta(), before, **ROUND_OFF)


@every_forward_only
def test_master_copies_follow_loaded_weights(contract: Contract) -> None:
    loop = Loop(network(dtype=torch.bfloat16), contract.making(lr=0.0, half_precision="master"))
    batches = classification(3, dtype=torch.bfloat16)
    loop.step(*batches[0])
    loop.model.load_state_dict(network(seed=9, dtype=torch.bfloat16).state_dict())
    before = loop.theta()
    loop.train(batches[1:])
    assert torch.equal(loop.theta(), before)


@every_forward_only
def test_a_learning_rate_that_is_a_tensor(contract: Contract) -> None:
    """Not as an argument; but somebody may have put one into the group."""
    with pytest.raises(TypeError, match=r"^Invalid lr=tensor\(0.1000\): must be a number"):
        contract.make([nn.Parameter(torch.ones(2))], lr=torch.tensor(0.1))
    batches = classification(3)
    one, two = (Loop(network(), contract.making(lr=0.125)) for _ in range(2))
    for group in two.optimizer.param_groups:
        group["lr"] = torch.tensor(0.125)
    for loop in (one, two):
        loop.train(batches)
    assert torch.equal(one.theta(), two.theta())


@every_forward_only
def test_groups_with_a_rate_of_their_own(contract: Contract) -> None:
    """A scheduler of torch sets them group by group."""
    if "lr" in contract.make([nn.Parameter(torch.ones(1))]).shared:
        pytest.skip("has one learning rate")
    loop = Loop(
        network(),
        contract.make,
        groups=lambda model: [{"params": part.parameters()} for part in (model[0], model[2])],
    )
    before = [p.detach().clone() for p in loop.model.parameters()]
    torch.optim.lr_scheduler.LambdaLR(loop.optimizer, [lambda _: 0.0, lambda _: 1.0])
    loop.train(classification(2))
    moved = [
        not torch.allclose(p, old, rtol=0, atol=1e-13)
        for p, old in zip(loop.model.parameters(), before, strict=True)
    ]
    assert moved == [False, False, True, True]


@every_forward_only
def test_two_models(contract: Contract) -> None:
    """Each with its optimizer, trained in turn: neither disturbs the other."""
    batches = classification(4)
    alone = Loop(network(), contract.make)
    one, two = Loop(network(), contract.make), Loop(network(seed=2), contract.make)
    for batch in batches:
        alone.step(*batch)
        one.step(*batch)
        two.step(*batch)
    assert torch.equal(one.theta(), alone.theta())


@every_forward_only
def test_an_evaluation_between_loss_and_step(contract: Contract) -> None:
    """The loss of a batch that is only looked at does not get into the step."""
    batches = classification(4)
    plain, loop = Loop(network(), contract.make), Loop(network(), contract.make)
    for x, y in batches:
        plain.step(x, y)
        loop.optimizer.zero_grad()
        loss = loop.criterion(loop.model(x), y)
        loss.backward()
        with torch.no_grad():
            loop.model.eval()
            loop.criterion(loop.model(-x), y)
            loop.model.train()
        loop.optimizer.step()
    assert torch.equal(loop.theta(), plain.theta())
