"""The contract of every optimizer of lightning_curvature/registry.py: states from another device.

Where there is no accelerator, the "meta" device stands for one: its tensors have dtype and shape
but no numbers. (`FakeTensorMode` would pretend a GPU, but lets scalars of the CPU into lists.)
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_curvature.curvature.perturbation import Directions
from lightning_curvature.optim import displaced
from lightning_curvature.oracle import Oracle
from lightning_curvature.oracle.protocol import Directional, Quadratic
from tests.helpers.optimizer_db import (
    RICH,
    Contract,
    every_optimizer,
    identical,
    state_tensors,
)
from tests.helpers.plain_loop import Loop, classification, network
from tests.helpers.resuming import tensors_in

STEPS = 4
# Options that move other numbers of the state, besides the defaults.
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "rich": RICH,
    "clipped": {"grad_clip_norm": 1.0, "update_clip_norm": 1.0, "damping_algorithm": "fixed"},
    "undoing": {"damping_algorithm": "decreasing-loss", "quad_model": "derived"},
}
options = pytest.mark.parametrize("chosen", list(OPTIONS))


def accelerators() -> list[str]:
    """List the devices of this machine other than the CPU."""
    return [
        device
        for device, module in (("cuda", torch.cuda), ("mps", torch.mps), ("xpu", torch.xpu))
        if module.is_available()
    ]


class Strays(TorchDispatchMode):
    """Lists the operators that get a tensor of the CPU, other than to move it.

    A GPU takes a scalar of the CPU in arithmetic but not in a list, and neither belongs there. What
    is read from the meta device is zero.
    """

    MOVES = ("_to_copy", "lift_fresh", "detach", "alias")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in self.MOVES and any(t.device.type == "cpu" for t in tensors_in(args)):
            self.found.append(name)
        kwargs = kwargs or {}
        if name == "_to_copy" and kwargs.get("device") == torch.device("cpu"):
            return torch.zeros_like(args[0], **kwargs)
        return func(*args, **kwargs)


class Constant(Oracle):
    """Answers the same to everything, on a device.

    Args:
        device: The device.
        module: Module on it.
    """

    capabilities = frozenset(
        {"loss", "directional", "hvp", "sampled", "layers", "forward", "slope"}
    )
    ready = True

    def __init__(self, device: str, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._one = torch.ones((), device=device)
        self._params: list[Tensor] = []

    def evaluate(self, closure: Callable[[], Any]) -> Any:
        return closure()

    def base_loss(self) -> Tensor:
        return self._one

    def loss(self) -> Tensor:
        return 0.5 * self._one

    def local_loss(self, *, main: bool = False) -> Tensor:
        return self._one.double()

    def local_slope(self, direction: Sequence[Tensor], params: Sequence[Tensor]) -> Tensor:
        return self._one

    def directional(self, direction: Sequence[Tensor], **kwargs: Any) -> Directional:
        return Directional(self._one, self._one)

    def quadratic(self, directions: Sequence[Sequence[Tensor]], **kwargs: Any) -> Quadratic:
        count = len(directions)
        return Quadratic(self._one.expand(count), torch.eye(count, device=self._one.device))

    def see_layers(self) -> None:
        pass

    def hvp(self, directions: Sequence[Tensor], **kwargs: Any) -> list[Tensor]:
        return [direction.clone() for direction in directions]

    def products(self) -> list[tuple[list[Tensor], list[Tensor]]]:
        return [([torch.ones_like(p) for p in self._params],) * 2]

    def sampled_squares(self) -> list[Tensor]:
        return [torch.ones_like(p) for p in self._params]

    def gradient(self) -> list[Tensor]:
        return [torch.ones_like(p) for p in self._params]

    def mean_vectors(self, *vectors: Sequence[Tensor]) -> list[list[Tensor]]:
        return [list(vector) for vector in vectors]

    def mean_(self, packed: Tensor) -> Tensor:
        return packed

    def grad_slope(self, slope: Tensor) -> Tensor:
        return slope

    def select(self, params: Sequence[Tensor]) -> None:
        self._params = list(params)


def trained_on_cpu(contract: Contract, chosen: str, dtype: torch.dtype) -> Loop:
    """Train for some steps, so that there is a state."""
    few = contract.known({"num_samples": 2})
    given = {**contract.known(OPTIONS[chosen]), **contract.quiet, **few}
    loop = Loop(network(dtype=dtype), contract.making(**given), directional="auto")
    loop.train(classification(STEPS, dtype=dtype))
    return loop


def elsewhere(tensors: dict[str, Tensor], device: str) -> dict[str, str]:
    """Return the devices of those tensors that are on another one."""
    return {name: t.device.type for name, t in tensors.items() if t.device.type != device}


def test_strays_are_noticed() -> None:
    """What the test below rests on."""
    there, here = torch.ones((), device="meta"), torch.ones(())
    with Strays() as strays:
        there + there.new_tensor(2.0) + torch.tensor(3.0, device="meta") + here.to("meta")
        assert strays.found == []
        there + here
        with pytest.raises(RuntimeError, match="device"):
            torch.stack([there, here])
        assert torch.stack([there]).tolist() == [0.0]
    assert strays.found == ["add", "stack"]


@pytest.fixture
def without_generators(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device has none."""
    ones = lambda *args: torch.ones_like(args[0].params[args[3]])  # noqa: E731
    monkeypatch.setattr(Directions, "_stream", ones)
    monkeypatch.setattr(displaced, "stream", lambda *_: None)


@every_optimizer
@options
@pytest.mark.usefixtures("without_generators")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.feature("Resume", "saved on the CPU, resumed elsewhere (meta device)")
def test_load_on_the_meta_device_and_step(
    contract: Contract, chosen: str, dtype: torch.dtype
) -> None:
    if chosen != "defaults" and not contract.known(OPTIONS[chosen]):
        pytest.skip("has none of these arguments")
    loop = trained_on_cpu(contract, chosen, dtype)
    before = copy.deepcopy(loop.optimizer.state_dict())
    there = network(dtype=dtype).to("meta")
    optimizer = contract.make(there.parameters())
    optimizer.load_state_dict(before)
    moved, saved = state_tensors(optimizer), state_tensors(loop.optimizer)
    assert {n: t.dtype for n, t in moved.items()} == {n: t.dtype for n, t in saved.items()}
    assert elsewhere(moved, "meta") == {}
    if contract.info.asks:
        optimizer.attach(Constant("meta", there))
    with Strays() as strays:
        for _ in range(2 * STEPS):
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = torch.zeros_like(p)
            optimizer.step()
    assert strays.found == []
    assert elsewhere({**state_tensors(optimizer), **optimizer.stats}, "meta") == {}
    assert identical(before, loop.optimizer.state_dict()), "loading changed what was saved"


@every_optimizer
@options
@pytest.mark.feature("Resume", "saved on the CPU, resumed on an accelerator, and back")
def test_load_on_another_device_and_step(contract: Contract, chosen: str) -> None:
    found = accelerators()
    if not found:
        pytest.skip("no accelerator")
    dtype = torch.float32
    batches = classification(STEPS, seed=8, dtype=dtype)
    for device in found:
        here = trained_on_cpu(contract, chosen, dtype)
        there = Loop(network(seed=99, dtype=dtype).to(device), contract.make, directional="auto")
        there.model.load_state_dict(here.model.state_dict())
        there.optimizer.load_state_dict(copy.deepcopy(here.optimizer.state_dict()))
        moved = state_tensors(there.optimizer)
        assert {tensor.device.type for tensor in moved.values()} == {device}
        for name, tensor in state_tensors(here.optimizer).items():
            assert moved[name].dtype is tensor.dtype, name
            assert torch.equal(moved[name].cpu(), tensor), name
        here.train(batches)
        there.train([(x.to(device), y.to(device)) for x, y in batches])
        torch.testing.assert_close(there.theta().cpu(), here.theta(), rtol=1e-3, atol=1e-4)
        # And back: what an accelerator saved, the CPU reads with torch.load(map_location="cpu").
        back = Loop(network(seed=98, dtype=dtype), contract.make, directional="auto")
        back.optimizer.load_state_dict(there.optimizer.state_dict())
        assert {t.device.type for t in state_tensors(back.optimizer).values()} == {"cpu"}
        back.train(batches)
