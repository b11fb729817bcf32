"""Tests of lightning_curvature/demos/black_box.py."""

from typing import Any

import lightning as L
import pytest
import torch

from lightning_curvature import MeZO
from lightning_curvature.demos import (
    BlackBoxClassifier,
    DigitsDataModule,
    TurnedDigitsDataModule,
)


def trainer(**kwargs: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )


def accuracy(module: BlackBoxClassifier, data: DigitsDataModule) -> float:
    (result,) = trainer().test(module, data, verbose=False)
    return result["test_acc"]


def test_a_quarter_turn_is_exact() -> None:
    images = torch.rand(3, 1, 8, 8)
    turned, labels = TurnedDigitsDataModule(angle=90).on_after_batch_transfer(
        (images, torch.arange(3)), 0
    )
    torch.testing.assert_close(turned, images.rot90(1, (2, 3)))
    assert labels.tolist() == [0, 1, 2]


def test_only_turned_images_are_misread() -> None:
    module = BlackBoxClassifier()
    assert accuracy(module, DigitsDataModule()) > 0.95
    turned = TurnedDigitsDataModule(angle=35)
    assert accuracy(module, turned) < 0.5
    # The opposite turn, by hand.
    turn = torch.tensor(35.0).deg2rad()
    rows = [[turn.cos(), turn.sin(), 0], [-turn.sin(), turn.cos(), 0]]
    module.view.data.copy_(torch.tensor(rows))
    assert accuracy(module, turned) > 0.9


def test_the_view_is_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    L.seed_everything(0)
    module, data = BlackBoxClassifier(), TurnedDigitsDataModule(angle=35)
    monkeypatch.setattr(
        BlackBoxClassifier,
        "configure_optimizers",
        lambda self: MeZO(self.parameters(), lr=0.01, perturbation_scale=0.03),
    )
    trainer(max_epochs=3, limit_val_batches=0).fit(module, data)
    assert module.view.grad is None
    assert accuracy(module, data) > 0.85


def test_it_has_no_gradient() -> None:
    module, data = BlackBoxClassifier(), TurnedDigitsDataModule()
    accuracy(module, data)
    assert not module(torch.rand(2, 1, 8, 8)).requires_grad


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"Invalid angle=180: must be in \[-180, 180\)"):
        TurnedDigitsDataModule(angle=180)
