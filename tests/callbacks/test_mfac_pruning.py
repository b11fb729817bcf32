"""Tests of callbacks/mfac_pruning.py: what is pruned, when, and that it stays so."""

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader

from lightning_curvature import ZOAdam, in_extra_pass
from lightning_curvature.callbacks import MFACPruning, mfac_pruning
from lightning_curvature.pruning import (
    CubicSparsity,
    FisherPruner,
    ListSparsity,
    recomputation_targets,
)
from tests.helpers.modules import (
    StockModule,
    conv_module,
    images,
    mlp_module,
    norm_dropout_module,
    sequences,
    transformer_module,
    vectors,
)
from tests.helpers.monitoring import RecordingLogger
from tests.helpers.optimizer_db import Contract, every_optimizer, identical
from tests.helpers.probing import assert_bitwise
from tests.helpers.pruning import EveryBatch, build, fit, momentum_sgd, pruning, zeros_of

TORCH = {
    "sgd": momentum_sgd,
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.05, weight_decay=0.1),
}


def weights_of(trainer: Trainer) -> dict[str, Tensor]:
    return copy.deepcopy(trainer.lightning_module.state_dict())


def sparsity_of(module: nn.Module) -> float:
    zeros = zeros_of(module).values()
    return sum(int(z.sum()) for z in zeros) / sum(z.numel() for z in zeros)


def by_hand(
    module: LightningModule, options: dict[str, Any], size: int, targets: list[float]
) -> None:
    """Prune in a plain loop, with gradients of consecutive batches."""
    pruner = FisherPruner(module, **options)
    module.eval()
    x, y = vectors(20).tensors
    count = -(-20 // size)
    for target in targets:
        parameters = pruner.parameters
        rows = []
        for number in range(pruner.num_grads):
            part = slice(number % count * size, number % count * size + size)
            loss = F.cross_entropy(module(x[part]), y[part])
            rows.append(parameters.gather(torch.autograd.grad(loss, parameters.tensors())))
        pruner.prune(target, torch.stack(rows))
    pruner.parameters.make_permanent()


# What is pruned


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, None),
        ({"block_size": 7, "weight_update": "sum", "damping": 0.01}, None),
        ({"block_size": None, "scope": "layer"}, 1),
        ({"pattern": "2x1", "num_grads": 9}, 5),
    ],
)
def test_as_in_a_plain_loop(options: dict[str, Any], size: int | None) -> None:
    module = build(norm_dropout_module)
    expected = copy.deepcopy(module)
    settings = {"num_grads": 6, "damping": 1e-3, **options}
    by_hand(expected, settings, size or 4, recomputation_targets(0.0, 0.4, 3))
    callback = pruning(0.4, num_recomputations=3, fisher_batch_size=size, **settings)
    weights = EveryBatch(weights_of)
    fit(module, callback, weights)
    assert_bitwise(weights.notes[0], expected.state_dict())
    assert sparsity_of(expected) == pytest.approx(0.4, abs=0.02)
    assert zeros_of(module).keys() == zeros_of(expected).keys()


def test_other_batches_each_time() -> None:
    seen: list[tuple[int, float]] = []

    class Watching(StockModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if in_extra_pass():
                seen.append((self.current_epoch, batch[0].sum().item()))
            return super().training_step(batch, batch_idx)

    module = build(lambda make: Watching(mlp_module(make).network, make))
    callback = pruning(None, schedule=ListSparsity({0: 0.25, 1: 0.5}), num_grads=3)
    fit(module, callback, data=DataLoader(vectors(20), 4, shuffle=True), max_epochs=2)
    assert [epoch for epoch, _ in seen] == [0] * 6 + [1] * 6
    sums = [tuple(total for _, total in seen[i : i + 3]) for i in range(0, 12, 3)]
    assert len(set(sums)) == 4


@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_without_gradients(criterion: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mfac_pruning, "gradient_rows")
    module, other = build(), build()
    weights = EveryBatch(weights_of)
    fit(module, pruning(criterion=criterion, seed=5), weights)
    pruner = FisherPruner(other, criterion=criterion, seed=5)
    pruner.prune(0.5)
    pruner.parameters.make_permanent()
    assert_bitwise(weights.notes[0], other.state_dict())


@pytest.mark.parametrize(
    ("make", "data", "kept"),
    [
        (conv_module, images(8), {"network.0.weight", "network.4.weight", "network.9.weight"}),
        (
            transformer_module,
            sequences(8),
            {"network.layer.linear1.weight", "network.layer.linear2.weight", "network.out.weight"},
        ),
    ],
)
def test_layers(make: Any, data: Any, kept: set[str]) -> None:
    """Of the attention only what calls a linear layer can be pruned, and that is nothing."""
    module, callback = build(make), pruning(0.8, damping=1e-4)
    fit(module, callback, data=DataLoader(data, 4), max_epochs=2)
    assert {name for name, zeros in zeros_of(module).items() if bool(zeros.any())} == kept
    assert {f"sparsity/{name}" for name in kept} < callback.history.keys()
    assert all(bool(p.isfinite().all()) for p in module.parameters())


def test_named_parameters() -> None:
    module = build()
    first, last = module.network[0], module.network[2]
    for chosen in ([(last, "weight"), (first, "bias")], ["network.0.b*", "*2.weight", "*2.weight"]):
        callback = pruning(parameters_to_prune=chosen)
        fit(build() if isinstance(chosen[0], str) else module, callback)
        found = {name for name in callback.history if "/" in name}
        assert found == {"sparsity/network.0.bias", "sparsity/network.2.weight"}
    callback = pruning(parameter_names=["bias", "weight"])
    module = build()
    fit(module, callback)
    assert len([name for name in callback.history if "/" in name]) == 4
    names = [name for name, _ in module.named_parameters()]
    assert names == [name for name, _ in build().named_parameters()]


def test_masks_from_before_stay() -> None:
    module = build()
    prune.l1_unstructured(module.network[0], "weight", 0.25)
    before = module.network[0].weight_mask == 0
    fit(module, pruning(0.5))
    assert sparsity_of(module) == 0.5
    assert bool((module.network[0].weight[before] == 0).all())
    assert not prune.is_pruned(module)


# When


def epochs_and_sparsities(callback: MFACPruning, **settings: Any) -> list[tuple[int, float]]:
    """Fit and return the sparsity that each epoch trained with."""
    seen = EveryBatch(
        lambda trainer: (trainer.current_epoch, round(sparsity_of(trainer.lightning_module), 2))
    )
    fit(build(), callback, seen, **settings)
    return list(dict.fromkeys(seen.notes))


def test_one_shot() -> None:
    assert epochs_and_sparsities(pruning(), max_epochs=3) == [(0, 0.5), (1, 0.5), (2, 0.5)]
    later = pruning(prune_epoch=1)
    assert epochs_and_sparsities(later, max_epochs=3) == [(0, 0.0), (1, 0.5), (2, 0.5)]
    assert later.history["epoch"] == [1]
    assert later.history["step"] == [5]


def test_schedules() -> None:
    schedule = CubicSparsity(0.875, start_epoch=0, end_epoch=4, interval=2)
    assert epochs_and_sparsities(pruning(None, schedule=schedule), max_epochs=6) == [
        (epoch, sparsity) for epoch, sparsity in enumerate([0.0, 0.0, 0.76, 0.76, 0.88, 0.88])
    ]
    # One event fills the room of the last one and has nothing to do.
    schedule = ListSparsity({0: 0.25, 2: 0.5})
    callback = pruning(None, schedule=schedule)
    assert epochs_and_sparsities(callback, max_epochs=3) == [(0, 0.25), (1, 0.25), (2, 0.5)]
    assert callback.history["sparsity"] == [0.25, 0.5]


def test_trial_run_collects_once() -> None:
    rows = []

    class Counting(StockModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            rows.append(in_extra_pass())
            return super().training_step(batch, batch_idx)

    module = build(lambda make: Counting(mlp_module(make).network, make))
    fit(module, pruning(num_recomputations=4), fast_dev_run=True)
    assert rows == [True] * 6 + [False]
    assert sparsity_of(module) == 0.5


# It stays so


def check_kept(module: LightningModule, data: Any, **settings: Any) -> Trainer:
    """Check after every batch that what is pruned is 0 and that the rest is trained."""

    def look(trainer: Trainer) -> Any:
        module = trainer.lightning_module
        now = (trainer.current_epoch, trainer.global_step)
        return now, zeros_of(module), copy.deepcopy(module.state_dict())

    notes = EveryBatch(look)
    schedule = ListSparsity({1: 0.3, 2: 0.6})
    callback = pruning(None, schedule=schedule)
    trainer = fit(module, callback, notes, data=data, max_epochs=3, **settings)
    # Between the batches of one step an optimizer without a backward leaves weights where the loss
    # is evaluated next.
    seen = [
        note for i, note in enumerate(notes.notes) if i == 0 or notes.notes[i - 1][0] != note[0]
    ]
    for (_, before, _), (_, after, _) in itertools.pairwise(seen):
        assert all(bool(after[name][pruned].all()) for name, pruned in before.items())
    assert sparsity_of(module) == pytest.approx(0.6, abs=0.02)
    first = next(weights for (epoch, _), _, weights in seen if epoch == 2)
    _, zeros, last = seen[-1]
    for name, pruned in zeros.items():
        assert bool((first[name] != last[name])[~pruned].any()), "the rest is trained"
    skipped = getattr(trainer.optimizers[0], "stats", {}).get("skipped_steps", 0)
    assert float(skipped) == 0
    return trainer


@every_optimizer
def test_under_every_optimizer(contract: Contract) -> None:
    module = build(optimizer=contract.make)
    check_kept(module, DataLoader(vectors(20), 4, shuffle=True), accumulate_grad_batches=2)


@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize("settings", [{}, {"precision": "bf16-mixed"}, {"precision": "bf16-true"}])
def test_under_optimizers_of_torch(name: str, settings: dict[str, Any]) -> None:
    module = build(norm_dropout_module, TORCH[name])
    data = DataLoader(vectors(20), 4, shuffle=True)
    check_kept(module, data, gradient_clip_val=0.5, **settings)


def test_with_manual_optimization() -> None:
    class Manual(StockModule):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self) -> Any:
            first, last = self.network[0], self.network[2]
            return [momentum_sgd(first.parameters()), momentum_sgd(last.parameters())], []

    module = build(lambda make: Manual(mlp_module(make).network, make))
    module.automatic_optimization = False
    zeros = EveryBatch(lambda trainer: zeros_of(trainer.lightning_module))
    fit(module, pruning(criterion="magnitude", prune_epoch=1), zeros, max_epochs=2)
    assert identical(zeros.notes[6], zeros.notes[-1])
    assert sparsity_of(module) == 0.5


def test_state_of_pruned_weights_is_forgotten() -> None:
    def look(trainer: Trainer) -> Any:
        (optimizer,) = trainer.optimizers
        weights = [p for p in optimizer.param_groups[0]["params"] if p.ndim > 1]
        state = [optimizer.state[p].get("momentum_buffer", p).clone() for p in weights]
        return state, zeros_of(trainer.lightning_module)

    notes = EveryBatch(look)
    fit(build(), pruning(prune_epoch=1), notes, max_epochs=2)
    (before, _), (after, zeros) = notes.notes[5], notes.notes[6]
    for old, new, pruned in zip(before, after, zeros.values(), strict=True):
        assert bool((old[pruned] != 0).all())
        assert bool((new[pruned] == 0).all())
        assert torch.equal(new[~pruned], old[~pruned])


def test_float32_copies_of_weights_follow() -> None:
    """Otherwise the optimizer would put the weights back that the event has changed."""
    module = build(optimizer=lambda params: ZOAdam(params, lr=1e-12, half_precision="master"))
    weights = EveryBatch(weights_of)
    fit(module, pruning(prune_epoch=1), weights, max_epochs=2, precision="bf16-true")
    before, event, after = weights.notes[4], weights.notes[6], weights.notes[-1]
    assert not torch.equal(before["network.0.weight"], event["network.0.weight"])
    assert_bitwise(after, event)


def test_compiled_module() -> None:
    torch._dynamo.reset()
    module, plain = build(), build()
    module.network = torch.compile(module.network, backend="eager")
    callback = pruning(0.8, prune_epoch=1)
    fit(module, callback, max_epochs=3)
    fit(plain, pruning(0.8, prune_epoch=1), max_epochs=3)
    assert {name for name in callback.history if "/" in name} == {
        "sparsity/network.0.weight",
        "sparsity/network.2.weight",
    }
    for p, q in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q)
        assert torch.equal(p == 0, q == 0)


# The module afterwards


def test_module_is_plain_afterwards() -> None:
    module = build()
    ids = {name: id(p) for name, p in module.named_parameters()}
    fit(module, pruning())
    assert {name: id(p) for name, p in module.named_parameters()} == ids
    assert list(module.state_dict()) == list(build().state_dict())
    for layer in module.network:
        assert not layer._forward_pre_hooks
        assert not layer._state_dict_hooks
        assert not layer._load_state_dict_pre_hooks


def test_masks_may_stay() -> None:
    module = build()
    fit(module, pruning(make_pruning_permanent=False))
    assert prune.is_pruned(module)
    assert "network.0.weight_mask" in module.state_dict()
    # Ordinary weights can be loaded, and are masked.
    module.load_state_dict(build().state_dict())
    assert sparsity_of(module) == 0.5
    fit(module, pruning(0.75))
    assert sparsity_of(module) == 0.75
    assert not prune.is_pruned(module)


def test_order_of_parameters_stays() -> None:
    """Averages of weights and states of optimizers know parameters by their number."""
    shapes = EveryBatch(lambda trainer: [p.shape for p in trainer.lightning_module.parameters()])
    module = build()
    before = [p.shape for p in module.parameters()]
    fit(module, pruning(), shapes)
    assert shapes.notes[0] == before


def test_evaluation_afterwards() -> None:
    class Testing(StockModule):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("loss", self.training_step(batch, batch_idx))

    module = build(lambda make: Testing(mlp_module(make).network, make))
    data = DataLoader(vectors(20), 4)
    trainer = fit(module, pruning(), enable_checkpointing=True)
    (expected,) = trainer.test(module, data, verbose=False)
    module.load_state_dict(build().state_dict())
    (loaded,) = trainer.test(module, data, ckpt_path="best", verbose=False)
    assert loaded == expected
    assert sparsity_of(module) == 0.5


# What is told


def test_logged() -> None:
    for per_layer in (False, True):
        logger = RecordingLogger("pruning/")
        schedule = ListSparsity({0: 0.25, 1: 0.5})
        callback = pruning(None, schedule=schedule, per_layer=per_layer)
        fit(build(), callback, logger=logger, max_epochs=2)
        assert logger.steps == [0, 5]
        (_, first), (_, second) = logger.rows
        assert (first["pruning/sparsity"], second["pruning/sparsity"]) == (0.25, 0.5)
        assert first["pruning/predicted_loss_increase"] > 0
        layers = {"pruning/sparsity/network.0.weight", "pruning/sparsity/network.2.weight"}
        assert (layers <= second.keys()) == per_layer
        assert len(second) == (4 if per_layer else 2)
        history = callback.history
        assert history["sparsity"] == [0.25, 0.5]
        assert history["predicted_loss_increase"][1] == second["pruning/predicted_loss_increase"]
    # Without gradients there is no prediction.
    callback = pruning(criterion="magnitude")
    fit(build(), callback)
    assert "predicted_loss_increase" not in callback.history


LINE = "MFACPruning pruned 36 of 72 weights before epoch 0: sparsity 0 -> 0.5; predicted increase"
TABLE = "parameter        | weights | left | sparsity"


@pytest.mark.parametrize(("verbose", "lines", "tables"), [(0, 0, 0), (1, 1, 1), (2, 1, 1)])
def test_said(verbose: Any, lines: int, tables: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        fit(build(), pruning(verbose=verbose))
    assert caplog.text.count(LINE) == lines
    assert caplog.text.count(TABLE) == tables
    assert caplog.text.count("all              |      72 |   36 |   0.5000") == tables


def test_batches_left_out() -> None:
    class Rarely(StockModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if in_extra_pass() and batch_idx == 2 else loss

    module = build(lambda make: Rarely(mlp_module(make).network, make))
    callback = pruning(num_recomputations=2)
    with pytest.warns(RuntimeWarning, match="left out 2 batches without a finite gradient"):
        fit(module, callback)
    assert callback.skipped_batches == 2


def test_nothing_in_this_fit() -> None:
    with pytest.warns(RuntimeWarning, match=r"nothing in the 1 epochs .* ListSparsity\(\{3: 0.5\}"):
        fit(build(), pruning(prune_epoch=3))


def test_picture(tmp_path: Any) -> None:
    logger = CSVLogger(tmp_path, "logs")
    fit(build(), pruning(plot=True), logger=logger)
    assert (tmp_path / "logs" / "version_0" / "pruning.png").read_bytes()[:4] == b"\x89PNG"
    fit(build(), pruning(plot=True, filename="some/name.svg"), default_root_dir=tmp_path)
    assert (tmp_path / "some" / "name.svg").exists()
    fit(build(), pruning(plot=True, filename="no.png"), default_root_dir=tmp_path, fast_dev_run=1)
    late = pruning(plot=True, filename="no.png", prune_epoch=5)
    with pytest.warns(RuntimeWarning, match="prunes nothing"):
        fit(build(), late, default_root_dir=tmp_path)
    assert not (tmp_path / "no.png").exists()
