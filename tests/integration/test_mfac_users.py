"""MFAC in a Trainer and on a command line: what a user may do to it without changing a module."""

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor, nn

from lightning_curvature import MFAC
from lightning_curvature.cli import main
from tests.helpers.features import batched, learnable
from tests.helpers.mfac_steps import window_of
from tests.helpers.modules import MakeOptimizer, StockModule, mlp_module
from tests.helpers.optimizer_db import identical
from tests.helpers.probing import assert_bitwise, make_trainer, parameters_and_buffers

OPTIONS: dict[str, Any] = {"lr": 0.2, "num_grads": 8, "damping": 0.1, "momentum": 0.5}
DOUBLE: dict[str, Any] = {"precision": "64-true"}


def maker(**options: Any) -> MakeOptimizer:
    return lambda params: MFAC(params, **{**OPTIONS, **options})


def module(**options: Any) -> StockModule:
    """Build a module that knows nothing of curvature, always with the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return mlp_module(maker(**options))


class Gradients(Callback):
    """Notes the gradients that the optimizer gets, and the row that it keeps."""

    def __init__(self) -> None:
        self.before: list[Tensor] = []
        self.kept: list[Tensor] = []

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        """Note the gradient, before it is clipped."""
        grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
        self.before.append(torch.cat([grad.reshape(-1) for grad in grads]).clone())

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Note the newest row."""
        window = window_of(trainer.optimizers[0]) if trainer.global_step else None
        if window is not None and int(window["inserted"]) > len(self.kept):
            slot = (int(window["inserted"]) - 1) % len(window["rows"])
            self.kept.append(window["rows"][slot] * window["scales"][slot])


def fit(model: LightningModule, data: Any = None, **settings: Any) -> Trainer:
    trainer = make_trainer("none", **settings)
    trainer.fit(model, batched() if data is None else data)
    return trainer


# In a Trainer


def test_a_fit_is_the_plain_loop() -> None:
    """Nothing need be attached, and the loss falls."""
    model = module()
    fit(model, max_epochs=3)
    plain = module()
    optimizer = MFAC(plain.parameters(), **OPTIONS)
    losses = []
    for _ in range(3):
        for batch in batched():
            optimizer.zero_grad()
            loss = plain.training_step(batch, 0)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert_bitwise(parameters_and_buffers(model), parameters_and_buffers(plain))
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


@pytest.mark.parametrize("count", [2, 4])
def test_one_row_per_step(count: int) -> None:
    """Of micro-batches, the mean of their gradients."""
    watched = []
    for size, window in ((8, 1), (8 // count, count)):
        notes = Gradients()
        model = module()
        trainer = fit(
            model,
            batched(batch_size=size),
            accumulate_grad_batches=window,
            callbacks=[notes],
            **DOUBLE,
        )
        assert trainer.global_step == 5
        assert window_of(trainer.optimizers[0])["inserted"] == 5
        assert len(notes.kept) == 5
        for gradient, row in zip(notes.before, notes.kept, strict=True):
            assert torch.equal(gradient, row)
        watched.append((notes.kept, list(parameters_and_buffers(model).values())))
    torch.testing.assert_close(watched[0], watched[1], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_rows_are_clipped_gradients(algorithm: str) -> None:
    notes = Gradients()
    limit = 0.05
    fit(
        module(),
        gradient_clip_val=limit,
        gradient_clip_algorithm=algorithm,
        callbacks=[notes],
        **DOUBLE,
    )
    assert len(notes.kept) == 5
    for gradient, row in zip(notes.before, notes.kept, strict=True):
        if algorithm == "value":
            expected = gradient.clamp(-limit, limit)
        else:
            expected = gradient * (limit / gradient.norm()).clamp(max=1.0)
        assert not torch.equal(gradient, expected)
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("bf16-mixed", torch.float32), ("bf16-true", torch.float32), ("64-true", torch.float64)],
)
def test_precisions(precision: Any, dtype: torch.dtype) -> None:
    """The window of half-precision parameters is float32."""
    model = module()
    trainer = fit(model, precision=precision, max_epochs=2)
    window = window_of(trainer.optimizers[0])
    assert window["rows"].dtype == dtype
    assert window["inserted"] == 10
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
@pytest.mark.parametrize("row_dtype", ["auto", "bfloat16"])
def test_a_checkpoint_goes_on(row_dtype: str, tmp_path: Path) -> None:
    """With the window and its place in it: bit for bit, read with weights only."""
    whole = module(row_dtype=row_dtype)
    saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    trainer = fit(whole, max_epochs=4, callbacks=[saving], enable_checkpointing=True)
    # While the window fills, and after it has come around.
    for epoch in (0, 2):
        path = tmp_path / f"epoch={epoch}.ckpt"
        (saved,) = torch.load(path, weights_only=True)["optimizer_states"]
        assert saved["curvature"]["window"]["inserted"] == 5 * (epoch + 1)
        other = module(row_dtype=row_dtype)
        # The checkpoint decides.
        other.make_optimizer = maker(num_grads=3, lr=1.0)
        again = make_trainer("none", max_epochs=4)
        again.fit(other, batched(), ckpt_path=path)
        assert_bitwise(parameters_and_buffers(other), parameters_and_buffers(whole))
        assert identical(again.optimizers[0].state_dict(), trainer.optimizers[0].state_dict())


class Thawing(BaseFinetuning):
    """Trains the last layer, and all of it from the second epoch on."""

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        """Freeze the first layer."""
        self.freeze(pl_module.network[0])

    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: Any) -> None:
        """Add a group for the first layer."""
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.network[0], optimizer, lr=0.1)


def test_layers_that_thaw() -> None:
    """The window gets columns for them and keeps what it had."""
    model = module()
    last = sum(p.numel() for p in model.network[2].parameters())
    # The callback takes frozen parameters away from the optimizer in this way.
    model.make_optimizer = lambda params: maker()([p for p in params if p.requires_grad])
    seen: list[dict[str, Any]] = []

    class Notes(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            seen.append(window_of(trainer.optimizers[0]))

    start = parameters_and_buffers(model)
    trainer = fit(model, max_epochs=2, callbacks=[Thawing(), Notes()])
    assert [window["num_columns"] for window in seen] == [last, last + 5 * 8 + 8]
    assert [int(window["inserted"]) for window in seen] == [5, 10]
    # Slots 2 to 4 are of the first epoch.
    assert torch.equal(seen[1]["rows"][2:5, :last], seen[0]["rows"][2:5])
    assert not seen[1]["rows"][2:5, last:].any()
    assert len(trainer.optimizers[0].param_groups) == 2
    assert not torch.equal(model.network[0].weight, start["network.0.weight"])


def test_batches_without_a_loss() -> None:
    """They put no row into the window."""

    class Picky(StockModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx in (1, 2) else loss

    network = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4))
    with warnings.catch_warnings():
        # Lightning says so once per process, which may have been before.
        warnings.filterwarnings("ignore", "`training_step` returned `None`")
        trainer = fit(Picky(network, maker()), batched(learnable()))
    assert window_of(trainer.optimizers[0])["inserted"] == 3


# On a command line

ARGS = [
    "--seed_everything=1",
    "--trainer.accelerator=cpu",
    "--trainer.max_steps=3",
    "--trainer.limit_val_batches=0",
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--optimizer.num_grads=2",
    "--optimizer.damping=0.01",
    "--optimizer.row_dtype=bfloat16",
]
BORING = "lightning.pytorch.demos.boring_classes.BoringModel"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[MFAC]:
    """List the optimizers that are made."""
    monkeypatch.setattr(sys, "argv", ["script.py"])
    found: list[MFAC] = []
    forget = MFAC._forget

    # Not the constructor, whose signature is what the command line offers.
    def noted(self: MFAC) -> None:
        forget(self)
        found.append(self)

    monkeypatch.setattr(MFAC, "_forget", noted)
    return found


@pytest.mark.filterwarnings("ignore:.*configure_optimizers` will be overridden by:UserWarning")
@pytest.mark.parametrize("name", ["MFAC", "lightning_curvature.MFAC"])
@pytest.mark.parametrize("program", ["ours", "LightningCLI"])
def test_by_name(name: str, program: str, made: list[MFAC]) -> None:
    """In our program and in a user's script, with its arguments."""
    args = ["fit", f"--optimizer={name}", *ARGS]
    if program == "ours":
        main([*args, f"--model={BORING}"])
    else:
        LightningCLI(BoringModel, args=args)
    (optimizer,) = made
    group = optimizer.param_groups[0]
    assert (group["num_grads"], group["damping"], group["lr"]) == (2, 0.01, 1e-3)
    window = window_of(optimizer)
    assert window["inserted"] == 3
    assert window["rows"].dtype == torch.bfloat16
    assert window["rows"].shape == (2, 66)


def test_a_wrong_argument(made: list[MFAC], capsys: pytest.CaptureFixture[str]) -> None:
    args = ["fit", "--optimizer=MFAC", *ARGS, f"--model={BORING}"]
    with pytest.raises(SystemExit):
        main([*args, "--optimizer.placement=disk"])
    said = " ".join(capsys.readouterr().err.split())
    assert "placement" in said
    assert "disk" in said
    assert not made
