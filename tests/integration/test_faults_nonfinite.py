"""Fault drill: losses and gradients that are not finite, and training steps without a loss.

Files under test: optim/qlr.py, optim/failures.py, optim/base.py, strategies/recorder.py.
"""

import re
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor

from tests.helpers.families import every_family
from tests.helpers.faults import assert_finite
from tests.helpers.modules import loader, vectors
from tests.helpers.optimizer_db import Contract
from tests.helpers.probing import ROUTES, Probe, make_trainer
from tests.helpers.spoiled import (
    BAD_EXTRA,
    BAD_GRADIENTS,
    GOOD_LOSSES,
    SpoiledModule,
    Spoiler,
    weights_of,
)

# Two in a row, one at the end of an epoch, one in the last but one.
BAD = (2, 3, 9, 31)
# In the middle of a window, at the end of a short one, at the start of one.
BAD_MICRO = (3, 9, 30)
PER_EPOCH, EPOCHS = 5, 8
LIMIT = 4

NO_LOSS = "ignore:`training_step` returned `None`:UserWarning"


class Diary(Callback):
    """Notes losses and weights, and looks for what is not finite after every batch.

    Args:
        start: First batch after which the state of the optimizer is looked at: an average that has
            not begun is NaN.
    """

    def __init__(self, start: int = 0) -> None:
        self.start = start
        self.losses: list[float] = []
        self.weights: list[Tensor] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.weights.append(weights_of(pl_module))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any
    ) -> None:
        self.weights.append(weights_of(pl_module))
        assert self.weights[-1].isfinite().all()
        if len(self.weights) > self.start + 1:
            assert_finite(pl_module, trainer.optimizers[0])
        if outputs:
            self.losses.append(outputs["loss"].item())

    def moved(self) -> list[bool]:
        """Tell of each batch whether it moved the weights."""
        return [
            not torch.allclose(new, old, rtol=1e-6, atol=1e-7)
            for old, new in zip(self.weights, self.weights[1:], strict=False)
        ]


# A curvature that is not finite: with the guard the damping alone sets the length of the step.
UNGUARDED = {"curvature_guard": False}


def fit(
    contract: Contract, route: str, spoiler: Spoiler, **kwargs: Any
) -> tuple[SpoiledModule, Diary, list[str]]:
    """Fit; return the module, what was noted and the warnings."""
    seed_everything(3)
    options = {"max_failures": LIMIT, **kwargs.pop("options", {})}
    module = SpoiledModule(contract.making(**contract.known(options)), spoiler)
    diary = kwargs.pop("diary", None) or Diary()
    data = loader(vectors(4 * PER_EPOCH))
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", category=RuntimeWarning)
        if route == "plain":
            plain_loop(module, data, diary)
        else:
            trainer = make_trainer(route, callbacks=[diary], max_epochs=EPOCHS, **kwargs)
            trainer.fit(module, data)
    return module, diary, [str(w.message) for w in caught if w.category is RuntimeWarning]


def plain_loop(module: SpoiledModule, data: Any, diary: Diary) -> None:
    """The loop of `attach_model`."""
    optimizer: Any = module.configure_optimizers()
    criterion = optimizer.attach_model(module, module.spoiler.loss)
    diary.weights.append(weights_of(module))
    for _ in range(EPOCHS):
        for x, y in data:
            optimizer.zero_grad()
            loss = criterion(module(x), y)
            loss.backward()
            optimizer.step()
            assert_finite(module, optimizer)
            diary.weights.append(weights_of(module))
            diary.losses.append(loss.item())
    module.kept = optimizer


def optimizer_of(module: SpoiledModule) -> Any:
    """Return the optimizer that was used."""
    return module.trainer.optimizers[0] if module._trainer is not None else module.kept


def assert_training_went_on(diary: Diary) -> None:
    """Assert that the loss fell, bad batches left out."""
    good = [loss for loss in diary.losses if torch.tensor(loss).isfinite()]
    assert sum(good[-PER_EPOCH:]) < 0.9 * sum(good[:PER_EPOCH])


@every_family
@pytest.mark.parametrize("kind", BAD_GRADIENTS)
@pytest.mark.parametrize("route", [*ROUTES, "plain"])
@pytest.mark.feature("Faults", "NaN or infinity in the batch, the loss or the gradient")
def test_bad_gradient(contract: Contract, route: str, kind: str) -> None:
    """The step is skipped and counted, the user is told once, and training goes on."""
    module, diary, said = fit(contract, route, Spoiler(kind, BAD))
    assert_training_went_on(diary)
    still = [number for number, moved in enumerate(diary.moved()) if not moved]
    if contract.forward_only and kind in GOOD_LOSSES:
        assert still == said == []
        return
    assert still == list(BAD)
    if contract.takes("max_failures"):
        assert optimizer_of(module).stats["skipped_steps"] == len(BAD)
        name = contract.info.cls.__name__
        told = [text for text in said if f"{name} skipped 2 of {LIMIT} steps" in text]
        assert len(told) == 1
        # Factors were spared, too, and counted as such.
        spared = f"{name} kept old factors 2 times"
        assert all(spared in text for text in said if text not in told)


@every_family
@pytest.mark.parametrize("kind", BAD_EXTRA)
@pytest.mark.parametrize("route", [*ROUTES, "plain"])
@pytest.mark.feature("Faults", "NaN or infinity in an extra pass only")
def test_bad_extra_pass(contract: Contract, route: str, kind: str) -> None:
    """A curvature that is not finite skips the step, a new loss that is not takes it back."""
    module, diary, _ = fit(contract, route, Spoiler(kind, BAD), options=UNGUARDED)
    assert_training_went_on(diary)
    still = [number for number, moved in enumerate(diary.moved()) if not moved]
    assert set(still) <= set(BAD)
    if contract.runs_again and module.spoiler.extra == 2:  # the curvature, and the new loss
        assert still == list(BAD)
        skipped = optimizer_of(module).stats["skipped_steps"]
        assert skipped == (len(BAD) if kind == BAD_EXTRA[0] else 0)


@every_family
@pytest.mark.feature("Faults", "NaN or infinity in an extra pass only")
def test_bad_extra_pass_by_default(contract: Contract) -> None:
    """Whatever the optimizer makes of it."""
    _, diary, _ = fit(contract, "strategy", Spoiler(BAD_EXTRA[0], BAD))
    assert_training_went_on(diary)


@every_family
@pytest.mark.parametrize("kind", [*BAD_GRADIENTS, *BAD_EXTRA])
@pytest.mark.feature("Faults", "NaN or infinity in the batch, the loss or the gradient")
def test_bad_first_steps(contract: Contract, kind: str) -> None:
    """There is no state yet: the first good step makes one."""
    _, diary, _ = fit(contract, "auto", Spoiler(kind, [0, 1]), diary=Diary(start=2))
    assert_training_went_on(diary)


@every_family
@pytest.mark.parametrize("kind", [BAD_GRADIENTS[0], BAD_EXTRA[0]])
@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.feature("Faults", "NaN or infinity in the batch, the loss or the gradient")
def test_bad_micro_batch(contract: Contract, window: int, kind: str) -> None:
    """One bad micro-batch spoils its accumulation window, also a short one, and no other."""
    module, diary, _ = fit(
        contract,
        "callback",
        Spoiler(kind, BAD_MICRO),
        accumulate_grad_batches=window,
        options=UNGUARDED,
    )
    assert_training_went_on(diary)
    if contract.takes("max_failures") and (contract.runs_again or kind in BAD_GRADIENTS):
        skipped = optimizer_of(module).stats["skipped_steps"]
        # Where only the curvature along the old update is not finite, K-FAC leaves that one out.
        spared = contract.takes("adaptive_momentum") and kind == BAD_EXTRA[0]
        assert skipped == len(BAD_MICRO) - spared


@pytest.mark.filterwarnings(NO_LOSS)
@every_family
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.feature("Faults", "training_step returns None")
def test_no_loss(contract: Contract, route: str) -> None:
    """A batch without loss is no step: nothing moves, nothing is counted."""
    module, diary, said = fit(contract, route, Spoiler("none", BAD))
    assert_training_went_on(diary)
    still = [number for number, moved in enumerate(diary.moved()) if not moved]
    assert still == list(BAD)
    optimizer = optimizer_of(module)
    assert optimizer._steps_done == PER_EPOCH * EPOCHS - len(BAD)
    assert said == []
    if contract.takes("max_failures"):
        assert optimizer.stats["skipped_steps"] == 0


@pytest.mark.filterwarnings(NO_LOSS)
@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("route", ROUTES)
def test_no_loss_inside_a_window(route: str, position: int) -> None:
    """Slope, curvature and loss belong to the micro-batches that had a loss."""
    seed_everything(3)
    spoiler = Spoiler("none", [position])

    def make(params: Any) -> Probe:
        return Probe(params, passes=("directional", "loss"))

    module = SpoiledModule(make, spoiler)
    # The entry point chooses finite differences, whose slope is less exact.
    trainer = make_trainer(route, directional="jvp", accumulate_grad_batches=3, precision="64-true")
    trainer.fit(module, loader(vectors(24)))
    probe = trainer.optimizers[0]
    assert len(probe.deviations) == 2
    assert max(probe.deviations) <= (1e-4 if route == "auto" else 1e-12)
    assert all(torch.equal(base, again) for base, again in probe.losses)


@pytest.mark.filterwarnings(NO_LOSS)
@every_family
@pytest.mark.parametrize("missing", [[0], [1], [0, 1], [4]])
@pytest.mark.feature("Faults", "training_step returns None")
def test_no_loss_under_accumulation(contract: Contract, missing: list[int]) -> None:
    """Windows of two and a short one: without any loss there is no step."""
    module, diary, _ = fit(
        contract, "strategy", Spoiler("none", missing), accumulate_grad_batches=2
    )
    assert_training_went_on(diary)
    steps = 3 * EPOCHS - (missing in ([0, 1], [4]))
    assert optimizer_of(module)._steps_done == steps
    moved = diary.moved()[:PER_EPOCH]
    assert moved[1] is (missing != [0, 1])
    assert moved[4] is (missing != [4])


@every_family
@pytest.mark.parametrize("route", [*ROUTES, "plain"])
@pytest.mark.parametrize("kind", ["nan batch", "infinite loss", BAD_EXTRA[0]])
@pytest.mark.feature("Faults", "Too many unusable steps in a row")
def test_max_failures(contract: Contract, route: str, kind: str) -> None:
    """Training stops with the recent history, and everything is detached."""
    if not contract.takes("max_failures"):
        return
    if kind in BAD_EXTRA and not contract.runs_again:
        pytest.skip("makes no extra pass")
    spoiler = Spoiler(kind, range(6, 100))
    name = contract.info.cls.__name__
    with pytest.raises(RuntimeError, match=rf"^{name} found no usable step \d times") as caught:
        fit(contract, route, spoiler, options=UNGUARDED)
    text = str(caught.value)
    assert spoiler.number == 9
    assert f"{LIMIT} times in a row" in text
    lines = [line for line in text.splitlines() if re.match(r"\s*step \d+:", line)]
    assert [int(re.findall(r"step (\d+):", line)[0]) for line in lines] == [7, 8, 9, 10]
    wrong = "curvature nan" if kind == BAD_EXTRA[0] else "grad_norm nan"
    if contract.forward_only:
        wrong = "projected_grad nan"
    assert all(wrong in line for line in lines)
    if contract.takes("damping_algorithm"):
        assert all("damping" in line for line in lines)


@every_family
@pytest.mark.filterwarnings("ignore:.*kept old factors:RuntimeWarning")
@pytest.mark.feature("Faults", "Too many unusable steps in a row")
def test_the_count_survives_a_checkpoint(contract: Contract, tmp_path: Path) -> None:
    """Two bad steps before the interruption and two after make four."""
    if not contract.takes("max_failures"):
        return
    make = contract.making(max_failures=LIMIT)
    data = loader(vectors(16))
    trainer = make_trainer("strategy")
    with pytest.warns(RuntimeWarning, match="skipped 2 of 4 steps"):
        trainer.fit(SpoiledModule(make, Spoiler("nan batch", [2, 3])), data)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    trainer = make_trainer("callback", max_epochs=2)
    module = SpoiledModule(make, Spoiler("nan batch", range(4)))
    with (
        pytest.warns(RuntimeWarning, match="skipped 3 of 5 steps"),
        pytest.raises(RuntimeError, match="4 times in a row"),
    ):
        trainer.fit(module, data, ckpt_path=tmp_path / "half.ckpt")
    assert module.spoiler.number == 1
    assert_finite(module, trainer.optimizers[0])
    assert trainer.optimizers[0].oracle is None


@every_family
@pytest.mark.feature("Faults", "NaN or infinity in the batch, the loss or the gradient")
def test_nan_loss_with_a_finite_gradient(contract: Contract) -> None:
    """The gradient can be used; what the model promised cannot be judged.

    Who has nothing but the loss skips the step, and says so.
    """

    class Shifted(SpoiledModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss + float("nan") if self.spoiler.number in BAD else loss

    seed_everything(3)
    module = Shifted(contract.make, Spoiler("", ()))
    trainer = make_trainer("auto", callbacks=[Diary()], max_epochs=EPOCHS)
    name = contract.info.cls.__name__
    told = (
        pytest.warns(RuntimeWarning, match=f"{name} skipped 3 of 10 steps: a loss was not finite")
        if contract.forward_only
        else nullcontext()
    )
    with told:
        trainer.fit(module, loader(vectors(4 * PER_EPOCH)))
    x, y = vectors(4 * PER_EPOCH).tensors
    seed_everything(3)
    fresh = SpoiledModule(contract.make, Spoiler("", ()))
    with torch.no_grad():
        assert F.cross_entropy(module(x), y) < 0.9 * F.cross_entropy(fresh(x), y)
