"""Exactness of `WindowOracle.directional` (oracle/window.py, oracle/heads.py) in plain PyTorch.

Every value is compared in float64 with a dense matrix built by torch.func in helpers/dense.py.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.dense import MODELS, DenseModel, Head, build, flatten, mlp, quadratic
from tests.helpers.losses import CASES, CLASSES, MASK, WEIGHT, LossCase, inputs, labels, values
from tests.helpers.probing import Probe

EXACT = 1e-10
SELF_CHECK = 1e-12
SEED = 5


def record(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    data: Sequence[Any],
    targets: Sequence[Tensor] = (),
    *,
    params: Sequence[Tensor] | None = None,
    directional: str = "jvp",
) -> Probe:
    """Run one main pass with backward and return the optimizer, its oracle ready to be asked."""
    optimizer = Probe(list(model.parameters()) if params is None else list(params))
    criterion = optimizer.attach_model(model, loss_fn, directional=directional)
    optimizer.zero_grad()
    torch.manual_seed(SEED)
    criterion(model(*data), *targets).backward()
    return optimizer


def direction_for(params: Sequence[Tensor], seed: int = 21) -> list[Tensor]:
    """Draw a direction that leans on the gradient, zero where a parameter is frozen."""
    generator = torch.Generator().manual_seed(seed)
    direction = []
    for param in params:
        noise = torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param.dtype)
        if not param.requires_grad:
            noise = torch.zeros_like(param)
        elif param.grad is not None:
            noise = noise + param.grad / param.grad.norm().clamp_min(1e-12)
        direction.append(noise)
    return direction


def slope_of(params: Sequence[Tensor], direction: Sequence[Tensor]) -> Tensor:
    """Return <g, d> from the gradients that backward left."""
    return sum(
        (
            (param.grad * piece).sum()
            for param, piece in zip(params, direction, strict=True)
            if param.grad is not None
        ),
        start=torch.zeros((), dtype=params[0].dtype),
    )


def assert_relative(actual: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    """Assert relative agreement of two scalars."""
    assert actual.dim() == 0
    deviation = abs(actual.item() - expected.item())
    assert deviation <= tolerance * abs(expected.item()), (
        f"{what} {actual.item():.16g} != {expected.item():.16g}"
    )


def check(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    data: Sequence[Any],
    targets: Sequence[Tensor],
    heads: Sequence[Head],
    *,
    params: Sequence[Tensor] | None = None,
) -> None:
    """Compare slope and curvature of one batch with the dense matrices."""
    optimizer = record(model, loss_fn, data, targets, params=params)
    oracle = optimizer.oracle
    trained = [param for param in oracle.params if param.requires_grad]
    dense = DenseModel(model, trained, seed=SEED)
    direction = direction_for(oracle.params)
    vector = flatten(
        [
            piece
            for param, piece in zip(oracle.params, direction, strict=True)
            if param.requires_grad
        ]
    )
    answer = oracle.directional(direction)
    expected = quadratic(dense.ggn(data, heads), vector)
    assert expected.item() != 0.0, "the case tests nothing"
    assert_relative(answer.curvature, expected, EXACT, "curvature")
    assert_relative(answer.slope, slope_of(oracle.params, direction), SELF_CHECK, "slope")
    gradient = dense.gradient(data, lambda output: loss_fn(output, *targets))
    assert_relative(answer.slope, gradient @ vector, EXACT, "dense slope")


# The root of a loss is no sum of losses; torch plans to change kl_div(reduction="mean").
@pytest.mark.filterwarnings("ignore:.*does not come from a captured loss function:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss:UserWarning")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_curvature_of_single_loss(case: LossCase) -> None:
    """d^T G d of each supported loss with each of its options."""
    targets = case.targets()
    curved = case.curved or case.loss
    heads = [Head(case.link, lambda logits: curved(logits, *targets))]
    check(build_mlp(), case.objective, (inputs(),), targets, heads)


@pytest.mark.parametrize("name", MODELS)
def test_curvature_of_model(name: str) -> None:
    """Batch norm in train mode, dropout, tied, frozen and unused parameters."""
    y = labels()
    heads = [Head(lambda z: z, lambda z: F.cross_entropy(z, y))]
    check(build(name), F.cross_entropy, (inputs(),), (y,), heads)


@pytest.mark.parametrize("name", ["linear-bias", "dead-branch", "batch-norm-dropout"])
def test_curvature_is_softmax_fisher(name: str) -> None:
    """For cross-entropy the answer is the expectation over the model's own labels."""
    model = build(name)
    optimizer = record(model, F.cross_entropy, (inputs(),), (labels(),))
    direction = direction_for(optimizer.oracle.params)
    fisher = DenseModel(model, optimizer.oracle.params, seed=SEED).softmax_fisher((inputs(),))
    answer = optimizer.oracle.directional(direction)
    assert_relative(answer.curvature, quadratic(fisher, flatten(direction)), EXACT)


def test_one_datum() -> None:
    """A batch of one."""
    y = labels(1)
    heads = [Head(lambda z: z, lambda z: F.cross_entropy(z, y))]
    check(build("conv"), F.cross_entropy, (inputs(batch=1),), (y,), heads)


def test_partially_optimized_model() -> None:
    """Only the optimizer's own parameters move, in the optimizer's own order."""
    model = build("dead-branch")
    params = [model.out.bias, model.live.weight, model.dead.weight]
    y = labels()
    heads = [Head(lambda z: z, lambda z: F.cross_entropy(z, y))]
    check(model, F.cross_entropy, (inputs(),), (y,), heads, params=params)


def test_parameter_groups_in_any_order() -> None:
    """The direction follows `oracle.params`, which follow the groups of the optimizer."""
    model = build_mlp()
    optimizer = Probe([{"params": list(model[2].parameters())}, {"params": [model[0].weight]}])
    criterion = optimizer.attach_model(model, F.cross_entropy, directional="jvp")
    criterion(model(inputs()), labels()).backward()
    expected = [model[2].weight, model[2].bias, model[0].weight]
    assert [id(p) for p in optimizer.oracle.params] == [id(p) for p in expected]
    direction = direction_for(expected)
    y = labels()
    ggn = DenseModel(model, expected).ggn(
        (inputs(),), [Head(lambda z: z, lambda z: F.cross_entropy(z, y))]
    )
    answer = optimizer.oracle.directional(direction)
    assert_relative(answer.curvature, quadratic(ggn, flatten(direction)), EXACT)


class TwoHeads(nn.Module):
    """Shared body with a classification and a regression read-out."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(5, 6)
        self.classify = nn.Linear(6, CLASSES)
        self.regress = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return class logits and predictions."""
        hidden = torch.tanh(self.body(x))
        return self.classify(hidden), self.regress(hidden)


def two_heads() -> TwoHeads:
    """Build the two-headed model with reproducible weights."""
    torch.manual_seed(2)
    return TwoHeads().double()


def build_mlp() -> nn.Sequential:
    """Build the smooth network with reproducible weights."""
    torch.manual_seed(3)
    return mlp().double()


def test_several_losses_weights_masks_and_penalty() -> None:
    """Coefficients, a per-sample mask, a penalty without curvature, and losses only logged."""
    model = two_heads()
    y, t = labels(), values()
    logged: list[Tensor] = []

    def objective(output: tuple[Tensor, Tensor], y: Tensor, t: Tensor) -> Tensor:
        logits, predictions = output
        with torch.no_grad():
            logged.append(F.cross_entropy(logits, y, reduction="sum"))
        main = F.cross_entropy(logits, y)
        logged.append(F.huber_loss(predictions, t))
        auxiliary = F.mse_loss(predictions, t)
        logged.append(F.cross_entropy(logits.detach(), y))
        per_sample = F.cross_entropy(logits, y, weight=WEIGHT, reduction="none")
        penalty = sum(param.square().sum() for param in model.parameters())
        return (
            main + 0.1 * auxiliary + 0.5 * (per_sample * MASK).sum() / MASK.sum() + 1e-2 * penalty
        )

    def first(output: tuple[Tensor, Tensor]) -> Tensor:
        return output[0]

    def second(output: tuple[Tensor, Tensor]) -> Tensor:
        return output[1]

    def masked(z: Tensor) -> Tensor:
        losses = F.cross_entropy(z, y, weight=WEIGHT, reduction="none")
        return 0.5 * (losses * MASK).sum() / MASK.sum()

    heads = [
        Head(first, lambda z: F.cross_entropy(z, y)),
        Head(second, lambda p: 0.1 * F.mse_loss(p, t)),
        Head(first, masked),
    ]
    data = (inputs(),)
    optimizer = record(model, objective, data, (y, t))
    oracle = optimizer.oracle
    direction = direction_for(oracle.params)
    answer = oracle.directional(direction)
    expected = quadratic(DenseModel(model).ggn(data, heads), flatten(direction))
    assert_relative(answer.curvature, expected, EXACT, "curvature")
    assert_relative(answer.slope, slope_of(oracle.params, direction), SELF_CHECK, "slope")


def _scaled_in_place(z: Tensor, y: Tensor) -> Tensor:
    loss = F.cross_entropy(z, y)
    loss *= 0.5
    return loss


def _sum_in_place(z: Tensor, y: Tensor) -> Tensor:
    loss = F.cross_entropy(z, y)
    loss *= 0.5
    loss += z.square().mean() * 1e-3
    loss += F.cross_entropy(2 * z, y, reduction="sum")
    return loss


def _masked_in_place(z: Tensor, y: Tensor) -> Tensor:
    losses = F.cross_entropy(z, y, reduction="none")
    losses *= MASK
    losses /= MASK.sum()
    return losses.sum()


def _zeroed_in_place(z: Tensor, y: Tensor) -> Tensor:
    losses = F.cross_entropy(z, y, reduction="none")
    losses[MASK == 0] = 0.0
    return losses.mean()


IN_PLACE: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "scaled": (_scaled_in_place, lambda z, y: 0.5 * F.cross_entropy(z, y)),
    "sum": (
        _sum_in_place,
        lambda z, y: 0.5 * F.cross_entropy(z, y) + F.cross_entropy(2 * z, y, reduction="sum"),
    ),
    "masked": (
        _masked_in_place,
        lambda z, y: (F.cross_entropy(z, y, reduction="none") * MASK).sum() / MASK.sum(),
    ),
    "zeroed": (
        _zeroed_in_place,
        lambda z, y: (F.cross_entropy(z, y, reduction="none") * (MASK != 0)).mean(),
    ),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_loss_changed_in_place(name: str) -> None:
    """`loss *= 0.5` and the like after the loss call: the coefficients still are the true ones."""
    objective, modelled = IN_PLACE[name]
    model, y, data = build_mlp(), labels(), (inputs(),)
    optimizer = record(model, objective, data, (y,))
    oracle = optimizer.oracle
    direction = direction_for(oracle.params)
    answer = oracle.directional(direction)
    expected = quadratic(
        DenseModel(model).ggn(data, [Head(lambda z: z, lambda z: modelled(z, y))]),
        flatten(direction),
    )
    assert_relative(answer.curvature, expected, EXACT, "curvature")
    assert_relative(answer.slope, slope_of(oracle.params, direction), SELF_CHECK, "slope")


class LearnedWeight(nn.Module):
    """Network with a trainable log-variance that weights its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.network = build_mlp()
        self.log_scale = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and the log-variance."""
        return self.network(x), self.log_scale


@pytest.mark.filterwarnings("ignore:.*does not come from a captured loss function:RuntimeWarning")
def test_coefficient_that_is_learned() -> None:
    """Uncertainty weighting: the coefficient is itself a parameter; curvature takes its value."""
    model, y = LearnedWeight(), labels()
    scale = model.log_scale.detach().exp()
    heads = [Head(lambda out: out[0], lambda z: F.cross_entropy(z, y) / scale)]

    def objective(out: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
        return F.cross_entropy(out[0], y) / out[1].exp() + out[1]

    check(model, objective, (inputs(),), (y,), heads)


def test_logits_overwritten_after_the_loss() -> None:
    """Cross-entropy lets its logits be reused as scratch memory; the oracle needs the old ones."""

    def objective(z: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(z, y)
        with torch.no_grad():
            z.mul_(0.1)
        return loss

    model, y, data = build_mlp(), labels(), (inputs(),)
    heads = [Head(lambda z: z, lambda z: F.cross_entropy(z, y))]
    try:
        optimizer = record(model, objective, data, (y,))
        direction = direction_for(optimizer.oracle.params)
        answer = optimizer.oracle.directional(direction)
    except RuntimeError as error:  # a clear refusal is as good as the right answer
        refusal = str(error)
    else:
        refusal = ""
        expected = quadratic(DenseModel(model).ggn(data, heads), flatten(direction))
        assert_relative(answer.curvature, expected, EXACT)
    assert "in place" in refusal or not refusal


@pytest.mark.parametrize("outputs", [1, 3])
def test_regression_scaling_per_example(outputs: int) -> None:
    """`per_example` is the official code's scaling: as many times larger as there are outputs."""
    torch.manual_seed(4)
    model = mlp(classes=outputs).double()
    t = values()[:, :outputs]
    optimizer = record(model, lambda z, t: 0.5 * F.mse_loss(z, t), (inputs(),), (t,))
    oracle = optimizer.oracle
    direction = direction_for(oracle.params)
    mean = oracle.directional(direction, regression_scaling="mean")
    per_example = oracle.directional(direction, regression_scaling="per_example")
    jacobian = DenseModel(model).jacobian((inputs(),), lambda z: z)
    tangent = jacobian @ flatten(direction)
    assert_relative(mean.curvature, tangent.square().mean(), EXACT, "mean")
    assert_relative(
        per_example.curvature, tangent.square().sum() / t.shape[0], EXACT, "per_example"
    )
    assert per_example.slope.item() == mean.slope.item()


def test_regression_scaling_leaves_classification_alone() -> None:
    """The flag concerns squared error only."""
    optimizer = record(build_mlp(), F.cross_entropy, (inputs(),), (labels(),))
    direction = direction_for(optimizer.oracle.params)
    mean = optimizer.oracle.directional(direction, regression_scaling="mean")
    flagged = optimizer.oracle.directional(direction, regression_scaling="per_example")
    assert flagged.curvature.item() == mean.curvature.item()


@pytest.mark.parametrize(
    "name", ["linear-bias", "dead-branch", "conv", "batch-norm-dropout", "tied"]
)
def test_hessian(name: str) -> None:
    """`curvature="hessian"` and `hvp` against the dense Hessian, indefinite parts included."""
    model, y, data = build(name), labels(), (inputs(),)
    optimizer = record(model, F.cross_entropy, data, (y,))
    oracle = optimizer.oracle
    direction = direction_for(oracle.params)
    vector = flatten(direction)
    hessian = DenseModel(model, oracle.params, seed=SEED).hessian(
        data, lambda z: F.cross_entropy(z, y)
    )
    answer = oracle.directional(direction, curvature="hessian")
    assert_relative(answer.curvature, quadratic(hessian, vector), EXACT, "curvature")
    assert_relative(answer.slope, slope_of(oracle.params, direction), SELF_CHECK, "slope")
    product = oracle.hvp(direction)
    assert [piece.shape for piece in product] == [param.shape for param in oracle.params]
    torch.testing.assert_close(flatten(product), hessian @ vector, rtol=EXACT, atol=1e-11)


def test_hessian_sees_penalties_and_all_losses() -> None:
    """The Hessian is that of the whole objective, also of what the GGN leaves out."""
    model, y, data = build_mlp(), labels(), (inputs(),)

    def objective(z: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(z, y) + 0.3 * z.pow(4).mean()
        loss *= 0.5
        return loss

    optimizer = record(model, objective, data, (y,))
    direction = direction_for(optimizer.oracle.params)
    hessian = DenseModel(model).hessian(data, lambda z: objective(z, y))
    answer = optimizer.oracle.directional(direction, curvature="hessian")
    assert_relative(answer.curvature, quadratic(hessian, flatten(direction)), EXACT)
