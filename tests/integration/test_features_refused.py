"""Every optimizer and what cannot work with extra passes: refused by name, or left alone."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.overrides import _len_torch_function_stack

from lightning_curvature import declare_loss
from lightning_curvature.oracle import NoLossCapturedError
from tests.helpers.families import every_family
from tests.helpers.features import BATCHES, EPOCHS, Run, batched, prepare, train
from tests.helpers.modules import CLASSES, StockModule
from tests.helpers.optimizer_db import Contract
from tests.helpers.probing import ROUTES, assert_bitwise, parameters_and_buffers


def title(name: str) -> Any:
    """Name a row of the compatibility table."""
    return pytest.mark.feature("Models", name)


def network() -> nn.Sequential:
    """Build a network for the learnable vectors."""
    return nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, CLASSES))


def made(kind: type[StockModule]) -> Any:
    """Return a maker of modules of a kind."""
    return lambda make_optimizer: kind(network(), make_optimizer)


def assert_refused(run: Run, error: type[Exception], text: str) -> str:
    """Assert that a fit is refused and leaves the weights alone; return the message."""
    before = parameters_and_buffers(run.module)
    with pytest.raises(error) as refusal:
        run.trainer.fit(run.module, batched())
    message = str(refusal.value)
    assert text in message
    assert_bitwise(parameters_and_buffers(run.module), before)
    assert _len_torch_function_stack() == 0
    return message


class TakesIterator(StockModule):
    """Takes its batches itself."""

    def training_step(self, dataloader_iter: Any) -> Tensor:
        """Return the loss of the next batch."""
        (x, y), _, _ = next(dataloader_iter)
        return self.loss(self(x), y)


@every_family
@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter`:UserWarning")
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.filterwarnings("ignore:Found `dataloader_iter` argument:UserWarning")
@title("`training_step(dataloader_iter)`")
def test_a_step_that_takes_the_iterator(contract: Contract, route: str, refused: Any) -> None:
    """An extra pass would eat batches."""
    run = prepare(contract, made(TakesIterator), route=route)
    if not contract.info.asks:
        run.trainer.fit(run.module, batched())
        return
    text = "training_step(dataloader_iter) takes its batches itself"
    message = assert_refused(run, MisconfigurationException, text)
    assert message.startswith(contract.info.cls.__name__)
    refused(message)


class ChangesBatch(StockModule):
    """Normalizes its batch in place."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss."""
        x, y = batch
        x -= x.mean()
        return self.loss(self(x), y)


@every_family
@pytest.mark.parametrize("route", ROUTES)
@title("a batch changed in place")
def test_a_batch_changed_in_place(contract: Contract, route: str, refused: Any) -> None:
    run = prepare(contract, made(ChangesBatch), route=route)
    if not contract.records:
        run.trainer.fit(run.module, batched())
        return
    refused(assert_refused(run, RuntimeError, "changed its batch in place"))


class Handwritten(StockModule):
    """Has a loss that no capture can know."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss."""
        x, y = batch
        return -(self(x).log_softmax(1) * F.one_hot(y, CLASSES)).sum() / len(y)


class Declared(StockModule):
    """Declares it."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss."""
        x, y = batch
        logits = self(x)
        loss = -(logits.log_softmax(1) * F.one_hot(y, CLASSES)).sum() / len(y)
        return declare_loss(loss, logits, y, kind="cross_entropy")


@every_family
@pytest.mark.parametrize("route", ROUTES)
@title("hand-written loss")
def test_a_handwritten_loss(contract: Contract, route: str, refused: Any) -> None:
    """The message lists what is known and offers `declare_loss`."""
    run = prepare(contract, made(Handwritten), route=route)
    if not contract.needs_known_loss:
        run.trainer.fit(run.module, batched())
        run.assert_learned()
        return
    message = assert_refused(run, NoLossCapturedError, "Supported are")
    for word in ("cross_entropy", "mse_loss", "binary_cross_entropy_with_logits", "declare_loss"):
        assert word in message
    refused(message.split(".")[0] + ". `declare_loss` can declare it.")


@every_family
@title("hand-written loss with `declare_loss`")
def test_a_declared_loss(contract: Contract) -> None:
    """The steps of the loss that it declares."""
    exact = {"precision": "64-true"}
    run = train(contract, made(Declared), **exact)
    expected = train(contract, made(StockModule), **exact)
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(run.tensors[name], tensor, rtol=1e-5, atol=1e-6)


class TwoOptimizers(StockModule):
    """Trains its layers with two optimizers, by hand."""

    def __init__(self, make_optimizer: Any, make_other: Any) -> None:
        super().__init__(network(), make_optimizer)
        self.make_other = make_other
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Step with both."""
        for optimizer in self.optimizers():

            def closure(optimizer: Any = optimizer) -> Tensor:
                optimizer.zero_grad()
                loss = StockModule.training_step(self, batch, batch_idx)
                self.manual_backward(loss)
                return loss

            optimizer.step(closure)

    def configure_optimizers(self) -> Any:
        """Make one optimizer per layer."""
        first, last = self.network[0].parameters(), self.network[2].parameters()
        return [self.make_optimizer(first), self.make_other(last)]


@every_family
@pytest.mark.parametrize("route", ROUTES)
@title("two curvature optimizers")
def test_two_of_them(contract: Contract, route: str, refused: Any) -> None:
    run = prepare(contract, lambda make: TwoOptimizers(make, make), route=route)
    if not contract.info.asks:
        run.trainer.fit(run.module, batched())
        return
    text = "One curvature optimizer per Trainer is supported, got 2"
    refused(assert_refused(run, MisconfigurationException, text))


@every_family
@title("an optimizer of torch beside it")
def test_one_of_them_and_one_of_torch(contract: Contract) -> None:
    """Each trains its layer."""
    x, y = next(iter(batched(batch_size=40)))
    run = prepare(contract, lambda make: TwoOptimizers(make, torch.optim.Adam))
    before = F.cross_entropy(run.module(x), y).item()
    start = parameters_and_buffers(run.module)
    run.trainer.fit(run.module, batched())
    assert run.optimizer._steps_done == EPOCHS * BATCHES
    assert run.trainer.global_step == 2 * EPOCHS * BATCHES
    # The other layer's Adam alone takes it to 0.95.
    assert (
        F.cross_entropy(run.module(x), y).item() < (0.95 if contract.forward_only else 0.9) * before
    )
    assert not any(torch.equal(p, start[name]) for name, p in run.module.named_parameters())


@every_family
@title("a layer replaced after the optimizer was made")
def test_a_layer_that_is_replaced(contract: Contract) -> None:
    """As with every optimizer, the old layer is no longer there and the new one is not trained."""

    class Replaces(StockModule):
        def on_train_start(self) -> None:
            self.network[2] = nn.Linear(12, CLASSES)

    run = prepare(contract, made(Replaces))
    run.trainer.fit(run.module, batched())
    assert run.optimizer._steps_done == EPOCHS * BATCHES
    first, last = run.watch.weights[0], run.watch.weights[-1]
    assert torch.equal(first["network.2.weight"], last["network.2.weight"])
    assert not torch.equal(first["network.0.weight"], last["network.0.weight"])
