"""Every optimizer on the kinds of models and training steps that people have."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers.families import every_family
from tests.helpers.faults import exact_maker
from tests.helpers.features import BATCHES, EPOCHS, Run, batched, noisy_module, quiet, train
from tests.helpers.modules import (
    CLASSES,
    MakeOptimizer,
    StockModule,
    conv_module,
    images,
    token_loss,
    transformer_module,
)
from tests.helpers.optimizer_db import Contract
from tests.helpers.probing import assert_bitwise

pytestmark = quiet

VOCABULARY = 11


def title(name: str) -> Any:
    """Name a row of the compatibility table."""
    return pytest.mark.feature("Models", name)


# Architectures


class Tied(nn.Module):
    """Reads tokens and writes logits with the same matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 12)
        self.hidden = nn.Linear(12, 12)
        self.out = nn.Linear(12, VOCABULARY)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits."""
        return self.out(self.hidden(self.embed(tokens)).tanh())


class Recurrent(nn.Module):
    """An LSTM over embedded tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.lstm = nn.LSTM(8, 12, batch_first=True)
        self.out = nn.Linear(12, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits."""
        return self.out(self.lstm(self.embed(tokens))[0])


class Attentive(nn.Module):
    """Multi-head attention over embedded tokens, with a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 12)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.out = nn.Linear(12, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits."""
        hidden = self.embed(tokens)
        length = tokens.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool).triu(1)
        mixed, _ = self.attention(hidden, hidden, hidden, attn_mask=mask, need_weights=False)
        return self.out(hidden + mixed)


def on_tokens(network: Callable[[], nn.Module]) -> Callable[[MakeOptimizer], StockModule]:
    """Return a maker of modules that predict the next token."""
    return lambda make_optimizer: StockModule(network(), make_optimizer, loss=token_loss)


def on_vectors(network: Callable[[], nn.Module]) -> Callable[[MakeOptimizer], StockModule]:
    """Return a maker of modules that classify vectors."""
    return lambda make_optimizer: StockModule(network(), make_optimizer)


def shared_layer() -> nn.Module:
    """Build a network that applies one layer three times."""
    shared = nn.Linear(8, 8)
    return nn.Sequential(
        nn.Linear(5, 8), nn.Tanh(), shared, nn.Tanh(), shared, nn.Tanh(), shared, nn.Linear(8, 4)
    )


def parametrized(norm: Callable[[nn.Linear], nn.Module]) -> Callable[[], nn.Module]:
    """Return a maker of networks with a parametrized layer."""
    return lambda: nn.Sequential(norm(nn.Linear(5, 12)), nn.Tanh(), nn.Linear(12, CLASSES))


class Part(nn.Module):
    """Has a branch that is never used, and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(5, CLASSES)
        self.unused = nn.Linear(5, CLASSES)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.used(x) * self.scale


ARCHITECTURES: dict[str, tuple[Callable[[MakeOptimizer], LightningModule], str]] = {
    "convolution, batch norm, dropout": (conv_module, "images"),
    "transformer encoder layer": (transformer_module, "tokens"),
    "multi-head attention": (on_tokens(Attentive), "tokens"),
    "LSTM": (on_tokens(Recurrent), "tokens"),
    "tied weights": (on_tokens(Tied), "tokens"),
    "a layer used several times": (on_vectors(shared_layer), "vectors"),
    "parametrization: `weight_norm`": (on_vectors(parametrized(weight_norm)), "vectors"),
    "parametrization: `spectral_norm`": (on_vectors(parametrized(spectral_norm)), "vectors"),
    "unused parameters": (on_vectors(Part), "vectors"),
}


def counting(rows: int = 20, length: int = 6) -> TensorDataset:
    """Draw sequences that count upwards from a random start, with next-token targets."""
    start = torch.randint(VOCABULARY, (rows, 1), generator=torch.Generator().manual_seed(36))
    tokens = (start + torch.arange(length + 1)) % VOCABULARY
    return TensorDataset(tokens[:, :-1].clone(), tokens[:, 1:].clone())


DATA: dict[str, Callable[[], Any]] = {
    "images": lambda: batched(images(20), 4),
    "tokens": lambda: batched(counting(), 4),
    "vectors": batched,
}
# These have no forward-mode rule: forced to use it, they say so.
NO_FORWARD_MODE = ("parametrization: `weight_norm`", "parametrization: `spectral_norm`")


@every_family
@pytest.mark.parametrize("name", [pytest.param(n, marks=title(n)) for n in ARCHITECTURES])
@pytest.mark.parametrize("directional", ["auto", "jvp"])
def test_architectures(contract: Contract, name: str, directional: str) -> None:
    """The loss falls with either method, one step per batch."""
    if directional == "jvp" and name in NO_FORWARD_MODE:
        pytest.skip("has no forward-mode rule")
    make, data = ARCHITECTURES[name]
    run = train(contract, make, data=DATA[data](), directional=directional, max_epochs=6)
    assert run.steps == 6 * BATCHES
    # In thirty steps along a few directions little can be learned where most of them do nothing.
    run.assert_learned(0.999 if contract.forward_only else 0.9)


@every_family
@pytest.mark.parametrize("name", NO_FORWARD_MODE)
@title("no forward-mode rule, where it was asked for")
def test_no_forward_rule(contract: Contract, name: str, refused: Any) -> None:
    """``directional="jvp"`` is an order; "auto" would take finite differences."""
    if "directional" not in contract.info.asks:
        pytest.skip("needs no forward mode")
    make, data = ARCHITECTURES[name]
    with pytest.raises((NotImplementedError, RuntimeError), match=r"(?i)forward"):
        train(contract, make, data=DATA[data](), directional="jvp")
    refused('torch\'s own error about forward AD; use directional="auto" or "fd".')


@every_family
@title("tied weights")
def test_tied_weights_stay_tied(contract: Contract) -> None:
    run = train(contract, on_tokens(Tied), data=DATA["tokens"]())
    network = run.module.network
    assert network.out.weight is network.embed.weight


# Which parameters are trained


def classifier() -> nn.Sequential:
    """Build a network of three layers."""
    return nn.Sequential(
        nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, CLASSES)
    )


class Chosen(StockModule):
    """Optimizes some of its parameters, in groups.

    Args:
        make_optimizer: See `StockModule`.
        groups: Makes groups of the layers.
        frozen: Numbers of the layers that need no gradient.
    """

    def __init__(
        self,
        make_optimizer: MakeOptimizer,
        groups: Callable[[nn.Sequential], Iterable[Any]],
        frozen: Iterable[int] = (),
    ) -> None:
        super().__init__(classifier(), make_optimizer)
        self.groups = groups
        for number in frozen:
            self.network[number].requires_grad_(False)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make the optimizer of the groups."""
        return self.make_optimizer(self.groups(self.network))


def chosen(*args: Any) -> Callable[[MakeOptimizer], Chosen]:
    """Return a maker of `Chosen`."""
    return lambda make_optimizer: Chosen(make_optimizer, *args)


def moved(run: Run) -> set[str]:
    """Return the numbers of the layers that the second step moved."""
    first, last = run.watch.weights[0], run.watch.weights[-1]
    return {name.split(".")[1] for name in first if not torch.equal(first[name], last[name])}


@every_family
@title("frozen parameters")
def test_frozen_parameters(contract: Contract) -> None:
    run = train(contract, chosen(nn.Module.parameters, (0, 2)))
    assert moved(run) == {"4"}
    run.assert_learned(0.99)


@every_family
@title("partly optimized parameters")
def test_partly_optimized_parameters(contract: Contract) -> None:
    """The others have gradients all the same; the steps are those with the others frozen."""

    def last_layer(network: nn.Sequential) -> Iterable[Any]:
        return network[4].parameters()

    run = train(contract, chosen(last_layer))
    assert moved(run) == {"4"}
    frozen = train(contract, chosen(nn.Module.parameters, (0, 2)))
    assert_bitwise(run.tensors, frozen.tensors)


@every_family
@title("several parameter groups")
def test_groups_with_their_own_settings(contract: Contract) -> None:
    """A rate of zero holds a group still; equal groups are as good as one."""
    if not contract.takes("lr"):
        pytest.skip("has no lr")

    def held(network: nn.Sequential) -> list[dict[str, Any]]:
        return [
            {"params": network[0].parameters(), "lr": 0.0},
            {"params": network[2:].parameters()},
        ]

    def halves(network: nn.Sequential) -> list[dict[str, Any]]:
        return [{"params": network[:2].parameters()}, {"params": network[2:].parameters()}]

    run = train(contract, chosen(held), make_optimizer=exact_maker(contract))
    assert moved(run) == {"2", "4"}
    run.assert_learned()
    one = train(contract, chosen(nn.Module.parameters))
    assert_bitwise(train(contract, chosen(halves)).tensors, one.tensors)


@every_family
@title("weight decay of a parameter group")
def test_a_group_with_weight_decay(contract: Contract) -> None:
    """As everyone does it: decay for matrices, none for biases."""
    if not contract.takes("weight_decay"):
        pytest.skip("has no weight_decay")

    def groups(network: nn.Sequential, decay: float = 0.5) -> list[dict[str, Any]]:
        params = list(network.parameters())
        return [
            {"params": [p for p in params if p.ndim > 1], "weight_decay": decay},
            {"params": [p for p in params if p.ndim == 1], "weight_decay": 0.0},
        ]

    decayed = train(contract, chosen(groups)).watch.weights[0]
    plain = train(contract, chosen(lambda network: groups(network, 0.0))).watch.weights[0]
    for name, tensor in plain.items():
        if tensor.ndim > 1:
            assert decayed[name].norm() < tensor.norm()
        else:
            assert torch.equal(decayed[name], tensor)


class Thawing(StockModule):
    """Frees a layer in its second epoch and freezes another."""

    def on_train_epoch_start(self) -> None:
        """Switch."""
        self.network[0].requires_grad_(self.current_epoch > 0)
        self.network[4].requires_grad_(self.current_epoch == 0)


@every_family
@title("parameters frozen and freed on the way")
def test_parameters_that_are_freed(contract: Contract) -> None:
    run = train(contract, lambda make: Thawing(classifier(), make))
    start, middle, end = (run.watch.weights[i] for i in (0, BATCHES - 1, -1))

    def same(layer: int, one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
        name = f"network.{layer}.weight"
        return torch.equal(one[name], other[name])

    assert same(0, start, middle)
    assert not same(0, middle, end)
    assert not same(4, start, middle)
    assert same(4, middle, end)
    run.assert_learned(0.99)


@every_family
@title("`configure_model`")
def test_layers_made_late(contract: Contract) -> None:
    class Late(StockModule):
        def configure_model(self) -> None:
            if isinstance(self.network, nn.Identity):
                self.network = classifier()

    run = train(contract, lambda make: Late(nn.Identity(), make))
    run.assert_learned()


# Training modes


@every_family
@title("submodules in evaluation mode")
def test_a_submodule_in_evaluation_mode(contract: Contract) -> None:
    """Its statistics stay, in extra passes too."""

    class FrozenNorm(StockModule):
        def on_train_batch_start(self, *args: Any) -> None:
            self.network[1].eval()

    run = train(contract, lambda make: FrozenNorm(noisy_module(make).network, make))
    assert torch.equal(run.module.network[1].running_mean, torch.zeros(12))
    assert int(run.module.network[1].num_batches_tracked) == 0
    run.assert_learned()


@every_family
@title("training mode toggled in `training_step`")
def test_a_mode_toggled_in_the_step(contract: Contract) -> None:
    """For pseudo-labels, say: one forward in each mode. Batch norm counts one of them, once."""

    class Toggles(StockModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            self.network.eval()
            with torch.no_grad():
                self.network(x)
            self.network.train()
            return self.loss(self.network(x), y)

    run = train(contract, lambda make: Toggles(noisy_module(make).network, make))
    assert int(run.module.network[1].num_batches_tracked) == EPOCHS * BATCHES
    assert all(part.training for part in run.module.network.modules())
    plain = train(contract, lambda make: StockModule(noisy_module(make).network, make))
    assert_bitwise(run.tensors, plain.tensors)


# What a training step returns


@every_family
@title("`training_step` returns a dictionary")
def test_a_dictionary(contract: Contract) -> None:
    class Dictionary(StockModule):
        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            return {"loss": super().training_step(batch, batch_idx), "rows": len(batch[0])}

    run = train(contract, lambda make: Dictionary(classifier(), make))
    expected = train(contract, lambda make: StockModule(classifier(), make))
    assert_bitwise(run.tensors, expected.tensors)


@every_family
@pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")
@title("`training_step` returns None now and then")
def test_nothing_now_and_then(contract: Contract) -> None:
    """No step on those batches, and nothing of them in the next one."""

    class Skips(StockModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx in (0, 3) else loss

    run = train(contract, lambda make: Skips(classifier(), make))
    assert run.optimizer._steps_done == EPOCHS * 3
    rows = [row for i, row in enumerate(batched()) if i not in (0, 3)]
    expected = train(
        contract,
        lambda make: StockModule(classifier(), make),
        data=DataLoader(rows, batch_size=None, generator=torch.Generator()),
    )
    assert_bitwise(run.tensors, expected.tensors)


@every_family
@title("several losses and a penalty")
def test_several_losses(contract: Contract) -> None:
    """Cross-entropy, a regression, a masked loss, a penalty on the weights, and one for the log."""

    class Many(StockModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            logits = self(x)
            loss = F.cross_entropy(logits, y)
            loss = loss + 0.1 * F.mse_loss(logits.sum(dim=1), x.sum(dim=1))
            each = F.cross_entropy(logits, y, reduction="none", label_smoothing=0.1)
            mask = (x[:, 0] > 0).float()
            loss = loss + 0.5 * (each * mask).sum() / mask.sum().clamp_min(1)
            self.log("mae", F.l1_loss(logits.detach().softmax(1), F.one_hot(y, CLASSES).float()))
            return loss + 1e-4 * sum(p.square().sum() for p in self.parameters())

    run = train(contract, lambda make: Many(classifier(), make))
    assert run.steps == EPOCHS * BATCHES
    run.assert_learned()
