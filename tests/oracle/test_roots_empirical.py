"""Tests of the empirical roots of lightning_curvature/oracle/roots.py: gradients at the labels."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_curvature import declare_loss
from lightning_curvature.oracle.labels import LabelSampler
from lightning_curvature.oracle.roots import layer_roots
from tests.helpers.logits import Logits, at_logits, logcosh, positions, rows_of_logcosh, term_of
from tests.helpers.losses import (
    CUSTOM_IGNORED,
    MASK,
    MASKED_LABELS,
    WEIGHT,
    distributions,
    fractions,
    labels,
    values,
)

EXACT = 1e-10

pytestmark = pytest.mark.filterwarnings(
    "ignore:reduction. 'mean' divides the total loss:UserWarning"
)

Total = Callable[[Tensor], Tensor]


def _positive(z: Tensor) -> Tensor:
    return z.exp() + 0.1


# Empirical: outer products of the gradients of examples

# A total, the loss of single examples (or positions), and their weights in the total.
Rows = Callable[[Tensor], Tensor]


VALID = (MASKED_LABELS >= 0).double()
OF_LABEL = torch.where(MASKED_LABELS >= 0, WEIGHT[MASKED_LABELS.clamp_min(0)], 0.0)
ONES = torch.ones(6, dtype=torch.float64)

EMPIRICAL: dict[str, tuple[Total, Rows, Tensor]] = {
    "ce": (
        lambda z: F.cross_entropy(z, labels()),
        lambda z: F.cross_entropy(z, labels(), reduction="none"),
        ONES / 6,
    ),
    "ce-sum": (
        lambda z: F.cross_entropy(z, labels(), reduction="sum"),
        lambda z: F.cross_entropy(z, labels(), reduction="none"),
        ONES,
    ),
    "ce-none": (
        lambda z: F.cross_entropy(z, labels(), reduction="none") @ MASK,
        lambda z: F.cross_entropy(z, labels(), reduction="none"),
        MASK,
    ),
    "ce-ignored": (
        lambda z: 3 * F.cross_entropy(z, MASKED_LABELS),
        lambda z: F.cross_entropy(z, MASKED_LABELS, reduction="none"),
        3 * VALID / VALID.sum(),
    ),
    "ce-ignored-weights": (
        lambda z: F.cross_entropy(z, MASKED_LABELS, weight=WEIGHT),
        lambda z: F.cross_entropy(z, MASKED_LABELS, reduction="none"),
        OF_LABEL / OF_LABEL.sum(),
    ),
    "ce-smoothed": (
        lambda z: F.cross_entropy(z, labels(), label_smoothing=0.2),
        lambda z: F.cross_entropy(z, labels(), reduction="none", label_smoothing=0.2),
        ONES / 6,
    ),
    "ce-soft": (
        lambda z: F.cross_entropy(z, distributions()),
        lambda z: F.cross_entropy(z, distributions(), reduction="none"),
        ONES / 6,
    ),
    "ce-positions": (
        lambda z: F.cross_entropy(positions(z), CUSTOM_IGNORED.view(3, 2), ignore_index=2),
        lambda z: F.cross_entropy(z, CUSTOM_IGNORED, ignore_index=2, reduction="none"),
        (CUSTOM_IGNORED != 2).double() / (CUSTOM_IGNORED != 2).sum(),
    ),
    "nll": (
        lambda z: F.nll_loss(z.log_softmax(1), labels()),
        lambda z: F.cross_entropy(z, labels(), reduction="none"),
        ONES / 6,
    ),
    "kl_div": (
        lambda z: F.kl_div(z.log_softmax(1), distributions(), reduction="batchmean"),
        lambda z: F.kl_div(z.log_softmax(1), distributions(), reduction="none").sum(1),
        ONES / 6,
    ),
    "mse": (
        lambda z: 0.5 * F.mse_loss(z, values()),
        lambda z: F.mse_loss(z, values(), reduction="none").mean(1),
        ONES / 12,
    ),
    "mse-sum": (
        lambda z: F.mse_loss(z, values(), reduction="sum"),
        lambda z: F.mse_loss(z, values(), reduction="none").sum(1),
        ONES,
    ),
    "mse-none": (
        lambda z: F.mse_loss(z, values(), reduction="none").mean(1) @ MASK,
        lambda z: F.mse_loss(z, values(), reduction="none").mean(1),
        MASK,
    ),
    "mse-one-output": (
        lambda z: F.mse_loss(z[:, 0], values()[:, 0], reduction="sum"),
        lambda z: (z[:, 0] - values()[:, 0]).square(),
        ONES,
    ),
    "mse-between-outputs": (
        lambda z: F.mse_loss(z[:, :2], z[:, 2:].sin()),
        lambda z: F.mse_loss(z[:, :2], z[:, 2:].sin(), reduction="none").mean(1),
        ONES / 6,
    ),
    "bce-logits": (
        lambda z: F.binary_cross_entropy_with_logits(z, fractions()),
        lambda z: F.binary_cross_entropy_with_logits(z, fractions(), reduction="none").mean(1),
        ONES / 6,
    ),
    "bce-sum": (
        lambda z: F.binary_cross_entropy(z.sigmoid(), fractions(), reduction="sum"),
        lambda z: F.binary_cross_entropy(z.sigmoid(), fractions(), reduction="none").sum(1),
        ONES,
    ),
    "huber": (
        lambda z: F.huber_loss(z, values()),
        lambda z: F.huber_loss(z, values(), reduction="none").mean(1),
        ONES / 6,
    ),
    "huber-sum": (
        lambda z: F.huber_loss(z, values(), reduction="sum"),
        lambda z: F.huber_loss(z, values(), reduction="none").sum(1),
        ONES,
    ),
    "l1": (
        lambda z: F.l1_loss(z, values()),
        lambda z: F.l1_loss(z, values(), reduction="none").mean(1),
        ONES / 6,
    ),
    "gaussian_nll-learned-variance": (
        lambda z: F.gaussian_nll_loss(z, values(), _positive(z)),
        lambda z: F.gaussian_nll_loss(z, values(), _positive(z), reduction="none").mean(1),
        ONES / 6,
    ),
    "declared-mean": (
        lambda z: declare_loss(logcosh(z, values()), z, values(), kind=logcosh),
        lambda z: rows_of_logcosh(z, values()),
        ONES / 6,
    ),
    "declared-per-example": (
        lambda z: (
            declare_loss(rows_of_logcosh(z, values()), z, values(), kind=rows_of_logcosh) @ MASK
        ),
        lambda z: rows_of_logcosh(z, values()),
        MASK,
    ),
}


@pytest.mark.parametrize("name", EMPIRICAL)
def test_gradients_at_the_labels(name: str) -> None:
    """The square is sum_i a_i dl_i dl_i^T over examples or positions; masked ones are zero."""
    total, rows, weights = EMPIRICAL[name]
    model = Logits()
    term = term_of(lambda: total(model()))
    (root,) = layer_roots(term, "empirical", LabelSampler(0))
    found = at_logits(term, root, model.z)
    # Rows depend on their own logits alone.
    (grads,) = torch.autograd.grad(rows(model()).sum(), model.z)
    torch.testing.assert_close(found, weights.sqrt()[:, None] * grads, rtol=EXACT, atol=EXACT)

    (root,) = layer_roots(term, "empirical", LabelSampler(0), official_empirical_scaling=True)
    found = at_logits(term, root, model.z)
    (grads,) = torch.autograd.grad(total(model()), model.z)
    torch.testing.assert_close(found, grads, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("dim", [1, 2])
def test_gradients_at_the_labels_of_a_divergence(dim: int) -> None:
    """`kl_div` does not say which axis the classes are on; it shows."""
    model = Logits()
    target = values().view(2, 3, 4).softmax(dim) * torch.tensor([0.5, 2.0]).view(2, 1, 1)
    term = term_of(
        lambda: F.kl_div(model().view(2, 3, 4).log_softmax(dim), target, reduction="sum")
    )
    (root,) = layer_roots(term, "empirical", LabelSampler(0))
    found = at_logits(term, root, model.z).view(2, 3, 4)
    mass = target.sum(dim, keepdim=True)
    p = model().detach().view(2, 3, 4).softmax(dim)
    torch.testing.assert_close(found, mass.sqrt() * (p - target / mass), rtol=EXACT, atol=EXACT)
