"""Tests of lightning_curvature/optim/sophiag.py; the update is tested in test_sophia.py."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature import SophiaG, SophiaH
from lightning_curvature.oracle.labels import LabelSampler
from lightning_curvature.oracle.plans import SamplePlan
from tests.helpers.estimates import flat, sampling, spy, squares, watched
from tests.helpers.labels import ContentSampler
from tests.helpers.plain_loop import Loop, classification, network
from tests.helpers.ranks import RankPool
from tests.helpers.reference_sophia import estimates, settings
from tests.helpers.scripted import Scripted, follow, parameters, script

NEVER = 10**9

# Of ten estimates in a row none scales more than one entry in a hundred: tests of other things.
quiet = pytest.mark.filterwarnings("ignore:Sophia[GH] clips more than 99%:RuntimeWarning")


# The estimate


def mean_gradient(model: nn.Module, x: Tensor, step: int) -> Tensor:
    """Return the gradient of the mean loss under the labels that `ContentSampler` draws."""
    z = model(x)
    drawn_labels = ContentSampler(0, step, 0, 0).categorical(z.softmax(1).detach(), 1, 0)
    return flat(torch.autograd.grad(F.cross_entropy(z, drawn_labels), list(model.parameters())))


@quiet
def test_the_number_of_examples_stays_with_its_estimate() -> None:
    """The curvature of the mean loss, whatever the size of later batches."""
    model = network()
    batches = [(x[:n], y[:n]) for (x, y), n in zip(classification(4), (2, 8, 5, 1), strict=True)]
    expected = torch.zeros_like(flat(list(model.parameters())))
    loop = Loop(model, lambda p: SophiaG(p, lr=0.01, betas=(0.9, 0.7), hessian_update_interval=3))
    loop.optimizer.sampler = ContentSampler  # type: ignore[attr-defined]
    for step, (x, y) in enumerate(batches):
        if step % 3 == 0:
            expected = 0.7 * expected + 0.3 * len(x) * mean_gradient(model, x, step).square()
        loop.step(x, y)
        found = flat([loop.optimizer.state[p]["hess_diag"] for p in model.parameters()])
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


@quiet
def test_after_means_at_the_new_parameters() -> None:
    model = network()
    options = {"betas": (0.9, 0.0), "hessian_update_interval": 2, "hessian_timing": "after"}
    loop = Loop(model, lambda p: SophiaG(p, lr=0.01, **options))
    loop.optimizer.sampler = ContentSampler  # type: ignore[attr-defined]
    for step, (x, y) in enumerate(classification(4)):
        loop.step(x, y)
        found = flat([loop.optimizer.state[p]["hess_diag"] for p in model.parameters()])
        if step == 0:
            assert not found.any()
        if step % 2 == 1:
            expected = len(x) * mean_gradient(model, x, step).square()
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


@quiet
@pytest.mark.parametrize("timing", ["before", "after"])
def test_passes(timing: Any) -> None:
    """An estimate takes one forward more if it comes after the step, none if it comes before."""
    model = network()
    loop = Loop(
        model, lambda p: SophiaG(p, lr=0.01, hessian_update_interval=3, hessian_timing=timing)
    )
    runs: list[int] = []
    handle = model.register_forward_hook(lambda *_: runs.append(1))
    counts = []
    for x, y in classification(7):
        loop.step(x, y)
        counts.append(len(runs))
        runs.clear()
    handle.remove()
    assert counts == ([1] * 7 if timing == "before" else [1, 1, 2, 1, 1, 2, 1])


def test_the_plan() -> None:
    params = parameters()
    optimizer = SophiaG(
        params,
        hessian_update_interval=2,
        squared="window",
        hessian_batch_fraction=0.5,
        hessian_clip_norm=3.0,
        hessian_timing="before",
        seed=7,
    )
    optimizer.attach(Scripted(estimates(SophiaG)))
    assert optimizer.wants_record()
    first = SamplePlan(7, 0, "window", 0.5, 3.0, False, LabelSampler)
    assert optimizer.plan() == first
    follow(optimizer, params, script(1))
    assert not optimizer.wants_record()
    assert optimizer.plan() is None
    follow(optimizer, params, script(1))
    assert optimizer.plan() == SamplePlan(7, 2, "window", 0.5, 3.0, False, LabelSampler)
    late = SophiaG(params, hessian_update_interval=1, hessian_timing="after")
    assert late.plan() == SamplePlan(0, 0, "micro_batch", 1.0, None, True, LabelSampler)


def test_the_norm_of_the_sampled_gradient_is_clipped() -> None:
    model = network()
    ((x, y),) = classification(1)
    free = squares(watched(model, sampling(sampler=ContentSampler)), (x, y))
    norm = float((free.sum() / len(x)).sqrt())
    loop = Loop(
        model,
        lambda p: SophiaG(p, lr=0.0, betas=(0.9, 0.0), hessian_clip_norm=norm / 2),
    )
    loop.optimizer.sampler = ContentSampler  # type: ignore[attr-defined]
    loop.step(x, y)
    found = flat([loop.optimizer.state[p]["hess_diag"] for p in model.parameters()])
    torch.testing.assert_close(found, free / 4, rtol=1e-4, atol=0)


@quiet
def test_labels_of_every_step() -> None:
    seen = spy()
    loop = Loop(network(), lambda p: SophiaG(p, lr=0.01, hessian_update_interval=2, seed=3))
    loop.optimizer.sampler = seen  # type: ignore[attr-defined]
    loop.train(classification(5))
    assert seen.keys == [(3, 0, 0, 0), (3, 2, 0, 0), (3, 4, 0, 0)]


# Windows, ranks, resuming


@quiet
def test_accumulation() -> None:
    """One batch of eight, or four of two: the same steps, squared after averaging."""
    found = []
    for parts in (1, 4):
        model = network()
        options = settings(squared="window", hessian_clip_norm=2.0)
        loop = Loop(model, lambda p, options=options: SophiaG(p, **options))
        loop.optimizer.sampler = ContentSampler  # type: ignore[attr-defined]
        for x, y in classification(5):
            loop.optimizer.zero_grad()
            for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (loop.criterion(model(a), b) / parts).backward()
            loop.optimizer.step()
        found.append(loop.theta())
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


def train_rank(kind: str, squared: str) -> tuple[list[float], list[Any], list[float]]:
    """Train this rank's half of each batch; runs on the ranks."""
    from tests.helpers.ranks import world

    rank, size = world()
    model = network()
    seen = spy()
    options = settings(hessian_update_interval=1, max_failures=NEVER)
    if kind == "sophiag":
        options["squared"] = squared
    make: Any = SophiaG if kind == "sophiag" else SophiaH
    loop = Loop(model, lambda p: make(p, **options))
    if kind == "sophiag":
        loop.optimizer.sampler = seen  # type: ignore[attr-defined]
    torch.manual_seed(rank)
    for x, y in classification(2):
        loop.backward(x.chunk(size)[rank], y.chunk(size)[rank])
        if size > 1:
            for p in model.parameters():
                torch.distributed.all_reduce(p.grad)
                p.grad /= size
        loop.optimizer.step()
    h = flat([loop.optimizer.state[p]["hess_diag"] for p in model.parameters()])
    return loop.theta().tolist(), seen.keys, h.tolist()


@pytest.mark.ddp
@pytest.mark.parametrize(
    ("kind", "squared"), [("sophiag", "micro_batch"), ("sophiag", "window"), ("sophiah", "")]
)
def test_two_ranks(kind: str, squared: str, ranks: RankPool) -> None:
    """Labels differ, parameters do not."""
    (theta, keys, h), (other, other_keys, other_h) = ranks.run(train_rank, kind, squared)
    assert theta == other
    assert h == other_h
    if kind == "sophiag":
        assert keys == [(0, 0, 0, 0), (0, 1, 0, 0)]
        assert other_keys == [(0, 0, 1, 0), (0, 1, 1, 0)]
    else:
        # Products average to that of the whole batch.
        alone = train_rank(kind, squared)
        torch.testing.assert_close(torch.tensor(h), torch.tensor(alone[2]), rtol=1e-9, atol=1e-12)


ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"squared": "batch"},
        ValueError,
        "Invalid squared='batch': must be one of 'micro_batch', 'window'.",
    ),
    (
        {"hessian_batch_fraction": 0.0},
        ValueError,
        "Invalid hessian_batch_fraction=0.0: must be in (0, 1].",
    ),
    (
        {"hessian_batch_fraction": 1.5},
        ValueError,
        "Invalid hessian_batch_fraction=1.5: must be in (0, 1].",
    ),
    ({"hessian_clip_norm": 0.0}, ValueError, "Invalid hessian_clip_norm=0.0: must be > 0."),
]


@pytest.mark.parametrize(("options", "error", "message"), ERRORS)
def test_errors(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        SophiaG(parameters(), **options)
    assert str(caught.value) == message
