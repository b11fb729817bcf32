"""The contract of every optimizer of lightning_curvature/registry.py: in a Trainer."""

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_curvature.oracle import MissingCapabilityError
from tests.helpers.modules import StockModule, conv_module, loader, mlp_module, vectors
from tests.helpers.modules import images as image_data
from tests.helpers.optimizer_db import Contract, every_optimizer, state_tensors
from tests.helpers.plain_loop import Loop
from tests.helpers.probing import ROUTES, make_trainer, the_optimizer

EPOCHS = 6


class Losses(Callback):
    """Collects the loss of every batch."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any
    ) -> None:
        self.seen.append(outputs["loss"].item())


def fit(
    module: LightningModule, route: str, data: Any = None, **settings: Any
) -> tuple[list[float], Trainer]:
    """Fit and return the losses."""
    losses = Losses()
    settings = {"max_epochs": EPOCHS, **settings}
    trainer = make_trainer(route, callbacks=[losses], **settings)
    trainer.fit(module, loader(vectors() if data is None else data))
    return losses.seen, trainer


def fallen(contract: Contract) -> float:
    """Return how much of its loss is left after some epochs: more where directions are random."""
    return 0.9 if contract.forward_only else 0.8


@every_optimizer
@pytest.mark.parametrize("route", ROUTES)
def test_trains_a_stock_module(contract: Contract, route: str) -> None:
    seed_everything(1)
    module = mlp_module(contract.make)
    losses, trainer = fit(module, route)
    per_epoch = len(losses) // EPOCHS
    assert sum(losses[-per_epoch:]) < fallen(contract) * sum(losses[:per_epoch])
    optimizer = the_optimizer(module)
    assert type(optimizer) is contract.info.cls
    assert "_curvature_recorder" not in trainer.strategy.__dict__
    assert optimizer.oracle is None, "what was attached for the fit is removed with it"


@every_optimizer
def test_all_routes_take_the_same_steps(contract: Contract) -> None:
    """... and so does the ordinary loop, bit for bit."""
    weights = []
    for route in ROUTES:
        seed_everything(1)
        module = mlp_module(contract.make)
        fit(module, route)
        weights.append(module.network.state_dict())
    seed_everything(1)
    loop = Loop(mlp_module(contract.make).network, contract.make, directional="auto")
    for _ in range(EPOCHS):
        loop.train(loader(vectors()))
    weights.append(loop.model.state_dict())
    for other in weights[1:]:
        for name, tensor in weights[0].items():
            assert torch.equal(other[name], tensor), name


@every_optimizer
def test_trains_a_network_with_batch_norm_and_dropout(contract: Contract) -> None:
    seed_everything(1)
    losses, _ = fit(conv_module(contract.make), "strategy", image_data(), max_epochs=12)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


@every_optimizer
@pytest.mark.feature("Trainer features", "learning-rate scheduler, per step")
def test_a_scheduler_in_the_module(contract: Contract) -> None:
    class Scheduled(StockModule):
        def configure_optimizers(self) -> Any:
            optimizer = self.make_optimizer(self.parameters())
            schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, total_iters=20)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": schedule, "interval": "step"},
            }

    module = Scheduled(nn.Linear(5, 4), contract.make)
    losses, _ = fit(module, "strategy")
    assert the_optimizer(module).param_groups[0]["lr"] == pytest.approx(
        contract.make([nn.Parameter(torch.ones(1))]).param_groups[0]["lr"]
    )
    assert sum(losses[-5:]) < sum(losses[:5])


class Manual(StockModule):
    """Manual optimization, as Lightning documents it for closures."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False
        self.backwards = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        optimizer = self.optimizers()
        x, y = batch
        seen: list[Tensor] = []

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(self(x), y)
            seen.append(loss)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure)
        return seen[0].detach()

    def on_after_backward(self) -> None:
        self.backwards += 1


@every_optimizer
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.feature("Models", "manual optimization with a closure")
def test_manual_optimization_with_a_closure(contract: Contract, route: str) -> None:
    seed_everything(1)
    network = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4))
    module = Manual(network, contract.make)
    losses, trainer = fit(module, route)
    per_epoch = len(losses) // EPOCHS
    assert sum(losses[-per_epoch:]) < fallen(contract) * sum(losses[:per_epoch])
    assert trainer.global_step == len(losses)
    # The same steps as under automatic optimization.
    seed_everything(1)
    automatic = mlp_module(contract.make)
    fit(automatic, route)
    for ours, theirs in zip(module.parameters(), automatic.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@every_optimizer
@pytest.mark.feature("Models", "manual optimization without a closure")
def test_manual_optimization_without_a_closure(contract: Contract, refused: Any) -> None:
    """The loss cannot be evaluated again, and the message says what to do."""
    if not contract.records:
        pytest.skip("records nothing")

    class NoClosure(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    module = NoClosure(nn.Linear(5, 4), contract.make)
    text = (
        f"{contract.info.cls.__name__} evaluates the loss again, which a loop without a closure "
        "does not allow. Call optimizer.step(closure), where closure() zeroes the gradients, "
        "computes the loss, runs backward and returns the loss."
    )
    with pytest.raises(MissingCapabilityError, match=f"^{re.escape(text)}$"):
        fit(module, "strategy")
    refused(text)


@every_optimizer
@pytest.mark.feature("Other strategies", "a Trainer to which nothing is attached")
def test_nobody_attached(contract: Contract, monkeypatch: pytest.MonkeyPatch, refused: Any) -> None:
    """Lightning's own closure is not mistaken for one that can be called again."""
    if not contract.info.asks:
        pytest.skip("asks nothing")
    monkeypatch.setenv("LIGHTNING_CURVATURE_AUTO_ATTACH", "0")
    module = mlp_module(contract.make)
    before = [p.detach().clone() for p in module.parameters()]
    with pytest.raises(MissingCapabilityError, match=r"has no curvature oracle\. Use strategy="):
        fit(module, "none")
    for p, old in zip(module.parameters(), before, strict=True):
        assert torch.equal(p, old)
    refused(f"{contract.info.cls.__name__} has no curvature oracle.")


@every_optimizer
def test_resume_in_the_trainer_is_bitwise(contract: Contract, tmp_path: Any) -> None:
    """A checkpoint of Lightning holds everything, whoever attaches the oracle afterwards."""
    seed_everything(1)
    whole = mlp_module(contract.make)
    fit(whole, "strategy", max_epochs=4)
    seed_everything(1)
    half = mlp_module(contract.make)
    _, trainer = fit(half, "strategy", max_epochs=2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = mlp_module(contract.make)
    trainer = make_trainer("callback", max_epochs=4)
    trainer.fit(resumed, loader(vectors()), ckpt_path=tmp_path / "half.ckpt")
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    states = [state_tensors(the_optimizer(module)) for module in (resumed, whole)]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
