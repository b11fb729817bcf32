"""Every optimizer beside activation checkpointing, of both kinds."""

import re
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_curvature.oracle import NoLossCapturedError
from tests.helpers.families import every_family
from tests.helpers.features import BATCHES, EPOCHS, quiet, train
from tests.helpers.modules import CLASSES, MakeOptimizer, StockModule
from tests.helpers.optimizer_db import Contract
from tests.helpers.probing import assert_bitwise

pytestmark = [
    quiet,
    # Of the reentrant kind, which expects a backward; extra passes have none.
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning"),
]


ONCE = "torch's own error: only `backward` differentiates it, once; set use_reentrant=False."
fallbacks = pytest.mark.filterwarnings(
    "ignore:Labels cannot be sampled on the graph:RuntimeWarning",
    "ignore:This model cannot be differentiated twice:RuntimeWarning",
)


def title(name: str) -> Any:
    """Name a row of the compatibility table."""
    return pytest.mark.feature("Models", name)


class Blocks(nn.Module):
    """A network whose middle part can be recomputed in the backward.

    Args:
        recompute: None for not at all, True for the reentrant kind, False for the other one.
    """

    def __init__(self, recompute: bool | None) -> None:
        super().__init__()
        self.first = nn.Linear(5, 12)
        self.middle = nn.Sequential(nn.Tanh(), nn.Linear(12, 12), nn.Dropout(0.1), nn.Tanh())
        self.last = nn.Linear(12, CLASSES)
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        hidden = self.first(x)
        if self.recompute is None:
            hidden = self.middle(hidden)
        else:
            hidden = checkpoint(self.middle, hidden, use_reentrant=self.recompute)
        return self.last(hidden)


def blocks(recompute: bool | None) -> Any:
    """Return a maker of modules."""
    return lambda make_optimizer: StockModule(Blocks(recompute), make_optimizer)


@every_family
@pytest.mark.parametrize("directional", ["auto", "fd", "jvp"])
@title("activation checkpointing, non-reentrant")
def test_non_reentrant(contract: Contract, directional: str) -> None:
    """The same steps as without, dropout included."""
    plain = train(contract, blocks(None), directional=directional)
    run = train(contract, blocks(False), directional=directional)
    assert run.steps == EPOCHS * BATCHES
    assert_bitwise(run.tensors, plain.tensors)
    run.assert_learned()


@every_family
@pytest.mark.parametrize("directional", ["auto", "fd"])
@title("activation checkpointing, reentrant")
@fallbacks
def test_reentrant(contract: Contract, directional: str, refused: Any) -> None:
    """Torch differentiates it once, by ``backward``."""
    if not contract.info.asks.isdisjoint({"sampled", "hvp"}):
        with pytest.raises(RuntimeError, match="use_reentrant=True"):
            train(contract, blocks(True), directional=directional)
        refused(ONCE)
        return
    plain = train(contract, blocks(None), directional=directional)
    run = train(contract, blocks(True), directional=directional)
    assert_bitwise(run.tensors, plain.tensors)


@every_family
@title('activation checkpointing, reentrant, `directional="jvp"`')
def test_reentrant_in_forward_mode(contract: Contract, refused: Any) -> None:
    """Newer versions of torch raise; older ones lose tangents, which the self-check notices."""
    if "directional" not in contract.info.asks:
        pytest.skip("needs no forward mode")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            train(contract, blocks(True), directional="jvp", max_epochs=1)
        except (NotImplementedError, RuntimeError) as error:
            said = [str(error)]
        else:
            said = [str(warning.message) for warning in caught]
    if "sampled" in contract.info.asks:
        assert "activation checkpointing with use_reentrant=True" in said[0]
        refused("parameters hidden by reentrant checkpointing.")
        return
    assert any(re.search("forward mode AD|Self-check: the slope", text) for text in said), said
    refused("torch has no forward mode for it: an error, or a warning of the self-check.")


@every_family
@title("activation checkpointing, reentrant, in mixed precision")
def test_reentrant_in_mixed_precision(contract: Contract) -> None:
    """Left to "auto", the method is changed with a warning, and the loss falls."""
    if "directional" not in contract.info.asks or "sampled" in contract.info.asks:
        pytest.skip("needs no forward mode, or refuses")
    with pytest.warns(RuntimeWarning, match="Self-check|Forward-mode"):
        run = train(contract, blocks(True), precision="bf16-mixed", max_epochs=6)
    run.assert_learned()


class LossInside(StockModule):
    """Computes network and loss in one checkpointed region."""

    reentrant = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Return the loss."""
        x, y = batch
        hidden = self.network[0](x)
        return checkpoint(self._rest, hidden, y, use_reentrant=self.reentrant)

    def _rest(self, hidden: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.network[1:](hidden), y)


class LossInsideReentrant(LossInside):
    """Uses the other kind."""

    reentrant = True


def inside(kind: type[LossInside]) -> Any:
    """Return a maker of modules."""

    def make(make_optimizer: MakeOptimizer) -> LossInside:
        network = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, CLASSES))
        return kind(network, make_optimizer)

    return make


@every_family
@title("loss inside a checkpointed region, non-reentrant")
def test_loss_inside(contract: Contract) -> None:
    run = train(contract, inside(LossInside))
    run.assert_learned()


@every_family
@title("loss inside a checkpointed region, reentrant")
@fallbacks
def test_loss_inside_reentrant(contract: Contract, refused: Any) -> None:
    """The loss function runs without a graph there; it is no loss anyone could differentiate."""
    if not contract.needs_known_loss and "hvp" not in contract.info.asks:
        train(contract, inside(LossInsideReentrant)).assert_learned()
        return
    if not contract.info.asks.isdisjoint({"sampled", "hvp"}):
        with pytest.raises(RuntimeError, match="use_reentrant=True"):
            train(contract, inside(LossInsideReentrant))
        refused(ONCE)
        return
    with pytest.raises(NoLossCapturedError, match="supported") as refusal:
        train(contract, inside(LossInsideReentrant))
    assert torch.is_grad_enabled()
    refused(str(refusal.value).split(".")[0] + ".")
