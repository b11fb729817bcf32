"""Questions in plain PyTorch leave no trace, even after failures (oracle/extra_pass.py)."""

import copy
import gc
import random
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import _len_torch_function_stack

from lightning_curvature import in_extra_pass
from lightning_curvature.oracle import MissingCapabilityError
from tests.helpers.dense import build, mlp
from tests.helpers.losses import inputs, labels
from tests.helpers.probing import Probe, assert_bitwise, parameters_and_buffers

METHODS = ("fd", "jvp")
WITHIN = 0.01
SEED = 6


def draw_from_all_streams() -> None:
    """Move all random streams on, so that replaying the main pass does not end where they are."""
    random.random()
    np.random.rand()  # noqa: NPY002
    torch.rand(())


def recorded(
    method: str, name: str = "batch-norm-dropout", dtype: torch.dtype = torch.float32
) -> Any:
    """Return a model, its optimizer after one main pass with backward, and a direction."""
    model = build(name, dtype)
    optimizer = Probe(model.parameters())
    criterion = optimizer.attach_model(model, F.cross_entropy, directional=method)
    torch.manual_seed(SEED)
    criterion(model(inputs(dtype)), labels()).backward()
    draw_from_all_streams()
    return model, optimizer, optimizer.direction(list(model.parameters()))


def world(model: nn.Module) -> dict[str, Any]:
    """Describe everything an extra pass must leave alone."""
    slots = {
        f"{path}.{name}": (id(tensor), type(tensor), tensor.data_ptr(), tensor.requires_grad)
        for path, module in model.named_modules(remove_duplicate=False)
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]
        if tensor is not None
    }
    return {
        "slots": slots,
        "training": [module.training for module in model.modules()],
        "python": random.getstate(),
        "numpy": [str(part) for part in np.random.get_state()],  # noqa: NPY002
        "torch": torch.get_rng_state().tolist(),
        "stack": _len_torch_function_stack(),
        "grad mode": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
        "attributes": sorted(vars(model)),
    }


QUESTIONS: dict[str, Callable[[Any, list[Tensor]], Any]] = {
    "directional": lambda oracle, d: oracle.directional(d),
    "hessian": lambda oracle, d: oracle.directional(d, curvature="hessian"),
    "hvp": lambda oracle, d: oracle.hvp(d),
    "loss": lambda oracle, d: oracle.loss(),
}


@pytest.mark.parametrize("name", ["batch-norm-dropout", "tied", "aliased"])
@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("method", METHODS)
def test_question_leaves_no_trace(question: str, method: str, name: str) -> None:
    """Parameters, buffers, gradients and random streams are bitwise as before."""
    model, optimizer, direction = recorded(method, name)
    tensors, surroundings = parameters_and_buffers(model), world(model)
    gradients = {name: param.grad.clone() for name, param in model.named_parameters()}
    answers = [QUESTIONS[question](optimizer.oracle, direction) for _ in range(2)]
    assert_bitwise(parameters_and_buffers(model), tensors)
    assert world(model) == surroundings
    assert_bitwise({n: p.grad for n, p in model.named_parameters()}, gradients, "gradient of")
    first, second = (
        answer if isinstance(answer, (list, tuple)) else [answer] for answer in answers
    )
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two)
        assert not one.requires_grad


class Boom(Exception):
    """Something wrong in user code."""


class Fragile(nn.Module):
    """Model that can be told to fail in the middle of its forward, after it changed a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = build("batch-norm-dropout", torch.float32)
        self.fail = False

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, or raise."""
        logits = self.inner(x)
        random.random()
        if self.fail:
            raise Boom
        return logits


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("method", METHODS)
def test_exception_in_extra_pass_leaves_no_trace(question: str, method: str) -> None:
    """All is put back, in `finally`, and the next step works."""
    model = Fragile()
    optimizer = Probe(model.parameters(), passes=["directional", "loss"])
    criterion = optimizer.attach_model(model, F.cross_entropy, directional=method)
    criterion(model(inputs(torch.float32)), labels()).backward()
    draw_from_all_streams()
    direction = optimizer.direction(list(model.parameters()))
    tensors, surroundings = parameters_and_buffers(model), world(model)
    model.fail = True
    with pytest.raises(Boom):
        QUESTIONS[question](optimizer.oracle, direction)
    assert_bitwise(parameters_and_buffers(model), tensors)
    assert world(model) == surroundings
    assert not in_extra_pass()
    model.fail = False
    optimizer.step()
    assert optimizer.deviations[0] < WITHIN


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["linear", "batch-norm-dropout", "tied", "aliased"])
def test_loss_at_unchanged_parameters(name: str, method: str, dtype: torch.dtype) -> None:
    """`loss()` equals `base_loss()` bitwise, before and after other questions."""
    _, optimizer, direction = recorded(method, name, dtype)
    oracle = optimizer.oracle
    base = oracle.base_loss()
    assert torch.equal(oracle.loss(), base)
    oracle.directional(direction)
    assert torch.equal(oracle.loss(), base)
    assert torch.equal(oracle.base_loss(), base)


def test_loss_at_changed_parameters() -> None:
    """`loss()` uses present parameters with the masks of the main pass; `base_loss()` stays."""
    model, optimizer, direction = recorded("jvp", dtype=torch.float64)
    reference = build("batch-norm-dropout", torch.float64)
    torch.manual_seed(SEED)
    before = F.cross_entropy(reference(inputs()), labels())
    with torch.no_grad():
        for param, twin, piece in zip(
            model.parameters(), reference.parameters(), direction, strict=True
        ):
            param.sub_(0.1 * piece)
            twin.sub_(0.1 * piece)
    torch.manual_seed(SEED)
    after = F.cross_entropy(reference(inputs()), labels())
    assert after != before
    assert torch.equal(optimizer.oracle.base_loss(), before.detach())
    assert torch.equal(optimizer.oracle.loss(), after.detach())


def test_in_extra_pass_is_true_only_there() -> None:
    """User code can tell an extra pass from the main one."""
    seen: list[bool] = []
    model = mlp()
    model.register_forward_hook(lambda *_: seen.append(in_extra_pass()))
    optimizer = Probe(model.parameters(), passes=["directional", "loss", "hvp"])
    criterion = optimizer.attach_model(model, F.cross_entropy)
    criterion(model(inputs(torch.float32)), labels()).backward()
    optimizer.step()
    assert seen == [False, True, True, True]
    assert not in_extra_pass()


def test_nothing_is_recorded_when_nothing_will_be_asked() -> None:
    """Steps that ask nothing leave the oracle without a record."""
    model = mlp()
    optimizer = Probe(model.parameters(), passes=())
    criterion = optimizer.attach_model(model, F.cross_entropy)
    depths: list[int] = []
    model.register_forward_hook(lambda *_: depths.append(_len_torch_function_stack()))
    criterion(model(inputs(torch.float32)), labels()).backward()
    assert not optimizer.oracle.ready
    optimizer.step()
    assert depths == [0]


def test_forward_without_gradient_in_between() -> None:
    """A teacher or metric pass between forward and loss does not disturb the record."""
    model = build("batch-norm-dropout", torch.float64)
    optimizer = Probe(model.parameters(), passes=["directional", "loss"])
    criterion = optimizer.attach_model(model, F.cross_entropy, directional="jvp")
    with torch.no_grad():
        model(inputs())
    output = model(inputs())
    with torch.no_grad():
        model(inputs().flip(0))
    criterion(output, labels()).backward()
    optimizer.step()
    assert optimizer.deviations[0] <= 1e-12
    assert torch.equal(*optimizer.losses[0])


def test_model_can_be_copied_at_any_time() -> None:
    """A deep copy, as for weight averaging, neither fails nor records for the original."""
    model = mlp()
    optimizer = Probe(model.parameters(), passes=["directional", "loss"])
    criterion = optimizer.attach_model(model, F.cross_entropy)
    copies = [copy.deepcopy(model)]
    loss = criterion(model(inputs(torch.float32)), labels())
    copies.append(copy.deepcopy(model))
    for twin in copies:
        twin(inputs(torch.float32).flip(0)).sum().backward()
    loss.backward()
    optimizer.step()
    assert optimizer.deviations[0] < WITHIN
    assert torch.equal(*optimizer.losses[0])


def test_a_loss_that_is_only_looked_at_keeps_no_batch() -> None:
    """An evaluation without ``no_grad`` does not collect its batches, nor enter the next step."""
    models = [build("linear", torch.float64) for _ in range(2)]
    optimizers = [Probe(m.parameters(), passes=["directional", "loss"]) for m in models]
    criteria = [
        optimizer.attach_model(model, F.cross_entropy, directional="jvp")
        for model, optimizer in zip(models, optimizers, strict=True)
    ]
    batches = []
    for _ in range(3):
        batch = inputs().flip(0)
        batches.append(weakref.ref(batch))
        criteria[0](models[0](batch), labels())
    del batch
    for model, optimizer, criterion in zip(models, optimizers, criteria, strict=True):
        criterion(model(inputs()), labels()).backward()
        gc.collect()
        assert [batch() for batch in batches] == [None] * 3
        optimizer.step()
    assert optimizers[0].curvatures == optimizers[1].curvatures


def test_a_loss_from_before_the_step_is_not_taken_for_one_of_after() -> None:
    """Its gradient belongs to other weights: the step that finds it says so."""
    model = build("linear", torch.float64)
    optimizer = Probe(model.parameters(), passes=["directional"])
    criterion = optimizer.attach_model(model, F.cross_entropy, directional="jvp")
    late = criterion(model(inputs()), labels())
    late.backward(retain_graph=True)
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        for param in model.parameters():
            param.data = param.data.clone()
    late.backward()
    with pytest.raises(MissingCapabilityError, match="gradients without a recorded loss"):
        optimizer.step()
