"""Tests of callbacks/sensitive_parameter_mask.py, squared_gradients.py and quantized_rest.py."""

import contextlib
import copy
import functools
import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_curvature import (
    AdamQLR,
    HiZOO,
    MeZO,
    SensitiveParameterMask,
    ZOMomentum,
    in_extra_pass,
)
from lightning_curvature.callbacks import sensitive_parameter_mask
from lightning_curvature.callbacks.trajectory_log import TrajectoryLog
from lightning_curvature.curvature.sensitive import captured_share, largest_entries
from lightning_curvature.optim.trajectory_replay import replay_trajectory
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
from tests.helpers.probing import ROUTES, assert_bitwise, make_trainer, parameters_and_buffers
from tests.helpers.ranks import RankPool, world
from tests.helpers.resuming import Interrupted, Interruption, Save
from tests.helpers.stateful_loader import StatefulLoader
from tests.helpers.two_ranks import shared_loader, unlike

pytestmark = pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`, callbacks used to create:UserWarning"
)

every_storage = pytest.mark.parametrize("quantize", ["none", "int8", "int4"])


def making(kind: type[MeZO] = MeZO, **options: Any) -> Callable[[Any], Any]:
    return functools.partial(kind, **{"lr": 0.05, **options})


def build(
    make_module: Callable[..., LightningModule] = mlp_module, kind: Any = MeZO, **options: Any
) -> LightningModule:
    """Build a module, with reproducible weights."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return make_module(making(kind, **options))


def loader(**settings: Any) -> DataLoader[Any]:
    return DataLoader(vectors(20), **{"batch_size": 4, **settings})


def fit(
    module: LightningModule,
    *callbacks: Callback,
    data: Any = None,
    route: str = "strategy",
    ckpt_path: Path | None = None,
    **settings: Any,
) -> Trainer:
    torch.manual_seed(3)
    trainer = make_trainer(route, callbacks=callbacks, **settings)
    trainer.fit(module, loader() if data is None else data, ckpt_path=ckpt_path)
    return trainer


def masks_of(trainer: Trainer) -> list[Tensor]:
    """Return the masks by parameter, in the order of the groups."""
    (optimizer,) = trainer.optimizers
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [optimizer.state[p]["mask"] for p in params]


class Notes(Callback):
    """Calls a function before the first batch, or before each."""

    def __init__(self, note: Callable[[Trainer], Any], every: bool = False) -> None:
        self.note, self.every = note, every
        self.notes: list[Any] = []

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        """Note."""
        if self.every or not self.notes:
            self.notes.append(self.note(trainer))


# The choice


@pytest.mark.parametrize("route", ROUTES)
def test_entries_of_largest_squared_gradient(route: str) -> None:
    module, mask = build(), SensitiveParameterMask(0.1, num_batches=3)
    reference = copy.deepcopy(module)
    squares = [torch.zeros_like(p) for p in reference.parameters()]
    for _, (x, y) in zip(range(3), loader(), strict=False):
        grads = torch.autograd.grad(F.cross_entropy(reference(x), y), list(reference.parameters()))
        for total, grad in zip(squares, grads, strict=True):
            total.add_(grad.square() / 3)
    expected = largest_entries(dict(enumerate(squares)), 0.1)
    trainer = fit(module, mask, route=route)
    assert [found.tolist() for found in masks_of(trainer)] == [
        positions.tolist() for positions in expected.values()
    ]
    sizes = [p.numel() for p in module.parameters()]
    assert mask.num_entries == round(0.1 * sum(sizes))
    assert mask.num_candidates == sum(sizes)
    assert mask.captured_share == pytest.approx(
        captured_share(dict(enumerate(squares)), expected), rel=1e-5
    )


def test_largest_and_random_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(sensitive_parameter_mask, "squared_gradients")
    module = build()
    weights = {i: p.detach().clone() for i, p in enumerate(module.parameters())}
    mask = SensitiveParameterMask(0.2, criterion="magnitude")
    expected = list(largest_entries(weights, 0.2).values())
    assert unlike(masks_of(fit(module, mask)), expected) == []
    assert mask.captured_share is None
    found = [
        masks_of(fit(build(), SensitiveParameterMask(0.2, criterion="random", seed=seed)))
        for seed in (0, 0, 1)
    ]
    assert unlike(found[0], found[1]) == []
    assert unlike(found[0], found[2]) != []
    assert sum(len(positions) for positions in found[0]) == mask.num_entries


@every_storage
@pytest.mark.parametrize("kind", [MeZO, HiZOO])
def test_only_chosen_entries_change(kind: Any, quantize: Any) -> None:
    module, mask = build(kind=kind), SensitiveParameterMask(0.05, quantize=quantize)
    start = Notes(lambda trainer: copy.deepcopy(trainer.lightning_module.state_dict()))
    trainer = fit(module, mask, start)
    changed = 0
    for (name, p), positions in zip(module.named_parameters(), masks_of(trainer), strict=True):
        moved = (p.detach() != start.notes[0][name]).view(-1).nonzero().view(-1)
        assert set(moved.tolist()) <= set(positions.tolist())
        changed += len(moved)
    assert changed == mask.num_entries
    state = trainer.optimizers[0].state
    sizes = [len(positions) for positions in masks_of(trainer)]
    assert 0 in sizes, "some parameter has no chosen entry"
    kept = [len(of.get("hess_diag", ())) for of in state.values()]
    assert kept == (sizes if kind is HiZOO else [0] * len(sizes))


def test_all_entries_train_as_without() -> None:
    """With everything chosen, training must not notice that anything was measured."""
    losses: list[list[float]] = []
    results = []
    for callbacks in ([], [SensitiveParameterMask(1.0)]):
        module = build(norm_dropout_module)
        module.seen = []
        data = loader(shuffle=True, generator=torch.Generator().manual_seed(8))
        seen = Notes(lambda trainer: torch.get_rng_state().sum().item(), every=True)
        trainer = fit(module, *callbacks, seen, data=data, max_epochs=2)
        assert all(p.grad is None for p in module.parameters())
        results.append(parameters_and_buffers(module))
        losses.append([float(trainer.optimizers[0].stats["loss"]), *seen.notes])
    assert_bitwise(*results)
    assert losses[0] == losses[1]


@pytest.mark.parametrize("settings", [{}, {"num_workers": 1, "persistent_workers": True}])
def test_order_of_training_batches_stays(settings: dict[str, Any]) -> None:
    class Watching(StockModule):
        seen: list[Any]

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if not in_extra_pass():
                self.seen.append((batch_idx, batch[0].sum().item()))
            self.log("rows", float(len(batch[0])), on_epoch=True, reduce_fx="sum")
            return super().training_step(batch, batch_idx)

    found = []
    for callbacks in ([], [SensitiveParameterMask(0.5, num_batches=3, update_interval=2)]):
        module = build(lambda make: Watching(mlp_module(make).network, make))
        module.seen = []
        data = loader(shuffle=True, **settings)
        trainer = fit(module, *callbacks, data=data, max_epochs=2)
        found.append((module.seen, trainer.callback_metrics))
    assert found[0] == found[1]
    assert len(found[0][0]) == 10


def test_evaluated_in_the_mode_of_the_optimizer() -> None:
    modes = []

    class Watching(StockModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if torch.is_grad_enabled():
                modes.append(self.training)
            return super().training_step(batch, batch_idx)

    for mode in ("train", "eval"):
        module = build(lambda make: Watching(mlp_module(make).network, make), model_mode=mode)
        fit(module, SensitiveParameterMask(0.1, num_batches=1))
    assert modes == [True, False]
    assert module.training


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
@every_storage
def test_precision(precision: Any, quantize: Any) -> None:
    module = build(conv_module)
    data = DataLoader(images(8), batch_size=4)
    mask = SensitiveParameterMask(0.1, quantize=quantize)
    fit(module, mask, data=data, precision=precision)
    expected = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)
    assert {p.dtype for p in module.parameters()} == {expected}
    assert all(bool(p.isfinite().all()) for p in module.parameters())


def test_several_loaders_and_few_batches() -> None:
    class Two(StockModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return sum(super(Two, self).training_step(part, batch_idx) for part in batch.values())

    module = build(lambda make: Two(mlp_module(make).network, make))
    data = {"a": loader(shuffle=True), "b": loader(batch_size=10)}
    mask = SensitiveParameterMask(0.1, num_batches=100)
    fit(module, mask, data=data, limit_train_batches=3)
    assert mask.num_entries == round(0.1 * (mask.num_candidates or 0))


def test_groups_trained_by_gradients_stay_whole() -> None:
    def make(params: Any) -> MeZO:
        first, *rest = params
        return MeZO([{"params": [first]}, {"params": rest, "first_order": True}], lr=0.05)

    module, mask = mlp_module(make), SensitiveParameterMask(0.1, quantize="int8")
    start = {name: p.detach().clone() for name, p in module.named_parameters()}
    trainer = fit(module, mask)
    assert mask.num_candidates == 40
    assert mask.num_entries == 4
    assert all(bool((p != start[name]).any()) for name, p in module.named_parameters())
    assert [("mask" in of) for of in trainer.optimizers[0].state.values()][:1] == [True]


def test_what_is_told(caplog: pytest.LogCaptureFixture) -> None:
    logger, mask = RecordingLogger(), SensitiveParameterMask(0.1)
    with caplog.at_level("INFO"):
        fit(build(), mask, logger=logger)
    (metrics,) = [row for _, row in logger.rows if "curvature/trained_entries" in row]
    assert metrics["curvature/trained_entries"] == mask.num_entries == 8
    assert metrics["curvature/trained_fraction"] == pytest.approx(0.1, abs=0.01)
    assert metrics["curvature/captured_share"] == mask.captured_share
    assert "SensitiveParameterMask trains 8 of 84 entries (9.52 %), which carry" in caplog.text


# Anew


@pytest.mark.parametrize("criterion", ["fisher", "random"])
def test_chosen_anew(criterion: Any) -> None:
    mask = SensitiveParameterMask(0.2, criterion, update_interval=2)
    notes = Notes(masks_of, every=True)
    fit(build(), mask, notes, accumulate_grad_batches=2, max_epochs=4)
    # Five batches per epoch: steps of two, two and one batch.
    seen = [
        torch.cat([m + 1000 * i for i, m in enumerate(masks)]).tolist() for masks in notes.notes
    ]
    steps = [3 * epoch + number for epoch in range(4) for number in (0, 0, 1, 1, 2)]
    by_period: dict[int, list[Any]] = {}
    for step, entries in zip(steps, seen, strict=True):
        by_period.setdefault(step // 2, []).append(entries)
    assert all(entries == period[0] for period in by_period.values() for entries in period)
    assert len({tuple(period[0]) for period in by_period.values()}) > 1


def test_entries_that_stay_keep_their_state() -> None:
    p = torch.nn.Parameter(torch.arange(10.0))
    optimizer = ZOMomentum([p])
    optimizer.set_mask(p, torch.tensor([1, 4, 7]))
    optimizer.state[p]["momentum_buffer"] = torch.tensor([1.0, 2.0, 6.0])
    optimizer.state[p]["layer_scale"] = torch.tensor(5.0)
    optimizer.state[p]["master"] = torch.tensor([1.5, 4.5, 7.5])
    optimizer.set_mask(p, torch.tensor([9, 4, 7, 0]))
    state = optimizer.state[p]
    assert state["mask"].tolist() == [0, 4, 7, 9]
    assert state["momentum_buffer"].tolist() == [4.0, 2.0, 6.0, 4.0]
    assert state["master"].tolist() == [0.0, 4.5, 7.5, 9.0]
    assert state["layer_scale"] == 5
    optimizer.set_mask(p, torch.tensor([3]))
    assert list(optimizer.state[p]) == ["mask"]


# Resume


def run(
    mask: SensitiveParameterMask,
    kind: Any,
    *callbacks: Callback,
    ckpt_path: Path | None = None,
    data: StatefulLoader | None = None,
    **options: Any,
) -> tuple[dict[str, Tensor], Any]:
    module = build(kind=kind, **options)
    data = StatefulLoader(vectors(20)) if data is None else data
    trainer = make_trainer("strategy", callbacks=[mask, *callbacks], max_epochs=3)
    with contextlib.suppress(Interrupted):
        trainer.fit(module, data, ckpt_path=ckpt_path)
    return module.state_dict(), trainer.optimizers[0].state_dict()


@every_storage
@pytest.mark.parametrize("kind", [MeZO, HiZOO])
def test_resumes_bit_for_bit(
    kind: Any, quantize: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.ckpt"
    make = functools.partial(SensitiveParameterMask, 0.2, quantize=quantize)
    first = make()
    weights, state = run(first, kind, Save(path, 7))
    run(make(), kind, Save(tmp_path / "same.ckpt", 7), Interruption(9))
    # Nothing is measured again.
    monkeypatch.delattr(sensitive_parameter_mask, "squared_gradients")
    resumed = make()
    found = run(resumed, kind, ckpt_path=path)
    assert_bitwise(found[0], weights)
    assert unlike(found[1], state) == []
    assert resumed.captured_share == first.captured_share
    assert resumed.num_entries == first.num_entries == 17


def test_resumes_with_choices_to_come(tmp_path: Path) -> None:
    for step in (5, 6):
        path = tmp_path / f"{step}.ckpt"
        make = functools.partial(SensitiveParameterMask, 0.2, update_interval=3)
        weights, state = run(make(), HiZOO, Save(path, step))
        found = run(make(), HiZOO, ckpt_path=path)
        assert_bitwise(found[0], weights)
        assert unlike(found[1], state) == []


@every_storage
def test_checkpoint_is_an_ordinary_one(quantize: Any, tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    mask = SensitiveParameterMask(0.2, quantize=quantize)
    outputs = []
    x = vectors(6).tensors[0]

    class Look(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.save_checkpoint(path, weights_only=True)
            with torch.no_grad():
                outputs.append(pl_module(x))

    weights, _ = run(mask, MeZO, Look())
    state = torch.load(path, weights_only=True)["state_dict"]
    assert_bitwise(state, weights)
    fresh = build()
    fresh.load_state_dict(state)
    assert torch.equal(fresh(x), outputs[0])


def test_a_quantized_run_may_go_on_without(tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    run(SensitiveParameterMask(0.2, quantize="int4"), HiZOO, Save(path, 4))
    weights, _ = run(SensitiveParameterMask(0.2), HiZOO, ckpt_path=path)
    assert all(bool(weight.isfinite().all()) for weight in weights.values())


@every_storage
def test_module_is_whole_after_an_exception(quantize: Any) -> None:
    module, mask = build(), SensitiveParameterMask(0.2, quantize=quantize)
    names = {name: (id(p), p.shape) for name, p in module.named_parameters()}
    with pytest.raises(Interrupted):
        fit(module, mask, Interruption(3))
    assert {name: (id(p), p.shape) for name, p in module.named_parameters()} == names
    assert not module._state_dict_hooks
    fit(module, mask)  # and can be trained again


def test_frozen_weights_are_quantized() -> None:
    module = build(transformer_module)
    for p in module.network.layer.parameters():
        p.requires_grad_(False)
    sizes = Notes(lambda trainer: sum(p.numel() for p in trainer.lightning_module.parameters()))
    before = sum(p.numel() for p in module.parameters())
    small = sum(p.numel() for p in module.parameters() if p.ndim < 2)
    position = module.network.position.numel()
    mask = SensitiveParameterMask(0.01, quantize="int8")
    fit(module, mask, sizes, data=DataLoader(sequences(8), batch_size=4))
    assert sizes.notes[0] <= small + position + (mask.num_entries or 0)
    assert sum(p.numel() for p in module.parameters()) == before


# Ranks


def fit_on_this_rank(quantize: Any) -> tuple[dict[str, Tensor], list[Tensor], float | None]:
    rank, ranks = world()
    torch.manual_seed(5 + rank)
    module = build(norm_dropout_module)
    mask = SensitiveParameterMask(0.1, quantize=quantize, update_interval=None)
    trainer = make_trainer(
        "none",
        strategy="ddp_curvature",
        devices=ranks,
        callbacks=[mask],
        use_distributed_sampler=False,
    )
    trainer.fit(module, shared_loader(vectors(40), 8))
    return dict(module.named_parameters()), masks_of(trainer), mask.captured_share


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_all_ranks_choose_the_same(ranks: RankPool, quantize: str) -> None:
    first, second = ranks.run(fit_on_this_rank, quantize)
    assert unlike(first, second) == []
    assert 0 < first[2] < 1


# Errors


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"fraction": 0}, ValueError, "Invalid fraction=0: must be in (0, 1]."),
        ({"fraction": 1.5}, ValueError, "Invalid fraction=1.5: must be in (0, 1]."),
        ({"criterion": "grasp"}, ValueError, "Invalid criterion='grasp': must be one of 'fisher'"),
        ({"num_batches": 0}, ValueError, "Invalid num_batches=0"),
        ({"update_interval": 0}, ValueError, "Invalid update_interval=0"),
        ({"seed": -1}, ValueError, "Invalid seed=-1: must be >= 0."),
        ({"quantize": "int2"}, ValueError, "Invalid quantize='int2'"),
        (
            {"quantize": "int8", "update_interval": 5},
            ValueError,
            "Invalid update_interval=5: with quantize='int8' the entries stay the same",
        ),
    ],
)
def test_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        SensitiveParameterMask(**arguments)
    assert message in str(caught.value)


def test_needs_a_zeroth_order_optimizer() -> None:
    with pytest.raises(MisconfigurationException, match="such as MeZO or HiZOO, got AdamQLR"):
        fit(mlp_module(AdamQLR), SensitiveParameterMask())


def test_log_of_quantized_weights(tmp_path: Path) -> None:
    log = TrajectoryLog(dirpath=str(tmp_path))
    with pytest.raises(MisconfigurationException, match="cannot log a run with quantized weights"):
        fit(build(), log, SensitiveParameterMask(quantize="int8"))


@pytest.mark.parametrize("update_interval", [None, 2])
def test_log_holds_the_entries(update_interval: int | None, tmp_path: Path) -> None:
    module, log = build(kind=HiZOO), TrajectoryLog(dirpath=str(tmp_path))
    fit(module, log, SensitiveParameterMask(0.2, update_interval=update_interval))
    again = build(kind=HiZOO)
    replay_trajectory(again, again.configure_optimizers(), log.trajectory)
    assert_bitwise(again.state_dict(), module.state_dict())


def test_manual_optimization() -> None:
    class Manual(StockModule):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            (optimizer,) = [self.optimizers()]
            optimizer.step(lambda: super(Manual, self).training_step(batch, batch_idx))

    def make(make_optimizer: Any) -> Manual:
        module = Manual(mlp_module(make_optimizer).network, make_optimizer)
        module.automatic_optimization = False
        return module

    with pytest.raises(MisconfigurationException, match="manual optimization"):
        fit(build(make), SensitiveParameterMask())
    mask = SensitiveParameterMask(0.1, criterion="magnitude")
    fit(build(make), mask)
    assert mask.num_entries == 8


def test_loader_that_ends_for_good() -> None:
    class Once:
        def __init__(self) -> None:
            self.batches = iter(loader())

        def __iter__(self) -> Iterator[Any]:
            return self

        def __next__(self) -> Any:
            return next(self.batches)

    with pytest.raises(MisconfigurationException, match="a Once, can be iterated only once"):
        fit(build(), SensitiveParameterMask(), data=Once())
    fit(build(), SensitiveParameterMask(criterion="random"), data=Once())


def test_no_loss() -> None:
    class NoLoss(StockModule):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            return None

    module = build(lambda make: NoLoss(mlp_module(make).network, make))
    with pytest.raises(MisconfigurationException, match="no batch for which training_step"):
        fit(module, SensitiveParameterMask())


def test_squared_gradients_that_are_not_finite() -> None:
    module = build(lambda make: mlp_module(make, loss=lambda x, y: x.sum() * math.nan))
    with pytest.raises(RuntimeError, match="Squared gradients of 8 batches are not all finite"):
        fit(module, SensitiveParameterMask())


def test_pickle_and_repr() -> None:
    mask = SensitiveParameterMask(0.1, quantize="int8")
    fit(build(), mask)
    again = pickle.loads(pickle.dumps(mask))
    assert repr(again) == repr(mask) == "SensitiveParameterMask(fraction=0.1, quantize='int8')"
    assert again.num_entries == mask.num_entries
    assert again._last is None
