"""Several directions at once: `WindowOracle.quadratic` (oracle/window.py, oracle/forms.py).

Every matrix is compared in float64 with V^T C V of a dense matrix built in helpers/dense.py.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature import vectors
from lightning_curvature.oracle import Quadratic
from lightning_curvature.oracle.window import WindowOracle
from tests.helpers.dense import DenseModel, Head, build, flatten, mlp
from tests.helpers.losses import CASES, LossCase, inputs, labels, values
from tests.helpers.probing import Probe, assert_bitwise, parameters_and_buffers

EXACT = 1e-10
DIFFERENCES = 1e-5
SEED = 5
METHODS = ("jvp", "fd")

Batch = tuple[Tensor, tuple[Tensor, ...]]


def asked(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    batches: Sequence[Batch],
    weights: Sequence[float] = (1.0,),
    method: str = "jvp",
) -> WindowOracle:
    """Run the main passes of one step and return the oracle, ready to be asked."""
    optimizer = Probe(list(model.parameters()))
    criterion = optimizer.attach_model(model, loss_fn, directional=method)
    torch.manual_seed(SEED)
    for (x, targets), weight in zip(batches, weights, strict=True):
        (criterion(model(x), *targets) * weight).backward()
    assert isinstance(optimizer.oracle, WindowOracle)
    return optimizer.oracle


def draw_directions(oracle: WindowOracle, count: int = 2) -> list[list[Tensor]]:
    """Draw directions of very different lengths."""
    generator = torch.Generator().manual_seed(8)
    return [
        [
            100.0**-i * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
            for p in oracle.params
        ]
        for i in range(count)
    ]


def stacked(directions: Sequence[Sequence[Tensor]]) -> Tensor:
    """Return the directions as rows, shape ``[k, n]``."""
    return torch.stack([flatten(direction) for direction in directions])


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Build a smooth network with reproducible weights."""
    torch.manual_seed(3)
    return mlp().to(dtype)


def assert_matrix(answer: Quadratic, expected: Tensor, tolerance: float) -> None:
    """Compare each entry, in units of the two directions' own curvature."""
    matrix = answer.matrix
    assert torch.equal(matrix, matrix.T)
    unit = expected.diagonal().abs().sqrt()
    assert unit.min() > 0, "the case tests nothing"
    torch.testing.assert_close(
        matrix / unit / unit[:, None], expected / unit / unit[:, None], rtol=0, atol=tolerance
    )


# The root of a loss is no sum of losses; torch plans to change kl_div(reduction="mean").
@pytest.mark.filterwarnings("ignore:.*does not come from a captured loss function:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss:UserWarning")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_loss(case: LossCase) -> None:
    """V^T G V of each supported loss, closed forms and others."""
    targets = case.targets()
    model = network()
    oracle = asked(model, case.objective, [(inputs(), targets)])
    directions = draw_directions(oracle)
    curved = case.curved or case.loss
    head = Head(case.link, lambda logits: curved(logits, *targets))
    ggn = DenseModel(model, oracle.params).ggn((inputs(),), [head])
    rows = stacked(directions)
    assert_matrix(oracle.quadratic(directions), rows @ ggn @ rows.T, EXACT)


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "cross-entropy": lambda z, y, t: F.cross_entropy(z, y),
    "squared error": lambda z, y, t: F.mse_loss(z, t),
    "generic": lambda z, y, t: F.huber_loss(z, t, delta=5.0),
    "two": lambda z, y, t: F.cross_entropy(z, y) + 0.3 * F.mse_loss(z, t),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_micro_batches_of_different_weights(loss: str, method: str, count: int) -> None:
    """Slopes and curvature are averaged as the loss is, and the model is left as it was."""
    loss_fn = LOSSES[loss]
    model = network()
    sizes, weights = (2, 3, 1), (0.5, 0.2, 0.3)
    batches: list[Batch] = []
    for part, y, t in zip(
        inputs().split(sizes), labels().split(sizes), values().split(sizes), strict=True
    ):
        batches.append((part, (y, t)))
    oracle = asked(model, loss_fn, batches, weights, method)
    before = parameters_and_buffers(model)
    directions = draw_directions(oracle, count)
    answer = oracle.quadratic(directions)
    assert_bitwise(parameters_and_buffers(model), before)
    dense, rows = DenseModel(model, oracle.params), stacked(directions)
    ggn = sum(
        weight * dense.ggn((x,), [Head(lambda z: z, lambda z, ts=targets: loss_fn(z, *ts))])  # type: ignore[misc]
        for (x, targets), weight in zip(batches, weights, strict=True)
    )
    assert isinstance(ggn, Tensor)
    tolerance = EXACT if method == "jvp" else DIFFERENCES
    assert_matrix(answer, rows @ ggn @ rows.T, tolerance)
    grads = flatten([p.grad for p in oracle.params if p.grad is not None])
    size = (rows.norm(dim=1) * grads.norm()).clamp_min(1e-30)
    torch.testing.assert_close(answer.slopes / size, rows @ grads / size, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["batch-norm-dropout", "tied", "unused-parameter"])
@pytest.mark.parametrize("method", METHODS)
def test_models(name: str, method: str) -> None:
    """All passes see the same dropout masks; tied and unused parameters are as ever."""
    model, y = build(name), labels()
    oracle = asked(model, F.cross_entropy, [(inputs(), (y,))], method=method)
    directions = draw_directions(oracle)
    head = Head(lambda z: z, lambda z: F.cross_entropy(z, y))
    ggn = DenseModel(model, oracle.params, seed=SEED).ggn((inputs(),), [head])
    rows = stacked(directions)
    tolerance = EXACT if method == "jvp" else DIFFERENCES
    assert_matrix(oracle.quadratic(directions), rows @ ggn @ rows.T, tolerance)


def test_hessian() -> None:
    """The exact Hessian, penalties included, over two micro-batches."""
    model = network()

    def objective(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y) + 0.3 * z.pow(4).mean()

    halves = list(zip(inputs().split(3), labels().split(3), strict=True))
    oracle = asked(model, objective, [(x, (y,)) for x, y in halves], (0.25, 0.75))
    directions = draw_directions(oracle, 3)
    dense, rows = DenseModel(model, oracle.params), stacked(directions)
    parts = [dense.hessian((x,), lambda z, y=y: objective(z, y)) for x, y in halves]  # type: ignore[misc]
    hessian = 0.25 * parts[0] + 0.75 * parts[1]
    answer = oracle.quadratic(directions, curvature="hessian")
    assert_matrix(answer, rows @ hessian @ rows.T, EXACT)


@pytest.mark.parametrize("method", [*METHODS, "hessian"])
@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_direction_of_zeros(method: str, where: int, dtype: torch.dtype) -> None:
    """The momentum of the first step: exact zeros, and the other direction as if alone."""
    model = network(dtype)
    with torch.no_grad():  # long enough that a probe length over the smallest number is infinite
        model[0].weight.mul_(1e6)  # type: ignore[index]
    kind: Any = "hessian" if method == "hessian" else "fisher"
    batch = (inputs(dtype), (labels(),))
    wanted = "jvp" if method == "hessian" else method
    oracle = asked(model, F.cross_entropy, [batch], method=wanted)
    (direction,) = draw_directions(oracle, 1)
    zeros = [torch.zeros_like(p) for p in oracle.params]
    directions = [direction, direction]
    directions[where] = zeros
    answer = oracle.quadratic(directions, curvature=kind)
    assert answer.slopes[where] == 0
    assert torch.count_nonzero(answer.matrix[where]) == 0
    assert torch.count_nonzero(answer.matrix[:, where]) == 0
    alone = oracle.directional(direction, curvature=kind)
    assert torch.equal(answer.slopes[1 - where], alone.slope)
    assert torch.equal(answer.matrix[1 - where, 1 - where], alone.curvature)


def test_noise_is_no_slope() -> None:
    """Where passes differ in the last bits, as on a GPU, a direction of zeros still has none."""
    generator = torch.Generator().manual_seed(1)

    def noisy(z: Tensor, y: Tensor) -> Tensor:
        noise = 1e-12 * torch.randn(z.shape, generator=generator, dtype=z.dtype)
        return F.cross_entropy(z + noise, y)

    oracle = asked(network(), noisy, [(inputs(), (labels(),))], method="fd")
    zeros = [torch.zeros_like(p) for p in oracle.params]
    answer = oracle.quadratic([*draw_directions(oracle, 1), zeros])
    assert answer.slopes[1] == 0
    assert torch.count_nonzero(answer.matrix[1]) == 0


def test_parameters_move_once_per_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    """And once per further micro-batch, since each starts where the one before ended."""
    thirds = zip(inputs().split(2), labels().split(2), strict=True)
    batches: list[Batch] = [(x, (y,)) for x, y in thirds]
    oracle = asked(network(), F.cross_entropy, batches, (0.2, 0.3, 0.5), "fd")
    directions = draw_directions(oracle)
    moves = []
    move = vectors.add_scaled_

    def counted(*args: Any) -> None:
        moves.append(args)
        move(*args)

    monkeypatch.setattr(vectors, "add_scaled_", counted)
    oracle.quadratic(directions)
    assert len(moves) == 2 + 2


@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_finite_shows(method: str) -> None:
    """NaN in a direction is not taken for a direction of zeros."""
    oracle = asked(network(), F.cross_entropy, [(inputs(), (labels(),))], method=method)
    one, other = draw_directions(oracle)
    other[0][0, 0] = torch.nan
    answer = oracle.quadratic([one, other])
    assert answer.slopes.isnan().tolist() == [False, True]
    assert answer.matrix.isnan().tolist() == [[False, True], [True, True]]


@pytest.mark.parametrize("method", [*METHODS, "hessian"])
def test_each_direction_alone(method: str) -> None:
    """Bit for bit what `directional` says of each."""
    kind: Any = "hessian" if method == "hessian" else "fisher"
    wanted = "jvp" if method == "hessian" else method
    oracle = asked(network(), F.cross_entropy, [(inputs(), (labels(),))], method=wanted)
    directions = draw_directions(oracle, 3)
    answer = oracle.quadratic(directions, curvature=kind)
    for i, direction in enumerate(directions):
        alone = oracle.directional(direction, curvature=kind)
        assert torch.equal(alone.slope, answer.slopes[i])
        assert torch.equal(alone.curvature, answer.matrix[i, i])


def test_dependent_directions() -> None:
    """Saturated predictions and parallel directions: no cancellation, the matrix is singular."""
    model = network(torch.float32)
    with torch.no_grad():
        model[2].bias += torch.tensor([1e4, 1e4, 0.0, 0.0])  # type: ignore[index]
    oracle = asked(model, F.cross_entropy, [(inputs(torch.float32), (labels(),))])
    (direction,) = draw_directions(oracle, 1)
    doubled = [2 * d for d in direction]
    matrix = oracle.quadratic([direction, doubled]).matrix
    torch.testing.assert_close(matrix, matrix[0, 0] * torch.tensor([[1.0, 2.0], [2.0, 4.0]]))


def test_regression_scaling() -> None:
    """Summed over the outputs of an example instead of averaged: four times as much here."""
    oracle = asked(network(), F.mse_loss, [(inputs(), (values(),))])
    directions = draw_directions(oracle)
    mean = oracle.quadratic(directions).matrix
    per_example = oracle.quadratic(directions, regression_scaling="per_example").matrix
    torch.testing.assert_close(per_example, 4 * mean)


@pytest.mark.parametrize("kind", ["fisher", "hessian"])
def test_one_collective(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All numbers of an answer go through the ranks together."""
    oracle = asked(network(), F.cross_entropy, [(inputs(), (labels(),))])
    directions = draw_directions(oracle, 3)
    oracle.quadratic(directions, curvature=kind)  # the first asks once whether there is a loss
    sizes = []

    def mean(packed: Tensor) -> Tensor:
        sizes.append(packed.numel())
        return packed

    monkeypatch.setattr(oracle, "_mean", mean)
    oracle.quadratic(directions, curvature=kind)
    assert sizes == [3 + 6 + 4]


def test_self_check_watches_the_first_direction() -> None:
    """A slope that the gradient does not have is noticed there, and only there."""
    for where, found in ((0, True), (1, False)):
        oracle = asked(network(), F.cross_entropy, [(inputs(), (labels(),))])
        directions = draw_directions(oracle)
        slopes = stacked(directions) @ flatten(
            [p.grad for p in oracle.params if p.grad is not None]
        )
        slopes[where] *= 2
        if found:
            with pytest.warns(RuntimeWarning, match="Self-check"):
                oracle.quadratic(directions, grad_slopes=slopes)
        else:
            oracle.quadratic(directions, grad_slopes=slopes)
        deviation = oracle.self_check.history[0].deviation
        assert deviation == (pytest.approx(0.5) if found else pytest.approx(0.0, abs=EXACT))


class Rounding(nn.Module):
    """Quantizer with a straight-through gradient: finite differences see a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of rounded activations."""
        hidden = 50 * self.first(x)
        return self.out((hidden + (hidden.round() - hidden).detach()) / 50)


def test_second_opinion_is_about_all_directions() -> None:
    """Where finite differences fail the whole answer comes from forward mode."""
    torch.manual_seed(SEED)
    model = Rounding().double()
    oracle = asked(model, F.cross_entropy, [(inputs(), (labels(),))], method="auto")
    directions = draw_directions(oracle)
    for direction in directions:
        direction[2:] = [torch.zeros_like(d) for d in direction[2:]]
    slopes = stacked(directions) @ flatten([p.grad for p in oracle.params if p.grad is not None])
    with pytest.warns(RuntimeWarning, match="going on with 'jvp'"):
        answer = oracle.quadratic(directions, grad_slopes=slopes)
    assert oracle.method == "jvp"
    torch.testing.assert_close(answer.slopes, slopes)
    assert torch.equal(answer.matrix, oracle.quadratic(directions).matrix)


def test_no_direction() -> None:
    """At least one is needed."""
    oracle = asked(network(), F.cross_entropy, [(inputs(), (labels(),))])
    with pytest.raises(ValueError, match="at least one direction"):
        oracle.quadratic([])
