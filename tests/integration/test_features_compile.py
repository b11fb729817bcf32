"""Every optimizer beside torch.compile; tests/test_compile.py compares what the oracle answers."""

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.families import every_family
from tests.helpers.features import BATCHES, Run, batched, prepare, quiet
from tests.helpers.modules import MakeOptimizer, StockModule
from tests.helpers.optimizer_db import Contract

pytestmark = quiet

EAGER = "aot_eager"


def title(name: str) -> Any:
    """Name a row of the compatibility table."""
    return pytest.mark.feature("Models", f"`torch.compile`: {name}")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Forget compiled graphs before and after."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def stock(make_optimizer: MakeOptimizer) -> StockModule:
    """Build a module; batch norm writes buffers inside the compiled graph."""
    network = nn.Sequential(
        nn.Linear(5, 12, bias=False), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 4)
    )
    return StockModule(network, make_optimizer)


def submodule(module: StockModule, backend: str) -> Any:
    """Compile the network as a wrapper around it."""
    module.network = torch.compile(module.network, backend=backend)
    return module


def submodule_in_place(module: StockModule, backend: str) -> Any:
    """Compile the network in place."""
    module.network.compile(backend=backend)
    return module


def training_step(module: StockModule, backend: str) -> Any:
    """Compile the training step alone, with the loss in the graph."""
    module.training_step = torch.compile(module.training_step, backend=backend, fullgraph=True)
    return module


def whole_module(module: StockModule, backend: str) -> Any:
    """Compile the LightningModule, which the Trainer takes apart again."""
    return torch.compile(module, backend=backend)


KINDS: dict[Callable[[StockModule, str], Any], str] = {
    submodule: "submodule",
    submodule_in_place: "submodule, `module.compile()`",
    training_step: "`training_step`",
    whole_module: "whole LightningModule",
}
every_kind = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=title(words), id=words) for kind, words in KINDS.items()]
)


def fit(contract: Contract, kind: Any, directional: str, backend: str, **settings: Any) -> Run:
    """Fit the module, compiled or not."""
    run = prepare(contract, stock, directional=directional, **settings)
    module = run.module if kind is None else kind(run.module, backend)
    run.trainer.fit(module, batched())
    assert run.steps == run.trainer.max_epochs * BATCHES
    return run


def assert_same_steps(run: Run, eager: Run) -> None:
    """Assert that two runs agree up to round-off."""
    for ours, theirs in zip(run.module.parameters(), eager.module.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-3)


@every_family
@every_kind
def test_compiled(contract: Contract, kind: Any) -> None:
    """The same steps as without, up to round-off."""
    eager = fit(contract, None, "auto", EAGER, max_epochs=2)
    run = fit(contract, kind, "auto", EAGER, max_epochs=2)
    assert_same_steps(run, eager)


@every_family
@pytest.mark.parametrize("kind", [submodule, training_step])
@title("in forward mode")
def test_compiled_in_forward_mode(contract: Contract, kind: Any) -> None:
    """Extra passes run the eager code."""
    eager = fit(contract, None, "jvp", EAGER, max_epochs=1)
    run = fit(contract, kind, "jvp", EAGER, max_epochs=1)
    assert_same_steps(run, eager)


@every_family
@title("nothing is compiled twice")
def test_the_number_of_graphs(contract: Contract) -> None:
    """Steps that ask nothing run the graph of those that ask."""
    graphs: list[int] = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(torch.is_grad_enabled())
        return graph.forward

    make = contract.making(**dict.fromkeys(contract.intervals, 2))
    run = prepare(contract, stock, make_optimizer=make, max_epochs=2)
    run.trainer.fit(submodule(run.module, counting), batched())
    # One with a graph for main passes, one without for extra passes.
    assert len(graphs) <= (2 if contract.info.asks else 1)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@every_family
@title("inductor")
def test_compiled_by_inductor(contract: Contract) -> None:
    """The default backend."""
    eager = fit(contract, None, "auto", EAGER, max_epochs=1)
    run = fit(contract, submodule, "auto", "inductor", max_epochs=1)
    assert_same_steps(run, eager)
