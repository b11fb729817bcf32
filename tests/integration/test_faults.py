"""Fault drill: exceptions and interrupts inside the extra passes of a Trainer's step.

Files under test: optim/base.py, optim/qlr.py, oracle/extra_pass.py, strategies/recorder.py.
"""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.trainer.states import TrainerStatus

from lightning_curvature import in_extra_pass
from tests.helpers.families import every_family
from tests.helpers.faults import (
    PLACES,
    Fault,
    Faulty,
    FaultyManual,
    assert_finite,
    assert_same_scene,
    exact_maker,
    scene,
)
from tests.helpers.modules import loader, vectors
from tests.helpers.optimizer_db import Contract
from tests.helpers.probing import ROUTES, make_trainer

BACKWARD = (torch.autograd.backward, torch.Tensor.backward)
ATTACHED = ("strategy", "callback")
ERRORS = {
    "exception": Fault("boom"),
    "runtime": RuntimeError("boom"),
    "memory": torch.OutOfMemoryError("boom"),
    "unsupported": NotImplementedError("boom"),
}
STEPS = 3
"""The fault comes in this step, counted from 1: there is a state by then."""


@pytest.fixture(autouse=True)
def interrupts() -> Iterator[None]:
    """Listen to Ctrl+C again: Lightning ignores it for ever after the first."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


def patches(trainer: Trainer) -> list[str]:
    """Return what stands on the instances that belong to a Trainer and does not come from it."""
    strategy = trainer.strategy
    return [
        f"{type(owner).__name__}.{name}"
        for owner in (strategy, strategy.precision_plugin)
        for name, value in vars(owner).items()
        if name in ("training_step", "clip_gradients", "backward", "_curvature_recorder")
        or getattr(type(value), "__module__", "").startswith("lightning_curvature.strategies.rec")
    ]


def extra_passes(module: Faulty, window: int = 1, **kwargs: Any) -> tuple[int, int]:
    """Count the extra passes before the step of the fault, and in it."""
    counts: list[int] = []

    def note(trainer: Any, *args: Any) -> None:
        counts.append(module.extra)

    trainer = make_trainer(
        "strategy",
        callbacks=[LambdaCallback(on_train_batch_end=note)],
        accumulate_grad_batches=window,
        limit_train_batches=STEPS * window,
        **kwargs,
    )
    trainer.fit(module, loader(vectors(4 * STEPS * window)))
    assert trainer.global_step == STEPS
    return counts[-1 - window], counts[-1] - counts[-1 - window]


def positions(before: int, in_step: int, window: int) -> dict[str, int]:
    """Name the extra passes of the last step: first and last micro-batch of each question."""
    return {
        "first": before,
        "first question, last micro-batch": before + window - 1,
        "last question, first micro-batch": before + in_step - window,
        "last": before + in_step - 1,
    }


def run(
    contract: Contract,
    route: str,
    position: str,
    error: BaseException,
    *,
    place: str = "step",
    window: int = 1,
    kind: type[Faulty] = Faulty,
    **kwargs: Any,
) -> tuple[Faulty, Trainer] | None:
    """Fit until the fault; return what is left, None if the optimizer makes no extra pass."""
    before, in_step = extra_passes(
        kind(exact_maker(contract)), window, directional=kwargs.get("directional", "auto")
    )
    if "directional" in contract.info.asks:
        assert in_step >= 2 * window
    if in_step == 0:
        return None
    seed_everything(3)
    module = kind(exact_maker(contract))
    module.place, module.error = place, error
    module.fail_at = {positions(before, in_step, window)[position]}
    trainer = make_trainer(route, accumulate_grad_batches=window, max_epochs=2, **kwargs)
    expected = SystemExit if isinstance(error, KeyboardInterrupt) else type(error)
    with pytest.raises(expected) as caught:
        trainer.fit(module, loader(vectors(4 * STEPS * window)))
    reason = caught.value.__context__ if expected is SystemExit else caught.value
    assert reason is error
    assert len(module.scenes) == STEPS
    return module, trainer


def assert_clean(module: Faulty, trainer: Trainer) -> None:
    """Assert that nothing is left of the failed step."""
    # Under manual optimization the hook before the step runs inside the watched closure.
    but = () if module.automatic_optimization else ("function modes", "backward")
    after = scene(module)
    assert_same_scene(after, module.scenes[-1], *but)
    assert after["function modes"] == 0
    assert after["backward"] == BACKWARD
    assert not in_extra_pass()
    assert patches(trainer) == []
    assert "training_step" not in vars(module)
    assert module.kept[0].oracle is None


def assert_goes_on(module: Faulty, route: str, validation: Any = None) -> None:
    """Assert that module and optimizer can be used in another fit."""
    module.fail_at = set()
    data = vectors(40)

    def loss() -> float:
        with torch.no_grad():
            return F.cross_entropy(module(data.tensors[0]), data.tensors[1]).item()

    module.eval()
    before = loss()
    module.train()
    trainer = make_trainer(route, max_epochs=6)
    trainer.fit(module, loader(data, batch_size=20), validation)
    assert trainer.global_step == 12
    assert trainer.optimizers[0] is module.kept[0]
    assert_finite(module, module.kept[0])
    module.eval()
    assert loss() < before


@every_family
@pytest.mark.parametrize("position", ["first", "last"])
@pytest.mark.parametrize("directional", ["fd", "jvp"])
@pytest.mark.parametrize("route", ATTACHED)
@pytest.mark.feature("Faults", "Exception inside an extra pass")
def test_exception_in_an_extra_pass(
    contract: Contract, route: str, directional: str, position: str
) -> None:
    """In the first question of a step, and in its last: all is as before the step."""
    left = run(contract, route, position, Fault("boom"), directional=directional)
    if left is not None:
        assert_clean(*left)
        assert left[1].state.status == TrainerStatus.INTERRUPTED
        assert_goes_on(left[0], route)


@every_family
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("position", ["first", "last"])
@pytest.mark.feature("Faults", "Exception inside an extra pass")
def test_every_kind_of_exception(contract: Contract, position: str, error: str) -> None:
    """Also of those that forward mode raises where a rule is missing."""
    left = run(contract, "strategy", position, ERRORS[error], directional="jvp")
    if left is not None:
        assert_clean(*left)
        assert_goes_on(left[0], "auto")


@every_family
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("position", ["first", "last"])
@pytest.mark.feature("Faults", "Exception inside an extra pass")
def test_exception_anywhere_in_the_pass(contract: Contract, position: str, place: str) -> None:
    """In a forward hook of a layer, in the update of a metric that has counted already."""
    left = run(contract, "auto", position, Fault("boom"), place=place)
    if left is not None:
        assert_clean(*left)
        assert_goes_on(left[0], "auto")


@every_family
@pytest.mark.parametrize("position", list(positions(0, 4, 2)))
@pytest.mark.parametrize("directional", ["fd", "jvp"])
@pytest.mark.feature("Faults", "Exception inside an extra pass")
def test_exception_in_an_accumulation_window(
    contract: Contract, directional: str, position: str
) -> None:
    """First and last micro-batch of each question."""
    left = run(contract, "callback", position, Fault("boom"), window=3, directional=directional)
    if left is not None:
        assert_clean(*left)
        assert_goes_on(left[0], "strategy")


@every_family
@pytest.mark.parametrize("position", ["first", "last"])
@pytest.mark.parametrize("directional", ["fd", "jvp"])
@pytest.mark.feature("Faults", "Exception inside an extra pass")
def test_exception_under_manual_optimization(
    contract: Contract, directional: str, position: str
) -> None:
    """The closure is run again; ``backward`` and the gradients are put back."""
    left = run(
        contract, "strategy", position, Fault("boom"), kind=FaultyManual, directional=directional
    )
    if left is not None:
        assert_clean(*left)
        assert_goes_on(left[0], "strategy")


@every_family
@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
@pytest.mark.parametrize("position", ["first", "last"])
@pytest.mark.feature("Faults", "Exception inside an extra pass")
def test_exception_under_another_precision(
    contract: Contract, position: str, precision: Any
) -> None:
    """Autocast and the default dtype are put back."""
    left = run(contract, "auto", position, Fault("boom"), precision=precision)
    if left is not None:
        assert_clean(*left)
        assert torch.get_default_dtype() is torch.float32
        assert not torch.is_autocast_enabled("cpu")


@every_family
@pytest.mark.parametrize("error", ["runtime", "unsupported"])
@pytest.mark.feature("Faults", "Exception inside an extra pass")
def test_forward_mode_falls_back_once(contract: Contract, error: str) -> None:
    """With the method left open such an error means finite differences; a second one is raised."""
    if "directional" not in contract.info.asks:
        return
    seed_everything(3)
    module = Faulty(contract.make)
    module.error = ERRORS[error]
    module.fail_at = {0}
    torch.set_float32_matmul_precision("medium")  # for which forward mode is chosen
    trainer = make_trainer("strategy", precision="64-true")
    with pytest.warns(RuntimeWarning, match=r"not possible in this model \(boom\)"):
        trainer.fit(module, loader(vectors(8)))
    assert_finite(module, module.kept[0])
    module = Faulty(contract.make)
    module.error, module.fail_at = ERRORS[error], {0, 1}
    trainer = make_trainer("strategy", precision="64-true")
    with (
        pytest.warns(RuntimeWarning, match=r"not possible in this model \(boom\)"),
        pytest.raises(type(module.error), match="boom"),
    ):
        trainer.fit(module, loader(vectors(8)))
    assert_clean(module, trainer)


@every_family
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("boom"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        Fault("boom"),
    ],
    ids=["gpu", "cpu", "other"],
)
@pytest.mark.feature("Faults", "Exception inside an extra pass")
def test_forward_mode_does_not_fall_back(contract: Contract, error: Exception) -> None:
    """What has nothing to do with missing rules is raised at once."""
    if "directional" not in contract.info.asks:
        return
    seed_everything(3)
    module = Faulty(contract.make)
    module.error = error
    module.fail_at = {0}
    torch.set_float32_matmul_precision("medium")
    trainer = make_trainer("strategy", precision="64-true")
    with pytest.raises(type(error)) as caught:
        trainer.fit(module, loader(vectors(8)))
    assert caught.value is error
    assert_clean(module, trainer)


@every_family
@pytest.mark.parametrize("position", ["first", "last"])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.feature("Faults", "KeyboardInterrupt inside an extra pass")
def test_keyboard_interrupt(contract: Contract, route: str, position: str) -> None:
    """Lightning shuts down and exits with status 1; module and optimizer are as before the step."""
    left = run(contract, route, position, KeyboardInterrupt())
    if left is not None:
        module, trainer = left
        assert trainer.interrupted
        assert_clean(module, trainer)
        assert_goes_on(module, route)


def _callback(kind: str, folder: Path) -> tuple[Any, Path]:
    if kind == "on-exception":
        return OnExceptionCheckpoint(folder), folder / "on_exception.ckpt"
    return ModelCheckpoint(folder, save_on_exception=True, save_top_k=0), folder


# Lightning says these of every fit with an `OnExceptionCheckpoint`.
@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable:UserWarning")
@pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available:UserWarning")
@pytest.mark.filterwarnings("ignore:.*was called without a model:UserWarning")
@every_family
@pytest.mark.parametrize("kind", ["on-exception", "model-checkpoint"])
@pytest.mark.parametrize("error", [Fault("boom"), KeyboardInterrupt()], ids=["exception", "ctrl-c"])
@pytest.mark.feature("Faults", "Checkpoint written on an exception in an extra pass")
def test_checkpoint_on_exception(
    contract: Contract, error: BaseException, kind: str, tmp_path: Path
) -> None:
    """It holds the weights before the step, and the run can be resumed from it."""
    callback, path = _callback(kind, tmp_path / "saved")
    left = run(contract, "callback", "last", error, callbacks=[callback], enable_checkpointing=True)
    if left is None:
        return
    module, _ = left
    if path.is_dir():
        (path,) = path.glob("*.ckpt")
    saved = torch.load(path, weights_only=True)
    assert saved["global_step"] == STEPS - 1
    before = module.scenes[-1]
    for name, tensor in {**before["parameters"], **before["buffers"]}.items():
        if name in saved["state_dict"]:
            assert torch.equal(saved["state_dict"][name], tensor), name
    fresh = Faulty(contract.make)
    callback, _ = _callback(kind, tmp_path / "saved")
    trainer = make_trainer(
        "strategy", max_epochs=3, callbacks=[callback], enable_checkpointing=True
    )
    trainer.fit(fresh, loader(vectors(4 * STEPS)), ckpt_path=path, weights_only=True)
    assert trainer.global_step > STEPS
    assert_finite(fresh, fresh.kept[0])


class Upset(Faulty):
    """Fails outside of the extra passes."""

    where = ""

    def _upset(self, where: str) -> None:
        if self.where == where and self.trainer.global_step == STEPS - 1:
            raise self.error

    def on_after_backward(self) -> None:
        self._upset("after backward")

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        super().on_before_optimizer_step(optimizer)
        self._upset("before step")

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self._upset("before zero_grad")

    def on_train_batch_end(self, *args: Any) -> None:
        if self.where == "batch end" and self.trainer.global_step == STEPS:
            raise self.error

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        F.cross_entropy(self(batch[0]), batch[1])
        if self.where == "validation" and not self.trainer.sanity_checking:
            raise self.error


class Endangered(torch.utils.data.Dataset[Any]):
    """The vectors; one row cannot be read."""

    def __init__(self, broken: bool) -> None:
        self.tensors = vectors(4 * STEPS).tensors
        self.broken = broken

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> Any:
        if self.broken and index == len(self) - 1:
            raise Fault("boom")
        return self.tensors[0][index], self.tensors[1][index]


@every_family
@pytest.mark.parametrize(
    "where",
    ["after backward", "before step", "before zero_grad", "batch end", "validation", "data"],
)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.feature("Faults", "Exception in a hook, in validation or in the data loader")
def test_exception_outside_of_the_step(contract: Contract, route: str, where: str) -> None:
    """Everything is detached, and a new fit works."""
    seed_everything(3)
    module = Upset(contract.make)
    module.where = where
    data = loader(Endangered(where == "data"))
    trainer = make_trainer(route, max_epochs=2, num_sanity_val_steps=1, val_check_interval=1)
    with pytest.raises(Fault, match="boom"):
        trainer.fit(module, data, loader(vectors(4)))
    assert patches(trainer) == []
    assert vars(module).keys().isdisjoint({"training_step", "backward"})
    assert module.kept[0].oracle is None
    after = scene(module)
    assert after["function modes"] == 0
    assert not after["in extra pass"]
    module.where = ""
    assert_goes_on(module, route, loader(vectors(4)))
