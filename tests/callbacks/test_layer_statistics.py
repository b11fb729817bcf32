"""Tests of lightning_curvature/callbacks/layer_statistics.py: what is measured."""

import warnings
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.helpers.layer_watching import (
    ADAMW,
    SGD,
    AsDouble,
    double_loss,
    double_mlp,
    fit_double,
    watch,
)
from tests.helpers.modules import (
    CLASSES,
    StockModule,
    conv_module,
    images,
    loader,
    mlp_module,
    sequences,
    transformer_module,
    vectors,
)
from tests.helpers.monitoring import RecordingLogger
from tests.helpers.optimizer_db import Contract, every_optimizer
from tests.helpers.probing import make_trainer
from tests.helpers.ranks import RankPool, world
from tests.helpers.two_ranks import shared_loader

EXACT = {"rel": 1e-10, "abs": 1e-14}


def direct(module: StockModule, x: Tensor, y: Tensor) -> dict[str, float]:
    """Compute the statistics of a two-layer network on a whole batch by hand."""
    first, _, second = module.network
    z1 = first(x.double())
    a = z1.relu()
    z2 = second(a)
    grads = torch.autograd.grad(F.cross_entropy(z2, y), [z1, z2])
    values: dict[str, float] = {}
    for layer, given, grad in (("0", x.double(), grads[0]), ("2", a.detach(), grads[1])):
        for side, rows in (("activation", given), ("output_grad", grad)):
            second_moment = rows.T @ rows / len(rows)
            found = {
                "mean": rows.mean(),
                "std": rows.std(correction=0),
                "sparsity": (rows == 0).double().mean(),
                "dead_fraction": (rows == 0).all(0).double().mean(),
                "norm": rows.square().sum(1).mean().sqrt(),
                "effective_rank": second_moment.trace() ** 2 / second_moment.square().sum(),
            }
            for name, value in found.items():
                values[f"layers/{side}_{name}/network.{layer}"] = float(value)
    return values


# Numbers


@pytest.mark.parametrize(("batch", "accumulate"), [(8, 1), (4, 2), (2, 4)])
def test_numbers_of_a_step(batch: int, accumulate: int) -> None:
    module, logger = double_mlp(), RecordingLogger("layers/")
    data = vectors(24)
    fit_double(
        watch(), module, loader(data, batch), accumulate_grad_batches=accumulate, logger=[logger]
    )
    assert logger.steps == [1, 2, 3]
    for index, (_, row) in enumerate(logger.rows):
        x, y = data[8 * index : 8 * index + 8]
        expected = direct(module, x, y)
        assert {key for key in row if key != "epoch"} == set(expected)
        for key, value in expected.items():
            assert row[key] == pytest.approx(value, **EXACT), key


def test_dead_layer_shows_on_both_sides() -> None:
    module = double_mlp()
    with torch.no_grad():
        module.network[0].bias.fill_(-100.0)
    statistics = watch()
    fit_double(statistics, module, max_steps=1)
    history = statistics.history
    assert history["output_grad_dead_fraction/network.0"] == [1.0]
    assert history["activation_dead_fraction/network.2"] == [1.0]
    assert history["activation_sparsity/network.2"] == [1.0]
    assert history["activation_dead_fraction/network.0"] == [0.0]
    assert history["output_grad_effective_rank/network.0"] == [0.0]
    assert history["output_grad_norm/network.2"][0] > 0


class Validated(StockModule):
    """Has a validation step."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)


@every_optimizer
def test_only_the_main_pass_counts(contract: Contract) -> None:
    """Extra passes, gradients under drawn labels and validation change nothing."""
    found = []
    for make, route in ((ADAMW, "none"), (contract.make, "strategy")):
        statistics = watch()
        torch.manual_seed(5)
        module = Validated(mlp_module(make).network, make)
        trainer = make_trainer(
            route,
            callbacks=[statistics],
            max_steps=1,
            accumulate_grad_batches=2,
            val_check_interval=1,
            limit_val_batches=0 if route == "none" else 1,
        )
        silent = contract.forward_only and route == "strategy"
        with pytest.warns(UserWarning, match="nothing to show") if silent else nullcontext():
            trainer.fit(module, loader(vectors()), loader(vectors()))
        found.append(statistics.history)
    plain, other = found
    assert len(plain["step"]) == 1
    # Without a backward layers are not seen.
    assert other == ({"step": []} if contract.forward_only else plain)


class Checkpointed(StockModule):
    """Recomputes its network in the backward."""

    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_()
        output: Tensor = checkpoint(self.network, x, use_reentrant=self.reentrant)
        return output


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_counts_once(reentrant: bool) -> None:
    plain, module = double_mlp(), double_mlp()
    module = Checkpointed(module.network, SGD, loss=double_loss)
    module.reentrant = reentrant
    histories = []
    for candidate in (plain, module):
        statistics = watch()
        fit_double(statistics, candidate, max_steps=1)
        histories.append(statistics.history)
    assert histories[0] == histories[1]


def test_gradients_are_unscaled() -> None:
    histories = []
    for scale in (None, 1024.0):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale) if scale else None
        plugins = [MixedPrecision("16-mixed", "cpu", scaler)] if scaler else None
        statistics = watch()
        torch.manual_seed(5)
        trainer = make_trainer("none", callbacks=[statistics], max_steps=1, plugins=plugins)
        trainer.fit(mlp_module(SGD), loader(vectors()))
        histories.append(statistics.history)
    names = [name for name in histories[0] if "norm/" in name]
    assert len(names) == 4
    for name in names:
        assert histories[1][name] == pytest.approx(histories[0][name], rel=5e-3)


def test_a_shared_layer_has_all_its_calls() -> None:
    class Twice(StockModule):
        def forward(self, x: Tensor) -> Tensor:
            return self.network[1](self.network[0](self.network[0](x)))

    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, CLASSES)).double()
    statistics = watch()
    fit_double(statistics, Twice(network, SGD, loss=double_loss), loader(vectors(4)))
    x = vectors(4).tensors[0].double()
    both = torch.cat([x, network[0](x).detach()])
    assert statistics.history["activation_mean/network.0"] == [pytest.approx(float(both.mean()))]


@pytest.mark.parametrize(
    ("make", "data", "layers"), [(conv_module, images, 5), (transformer_module, sequences, 6)]
)
@pytest.mark.filterwarnings("ignore:LayerStatistics saw no gradient:UserWarning")
def test_convolutions_norms_and_embeddings(make: Any, data: Any, layers: int) -> None:
    statistics = watch(max_rows=16)
    trainer = make_trainer("none", callbacks=[statistics], max_steps=2)
    trainer.fit(make(ADAMW), loader(data()))
    history = statistics.history
    assert sum(name.startswith("output_grad_mean/") for name in history) == layers
    assert all(np.isfinite(values).all() for values in history.values())


# Ranks


def fit_on_ranks(accumulate: int = 1, max_rows: int = 10_000) -> tuple[dict[str, Any], int]:
    """Fit on this process's part of batches of 8, and return history and collectives."""
    collectives: list[int] = []
    original = torch.distributed.nn.functional.all_gather

    def all_gather(tensor: Tensor, *args: Any) -> Any:
        collectives.append(tensor.numel())
        return original(tensor, *args)

    statistics = watch(every_n_steps=2, max_rows=max_rows)
    ranks = world()[1]
    settings: dict[str, Any] = {"strategy": "ddp", "devices": ranks} if ranks > 1 else {}
    trainer = make_trainer(
        "none",
        callbacks=[AsDouble(), statistics],
        accumulate_grad_batches=accumulate,
        use_distributed_sampler=False,
        **settings,
    )
    torch.distributed.nn.functional.all_gather = all_gather
    try:
        trainer.fit(double_mlp(partial(torch.optim.SGD, lr=0.1)), shared_loader(vectors(40), 8))
    finally:
        torch.distributed.nn.functional.all_gather = original
    return statistics.history, len(collectives)


@pytest.mark.ddp
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_ranks_equal_one_process(accumulate: int, ranks: RankPool) -> None:
    (first, collectives), (second, _) = ranks.run(fit_on_ranks, accumulate)
    one, none = fit_on_ranks(accumulate)
    assert first == second
    assert first.keys() == one.keys()
    assert one["step"] == ([2, 4] if accumulate == 1 else [2])
    assert (collectives, none) == (len(one["step"]), 0)
    for name, values in one.items():
        assert first[name] == pytest.approx(values, rel=1e-9, abs=1e-13), name


def fit_one_silent_rank() -> list[str]:
    """Fit a network with a layer that only the second rank uses; return the warnings."""
    statistics = watch()
    module = OnOneRank(nn.ModuleList([nn.Linear(5, 4) for _ in range(3)]), ADAMW)
    trainer = make_trainer(
        "none",
        callbacks=[statistics],
        max_steps=2,
        strategy="ddp_find_unused_parameters_true",
        devices=2,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, loader(vectors()))
    assert "activation_mean/network.1" in statistics.history
    return [str(w.message) for w in caught if "saw no gradient" in str(w.message)]


class OnOneRank(StockModule):
    """Uses its first layer everywhere, the second one on the second rank, the third one never."""

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.network[0](x)
        return output + self.network[1](x) if world()[0] == 1 else output


@pytest.mark.ddp
def test_silent_is_what_no_rank_uses(ranks: RankPool) -> None:
    first, second = ranks.run(fit_one_silent_rank)
    assert second == []  # the first one speaks
    (message,) = first
    assert "saw no gradient of 'network.2' in" in message
