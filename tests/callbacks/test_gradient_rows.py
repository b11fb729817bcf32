"""Tests of callbacks/gradient_rows.py, extra_batches.py and collection_progress.py."""

import copy
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_curvature import in_extra_pass
from lightning_curvature.callbacks.collection_progress import collection_progress
from lightning_curvature.callbacks.gradient_rows import GradientRows, gradient_rows
from tests.helpers.modules import (
    Everything,
    StockModule,
    images,
    mlp_module,
    norm_dropout_module,
    vectors,
)
from tests.helpers.probing import assert_bitwise, make_trainer, parameters_and_buffers
from tests.helpers.ranks import RankPool, world
from tests.helpers.stateful_loader import StatefulLoader


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


def build(make: Callable[..., LightningModule] = mlp_module, **options: Any) -> LightningModule:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return make(sgd, **options)


class Collect(Callback):
    """Collects rows before every epoch, or before some batch of it."""

    def __init__(self, num_grads: int, *, before: int | None = None, **options: Any) -> None:
        self.num_grads, self.before, self.options = num_grads, before, options
        self.found: list[GradientRows] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.before is None:
            self.collect(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.before == batch_idx:
            self.collect(trainer)

    def collect(self, trainer: Trainer) -> None:
        params = list(trainer.lightning_module.parameters())
        options = {"key": (0,), **self.options}
        self.found.append(
            gradient_rows(trainer, params, self.num_grads, *options.pop("key"), **options)
        )


def collect(module: LightningModule, data: Any, num_grads: int, **options: Any) -> GradientRows:
    """Collect rows before the first batch of a fit."""
    settings = options.pop("settings", {})
    callback = Collect(num_grads, **options)
    make_trainer("none", callbacks=[callback], **settings).fit(module, data)
    return callback.found[0]


def batches(data: TensorDataset, size: int) -> list[list[Tensor]]:
    return [list(part) for part in zip(*(t.split(size) for t in data.tensors), strict=True)]


def expected_rows(module: LightningModule, data: TensorDataset, size: int) -> Tensor:
    """Return the gradients of consecutive batches in eval mode, one by one."""
    module = copy.deepcopy(module).eval()
    params = list(module.parameters())
    rows = []
    for x, y in batches(data, size):
        grads = torch.autograd.grad(F.cross_entropy(module(x), y), params)
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


# The rows


def test_one_row_per_batch_in_eval_mode() -> None:
    module = build(norm_dropout_module)
    expected = expected_rows(module, vectors(20), 4)
    found = collect(module, DataLoader(vectors(20), batch_size=4), 5)
    assert found.rows.dtype is torch.float32
    assert found.rows.device.type == "cpu"
    torch.testing.assert_close(found.rows, expected)
    assert found.skipped == 0


@pytest.mark.parametrize("positions", [[0, 3, 39, 40, 47, 48, 83], [41, 42], []])
def test_survivors_only(positions: list[int]) -> None:
    """Weights 0 to 39 are of the first layer, 40 to 47 its bias, 48 to 79 of the second."""
    module, at = build(), torch.tensor(positions, dtype=torch.int64)
    expected = expected_rows(module, vectors(20), 4)[:, at]
    found = collect(module, DataLoader(vectors(20), batch_size=4), 5, positions=at)
    torch.testing.assert_close(found.rows, expected)


@pytest.mark.parametrize("num_grads", [1, 5, 6, 13])
def test_loader_is_iterated_again(num_grads: int) -> None:
    """The code of the authors stops one gradient early, and leaves zeros when the loader ends."""
    module = build()
    expected = expected_rows(module, vectors(20), 4)
    found = collect(module, DataLoader(vectors(20), batch_size=4), num_grads)
    torch.testing.assert_close(found.rows, expected[torch.arange(num_grads) % 5])
    assert found.rows.norm(dim=1).min() > 0.01


def test_limited_batches() -> None:
    module = build()
    expected = expected_rows(module, vectors(20), 4)[[0, 1, 0, 1]]
    data = DataLoader(vectors(20), batch_size=4)
    found = collect(module, data, 4, settings={"limit_train_batches": 2})
    torch.testing.assert_close(found.rows, expected)


@pytest.mark.parametrize("size", [1, 3, 20])
def test_other_batch_size(size: int) -> None:
    module = build()
    # Two examples are left over by batches of three.
    expected = expected_rows(module, vectors(20), size)[: 20 // size]
    data = DataLoader(vectors(20), batch_size=4, drop_last=True)
    found = collect(module, data, len(expected), batch_size=size)
    torch.testing.assert_close(found.rows, expected)


def test_single_examples_average_to_the_whole() -> None:
    module = build()
    whole = expected_rows(module, vectors(20), 20)[0]
    found = collect(module, DataLoader(vectors(20), batch_size=4, shuffle=True), 20, batch_size=1)
    torch.testing.assert_close(found.rows.mean(0), whole)
    # Every example once.
    assert len({tuple(row.tolist()) for row in found.rows}) == 20


def test_several_loaders_with_another_batch_size() -> None:
    class Two(StockModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            assert [len(part[0]) for part in batch.values()] == (
                [2, 2] if in_extra_pass() else [4, 5]
            )
            return sum(super(Two, self).training_step(part, batch_idx) for part in batch.values())

    module = build(lambda make: Two(mlp_module(make).network, make))
    data = {
        name: DataLoader(vectors(20), batch_size=size) for name, size in {"a": 4, "b": 5}.items()
    }
    found = collect(module, data, 3, batch_size=2)
    expected = expected_rows(module, vectors(20), 2)[:3] * 2
    assert found.rows.shape == expected.shape


def test_order_depends_on_the_key() -> None:
    data = DataLoader(vectors(20), batch_size=4, shuffle=True)
    rows = [collect(build(), data, 5, key=key).rows for key in [(0, 1), (0, 1), (0, 2)]]
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])
    own = DataLoader(vectors(20), 4, shuffle=True, generator=torch.Generator().manual_seed(5))
    rows = [collect(build(), own, 5, key=key).rows for key in [(0, 1), (0, 1), (0, 2)]]
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])


@pytest.mark.parametrize("generator", [None, torch.Generator()])
def test_second_round_has_another_order(generator: torch.Generator | None) -> None:
    data = DataLoader(vectors(20), batch_size=4, shuffle=True, generator=generator)
    first, second = collect(build(), data, 10).rows.split(5)
    assert not torch.equal(first, second)


def test_sampler_stays_with_another_batch_size() -> None:
    module = build()
    expected = expected_rows(module, vectors(20), 1)[[7, 2, 11]]
    data = DataLoader(vectors(20), batch_size=3, sampler=[7, 2, 11])
    torch.testing.assert_close(collect(module, data, 3, batch_size=1).rows, expected)


def test_stateful_loader_in_the_middle_of_an_epoch() -> None:
    """Its place is that of training: what is left of the epoch is iterated over and over."""
    seen = []

    class Watching(StockModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if not in_extra_pass():
                seen.append(batch[0].sum().item())
            return super().training_step(batch, batch_idx)

    found = []
    for callbacks in ([], [Collect(7, before=2)]):
        seen.clear()
        module = build(lambda make: Watching(mlp_module(make).network, make))
        make_trainer("none", callbacks=callbacks).fit(module, StatefulLoader(vectors(20)))
        found.append(list(seen))
    assert found[0] == found[1]
    assert len(callbacks[0].found[0].rows) == 7


def test_parameters_without_a_gradient_and_sparse_ones() -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(3, 4, sparse=True)
            self.unused = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.table(torch.zeros(len(x), dtype=torch.int64))

    module = build(lambda make: StockModule(Partly(), make))
    rows = collect(module, DataLoader(vectors(20), batch_size=4), 2).rows
    assert rows.shape == (2, 18)
    assert bool((rows[:, :4] != 0).all())
    assert bool((rows[:, 4:] == 0).all())


@pytest.mark.parametrize(
    ("precision", "tolerance"), [("bf16-mixed", 0.05), ("bf16-true", 0.05), ("64-true", 1e-6)]
)
def test_precision(precision: Any, tolerance: float) -> None:
    module = build()
    expected = expected_rows(module, vectors(20), 4)
    data = DataLoader(vectors(20), batch_size=4)
    rows = collect(module, data, 5, settings={"precision": precision}).rows
    assert rows.dtype is torch.float32
    assert float((rows - expected).norm() / expected.norm()) < tolerance


def test_scaled_losses() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0)
    plugin = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
    module = build(loss=lambda x, y: 1e-7 * F.cross_entropy(x, y))
    expected = 1e-7 * expected_rows(module, vectors(20), 4)
    data = DataLoader(vectors(20), batch_size=4)
    rows = collect(module, data, 5, settings={"plugins": [plugin]}).rows
    # Without the scale half of them would be 0 in float16.
    assert float((rows - expected).norm() / expected.norm()) < 0.02


# No trace


@pytest.mark.parametrize(
    ("options", "workers"),
    [
        ({}, 0),
        ({"before": 2}, 0),
        ({"before": 1, "batch_size": 1}, 0),
        ({"before": 1, "batch_size": 1}, 1),
    ],
)
def test_training_does_not_notice(options: dict[str, Any], workers: int) -> None:
    found = []
    for callbacks in ([], [Collect(7, **options)]):
        seed_everything(3, verbose=False)
        module = build(Everything, spectral=False)
        data = DataLoader(images(20), 4, shuffle=True, num_workers=workers)
        trainer = make_trainer("none", callbacks=callbacks, max_epochs=2)
        trainer.fit(module, data, DataLoader(images(8), 4))
        state = parameters_and_buffers(module)
        found.append((state, trainer.callback_metrics, (torch.rand(3), random.random())))
    assert len(callbacks[0].found) == 2
    assert_bitwise(found[1][0], found[0][0])
    assert_bitwise(found[1][1], found[0][1])
    assert torch.equal(found[1][2][0], found[0][2][0])
    assert found[1][2][1] == found[0][2][1]


def test_mode_and_gradients_stay() -> None:
    modes = []

    class Watching(StockModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            modes.append((in_extra_pass(), self.network[0].training))
            return super().training_step(batch, batch_idx)

    class Gradients(Callback):
        def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
            before = [p.grad.clone() for p in pl_module.parameters()]
            Collect(3).collect(trainer)
            after = [p.grad for p in pl_module.parameters()]
            assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
            assert pl_module.training

    module = build(lambda make: Watching(norm_dropout_module(make).network, make))
    data = DataLoader(vectors(4), batch_size=4)
    make_trainer("none", callbacks=[Gradients()]).fit(module, data)
    assert modes == [(False, True), (True, False), (True, False), (True, False)]


# What is not finite


class Doubtful(StockModule):
    """Some losses are not finite, some are none."""

    bad: Callable[[Tensor, int], Any]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return self.bad(loss, batch_idx) if in_extra_pass() else loss


def doubtful(bad: Callable[[Tensor, int], Any]) -> LightningModule:
    module = build(lambda make: Doubtful(mlp_module(make).network, make))
    module.bad = bad
    return module


@pytest.mark.parametrize(
    "bad",
    [
        lambda loss, i: loss * math.nan if i % 3 == 0 else loss,
        lambda loss, i: None if i % 3 == 0 else loss,
        # The loss is finite, its gradient is not.
        lambda loss, i: (loss * 0).sqrt() + loss if i % 3 == 0 else loss,
    ],
)
def test_batches_without_a_finite_gradient(bad: Callable[[Tensor, int], Any]) -> None:
    module = doubtful(bad)
    expected = expected_rows(module, vectors(20), 4)
    found = collect(module, DataLoader(vectors(20), batch_size=4), 6)
    # Numbers 0, 3, 6 are left out of 0, 1, 2, ... 8.
    torch.testing.assert_close(found.rows, expected[[1, 2, 4, 0, 2, 3]])
    assert found.skipped == 3


@pytest.mark.parametrize("bad", [lambda loss, i: loss * math.inf, lambda loss, i: None])
def test_no_finite_gradient(bad: Callable[[Tensor, int], Any]) -> None:
    with pytest.raises(RuntimeError, match=r"of \d batches in a row none had a loss .* finite"):
        collect(doubtful(bad), DataLoader(vectors(20), batch_size=4), 6)


def test_endless_loader_without_a_finite_gradient() -> None:
    with pytest.raises(RuntimeError, match="of 100 batches in a row none"):
        collect(
            doubtful(lambda loss, i: loss * math.nan),
            DataLoader(Endless(), batch_size=2),
            6,
            settings={"max_steps": 1},
        )


# Loaders


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        while True:
            yield torch.ones(5), 0


def test_stream() -> None:
    module = build()
    x, y = torch.ones(1, 5), torch.zeros(1, dtype=torch.int64)
    expected = expected_rows(module, TensorDataset(x, y), 1).expand(3, -1)
    data = DataLoader(Endless(), batch_size=2)
    for size in (None, 1):
        found = collect(module, data, 3, batch_size=size, settings={"max_steps": 1})
        module = build()
        torch.testing.assert_close(found.rows, expected)


class CollatingLoader(DataLoader[Any]):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, collate_fn=self.collate, **kwargs)

    @staticmethod
    def collate(rows: list[Any]) -> Any:
        return 2 * torch.stack([x for x, _ in rows]), torch.stack([y for _, y in rows])


def test_subclass_of_a_loader() -> None:
    module = build()
    x, y = vectors(20).tensors
    expected = expected_rows(module, TensorDataset(2 * x, y), 2)[:3]
    found = collect(module, CollatingLoader(vectors(20), batch_size=4), 3, batch_size=2)
    torch.testing.assert_close(found.rows, expected)


class OddLoader(DataLoader[Any]):
    def __iter__(self) -> Any:
        return super().__iter__()


class OwnBatches:
    def __iter__(self) -> Iterator[list[int]]:
        return iter([[0, 1], [2, 3]])

    def __len__(self) -> int:
        return 2


class WholeBatches(TensorDataset):
    def __getitem__(self, index: int) -> Any:
        return tuple(tensor[index : index + 1] for tensor in self.tensors)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (lambda: StatefulLoader(vectors(20)), "a StatefulLoader, .* is no DataLoader of torch"),
        (lambda: OddLoader(vectors(20), 4), "an? OddLoader, .* has an __iter__ of its own"),
        (
            lambda: DataLoader(vectors(20), batch_sampler=OwnBatches()),
            "a DataLoader, .* has batches made by a OwnBatches",
        ),
        (
            lambda: DataLoader(WholeBatches(*vectors(20).tensors), batch_size=None),
            "a DataLoader, .* has batch_size=None",
        ),
    ],
)
def test_loaders_that_cannot_be_made_again(data: Callable[[], Any], reason: str) -> None:
    with pytest.raises(MisconfigurationException, match=reason) as caught:
        collect(build(), data(), 3, batch_size=1)
    assert "cannot be made again with fisher_batch_size=1" in str(caught.value)
    assert len(collect(build(), data(), 3).rows) == 3


def test_loader_that_ends_for_good() -> None:
    class Once:
        def __init__(self) -> None:
            self.batches = iter(DataLoader(vectors(20), batch_size=4))

        def __iter__(self) -> Iterator[Any]:
            return self

        def __next__(self) -> Any:
            return next(self.batches)

    with pytest.raises(
        MisconfigurationException, match=r"a Once, can be .* gradients of pruning need"
    ):
        collect(build(), Once(), 3)


class Twice(IterableDataset[Any]):
    """Has something for Lightning, and nothing for others."""

    def __iter__(self) -> Iterator[Any]:
        return iter([] if in_extra_pass() else [(torch.ones(5), 0)] * 4)


def test_empty_loader() -> None:
    with pytest.raises(MisconfigurationException, match="the train loader gave no batch"):
        collect(build(), DataLoader(Twice(), batch_size=2), 3)


# The bar


class Bars(TQDMProgressBar):
    """Notes what is shown beside the bar of training."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Any] = []

    def init_validation_tqdm(self) -> Any:
        bar = super().init_validation_tqdm()
        self.made.append(bar)
        return bar


class Count(Callback):
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with collection_progress(trainer, "Collecting", 3) as advance:
            for _ in range(3):
                advance()


def test_bar(capsys: pytest.CaptureFixture[str]) -> None:
    bars = Bars()
    trainer = make_trainer("none", callbacks=[Count(), bars], enable_progress_bar=True)
    trainer.fit(build(), DataLoader(vectors(4), batch_size=4))
    (bar,) = bars.made
    assert (bar.n, bar.total, bar.leave) == (3, 3, False)
    assert "Collecting" in capsys.readouterr().out


def test_bar_is_hidden(capsys: pytest.CaptureFixture[str]) -> None:
    data = DataLoader(vectors(4), batch_size=4)
    make_trainer("none", callbacks=[Count()]).fit(build(), data)
    off = TQDMProgressBar(refresh_rate=0)
    make_trainer("none", callbacks=[Count(), off], enable_progress_bar=True).fit(build(), data)
    assert "Collecting" not in capsys.readouterr().out


# Ranks


def collect_here(num_grads: int, bad_on: int | None = None) -> tuple[GradientRows, Tensor, int]:
    rank, ranks = world()
    calls = []

    class Counting(StockModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            if in_extra_pass():
                calls.append(batch_idx)
                return loss * math.nan if rank == bad_on and batch_idx == 1 else loss
            return loss

    module = build(lambda make: Counting(mlp_module(make).network, make))
    expected = expected_rows(module, vectors(24), 4)
    data = DataLoader(vectors(24), batch_sampler=torch.arange(24).view(6, 4)[rank::ranks].tolist())
    settings = {"strategy": "ddp", "devices": ranks, "use_distributed_sampler": False}
    found = collect(module, data, num_grads, settings=settings)
    return found, expected, len(calls)


@pytest.mark.ddp
def test_ranks_share_the_gradients(ranks: RankPool) -> None:
    (first, expected, calls), (second, _, calls_too) = ranks.run(collect_here, 5)
    torch.testing.assert_close(first.rows, expected[[0, 2, 4]])
    torch.testing.assert_close(second.rows, expected[[1, 3]])
    # The same number of training steps: they may hold collectives.
    assert calls == calls_too == 3


@pytest.mark.ddp
def test_a_batch_counts_on_all_ranks_or_none(ranks: RankPool) -> None:
    (first, expected, _), (second, _, _) = ranks.run(collect_here, 4, bad_on=1)
    torch.testing.assert_close(first.rows, expected[[0, 4]])
    torch.testing.assert_close(second.rows, expected[[1, 5]])
    assert first.skipped == second.skipped == 1


def collect_shuffled() -> list[Tensor]:
    ranks = world()[1]
    data = DataLoader(vectors(20), batch_size=2, shuffle=True)
    settings = {"strategy": "ddp", "devices": ranks}
    return [
        collect(build(), data, 20, key=key, settings=settings).rows
        for key in [(0, 1), (0, 1), (0, 2)]
    ]


@pytest.mark.ddp
def test_distributed_sampler(ranks: RankPool) -> None:
    """Ranks have different examples, in an order that depends on key and round."""
    first, second = ranks.run(collect_shuffled)
    for rows in (first, second):
        assert torch.equal(rows[0], rows[1])
        assert not torch.equal(rows[0], rows[2])
        assert not torch.equal(rows[0][:5], rows[0][5:])
    known = {tuple(row.tolist()) for row in first[0][:5]}
    assert not known & {tuple(row.tolist()) for row in second[0][:5]}
