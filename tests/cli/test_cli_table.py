"""Tests of lightning_curvature/cli.py and of ordinary LightningCLI scripts.

One row per way to name our classes on a command line, each a process of its own: what works
depends on which modules of this package are imported. The user's files know nothing of this
package, except for the one import line where a row is about it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.warm_python import WarmPython

ROOT = Path(__file__).resolve().parents[2]
AHEAD = 2  # processes at a time
TIMEOUT = 300.0  # seconds

USER_MODULE = '''
"""What a user has: a module, one with its own optimizer, one that is given one, and data."""

import json

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(LightningModule):
    def __init__(self, width: int = 8):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))

    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        return nn.functional.cross_entropy(self.layers(inputs), labels)

    def test_step(self, batch, batch_idx):
        inputs, labels = batch
        self.log("test_acc", (self.layers(inputs).argmax(1) == labels).float().mean())

    def on_train_end(self):
        optimizer = self.trainer.optimizers[0]
        report = {
            "optimizer": type(optimizer).__name__,
            "lr": optimizer.param_groups[0].get("initial_lr", optimizer.param_groups[0]["lr"]),
            "stats": {k: float(v) for k, v in getattr(optimizer, "stats", {}).items()},
            "strategy": type(self.trainer.strategy).__name__,
            "callbacks": [type(callback).__name__ for callback in self.trainer.callbacks],
            "schedulers": [type(c.scheduler).__name__ for c in self.trainer.lr_scheduler_configs],
            "steps": self.trainer.global_step,
        }
        print("REPORT " + json.dumps(report), flush=True)


class OwnOptimizer(Net):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


class GivenOptimizer(Net):
    def __init__(self, optimizer: OptimizerCallable = torch.optim.SGD):
        super().__init__()
        self.given = optimizer

    def configure_optimizers(self):
        return self.given(self.parameters())


class Data(LightningDataModule):
    def _loader(self):
        inputs = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(inputs, inputs.argmax(1) % 3), batch_size=16)

    def train_dataloader(self):
        return self._loader()

    def test_dataloader(self):
        return self._loader()
'''

PLAIN_SCRIPT = """
from lightning.pytorch.cli import LightningCLI

if __name__ == "__main__":
    LightningCLI()
"""

IMPORTING_SCRIPT = "import lightning_curvature  # noqa: F401\n" + PLAIN_SCRIPT

OPTIMIZER_ARGS_SCRIPT = """
from lightning.pytorch.cli import LightningCLI

from lightning_curvature import AdamQLR


class MyCLI(LightningCLI):
    def add_arguments_to_parser(self, parser):
        parser.add_optimizer_args(AdamQLR)


if __name__ == "__main__":
    MyCLI()
"""

PRIVATE_CLASS = """
from lightning_curvature import AdamQLR


class Hidden(AdamQLR):
    pass
"""

PRIVATE_SCRIPT = "import package._private  # noqa: F401\n" + PLAIN_SCRIPT

YAML = """
optimizer:
  class_path: lightning_curvature.AdamQLR
  init_args:
    lr: 0.3
lr_scheduler:
  class_path: torch.optim.lr_scheduler.CosineAnnealingLR
  init_args:
    T_max: 10
trainer:
  callbacks:
    - class_path: lightning_curvature.CurvatureCallback
"""

STRATEGY_YAML = """
optimizer:
  class_path: lightning_curvature.AdamQLR
trainer:
  strategy:
    class_path: lightning_curvature.SingleDeviceCurvatureStrategy
    init_args:
      device: cpu
"""

FILES = {
    "my.py": USER_MODULE,
    "plain.py": PLAIN_SCRIPT,
    "importing.py": IMPORTING_SCRIPT,
    "optimizer_args.py": OPTIMIZER_ARGS_SCRIPT,
    "package/__init__.py": "",
    "package/_private.py": PRIVATE_CLASS,
    "private_script.py": PRIVATE_SCRIPT,
    "config.yaml": YAML,
    "strategy.yaml": STRATEGY_YAML,
}
SETTINGS = (
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.fast_dev_run=2",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
)
PLAIN, IMPORTING = ["plain.py"], ["importing.py"]
SCRIPT = "lightning-curvature"  # stands for the console script of this environment
MODULE = ["-m", "lightning_curvature"]
FULL_PATH = "--optimizer=lightning_curvature.AdamQLR"
BARE = "--optimizer=AdamQLR"
SINGLE_DEVICE = "SingleDeviceCurvatureStrategy"


@dataclass(frozen=True)
class Row:
    """One way to start a run and what must come of it."""

    program: list[str]
    args: list[str]
    model: str = "my.Net"
    # Entries of the report that the module prints at the end of training.
    report: dict[str, Any] = field(default_factory=dict)
    callback: str | None = None
    output: str | None = None
    # Part of the error message; None where the run must succeed.
    error: str | None = None
    env: dict[str, str] = field(default_factory=dict)


ROWS = {
    "import_bare_name": Row(IMPORTING, [BARE, "--optimizer.lr=0.3"], report={"lr": 0.3}),
    "no_import_bare_name": Row(PLAIN, [BARE], error="Expected a dot import path string: AdamQLR"),
    "no_import_full_path": Row(PLAIN, [FULL_PATH, "--optimizer.lr=0.3"], report={"lr": 0.3}),
    "no_import_yaml": Row(
        PLAIN,
        ["--config=config.yaml"],
        report={"lr": 0.3, "schedulers": ["CosineAnnealingLR"]},
        callback="CurvatureCallback",
    ),
    "console_script": Row([SCRIPT], [BARE, "--test_after_fit=true"], output="test_acc"),
    "python_m": Row(MODULE, [BARE, "--trainer.callbacks+=CurvatureMonitor"]),
    "import_bare_callback": Row(
        IMPORTING, [BARE, "--trainer.callbacks+=CurvatureCallback"], callback="CurvatureCallback"
    ),
    "own_optimizer_overridden": Row(
        IMPORTING,
        [BARE, "--lr_scheduler=StepLR", "--lr_scheduler.step_size=1"],
        model="my.OwnOptimizer",
        report={"lr": 1.0, "schedulers": ["StepLR"]},
        output="`OwnOptimizer.configure_optimizers` will be overridden by",
    ),
    "import_strategy_name": Row(
        IMPORTING,
        [BARE, "--trainer.strategy=single_device_curvature"],
        report={"strategy": SINGLE_DEVICE},
    ),
    "console_script_strategy_name": Row(
        [SCRIPT],
        [BARE, "--trainer.strategy=single_device_curvature"],
        report={"strategy": SINGLE_DEVICE},
    ),
    "no_import_strategy_name": Row(
        PLAIN,
        ["--optimizer=SGD", "--optimizer.lr=0.1", "--trainer.strategy=single_device_curvature"],
        error="invalid strategy name: `strategy='single_device_curvature'`",
    ),
    "no_import_strategy_class_path": Row(
        PLAIN,
        [
            FULL_PATH,
            "--trainer.strategy.class_path=lightning_curvature.SingleDeviceCurvatureStrategy",
            "--trainer.strategy.init_args.device=cpu",
        ],
        report={"strategy": SINGLE_DEVICE},
    ),
    "no_import_strategy_yaml": Row(
        PLAIN, ["--config=strategy.yaml"], report={"strategy": SINGLE_DEVICE}
    ),
    "strategy_class_as_string": Row(
        PLAIN,
        [FULL_PATH, "--trainer.strategy=lightning_curvature.SingleDeviceCurvatureStrategy"],
        error="`strategy='lightning_curvature.singledevicecurvaturestrategy'`",
    ),
    "auto_attach": Row(
        PLAIN, [FULL_PATH, "--trainer.strategy=auto"], report={"strategy": "SingleDeviceStrategy"}
    ),
    "auto_attach_off": Row(
        PLAIN,
        [FULL_PATH],
        error="single_device_curvature",
        env={"LIGHTNING_CURVATURE_AUTO_ATTACH": "0"},
    ),
    "add_optimizer_args": Row(
        ["optimizer_args.py"], ["--optimizer.lr=0.3"], report={"lr": 0.3}
    ),
    "optimizer_callable": Row(
        PLAIN,
        ["--model.optimizer=lightning_curvature.AdamQLR", "--model.optimizer.lr=0.3"],
        model="my.GivenOptimizer",
        report={"lr": 0.3},
    ),
    "private_module_bare_name": Row(
        ["private_script.py"],
        ["--optimizer=Hidden"],
        error="Expected a dot import path string: Hidden",
    ),
    "console_script_without_optimizer": Row(
        [SCRIPT], [], error="Net has no optimizer. Choose one, for example `--optimizer AdamQLR`"
    ),
}  # fmt: skip

Finished = subprocess.CompletedProcess[str]


def run_row(row: Row, folder: Path, warm_python: WarmPython) -> Finished:
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    if row.program == [SCRIPT]:
        program = [str(Path(sys.executable).with_name(SCRIPT))]
    else:
        program = row.program
    return warm_python.run(
        [*program, "fit", f"--model={row.model}", "--data=my.Data", *row.args, *SETTINGS],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **row.env},
        timeout=TIMEOUT,
    )


@pytest.fixture(scope="module")
def finish(
    tmp_path_factory: pytest.TempPathFactory, warm_python: WarmPython
) -> Iterator[Callable[[str], Finished]]:
    """Wait for a row, having started the next ones too."""
    jobs: dict[str, Future[Finished]] = {}
    names = list(ROWS)
    with ThreadPoolExecutor(max_workers=AHEAD) as pool:

        def wait(name: str) -> Finished:
            start = names.index(name)
            for started in names[start : start + AHEAD]:
                if started not in jobs:
                    folder = tmp_path_factory.mktemp(started)
                    jobs[started] = pool.submit(run_row, ROWS[started], folder, warm_python)
            return jobs[name].result()

        yield wait


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.error is None])
def test_works(name: str, finish: Callable[[str], Finished]) -> None:
    row, process = ROWS[name], finish(name)
    said = process.stdout + process.stderr
    assert process.returncode == 0, said
    (line,) = [line for line in process.stdout.splitlines() if line.startswith("REPORT ")]
    report = json.loads(line.removeprefix("REPORT "))
    expected = {"optimizer": "AdamQLR", "steps": 2, **row.report}
    assert {key: report[key] for key in expected} == expected
    # The optimizer was answered: without an oracle it has neither of them.
    assert report["stats"]["curvature"] > 0
    assert report["stats"]["new_loss"] < report["stats"]["loss"]
    assert row.callback is None or report["callbacks"].count(row.callback) == 1
    assert row.output is None or row.output in said


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.error is not None])
def test_fails_with_its_message(name: str, finish: Callable[[str], Finished]) -> None:
    row, process = ROWS[name], finish(name)
    assert process.returncode != 0, process.stdout
    assert row.error is not None
    assert row.error in " ".join(process.stderr.split())
