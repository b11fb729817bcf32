"""torch.compile and the oracle: capture around compiled code (oracle/capture.py, window.py)."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import seed_everything
from torch import Tensor, nn

from tests.helpers.modules import StockModule, loader, vectors
from tests.helpers.probing import Probe, make_trainer

BACKEND = "aot_eager"


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Forget compiled graphs before and after."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4))


class CompiledSubmodule(StockModule):
    """Compiles its network."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.fast = torch.compile(self.network, backend=BACKEND, fullgraph=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.fast(x)


class CompiledLoss(StockModule):
    """Compiles network and loss in one graph."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.fast = torch.compile(self._loss, backend=BACKEND, fullgraph=True)

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.network(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.fast(*batch)


def _answers(module_type: type[StockModule], directional: str) -> Probe:
    seed_everything(3)
    module = module_type(_network(), lambda p: Probe(p, passes=["directional", "loss"]))
    trainer = make_trainer("strategy", directional=directional)
    trainer.fit(module, loader(vectors(12)))
    return trainer.optimizers[0]


@pytest.mark.parametrize("directional", ["fd", "jvp"])
@pytest.mark.parametrize("module_type", [CompiledSubmodule, CompiledLoss])
def test_compiled_module_gives_the_same_answers(
    module_type: type[StockModule], directional: str
) -> None:
    """Both methods, with the loss outside and inside the compiled graph."""
    eager, compiled = (_answers(kind, directional) for kind in (StockModule, module_type))
    assert len(compiled.curvatures) == len(eager.curvatures) == 3
    torch.testing.assert_close(
        torch.stack(compiled.curvatures), torch.stack(eager.curvatures), rtol=5e-3, atol=0
    )
    assert max(compiled.deviations) < 5e-3
    for base, again in compiled.losses:
        assert again.item() == pytest.approx(base.item(), rel=1e-6)


@pytest.mark.parametrize("directional", ["fd", "jvp"])
def test_compiled_model_in_a_plain_loop(directional: str) -> None:
    """`attach_model` on the compiled wrapper."""
    torch.manual_seed(3)
    network = _network()
    compiled = torch.compile(network, backend=BACKEND)
    probe = Probe(network.parameters(), passes=["directional", "loss"])
    criterion = probe.attach_model(compiled, F.cross_entropy, directional=directional)
    for x, y in loader(vectors(12)):
        probe.zero_grad()
        criterion(compiled(x), y).backward()
        probe.step()
    assert len(probe.deviations) == 3
    assert max(probe.deviations) < 5e-3
