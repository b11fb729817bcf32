"""Tests of lightning_curvature/curvature/quantized.py."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jvp

from lightning_curvature import MeZO, ZOAdam
from lightning_curvature.curvature.quantized import (
    Bits,
    QuantizedWeight,
    dense_state,
    quantize_rest,
    restore_rest,
)
from lightning_curvature.oracle.replay import load_forward_mode

every_width = pytest.mark.parametrize("bits", [8, 4])


def make_weight(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Network(nn.Module):
    """Everything that is quantized, a tied weight, and what is not."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 10, padding_idx=3)
        self.limited = nn.Embedding(20, 10, max_norm=100.0)
        self.layer = nn.TransformerEncoderLayer(10, 2, 15, dropout=0.0, batch_first=True)
        self.conv = nn.Conv1d(10, 10, 3, padding=1)
        self.head = nn.Linear(10, 20)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits."""
        hidden = self.layer(self.embed(tokens) + self.limited(tokens))
        return self.head(self.conv(hidden.transpose(1, 2)).transpose(1, 2))


QUANTIZED = {
    "embed.weight",
    "layer.self_attn.in_proj_weight",
    "layer.self_attn.out_proj.weight",
    "layer.linear1.weight",
    "layer.linear2.weight",
    "conv.weight",
}
TOKENS = torch.arange(12).view(2, 6)


def network(dtype: torch.dtype = torch.float32) -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Network().to(dtype)


def masks_of(module: nn.Module, every: int = 11) -> dict[str, Tensor]:
    return {name: torch.arange(0, p.numel(), every) for name, p in module.named_parameters()}


# One weight


@every_width
@pytest.mark.parametrize("shape", [(6, 8), (5, 7), (3, 131), (4, 3, 3, 3), (2, 1)])
def test_rounding_error(bits: Bits, shape: tuple[int, ...]) -> None:
    weight = make_weight(*shape)
    quantized = QuantizedWeight(weight, torch.empty(0, dtype=torch.int64), bits, group_size=16)
    found = quantized(torch.empty(0))
    assert found.shape == weight.shape
    assert found.is_contiguous()
    rows, error = weight.flatten(1), (found - weight).flatten(1).abs()
    group = rows.shape[1] if bits == 8 else 16
    largest = 127 if bits == 8 else 7
    for part, off in zip(rows.split(group, dim=1), error.split(group, dim=1), strict=True):
        half_a_unit = part.abs().amax(dim=1, keepdim=True) / largest / 2
        assert (off <= half_a_unit * (1 + 1e-5)).all()


@every_width
def test_exact_where_nothing_is_rounded(bits: Bits) -> None:
    largest = 127 if bits == 8 else 7
    weight = torch.arange(-largest, largest + 1.0).repeat(2, 1) * 0.25
    found = QuantizedWeight(weight, torch.empty(0, dtype=torch.int64), bits, 256)(torch.empty(0))
    assert torch.equal(found, weight)


@every_width
def test_entries_that_stay_floats(bits: Bits) -> None:
    weight = make_weight(4, 9)
    weight[1, 2] = 1e6
    positions = torch.tensor([0, 11, 35])
    quantized = QuantizedWeight(weight, positions, bits)
    found = quantized(torch.tensor([0.1, 0.2, 0.3]))
    assert torch.equal(found.view(-1)[positions], torch.tensor([0.1, 0.2, 0.3]))
    rest = torch.ones(36, dtype=torch.bool)
    rest[positions] = False
    off = (found - weight).view(-1)[rest].abs().max()
    assert off < 0.3, "an entry that stays does not spoil the scale of the others"


def test_bytes() -> None:
    weight = make_weight(128, 256)
    nothing = torch.empty(0, dtype=torch.int64)
    sizes = {
        bits: sum(buffer.nbytes for buffer in QuantizedWeight(weight, nothing, bits).buffers())
        for bits in (8, 4)
    }
    assert sizes == {8: 128 * 256 + 128 * 4, 4: 128 * 256 // 2 + 128 * 256 // 64 * 4}


def test_zeros_stay_zero() -> None:
    for bits in (8, 4):
        quantized = QuantizedWeight(torch.zeros(2, 4), torch.empty(0, dtype=torch.int64), bits)
        assert torch.equal(quantized(torch.empty(0)), torch.zeros(2, 4))


# Modules


@every_width
def test_what_is_quantized(bits: Bits) -> None:
    module = network()
    ids = {name: id(p) for name, p in module.named_parameters()}
    numbers = {name: len(mask) for name, mask in masks_of(module).items()}
    made = quantize_rest(module, masks_of(module), bits)
    assert set(made) == QUANTIZED
    sizes = {id(p): p.numel() for p in module.parameters()}
    assert set(sizes) == set(ids.values()), "parameters are the same objects"
    for name in QUANTIZED:
        assert sizes[ids[name]] == numbers[name]
    assert isinstance(module.conv, nn.Conv1d)
    assert module.embed.weight.shape == (20, 10)
    assert sum(p is made["embed.weight"] for p in module.modules()) == 1, "tied weights stay tied"


@every_width
def test_outputs_are_close(bits: Bits) -> None:
    module = network()
    before = module(TOKENS)
    quantize_rest(module, masks_of(module), bits)
    after = module(TOKENS)
    assert not torch.equal(before, after)
    assert F.cosine_similarity(before.flatten(), after.flatten(), 0) > (
        0.999 if bits == 8 else 0.97
    )
    module.eval()
    with torch.inference_mode():  # fused layers take the weights themselves
        torch.testing.assert_close(module(TOKENS), after, rtol=1e-4, atol=1e-4)


@every_width
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_restoring_keeps_the_function(bits: Bits, dtype: torch.dtype) -> None:
    module = network(dtype)
    names = [name for name, _ in module.named_parameters()]
    ids = {name: id(p) for name, p in module.named_parameters()}
    kinds = [type(part) for part in module.modules()]
    masks = masks_of(module)
    made = quantize_rest(module, masks, bits)
    assert {p.dtype for p in module.parameters() if id(p) == ids["conv.weight"]} == {
        torch.float64 if dtype == torch.float64 else torch.float32
    }
    outputs = module(TOKENS)
    assert outputs.dtype == dtype
    codes = {name: weight.codes.clone() for name, weight in made.items()}
    scales = {name: weight.scale for name, weight in made.items()}
    found = restore_rest(module)
    assert {name: p.tolist() for name, p in found.items()} == {
        name: masks[name].tolist() for name in QUANTIZED
    }
    assert [type(part) for part in module.modules()] == kinds
    assert [name for name, _ in module.named_parameters()] == names, "in the same order"
    assert {name: id(p) for name, p in module.named_parameters()} == ids
    assert {p.dtype for p in module.parameters()} == {dtype}
    assert module.head.weight is module.embed.weight
    assert torch.equal(module(TOKENS), outputs)
    # And again by the same scales, which is what a resumed run does.
    again = quantize_rest(module, masks, bits, scales=scales)
    assert all(torch.equal(again[name].codes, codes[name]) for name in codes)
    assert torch.equal(module(TOKENS), outputs)


def test_unnamed_parameters_stay() -> None:
    module = network()
    made = quantize_rest(module, {"conv.weight": torch.tensor([5])})
    assert set(made) == {"conv.weight"}
    assert module.embed.weight.numel() == 200
    assert isinstance(module.embed.weight, nn.Parameter)


def test_twice_does_nothing_more() -> None:
    module = network()
    quantize_rest(module, masks_of(module))
    outputs = module(TOKENS)
    assert quantize_rest(module, masks_of(module)) == {}
    assert torch.equal(module(TOKENS), outputs)
    restore_rest(module)
    assert restore_rest(module) == {}


@every_width
def test_state_dict(bits: Bits) -> None:
    module, other = network(), network()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    for one in (module, other):
        quantize_rest(one, masks_of(one), bits)
    state = module.state_dict()
    assert {type(value) for value in state.values()} <= {Tensor, nn.Parameter}
    assert not torch.equal(module(TOKENS), other(TOKENS))
    other.load_state_dict(state)
    assert torch.equal(module(TOKENS), other(TOKENS))
    assert torch.equal(copy.deepcopy(module)(TOKENS), other(TOKENS))


@every_width
@pytest.mark.parametrize("prefix", ["", "model."])
def test_whole_state(bits: Bits, prefix: str) -> None:
    module, fresh = network(), network()
    quantize_rest(module, masks_of(module), bits)
    state = module.state_dict(prefix=prefix)
    dense_state(module, state, prefix)
    assert set(state) == {f"{prefix}{name}" for name in fresh.state_dict()}
    fresh.load_state_dict({name.removeprefix(prefix): value for name, value in state.items()})
    assert torch.equal(fresh(TOKENS), module(TOKENS))


def test_root_that_is_a_layer() -> None:
    layer = nn.Linear(6, 4)
    x = make_weight(3, 6)
    quantize_rest(layer, {"weight": torch.tensor([2])})
    outputs, state = layer(x), layer.state_dict()
    dense_state(layer, state)
    assert set(state) == {"weight", "bias"}
    assert restore_rest(layer)["weight"].tolist() == [2]
    assert list(layer._parameters) == ["weight", "bias"]
    assert torch.equal(layer(x), outputs)


@every_width
def test_another_dtype(bits: Bits) -> None:
    module = network()
    made = quantize_rest(module, masks_of(module), bits)
    codes = made["conv.weight"].codes.clone()
    expected = module(TOKENS)
    module.bfloat16()
    assert module(TOKENS).dtype == torch.bfloat16
    assert made["conv.weight"].scale.dtype == torch.float32
    assert torch.equal(made["conv.weight"].codes, codes)
    module.double()
    torch.testing.assert_close(module(TOKENS), expected.double(), rtol=0.1, atol=0.1)


def test_another_device() -> None:
    module = network()
    made = quantize_rest(module, masks_of(module))
    module.to("meta")
    tensors = [*module.parameters(), *module.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert made["conv.weight"].positions.dtype == torch.int64


@every_width
def test_gradient_is_that_of_the_whole_weight(bits: Bits) -> None:
    module, x = nn.Linear(9, 4), make_weight(5, 9)
    positions = torch.tensor([1, 13, 30])
    quantize_rest(module, {"weight": positions}, bits)
    weight = module.weight.detach().requires_grad_()
    F.linear(x, weight, module.bias).square().sum().backward()
    (values,) = [p for p in module.parameters() if p is not module.bias]
    (grad,) = torch.autograd.grad(module(x).square().sum(), [values])
    torch.testing.assert_close(grad, weight.grad.view(-1)[positions])
    name = "parametrizations.weight.original"
    load_forward_mode()
    _, slope = jvp(
        lambda v: functional_call(module, {name: v}, (x,)).square().sum(),
        (values.detach(),),
        (torch.ones(3),),
    )
    torch.testing.assert_close(slope, grad.sum())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 5}, "Invalid bits=5: must be 8 or 4."),
        ({"group_size": 0}, "Invalid group_size=0: must be an integer >= 1."),
        ({"group_size": 33}, "Invalid group_size=33: must be even."),
    ],
)
def test_errors(arguments: dict[str, int], message: str) -> None:
    module = network()
    with pytest.raises(ValueError, match=message):
        quantize_rest(module, masks_of(module), **arguments)
    assert isinstance(module.conv.weight, nn.Parameter)


# Training


@pytest.mark.parametrize(("kind", "bits"), [(MeZO, 8), (MeZO, 4), (ZOAdam, 4)])
def test_values_are_trained_and_nothing_else(kind: type[MeZO], bits: Bits) -> None:
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)), make_weight(64, 8)
    y = (x @ make_weight(8, 3, seed=1)).argmax(1)
    masks = {name: torch.arange(0, p.numel(), 5) for name, p in module.named_parameters()}
    made = quantize_rest(module, masks, bits)
    codes = {name: weight.codes.clone() for name, weight in made.items()}
    scales = {name: weight.scale.clone() for name, weight in made.items()}
    optimizer = kind(module.parameters(), lr=0.05, num_samples=4)
    criterion = optimizer.attach_model(module, F.cross_entropy)
    losses = [float(optimizer.step(lambda: criterion(module(x), y))) for _ in range(40)]
    assert losses[-1] < 0.9 * losses[0]
    for name, weight in made.items():
        assert torch.equal(weight.codes, codes[name])
        assert torch.equal(weight.scale, scales[name])
    assert {p.dtype for p in module.parameters()} == {torch.float32}
