"""Tests of lightning_curvature/oracle/sampling.py: the mean of squares of sampled gradients.

Whatever can be is compared exactly, in float64, with a dense matrix built by torch.func: the
expectation over all labels, not a mean over some.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature import declare_loss
from lightning_curvature.oracle.capture import SUPPORTED_LOSSES, LossCapture
from lightning_curvature.oracle.labels import LabelSampler
from lightning_curvature.oracle.record import LossTerm, loss_terms
from lightning_curvature.oracle.sampling import sample_gradients
from tests.helpers.dense import MODELS, DenseModel, Head, build, mlp
from tests.helpers.exact_labels import estimate, mean_over_signs, moments
from tests.helpers.losses import CASES, CLASSES, WEIGHT, LossCase, inputs, labels, values

EXACT = 1e-10
STANDARD_ERRORS = 5


def network(outputs: int = CLASSES, hidden: int = 3) -> nn.Sequential:
    """Build a smooth network with reproducible weights."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return mlp(hidden=hidden, classes=outputs).double()


def terms_of(total: Callable[[], Tensor]) -> list[LossTerm]:
    """Return the losses a total consists of, connected to their graph."""
    with LossCapture() as capture:
        loss = total()
    return loss_terms(loss, capture.calls)


def check_exact(terms: Sequence[LossTerm], params: Sequence[Tensor], expected: Tensor) -> None:
    """Compare the expectation over all labels with a diagonal."""
    mean, square = moments(terms, params)
    size = float(expected.abs().max())
    assert size > 0, "the case tests nothing"
    assert float(mean.abs().max()) < EXACT * size**0.5
    torch.testing.assert_close(square, expected, rtol=EXACT, atol=EXACT * size)


def check_on_average(
    terms: Sequence[LossTerm], params: Sequence[Tensor], expected: Tensor, draws: int = 400
) -> Tensor:
    """Compare the mean of many draws with a diagonal, and return the draws."""
    found = [
        estimate(sample_gradients(terms, params, LabelSampler(7, number)), params)
        for number in range(draws)
    ]
    stacked = torch.stack(found)
    error = stacked.std(0) / draws**0.5
    off = (stacked.mean(0) - expected).abs()
    assert bool((off <= STANDARD_ERRORS * error + EXACT * expected.abs().max()).all())
    # A test with huge errors would show nothing.
    assert float(error.norm() / expected.norm()) < 0.5
    return stacked


# Every loss


def case_of(case: LossCase) -> tuple[list[LossTerm], list[Tensor], Tensor]:
    """Return the terms of a case, the parameters, and the exact diagonal."""
    model, x, targets = network(), inputs(), case.targets()
    curved = case.curved or case.loss
    head = Head(case.link, lambda logits: curved(logits, *targets))
    expected = DenseModel(model).ggn((x,), [head]).diag()
    terms = terms_of(lambda: case.objective(model(x), *targets))
    return terms, list(model.parameters()), expected


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss:UserWarning")
@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.name != "gaussian_nll-learned-variance"],
    ids=lambda case: case.name,
)
def test_every_loss(case: LossCase) -> None:
    """Reductions, class weights, ignored classes, smoothing, soft targets, positive weights."""
    terms, params, expected = case_of(case)
    check_exact(terms, params, expected)


def _positive(z: Tensor) -> Tensor:
    return z.exp() + 0.1


OTHERS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "poisson": (lambda z: z, lambda z: F.poisson_nll_loss(z, values().abs())),
    "poisson-linear": (
        _positive,
        lambda z: F.poisson_nll_loss(z, values().abs(), log_input=False, reduction="sum"),
    ),
    "soft_margin": (lambda z: z, lambda z: F.soft_margin_loss(z, values().sign())),
    "soft_margin-none": (
        lambda z: z,
        lambda z: F.soft_margin_loss(z, values().sign(), reduction="none").sum(1).mean(),
    ),
    "huber-of-a-target": (lambda z: z, lambda z: F.huber_loss(values(), z)),
    "mse-of-a-target": (lambda z: z, lambda z: F.mse_loss(values(), z, reduction="sum")),
    "kl_div-of-a-target": (
        lambda z: z.softmax(1),
        lambda z: F.kl_div(values().log_softmax(1), z, reduction="batchmean"),
    ),
    "declared-cross_entropy": (
        lambda z: z,
        lambda z: declare_loss(
            -z.log_softmax(1)[range(6), labels()].mean(), z, labels(), kind="cross_entropy"
        ),
    ),
    "declared-mse-sum": (
        lambda z: z,
        lambda z: declare_loss(
            (z - values()).square().sum(), z, values(), kind="mse", reduction="sum"
        ),
    ),
    "declared-bce": (
        lambda z: z,
        lambda z: declare_loss(
            (F.softplus(z) - z * values().sigmoid()).mean(),
            z,
            values().sigmoid(),
            kind="bce_with_logits",
        ),
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_losses(name: str) -> None:
    link, loss = OTHERS[name]
    model, x = network(), inputs()
    expected = DenseModel(model).ggn((x,), [Head(link, loss)]).diag()
    terms = terms_of(lambda: loss(link(model(x))))
    if len(terms) == 1 and name.startswith("kl_div"):
        check_on_average(terms, list(model.parameters()), expected)
    else:
        check_exact(terms, list(model.parameters()), expected)


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss:UserWarning")
def test_the_tables_name_every_loss() -> None:
    tried = set()
    model, x = network(), inputs()
    for case in CASES:
        terms = terms_of(lambda case=case: case.objective(model(x), *case.targets()))
        tried |= {_function(term) for term in terms}
    for link, loss in OTHERS.values():
        tried |= {_function(term) for term in terms_of(lambda a=link, b=loss: b(a(model(x))))}
    # Absolute errors have no curvature; a declared loss becomes what it was declared to be.
    assert tried == {*SUPPORTED_LOSSES} - {F.l1_loss, declare_loss}


def _function(term: LossTerm) -> Callable[..., Any]:
    return term.loss.function


def test_an_absolute_error_has_no_curvature() -> None:
    model, x = network(), inputs()
    terms = terms_of(lambda: F.l1_loss(model(x), values()))
    params = list(model.parameters())
    sample = sample_gradients(terms, params, LabelSampler(0))
    assert not estimate(sample, params).any()


def test_images_with_the_classes_on_axis_one() -> None:
    """`kl_div` does not say which axis the classes are on; it shows."""
    model, x = network(12), inputs()

    def link(z: Tensor) -> Tensor:
        return z.view(6, 3, 4).log_softmax(1)

    target = values().view(6, 1, 4).expand(6, 3, 4).softmax(1)
    terms = terms_of(lambda: F.kl_div(link(model(x)), target, reduction="batchmean"))
    head = Head(
        lambda z: z.view(6, 3, 4),
        lambda z: F.kl_div(z.log_softmax(1), target, reduction="batchmean"),
    )
    expected = DenseModel(model).ggn((x,), [head]).diag()
    check_on_average(terms, list(model.parameters()), expected)


# Losses whose likelihood is unknown: random signs take the place of labels


def focal(z: Tensor, y: Tensor) -> Tensor:
    """Weigh each example by its error; every class has a part in the weight."""
    log_p = z.log_softmax(1).gather(1, y[:, None]).squeeze(1)
    return (-((1 - log_p.exp()) ** 2) * log_p).mean()


def contrast(z: Tensor, _: Tensor) -> Tensor:
    """Compare every example with every other."""
    return (z @ z.T / 3).logsumexp(1).mean()


def squared_softplus(z: Tensor, _: Any) -> Tensor:
    """Return one loss per example."""
    return F.softplus(z).square().sum(1)


SMALL = torch.tensor([0, 1, 1])
# How the inputs of the loss come from the model's outputs, and the loss of them.
FREE: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "declared-focal": (
        lambda z: z,
        lambda z: declare_loss(focal(z, SMALL), z, SMALL, kind=focal),
    ),
    "declared-contrast": (
        lambda z: z,
        lambda z: declare_loss(contrast(z, SMALL), z, SMALL, kind=contrast),
    ),
    "declared-per-example": (
        lambda z: z,
        lambda z: declare_loss(squared_softplus(z, None), z, None, kind=squared_softplus).mean(),
    ),
    "huber-between-outputs": (
        lambda z: torch.cat([z.tanh(), z.sin()]),
        lambda a: F.huber_loss(a[:2], a[2:], delta=0.3),
    ),
    "gaussian_nll-learned-variance": (
        lambda z: torch.cat([z, z.exp() + 0.1]),
        lambda a: F.gaussian_nll_loss(a[:2], values()[:2, :2], a[2:]),
    ),
    "soft-targets-of-the-model": (
        lambda z: torch.cat([z, z.square().softmax(1)]),
        lambda a: F.cross_entropy(a[:2], a[2:]),
    ),
    "divergence-between-outputs": (
        lambda z: torch.cat([z.log_softmax(1), z.square().softmax(1)]),
        lambda a: F.kl_div(a[:2], a[2:], reduction="batchmean"),
    ),
}


@pytest.mark.parametrize("name", FREE)
def test_losses_whose_likelihood_is_unknown(name: str) -> None:
    link, loss = FREE[name]
    model, x = network(2), inputs(batch=SMALL.numel() if "declared" in name else 2)
    expected = DenseModel(model).ggn((x,), [Head(link, loss)]).diag()
    assert expected.any()
    terms = terms_of(lambda: loss(link(model(x))))
    count = sum(terms[0].loss.arguments[i].numel() for i in terms[0].loss.inputs)
    found = mean_over_signs(terms, list(model.parameters()), count)
    torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT)


# Several losses


class TwoHeads(nn.Module):
    """Shared body with a classification and a regression read-out."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(5, 4)
        self.classify = nn.Linear(4, CLASSES)
        self.regress = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return class logits and predictions."""
        hidden = torch.tanh(self.body(x))
        return self.classify(hidden), self.regress(hidden)


def two_heads() -> TwoHeads:
    """Build the two-headed model with reproducible weights."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return TwoHeads().double()


HEADS = {
    "classes": Head(lambda out: out[0], lambda z: F.cross_entropy(z, labels())),
    "weighted": Head(
        lambda out: out[0], lambda z: 0.5 * F.cross_entropy(z, labels(), weight=WEIGHT)
    ),
    "regression": Head(lambda out: out[1], lambda z: 0.1 * F.mse_loss(z, values())),
    "huber": Head(lambda out: out[1], lambda z: 2.0 * F.huber_loss(z, values(), delta=0.5)),
    "declared": Head(
        lambda out: out[1], lambda z: declare_loss(focal(z, labels()), z, labels(), kind=focal)
    ),
}


@pytest.mark.parametrize(
    "names",
    [("classes", "regression"), ("classes", "weighted", "huber"), ("declared", "classes", "huber")],
    ids="+".join,
)
def test_several_losses(names: tuple[str, ...]) -> None:
    """Added up with coefficients; labels of different calls are independent."""
    model, x = two_heads(), inputs()
    heads = [HEADS[name] for name in names]

    def total() -> Tensor:
        out = model(x)
        parts = torch.stack([head.loss(head.select(out)) for head in heads])
        penalty = torch.stack([p.square().sum() for p in model.parameters()]).sum()
        return parts.sum() + 0.1 * penalty

    # The penalty is no captured loss.
    expected = DenseModel(model).ggn((x,), heads).diag()
    check_on_average(terms_of(total), list(model.parameters()), expected)


@pytest.mark.parametrize("name", ["cross_entropy", "mse", "bce", "huber"])
def test_negative_coefficients_count_as_nothing(name: str) -> None:
    model, x = network(), inputs()
    losses: dict[str, Callable[[Tensor], Tensor]] = {
        "cross_entropy": lambda z: F.cross_entropy(z, labels()),
        "mse": lambda z: F.mse_loss(z, values()),
        "bce": lambda z: F.binary_cross_entropy_with_logits(z, values().sigmoid()),
        "huber": lambda z: F.huber_loss(z, values()),
    }
    terms = terms_of(lambda: -0.5 * losses[name](model(x)))
    params = list(model.parameters())
    sample = sample_gradients(terms, params, LabelSampler(0))
    assert not estimate(sample, params).any()


@pytest.mark.parametrize("name", MODELS)
def test_every_model(name: str) -> None:
    """Batch normalization in train mode, dropout, tied, frozen and unused parameters."""
    model, x, y = build(name), inputs(), labels()
    trained = [p for p in model.parameters() if p.requires_grad]
    torch.manual_seed(0)
    terms = terms_of(lambda: F.cross_entropy(model(x), y))
    head = Head(lambda z: z, lambda z: F.cross_entropy(z, y))
    expected = DenseModel(model, trained).ggn((x,), [head]).diag()
    check_exact(terms, trained, expected)
    sample = sample_gradients(terms, list(model.parameters()), LabelSampler(0))
    assert sample is not None
    pairs = zip(sample.grads, model.parameters(), strict=True)
    assert all(g is None for g, p in pairs if not p.requires_grad)


# Masks, fractions, draws


@pytest.mark.parametrize("left", [0, 1, 4])
def test_masked_tokens(left: int) -> None:
    """Of six examples some have a label; those without it neither count nor are drawn for."""
    model, x = network(), inputs()
    y = torch.full((6,), -100)
    y[:left] = labels()[:left]
    terms = terms_of(lambda: F.cross_entropy(model(x), y))
    params = list(model.parameters())
    if not left:
        sample = sample_gradients(terms, params, LabelSampler(0))
        assert not estimate(sample, params).any()
        return
    head = Head(lambda z: z, lambda z: F.cross_entropy(z[:left], y[:left]))
    check_exact(terms, params, DenseModel(model).ggn((x,), [head]).diag())


@pytest.mark.parametrize("fraction", [0.5, 0.4, 1 / 6, 0.01])
@pytest.mark.parametrize("name", ["cross_entropy", "mse", "bce-none"])
def test_a_fraction_stands_for_all(name: str, fraction: float) -> None:
    """The curvature is that of the mean over the part, not of the part of the mean."""
    model, x = network(), inputs()
    losses: dict[str, Callable[[Tensor, int], Tensor]] = {
        "cross_entropy": lambda z, n: F.cross_entropy(z[:n], labels()[:n]),
        "mse": lambda z, n: F.mse_loss(z[:n], values()[:n]),
        "bce-none": lambda z, n: F.binary_cross_entropy_with_logits(
            z[:n], values()[:n].sigmoid(), reduction="none"
        ).mean(),
    }
    count = {0.5: 3, 0.4: 3, 1 / 6: 1, 0.01: 1}[fraction]
    loss = losses[name]
    terms = terms_of(lambda: loss(model(x), 6))
    params = list(model.parameters())
    expected = DenseModel(model).ggn((x,), [Head(lambda z: z, lambda z: loss(z, count))]).diag()
    _, square = moments(terms, params, fraction=fraction)
    torch.testing.assert_close(square, expected, rtol=EXACT, atol=EXACT)


def test_labels_follow_the_probabilities() -> None:
    p = torch.tensor([0.0, 0.1, 0.6, 0.0, 0.3], dtype=torch.float64)
    count = 20_000
    for dim, table in ((1, p.expand(count, 5)), (0, p.expand(count, 5).T)):
        drawn = LabelSampler(1, "x").categorical(table, dim, 0)
        shares = torch.bincount(drawn, minlength=5) / count
        assert float((shares - p).abs().max()) < 0.02
        assert shares[0] == shares[3] == 0
    ones = LabelSampler(1).bernoulli(torch.full((count,), 0.2, dtype=torch.float64), 0)
    assert float(ones.mean()) == pytest.approx(0.2, abs=0.02)
    noise = LabelSampler(1).normal(torch.empty(count, dtype=torch.float64), 0)
    assert float(noise.mean()) == pytest.approx(0.0, abs=0.03)
    assert float(noise.std()) == pytest.approx(1.0, abs=0.03)
    signs = LabelSampler(1).signs(torch.empty(count), 0, "input")
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert float(signs.mean()) == pytest.approx(0.0, abs=0.03)


def test_a_key_gives_its_labels_whatever_was_drawn_before() -> None:
    p = torch.full((50, 4), 0.25, dtype=torch.float64)

    def draw(*key: int, call: int = 0) -> list[int]:
        return LabelSampler(*key).categorical(p, 1, call).tolist()

    first = draw(3, 1, 0, 0)
    state = torch.get_rng_state()
    torch.rand(5)
    assert draw(3, 1, 0, 0) == first
    torch.set_rng_state(state)
    # Seed, step, rank, micro-batch and loss call.
    others = [draw(4, 1, 0, 0), draw(3, 2, 0, 0), draw(3, 1, 1, 0), draw(3, 1, 0, 1)]
    others += [draw(3, 1, 0, 0, call=1), draw(3, 10, 0)]
    assert all(one != other for one, other in itertools.combinations([first, *others], 2))
    assert torch.equal(torch.get_rng_state(), state)


def test_what_depends_on_no_parameter_has_no_sample() -> None:
    model, x = network(), inputs()
    terms = terms_of(lambda: F.cross_entropy(model(x), labels()))
    frozen = [p.detach() for p in model.parameters()]
    assert sample_gradients(terms, frozen, LabelSampler(0)) is None
    assert sample_gradients([], list(model.parameters()), LabelSampler(0)) is None
    other = torch.ones(2, requires_grad=True)
    sample = sample_gradients(terms, [other], LabelSampler(0))
    assert sample is not None
    assert sample.grads == [None]
