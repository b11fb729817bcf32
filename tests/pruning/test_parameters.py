"""Tests of lightning_curvature/pruning/parameters.py."""

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from lightning_curvature.pruning.parameters import PrunableParameters, prunable_weights
from tests.pruning.dense import flags, parameters_of, small_net


def chosen(model: nn.Module) -> list[str]:
    names = {id(module): name for name, module in model.named_modules()}
    return [f"{names[id(module)]}.{name}" for module, name in prunable_weights(model)]


# What is prunable


def test_weights_of_linear_and_convolution_layers() -> None:
    model = nn.Sequential(
        nn.Embedding(5, 4),
        nn.Conv1d(2, 3, 2),
        nn.BatchNorm1d(3),
        nn.ConvTranspose2d(2, 3, 2),
        nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2), nn.LSTM(2, 2)),
        nn.Linear(2, 2).requires_grad_(False),
        parametrizations.weight_norm(nn.Linear(2, 2)),
    )
    assert chosen(model) == ["1.weight", "3.weight", "4.0.weight"]


def test_named_parameters() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
    found = prunable_weights(model, ("bias", "weight"))
    assert found == [(model[0], "bias"), (model[0], "weight"), (model[1], "weight")]


def test_layer_that_attention_never_calls() -> None:
    """A mask on it would be multiplied once, at pruning, and never again."""
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "head": nn.Linear(4, 2)})
    assert chosen(model) == ["head.weight"]


def test_shared_weight_appears_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    assert chosen(model) == ["0.weight", "1.weight"]
    with pytest.raises(ValueError, match=r"Cannot prune 2.weight and 0.weight: they are one"):
        PrunableParameters([(model[0], "weight"), (model[2], "weight")], model=model)


def test_found_also_when_pruned() -> None:
    model = small_net()
    before = prunable_weights(model)
    prune.l1_unstructured(model[0], "weight", amount=5)
    assert prunable_weights(model) == before


def test_names() -> None:
    model = small_net()
    assert parameters_of(model).names == ["0.weight", "3.weight", "5.weight", "6.weight"]
    assert PrunableParameters([(model[3], "weight")]).names == ["Linear[0].weight"]
    assert parameters_of(nn.Linear(2, 2)).names == ["weight"]


@pytest.mark.parametrize(
    ("module", "name", "match"),
    [
        (nn.Linear(2, 2, bias=False), "bias", r"Cannot prune Linear\[0\].bias: Linear has no"),
        (parametrizations.weight_norm(nn.Linear(2, 2)), "weight", "parametrization"),
        (nn.LazyLinear(2), "weight", "gets its shape in a first forward pass"),
    ],
)
def test_what_cannot_be_pruned(module: nn.Module, name: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        PrunableParameters([(module, name)])


def test_nothing_to_prune() -> None:
    with pytest.raises(ValueError, match="Nothing to prune"):
        parameters_of(nn.LayerNorm(3))


# As one vector


def test_vector_is_the_weights_in_order() -> None:
    model = small_net()
    parameters = parameters_of(model)
    tensors = [model[number].weight for number in (0, 3, 5, 6)]
    assert torch.equal(parameters.weights(), torch.cat([x.flatten() for x in tensors]))
    assert parameters.total == 48 + 72 + 24 + 40
    assert parameters.sizes() == [48, 72, 24, 40]
    assert parameters.offsets() == [0, 48, 120, 144, 184]
    assert parameters.sparsity() == 0
    assert parameters.survivors().tolist() == list(range(184))


def pruned_net(*gone: int) -> tuple[nn.Sequential, PrunableParameters]:
    model = small_net()
    parameters = parameters_of(model)
    parameters.apply(parameters.weights(), ~flags(parameters.total, *gone))
    return model, parameters


def test_apply() -> None:
    model = small_net()
    parameters = parameters_of(model)
    biases = [p.clone() for name, p in model.named_parameters() if name.endswith("bias")]
    values = torch.linspace(1, 2, 184, dtype=torch.float64)
    parameters.apply(values, ~flags(184, 0, 50, 183))
    expected = values.clone()
    expected[[0, 50, 183]] = 0
    assert torch.equal(parameters.weights(), expected)
    assert torch.equal(torch.cat([p.flatten() for p in parameters.tensors()]), expected)
    assert torch.equal(model[0].weight.flatten(), expected[:48])
    assert torch.equal(model[0].weight_mask.flatten(), (expected[:48] != 0).double())
    for before, p in zip(
        biases, [p for n, p in model.named_parameters() if "bias" in n], strict=True
    ):
        assert torch.equal(before, p)


def test_apply_in_the_dtype_of_the_parameters() -> None:
    model = small_net(torch.bfloat16)
    parameters = parameters_of(model)
    parameters.apply(parameters.weights().double() + 1e-9, ~flags(184, 3))
    assert {p.dtype for p in parameters.tensors()} == {torch.bfloat16}
    assert model[0].weight_mask.dtype == torch.bfloat16


def test_apply_again() -> None:
    """Masks are changed in place; hooks do not pile up."""
    model, parameters = pruned_net(0, 1)
    originals, mask = [id(p) for p in parameters.tensors()], model[0].weight_mask
    for last in (2, 3, 4):
        parameters.apply(parameters.weights(), ~flags(184, *range(last + 1)))
    assert parameters.sparsity() == pytest.approx(5 / 184)
    assert model[0].weight_mask is mask
    assert torch.equal(model[0].weight, model[0].weight_orig), "without a forward pass"
    assert [id(p) for p in parameters.tensors()] == originals, "the optimizer knows these"
    assert len(model[0]._forward_pre_hooks) == 1
    (hook,) = model[0]._forward_pre_hooks.values()
    assert isinstance(hook, prune.CustomFromMask)


def test_forward_and_gradients_see_the_mask() -> None:
    gone = (0, 7, 60, 150)
    model, parameters = pruned_net(*gone)
    with torch.no_grad():
        for p in parameters.tensors():
            p.add_(1)  # as momentum would
    plain = small_net()
    state = {name.removesuffix("_orig"): x for name, x in model.state_dict().items()}
    plain.load_state_dict({name: x for name, x in state.items() if not name.endswith("_mask")})
    theirs = parameters_of(plain)
    theirs.apply(theirs.weights(), ~flags(184, *gone))
    theirs.make_permanent()
    x = torch.randn(5, 4, 3, 3, dtype=torch.float64)
    assert torch.equal(model(x), plain(x))
    grads = torch.autograd.grad(model(x).sum(), parameters.tensors())
    flat = torch.cat([grad.flatten() for grad in grads])
    assert torch.equal(flat[list(gone)], torch.zeros(4, dtype=torch.float64))
    assert torch.equal(parameters.gather(grads), flat[parameters.survivors()])


def test_pruned_weights_go_back_to_zero() -> None:
    _, parameters = pruned_net(0, 7)
    with torch.no_grad():
        for p in parameters.tensors():
            p.sub_(torch.inf if p.ndim == 4 else 1)
    parameters.zero_pruned()
    values = torch.cat([p.detach().flatten() for p in parameters.tensors()])
    assert values[[0, 7]].tolist() == [0, 0]
    assert not values[[0, 7]].signbit().any()
    assert int((values == 0).sum()) == 2


def test_gather_of_nothing() -> None:
    """A parameter without gradient has zeros."""
    _, parameters = pruned_net(0)
    grads: Sequence[Tensor | None] = [None, *(torch.ones_like(p) for p in parameters.tensors()[1:])]
    row = parameters.gather(grads)
    assert row.tolist() == [0.0] * 47 + [1.0] * 136
    with pytest.raises(ValueError, match="Got 1 gradients of 4 parameters"):
        parameters.gather(grads[:1])


def test_what_is_pruned_stays_so() -> None:
    _, parameters = pruned_net(5)
    with pytest.raises(ValueError, match="stay so"):
        parameters.apply(parameters.weights(), flags(184, 5))
    with pytest.raises(ValueError, match=r"shape \(184,\), got \(3,\) and \(184,\)"):
        parameters.apply(torch.zeros(3), flags(184))


def test_masks_that_were_there() -> None:
    model = small_net()
    prune.l1_unstructured(model[3], "weight", amount=10)
    parameters = parameters_of(model)
    assert parameters.layer_sparsities() == {
        "0.weight": 0,
        "3.weight": pytest.approx(10 / 72),
        "5.weight": 0,
        "6.weight": 0,
    }
    assert torch.equal(parameters.weights()[48:120], model[3].weight.detach().flatten())
    keep = parameters.keep()
    keep[0] = False
    parameters.apply(parameters.weights(), keep)
    assert parameters.sparsity() == pytest.approx(11 / 184)


def test_copies_can_be_made() -> None:
    """`torch.nn.utils.prune` alone leaves a weight behind that cannot be copied."""
    model, parameters = pruned_net(0, 1)
    other = parameters_of(copy.deepcopy(model))
    assert torch.equal(other.keep(), parameters.keep())


# Permanent, and resumed


def test_permanent() -> None:
    model, parameters = pruned_net(0, 100)
    values = parameters.weights()
    originals = parameters.tensors()
    with torch.no_grad():
        originals[0].view(-1)[0] = torch.inf  # which times 0 is no zero
    parameters.make_permanent()
    plain = small_net()
    assert list(model.state_dict()) == list(plain.state_dict()), "the order too"
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert [id(p) for p in parameters.tensors()] == [id(p) for p in originals]
    assert torch.equal(torch.cat([p.detach().flatten() for p in parameters.tensors()]), values)
    assert not any(module._forward_pre_hooks for module in model.modules())
    parameters.make_permanent()  # nothing left to do
    assert parameters.sparsity() == 0


def test_masks_are_loaded() -> None:
    _, parameters = pruned_net(0, 100, 101)
    masks = parameters.masks()
    assert {mask.dtype for mask in masks.values()} == {torch.bool}
    other = parameters_of(small_net(seed=3))
    before = other.weights()
    other.load_masks(masks)
    assert torch.equal(other.keep(), parameters.keep())
    assert torch.equal(other.weights(), before.where(parameters.keep(), 0))


def test_masks_of_something_else() -> None:
    _, parameters = pruned_net(0)
    masks = parameters.masks()
    with pytest.raises(ValueError, match=r"missing \['0.weight'\], unexpected \['a'\]"):
        parameters.load_masks({"a": masks.pop("0.weight"), **masks})
    with pytest.raises(ValueError, match=r"shape \(3, 4, 2, 2\) for 0.weight, got \(2,\)"):
        parameters.load_masks({**masks, "0.weight": torch.ones(2)})
