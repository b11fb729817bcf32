"""`declare_loss` (oracle/capture.py): hand-written losses whose curvature is declared."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_curvature import declare_loss
from lightning_curvature.oracle import NoLossCapturedError
from tests.helpers.dense import DenseModel, Head, flatten, mlp, quadratic
from tests.helpers.losses import CLASSES, distributions, fractions, inputs, labels, values
from tests.helpers.probing import Probe

EXACT = 1e-10


def _log_likelihood(z: Tensor, y: Tensor) -> Tensor:
    return -(z.log_softmax(1) * F.one_hot(y, CLASSES)).sum()


def _logistic(z: Tensor, t: Tensor) -> Tensor:
    return (torch.logaddexp(z, torch.zeros_like(z)) - t * z).mean()


def _quartic(z: Tensor, t: Tensor) -> Tensor:
    return (z - t).pow(4).mean()


# name: hand-written loss, targets, keyword arguments of the declaration
DECLARATIONS: dict[str, tuple[Callable[..., Tensor], Callable[[], Tensor], dict[str, Any]]] = {
    "cross_entropy": (
        lambda z, y: _log_likelihood(z, y) / len(y),
        labels,
        {"kind": "cross_entropy"},
    ),
    "cross_entropy-sum": (_log_likelihood, labels, {"kind": "cross_entropy", "reduction": "sum"}),
    "cross_entropy-soft": (
        lambda z, t: -(z.log_softmax(1) * t).sum(1).mean(),
        distributions,
        {"kind": "cross_entropy"},
    ),
    "mse": (lambda z, t: ((z - t) ** 2).mean(), values, {"kind": "mse"}),
    "mse-sum": (lambda z, t: ((z - t) ** 2).sum(), values, {"kind": "mse", "reduction": "sum"}),
    "bce_with_logits": (_logistic, fractions, {"kind": "bce_with_logits"}),
    "function": (_quartic, values, {"kind": _quartic}),
}


def recorded(objective: Callable[..., Tensor], targets: Tensor, directional: str = "jvp") -> Any:
    """Return a model, and its optimizer after one main pass with backward."""
    torch.manual_seed(3)
    model = mlp().double()
    optimizer = Probe(model.parameters())
    criterion = optimizer.attach_model(model, objective, directional=directional)
    criterion(model(inputs()), targets).backward()
    return model, optimizer


@pytest.mark.parametrize("directional", ["jvp", "fd"])
@pytest.mark.parametrize("name", DECLARATIONS)
def test_declared_curvature(name: str, directional: str) -> None:
    """The curvature is that of the hand-written loss, coefficient included."""
    loss, make_targets, declaration = DECLARATIONS[name]
    targets = make_targets()

    def objective(z: Tensor, t: Tensor) -> Tensor:
        return 0.3 * declare_loss(loss(z, t), z, t, **declaration)

    model, optimizer = recorded(objective, targets, directional)
    direction = optimizer.direction(list(model.parameters()))
    heads = [Head(lambda z: z, lambda z: 0.3 * loss(z, targets))]
    expected = quadratic(DenseModel(model).ggn((inputs(),), heads), flatten(direction)).item()
    answer = optimizer.oracle.directional(direction)
    tolerance = EXACT if directional == "jvp" else 1e-4
    assert answer.curvature.item() == pytest.approx(expected, rel=tolerance)


def test_declaration_wins_over_capture() -> None:
    """A captured loss that is declared to be something else counts once."""
    y = labels()

    def objective(z: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(z, y)
        return declare_loss(loss, z, y, kind=lambda z, y: 3 * F.cross_entropy(z, y))

    model, optimizer = recorded(objective, y)
    direction = optimizer.direction(list(model.parameters()))
    heads = [Head(lambda z: z, lambda z: 3 * F.cross_entropy(z, y))]
    expected = quadratic(DenseModel(model).ggn((inputs(),), heads), flatten(direction)).item()
    answer = optimizer.oracle.directional(direction)
    assert answer.curvature.item() == pytest.approx(expected, rel=EXACT)


def test_declared_and_captured_losses_add_up() -> None:
    """Declared terms stand beside captured ones."""
    y = labels()

    def objective(z: Tensor, y: Tensor) -> Tensor:
        written = declare_loss(z.square().mean(), z, torch.zeros_like(z), kind="mse")
        return F.cross_entropy(z, y) + 0.1 * written

    model, optimizer = recorded(objective, y)
    direction = optimizer.direction(list(model.parameters()))
    heads = [Head(lambda z: z, lambda z: F.cross_entropy(z, y) + 0.1 * z.square().mean())]
    expected = quadratic(DenseModel(model).ggn((inputs(),), heads), flatten(direction)).item()
    answer = optimizer.oracle.directional(direction)
    assert answer.curvature.item() == pytest.approx(expected, rel=EXACT)


def test_without_a_curvature_optimizer_it_is_the_identity() -> None:
    """User code can keep the call whatever optimizer it runs with."""
    z = torch.zeros(2, 3, requires_grad=True)
    loss = z.square().mean()
    assert declare_loss(loss, z, torch.zeros(2, 3), kind="mse") is loss


def test_unknown_kind() -> None:
    """The message lists the words."""
    z = torch.zeros(2, 3, requires_grad=True)
    with pytest.raises(ValueError, match=r"Invalid kind='hinge'.*'cross_entropy'.*function"):
        declare_loss(z.sum(), z, z, kind="hinge")


def test_undeclared_loss_names_the_way_out() -> None:
    """Without a declaration the question is refused; loss and Hessian still work."""
    model, optimizer = recorded(_quartic, values())
    direction = optimizer.direction(list(model.parameters()))
    with pytest.raises(NoLossCapturedError, match=r"(?i)supported.*declare_loss"):
        optimizer.oracle.directional(direction)
    hessian = DenseModel(model).hessian((inputs(),), lambda z: _quartic(z, values()))
    answer = optimizer.oracle.directional(direction, curvature="hessian")
    expected = quadratic(hessian, flatten(direction)).item()
    assert answer.curvature.item() == pytest.approx(expected, rel=EXACT)
    assert torch.equal(optimizer.oracle.loss(), optimizer.oracle.base_loss())
