"""Every optimizer beside the callbacks that save checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint

from tests.helpers.families import every_family
from tests.helpers.features import (
    BATCHES,
    EPOCHS,
    Validated,
    batched,
    noisy_module,
    plain,
    prepare,
    quiet,
    train,
)
from tests.helpers.optimizer_db import Contract, identical
from tests.helpers.probing import assert_bitwise

pytestmark = [
    quiet,
    # Resuming in the middle of an epoch, with a loader that has no state.
    pytest.mark.filterwarnings("ignore:You.re resuming from a checkpoint:UserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
]


def title(name: str) -> Any:
    """Name a row of the compatibility table."""
    return pytest.mark.feature("Callbacks", name)


def load(path: Path | str) -> dict[str, Any]:
    """Read a checkpoint the safe way."""
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    return checkpoint


def assert_is_step(path: Path | str, contract: Contract, step: int) -> None:
    """Assert that a checkpoint holds the weights of a step of the plain run."""
    checkpoint = load(path)
    assert checkpoint["global_step"] == step
    expected = plain(contract).watch.weights[step - 1]
    assert_bitwise({name: checkpoint["state_dict"][name] for name in expected}, expected)


@every_family
@title("`ModelCheckpoint(every_n_train_steps=...)`")
def test_checkpoints_between_steps(contract: Contract, tmp_path: Path) -> None:
    """All of them load safely, hold the step they name, and training does not notice."""
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
    run = train(contract, callbacks=[saving], enable_checkpointing=True)
    files = sorted(tmp_path.glob("*.ckpt"))
    assert [path.stem for path in files] == ["step=12", "step=4", "step=8"]
    for path in files:
        assert_is_step(path, contract, int(path.stem.removeprefix("step=")))
    assert_bitwise(run.tensors, plain(contract).tensors)


@every_family
@title("`ModelCheckpoint(monitor=..., save_last=True)`")
def test_the_best_and_the_last(contract: Contract, tmp_path: Path) -> None:
    """The last one continues bit for bit."""
    saving = ModelCheckpoint(tmp_path, "best", monitor="val_loss", save_last=True)
    run = train(contract, callbacks=[saving], enable_checkpointing=True, val=batched())
    assert_is_step(tmp_path / "last.ckpt", contract, EPOCHS * BATCHES)
    (state,) = load(tmp_path / "last.ckpt")["optimizer_states"]
    assert identical(state, run.optimizer.state_dict())
    assert saving.best_model_score is not None
    losses = run.watch.losses
    assert float(saving.best_model_score) < sum(losses[:BATCHES]) / BATCHES


@every_family
@title("`ModelCheckpoint(save_weights_only=True)`")
def test_weights_alone(contract: Contract, tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, "weights", save_weights_only=True)
    train(contract, callbacks=[saving], enable_checkpointing=True)
    assert_is_step(tmp_path / "weights.ckpt", contract, EPOCHS * BATCHES)
    assert "optimizer_states" not in load(tmp_path / "weights.ckpt")


class Breaks(Validated):
    """Raises in one batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Return the loss, or raise in the eighth batch."""
        if self.trainer.global_step == 7:
            raise KeyError("trouble")
        return super().training_step(batch, batch_idx)


def breaking(make_optimizer: Any) -> Breaks:
    """Build the module."""
    return Breaks(noisy_module(make_optimizer).network, make_optimizer)


@pytest.mark.filterwarnings("ignore:`.fit.ckpt_path=None.` was called:UserWarning")
@pytest.mark.filterwarnings("ignore:.fit.ckpt_path=.last.. is set:UserWarning")
@every_family
@pytest.mark.parametrize("kind", ["OnExceptionCheckpoint", "ModelCheckpoint"])
@pytest.mark.feature(
    "Callbacks", "`OnExceptionCheckpoint`, `ModelCheckpoint(save_on_exception=True)`"
)
def test_a_checkpoint_after_an_exception(contract: Contract, kind: str, tmp_path: Path) -> None:
    """It holds the state before the batch that failed, and training can go on from there."""
    if kind == "ModelCheckpoint":
        saving: Any = ModelCheckpoint(tmp_path, "saved", save_on_exception=True)
    else:
        saving = OnExceptionCheckpoint(tmp_path, "saved")
    with pytest.raises(KeyError, match="trouble"):
        train(contract, breaking, callbacks=[saving], enable_checkpointing=True)
    (path,) = tmp_path.glob("*.ckpt")
    assert_is_step(path, contract, 7)
    rest = prepare(contract)
    rest.trainer.fit(rest.module, batched(), ckpt_path=path)
    assert rest.steps == EPOCHS * BATCHES
    assert rest.optimizer.oracle is None
    assert all(t.isfinite().all() for t in rest.tensors.values())
