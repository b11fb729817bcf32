"""Tests of lightning_curvature/optim/sophiah.py; the update is tested in test_sophia.py."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature import SophiaH
from lightning_curvature.curvature.diagonal import ProbeSampler
from lightning_curvature.oracle.plans import ProbePlan
from tests.helpers.dense import DenseModel
from tests.helpers.estimates import flat
from tests.helpers.plain_loop import OUTPUTS, Loop, classification, network, regression
from tests.helpers.scripted import Scripted, drawn, follow, parameters, script

pytestmark = pytest.mark.filterwarnings("ignore:SophiaH clips more than 99%:RuntimeWarning")


def far(z: Tensor, t: Tensor) -> Tensor:
    """Return a loss whose Hessian has entries of either sign."""
    return F.mse_loss(z, 5 * t)


def diagonal(loop: Loop) -> Tensor:
    """Return the present average."""
    return flat([loop.optimizer.state[p]["hess_diag"] for p in loop.model.parameters()])


def probes(options: dict[str, Any], step: int, params: list[Tensor]) -> list[Tensor]:
    """Return the probes of a step."""
    sampler = ProbeSampler(options.get("distribution", "rademacher"), options.get("seed", 0), step)
    return [flat(sampler.draw(params, i)) for i in range(options.get("num_probes", 1))]


VARIANTS: dict[str, dict[str, Any]] = {
    "signs": {},
    "numbers": {"distribution": "normal"},
    "three-probes": {"num_probes": 3},
    "another-seed": {"seed": 11},
    "differences": {"hvp_method": "fd"},
    "every-step": {"hessian_update_interval": 1},
    "climbing": {"maximize": True, "lr": 1e-4},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_average_of_products(name: str) -> None:
    """The products z * (H z) with the exact Hessian of the step, negative entries included."""
    options = {"lr": 0.01, "betas": (0.9, 0.7), "hessian_update_interval": 2, **VARIANTS[name]}
    model = network(OUTPUTS)
    loop = Loop(model, lambda p: SophiaH(p, **options), far)
    params = list(model.parameters())
    expected = torch.zeros_like(flat(params))
    for step, (x, t) in enumerate(regression(4)):
        if step % options["hessian_update_interval"] == 0:
            hessian = DenseModel(model).hessian((x,), lambda z, t=t: far(z, t))
            zs = probes(options, step, params)
            new = torch.stack([z * (hessian @ z) for z in zs]).mean(0)
            expected = 0.7 * expected + 0.3 * (-new if options.get("maximize") else new)
        loop.step(x, t)
        tolerance = 1e-6 if name == "differences" else 1e-10
        assert float((diagonal(loop) - expected).norm()) <= tolerance * float(expected.norm())
    assert bool((expected < 0).any())
    assert bool((expected > 0).any())


def test_after_means_at_the_new_parameters() -> None:
    options = {"betas": (0.9, 0.0), "hessian_update_interval": 2, "hessian_timing": "after"}
    model = network(OUTPUTS)
    loop = Loop(model, lambda p: SophiaH(p, lr=0.01, **options), far)
    for step, (x, t) in enumerate(regression(4)):
        loop.step(x, t)
        if step == 0:
            assert not diagonal(loop).any()
        if step % 2 == 1:
            hessian = DenseModel(model).hessian((x,), lambda z, t=t: far(z, t))
            (z,) = probes({}, step, list(model.parameters()))
            torch.testing.assert_close(diagonal(loop), z * (hessian @ z), rtol=1e-9, atol=1e-10)


def test_entries_of_negative_curvature_move_by_lr() -> None:
    """Along the sign of the momentum, away from the maximum."""
    (p,) = params = parameters([(4,)])
    with torch.no_grad():
        p.copy_(torch.tensor([0.5, -0.5, 0.5, -0.5]))
    curvature = torch.tensor([-2.0, -2.0, 2.0, 2.0], dtype=torch.float64)
    optimizer = SophiaH(params, lr=0.01, betas=(0.0, 0.0), rho=1.0, weight_decay=0.0)
    optimizer.attach(Scripted([[curvature]]))
    follow(optimizer, params, [[curvature * p.detach() * 0.1]])
    expected = torch.tensor([0.51, -0.51, 0.5 - 0.0005, -0.5 + 0.0005], dtype=torch.float64)
    torch.testing.assert_close(p.detach(), expected)
    assert float(optimizer.stats["win_rate"]) == 0.5


@pytest.mark.parametrize("method", ["double-backward", "fd"])
def test_passes(method: Any) -> None:
    """Products on the graph of the main pass take no forward; differences take two."""
    model = network()
    loop = Loop(model, lambda p: SophiaH(p, lr=0.01, hessian_update_interval=3, hvp_method=method))
    runs: list[int] = []
    handle = model.register_forward_hook(lambda *_: runs.append(1))
    counts = []
    for x, y in classification(5):
        loop.step(x, y)
        counts.append(len(runs))
        runs.clear()
    handle.remove()
    assert counts == ([1] * 5 if method == "double-backward" else [3, 1, 1, 3, 1])


def test_the_plan() -> None:
    params = parameters()
    optimizer = SophiaH(
        params, hessian_update_interval=2, num_probes=3, hvp_method="fd", distribution="normal"
    )
    optimizer.attach(Scripted(script(4)))
    for step in range(4):
        assert optimizer.wants_record() == (step % 2 == 0)
        plan = optimizer.plan()
        if step % 2:
            assert plan is None
        else:
            assert isinstance(plan, ProbePlan)
            assert (plan.num_probes, plan.method, plan.again) == (3, "fd", False)
            expected = ProbeSampler("normal", 0, step).draw(params, 2)
            assert torch.equal(flat(plan.draw(params, 2)), flat(expected))
        follow(optimizer, params, script(1))
    late = SophiaH(params, hessian_timing="after", hessian_update_interval=1).plan()
    assert late is not None
    assert late.again


@pytest.mark.parametrize("squared", [1, 4])
def test_accumulation(squared: int) -> None:
    """Products are linear: one batch of eight is four of two."""
    found = []
    for parts in (1, squared):
        model = network()
        loop = Loop(model, lambda p: SophiaH(p, lr=0.01, rho=1.0, hessian_update_interval=2))
        for x, y in classification(4):
            loop.optimizer.zero_grad()
            for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (loop.criterion(model(a), b) / parts).backward()
            loop.optimizer.step()
        found.append(torch.cat([loop.theta(), diagonal(loop)]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"distribution": "gaussian"},
            ValueError,
            "Invalid distribution='gaussian': must be one of 'rademacher', 'normal'.",
        ),
        (
            {"num_probes": 0},
            ValueError,
            "Invalid num_probes=0: must be an integer >= 1.",
        ),
        (
            {"hvp_method": "jvp"},
            ValueError,
            "Invalid hvp_method='jvp': must be one of 'double-backward', 'fd'.",
        ),
    ],
)
def test_errors(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        SophiaH(parameters(), **options)
    assert str(caught.value) == message


def test_one_direction_for_all_groups() -> None:
    """The Hessian of the negative loss is one for all."""
    params = parameters()
    with pytest.raises(ValueError, match=r"Invalid maximize=True in a parameter group"):
        SophiaH([{"params": params[:2]}, {"params": params[2:], "maximize": True}])


def test_the_hessian_is_that_of_the_whole_loss() -> None:
    """A penalty in the loss function counts; labels are not drawn."""
    model = nn.Linear(3, 1, bias=False, dtype=torch.float64)
    (x,) = drawn([(5, 3)])
    loop = Loop(
        model,
        lambda p: SophiaH(p, lr=0.01, betas=(0.9, 0.0)),
        lambda z, t: z.sum() + 3 * model.weight.square().sum(),
    )
    loop.step(x, torch.zeros(5))
    torch.testing.assert_close(diagonal(loop), torch.full((3,), 6.0, dtype=torch.float64))
