"""`LayerHooks`: which calls of a layer are reported, with what."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_curvature.curvature.statistics import LayerHooks
from lightning_curvature.oracle.extra_pass import Environment, extra_pass

D_IN, HIDDEN, D_OUT, BATCH = 3, 4, 2, 5


class Calls:
    """Collects what is reported."""

    def __init__(self, module: nn.Module, **options: Any) -> None:
        self.seen: list[tuple[str, Tensor, Tensor]] = []
        self.hooks = LayerHooks(module, self.visit, **options)

    def visit(self, name: str, layer: nn.Module, given: Tensor, grad: Tensor) -> None:
        assert not torch.is_grad_enabled()
        assert not given.requires_grad
        assert self.hooks.layers[name] is layer
        self.seen.append((name, given.clone(), grad.clone()))

    @property
    def names(self) -> list[str]:
        return [name for name, _, _ in self.seen]


def network(activation: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(D_IN, HIDDEN), activation or nn.Tanh(), nn.Linear(HIDDEN, D_OUT))


def batch(*leading: int) -> Tensor:
    return torch.randn(*(leading or (BATCH,)), D_IN, generator=torch.Generator().manual_seed(4))


def loss_of(output: Tensor) -> Tensor:
    return output.square().sum()


@pytest.mark.parametrize("leading", [(BATCH,), (2, 3), ()])
def test_inputs_and_output_gradients(leading: tuple[int, ...]) -> None:
    """Against gradients of the very tensors: bias gradients are their sums."""
    model = network()
    calls = Calls(model)
    x = batch(*leading)
    loss_of(model(x)).backward()
    assert calls.names == ["2", "0"]
    assert calls.hooks.silent() == []
    for name, given, grad in calls.seen:
        layer = calls.hooks.layers[name]
        rows = given.reshape(-1, given.shape[-1]), grad.reshape(-1, grad.shape[-1])
        torch.testing.assert_close(rows[1].T @ rows[0], layer.weight.grad)
        torch.testing.assert_close(rows[1].sum(0), layer.bias.grad)


class Unbatched(nn.Module):
    """Its convolution returns a view, which the activation writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, HIDDEN, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).relu_()


@pytest.mark.parametrize(
    ("make", "shape", "name"),
    [
        (lambda: network(nn.ReLU(inplace=True)), (BATCH, D_IN), "0"),
        (lambda: network(nn.ReLU(inplace=True)), (2, 3, D_IN), "0"),
        (Unbatched, (2, 5), "conv"),
    ],
)
def test_activation_in_place(
    make: Callable[[], nn.Module], shape: tuple[int, ...], name: str
) -> None:
    """The gradient is that of the output before it was overwritten."""
    model, x = make(), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    calls = Calls(model)
    loss_of(model(x)).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    (grad,) = [grad for n, _, grad in calls.seen if n == name]
    channels = 0 if name == "conv" else -1
    rest = [axis for axis in range(grad.ndim) if axis != channels % grad.ndim]
    torch.testing.assert_close(grad.sum(rest), grads[f"{name}.bias"])
    # The hooks change nothing.
    calls.hooks.close()
    model.zero_grad()
    loss_of(model(x)).backward()
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, grads[n], rtol=0, atol=0)


def test_what_is_not_reported() -> None:
    model = network()
    calls = Calls(model)
    with torch.no_grad():
        model(batch())
    model.eval()
    model(batch())  # with a graph that nobody differentiates
    model.train()
    assert calls.seen == []
    assert calls.hooks.silent() == ["0", "2"]


def test_gradient_penalty_is_not_reported() -> None:
    model = network()
    calls = Calls(model)
    x = batch().requires_grad_()
    output = model(x)
    (grad,) = torch.autograd.grad(output.sum(), x, create_graph=True)
    assert calls.seen == []
    loss_of(output).backward(retain_graph=True)
    assert calls.names == ["2", "0"]
    grad.square().sum().backward()


def test_extra_passes_are_reported_only_when_asked_for() -> None:
    model = network()
    calls = Calls(model, enabled=lambda: not asked)
    environment = Environment.of(model, torch.device("cpu"))
    asked = False
    waiting = loss_of(model(batch()))

    def extra() -> None:
        with torch.enable_grad(), extra_pass(environment):
            torch.autograd.grad(loss_of(model(batch())), list(model.parameters()))

    extra()
    with extra_pass(environment):
        waiting.backward(retain_graph=True)  # labels sampled on the main graph, say
    assert calls.seen == []
    asked = True
    with calls.hooks.during_extra_pass():
        model(batch()).sum().backward()  # no extra pass
        extra()
    assert calls.names == ["2", "0"]
    asked = False
    waiting.backward()
    assert calls.names == ["2", "0", "2", "0"]


def test_enabled_is_asked_at_every_forward() -> None:
    model, answers = network(), iter([True, False, False, True])
    calls = Calls(model, enabled=lambda: next(answers))
    for _ in range(2):
        loss_of(model(batch())).backward()
    assert calls.names == ["0", "2"]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_block_is_reported_once(reentrant: bool) -> None:
    model = network()
    plain = Calls(model)
    loss_of(model(batch())).backward()
    plain.hooks.close()
    calls = Calls(model)
    x = batch().requires_grad_()
    loss_of(checkpoint(model, x, use_reentrant=reentrant)).backward()
    assert calls.names == plain.names
    for one, two in zip(calls.seen, plain.seen, strict=True):
        torch.testing.assert_close(one[1:], two[1:])


class Shared(nn.Module):
    """One layer used twice, and known by two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(D_IN, D_IN)
        self.again = self.first
        self.unused = nn.Linear(D_IN, D_IN)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(input=self.first(x).tanh())


def test_shared_layer() -> None:
    model = Shared()
    calls = Calls(model)
    assert list(calls.hooks.layers) == ["first", "unused"]
    loss_of(model(batch())).backward()
    assert calls.names == ["first", "first"]
    total = sum(grad.T @ given for _, given, grad in calls.seen)
    torch.testing.assert_close(total, model.first.weight.grad)
    assert calls.hooks.silent() == ["unused"]


def test_attention_projection_is_silent() -> None:
    model = nn.MultiheadAttention(4, 2, batch_first=True)
    calls = Calls(model)
    x = torch.randn(2, 3, 4)
    loss_of(model(x, x, x)[0]).backward()
    assert calls.hooks.silent() == ["out_proj"]


class Residual(nn.Module):
    """Overwrites what went into a layer whose weight is frozen, which autograd allows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D_IN, D_IN)
        self.layer.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x * 2
        output = self.layer(hidden)
        hidden += 1
        return output + hidden


def test_overwritten_input_is_not_reported() -> None:
    model = Residual()
    calls = Calls(model)
    loss_of(model(batch())).backward()
    assert calls.hooks.silent() == ["layer"]


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_not_watched(how: Callable[[nn.Module], nn.Module]) -> None:
    model = network()
    calls = Calls(model)
    loss_of(how(model)(batch())).backward()
    assert calls.seen == []
    loss_of(model(batch())).backward()
    assert calls.names == ["2", "0"]


def test_close() -> None:
    model = network()
    calls = Calls(model)
    waiting = loss_of(model(batch()))
    calls.hooks.close()
    waiting.backward()
    loss_of(model(batch())).backward()
    assert calls.seen == []
    assert not any(layer._forward_hooks for layer in model)


def test_select_and_kinds() -> None:
    model = nn.Sequential(network(), nn.BatchNorm1d(D_OUT), nn.LayerNorm(D_OUT))
    assert list(Calls(model, kinds=(nn.LayerNorm,)).hooks.layers) == ["2"]
    chosen = Calls(model, select=lambda name, layer: "." in name).hooks.layers
    assert list(chosen) == ["0.0", "0.2"]


def test_compiled_region_is_left_alone() -> None:
    model = network()
    calls = Calls(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    expected = model(batch())
    calls.seen.clear()
    torch.testing.assert_close(compiled(batch()), expected)
    loss_of(compiled(batch())).backward()
    assert calls.seen == []
