"""Tests of MeZO in plain loops: the numbers. Most hold for every zeroth-order optimizer."""

import copy
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature.optim.hizoo import HiZOO
from lightning_curvature.optim.mezo import MeZO
from tests.helpers.plain_loop import Loop, classification, network
from tests.helpers.zeroth_order import (
    EPS,
    LR,
    ONE_OF_EACH,
    RESTORES,
    STEPS,
    Reference,
    assert_equal,
    by_layer,
    clones,
    closure_of,
    ids,
    mezo,
)

# Some tests have a bare closure.
pytestmark = pytest.mark.filterwarnings("ignore:.*has only a closure to ask:RuntimeWarning")


# The step

VARIANTS: tuple[dict[str, Any], ...] = (
    *ONE_OF_EACH,
    {"distribution": "rademacher"},
    {"distribution": "sphere"},
    {"maximize": True},
    {"max_projected_grad": 0.2},
    {"seed": 17},
    {"foreach": False},
    {"num_samples": 2, "estimator": "one_sided", "blockwise": "joint"},
)


@pytest.mark.parametrize("restore", RESTORES)
@pytest.mark.parametrize("options", VARIANTS, ids=ids)
def test_reference(options: dict[str, Any], restore: str) -> None:
    loop = Loop(network(), mezo(restore=restore, **options), groups=by_layer)
    reference = Reference(network(), **options)
    answers: list[Tensor] = []
    loop.optimizer.on_answer = answers.append
    for step, (x, y) in enumerate(classification(STEPS)):
        loop.optimizer.step(closure_of(loop, x, y))
        reference.step(step, x, y)
        assert_equal(list(loop.model.parameters()), clones(reference.model), atol=1e-11)
    slopes = torch.cat([answer[:, 0] for answer in answers]).tolist()
    assert slopes == pytest.approx(reference.slopes, abs=1e-9)
    assert answers[0].dtype == torch.float64
    if "max_projected_grad" in options:
        assert max(map(abs, slopes)) == 0.2


@pytest.mark.parametrize("options", ONE_OF_EACH, ids=ids)
def test_inplace_is_fused(options: dict[str, Any]) -> None:
    """The same operations in another order of sweeps."""
    loops = [
        Loop(network(dtype=torch.float32), mezo(restore=restore, **options), groups=by_layer)
        for restore in ("fused", "inplace")
    ]
    for x, y in classification(STEPS, dtype=torch.float32):
        for loop in loops:
            loop.optimizer.step(closure_of(loop, x, y))
    assert_equal(list(loops[0].model.parameters()), clones(loops[1].model))


@pytest.mark.parametrize("options", ONE_OF_EACH, ids=ids)
def test_ways_to_call_it(options: dict[str, Any]) -> None:
    """A closure, with or without a backward, and the ordinary loop; model known or not."""
    batches = classification(STEPS)
    loops = [Loop(network(), mezo(**options), groups=by_layer) for _ in range(3)]
    bare = network()
    alone = mezo(**options)(by_layer(bare))
    for x, y in batches:

        def with_backward(loop: Loop = loops[1], x: Tensor = x, y: Tensor = y) -> Tensor:
            loop.optimizer.zero_grad()
            loss = loop.criterion(loop.model(x), y)
            loss.backward()
            return loss

        loops[0].optimizer.step(closure_of(loops[0], x, y))
        loops[1].optimizer.step(with_backward)
        loops[2].step(x, y)
        alone.step(lambda x=x, y=y: F.cross_entropy(bare(x), y))
        for model in (loops[1].model, loops[2].model, bare):
            assert_equal(list(model.parameters()), clones(loops[0].model), atol=1e-12)


def test_what_step_returns() -> None:
    """The loss at the parameters up to second order, and statistics of the step."""
    loop = Loop(network(), mezo(num_samples=2))
    ((x, y),) = classification(1)
    answers: list[Tensor] = []
    loop.optimizer.on_answer = answers.append
    with torch.no_grad():
        expected = F.cross_entropy(loop.model(x), y).item()
    loss = loop.optimizer.step(closure_of(loop, x, y))
    assert float(loss) == pytest.approx(expected, abs=1e-4)
    assert not loss.requires_grad
    stats = {name: float(value) for name, value in loop.optimizer.stats.items()}
    rms = float(answers[0][:, 0].square().mean().sqrt())
    assert stats == pytest.approx(
        {"loss": float(loss), "projected_grad": rms, "lr": LR, "skipped_steps": 0.0}
    )


@pytest.mark.parametrize("restore", RESTORES)
def test_accumulation(restore: str) -> None:
    """Micro-batches with weights give the step on all of them."""
    ((x, y),) = classification(1, batch=12)
    whole = Loop(network(), mezo(restore=restore))
    parts = Loop(network(), mezo(restore=restore))
    whole.optimizer.step(closure_of(whole, x, y))
    parts.optimizer.zero_grad()
    for rows in (slice(0, 4), slice(4, 12)):
        share = len(y[rows]) / len(y)
        (share * parts.criterion(parts.model(x[rows]), y[rows])).backward()
    parts.optimizer.step()
    assert_equal(list(parts.model.parameters()), clones(whole.model), atol=1e-12)


@pytest.mark.parametrize("options", ONE_OF_EACH, ids=ids)
def test_number_of_evaluations(options: dict[str, Any]) -> None:
    calls = []
    model = network()
    optimizer = mezo(**options)(by_layer(model))
    ((x, y),) = classification(1)

    def closure() -> Tensor:
        calls.append(1)
        return F.cross_entropy(model(x), y)

    optimizer.step(closure)
    per_block = {"one_sided": 2, "residual": 1}.get(str(options.get("estimator")), 2)
    blocks = 3 if "blockwise" in options else 1
    assert len(calls) == per_block * options.get("num_samples", 1) * blocks


# Invariances


def test_groups_order_and_frozen_parameters_do_not_matter() -> None:
    """Given the model, numbers depend on the place of a parameter in it."""
    batches = classification(STEPS)

    def trained(groups: Callable[[nn.Module], Any], freeze: bool = False) -> nn.Module:
        model = network()
        list(model.parameters())[1].requires_grad_(not freeze)
        loop = Loop(model, mezo(), groups=groups)
        for x, y in batches:
            loop.optimizer.step(closure_of(loop, x, y))
        return model

    def reverse(model: nn.Module) -> Any:
        return [{"params": [p]} for p in reversed(list(model.parameters()))]

    def without(model: nn.Module) -> Any:
        return [p for i, p in enumerate(model.parameters()) if i != 1]

    expected = clones(trained(lambda model: model.parameters()))
    assert_equal(list(trained(reverse).parameters()), expected, atol=1e-14)
    frozen = trained(lambda model: model.parameters(), freeze=True)
    assert_equal(list(frozen.parameters())[1:2], clones(network())[1:2])
    assert_equal(list(trained(without).parameters()), clones(frozen), atol=1e-14)


def test_unfreezing_on_the_way() -> None:
    """Streams of the others stay what they were."""
    (first, second) = classification(2)
    model = network()
    held = list(model.parameters())[1].requires_grad_(False)
    loop = Loop(model, mezo(), groups=by_layer)
    loop.optimizer.step(closure_of(loop, *first))
    reference = Reference(copy.deepcopy(model))
    held.requires_grad_(True)
    loop.optimizer.step(closure_of(loop, *second))
    reference.step(1, *second)
    assert_equal(list(model.parameters()), clones(reference.model), atol=1e-11)


@pytest.mark.parametrize("options", ONE_OF_EACH, ids=ids)
def test_global_generators_are_left_alone(options: dict[str, Any]) -> None:
    def states() -> list[str]:
        numpy_state = np.random.get_state()  # noqa: NPY002
        return [str(torch.get_rng_state().tolist()), str(random.getstate()), str(numpy_state)]

    loop = Loop(network(), mezo(**options), groups=by_layer)
    before = states()
    for x, y in classification(2):
        loop.optimizer.step(closure_of(loop, x, y))
        loop.step(x, y)
    assert states() == before


def test_seed_and_step_decide() -> None:
    """Not the global seed, nor what was drawn before."""
    found = []
    for number, seed in enumerate((3, 3, 4)):
        torch.manual_seed(number)
        loop = Loop(network(), mezo(seed=seed))
        for x, y in classification(2):
            loop.optimizer.step(closure_of(loop, x, y))
        found.append(loop.theta())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("options", ONE_OF_EACH, ids=ids)
def test_lr_zero_moves_nothing(options: dict[str, Any]) -> None:
    """Bitwise with a copy; up to the rounding of the way back without."""
    for restore, atol in (("snapshot", 0.0), ("fused", 1e-6), ("inplace", 1e-6)):
        model = network(dtype=torch.float32)
        loop = Loop(model, mezo(lr=0.0, restore=restore, **options))
        before = clones(model)
        for x, y in classification(STEPS, dtype=torch.float32):
            loop.optimizer.step(closure_of(loop, x, y))
        assert_equal(list(model.parameters()), before, atol=atol)


# Equal to others


@pytest.mark.parametrize("restore", RESTORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_hizoo_that_learns_nothing_is_mezo(dtype: torch.dtype, restore: str) -> None:
    loop = Loop(network(dtype=dtype), mezo(restore=restore, weight_decay=0.0))
    other = Loop(
        network(dtype=dtype),
        lambda params: HiZOO(
            params, lr=LR, perturbation_scale=EPS, hessian_smoothing=0.0, restore=restore
        ),
    )
    for x, y in classification(STEPS, dtype=dtype):
        for each in (loop, other):
            each.optimizer.step(closure_of(each, x, y))
    assert_equal(list(other.model.parameters()), clones(loop.model))


def test_mean_of_samples_is_the_gradient() -> None:
    """On a quadratic, where central differences are exact."""
    generator = torch.Generator().manual_seed(1)
    target = torch.randn(6, generator=generator, dtype=torch.float64)
    for distribution in ("normal", "rademacher", "sphere"):
        w = nn.Parameter(torch.zeros(6, dtype=torch.float64))
        optimizer = MeZO([w], lr=1.0, num_samples=300, distribution=distribution)
        optimizer.step(lambda w=w: 0.5 * (w - target).square().sum())
        error = math.sqrt(7 / 300) * float(target.norm())
        assert float((w.detach() - target).norm()) < 1.5 * error


@pytest.mark.parametrize("layer_scale", ["parameter_norm", "gradient_norm"])
def test_layer_scale_is_unbiased(layer_scale: Any) -> None:
    """Displacements are scaled, the mean of the estimates is still the gradient."""
    generator = torch.Generator().manual_seed(1)
    params = [
        nn.Parameter(scale * torch.randn(4, generator=generator, dtype=torch.float64))
        for scale in (0.1, 1.0, 3.0)
    ]
    before = [p.detach().clone() for p in params]
    optimizer = MeZO(params, lr=1.0, num_samples=300, layer_scale=layer_scale)

    def closure() -> Tensor:
        return torch.stack(
            [c * p.square().sum() for c, p in zip((3, 1, 0.2), params, strict=True)]
        ).sum()

    optimizer.step(closure)
    factors = torch.stack([optimizer.state[p]["layer_scale"] for p in params])
    assert float(factors.square().mean()) == pytest.approx(1.0)
    if layer_scale == "parameter_norm":
        norms = torch.stack([p.norm() for p in before])
        torch.testing.assert_close(factors * norms, (factors * norms)[:1].expand(3))
    assert float(factors.max() / factors.min()) > 2
    gradient = [2 * c * b for c, b in zip((3, 1, 0.2), before, strict=True)]
    scaled = math.sqrt(
        sum(float((g * f).norm() ** 2) for g, f in zip(gradient, factors, strict=True))
    )
    for p, b, g, f in zip(params, before, gradient, factors, strict=True):
        # The deviation of one entry is about that of the slope, |scaled gradient| / factor.
        error = math.sqrt(len(b) / 300) * scaled / float(f)
        assert float((b - p.detach() - g).norm()) < 2 * error


def test_blocks_are_displaced_one_at_a_time() -> None:
    """A coordinate step sees the blocks before it updated, a joint one does not."""
    seen: dict[str, list[list[Tensor]]] = {}
    for blockwise in ("coordinate", "joint"):
        params = [nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2)]
        optimizer = MeZO([{"params": [p]} for p in params], lr=0.1, blockwise=blockwise)
        visits = seen.setdefault(blockwise, [])

        def closure(params: Any = params, visits: Any = visits) -> Tensor:
            visits.append([p.detach().clone() for p in params])
            return (params[0] + params[1]).square().sum()

        optimizer.step(closure)
        one = torch.ones(2, dtype=torch.float64)
        assert len(visits) == 4
        for first, second in visits[:2]:
            assert torch.equal(second, one)
            assert not torch.equal(first, one)
        is_home = [torch.allclose(first, one, rtol=0, atol=1e-14) for first, _ in visits[2:]]
        assert is_home == [blockwise == "joint"] * 2
        assert not any(torch.equal(second, one) for _, second in visits[2:])


# Masks


@pytest.mark.parametrize("restore", RESTORES)
def test_mask(restore: str) -> None:
    """Only some entries are displaced and trained; None takes the mask away."""
    model = network()
    loop = Loop(model, mezo(restore=restore, weight_decay=0.1))
    weight = next(iter(model.parameters()))
    mask = torch.tensor([30, 2, 7])
    loop.optimizer.set_mask(weight, mask)
    before = weight.detach().clone().view(-1)
    seen = []
    hook = model.register_forward_pre_hook(lambda *_: seen.append(weight.detach().clone()))
    for x, y in classification(2):
        loop.optimizer.step(closure_of(loop, x, y))
    hook.remove()
    rest = torch.ones(weight.numel(), dtype=torch.bool)
    rest[mask] = False
    for values in [*seen, weight.detach()]:
        assert torch.equal(values.view(-1)[rest], before[rest])
        assert not torch.isclose(values.view(-1)[mask], before[mask], rtol=1e-9).any()
    loop.optimizer.set_mask(weight, None)
    for x, y in classification(1):
        loop.optimizer.step(closure_of(loop, x, y))
    assert not torch.isclose(weight.detach().view(-1)[rest], before[rest], rtol=1e-9).any()


# Hybrid


def test_first_order_groups_get_gradient_steps() -> None:
    """Their gradient is that at the undisplaced parameters; the others have none."""
    model = network()
    *early, weight, bias = model.parameters()
    groups = [{"params": early}, {"params": [weight, bias], "first_order": True, "lr": 0.3}]
    loop = Loop(model, mezo(weight_decay=0.1), groups=lambda _: groups)
    reference = network()
    (x, y), (x2, y2) = classification(2)
    for number, (inputs, labels) in enumerate([(x, y), (x2, y2)]):
        reference.load_state_dict(model.state_dict())
        loss = F.cross_entropy(reference(inputs), labels)
        last = list(reference.parameters())[2:]
        grads = torch.autograd.grad(loss, last)
        if number == 0:
            loop.step(inputs, labels)
        else:

            def closure(inputs: Tensor = inputs, labels: Tensor = labels) -> Tensor:
                loop.optimizer.zero_grad()
                value = loop.criterion(model(inputs), labels)
                value.backward()
                return value

            loop.optimizer.step(closure)
        for p, r, g in zip((weight, bias), last, grads, strict=True):
            expected = r.detach() - 0.3 * (g + 0.1 * r.detach())
            torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-12)
        assert all(p.grad is None for p in early)
        # The others took the step of MeZO with the layers above as they were.
        zeroth = Reference(copy.deepcopy(reference))
        z = zeroth.direction(number, 0)[:2]
        slope = zeroth.slope(inputs, labels, z)
        for p, r, d in zip(early, reference.parameters(), z, strict=False):
            expected = r.detach() - LR * (slope * d + 0.1 * r.detach())
            torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-11)
