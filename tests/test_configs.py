"""Tests of every file in configs/: parsed against the real signatures and run."""

import csv
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_curvature.cli import CurvatureCLI
from lightning_curvature.optim.zeroth_order import ZerothOrderOptimizer

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FRAGMENTS = sorted(
    str(path.relative_to(CONFIGS))
    for path in CONFIGS.rglob("*.yaml")
    if path.parent.name != "recipes"
)
RECIPES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.glob("recipes/*.yaml"))
DIGITS = "recipes/digits_adamqlr.yaml"
DIGITS_DDP = "recipes/digits_adamqlr_ddp.yaml"
DIGITS_KFAC = "recipes/digits_kfac.yaml"
DIGITS_MEZO = "recipes/digits_mezo.yaml"
DIGITS_MFAC = "recipes/digits_mfac.yaml"
DIGITS_PRUNING = "recipes/digits_pruning.yaml"
CHAR_LM = "recipes/char_lm_sophiag.yaml"

TARGET_ACCURACY = {
    DIGITS: 0.96,
    DIGITS_DDP: 0.96,
    DIGITS_KFAC: 0.98,
    DIGITS_MEZO: 0.93,
    DIGITS_MFAC: 0.98,
    DIGITS_PRUNING: 0.97,
}
# Of the last training loss to the first. Without training MeZO's accuracy is 0.46.
LARGEST_LOSS_RATIO = {**dict.fromkeys(TARGET_ACCURACY, 0.1), DIGITS_MEZO: 0.5}
COLUMNS = {"train_loss", "val_loss", "val_acc", "test_acc"}
DAMPED = {"curvature/loss", "curvature/lr", "curvature/damping", "curvature/reduction_ratio"}
OWN_COLUMNS = {
    DIGITS: DAMPED,
    DIGITS_DDP: DAMPED,
    DIGITS_KFAC: DAMPED,
    DIGITS_MEZO: {"curvature/loss", "curvature/lr"},
    DIGITS_MFAC: {"curvature/lr", "curvature/grad_norm"},
    DIGITS_PRUNING: {"pruning/sparsity", "pruning/predicted_loss_increase"},
}

BASE = """
seed_everything: 1
model: lightning_curvature.demos.DigitsClassifier
data: lightning_curvature.demos.DigitsDataModule
optimizer: lightning_curvature.AdamQLR
trainer:
  logger: false
  enable_checkpointing: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning.pytorch.callbacks.EarlyStopping
      init_args:
        monitor: val_loss
"""
SHORT = [
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=2",
    "--trainer.limit_val_batches=1",
    "--trainer.limit_test_batches=1",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.enable_progress_bar=false",
    "--trainer.log_every_n_steps=1",
]


@pytest.fixture
def fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., CurvatureCLI]:
    """Run the command line in this process: two batches with the given files."""
    monkeypatch.setattr(sys, "argv", ["lightning-curvature"])
    monkeypatch.chdir(tmp_path)

    def run(*files: str | Path, args: tuple[str, ...] = ()) -> CurvatureCLI:
        chosen = [f"--config={CONFIGS / file}" for file in files]
        return CurvatureCLI(args=["fit", *chosen, *SHORT, *args])

    return run


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Return a run that a file of configs/ is added to."""
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path


def load(name: str) -> dict[str, Any]:
    content = yaml.safe_load((CONFIGS / name).read_text())
    assert isinstance(content, dict)
    return content


def test_every_kind_is_there() -> None:
    kinds = {Path(name).parent.name for name in FRAGMENTS}
    assert kinds == {"callbacks", "optimizer", "strategy"}
    assert {*TARGET_ACCURACY, CHAR_LM} <= set(RECIPES)


@pytest.mark.parametrize("name", FRAGMENTS)
def test_fragment_trains_two_batches(name: str, base: Path, fit: Callable[..., Any]) -> None:
    cli = fit(base, name)
    assert cli.trainer.global_step == 2
    (optimizer,) = cli.trainer.optimizers
    assert all(math.isfinite(float(value)) for value in optimizer.stats.values())
    moved = "projected_grad" if isinstance(optimizer, ZerothOrderOptimizer) else "grad_norm"
    assert float(optimizer.stats[moved]) != 0
    content = load(name)
    for key, value in content.get("optimizer", {}).get("init_args", {}).items():
        if key not in ("damping", "betas"):  # the damping has adapted
            kept = {"max_lr": "max_step_length"}.get(key, key)  # torch's OneCycleLR claims "max_lr"
            assert optimizer.param_groups[0][kept] == value
    names = [type(callback).__name__ for callback in cli.trainer.callbacks]
    for callback in content.get("trainer", {}).get("callbacks+", []):
        assert names.count(callback["class_path"].rpartition(".")[2]) == 1
        assert "EarlyStopping" in names  # added to those of the run, not put in their place


def test_fragments_combine(base: Path, fit: Callable[..., Any]) -> None:
    cli = fit(
        base,
        "callbacks/curvature_monitor.yaml",
        "optimizer/sgdqlr.yaml",
        "strategy/single_device_curvature.yaml",
    )
    assert type(cli.trainer.optimizers[0]).__name__ == "SGDQLR"
    assert type(cli.trainer.strategy).__name__ == "SingleDeviceCurvatureStrategy"


@pytest.mark.parametrize("name", FRAGMENTS)
def test_fragment_says_how_to_use_it(name: str) -> None:
    text = (CONFIGS / name).read_text()
    assert text.startswith("# ")
    assert f"-c configs/{name}\n" in text


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_trains_two_batches(name: str, fit: Callable[..., Any], tmp_path: Path) -> None:
    # Stands in for the text that users of one recipe download.
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "input.txt").write_text("to be or not to be, " * 50, encoding="utf-8")
    picture = "curvature.png"
    args: tuple[str, ...] = ()
    if name == CHAR_LM:
        args = (f"--data.root={tmp_path / 'text'}",)
    elif name == DIGITS_PRUNING:
        schedule = load(name)["trainer"]["callbacks"][0]["init_args"]["schedule"]["init_args"]
        # As long as it takes to prune all.
        picture, args = "pruning.png", (f"--trainer.max_epochs={schedule['end_epoch'] + 1}",)
    cli = fit(name, args=args)
    ends_with_test = load(name).get("test_after_fit", False)
    assert cli.trainer.state.fn == ("test" if ends_with_test else "fit")
    assert ("test_acc" if ends_with_test else "train_loss") in cli.trainer.callback_metrics
    assert next(tmp_path.rglob(picture)).stat().st_size > 0
    # The same command again in the same folder.
    fit(name, args=args)


def test_char_lm_recipe_names_the_missing_text(fit: Callable[..., Any]) -> None:
    with pytest.raises(FileNotFoundError, match=r"No file input\.txt .* with --data\.root"):
        fit(CHAR_LM, args=("--data.root=nowhere",))


def test_two_processes_take_the_steps_of_one() -> None:
    """The recipes differ in the processes, and in nothing else that changes the steps."""
    one, two = load(DIGITS), load(DIGITS_DDP)
    assert two["trainer"].pop("devices") == 2
    assert two["trainer"].pop("strategy") == "ddp_curvature"
    assert 2 * two["data"]["init_args"].pop("batch_size") == one["data"]["init_args"]["batch_size"]
    for logger in two["trainer"]["logger"]:
        logger["init_args"]["save_dir"] = logger["init_args"]["save_dir"].removesuffix("_ddp")
    del one["data"]["init_args"]["batch_size"]
    del one["trainer"]["devices"], one["trainer"]["strategy"]
    assert one == two


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *(name for name in TARGET_ACCURACY if name != DIGITS_DDP),
        pytest.param(DIGITS_DDP, marks=pytest.mark.ddp),
    ],
)
def test_digits_recipe_reaches_its_accuracy(
    name: str, run_python: Callable[..., Any], tmp_path: Path
) -> None:
    process = run_python(
        ["-m", "lightning_curvature", "fit", "-c", CONFIGS / name], env={"COLUMNS": "120"}
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert not re.search("Warning: (AdamQLR|KFAC|MeZO|MFAC)", process.stderr)
    # Of two processes the first alone prints and writes.
    (accuracy,) = re.findall(r"test_acc\D+([0-9.]+)", process.stdout)
    assert float(accuracy) >= TARGET_ACCURACY[name]

    (table,) = tmp_path.rglob("metrics.csv")
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) >= COLUMNS | OWN_COLUMNS[name]
    loss = "curvature/loss" if "curvature/loss" in OWN_COLUMNS[name] else "train_loss"
    losses = [float(row[loss]) for row in rows if row[loss]]
    per_epoch = 20 if name == DIGITS_MEZO else 10
    assert len(losses) == per_epoch * load(name)["trainer"]["max_epochs"]
    assert losses[-1] < LARGEST_LOSS_RATIO[name] * losses[0]
    if name == DIGITS_PRUNING:
        *_, sparsity = [float(row["pruning/sparsity"]) for row in rows if row["pruning/sparsity"]]
        assert sparsity == pytest.approx(0.9, abs=1e-3)
    (picture,) = tmp_path.rglob("*.png")
    assert picture.name == ("pruning.png" if name == DIGITS_PRUNING else "curvature.png")
    assert picture.parent == table.parent
    assert list(tmp_path.rglob("events.out.tfevents.*"))


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Let new processes hear interrupts where this one ignores them, in a shell's background."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_ends_both_processes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lightning_curvature", "fit", "-c", str(CONFIGS / DIGITS_DDP)]
    with (tmp_path / "log.txt").open("w+") as log:
        # A session of its own is a process group of its own: what a terminal interrupts.
        process = subprocess.Popen(
            [*command, "--trainer.max_epochs=100000"],
            env={**os.environ, "PYTHONPATH": str(CONFIGS.parent)},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + 120
            while not list(tmp_path.rglob("metrics.csv")):
                assert process.poll() is None, (tmp_path / "log.txt").read_text()
                assert time.monotonic() < deadline, (tmp_path / "log.txt").read_text()
                time.sleep(0.2)
            os.killpg(process.pid, signal.SIGINT)
            # Lightning kills the first if it sees the second end before the first itself did.
            assert process.wait(timeout=60) in (1, -signal.SIGKILL)
            while _is_alive(process.pid):
                assert time.monotonic() < deadline, "the second process goes on"
                time.sleep(0.2)
        finally:
            if _is_alive(process.pid):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _is_alive(group: int) -> bool:
    """Tell whether any process of a group is there."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
