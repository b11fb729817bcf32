"""Every optimizer beside the callbacks that average weights."""

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import Tensor, nn

from tests.helpers.families import every_family
from tests.helpers.features import (
    BATCHES,
    EPOCHS,
    Run,
    batched,
    noisy_module,
    plain,
    prepare,
    quiet,
    train,
)
from tests.helpers.modules import StockModule
from tests.helpers.optimizer_db import Contract
from tests.helpers.probing import ROUTES, assert_bitwise

pytestmark = [
    quiet,
    # torch's SWALR counts its first call before the first step.
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*before:UserWarning"),
]


def title(name: str) -> Any:
    """Name a row of the compatibility table."""
    return pytest.mark.feature("Callbacks", name)


def weights_at_end(run: Run) -> dict[str, Tensor]:
    """Return the parameters that the fit left."""
    return {name: p.detach() for name, p in run.module.named_parameters()}


def assert_means(actual: dict[str, Tensor], expected: list[dict[str, Tensor]]) -> None:
    """Assert that weights are the mean of several."""
    for name, tensor in actual.items():
        mean = torch.stack([weights[name] for weights in expected]).mean(dim=0)
        torch.testing.assert_close(tensor, mean, rtol=1e-5, atol=1e-6)


def norm_free_module(make_optimizer: Any) -> StockModule:
    """Build a module without batch norm, whose averaged weights need no further epoch."""
    network = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 4))
    return StockModule(network, make_optimizer)


@every_family
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("make", [noisy_module, norm_free_module])
@title("`StochasticWeightAveraging`")
def test_stochastic_weight_averaging(contract: Contract, make: Any, route: str) -> None:
    """The mean of the weights at the starts of its epochs; it also takes over the learning rate.

    With batch norm a further epoch runs without a backward: there is nothing to step on.
    """
    averaging = StochasticWeightAveraging(swa_lrs=0.25, swa_epoch_start=2, annealing_epochs=1)
    run = train(contract, make, callbacks=[averaging], route=route, max_epochs=4)
    assert (averaging.swa_start, averaging.swa_end) == (1, 3)
    # Lightning counts the epoch without backward as one more step. Those that ask know better.
    more = make is noisy_module and not contract.info.asks
    assert run.optimizer._steps_done == 4 * BATCHES + more
    ends = [run.watch.weights[epoch * BATCHES - 1] for epoch in (1, 2, 3)]
    if not more:  # torch's optimizers, too, take that step with the gradient before it
        assert_means(weights_at_end(run), ends)
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0.25)
    assert len(run.watch.losses) >= 4 * BATCHES
    assert sum(run.watch.losses[-BATCHES:]) < sum(run.watch.losses[:BATCHES])
    assert all(t.isfinite().all() for t in run.tensors.values())


@every_family
@title("`StochasticWeightAveraging`")
def test_stochastic_weight_averaging_replaces_a_schedule(contract: Contract) -> None:
    class Scheduled(StockModule):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

    def make(make_optimizer: Any) -> Scheduled:
        return Scheduled(norm_free_module(make_optimizer).network, make_optimizer)

    averaging = StochasticWeightAveraging(swa_lrs=0.25, swa_epoch_start=2, annealing_epochs=1)
    run = train(contract, make, callbacks=[averaging], max_epochs=4)
    kinds = [type(c.scheduler).__name__ for c in run.trainer.lr_scheduler_configs]
    assert kinds == ["SWALR"]
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0.25)
    assert_means(weights_at_end(run), [run.watch.weights[e * BATCHES - 1] for e in (1, 2, 3)])


@every_family
@pytest.mark.parametrize("route", ROUTES)
@title("`WeightAveraging`")
def test_weight_averaging(contract: Contract, route: str) -> None:
    """The mean over all steps, with a validation that swaps the weights in between."""
    averaging = WeightAveraging(use_buffers=False)
    run = train(contract, callbacks=[averaging], route=route, val=batched())
    assert run.steps == EPOCHS * BATCHES
    for ours, theirs in zip(run.watch.weights, plain(contract).watch.weights, strict=True):
        assert_bitwise(ours, theirs)
    assert_means(weights_at_end(run), run.watch.weights)


@every_family
@title("`EMAWeightAveraging`")
def test_exponential_averaging(contract: Contract) -> None:
    """Training itself is not disturbed, and the result is the average."""
    run = train(contract, callbacks=[EMAWeightAveraging(decay=0.5)], val=batched())
    trajectory = run.watch.weights
    assert_bitwise(trajectory[-1], plain(contract).watch.weights[-1])
    average = dict(trajectory[0])
    for weights in trajectory[1:]:
        average = {name: 0.5 * average[name] + 0.5 * weights[name] for name in average}
    for name, tensor in weights_at_end(run).items():
        torch.testing.assert_close(tensor, average[name], rtol=1e-5, atol=1e-6)


@every_family
@title("`EMAWeightAveraging`")
def test_exponential_averaging_resumes(contract: Contract, tmp_path: Any) -> None:
    """A checkpoint holds the average as the module and the weights beside it."""

    class Saves(EMAWeightAveraging):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            super().on_train_batch_end(trainer, *args)
            if trainer.global_step == 2 * BATCHES:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    whole = train(contract, norm_free_module, callbacks=[Saves(decay=0.5)])
    checkpoint = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert "current_model_state" in checkpoint
    rest = prepare(contract, norm_free_module, callbacks=[Saves(decay=0.5)])
    rest.trainer.fit(rest.module, batched(), ckpt_path=tmp_path / "half.ckpt")
    assert_bitwise(rest.watch.weights[-1], whole.watch.weights[-1])
    assert_bitwise(rest.tensors, whole.tensors)
