"""Tests of lightning_curvature/oracle/window_samples.py: micro-batches, ranks, variance."""

import itertools
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature.oracle import recorded
from lightning_curvature.oracle.capture import LossCapture
from lightning_curvature.oracle.extra_pass import Environment
from lightning_curvature.oracle.labels import LabelSampler
from lightning_curvature.oracle.plans import SamplePlan
from lightning_curvature.oracle.record import PassRecord, loss_terms
from lightning_curvature.oracle.sampling import sample_gradients
from lightning_curvature.oracle.window_samples import WindowSamples
from tests.helpers.dense import DenseModel, Head, mlp
from tests.helpers.estimates import backward, flat, sampling, spy, squares, watched
from tests.helpers.labels import ContentSampler

EXACT = 1e-10
SQUARED = ("micro_batch", "window")
FEATURES = 3


def network(classes: int = 2, seed: int = 3) -> nn.Sequential:
    """Build a tiny smooth network with reproducible weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return mlp(FEATURES, 3, classes).double()


def rows(count: int, seed: int = 4) -> tuple[Tensor, Tensor]:
    """Draw inputs and labels of two classes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, FEATURES, generator=generator, dtype=torch.float64)
    return x, torch.randint(2, (count,), generator=generator)


def diagonal(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the exact diagonal of the mean loss of a batch."""
    return DenseModel(model).ggn((x,), [Head(lambda z: z, lambda z: F.cross_entropy(z, y))]).diag()


# Expectations


class Assigned(LabelSampler):
    """Gives assigned labels to every micro-batch of every rank."""

    labels: ClassVar[dict[tuple[int | str, ...], Tensor]] = {}

    def categorical(self, probabilities: Tensor, dim: int, call: int) -> Tensor:
        """Give the labels of this micro-batch."""
        return self.labels[self._key[2:]]


def expectation(model: nn.Module, x: Tensor, slots: Sequence[tuple[int, int]], run: Any) -> Tensor:
    """Return the exact mean over all labels of two classes.

    Args:
        model: The model.
        x: All examples.
        slots: Rank and micro-batch of each example.
        run: Returns an estimate from the labels in `Assigned`.
    """
    p = model(x).softmax(1).detach()
    total = torch.zeros(sum(q.numel() for q in model.parameters()), dtype=p.dtype)
    for combination in itertools.product([0, 1], repeat=len(x)):
        chosen = torch.tensor(combination)
        Assigned.labels = {
            slot: torch.stack([c for c, s in zip(chosen, slots, strict=True) if s == slot])
            for slot in set(slots)
        }
        chance = p[torch.arange(len(x)), chosen].prod()
        total += chance * run()
    return total


@pytest.mark.parametrize("squared", SQUARED)
@pytest.mark.parametrize(
    ("sizes", "weights"),
    [
        ((4,), (1.0,)),
        ((2, 2), (0.5, 0.5)),
        ((1, 1, 1, 1), (0.25,) * 4),
        ((1, 3), (0.5, 0.5)),
        ((1, 3), (0.25, 0.75)),
        ((3, 1), (2.0, 0.1)),
    ],
)
def test_a_window_is_unbiased(
    sizes: tuple[int, ...], weights: tuple[float, ...], squared: Any
) -> None:
    """Over all labels, exactly; the micro-batches may have different sizes and weights."""
    model, (x, y) = network(), rows(4)
    oracle = watched(model, sampling(squared=squared, sampler=Assigned))
    parts = list(zip(x.split(sizes), y.split(sizes), weights, strict=True))
    slots = [(0, i) for i, size in enumerate(sizes) for _ in range(size)]
    found = expectation(model, x, slots, lambda: squares(oracle, *parts))
    expected = sum(w * diagonal(model, a, b) for a, b, w in parts)
    torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("squared", SQUARED)
def test_micro_batches_without_any_label(squared: Any) -> None:
    model, (x, y) = network(), rows(4)
    oracle = watched(model, sampling(squared=squared, sampler=ContentSampler))
    nothing = torch.full((2,), -100)
    with_empty = squares(oracle, (x[:2], nothing, 0.5), (x[2:], y[2:], 0.5))
    alone = squares(oracle, (x[2:], y[2:], 0.5))
    torch.testing.assert_close(with_empty, alone)
    assert alone.any()
    assert not squares(oracle, (x[:2], nothing)).any()


@pytest.mark.parametrize("squared", SQUARED)
def test_a_negative_weight_counts_as_nothing(squared: Any) -> None:
    model, (x, y) = network(), rows(4)
    oracle = watched(model, sampling(squared=squared, sampler=ContentSampler))
    both = squares(oracle, (x[:2], y[:2], -1.0), (x[2:], y[2:], 0.5))
    torch.testing.assert_close(both, squares(oracle, (x[2:], y[2:], 0.5)))


def test_one_window_whatever_the_micro_batches() -> None:
    """The same labels, squared after averaging: 1x8 is 4x2."""
    model, (x, y) = network(), rows(8)
    oracle = watched(model, sampling(squared="window", sampler=ContentSampler))
    whole = squares(oracle, (x, y))
    cut = squares(oracle, *zip(x.split(2), y.split(2), [0.25] * 4, strict=True))
    torch.testing.assert_close(cut, whole, rtol=EXACT, atol=EXACT)
    plan = sampling(squared="window", sampler=ContentSampler, clip_norm=0.1)
    clipped = watched(model, plan)
    smaller = squares(clipped, (x, y))
    assert smaller.norm() < 0.9 * whole.norm()
    cut = squares(clipped, *zip(x.split(2), y.split(2), [0.25] * 4, strict=True))
    torch.testing.assert_close(cut, smaller, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("squared", SQUARED)
@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "sum"])
def test_the_norm_of_the_mean_gradient_is_clipped(squared: Any, loss: str) -> None:
    """The official code clips the gradient of the mean loss, and multiplies its square with B."""
    model, (x, y) = network(), rows(6)
    targets = torch.stack([y, 1 - y], 1).double() if loss == "mse" else y
    function: Any = {
        "cross_entropy": F.cross_entropy,
        "mse": F.mse_loss,
        "sum": lambda z, t: F.cross_entropy(z, t, reduction="sum"),
    }[loss]
    free = squares(watched(model, sampling(sampler=ContentSampler), function), (x, targets))
    # B times the square of the gradient of the mean; that of a sum is B^2 times that of a mean.
    norm = float((free.sum() / 6).sqrt() * (6**0.5 if loss == "sum" else 1))
    for limit, factor in ((0.5 * norm, 0.5), (2 * norm, 1.0)):
        plan = sampling(squared=squared, sampler=ContentSampler, clip_norm=limit)
        found = squares(watched(model, plan, function), (x, targets))
        torch.testing.assert_close(found, free * factor**2, rtol=1e-4, atol=0)


def test_a_part_is_clipped_as_a_batch_of_its_size() -> None:
    model, (x, y) = network(), rows(6)
    part = squares(watched(model, sampling(sampler=ContentSampler)), (x[:3], y[:3]))
    limit = 0.5 * float((part.sum() / 3).sqrt())
    plan = sampling(sampler=ContentSampler, fraction=0.5, clip_norm=limit)
    found = squares(watched(model, plan), (x, y))
    torch.testing.assert_close(found, part / 4, rtol=1e-4, atol=0)


# Variance


def relative_rms(parts: int, squared: Any, draws: int = 150) -> float:
    """Return the error of one estimate relative to the truth, as a root mean square."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 4)).double()
        x, y = torch.randn(64, 10, dtype=torch.float64), torch.randint(4, (64,))
    params = list(model.parameters())
    truth = diagonal(model, x, y)
    environment = Environment.of(model, torch.device("cpu"))
    graphs = []
    for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
        with LossCapture() as capture:
            loss = F.cross_entropy(model(a), b)
        terms = loss_terms(loss, capture.calls)
        record = PassRecord(lambda: None, environment, weight=1 / parts, loss=loss.detach())
        graphs.append((record, terms))
    errors = []
    for draw in range(draws):
        plan = sampling(squared=squared)
        window = WindowSamples()
        for i, (record, terms) in enumerate(graphs):
            sample = sample_gradients(terms, params, LabelSampler(0, draw, 0, i))
            assert sample is not None
            window.add(record, sample)
            window.fold(plan)
        found = window.squares(plan, params, params, lambda *lists: [*lists], 1)
        errors.append((flat(found) - truth).square().sum())
    return float((torch.stack(errors).mean() / truth.square().sum()).sqrt())


def test_the_error_falls_with_the_number_of_squares() -> None:
    """As in arXiv:2305.14342's estimator it does not fall with the number of examples."""
    found = {parts: relative_rms(parts, "micro_batch") for parts in (1, 2, 4, 8)}
    for parts, expected in {1: 1.34, 2: 1.00, 4: 0.72, 8: 0.50}.items():
        assert found[parts] == pytest.approx(expected, rel=0.15), found
    assert relative_rms(8, "window") == pytest.approx(1.34, rel=0.15)


# Streams


def test_every_micro_batch_has_labels_of_its_own() -> None:
    """However gradients are set to zero in between."""
    model, (x, y) = network(), rows(6)
    seen = spy()
    step = 0
    oracle = watched(model, None)
    oracle.plan = lambda: SamplePlan(seed=9, step=step, sampler=seen)
    for _ in range(3):
        # `backward` removes the gradients, as a loop does.
        backward(oracle, *((a, b, 1 / 3) for a, b in zip(x.split(2), y.split(2), strict=True)))
        oracle.sampled_squares()
        step += 1
    assert seen.keys == [(9, step, 0, index) for step in range(3) for index in range(3)]


@pytest.mark.parametrize("squared", SQUARED)
def test_losses_that_are_added_up_before_the_backward(squared: Any) -> None:
    model, (x, y) = network(), rows(6)
    oracle = watched(model, sampling(squared=squared, sampler=ContentSampler))
    parts = list(zip(x.split(2), y.split(2), [0.2, 0.3, 0.5], strict=True))
    expected = squares(oracle, *parts)
    backward(oracle)
    losses = [oracle.criterion(model(a), b) * w for a, b, w in parts]
    torch.stack(losses).sum().backward()
    oracle.select(oracle.params)
    torch.testing.assert_close(flat(oracle.sampled_squares()), expected)


# Ranks


class Ranks:
    """Two ranks in one process: the second waits until the first has told its part."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model: nn.Module, plan: SamplePlan) -> None:
        self.monkeypatch = monkeypatch
        self.told: list[Tensor] = []
        monkeypatch.setattr(recorded, "world_size", lambda: 2)
        self.oracles = [watched(model, plan, mean=mean) for mean in (self._tell, self._mean)]

    def _tell(self, packed: Tensor) -> Tensor:
        self.told.append(packed)
        return packed

    def _mean(self, packed: Tensor) -> Tensor:
        return (packed + self.told.pop(0)) / 2

    def squares(self, *batches: tuple[Tensor, Tensor]) -> Tensor:
        """Return the estimate from one batch per rank."""
        self.told.clear()
        for rank, (oracle, batch) in enumerate(zip(self.oracles, batches, strict=True)):
            self.monkeypatch.setattr(recorded, "rank", lambda rank=rank: rank)
            found = squares(oracle, batch)
        assert not self.told
        return found


@pytest.mark.parametrize("squared", SQUARED)
def test_two_ranks_are_unbiased(squared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly, and with other numbers of examples."""
    model, (x, y) = network(), rows(4)
    ranks = Ranks(monkeypatch, model, sampling(squared=squared, sampler=Assigned))
    slots = [(0, 0), (1, 0), (1, 0), (1, 0)]
    batches = list(zip(x.split([1, 3]), y.split([1, 3]), strict=True))
    found = expectation(model, x, slots, lambda: ranks.squares(*batches))
    expected = sum(diagonal(model, a, b) for a, b in batches) / 2
    torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT)


def test_two_ranks_equal_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same labels for the same examples, averaged before they are squared."""
    model, (x, y) = network(), rows(8)
    for clip_norm in (None, 0.1):
        plan = sampling(squared="window", sampler=ContentSampler, clip_norm=clip_norm)
        whole = squares(watched(model, plan), (x, y))
        found = Ranks(monkeypatch, model, plan).squares((x[:4], y[:4]), (x[4:], y[4:]))
        torch.testing.assert_close(found, whole, rtol=EXACT, atol=EXACT)


class Alike(LabelSampler):
    """Draws the same labels on every rank, as ranks that are seeded alike do."""

    def __init__(self, *key: int | str) -> None:
        super().__init__(*key[:2], 0, *key[3:])


def test_ranks_that_are_seeded_alike_would_be_biased(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, y) = network(), rows(8)
    # Similar examples at equal places, such as the first tokens of texts.
    batches = [(x, y), (x + 0.1, y)]
    truth = float(sum(diagonal(model, a, b) for a, b in batches).sum() / 2)
    ratios = {}
    for sampler in (LabelSampler, Alike):
        ranks = Ranks(monkeypatch, model, sampling())
        found = []
        for step in range(250):
            plan = sampling(squared="window", sampler=sampler, step=step)
            for oracle in ranks.oracles:
                oracle.plan = lambda plan=plan: plan
            found.append(ranks.squares(*batches).sum() / truth)
        values = torch.stack(found)
        ratios[sampler] = (float(values.mean()), float(values.std() / len(values) ** 0.5))
    mean, error = ratios[LabelSampler]
    assert abs(mean - 1) < 5 * error
    mean, error = ratios[Alike]
    assert mean - 1 > 5 * error, ratios
