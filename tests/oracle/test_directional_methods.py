"""Finite differences, forward mode and what they leave behind (oracle/window.py, plain.py)."""

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import _len_torch_function_stack
from torch.utils.checkpoint import checkpoint

from lightning_curvature import in_extra_pass
from tests.helpers.dense import build, flatten, mlp
from tests.helpers.losses import inputs, labels
from tests.helpers.modules import ConvNet, Transformer, images, sequences, token_loss
from tests.helpers.probing import Probe, assert_bitwise, parameters_and_buffers

METHODS = ("fd", "jvp")
WITHIN = 0.01  # finite differences in float32 against forward mode
SEED = 6

Task = tuple[nn.Module, Callable[[Tensor, Tensor], Tensor], Tensor, Tensor]


def _mlp_task() -> Task:
    generator = torch.Generator().manual_seed(41)
    x = torch.randn(64, 20, generator=generator)
    y = torch.randint(5, (64,), generator=generator)
    network = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
    return nn.Sequential(network, nn.Linear(32, 5)), F.cross_entropy, x, y


def _conv_task() -> Task:
    return ConvNet(), F.cross_entropy, *images(32).tensors


def _transformer_task() -> Task:
    return Transformer(), token_loss, *sequences(16).tensors


TASKS = {"mlp": _mlp_task, "conv-norm-dropout": _conv_task, "transformer": _transformer_task}


def trained(task: str, dtype: torch.dtype = torch.float32) -> tuple[Task, list[Tensor]]:
    """Train a task for ten Adam steps and return it with Adam's next direction."""
    torch.manual_seed(SEED)
    model, loss_fn, x, y = TASKS[task]()
    adam = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(10):
        adam.zero_grad()
        loss_fn(model(x), y).backward()
        adam.step()
    direction = [
        (adam.state[p]["exp_avg"] / (adam.state[p]["exp_avg_sq"].sqrt() + 1e-8)).to(dtype)
        for p in model.parameters()
    ]
    x = x.to(dtype) if x.is_floating_point() else x
    return (model.to(dtype), loss_fn, x, y), direction


def measure(
    task: Task, direction: list[Tensor], method: str, curvature: str = "fisher"
) -> tuple[float, float, float]:
    """Return measured slope, slope from the gradient, and curvature."""
    model, loss_fn, x, y = task
    model = copy.deepcopy(model)
    optimizer = Probe(model.parameters())
    criterion = optimizer.attach_model(model, loss_fn, directional=method)
    optimizer.zero_grad()
    torch.manual_seed(SEED)
    criterion(model(x), y).backward()
    expected = sum((p.grad * d).sum() for p, d in zip(model.parameters(), direction, strict=True))
    answer = optimizer.oracle.directional(direction, grad_slope=expected, curvature=curvature)
    assert optimizer.oracle.method == method
    return answer.slope.item(), expected.item(), answer.curvature.item()


@pytest.mark.parametrize("name", TASKS)
def test_finite_differences_against_forward_mode(name: str) -> None:
    """Within one percent in float32, slope and curvature, along Adam's direction."""
    task, direction = trained(name)
    slope, expected, curvature = measure(task, direction, "fd")
    slope_jvp, expected_jvp, curvature_jvp = measure(task, direction, "jvp")
    assert expected == expected_jvp
    assert slope_jvp == pytest.approx(expected, rel=1e-5)
    assert slope == pytest.approx(expected, rel=WITHIN)
    assert curvature == pytest.approx(curvature_jvp, rel=WITHIN)
    assert curvature_jvp > 0


@pytest.mark.parametrize("name", TASKS)
def test_forward_mode_in_float32_against_float64(name: str) -> None:
    """Forward mode loses nothing to finite differences: float32 agrees to single precision."""
    task, direction = trained(name)
    model, loss_fn, x, y = task
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    _, _, single = measure(task, direction, "jvp")
    x = x.double() if x.is_floating_point() else x
    wide = (copy.deepcopy(model).double(), loss_fn, x, y)
    _, _, double = measure(wide, [d.double() for d in direction], "jvp")
    assert single == pytest.approx(double, rel=1e-5)


@pytest.mark.parametrize("name", TASKS)
def test_self_check_to_machine_precision(name: str) -> None:
    """|<g, d> - slope| <= 1e-12 |<g, d>| in float64 with dropout and batch norm."""
    task, direction = trained(name, torch.float64)
    slope, expected, _ = measure(task, direction, "jvp")
    assert abs(slope - expected) <= 1e-12 * abs(expected)
    slope, expected, _ = measure(task, direction, "fd")
    assert abs(slope - expected) <= 1e-4 * abs(expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_quadratic_in_the_direction(method: str, scale: float) -> None:
    """The length of the direction is irrelevant to the accuracy of finite differences."""
    task, direction = trained("mlp")
    slope, _, curvature = measure(task, direction, method)
    scaled = [scale * d for d in direction]
    slope_scaled, _, curvature_scaled = measure(task, scaled, method)
    assert slope_scaled == pytest.approx(scale * slope, rel=1e-3)
    assert curvature_scaled == pytest.approx(scale**2 * curvature, rel=1e-3)


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


class Rounding(nn.Module):
    """Quantizer with a straight-through gradient: finite differences see a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of rounded activations."""
        hidden = 50 * self.first(x)
        return self.out((hidden + (hidden.round() - hidden).detach()) / 50)


class Reentrant(nn.Module):
    """Reentrant checkpoint: forward mode silently loses its tangent."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(5, 8), nn.Tanh())
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        hidden = checkpoint(self.inner, x.requires_grad_(), use_reentrant=True)
        return self.out(hidden)


def _only_first(model: nn.Module) -> list[Tensor]:
    """Return a direction in the first layer, where the silent failure sits."""
    first = getattr(model, "first", None) or model.inner
    moved = {id(p) for p in first.parameters()}
    return [p.grad.clone() if id(p) in moved else torch.zeros_like(p) for p in model.parameters()]


def test_self_check_finds_straight_through_estimators() -> None:
    """Finite differences give zero; the self-check notices and goes on in forward mode."""
    torch.manual_seed(SEED)
    model = Rounding().double()
    optimizer = Probe(model.parameters())
    criterion = optimizer.attach_model(model, F.cross_entropy)
    criterion(model(inputs()), labels()).backward()
    direction = _only_first(model)
    expected = sum((p.grad * d).sum() for p, d in zip(model.parameters(), direction, strict=True))
    with pytest.warns(RuntimeWarning, match="[Ss]elf-check.*'jvp'"):
        answer = optimizer.oracle.directional(direction, grad_slope=expected)
    assert optimizer.oracle.method == "jvp"
    assert answer.slope.item() == pytest.approx(expected.item(), rel=1e-12)


def test_self_check_finds_lost_tangents() -> None:
    """With forward mode asked for by name, a lost tangent is at least reported."""
    torch.manual_seed(SEED)
    model = Reentrant()
    optimizer = Probe(model.parameters())
    criterion = optimizer.attach_model(model, F.cross_entropy, directional="jvp")
    criterion(model(inputs(torch.float32)), labels()).backward()
    direction = _only_first(model)
    expected = sum((p.grad * d).sum() for p, d in zip(model.parameters(), direction, strict=True))
    with pytest.warns(RuntimeWarning, match="[Ss]elf-check"):
        optimizer.oracle.directional(direction, grad_slope=expected)


class NoForwardMode(nn.Module):
    """Weight norm, which has no forward-mode rule."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.weight_norm(nn.Linear(5, 8))
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.out(torch.tanh(self.first(x)))


def test_auto_falls_back_where_forward_mode_is_impossible() -> None:
    """Under autocast `auto` starts in forward mode; an operator without it ends in differences."""
    torch.manual_seed(SEED)
    model = NoForwardMode()
    optimizer = Probe(model.parameters())
    criterion = optimizer.attach_model(model, F.cross_entropy)
    before = parameters_and_buffers(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = criterion(model(inputs(torch.float32)), labels())
    loss.backward()
    with pytest.warns(RuntimeWarning, match="finite differences"):
        optimizer.oracle.directional(optimizer.direction(list(model.parameters())))
    assert optimizer.oracle.method == "fd"
    assert_bitwise(parameters_and_buffers(model), before)


@pytest.mark.parametrize("share", [0.01, 10.0])
def test_warns_when_much_of_the_loss_has_no_curvature(share: float, recwarn: Any) -> None:
    """A large penalty outside the captured losses is reported once, a small one never."""
    model = mlp()

    def objective(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y) + share * z.square().mean()

    optimizer = Probe(model.parameters(), passes=["directional", "directional"])
    criterion = optimizer.attach_model(model, objective)
    for _ in range(3):
        optimizer.zero_grad()
        criterion(model(inputs(torch.float32)), labels()).backward()
        optimizer.step()
    about = [w for w in recwarn if "does not come from a captured loss" in str(w.message)]
    assert len(about) == (1 if share > 1 else 0)


def test_autocast_region_of_a_plain_loop() -> None:
    """Autocast caches cast weights; the probe must not see the old ones (error of 100 %)."""
    torch.manual_seed(SEED)
    model = nn.Sequential(nn.Linear(5, 32), nn.Tanh(), nn.Linear(32, 4))
    optimizer = Probe(model.parameters())
    criterion = optimizer.attach_model(model, F.cross_entropy, directional="jvp")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = criterion(model(inputs(torch.float32)), labels())
        loss.backward()
        direction = optimizer.direction(list(model.parameters()))
        slope = optimizer.oracle.directional(direction).slope.item()
        base = optimizer.oracle.base_loss().item()
        with torch.no_grad():
            for param, piece in zip(model.parameters(), direction, strict=True):
                param.sub_(0.05 * piece)
        changed = optimizer.oracle.loss().item()
    expected = flatten([p.grad for p in model.parameters()]) @ flatten(direction)
    assert slope == pytest.approx(expected.item(), rel=0.05)
    assert changed - base == pytest.approx(-0.05 * slope, rel=0.5)
