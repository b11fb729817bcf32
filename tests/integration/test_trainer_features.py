"""Details of training in a Trainer; test_features_*.py go through its features one by one."""

import copy
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything

from lightning_curvature import AdamQLR
from tests.helpers.modules import StockModule, loader, mlp_module, vectors
from tests.helpers.optimizer_db import identical
from tests.helpers.probing import ROUTES, Probe, make_trainer


@pytest.mark.parametrize("route", ROUTES)
def test_wrapper_of_the_optimizer_reads_the_real_one(route: str) -> None:
    """Lightning's wrapper is a subclass: class attributes there would shadow the real ones."""
    seen: list[tuple[float, float]] = []

    class Reading(StockModule):
        def on_train_batch_end(self, *args: Any) -> None:
            wrapper, real = self.optimizers(), self.trainer.optimizers[0]
            assert wrapper is not real
            assert wrapper.oracle is real.oracle is not None
            assert wrapper.stats.keys() == real.stats.keys() >= {"loss", "damping", "lr"}
            seen.append((float(wrapper.damping), float(real.damping)))

    seed_everything(9)
    module = Reading(mlp_module(AdamQLR).network, AdamQLR)
    make_trainer(route).fit(module, loader(vectors()))
    assert seen
    assert all(one == two for one, two in seen)
    assert len({two for _, two in seen}) > 1


def test_several_param_groups_and_frozen_parameters() -> None:
    """Groups, a frozen layer and a layer that gets unfrozen in the second epoch."""

    class Unfreezing(StockModule):
        def configure_optimizers(self) -> Any:
            first, _, last = self.network
            first.requires_grad_(False)
            return Probe([{"params": last.parameters()}, {"params": first.parameters()}])

        def on_train_epoch_start(self) -> None:
            self.network[0].requires_grad_(self.current_epoch > 0)

    seed_everything(9)
    module = Unfreezing(mlp_module(Probe).network, Probe)
    before = [param.detach().clone() for param in module.network[0].parameters()]
    trainer = make_trainer("strategy", directional="jvp", precision="64-true", max_epochs=2)
    trainer.fit(module, loader(vectors()))
    assert len(trainer.optimizers[0].deviations) == 10
    assert max(trainer.optimizers[0].deviations) <= 1e-12
    after = module.network[0].parameters()
    assert any(not torch.equal(a.to(b.dtype), b) for a, b in zip(after, before, strict=True))


def test_wrapper_of_the_optimizer_saves_and_loads_the_real_one() -> None:
    """``self.optimizers()`` is a wrapper: what it saves and loads is the optimizer that trains."""
    seen: list[bool] = []

    class Saving(StockModule):
        def on_train_batch_end(self, *args: Any) -> None:
            wrapper, real = self.optimizers(), self.trainer.optimizers[0]
            if self.global_step == 2:
                self.saved = copy.deepcopy(wrapper.state_dict())
                assert identical(self.saved, real.state_dict())
            elif self.global_step == 4:
                wrapper.load_state_dict(copy.deepcopy(self.saved))
                assert identical(real.state_dict(), self.saved)
                assert real.oracle is not None
                seen.append(True)

    seed_everything(9)
    module = Saving(mlp_module(AdamQLR).network, AdamQLR)
    trainer = make_trainer("strategy", max_epochs=2)
    trainer.fit(module, loader(vectors()))
    assert seen == [True]
    assert trainer.optimizers[0].state_dict()["curvature"]["steps_done"] == 2 + 6
    AdamQLR(module.parameters()).load_state_dict(module.saved)
