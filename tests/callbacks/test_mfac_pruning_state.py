"""Tests of callbacks/mfac_pruning.py: checkpoints, resumed runs, exceptions, several ranks."""

import copy
import functools
import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn.utils import prune
from torch.utils.data import DataLoader

from lightning_curvature import KFAC, MFAC, HiZOO, in_extra_pass
from lightning_curvature.callbacks import MFACPruning
from lightning_curvature.callbacks.packed_masks import pack_mask, unpack_mask
from lightning_curvature.callbacks.plain_pruned_names import with_plain_names
from lightning_curvature.pruning import CubicSparsity, ListSparsity
from tests.helpers.modules import StockModule, mlp_module, vectors
from tests.helpers.optimizer_db import identical
from tests.helpers.probing import assert_bitwise
from tests.helpers.pruning import (
    EveryBatch,
    build,
    fit,
    momentum_sgd,
    norm_module,
    pruning,
    zeros_of,
)
from tests.helpers.ranks import RankPool, world
from tests.helpers.resuming import Interruption, Save
from tests.helpers.stateful_loader import StatefulLoader
from tests.helpers.two_ranks import shared_loader, unlike

pytestmark = pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`, callbacks used to create:UserWarning"
)

OPTIMIZERS = {
    "sgd": momentum_sgd,
    "adamw": functools.partial(torch.optim.AdamW, lr=0.05),
    "kfac": functools.partial(KFAC, lr=0.1),
    "hizoo": functools.partial(HiZOO, lr=0.01),
    "mfac": functools.partial(MFAC, lr=0.01, num_grads=4),
}


def gradual(**options: Any) -> MFACPruning:
    return pruning(None, schedule=CubicSparsity(0.8, start_epoch=0, end_epoch=3), **options)


def run(name: str, callback: MFACPruning, *others: Callback, **settings: Any) -> tuple[Any, ...]:
    """Fit four epochs of five batches; return what must not depend on interruptions."""
    module = build(norm_module, OPTIMIZERS[name])
    data = settings.pop("data", None) or StatefulLoader(vectors(20))
    trainer = fit(module, callback, *others, data=data, route="strategy", max_epochs=4, **settings)
    return module.state_dict(), trainer.optimizers[0].state_dict(), callback.history


class Evaluated(StockModule):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", self.training_step(batch, batch_idx))


# Resumed runs


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("step", [4, 7])
def test_resumes_bit_for_bit(name: str, step: int, tmp_path: Path) -> None:
    """From before the first event, and from the middle of an epoch."""
    path = tmp_path / "run.ckpt"
    weights, state, history = run(name, gradual())
    run(name, gradual(), Save(path, step), Interruption(step + 1))
    found = run(name, gradual(), ckpt_path=path)
    assert_bitwise(found[0], weights)
    assert unlike(found[1], state) == []
    assert found[2] == history
    assert history["epoch"] == [1, 2, 3]


@pytest.mark.parametrize("when", [{"every_n_epochs": 1}, {"every_n_train_steps": 5}])
def test_resumes_from_the_end_of_an_epoch(when: dict[str, int], tmp_path: Path) -> None:
    """Lightning leaves out the start of the next epoch if the last batch was not over."""
    data = DataLoader(vectors(20), batch_size=4)
    weights, _, history = run("sgd", gradual(), data=data)
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, **when)
    run("sgd", gradual(), saver, data=data, enable_checkpointing=True)
    for epoch in range(4):
        found = run("sgd", gradual(), data=data, ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert_bitwise(found[0], weights)
        assert found[2] == history


class SaveAtStart(Callback):
    """Saves when an epoch starts, after the callbacks before it."""

    def __init__(self, path: Path, epoch: int) -> None:
        self.path, self.epoch = path, epoch

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path)


def test_resumes_from_the_moment_of_an_event(tmp_path: Path) -> None:
    """The start of the epoch comes again: nothing is pruned again, rounding would leave room."""
    path = tmp_path / "run.ckpt"
    _, _, history = run("sgd", gradual())
    run("sgd", gradual(), SaveAtStart(path, 2), Interruption(12))
    _, _, found = run("sgd", gradual(), ckpt_path=path)
    assert found["epoch"] == [1, 2, 3]
    assert found["sparsity"] == history["sparsity"]
    assert found["predicted_loss_increase"][:2] == history["predicted_loss_increase"][:2]


@pytest.mark.filterwarnings("ignore:MFACPruning does not finish:RuntimeWarning")
def test_resumes_after_the_fit(tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    weights, _, history = run("sgd", gradual())
    module = build(norm_module, momentum_sgd)
    trainer = fit(module, gradual(), data=StatefulLoader(vectors(20)), max_epochs=2)
    trainer.save_checkpoint(path)
    assert not any(name.endswith("_mask") for name in module.state_dict())
    found = run("sgd", gradual(), ckpt_path=path)
    assert_bitwise(found[0], weights)
    assert found[2] == history


def test_masks_of_other_parameters(tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    run("sgd", gradual(), Save(path, 7))
    with pytest.raises(
        Exception, match=r"are of other parameters .* missing \[\], unexpected \['net"
    ):
        run("sgd", gradual(parameters_to_prune=["network.0.weight"]), ckpt_path=path)


@pytest.mark.filterwarnings("ignore:MFACPruning prunes nothing:RuntimeWarning")
def test_second_fit_with_the_same_callback(tmp_path: Path) -> None:
    """Masks belong to the module: another one starts whole."""
    module, callback, path = build(), pruning(0.5), tmp_path / "run.ckpt"
    fit(module, callback, Save(path, 3))
    first = zeros_of(module)
    callback._schedule = ListSparsity({9: 0.75})
    seen = EveryBatch(lambda trainer: zeros_of(trainer.lightning_module))
    fit(module, callback, seen)
    assert all(identical(zeros, first) for zeros in seen.notes)
    assert callback.history["sparsity"] == [0.5]
    # What is loaded for a test is not for the next fit.
    other = build(lambda make: Evaluated(mlp_module(make).network, make))
    trainer = fit(other, callback)
    trainer.test(other, DataLoader(vectors(8), 4), ckpt_path=path, verbose=False)
    other.load_state_dict(build().state_dict())
    seen = EveryBatch(lambda trainer: zeros_of(trainer.lightning_module))
    fit(other, callback, seen)
    assert not any(bool(zeros.any()) for zeros in seen.notes[0].values())
    assert callback.history == {"step": [], "epoch": []}


# Checkpoints


def test_checkpoint_is_an_ordinary_one(tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    x, outputs = vectors(6).tensors[0], []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Trainer, module: Any, *args: Any) -> None:
            if trainer.global_step == 7:
                assert prune.is_pruned(module)
                trainer.save_checkpoint(path)
                with torch.no_grad():
                    outputs.append(module.eval()(x))
                module.train()

    run("sgd", gradual(), Look())
    checkpoint = torch.load(path, weights_only=True)
    plain = build(norm_module)
    assert list(checkpoint["state_dict"]) == list(plain.state_dict())
    plain.load_state_dict(checkpoint["state_dict"])
    assert torch.equal(plain.eval()(x), outputs[0])
    state = checkpoint["callbacks"]["MFACPruning"]
    for name, zeros in zeros_of(plain).items():
        assert torch.equal(unpack_mask(state["masks"][name], zeros.shape), ~zeros)
    # Without the callback the run can go on, and the weights come back.
    with pytest.warns(UserWarning, match="MFACPruning"):
        fit(
            build(norm_module),
            data=StatefulLoader(vectors(20)),
            ckpt_path=path,
            max_epochs=4,
        )


def test_checkpoint_of_weights_only(tmp_path: Path) -> None:
    """Lightning does not ask callbacks about these."""
    saver = ModelCheckpoint(tmp_path, save_weights_only=True, every_n_train_steps=3)
    fit(build(), pruning(), saver, enable_checkpointing=True)
    checkpoint = torch.load(saver.best_model_path, weights_only=True)
    assert list(checkpoint["state_dict"]) == list(build().state_dict())
    assert "callbacks" not in checkpoint


def test_weights_loaded_in_the_middle_are_masked() -> None:
    other = build(norm_module).state_dict()

    class Load(Callback):
        def on_train_batch_start(
            self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
        ) -> None:
            if batch_idx == 3:
                before = zeros_of(pl_module)
                pl_module.load_state_dict(copy.deepcopy(other))
                assert identical(zeros_of(pl_module), before)
                kept = ~before["network.0.weight"]
                found = pl_module.network[0].weight_orig[kept]
                assert torch.equal(found, other["network.0.weight"][kept])

    fit(build(norm_module), pruning(), Load())


def test_names_with_other_hooks_and_prefixes() -> None:
    """A module in two places is saved twice; one of its parameters has no mask."""
    layer = torch.nn.Linear(3, 2)
    model = torch.nn.ModuleDict({"a": layer, "b": torch.nn.Sequential(layer)})
    names = list(model.state_dict())
    prune.custom_from_mask(layer, "weight", torch.tensor([[1, 0, 1], [0, 0, 1]]))
    saving, loading = with_plain_names([layer, layer])
    assert len(saving) == 1
    with torch.no_grad():
        layer.weight_orig.mul_(layer.weight_mask)
    state = model.state_dict()
    assert sorted(state) == sorted(names)
    assert torch.equal(state["a.weight"], layer.weight_orig)
    model.load_state_dict({**state, "a.weight": torch.ones(2, 3), "b.0.weight": torch.ones(2, 3)})
    assert torch.equal(layer.weight_orig, layer.weight_mask)
    with pytest.raises(RuntimeError, match=r"size mismatch for a.weight_orig"):
        model.load_state_dict({**state, "a.weight": torch.ones(3, 3)})
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({})
    for handle in [*saving, *loading]:
        handle.remove()
    assert "a.weight_mask" in model.state_dict()


@pytest.mark.parametrize("shape", [(1,), (8,), (3, 3), (2, 5, 7), (0,)])
def test_packed_masks(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape) < 0.5
    packed = pack_mask(mask)
    assert packed.numel() == -(-mask.numel() // 8)
    assert torch.equal(unpack_mask(packed, mask.shape), mask)
    with pytest.raises(ValueError, match=r"a mask of shape \(99,\) has 13 bytes, got"):
        unpack_mask(packed, torch.Size([99]))


# Exceptions


def test_module_is_plain_after_an_exception(tmp_path: Path) -> None:
    module, callback = build(), pruning(plot=True)
    fit(module, callback, Interruption(3), default_root_dir=tmp_path)
    assert list(module.state_dict()) == list(build().state_dict())
    assert not module.network[0]._forward_pre_hooks
    assert callback.parameters is None
    assert (tmp_path / "pruning.png").exists()
    fit(module, callback)  # and can be trained again
    assert sum(int(zeros.sum()) for zeros in zeros_of(module).values()) == 36


def test_module_is_plain_after_a_failing_event() -> None:
    class Broken(StockModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if in_extra_pass() and self.current_epoch == 1 else loss

    module = build(lambda make: Broken(mlp_module(make).network, make))
    callback = pruning(None, schedule=ListSparsity({0: 0.25, 1: 0.5}))
    with pytest.raises(RuntimeError, match="Gradients could not be collected"):
        fit(module, callback, max_epochs=2)
    assert list(module.state_dict()) == list(build().state_dict())
    assert sum(int(zeros.sum()) for zeros in zeros_of(module).values()) == 18
    assert module.training
    assert not in_extra_pass()


def test_a_failing_picture_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("lightning_curvature.callbacks.mfac_pruning.write_picture", fail)
    with pytest.warns(UserWarning, match=r"could not write pruning.png: disk full"):
        fit(build(), pruning(plot=True), Interruption(3))


def test_pickle_and_repr() -> None:
    callback = MFACPruning(schedule=ListSparsity({0: 0.5}), num_grads=4, plot=False)
    fit(build(), callback)
    again = pickle.loads(pickle.dumps(callback))
    assert repr(again) == repr(callback)
    assert repr(callback) == (
        "MFACPruning(schedule=ListSparsity({0: 0.5}), num_grads=4, plot=False)"
    )
    assert again.history == callback.history
    fit(build(), again)


# Ranks


def fit_here(options: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Fit on this rank; batches of gradients are the same, however many ranks there are."""
    rank, ranks = world()
    module = build(norm_module if settings.get("norm") else mlp_module)
    callback = pruning(**options)
    path = settings.get("ckpt_path")
    notes = EveryBatch(lambda trainer: copy.deepcopy(trainer.lightning_module.state_dict()))
    savers = [Save(Path(settings["save"]), 7)] if "save" in settings else []
    rows = torch.arange(24).split(4)
    data: Any = DataLoader(vectors(24), batch_sampler=[r.tolist() for r in rows[rank::ranks]])
    if "loader" in settings:
        data = settings["loader"](vectors(24), 8)
    fit(
        module,
        callback,
        notes,
        *savers,
        data=data,
        strategy="ddp",
        devices=ranks,
        use_distributed_sampler=False,
        max_epochs=settings.get("max_epochs", 2),
        accumulate_grad_batches=settings.get("accumulate", 1),
        precision=settings.get("precision"),
        ckpt_path=None if path is None else Path(path),
    )
    return {"notes": notes.notes, "weights": module.state_dict(), "history": callback.history}


@pytest.mark.ddp
@pytest.mark.parametrize(
    "options", [{}, {"block_size": None, "num_grads": 5}, {"criterion": "random"}]
)
def test_two_ranks_are_one_process(ranks: RankPool, options: dict[str, Any]) -> None:
    settings = {"precision": "64-true"}
    first, second = ranks.run(fit_here, options, settings)
    assert unlike(first, second) == []
    single = fit_here(options, settings)
    # Before the first batch: the ranks train with other batches than one process.
    for name, weights in single["notes"][0].items():
        found = first["notes"][0][name]
        assert torch.equal(found == 0, weights == 0)
        torch.testing.assert_close(found, weights, rtol=1e-9, atol=1e-12)
    assert first["history"]["sparsity"] == single["history"]["sparsity"] == [0.5]


@pytest.mark.ddp
def test_two_ranks_train_what_is_left(ranks: RankPool, tmp_path: Path) -> None:
    options = {"sparsity": None, "schedule": ListSparsity({0: 0.3, 2: 0.6})}
    settings = {"loader": shared_loader, "max_epochs": 3, "accumulate": 2}
    first, second = ranks.run(fit_here, options, settings)
    assert unlike(first, second) == []
    assert first["history"]["epoch"] == [0, 2]
    zeros = [{n: w == 0 for n, w in note.items() if w.ndim > 1} for note in first["notes"]]
    for before, after in itertools.pairwise(zeros):
        assert all(bool(after[name][pruned].all()) for name, pruned in before.items())


@pytest.mark.ddp
def test_two_ranks_resume(ranks: RankPool, tmp_path: Path) -> None:
    options = {"sparsity": None, "schedule": ListSparsity({0: 0.3, 2: 0.6})}
    settings = {"loader": StatefulLoader, "max_epochs": 4}
    save = {**settings, "save": str(tmp_path / "run.ckpt")}
    (whole, _) = ranks.run(fit_here, options, save)
    resumed, other = ranks.run(fit_here, options, {**settings, "ckpt_path": save["save"]})
    assert unlike(resumed, other) == []
    assert_bitwise(resumed["weights"], whole["weights"])
    assert resumed["history"] == whole["history"]
