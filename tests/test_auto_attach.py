"""lightning_curvature_auto_attach: the entry point that every Trainer of the environment calls."""

import ast
import sys
from pathlib import Path

import lightning as L
import pytest

import lightning_curvature_auto_attach as entry
from lightning_curvature.callbacks.auto_attach import AutoAttachCallback


def test_gives_one_callback() -> None:
    (callback,) = entry.auto_attach_callbacks()
    assert type(callback) is AutoAttachCallback


@pytest.mark.parametrize("value", ["0", "false", "Off", " no "])
def test_switched_off(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(entry.VARIABLE, value)
    assert entry.auto_attach_callbacks() == []


def test_a_broken_package_breaks_no_trainer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # None in sys.modules makes the import fail.
    monkeypatch.setitem(sys.modules, "lightning_curvature.callbacks.auto_attach", None)
    assert entry.auto_attach_callbacks() == []
    assert "could not prepare to attach by itself" in caplog.text


def test_imports_nothing_heavy() -> None:
    tree = ast.parse(Path(entry.__file__).read_text("utf-8"))
    imported = {
        name.name
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in node.names
    }
    assert imported == {"logging", "os", "Any"}


def test_lightning_finds_it() -> None:
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    assert [type(c) for c in trainer.callbacks].count(AutoAttachCallback) == 1
