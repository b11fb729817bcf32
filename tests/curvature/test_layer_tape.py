"""Tests of lightning_curvature/curvature/layer_tape.py and attention_calls.py."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode
from torch.utils.checkpoint import checkpoint

from lightning_curvature.curvature.kronecker_blocks import Blocks, find_blocks
from lightning_curvature.curvature.layer_rows import layer_rows, to_matrix
from lightning_curvature.curvature.layer_tape import LayerTape
from lightning_curvature.oracle.extra_pass import marked


def tape_of(module: nn.Module, enabled: Callable[[], bool] = lambda: True) -> LayerTape:
    """Return a tape on all layers of a module."""
    parts = parts_of(module)
    return LayerTape(parts.layers, parts.attentions, enabled)


def parts_of(module: nn.Module) -> Blocks:
    """Cut a module into blocks."""
    return find_blocks(module, list(module.parameters()))


def check_rows(module: nn.Module, run: Callable[[], Tensor]) -> list[str]:
    """Check that the calls in a pass make up the gradient of every block, and name them."""
    parts, params = parts_of(module), list(module.parameters())
    tape = tape_of(module)
    loss = run().square().sum()
    calls = tape.take()
    assert calls
    assert all(call.is_sound for call in calls)
    expected = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
    found = torch.autograd.grad(loss, [call.edge for call in calls], allow_unused=True)
    for block in parts.blocks.values():
        total: Any = 0
        for call, slope in zip(calls, found, strict=True):
            if call.name in block.calls and slope is not None:
                given, grad = (x.movedim(call.batch_axis, 0) for x in (call.given, slope))
                for rows in layer_rows(block.layer, given, grad, has_bias=block.bias is not None):
                    inputs = rows.inputs
                    if block.is_embedding:
                        inputs = F.one_hot(inputs, block.input.size).to(grad.dtype)
                    total = total + rows.outputs.mT @ inputs
        weight = expected[block.weight.number]
        assert weight is not None
        bias = None
        if block.bias is not None:
            whole = expected[block.bias.number]
            assert whole is not None
            bias = block.bias.of(whole)
        matrix = to_matrix(block.layer, block.weight.of(weight), bias)
        torch.testing.assert_close(total, matrix, rtol=1e-10, atol=1e-11)
    assert not tape.calls
    tape.close()
    return [call.name for call in calls]


def draw(*shape: int) -> Tensor:
    """Draw normal numbers."""
    return torch.randn(shape, dtype=torch.float64)


def attention(**options: Any) -> nn.MultiheadAttention:
    """Build an attention layer none of whose biases is zero."""
    layer = nn.MultiheadAttention(4, 2, **options).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn_like(p))
    return layer


# Layers


def test_calls_make_up_the_gradient() -> None:
    model = nn.Sequential(
        nn.Embedding(6, 4), nn.Linear(4, 4), nn.Tanh(), nn.Conv1d(3, 4, 2), nn.Linear(3, 2)
    ).double()
    x = torch.randint(6, (5, 3))
    assert check_rows(model, lambda: model(x)) == ["0", "1", "3", "4"]


@pytest.mark.parametrize("shape", [(3, 4), (3, 2, 4), (4,)])
@pytest.mark.parametrize("bias", [True, False])
def test_activations_in_place(shape: tuple[int, ...], bias: bool) -> None:
    """The graph's place of an output is found before anything is done to the output."""
    model = nn.Sequential(
        nn.Linear(4, 4, bias=bias),
        nn.ReLU(inplace=True),
        nn.Linear(4, 4, bias=bias),
        nn.ELU(1, True),
    ).double()
    x = draw(*shape)
    expected = model(x)
    assert check_rows(model, lambda: model(x)) == ["0", "2"]
    tape = tape_of(model)
    assert torch.equal(model(x), expected)
    tape.close()


def test_in_place_after_a_convolution() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(12, 2))
    model = model.double()
    x = draw(3, 2, 3, 3)
    check_rows(model, lambda: model(x))


def test_in_place_after_an_output_that_is_a_view() -> None:
    """A layer without a batch axis drops the one it has put in."""
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.ReLU(inplace=True), nn.Linear(4, 2)).double()
    x = draw(2, 5)
    assert model[0](x)._is_view()
    assert check_rows(model, lambda: model(x)) == ["0", "2"]


def test_layers_used_twice() -> None:
    model = nn.Linear(4, 4).double()
    x = draw(3, 4)
    assert check_rows(model, lambda: model(model(x).tanh())) == ["", ""]


def test_layers_that_share_a_weight() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    model[2].weight, model[2].bias = model[0].weight, model[0].bias
    x = draw(3, 4)
    assert check_rows(model, lambda: model(x)) == ["0", "2"]


def test_an_argument_by_name() -> None:
    model, x = nn.Linear(4, 2).double(), draw(3, 4)
    assert check_rows(model, lambda: model(input=x)) == [""]


def test_an_input_changed_afterwards_is_noticed() -> None:
    model, x = nn.Linear(4, 2), torch.randn(3, 4)
    tape = tape_of(model)
    model(x)
    x += 1
    (call,) = tape.take()
    assert not call.is_sound


@pytest.mark.parametrize("kind", ["twice", "sequence"])
def test_checkpointed_layers_are_recorded_once(kind: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4)).double()
    shape = (3, 4) if kind == "twice" else (3, 2, 4)
    x = draw(*shape)

    def run() -> Tensor:
        hidden = checkpoint(model, x, use_reentrant=False)
        assert isinstance(hidden, Tensor)
        return hidden

    assert check_rows(model, run) == ["0", "2"]
    tape = tape_of(model)
    loss = run().sum()
    assert len(tape.calls) == 2
    loss.backward()
    assert len(tape.calls) == 2
    tape.close()


def test_what_is_not_recorded() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), attention().float()), torch.randn(3, 4)
    on = [True]
    tape = tape_of(model[0], lambda: on[0])
    with torch.no_grad():
        model[0](x)
    with torch.inference_mode():
        model[0](x)
    with marked():
        model[0](x)
    assert not tape.calls
    on[0] = False
    model[0](x)
    assert not tape.calls
    on[0] = True
    model[0].requires_grad_(False)
    model[0](x)  # nothing to send a gradient to
    assert not tape.calls
    model[0].requires_grad_(True)
    model[0](x)
    assert len(tape.take()) == 1
    assert not tape.take()


def test_extra_passes() -> None:
    model, x = nn.Linear(4, 4), torch.randn(3, 4)
    tape = tape_of(model, lambda: False)
    model(x)
    tape.open()
    model(x)
    assert not tape.calls
    with marked():
        model(x)
    assert len(tape.calls) == 1
    tape.shut()
    assert not tape.calls
    with marked():
        model(x)
    assert not tape.calls


def test_outputs_are_not_touched() -> None:
    """Hooks of others get what they always did, and nobody sees more than the same numbers."""
    model, x = nn.Linear(4, 4), torch.randn(3, 2, 4)
    seen: list[Tensor] = []
    model.register_forward_hook(lambda m, a, y: seen.append(y))
    expected = model(x)
    tape = tape_of(model)
    found = model(x)
    assert torch.equal(found, expected)
    assert seen[1] is found
    (call,) = tape.take()
    assert call.edge.node is found.grad_fn


def test_closing_removes_all_hooks() -> None:
    model = nn.ModuleList([nn.Linear(4, 4), attention()])
    tape = tape_of(model)
    tape.close()
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            assert not hooks
        assert not module._forward_hooks_with_kwargs
        assert not module._forward_hooks_always_called


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_of_a_watched_model_are_not_watched(how: str) -> None:
    model = nn.ModuleList([nn.Linear(4, 4).double(), attention()])
    tape = tape_of(model)
    if how == "deepcopy":
        clone = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        clone = torch.load(file, weights_only=False)
    x = draw(3, 4)
    clone[1](*[clone[0](x)] * 3)
    assert not tape.calls
    model[1](*[model[0](x)] * 3)
    assert len(tape.calls) == 5
    tape.close()


# Attention

ROLES = ["q_proj", "k_proj", "v_proj", "out_proj"]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}, {"add_zero_attn": True}])
def test_self_attention(batch_first: bool, bias: bool, options: dict[str, bool]) -> None:
    layer = attention(batch_first=batch_first, bias=bias, **options)
    x = draw(3, 5, 4)
    assert check_rows(layer, lambda: layer(x, x, x)[0]) == [f".{role}" for role in ROLES]


@pytest.mark.parametrize("sizes", [{}, {"kdim": 3, "vdim": 5}])
@pytest.mark.parametrize("batch_first", [True, False])
def test_cross_attention(sizes: dict[str, int], batch_first: bool) -> None:
    layer = attention(batch_first=batch_first, **sizes)
    shapes = [(3, 2), (3, 6), (3, 6)] if batch_first else [(2, 3), (6, 3), (6, 3)]
    q, k, v = (
        draw(*shape, size) for shape, size in zip(shapes, (4, layer.kdim, layer.vdim), strict=True)
    )
    check_rows(layer, lambda: layer(q, k, v, need_weights=False)[0])
    tape = tape_of(layer)
    layer(query=q, key=k, value=v)
    axes = [call.given.movedim(call.batch_axis, 0).shape[0] for call in tape.calls]
    assert axes == [3] * 4
    tape.close()


def test_attention_without_a_batch() -> None:
    layer, x = attention(), draw(5, 4)
    check_rows(layer, lambda: layer(x, x, x)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("cross", [True, False])
def test_recording_changes_no_number(dtype: torch.dtype, need_weights: bool, cross: bool) -> None:
    layer = nn.MultiheadAttention(32, 4, dropout=0.3, batch_first=True)
    with torch.no_grad():
        layer.in_proj_bias.normal_()
        layer.out_proj.bias.normal_()
    layer = layer.to(dtype)
    x = torch.randn(3, 7, 32).to(dtype)
    other = torch.randn(3, 5, 32).to(dtype) if cross else x
    mask = torch.zeros(3, other.shape[1]).bool()
    mask[0, -2:] = True

    def run() -> tuple[Tensor, Tensor | None]:
        torch.manual_seed(3)
        found = layer(x, other, other, key_padding_mask=mask, need_weights=need_weights)
        assert isinstance(found, tuple)
        return found

    expected = run()
    tape = tape_of(layer)
    found = run()
    assert len(tape.take()) == 4
    tape.close()
    assert torch.equal(found[0], expected[0])
    assert (found[1] is None) == (expected[1] is None)
    if found[1] is not None and expected[1] is not None:
        assert torch.equal(found[1], expected[1])


def test_an_error_leaves_no_mode_behind() -> None:
    layer, x = attention(), draw(5, 3, 4)
    tape = tape_of(layer)
    with pytest.raises((AssertionError, RuntimeError)):
        layer(draw(5, 3, 3), x, x)
    assert _get_current_function_mode() is None
    tape.take()
    layer(x, x, x)
    assert len(tape.take()) == 4
    assert _get_current_function_mode() is None


def test_an_error_in_a_hook_leaves_no_mode_behind() -> None:
    layer, x = attention(), draw(5, 3, 4)
    tape = tape_of(layer)

    def fail(module: nn.Module, args: Any) -> None:
        raise KeyError("mine")

    handle = layer.register_forward_pre_hook(fail)
    with pytest.raises(KeyError):
        layer(x, x, x)
    assert _get_current_function_mode() is None
    handle.remove()
    layer(x, x, x)
    assert len(tape.take()) == 4


def test_nested_encoders() -> None:
    """Attention inside of torch's own encoder, in training."""
    model = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True).double()
    x = draw(3, 5, 4)
    names = check_rows(model, lambda: model(x))
    blocks = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"]
    assert set(names) == {*blocks, "linear1", "linear2", "norm1", "norm2"}


def test_attention_used_in_a_checkpoint() -> None:
    layer, x = attention(batch_first=True), draw(3, 5, 4)

    def run() -> Tensor:
        found = checkpoint(lambda y: layer(y, y, y)[0], x, use_reentrant=False)
        assert isinstance(found, Tensor)
        return found

    assert len(check_rows(layer, run)) == 4
    # Whoever decides not to record between a forward and its backward, or in one of them only.
    on = [True]
    tape = tape_of(layer, lambda: on[0])
    for forward, backward in ((True, False), (False, True), (False, False)):
        on[0] = forward
        loss = run().sum()
        assert len(tape.take()) == 4 * forward
        on[0] = backward
        loss.backward(retain_graph=True)
        with marked():
            loss.backward()
        assert not tape.calls
    assert _get_current_function_mode() is None
    tape.close()
