"""The contract of every optimizer of lightning_curvature/registry.py: memory and the device."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_curvature.curvature import gradient_window, kronecker
from lightning_curvature.optim import kfac_step
from lightning_curvature.optim.diagonal import DiagonalOptimizer
from lightning_curvature.optim.displaced import DisplacedOptimizer
from tests.helpers.optimizer_db import Contract, every_optimizer, state_tensors
from tests.helpers.plain_loop import Loop, classification, network


class Reads(TorchDispatchMode):
    """Counts the operators that wait for the device: they give Python a number or a shape."""

    NAMES = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name.startswith(self.NAMES) or (name == "index" and _has_mask(args)):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def _has_mask(args: Any) -> bool:
    return any(isinstance(i, Tensor) and i.dtype is torch.bool for i in args[1])


class Copies(TorchFunctionMode):
    """Counts the methods that copy a tensor to the host without an operator of their own."""

    NAMES = ("tolist", "numpy", "cpu", "__array__")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self.NAMES:
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


def reads_of(loop: Loop) -> list[str]:
    """Take the step that was prepared and list what was read from the device."""
    with Reads() as reads, Copies() as copies:
        loop.optimizer.step()
    return reads.found + copies.found


SYNC_OPTIONS: list[dict[str, Any]] = [
    {},
    {"curvature": "hessian"},
    {"damping_algorithm": "decreasing-loss", "quad_model": "derived"},
    {
        "grad_clip_norm": 1.0,
        "direction_clip": 1.0,
        "update_clip_norm": 1.0,
        "weight_decay": 0.1,
        "lr_ema": 0.5,
        "curvature_ema": 0.5,
        "maximize": True,
        "foreach": False,
    },
    {"weight_decay": 0.1, "decoupled_weight_decay": False, "curvature_update_interval": 2},
]


@pytest.fixture
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, where that costs nothing, they look at the gradient and at what they found."""
    monkeypatch.setattr(DiagonalOptimizer, "_can_look", lambda *_: False)
    monkeypatch.setattr(DisplacedOptimizer, "_can_look", lambda *_: False)
    monkeypatch.setattr(kronecker, "_can_look", lambda *_: False)
    monkeypatch.setattr(gradient_window, "_can_look", lambda *_: False)
    monkeypatch.setattr(kfac_step, "_is_known", lambda *_: False)


@every_optimizer
@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize("options", SYNC_OPTIONS)
@pytest.mark.parametrize("directional", ["jvp", "fd"])
def test_a_step_does_not_wait_for_the_device(
    contract: Contract, options: dict[str, Any], directional: str
) -> None:
    if not contract.accepts(**options):
        pytest.skip("arguments of another optimizer")
    dtype = torch.float32
    make = contract.making(**options, **contract.quiet)
    own = {} if "lr" in contract.make([torch.ones(1)]).shared else {"lr": 0.5}
    groups = lambda model: [  # noqa: E731
        {"params": model[0].parameters(), **own},
        {"params": model[2].parameters()},
    ]
    loop = Loop(network(dtype=dtype), make, directional=directional, groups=groups)
    reads = []
    for x, y in classification(6, dtype=dtype):
        loop.backward(x, y)
        reads.append(reads_of(loop))
    # The self-check reads at the first ask, so this also proves that reading is noticed.
    if "directional" in contract.info.asks:
        assert reads[0]
    assert contract.info.asks or not reads[0]
    assert reads[1:] == [[]] * 5


@every_optimizer
@pytest.mark.usefixtures("as_on_a_device")
def test_reading_steps_come_at_the_announced_interval(contract: Contract) -> None:
    """The self-check reads every 50th ask."""
    if "directional" not in contract.info.asks:
        pytest.skip("checks nothing")
    loop = Loop(network(), contract.making(**contract.quiet))
    (x, y), *_ = classification(1)
    reading = []
    for step in range(1, 103):
        loop.backward(x, y)
        if reads_of(loop):
            reading.append(step)
    assert reading == [1, 50, 100]


@every_optimizer
def test_no_leak(contract: Contract) -> None:
    """The number of live tensors is flat over 50 steps, and no batch outlives its step."""
    loop = Loop(network(), contract.making(**contract.known({"num_samples": 1})))
    (x, y), *_ = classification(1)

    def live() -> int:
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    counts = []
    for step in range(50):
        batch = x.clone()
        loop.step(batch, y)
        forgotten = weakref.ref(batch)
        del batch
        loop.optimizer.zero_grad()
        if step in (9, 29, 48):  # the 50th reads the self-check, which then holds one tensor less
            counts.append(live())
            assert forgotten() is None
    assert counts[0] == counts[1] == counts[2]


@every_optimizer
def test_gradients_keep_no_graph(contract: Contract) -> None:
    loop = Loop(network(), contract.make)
    loop.train(classification(2))
    tensors = [*state_tensors(loop.optimizer).values(), *loop.optimizer.stats.values()]
    assert not any(tensor.requires_grad for tensor in tensors)
    assert all(p.is_leaf for p in loop.model.parameters())
    grads = [p.grad for p in loop.model.parameters()]
    assert all((grad is None) == contract.forward_only for grad in grads)
    assert not any(grad is not None and grad.grad_fn is not None for grad in grads)
