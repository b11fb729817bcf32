"""docs/concepts/refused.md quotes the errors as users see them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.plugins.precision import BitsandbytesPrecision, TransformerEnginePrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, XLAStrategy
from torch import nn

from lightning_curvature import SGDQLR, AdamQLR, SingleDeviceCurvatureStrategy
from lightning_curvature.oracle.record import no_loss_captured
from lightning_curvature.strategies.refusals import (
    refuse_module,
    refuse_precision,
    refuse_several_optimizers,
    refuse_strategy,
)
from tests.helpers.modules import loader, mlp_module, vectors
from tests.helpers.plain_loop import Loop
from tests.helpers.probing import make_trainer

PAGE = Path(__file__).resolve().parents[1] / "docs" / "concepts" / "refused.md"

pytestmark = pytest.mark.skipif(not PAGE.is_file(), reason="the documentation is not shipped")


def optimizer(kind: Any = AdamQLR) -> Any:
    return kind([nn.Parameter(torch.ones(2))])


def blank(kind: type) -> Any:
    """Return an object of a class that cannot be built here."""
    return object.__new__(kind)


class Iterating(LightningModule):
    def training_step(self, dataloader_iter: Any) -> None: ...


class Manual(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


def unattached() -> None:
    make_trainer("none").fit(mlp_module(AdamQLR), loader(vectors()))


def sparse() -> None:
    embedding = nn.Embedding(3, 2, sparse=True)
    loop = Loop(nn.Sequential(embedding), AdamQLR)
    loop.step(torch.tensor([0, 1]), torch.tensor([0, 1]))


def elsewhere() -> None:
    class Net(nn.Linear): ...

    net = Net(1, 1)
    ours = AdamQLR([*net.parameters(), nn.Parameter(torch.ones(1))])
    ours.attach_model(net, nn.functional.mse_loss)


def one_value_for_all() -> None:
    AdamQLR([{"params": nn.Linear(1, 1).parameters()}, {"params": [], "max_lr": 0.5}])


scaling = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
REFUSALS: dict[str, Callable[[], Any]] = {
    "fsdp": lambda: refuse_strategy(blank(FSDPStrategy), optimizer()),
    "deepspeed": lambda: refuse_strategy(blank(DeepSpeedStrategy), optimizer()),
    "xla": lambda: refuse_strategy(blank(XLAStrategy), optimizer()),
    "local SGD": lambda: refuse_strategy(DDPStrategy(model_averaging_period=4), optimizer()),
    "two devices": lambda: setattr(
        SingleDeviceCurvatureStrategy(), "parallel_devices", [torch.device("cpu")] * 2
    ),
    "transformer engine": lambda: refuse_precision(
        blank(TransformerEnginePrecision), Iterating(), optimizer()
    ),
    "bitsandbytes": lambda: refuse_precision(
        blank(BitsandbytesPrecision), Iterating(), optimizer()
    ),
    "scaler": lambda: refuse_precision(scaling, Manual(), optimizer()),
    "several": lambda: refuse_several_optimizers([optimizer(), optimizer(SGDQLR)]),
    "iterator": lambda: refuse_module(Iterating(), optimizer()),
    "sparse": sparse,
    "complex": lambda: AdamQLR([nn.Parameter(torch.ones(2, dtype=torch.complex64))]),
    "elsewhere": elsewhere,
    "one value": one_value_for_all,
    "unattached": unattached,
}


@pytest.mark.parametrize("name", REFUSALS)
def test_the_page_quotes_the_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_CURVATURE_AUTO_ATTACH", "0")
    errors = (RuntimeError, TypeError, ValueError, MisconfigurationException)
    with pytest.raises(errors) as refusal:
        REFUSALS[name]()
    page = PAGE.read_text("utf-8").replace("\n> ", " ")
    assert f" {refusal.value}" in page


def test_the_page_quotes_the_error_of_an_unknown_loss() -> None:
    """But for the list of known ones."""
    start, _, rest = str(no_loss_captured()).partition("{")
    page = PAGE.read_text("utf-8")
    assert f"{start}{{...}}{rest.partition('}')[2]}" in page
