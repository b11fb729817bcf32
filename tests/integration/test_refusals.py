"""Refusals at the edges, the GradScaler path, and clean-up after failures.

test_features_refused.py goes through what is refused, optimizer by optimizer. Files under test:
strategies/refusals.py, strategies/recorder.py, optim/base.py, oracle/capture.py.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.overrides import _len_torch_function_stack
from torch.utils.data import DataLoader, Dataset

from lightning_curvature import declare_loss
from lightning_curvature.oracle import MissingCapabilityError
from tests.helpers.dense import DenseModel, Head, flatten, quadratic
from tests.helpers.families import every_family
from tests.helpers.modules import StockModule, loader, mlp_module, norm_dropout_module, vectors
from tests.helpers.optimizer_db import Contract
from tests.helpers.probing import (
    ROUTES,
    Probe,
    assert_bitwise,
    make_trainer,
    parameters_and_buffers,
)

ATTACHED = ("strategy", "callback")


def _network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4))


class ManualModule(StockModule):
    """Manual optimization, with or without a closure."""

    def __init__(self, *args: Any, with_closure: bool) -> None:
        super().__init__(*args)
        self.automatic_optimization = False
        self.with_closure = with_closure
        self.calls = 0

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        optimizer = self.optimizers()

        def closure() -> Tensor:
            self.calls += 1
            loss = F.cross_entropy(self(x), y)
            optimizer.zero_grad()
            self.manual_backward(loss)
            return loss

        if self.with_closure:
            optimizer.step(closure=closure)
        else:
            closure()
            optimizer.step()


@every_family
@pytest.mark.parametrize("route", ROUTES)
def test_manual_optimization_without_closure(contract: Contract, route: str) -> None:
    """`training_step` cannot be run again, because it would step again."""
    module = ManualModule(_network(), contract.make, with_closure=False)
    before = parameters_and_buffers(module)
    if not contract.records:
        make_trainer(route).fit(module, loader(vectors()))
        return
    with pytest.raises(MissingCapabilityError, match="a loop without a closure does not allow"):
        make_trainer(route).fit(module, loader(vectors()))
    assert_bitwise(parameters_and_buffers(module), before)
    assert _len_torch_function_stack() == 0


class InPlaceModule(StockModule):
    """Normalizes its batch in place."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        x -= x.mean()
        return F.cross_entropy(self(x), y)


@pytest.mark.parametrize("route", ROUTES)
def test_batch_changed_in_place_is_noticed_by_the_oracle(route: str) -> None:
    """Whatever the optimizer asks."""
    with pytest.raises(RuntimeError, match="changed its batch in place"):
        make_trainer(route).fit(InPlaceModule(_network(), Probe), loader(vectors()))


@pytest.mark.parametrize("make", [torch.optim.AdamW, lambda params: Probe(params, passes=())])
def test_batch_changed_in_place_is_fine_when_nothing_is_asked(make: Callable[..., Any]) -> None:
    """Whoever asks nothing is left alone."""
    make_trainer("auto").fit(InPlaceModule(_network(), make), loader(vectors()))


class Popping(StockModule):
    """Takes its batch apart: the containers change, the tensors do not."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        y = batch.pop("y")
        batch["x"] = batch["x"] + 1.0
        return F.cross_entropy(self(**batch), y)


class Records(Dataset[dict[str, Tensor]]):
    """The vectors as dictionaries."""

    def __init__(self) -> None:
        self.tensors = vectors().tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.tensors[0][index], "y": self.tensors[1][index]}


@pytest.mark.parametrize("route", ATTACHED)
def test_batch_taken_apart(route: str) -> None:
    """`batch.pop("labels")` is common: every pass must get the containers of the first."""
    module = Popping(_network(), lambda p: Probe(p, passes=["directional", "loss"]))
    trainer = make_trainer(route, directional="jvp", precision="64-true")
    trainer.fit(module, DataLoader(Records(), batch_size=4))
    probe = trainer.optimizers[0]
    assert len(probe.deviations) == 5
    assert max(probe.deviations) <= 1e-12
    assert all(torch.equal(base, again) for base, again in probe.losses)


class Handwritten(StockModule):
    """A loss no capture can know."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        onehot = F.one_hot(y, 4).to(x.dtype)
        return -(self(x).log_softmax(1) * onehot).sum() / len(y)


def test_unknown_loss_is_enough_for_loss_and_hessian() -> None:
    """Only the Gauss-Newton matrix needs to know the loss function."""

    def make(params: Any) -> Probe:
        return Probe(params, passes=["loss", "hessian", "hvp"])

    trainer = make_trainer("strategy", precision="64-true")
    trainer.fit(Handwritten(_network(), make), loader(vectors()))
    probe = trainer.optimizers[0]
    assert all(torch.equal(base, again) for base, again in probe.losses)
    assert max(probe.deviations) <= 1e-12


class Declared(Handwritten):
    """The same loss, declared."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        logits = self(x)
        onehot = F.one_hot(y, 4).to(x.dtype)
        loss = -(logits.log_softmax(1) * onehot).sum() / len(y)
        return 0.5 * declare_loss(loss, logits, y, kind="cross_entropy")


def test_declared_loss_is_exact() -> None:
    """`declare_loss` gives the curvature of the cross-entropy it names."""
    seed_everything(5)
    expected: list[float] = []

    class Compared(Probe):
        def _update(self, params: list[Tensor], oracle: Any) -> None:
            x, y = batches[len(expected)]
            heads = [Head(lambda z: z, lambda z: 0.5 * F.cross_entropy(z, y))]
            dense = DenseModel(module.network).ggn((x,), heads)
            expected.append(quadratic(dense, flatten(self.direction(params))).item())
            super()._update(params, oracle)

    module = Declared(_network(), Compared)
    batches = [(x.double(), y) for x, y in loader(vectors())]
    trainer = make_trainer("strategy", directional="jvp", precision="64-true")
    trainer.fit(module, loader(vectors()))
    probe = trainer.optimizers[0]
    assert [c.item() for c in probe.curvatures] == pytest.approx(expected, rel=1e-10)
    assert max(probe.deviations) <= 1e-12


def _scaled(
    route: str, make: Callable[..., Any], epochs: int = 1
) -> tuple[LightningModule, Trainer]:
    seed_everything(5)
    module = mlp_module(make)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plugin = MixedPrecision(precision="16-mixed", device="cpu", scaler=scaler)
    trainer = make_trainer(route, plugins=[plugin], max_epochs=epochs)
    trainer.fit(module, loader(vectors(40), batch_size=20))
    return module, trainer


@pytest.mark.parametrize("route", ATTACHED)
def test_grad_scaler_steps_without_closure(route: str) -> None:
    """The scaler runs the closure itself and calls `step()`; the loss is the unscaled one."""
    _, trainer = _scaled(route, lambda params: Probe(params, passes=["directional", "loss"]))
    probe = trainer.optimizers[0]
    assert probe.closures == [False, False]
    assert len(probe.deviations) == 2
    assert max(probe.deviations) < 0.02
    assert all(torch.equal(base, again) for base, again in probe.losses)
    assert all(0.5 < base.item() < 5 for base, _ in probe.losses)


class Depths(Callback):
    """Note the depth of the function-mode stack outside `training_step`."""

    def __init__(self) -> None:
        self.seen: set[int] = set()

    def _note(self, *args: Any, **kwargs: Any) -> None:
        self.seen.add(_len_torch_function_stack())

    on_train_batch_start = on_before_backward = on_after_backward = _note
    on_before_optimizer_step = on_before_zero_grad = on_train_batch_end = _note
    on_validation_batch_start = on_validation_batch_end = on_train_epoch_end = _note
    on_exception = teardown = on_fit_end = _note


class Troubled(StockModule):
    """Raises, or returns None, in a given batch; validates."""

    def __init__(self, *args: Any, trouble: str) -> None:
        super().__init__(*args)
        self.trouble = trouble
        self.depths: set[int] = set()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        if batch_idx == 1 and self.trouble == "raise":
            raise KeyError("trouble")
        return None if batch_idx == 1 and self.trouble == "none" else loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        F.cross_entropy(self(x), y)
        self.depths.add(_len_torch_function_stack())


def _patched(owner: Any, before: set[str]) -> list[str]:
    """Return the functions that were left on an instance."""
    return [
        name
        for name, value in vars(owner).items()
        if name not in before and callable(value) and not isinstance(value, nn.Module)
    ]


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")
@every_family
@pytest.mark.parametrize("trouble", ["", "none", "raise"])
@pytest.mark.parametrize("route", ROUTES)
def test_clean_up(contract: Contract, route: str, trouble: str) -> None:
    """No function mode and no patch stays behind, whatever happened."""
    module = Troubled(_network(), contract.make, trouble=trouble)
    depths = Depths()
    trainer = make_trainer(route, callbacks=[depths], max_epochs=2, num_sanity_val_steps=1)
    module_before, strategy_before = set(vars(module)), set(vars(trainer.strategy))
    data = loader(vectors())
    if trouble == "raise":
        with pytest.raises(KeyError, match="trouble"):
            trainer.fit(module, data, data)
    else:
        trainer.fit(module, data, data)
    assert _len_torch_function_stack() == 0
    assert depths.seen == {0}
    assert module.depths == {0}
    assert _patched(module, module_before) == []
    assert _patched(trainer.strategy, strategy_before) == []
    assert "training_step" not in vars(module)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")
def test_skipped_batch_is_no_step() -> None:
    """A batch without loss moves nothing and is not asked about."""
    module = Troubled(_network(), Probe, trouble="none")
    trainer = make_trainer("strategy")
    data = loader(vectors())
    trainer.fit(module, data, data)
    assert len(trainer.optimizers[0].deviations) == 4


def test_validation_is_not_recorded() -> None:
    """Losses of validation and sanity batches do not get into the window."""

    class Validated(StockModule):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            x, y = batch
            self.log("val", F.cross_entropy(self(x), y))

    seed_everything(5)
    module = Validated(norm_dropout_module(Probe).network, Probe)
    trainer = make_trainer(
        "strategy", directional="jvp", precision="64-true", num_sanity_val_steps=2, max_epochs=2
    )
    trainer.fit(module, loader(vectors()), loader(vectors(8)))
    assert max(trainer.optimizers[0].deviations) <= 1e-12


@every_family
def test_step_without_anything_attached_names_the_routes(contract: Contract) -> None:
    """A plain loop without a closure."""
    model = _network()
    optimizer = contract.make(model.parameters())
    F.cross_entropy(model(vectors().tensors[0]), vectors().tensors[1]).backward()
    if not contract.info.asks:
        optimizer.step()
        return
    with pytest.raises(RuntimeError, match="has no curvature oracle") as refusal:
        optimizer.step()
    for word in ("single_device_curvature", "CurvatureCallback", "attach_model"):
        assert word in str(refusal.value)
