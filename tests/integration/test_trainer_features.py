"""AdamQLR beside other parts of Lightning that meddle with steps, closures and callbacks."""

import itertools
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.tuner import Tuner

from lightning_curvature import AdamQLR
from tests.helpers.modules import StockModule, loader, mlp_module, norm_dropout_module, vectors
from tests.helpers.probing import ROUTES, Probe, make_trainer, parameters_and_buffers

QUIET = {"min_lr": 1e-3, "max_lr": 1.0, "num_training": 6, "update_attr": False}


class Tunable(StockModule):
    """Module with a learning rate to find; AdamQLR's multiplies the derived step."""

    lr = 0.5

    def configure_optimizers(self) -> Any:
        return AdamQLR(self.parameters(), lr=self.lr)


def _tunable() -> Tunable:
    seed_everything(9)
    return Tunable(mlp_module(AdamQLR).network, AdamQLR)


def test_learning_rate_finder_with_the_strategy() -> None:
    """The finder replaces all callbacks; the strategy survives it, and a fit afterwards works."""
    module = _tunable()
    trainer = make_trainer("strategy", logger=False)
    finder = Tuner(trainer).lr_find(module, loader(vectors(40)), **QUIET)
    assert finder is not None
    assert len(finder.results["loss"]) >= QUIET["num_training"] - 1
    trainer.fit(module, loader(vectors()))
    assert all(param.isfinite().all() for param in module.parameters())


@pytest.mark.parametrize("route", ["callback", "auto"])
def test_learning_rate_finder_without_the_strategy_says_why(route: str) -> None:
    """The message points to the strategy."""
    with pytest.raises(RuntimeError, match="Learning-rate finder"):
        Tuner(make_trainer(route)).lr_find(_tunable(), loader(vectors(40)), **QUIET)


@pytest.mark.parametrize("route", ROUTES)
def test_weight_averaging(route: str) -> None:
    """Averaging adds an epoch without backward for batch norm: nothing may be stepped there."""
    seed_everything(9)
    module = norm_dropout_module(Probe)
    trainer = make_trainer(route, callbacks=[EMAWeightAveraging(decay=0.5)], max_epochs=2)
    trainer.fit(module, loader(vectors()))
    assert len(trainer.optimizers[0].deviations) == 10
    assert all(t.isfinite().all() for t in parameters_and_buffers(module).values())


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("route", ROUTES)
def test_clipping_is_no_false_alarm(route: str, algorithm: str) -> None:
    """Clipped gradients disagree with the measured slope; the self-check must know why."""
    seed_everything(9)
    module = norm_dropout_module(AdamQLR)
    trainer = make_trainer(
        route, gradient_clip_val=1e-2, gradient_clip_algorithm=algorithm, max_epochs=2
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, loader(vectors()))
    assert not [w for w in caught if "elf-check" in str(w.message)]
    assert all(param.isfinite().all() for param in module.parameters())


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


@pytest.mark.parametrize("route", ROUTES)
def test_learning_rate_schedule(route: str) -> None:
    """An ordinary scheduler is an envelope of the derived step: zero means stand still."""

    class Scheduled(StockModule):
        def configure_optimizers(self) -> Any:
            optimizer = AdamQLR(self.parameters())
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: float(epoch < 1))
            return {"optimizer": optimizer, "lr_scheduler": scheduler}

    class Snapshot(list[Any]):
        def take(self, module: LightningModule) -> None:
            self.append([param.detach().clone() for param in module.parameters()])

    snapshots = Snapshot()

    class Watched(Scheduled):
        def on_train_epoch_end(self) -> None:
            snapshots.take(self)

    seed_everything(9)
    module = Watched(mlp_module(AdamQLR).network, AdamQLR)
    snapshots.take(module)
    make_trainer(route, max_epochs=3).fit(module, loader(vectors()))
    moved = [
        any(not torch.equal(a, b) for a, b in zip(one, two, strict=True))
        for one, two in itertools.pairwise(snapshots)
    ]
    assert moved == [True, False, False]


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


@pytest.mark.parametrize("route", ROUTES)
def test_adamqlr_lowers_the_loss_on_every_route(route: str) -> None:
    """The plain promise: the module unchanged, the loss falls."""
    seed_everything(9)
    module, data = mlp_module(AdamQLR), vectors(64)
    x, y = data.tensors
    before = F.cross_entropy(module(x), y).item()
    make_trainer(route, max_epochs=20).fit(module, loader(data, batch_size=32))
    assert F.cross_entropy(module(x), y).item() < before - 0.2
