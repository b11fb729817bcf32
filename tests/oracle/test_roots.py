"""Tests of lightning_curvature/oracle/roots.py: vectors at the outputs whose squares are curvature.

The logits themselves are the parameters here, so that what a root says of a loss can be compared,
example by example and in float64, with a dense Hessian.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_curvature import declare_loss
from lightning_curvature.oracle.capture import SUPPORTED_LOSSES, LossCapture
from lightning_curvature.oracle.labels import LabelSampler
from lightning_curvature.oracle.record import LossTerm
from lightning_curvature.oracle.roots import (
    MAX_COLUMNS,
    Root,
    count_columns,
    layer_roots,
    sampled_root,
)
from tests.helpers.dense import DenseModel, Head, output_hessian
from tests.helpers.logits import Logits, at_logits, logcosh, positions, rows_of_logcosh, term_of
from tests.helpers.losses import (
    CASES,
    CLASSES,
    MASK,
    MASKED_LABELS,
    WEIGHT,
    LossCase,
    distributions,
    fractions,
    labels,
    values,
)

EXACT = 1e-10
STANDARD_ERRORS = 5
VALID = (MASKED_LABELS >= 0).double()
ONES = torch.ones(6, dtype=torch.float64)
WARNING = "ignore:reduction. 'mean' divides the total loss:UserWarning"

pytestmark = pytest.mark.filterwarnings(WARNING)


class Flipped(LabelSampler):
    """Gives the sign +1, and -1 to one entry of every example.

    Args:
        examples: Their number.
        column: The entry, None for none.
    """

    def __init__(self, examples: int, column: int | None = None) -> None:
        super().__init__()
        self.examples, self.column = examples, column

    def signs(self, like: Tensor, call: int, name: str) -> Tensor:
        """Give the signs."""
        rows = torch.ones_like(like).reshape(self.examples, -1)
        if self.column is not None:
            rows[:, self.column] = -1.0
        return rows.view(like.shape)


def examples_of(term: LossTerm) -> int:
    """Return the number of examples, told by the columns of an example."""
    shapes = [term.loss.arguments[name].shape for name in term.loss.inputs]
    total = sum(shape.numel() for shape in shapes)
    same = len(shapes) == 2 and term.loss.function is F.mse_loss
    return (total // 2 if same else total) // count_columns(term)


def squares(term: LossTerm, roots: Sequence[Root], z: Tensor) -> Tensor:
    """Return the sum of v_i v_i^T over roots, shape ``[examples, entries, entries]``."""
    count = examples_of(term)
    # An example without a batch axis has the first row only.
    rows = torch.stack([at_logits(term, root, z).reshape(count, -1) for root in roots])
    return torch.einsum("cni,cnj->nij", rows, rows)


def blocks(matrix: Tensor, count: int) -> Tensor:
    """Cut the blocks of the examples out of a matrix, and check that there is nothing else."""
    size = matrix.shape[0] // count
    found = matrix.view(count, size, count, size).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    torch.testing.assert_close(torch.block_diag(*found), matrix, rtol=0, atol=EXACT)
    return found


Total = Callable[[Tensor], Tensor]


def _positive(z: Tensor) -> Tensor:
    return z.exp() + 0.1


def _same(z: Tensor) -> Tensor:
    return z


# Beside the common table: how the inputs come from the logits, and the loss of them.
OTHERS: dict[str, tuple[Total, Total]] = {
    "poisson": (_same, lambda z: F.poisson_nll_loss(z, values().abs())),
    "poisson-linear": (
        _positive,
        lambda z: F.poisson_nll_loss(z, values().abs(), log_input=False, reduction="sum"),
    ),
    "soft_margin": (_same, lambda z: F.soft_margin_loss(z, values().sign())),
    "huber-of-a-target": (_same, lambda z: F.huber_loss(values(), z)),
    "mse-of-a-target": (_same, lambda z: F.mse_loss(values(), z, reduction="sum")),
    "mse-broadcast": (lambda z: z[:, :1], lambda z: F.mse_loss(z.expand(6, 4), values())),
    "declared-cross_entropy": (
        _same,
        lambda z: declare_loss(
            -z.log_softmax(1)[range(6), labels()].mean(), z, labels(), kind="cross_entropy"
        ),
    ),
    "declared-function": (
        _same,
        lambda z: declare_loss(logcosh(z, values()), z, values(), kind=logcosh),
    ),
    "declared-function-per-example": (
        _same,
        lambda z: (
            declare_loss(rows_of_logcosh(z, values()), z, values(), kind=rows_of_logcosh) @ MASK
        ),
    ),
    "kl_div-images": (
        lambda z: z.view(2, 3, 4).log_softmax(1),
        lambda z: F.kl_div(z, values().view(2, 3, 4).softmax(1), reduction="batchmean"),
    ),
    "kl_div-sequences": (
        lambda z: z.view(2, 3, 4).log_softmax(2),
        lambda z: F.kl_div(z, values().view(2, 3, 4).softmax(2), reduction="sum"),
    ),
}


# The curvature that counts is that of a cross-entropy whose logits are log-probabilities.
KL_DIV: dict[str, Total] = {
    "kl_div-images": lambda z: F.kl_div(
        z.log_softmax(1), values().view(2, 3, 4).softmax(1), reduction="batchmean"
    ),
    "kl_div-sequences": lambda z: F.kl_div(
        z.log_softmax(2), values().view(2, 3, 4).softmax(2), reduction="sum"
    ),
}


def problem(case: LossCase | str) -> tuple[LossTerm, Tensor, Tensor]:
    """Return the term of a case, the logits, and the blocks of its examples."""
    model = Logits()
    if isinstance(case, str):
        link, loss = OTHERS[case]
        head = Head(link, KL_DIV.get(case, loss))
        term = term_of(lambda: loss(link(model())))
    else:
        targets = case.targets()
        curved = case.curved or case.loss
        head = Head(case.link, lambda logits: curved(logits, *targets))
        term = term_of(lambda: case.objective(model(), *targets))
    ggn = DenseModel(model).ggn((), [head])
    return term, model.z, blocks(ggn, examples_of(term))


# What a loss of unknown likelihood says where its curvature is negative: see below.
INDEFINITE = ("gaussian_nll-learned-variance",)
EVERY = [*(case for case in CASES if case.name not in INDEFINITE), *OTHERS]


def name_of(case: Any) -> str:
    return case if isinstance(case, str) else case.name


# Exact: all columns, and what signs are multiplied with


@pytest.mark.parametrize("case", EVERY, ids=name_of)
def test_columns_add_up_to_the_hessian(case: LossCase | str) -> None:
    """Reductions, class weights, ignored classes, smoothing, soft targets, extra positions."""
    term, z, expected = problem(case)
    roots = list(layer_roots(term, "type-2", LabelSampler(0)))
    assert len(roots) == count_columns(term)
    assert expected.any()
    torch.testing.assert_close(squares(term, roots, z), expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("case", EVERY, ids=name_of)
def test_random_signs_multiply_the_columns(case: LossCase | str) -> None:
    """A root for signs r is the sum of r_j times column j: E[v v^T] is the sum of squares."""
    term, _, _ = problem(case)
    count = examples_of(term)

    def value(column: int | None) -> Tensor:
        sampler = Flipped(count, column)
        (root,) = layer_roots(term, "curvature-propagation", sampler)
        return torch.cat([x.reshape(count, -1) for x in root.values.values()], dim=1)

    columns = [
        torch.cat([x.reshape(count, -1) for x in root.values.values()], dim=1)
        for root in layer_roots(term, "type-2", LabelSampler(0))
    ]
    base = value(None)
    torch.testing.assert_close(base, torch.stack(columns).sum(0), rtol=EXACT, atol=EXACT)
    for number, column in enumerate(columns):
        torch.testing.assert_close((base - value(number)) / 2, column, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("case", EVERY, ids=name_of)
def test_drawn_labels(case: LossCase | str) -> None:
    """The same draw as for sampled gradients (tests of those: test_sampling.py), or signs."""
    term, _, _ = problem(case)
    (root,) = layer_roots(term, "mc", LabelSampler(3))
    known = sampled_root(term, LabelSampler(3))
    if known.partners is not None:
        (known,) = layer_roots(term, "curvature-propagation", LabelSampler(3))
    for name, value in known.values.items():
        assert torch.equal(root.values[name], value)
    assert torch.equal(root.weights, known.weights)


@pytest.mark.parametrize("fisher_type", ["mc", "curvature-propagation"])
@pytest.mark.parametrize(
    "name",
    [
        "ce-mean-weights-ignored",
        "ce-grid",
        "mse",
        "bce-logits",
        "huber",
        "poisson",
        "declared-function",
        "kl_div-images",
    ],
)
def test_mean_over_draws(name: str, fisher_type: Any) -> None:
    found = {name_of(case): case for case in EVERY}
    term, z, expected = problem(found[name])
    draws = torch.stack(
        [
            squares(term, list(layer_roots(term, fisher_type, LabelSampler(1, number))), z)
            for number in range(400)
        ]
    )
    error = draws.std(0) / len(draws) ** 0.5
    off = (draws.mean(0) - expected).abs()
    assert bool((off <= STANDARD_ERRORS * error + EXACT).all())
    assert float(error.norm() / expected.norm()) < 0.3


def test_the_tables_name_every_loss() -> None:
    tried = {problem(case)[0].loss.function for case in EVERY}
    # Absolute errors have no curvature; a declared loss becomes what it was declared to be.
    assert tried >= {*SUPPORTED_LOSSES} - {F.l1_loss, declare_loss}


@pytest.mark.parametrize("fisher_type", ["mc", "curvature-propagation", "type-2"])
def test_an_absolute_error_has_no_curvature(fisher_type: Any) -> None:
    model = Logits()
    term = term_of(lambda: F.l1_loss(model(), values()))
    roots = layer_roots(term, fisher_type, LabelSampler(0))
    assert not any(root.values["input"].any() for root in roots)


@pytest.mark.parametrize("fisher_type", ["mc", "curvature-propagation", "type-2"])
@pytest.mark.parametrize("name", ["ce-mean", "mse", "bce-logits", "huber", "kl_div-sum"])
def test_negative_coefficients_count_as_nothing(name: str, fisher_type: Any) -> None:
    case = next(case for case in CASES if case.name == name)
    model = Logits()
    term = term_of(lambda: -0.5 * case.objective(model(), *case.targets()))
    roots = layer_roots(term, fisher_type, LabelSampler(0))
    assert not any(root.values["input"].any() for root in roots)


# Losses of unknown likelihood


def focal(z: Tensor, y: Tensor) -> Tensor:
    """Weigh each example by its error; the curvature of wrong examples is indefinite."""
    log_p = z.log_softmax(1).gather(1, y[:, None]).squeeze(1)
    return (-((1 - log_p.exp()) ** 2) * log_p).mean()


INDEFINITE_LOSSES: dict[str, tuple[Total, Callable[[Tensor, Tensor], Tensor]]] = {
    "focal": (
        _same,
        lambda z, _: declare_loss(focal(4 * z, labels()), 4 * z, labels(), kind=focal),
    ),
    "negative-focal": (
        _same,
        lambda z, _: -declare_loss(focal(z, labels()), z, labels(), kind=focal),
    ),
    "gaussian_nll-learned-variance": (
        _positive,
        lambda z, s: F.gaussian_nll_loss(z, values(), s),
    ),
    "huber-between-outputs": (
        torch.sin,
        lambda z, t: F.huber_loss(z, t, delta=0.3),
    ),
    "soft-targets-of-the-model": (
        lambda z: z.square().softmax(1),
        lambda z, t: F.cross_entropy(z, t, label_smoothing=0.1),
    ),
    "divergence-between-outputs": (
        lambda z: z.square().softmax(1),
        lambda z, t: F.kl_div(z.log_softmax(1), t, reduction="batchmean"),
    ),
}


@pytest.mark.parametrize("name", INDEFINITE_LOSSES)
def test_curvature_below_zero_counts_as_nothing(name: str) -> None:
    """Example by example, in all inputs that depend on the parameters together."""
    second, loss = INDEFINITE_LOSSES[name]
    model = Logits()
    term = term_of(lambda: loss(model(), second(model())))
    inputs = [x.flatten(1) for x in term.loss.detached().values()]
    width = inputs[0].shape[1]
    bound = term.loss.detached()

    def at(joined: Tensor) -> Tensor:
        parts = [part.contiguous() for part in joined.split(width, dim=1)]
        return (term.coefficient * bound(parts)).sum()

    joined = torch.cat(inputs, dim=1)
    dense = blocks(output_hessian(at, joined), 6)
    eigenvalues, basis = torch.linalg.eigh(dense)
    # Huber's loss of a difference is convex, and singular.
    convex = name == "huber-between-outputs"
    assert bool((eigenvalues < -EXACT).any()) is not convex, "the case tests nothing"
    expected = (basis * eigenvalues.clamp_min(0.0).unsqueeze(1)) @ basis.mT
    found = torch.zeros_like(expected)
    for root in layer_roots(term, "type-2", LabelSampler(0)):
        assert root.partners is None
        v = torch.cat([root.values[name] for name in term.loss.inputs], dim=1)
        found += v.unsqueeze(2) * v.unsqueeze(1)
    torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT)


def test_many_outputs_of_unknown_likelihood() -> None:
    """The Hessian of 65 outputs is not formed: the gradient at the labels takes its place."""
    model = Logits(2, 65)
    y = torch.zeros(2, 65, dtype=torch.float64)
    term = term_of(lambda: declare_loss(logcosh(model(), y), model(), y, kind=logcosh))
    (empirical,) = layer_roots(term, "empirical", LabelSampler(0))
    for fisher_type in ("mc", "curvature-propagation"):
        (root,) = layer_roots(term, fisher_type, LabelSampler(0), official_empirical_scaling=True)
        assert torch.equal(root.values["input"], empirical.values["input"])
    message = "a loss of unknown likelihood here, at most 64 are allowed. Use fisher_type='mc'"
    with pytest.raises(ValueError, match=message):
        layer_roots(term, "type-2", LabelSampler(0))


def test_examples_that_are_not_finite() -> None:
    """They say nan; the decomposition does not raise, and the other examples are as they were."""
    model = Logits()
    term = problem("declared-function")[0]
    clean = list(layer_roots(term, "type-2", LabelSampler(0)))
    with torch.no_grad():
        model.z[2, 1] = torch.nan
    term = term_of(
        lambda: (
            declare_loss(rows_of_logcosh(model(), values()), model(), values(), kind=logcosh)
            .nan_to_num(0.0)
            .mean()
        )
    )
    term = LossTerm(term.index, term.loss, torch.tensor(1.0, dtype=torch.float64), None)
    (root,) = layer_roots(term, "mc", Flipped(6))
    expected = torch.stack([other.values["input"] for other in clean]).sum(0)
    value = root.values["input"]
    assert bool(value[2].isnan().all())
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(value[others], expected[others])


# Number of columns, weights, dtypes, errors


COLUMNS: dict[str, tuple[Total, int]] = {
    "classes": (lambda z: F.cross_entropy(z, labels()), 4),
    "positions": (lambda z: F.cross_entropy(positions(z), labels().view(3, 2)), 8),
    "one example": (lambda z: F.cross_entropy(z[0], labels()[0]), 4),
    "outputs": (lambda z: F.mse_loss(z, values()), 4),
    "one output": (lambda z: F.mse_loss(z[:, 0], values()[:, 0]), 1),
    "one number": (lambda z: F.mse_loss(z[0, 0], values()[0, 0]), 1),
    "two inputs": (lambda z: F.mse_loss(z[:, :2], z[:, 2:]), 2),
    "two unlike inputs": (lambda z: F.gaussian_nll_loss(z, values(), _positive(z[:, :1])), 5),
    "a shared input": (lambda z: F.mse_loss(z[:1], z.sin()), 24),
}


@pytest.mark.filterwarnings("ignore:Using a target size:UserWarning")
@pytest.mark.parametrize("name", COLUMNS)
def test_number_of_columns(name: str) -> None:
    total, columns = COLUMNS[name]
    model = Logits()
    term = term_of(lambda: total(model()))
    assert count_columns(term) == columns
    roots = list(layer_roots(term, "type-2", LabelSampler(0)))
    assert len(roots) == columns
    for fisher_type in ("mc", "curvature-propagation", "empirical"):
        (root,) = layer_roots(term, fisher_type, LabelSampler(0))
        for key, value in [*root.values.items(), *roots[0].values.items()]:
            assert value.shape == term.loss.arguments[key].shape


def test_a_column_is_of_one_position() -> None:
    """A probe of one position says nothing about the others."""
    model = Logits()
    term = term_of(lambda: F.cross_entropy(positions(model()), labels().view(3, 2)))
    for root in layer_roots(term, "type-2", LabelSampler(0)):
        used = root.values["input"].abs().amax(1) > 0
        assert used.sum(1).tolist() == [1, 1, 1]


@pytest.mark.parametrize("fisher_type", ["mc", "curvature-propagation", "type-2", "empirical"])
def test_weights(fisher_type: Any) -> None:
    """One per example, and position where the loss has positions, in all kinds alike."""

    def weights(total: Total) -> Tensor:
        model = Logits()
        term = term_of(lambda: total(model()))
        return next(layer_roots(term, fisher_type, LabelSampler(0))).weights

    def equal(found: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT)

    equal(weights(lambda z: F.cross_entropy(z, MASKED_LABELS)), VALID / VALID.sum())
    found = weights(lambda z: F.cross_entropy(positions(z), labels().view(3, 2)))
    equal(found, torch.full((3, 2), 1 / 6, dtype=torch.float64))
    for loss in (F.mse_loss, F.binary_cross_entropy_with_logits, F.huber_loss):
        equal(weights(lambda z, loss=loss: loss(z, fractions())), ONES / 6)
    equal(weights(lambda z: declare_loss(focal(z, labels()), z, labels(), kind=focal)), ONES / 6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fisher_type", ["mc", "curvature-propagation", "type-2", "empirical"])
@pytest.mark.parametrize(
    "loss",
    [
        lambda z: F.cross_entropy(z, labels(), weight=WEIGHT.to(z.dtype)),
        lambda z: F.cross_entropy(z, distributions().to(z.dtype)),
        lambda z: F.mse_loss(z, values().to(z.dtype)),
        lambda z: F.binary_cross_entropy_with_logits(z, fractions().to(z.dtype)),
        lambda z: F.binary_cross_entropy(z.sigmoid(), fractions().to(z.dtype)),
        lambda z: F.huber_loss(z, values().to(z.dtype)),
        lambda z: F.nll_loss(z.log_softmax(1), labels(), weight=WEIGHT.to(z.dtype)),
        lambda z: F.gaussian_nll_loss(z, values().to(z.dtype), z.square() + 0.5),
        lambda z: F.kl_div(z.log_softmax(1), distributions().to(z.dtype), reduction="sum"),
        lambda z: declare_loss(focal(z, labels()), z, labels(), kind=focal),
    ],
)
def test_half_precision(loss: Total, fisher_type: Any, dtype: torch.dtype) -> None:
    """Roots and weights are computed in float32, whatever the loss was called with."""
    model = Logits().to(dtype)
    term = term_of(lambda: loss(model()))
    for root in layer_roots(term, fisher_type, LabelSampler(0)):
        assert root.weights.dtype == torch.float32
        for value in root.values.values():
            assert value.dtype == torch.float32
            assert bool(value.isfinite().all())


def test_nobody_sees_the_loss_being_called() -> None:
    model = Logits()
    term = term_of(lambda: declare_loss(focal(model(), labels()), model(), labels(), kind=focal))
    with LossCapture() as capture, torch.no_grad():
        for fisher_type in ("mc", "type-2", "empirical"):
            list(layer_roots(term, fisher_type, LabelSampler(0)))
    ce = term_of(lambda: F.cross_entropy(model(), labels()))
    with capture, torch.no_grad():
        list(layer_roots(ce, "empirical", LabelSampler(0)))
    assert not capture.calls


@pytest.mark.parametrize("fisher_type", ["mc", "curvature-propagation", "type-2", "empirical"])
@pytest.mark.parametrize(
    "loss",
    [
        lambda z: F.cross_entropy(z, labels()[:0], reduction="sum"),
        lambda z: F.mse_loss(z, values()[:0], reduction="sum"),
        lambda z: F.huber_loss(z, values()[:0], reduction="sum"),
        lambda z: declare_loss(z.square().sum().cosh(), z, None, kind=lambda a, _: a.cosh().sum()),
    ],
)
def test_no_examples(loss: Total, fisher_type: Any) -> None:
    model = Logits()
    term = term_of(lambda: loss(model()[:0]))
    for root in layer_roots(term, fisher_type, LabelSampler(0)):
        assert root.values["input"].shape == (0, CLASSES)
        assert root.weights.shape == (0,)


def test_too_many_columns() -> None:
    z = torch.zeros(2, MAX_COLUMNS + 1, requires_grad=True)
    term = term_of(lambda: F.cross_entropy(z, torch.tensor([0, 1])))
    message = "4097 for cross_entropy here, at most 4096 are allowed. Use fisher_type='mc'"
    with pytest.raises(ValueError, match=message):
        layer_roots(term, "type-2", LabelSampler(0))
    assert len(list(layer_roots(term, "mc", LabelSampler(0)))) == 1


def test_unknown_kind() -> None:
    term = problem("poisson")[0]
    with pytest.raises(ValueError, match="Invalid fisher_type='exact': must be one of 'mc', "):
        layer_roots(term, "exact", LabelSampler(0))  # type: ignore[arg-type]
