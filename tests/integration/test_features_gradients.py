"""Every optimizer beside what happens to gradients before a step: accumulation and clipping."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor

from lightning_curvature import CurvatureCallback, SingleDeviceCurvatureStrategy
from tests.helpers.families import every_family
from tests.helpers.features import (
    BATCH_SIZE,
    BATCHES,
    EPOCHS,
    Validated,
    batched,
    learnable,
    noisy_module,
    plain,
    quiet,
    train,
)
from tests.helpers.modules import StockModule, mlp_module
from tests.helpers.optimizer_db import Contract, every_optimizer
from tests.helpers.probing import ROUTES, assert_bitwise

pytestmark = quiet

EXACT: dict[str, Any] = {"directional": "jvp", "precision": "64-true"}


def title(name: str) -> Any:
    """Name a row of the compatibility table."""
    return pytest.mark.feature("Accumulation and clipping", name)


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Assert that float64 weights agree up to round-off."""
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-9, atol=1e-11)


@every_optimizer
@title("`accumulate_grad_batches`")
def test_accumulated_batches_are_one_large_batch(contract: Contract) -> None:
    """4 batches of 4 rows make one step of 16; the last window of an epoch is as long."""
    rows = learnable(32)
    contract = contract.exactly()
    exact = {**EXACT, "max_epochs": 4}
    few = train(contract, mlp_module, data=batched(rows, 4), accumulate_grad_batches=4, **exact)
    large = train(contract, mlp_module, data=batched(rows, 16), **exact)
    assert few.steps == large.steps == 8
    assert_close(few.tensors, large.tensors)


def clipped_without_gradients(contract: Contract, **settings: Any) -> None:
    """Fit one that has no gradients; assert that it says so, and goes on as without clipping."""
    with pytest.warns(UserWarning, match="has no effect: .* has no gradients. Use its max_proj"):
        run = train(contract, gradient_clip_val=0.05, **settings)
    assert_bitwise(run.tensors, plain(contract).tensors)
    assert all(p.grad is None for p in run.module.parameters())


@every_family
@pytest.mark.parametrize("route", ["strategy", "callback"])
@title('`window="last"`')
def test_a_window_of_the_last_micro_batch(contract: Contract, route: str, refused: Any) -> None:
    """Cheaper: fewer extra passes; training goes on all the same.

    Without a gradient of all the data it would be training on a part of it.
    """
    if contract.forward_only:
        strategy = SingleDeviceCurvatureStrategy(window="last")
        with pytest.raises(MisconfigurationException, match="knows of the data only") as refusal:
            train(contract, mlp_module, route="none", strategy=strategy)
        refused(str(refusal.value))
        return
    passes: dict[str, int] = {}
    for window in ("all", "last"):
        forwards: list[int] = []

        def make(make_optimizer: Any, seen: list[int] = forwards) -> StockModule:
            module = noisy_module(make_optimizer)
            module.network.register_forward_hook(lambda *_: seen.append(1))
            return module

        if route == "strategy":
            attached: dict[str, Any] = {"strategy": SingleDeviceCurvatureStrategy(window=window)}
        else:
            attached = {"callbacks": [CurvatureCallback(window=window)]}
        run = train(
            contract,
            make,
            route="none",
            accumulate_grad_batches=4,
            data=batched(learnable(64), 4),
            max_epochs=4,
            **attached,
        )
        assert run.steps == 16
        run.assert_learned(per_epoch=16)
        passes[window] = len(forwards) - 4 * 16
    if contract.runs_again:
        assert passes["all"] == 4 * passes["last"] > 0
    if not contract.info.asks:
        assert passes == {"all": 0, "last": 0}


class Reloading(Validated):
    """Doubles its batches from the second epoch on."""

    def train_dataloader(self) -> Any:
        """Return a loader for the coming epoch."""
        return batched(learnable(32), 4 if self.current_epoch == 0 else 8)


@every_family
@pytest.mark.feature("Callbacks", "`GradientAccumulationScheduler`")
def test_accumulation_that_changes(contract: Contract) -> None:
    """Single batches, then windows of two: as if the batches had grown."""

    def reloading(make_optimizer: Any) -> Reloading:
        return Reloading(mlp_module(make_optimizer).network, make_optimizer)

    contract = contract.exactly()
    schedule = GradientAccumulationScheduler({0: 1, 1: 2})
    run = train(contract, mlp_module, data=batched(learnable(32), 4), callbacks=[schedule], **EXACT)
    grown = train(contract, reloading, data="module", reload_dataloaders_every_n_epochs=1, **EXACT)
    assert run.steps == grown.steps == 8 + 2 * 4
    assert_close(run.tensors, grown.tensors)


@every_family
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "algorithm",
    [
        pytest.param("norm", marks=title("`gradient_clip_val`, by norm")),
        pytest.param("value", marks=title("`gradient_clip_val`, by value")),
    ],
)
def test_clipping(contract: Contract, algorithm: str, route: str) -> None:
    """Clipped gradients disagree with the measured slope; the self-check knows why."""
    if contract.forward_only:
        clipped_without_gradients(contract, route=route, gradient_clip_algorithm=algorithm)
        return
    norms: list[float] = []

    class Watched(Validated):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
            def watched() -> Any:
                result = closure()
                grads = [p.grad.flatten() for p in self.parameters()]
                norms.append(float(torch.cat(grads).norm()))
                return result

            super().optimizer_step(epoch, batch_idx, optimizer, watched)

    def make(make_optimizer: Any) -> Watched:
        return Watched(noisy_module(make_optimizer).network, make_optimizer)

    run = train(
        contract,
        make,
        route=route,
        gradient_clip_val=0.05,
        gradient_clip_algorithm=algorithm,
        max_epochs=8,
    )
    assert run.steps == 8 * BATCHES == len(norms)
    assert min(norms) > 0.05  # so that something is clipped
    run.assert_learned()
    unclipped = plain(contract).watch.weights[0]
    assert any(not torch.equal(run.watch.weights[0][name], unclipped[name]) for name in unclipped)


@every_family
@title("`gradient_clip_val`, by norm")
def test_a_generous_clip_changes_nothing(contract: Contract) -> None:
    if contract.forward_only:
        clipped_without_gradients(contract)
        return
    run = train(contract, gradient_clip_val=1e6)
    assert_bitwise(run.tensors, plain(contract).tensors)


@every_family
@title("`configure_gradient_clipping` overridden")
def test_clipping_by_the_module(contract: Contract) -> None:
    """The module clips as it likes, through the method of Lightning."""

    class Clips(Validated):
        def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
            self.clip_gradients(optimizer, 0.05, "norm")

    def make(make_optimizer: Any) -> Clips:
        return Clips(noisy_module(make_optimizer).network, make_optimizer)

    if contract.forward_only:
        assert_bitwise(train(contract, make).tensors, plain(contract).tensors)
        return
    run = train(contract, make, max_epochs=8)
    expected = train(contract, gradient_clip_val=0.05, max_epochs=8)
    assert_bitwise(run.tensors, expected.tensors)


@every_family
@title("accumulation and clipping together")
def test_a_clipped_window(contract: Contract) -> None:
    """The window is clipped once, as one large batch is."""
    contract = contract.exactly()
    exact = {**EXACT, "gradient_clip_val": 0.05}
    with pytest.warns(UserWarning, match="no effect") if contract.forward_only else nullcontext():
        few = train(
            contract, mlp_module, data=batched(batch_size=4), accumulate_grad_batches=2, **exact
        )
        large = train(contract, mlp_module, data=batched(batch_size=BATCH_SIZE), **exact)
    assert few.steps == large.steps == EPOCHS * BATCHES
    assert_close(few.tensors, large.tensors)
