"""What happens around `MFACPruning` in the fits of users: lightning_curvature/callbacks."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_curvature.callbacks import mfac_pruning
from lightning_curvature.pruning import CubicSparsity, FisherPruner, ListSparsity
from tests.helpers.modules import StockModule
from tests.helpers.pruning import build, fit, momentum_sgd, pruning, zeros_of


def sparsity(module: LightningModule) -> float:
    zeros = torch.cat([zero.view(-1) for zero in zeros_of(module).values()])
    return float(zeros.double().mean())


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4x1"])
def test_whether_a_sparsity_has_been_reached(pattern: str) -> None:
    """Only whole weights and groups are pruned."""
    pruner = FisherPruner(nn.Linear(8, 12), criterion="magnitude", pattern=pattern)
    for target in (0.2, 0.31, 0.5):
        assert not pruner.has_reached(target)
        pruner.prune(target)
        assert pruner.has_reached(target)
        before = pruner.parameters.sparsity()
        assert pruner.prune(target).num_pruned == 0
        assert pruner.parameters.sparsity() == before


def test_a_second_fit_collects_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was asked for is not a whole number of weights, and is there all the same."""
    module, callback = build(), pruning(0.317)
    fit(module, callback)
    events, before = len(callback.history["step"]), zeros_of(module)
    forbidden: Any = lambda *_, **__: pytest.fail("collected")  # noqa: E731
    monkeypatch.setattr(mfac_pruning, "gradient_rows", forbidden)
    fit(module, callback)
    assert len(callback.history["step"]) == events
    after = zeros_of(module)
    assert all(torch.equal(after[name], zero) for name, zero in before.items())


class Fails(Callback):
    """Raises in the second collection of gradients."""

    def __init__(self) -> None:
        self.seen = 0

    def wrap(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = mfac_pruning.gradient_rows

        def failing(*args: Any, **kwargs: Any) -> Any:
            self.seen += 1
            if self.seen == 2:
                raise RuntimeError("a bad day")
            return real(*args, **kwargs)

        monkeypatch.setattr(mfac_pruning, "gradient_rows", failing)


def test_a_run_that_failed_within_an_event_goes_on_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, callback = build(), pruning(0.6, num_recomputations=3)
    path = tmp_path / "failed.ckpt"
    Fails().wrap(monkeypatch)

    class Saves(Callback):
        def on_exception(self, trainer: Trainer, *_: Any) -> None:
            trainer.save_checkpoint(path)

    with pytest.raises(RuntimeError, match="a bad day"):
        fit(module, callback, Saves())
    monkeypatch.undo()
    half = sparsity(module)
    assert 0.05 < half < 0.55
    again, other = build(), pruning(0.6, num_recomputations=3)
    fit(again, other, ckpt_path=path)
    assert abs(sparsity(again) - 0.6) < 0.02


def test_layers_with_a_spectral_norm() -> None:
    """They have a `weight_orig` as well, without a mask."""
    network = nn.Sequential(
        torch.nn.utils.spectral_norm(nn.Linear(5, 8)), nn.Tanh(), nn.Linear(8, 4)
    )
    module = StockModule(network, momentum_sgd)
    fit(module, pruning(0.5))
    assert int((network[2].weight == 0).sum()) == 16


def test_a_pattern_that_names_a_shared_weight_twice() -> None:
    network = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Linear(5, 4))
    network[2].weight = network[0].weight
    module = StockModule(network, momentum_sgd)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        fit(module, pruning(0.5, parameters_to_prune=["network.0.weight", "network.3.weight"]))
    assert int((network[3].weight == 0).sum()) > 0


class NewOptimizer(Callback):
    """Replaces the optimizer after the first epoch."""

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.current_epoch == 1:
            trainer.strategy.optimizers = [
                torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
            ]


def test_an_optimizer_that_is_made_later() -> None:
    module, seen = build(), []

    class Looks(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            seen.append(sparsity(pl_module))

    fit(module, NewOptimizer(), pruning(0.5), Looks(), max_epochs=2)
    assert min(seen) >= 0.49


def test_the_best_checkpoint_is_of_before(tmp_path: Path) -> None:
    class Rises(Callback):
        def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
            module.log("rises", float(trainer.current_epoch))

    best = ModelCheckpoint(tmp_path, monitor="rises", mode="min")
    callback = pruning(None, schedule=ListSparsity({2: 0.5}))
    with pytest.warns(RuntimeWarning, match="best checkpoint was written before the last weights"):
        fit(build(), Rises(), callback, best, max_epochs=3, enable_checkpointing=True)


@pytest.mark.parametrize("epochs", [2, 4])
def test_a_schedule_that_is_not_finished(epochs: int) -> None:
    callback = pruning(None, schedule=CubicSparsity(0.6, start_epoch=0, end_epoch=3))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(build(), callback, max_epochs=epochs)
    told = [str(w.message) for w in caught if "does not finish its schedule" in str(w.message)]
    assert len(told) == (1 if epochs == 2 else 0)


def test_parameters_that_are_frozen_on_the_way() -> None:
    class Freezes(Callback):
        def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
            next(p for p in module.parameters() if p.ndim > 1).requires_grad_(False)

    with pytest.raises(MisconfigurationException, match="frozen since the fit started: network"):
        fit(build(), Freezes(), pruning(0.5))


def test_masks_that_stay_do_not_stop_copies() -> None:
    module = build()
    fit(module, pruning(0.5, make_pruning_permanent=False))
    twin = copy.deepcopy(module)
    layer = next(part for part in module.modules() if hasattr(part, "weight_mask"))
    assert torch.equal(layer.weight, layer.weight_orig * layer.weight_mask)
    assert sparsity(twin) == sparsity(module)
