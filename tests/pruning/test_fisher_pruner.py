"""Tests of lightning_curvature/pruning/fisher_pruner.py and event.py."""

import itertools
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from lightning_curvature.pruning import FisherPruner
from lightning_curvature.pruning.parameters import PrunableParameters
from lightning_curvature.pruning.patterns import Pattern, layout_of
from tests.pruning.dense import (
    best_subset,
    cost,
    fisher,
    flags,
    joint,
    parameters_of,
    rows_for,
    small_net,
)

DAMPING = 1e-3


def pruner_of(model: nn.Module, **kwargs: Any) -> FisherPruner:
    return FisherPruner(model, **{"damping": DAMPING, "block_size": None, **kwargs})


def weights_of(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in parameters_of(model).tensors()])


# Against dense matrices


@pytest.mark.parametrize("block_size", [None, 23, 46, 184, 500])
@pytest.mark.parametrize("num", [7, 60])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_single_weights(block_size: int | None, num: int, scope: str) -> None:
    """Two events; among the block sizes are those that end where the weights do."""
    model = small_net()
    pruner = pruner_of(model, block_size=block_size, scope=scope)
    parameters = pruner.parameters
    expected = parameters.weights()
    for event, sparsity in enumerate((0.25, 0.5)):
        rows = rows_for(parameters, num, seed=event)
        survivors = parameters.survivors()
        h, w = fisher(rows, DAMPING, block_size), expected[survivors]
        costs = torch.stack([cost(h, w, flags(len(w), q)) for q in range(len(w))])
        gone = torch.zeros(len(w), dtype=torch.bool)
        for start, stop in (
            [(0, 184)] if scope == "global" else itertools.pairwise(parameters.offsets())
        ):
            members = ((survivors >= start) & (survivors < stop)).nonzero().view(-1)
            count = int((stop - start) * sparsity) - (stop - start - len(members))
            gone[members[costs[members].argsort()[:count]]] = True
        change = joint(h, w, gone)
        expected[survivors] += change

        report = pruner.prune(sparsity, rows)
        assert torch.equal(parameters.keep(), expected != 0)
        torch.testing.assert_close(parameters.weights(), expected, rtol=1e-9, atol=1e-12)
        assert report.num_pruned == int(gone.sum())
        assert report.quad_model_change == pytest.approx(float(0.5 * change @ h @ change), rel=1e-9)
        assert report.sparsity == parameters.sparsity() == pytest.approx(sparsity, abs=0.02)
        assert report.layer_sparsities == parameters.layer_sparsities()
        assert report.saliency is not None
        assert report.saliency.threshold == pytest.approx(float(costs[gone].max()), rel=1e-9)
        assert report.saliency.largest == pytest.approx(float(costs.max()), rel=1e-9)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "1:3", "2x2", "3x1"])
def test_groups(pattern: str) -> None:
    """Two events with all interactions; some weights are gone before."""
    model = small_net()
    prune.l1_unstructured(model[3], "weight", amount=9)
    kind = Pattern.parse(pattern)
    pruner = pruner_of(model, pattern=pattern)
    parameters = pruner.parameters
    for event, sparsity in enumerate((0.2, 0.3)):
        rows = rows_for(parameters, 60, seed=event)
        survivors = parameters.survivors()
        place = {position: number for number, position in enumerate(survivors.tolist())}
        w, h = parameters.weights()[survivors], fisher(rows, DAMPING)
        layout = layout_of(parameters, kind)
        candidates = []
        for group in layout.positions[layout.groups()].tolist():
            inside = [place[position] for position in group if position >= 0]
            candidates.append(best_subset(h, w, inside, len(inside) - kind.num_kept))
        left = int(184 * sparsity) - (184 - len(survivors))
        gone = torch.zeros(len(w), dtype=torch.bool)
        for _, subset in sorted(candidates):
            left -= len(subset)
            if left < 0:
                break
            gone[list(subset)] = True
        expected = parameters.weights()
        expected[survivors] += joint(h, w, gone)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            report = pruner.prune(sparsity, rows)
        assert report.num_pruned == int(gone.sum()) > 0
        assert torch.equal(parameters.keep(), expected != 0)
        torch.testing.assert_close(parameters.weights(), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("block_size", [10, 12])
@pytest.mark.parametrize("num", [7, 60])
def test_blocks_do_not_cut_groups(block_size: int, num: int) -> None:
    """10 is rounded up to 12; blocks are of the order in which groups are consecutive."""
    model = small_net()
    pruner = pruner_of(model, pattern="2:4", block_size=block_size)
    parameters = pruner.parameters
    rows = rows_for(parameters, num)
    positions = layout_of(parameters, pruner.pattern).positions
    there = positions >= 0
    arranged = torch.zeros(num, len(positions), dtype=torch.float64)
    arranged[:, there] = rows[:, positions[there]]
    h = fisher(arranged, DAMPING, 12)
    w = torch.zeros(len(positions), dtype=torch.float64)
    w[there] = parameters.weights()[positions[there]]
    candidates = [
        best_subset(h, w, group, 2)
        for group in layout_of(parameters, pruner.pattern).groups().tolist()
    ]
    gone = flags(len(w), *itertools.chain(*(subset for _, subset in sorted(candidates)[:20])))
    expected = parameters.weights()
    expected[positions[there]] += joint(h, w, gone)[there]
    with pytest.warns(RuntimeWarning, match=r"pattern '2:4' stay dense.*: 5.weight \(8 of 24\)"):
        pruner.prune(41 / 184, rows)
    assert torch.equal(parameters.keep(), expected != 0)
    torch.testing.assert_close(parameters.weights(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "3x2"])
def test_updates(pattern: str) -> None:
    """The joint one is the best of them; all choose the same and end with exact zeros."""
    reports, masks = {}, {}
    for update in ("joint", "sum", "none"):
        model = small_net()
        before = weights_of(model)
        pruner = pruner_of(model, pattern=pattern, weight_update=update, block_size=92)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            reports[update] = pruner.prune(0.4, rows_for(pruner.parameters, 60))
        masks[update] = pruner.parameters.keep()
        after = weights_of(model)
        assert torch.equal(after != 0, masks[update])
        assert torch.equal(after, before * masks[update]) == (update == "none")
    assert torch.equal(masks["joint"], masks["none"])
    assert torch.equal(masks["joint"], masks["sum"])
    changes = [reports[update].quad_model_change for update in ("joint", "sum", "none")]
    assert None not in changes
    assert changes[0] < min(changes[1:])


def test_sum_of_single_updates() -> None:
    """A11 in its own words."""
    model = small_net()
    pruner = pruner_of(model, weight_update="sum")
    rows, w = rows_for(pruner.parameters, 7), weights_of(model)
    inverse = torch.linalg.inv(fisher(rows, DAMPING))
    gone = flags(184, *(w.square() / (2 * inverse.diagonal())).argsort()[:92].tolist())
    expected = w + inverse @ torch.where(gone, -w / inverse.diagonal(), 0)
    expected[gone] = 0
    report = pruner.prune(0.5, rows)
    torch.testing.assert_close(weights_of(model), expected, rtol=1e-9, atol=1e-12)
    change = expected - w
    predicted = 0.5 * change @ fisher(rows, DAMPING) @ change
    assert report.quad_model_change == pytest.approx(float(predicted), rel=1e-9)


# Patterns to the end


@pytest.mark.parametrize("criterion", ["fisher", "magnitude", "random"])
def test_every_group_is_pruned_in_the_end(criterion: str) -> None:
    """Rounding must not leave one over, nor weights of layers that do not fill groups."""
    model = small_net()
    pruner = pruner_of(model, pattern="2:4", criterion=criterion, block_size=32)
    with pytest.warns(RuntimeWarning, match="stay dense"):
        pruner.prune(0.3, rows_for(pruner.parameters, 9))
    report = pruner.prune(0.5, rows_for(pruner.parameters, 9))
    kept = {number: model[number].weight_mask for number in (0, 3, 5, 6)}
    assert kept[0].sum(1).unique().tolist() == [2]
    assert kept[3].view(6, 3, 4).sum(2).unique().tolist() == [2]
    assert kept[5][:, :4].sum(1).unique().tolist() == [2]
    assert kept[5][:, 4:].unique().tolist() == [1]
    assert kept[6].sum(1).unique().tolist() == [2]
    assert report.sparsity == pytest.approx((184 - 8) / 2 / 184)
    assert pruner.prune(0.5, rows_for(pruner.parameters, 9)).num_pruned == 0


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_weights_gone_elsewhere_save_no_group(scope: str) -> None:
    """Here from columns that fill no group."""
    model = small_net()
    mask = torch.ones(4, 6)
    mask[:, 4:] = 0
    prune.custom_from_mask(model[5], "weight", mask)
    pruner = pruner_of(model, pattern="2:4", criterion="magnitude", scope=scope)
    with pytest.warns(RuntimeWarning, match="stay dense"):
        report = pruner.prune(0.5)
    assert report.num_pruned == (184 - 8) / 2


def test_more_than_the_pattern_allows() -> None:
    pruner = pruner_of(small_net(), pattern="2:4")
    with pytest.raises(ValueError, match=r"Invalid sparsity=0.6: pattern '2:4' ends at 0.5"):
        pruner.prune(0.6, rows_for(pruner.parameters, 9))


def test_dense_rest_is_told_once(recwarn: pytest.WarningsRecorder) -> None:
    pruner = pruner_of(small_net(), pattern="2:4", criterion="magnitude")
    pruner.prune(0.2)
    pruner.prune(0.4)
    messages = [str(w.message) for w in recwarn if w.category is RuntimeWarning]
    assert messages == [
        "Weights that do not fill a group of pattern '2:4' stay dense, at the end of a row or "
        "column: 5.weight (8 of 24)."
    ]


# Other criteria


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_magnitude_is_that_of_torch(scope: str) -> None:
    model, other = small_net(), small_net()
    report = pruner_of(model, criterion="magnitude", scope=scope).prune(0.5)
    theirs = [(other[number], "weight") for number in (0, 3, 5, 6)]
    if scope == "global":
        prune.global_unstructured(theirs, prune.L1Unstructured, amount=92)
    else:
        for module, name in theirs:
            prune.l1_unstructured(module, name, amount=0.5)
    for module, _ in theirs:
        prune.remove(module, "weight")
    assert torch.equal(weights_of(model), weights_of(other)), "nothing else has changed"
    assert report.quad_model_change is None


def test_magnitude_with_an_update() -> None:
    model = small_net()
    w = weights_of(model)
    pruner = pruner_of(model, criterion="magnitude")
    rows = rows_for(pruner.parameters, 7)
    gone = flags(184, *w.abs().argsort()[:92].tolist())
    pruner.prune(0.5, rows)
    expected = w + joint(fisher(rows, DAMPING), w, gone)
    torch.testing.assert_close(weights_of(model), expected, rtol=1e-9, atol=1e-12)


def test_random() -> None:
    def masks(seed: int) -> list[Tensor]:
        pruner = pruner_of(small_net(), criterion="random", seed=seed)
        kept = []
        for sparsity in (0.25, 0.5):
            pruner.prune(sparsity)
            kept.append(pruner.parameters.keep())
        return kept

    first, again, other = masks(0), masks(0), masks(1)
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    assert [int(kept.sum()) for kept in first] == [138, 92]
    once = pruner_of(small_net(), criterion="random", seed=0)
    once.prune(0.5)
    assert not torch.equal(once.parameters.keep(), first[1]), "events have numbers of their own"


# Gradients


def test_collected_gradients() -> None:
    """Exactly so many rows, all of gradients, each of a number of its own."""
    model = small_net(torch.float32)
    prune.l1_unstructured(model[3], "weight", amount=9)
    pruner = pruner_of(model, num_grads=5)
    x = torch.randn(5, 2, 4, 3, 3)
    seen: list[int] = []

    def loss(number: int) -> Tensor:
        seen.append(number)
        return model(x[number]).square().mean()

    with torch.no_grad():
        rows = pruner.collect(loss)
    assert seen == [0, 1, 2, 3, 4]
    assert rows.shape == (5, 175)
    assert rows.dtype == torch.float32
    assert all(p.grad is None for p in model.parameters())
    model(x[3]).square().mean().backward()
    grads = [p.grad for p in pruner.parameters.tensors()]
    assert torch.equal(rows[3], pruner.parameters.gather(grads))
    assert bool((rows != 0).any(1).all())


def test_collected_without_a_layer() -> None:
    model = small_net()
    pruner = pruner_of(model, num_grads=2)
    rows = pruner.collect(lambda number: model[:4](torch.ones(1, 4, 3, 3).double()).sum())
    assert bool((rows[:, 120:] == 0).all())
    assert bool((rows[:, :120] != 0).any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_in_other_dtypes(dtype: torch.dtype) -> None:
    """They are taken for exact."""
    model, other = small_net(), small_net()
    pruner, exact = pruner_of(model), pruner_of(other)
    rows = rows_for(pruner.parameters, 7).to(dtype)
    pruner.prune(0.5, rows)
    exact.prune(0.5, rows.double())
    torch.testing.assert_close(weights_of(model), weights_of(other), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_in_other_dtypes(dtype: torch.dtype) -> None:
    model = small_net(dtype)
    pruner = pruner_of(model)
    rows = rows_for(pruner.parameters, 7)
    w = weights_of(model).double()
    inverse = torch.linalg.inv(fisher(rows, DAMPING))
    gone = flags(184, *(w.square() / inverse.diagonal()).argsort()[:92].tolist())
    expected = w + joint(fisher(rows, DAMPING), w, gone)
    pruner.prune(0.5, rows)
    assert torch.equal(pruner.parameters.keep(), ~gone)
    torch.testing.assert_close(weights_of(model), expected.to(dtype), rtol=1e-5, atol=1e-6)


def test_saliency_keeps_its_sign() -> None:
    """The recursion in float32 calls the most important weights the least (its inverse is < 0)."""
    torch.manual_seed(0)
    d, m, damping = 50, 1024, 1e-7
    model = nn.Linear(d, 1, bias=False)
    rows = torch.randn(m, d) * torch.logspace(-2, 0, d) + torch.randn(m, 1)
    # One gradient after the other: v_i = H_{i-1}^-1 g_i.
    vectors, norms = torch.zeros(m, d), torch.zeros(m)
    for i, row in enumerate(rows):
        vectors[i] = row / damping - vectors[:i].T @ ((vectors[:i] @ row) / norms[:i])
        norms[i] = m + row @ vectors[i]
    diagonal = 1 / damping - (vectors.square() / norms[:, None]).sum(0)
    assert bool((diagonal < 0).any()), "else the test shows nothing"
    w = weights_of(model).double()
    exact = torch.linalg.inv(fisher(rows, damping)).diagonal()
    expected = flags(d, *(w.square() / exact).argsort()[:25].tolist())
    pruner = FisherPruner(model, damping=damping, block_size=50)
    pruner.prune(0.5, rows)
    assert torch.equal(pruner.parameters.keep(), ~expected)


# What goes wrong changes nothing


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda rows: None, "criterion='fisher' needs gradients, got none"),
        (lambda rows: rows[0], r"expected gradients \[m, 184\].*got \[184\]"),
        (lambda rows: rows[:, 1:], r"expected gradients \[m, 184\].*got \[7, 183\]"),
        (lambda rows: rows[:0], r"no gradients, on ranks \[0\]"),
        (lambda rows: rows.int(), "must be floating point, got torch.int32"),
        (
            lambda rows: rows.index_fill(0, torch.tensor([2, 5]), math.nan),
            r"\[2, 5\] are not finite",
        ),
        (lambda rows: rows * math.inf, "are not finite"),
    ],
)
def test_bad_gradients(spoil: Any, match: str) -> None:
    model = small_net()
    before = weights_of(model)
    pruner = pruner_of(model)
    with pytest.raises(ValueError, match=match):
        pruner.prune(0.5, spoil(rows_for(pruner.parameters, 7)))
    assert torch.equal(weights_of(model), before)
    assert not hasattr(model[0], "weight_mask")


def test_bad_weights() -> None:
    model = small_net()
    with torch.no_grad():
        model[3].weight[0, 0] = math.nan
    pruner = pruner_of(model, criterion="magnitude")
    with pytest.raises(ValueError, match="Nothing was pruned: weights are not all finite"):
        pruner.prune(0.5)
    assert not hasattr(model[0], "weight_mask")


def test_overflow() -> None:
    """Of the squares of weights, so that no order is left."""
    model = small_net()
    with torch.no_grad():
        model[3].weight[0, 0] = 1e200
    before = weights_of(model)
    pruner = pruner_of(model)
    with pytest.raises(RuntimeError, match="saliencies are not all finite"):
        pruner.prune(0.5, rows_for(pruner.parameters, 7))
    assert torch.equal(weights_of(model), before)
    assert not hasattr(model[0], "weight_mask")


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, math.nan])
def test_bad_sparsity(sparsity: float) -> None:
    with pytest.raises(ValueError, match=r"Invalid sparsity=.*must be in \[0, 1\)"):
        pruner_of(small_net(), criterion="magnitude").prune(sparsity)


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"num_grads": 0}, ValueError, "Invalid num_grads=0"),
        ({"damping": 0.0}, ValueError, "Invalid damping=0.0: must be > 0"),
        ({"block_size": 0}, ValueError, "Invalid block_size=0"),
        ({"block_size": 1.5}, TypeError, "Invalid block_size=1.5"),
        ({"criterion": "fischer"}, ValueError, "Invalid criterion='fischer'"),
        ({"pattern": "4"}, ValueError, "Invalid pattern='4'"),
        ({"scope": "all"}, ValueError, "Invalid scope='all'"),
        ({"weight_update": True}, ValueError, "Invalid weight_update=True"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        pruner_of(small_net(), **kwargs)


# What is reported


def test_nothing_to_do() -> None:
    model = small_net()
    pruner = pruner_of(model, criterion="magnitude")
    pruner.prune(0.5)
    before = weights_of(model)
    for sparsity in (0.0, 0.3, 0.5):
        report = pruner.prune(sparsity)
        assert (report.num_pruned, report.saliency, report.sparsity) == (0, None, 0.5)
    assert torch.equal(weights_of(model), before)


def test_layer_that_is_gone(recwarn: pytest.WarningsRecorder) -> None:
    """Named once, and reported each time."""
    model = small_net()
    with torch.no_grad():
        model[5].weight.mul_(1e-6)
    pruner = pruner_of(model, criterion="magnitude")
    assert pruner.prune(0.1).empty_layers == ()
    assert pruner.prune(0.2).empty_layers == ("5.weight",)
    assert pruner.prune(0.3).empty_layers == ("5.weight",)
    messages = [str(w.message) for w in recwarn if w.category is RuntimeWarning]
    assert len(messages) == 1
    assert messages[0].startswith("No weight of 5.weight is left")
    assert pruner.parameters.layer_sparsities()["5.weight"] == 1


def test_chosen_parameters() -> None:
    model = small_net()
    before = model[0].weight.detach().clone()
    parameters = PrunableParameters([(model[3], "weight"), (model[6], "bias")], model=model)
    report = FisherPruner(parameters, block_size=8).prune(0.5, rows_for(parameters, 9))
    assert list(report.layer_sparsities) == ["3.weight", "6.bias"]
    assert report.sparsity == 0.5
    assert torch.equal(model[0].weight, before)
    assert (model[6].bias_mask == 0).sum() + (model[3].weight_mask == 0).sum() == 41
