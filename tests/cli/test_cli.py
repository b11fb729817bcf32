"""Tests of lightning_curvature/cli.py in this process; test_cli_table.py runs it as a program."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_curvature.cli import main

ARGS = [
    "--model=lightning.pytorch.demos.boring_classes.BoringModel",
    "--seed_everything=1",
    "--trainer.accelerator=cpu",
    "--trainer.max_steps=1",
    "--trainer.limit_val_batches=0",
    "--trainer.limit_test_batches=1",
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    monkeypatch.setattr(sys, "argv", ["lightning-curvature"])
    monkeypatch.setattr(sys, "path", list(sys.path))

    def call(*args: str) -> None:
        main([*args])

    return call


def test_twice_in_one_folder(run: Callable[..., None]) -> None:
    run("fit", *ARGS, "--trainer.max_epochs=3")
    first = Path("config.yaml").read_text()
    run("fit", *ARGS, "--trainer.max_epochs=4")
    assert "max_epochs: 3" in first
    assert "max_epochs: 4" in Path("config.yaml").read_text()


def test_num_threads(run: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    run("fit", *ARGS)
    assert chosen == []
    run("test", *ARGS, "--num_threads=3")
    assert chosen == [3]


def test_help_names_the_options(
    run: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run("fit", "--help")
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith("usage: lightning-curvature")
    assert "--test_after_fit" in said
    assert "--num_threads" in said


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), 'expected "subcommand" to be one of {fit,validate,test,predict}'),
        (("fit",), "fit.model"),
        (("fit", *ARGS, "--num_threads=0"), "num_threads"),
        (("fit", *ARGS, "--optimizer=AdamQLRR"), "Expected a dot import path string: AdamQLRR"),
        (
            ("fit", *ARGS[1:], "--model=lightning.pytorch.LightningModule"),
            "has no optimizer. Choose one",
        ),
    ],
)
def test_errors(
    run: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    args: tuple[str, ...],
    message: str,
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(*args)
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_modules_of_the_present_folder_are_found(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    elsewhere: list[Any] = [path for path in sys.path if path not in ("", str(tmp_path))]
    monkeypatch.setattr(sys, "path", elsewhere)
    (tmp_path / "module_of_the_present_folder.py").write_text(
        "from lightning.pytorch.demos.boring_classes import BoringModel as Mine  # noqa: F401\n"
    )
    run("fit", *ARGS[1:], "--model=module_of_the_present_folder.Mine")
