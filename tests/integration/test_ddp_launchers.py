"""The names of the strategy, and a user's script that starts its ranks by each of them.

Starting processes is what takes the time here: each launcher runs once for all optimizers.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.strategies.launchers import (
    _MultiProcessingLauncher,
    _SubprocessScriptLauncher,
)
from lightning.pytorch.trainer.connectors import accelerator_connector

from lightning_curvature import DDPCurvatureStrategy
from tests.helpers.families import LEADER, contract_of, every_family
from tests.helpers.optimizer_db import Contract

pytestmark = [pytest.mark.ddp]

START = {"": "popen", "_spawn": "spawn", "_fork": "fork", "_notebook": "fork"}
UNUSED = {"": False, "_find_unused_parameters_true": True}
NAMES = {
    f"ddp_curvature{launcher}{suffix}": (start, unused)
    for launcher, start in START.items()
    for suffix, unused in UNUSED.items()
}


@pytest.mark.parametrize("name", NAMES)
def test_names(name: str) -> None:
    """Each name makes the class, with the launcher and the flag that it says."""
    start, unused = NAMES[name]
    trainer = Trainer(
        strategy=name, accelerator="cpu", devices=2, logger=False, enable_checkpointing=False
    )
    strategy = trainer.strategy
    assert type(strategy) is DDPCurvatureStrategy
    assert strategy._ddp_kwargs.get("find_unused_parameters", False) is unused
    launcher = strategy.launcher
    if start == "popen":
        assert isinstance(launcher, _SubprocessScriptLauncher)
    else:
        assert isinstance(launcher, _MultiProcessingLauncher)
        assert launcher._start_method == start


def test_no_other_names() -> None:
    registered = {name for name in StrategyRegistry if name.startswith("ddp_curvature")}
    assert registered == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_interactive_session(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a notebook Lightning takes the names that fork, and refuses the others."""
    monkeypatch.setattr(accelerator_connector, "_IS_INTERACTIVE", True)
    settings: dict[str, Any] = {
        "strategy": name,
        "accelerator": "cpu",
        "devices": 2,
        "logger": False,
        "enable_checkpointing": False,
    }
    if NAMES[name][0] == "fork":
        assert isinstance(Trainer(**settings).strategy, DDPCurvatureStrategy)
    else:
        with pytest.raises(Exception, match="not compatible with an interactive environment"):
            Trainer(**settings)


SCRIPT = '''
import json, pathlib, sys
import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import lightning_curvature as lc

STRATEGIES = {
    "popen": ["ddp_curvature", "ddp", "callback"],
    "fork": ["ddp_curvature_fork", "ddp_curvature_notebook_find_unused_parameters_true"],
    "spawn": ["ddp_curvature_spawn"],
}


class Record(L.Callback):
    """Writes down where this rank ended."""

    def __init__(self, path):
        self.path = path

    def on_train_end(self, trainer, module):
        flat = torch.cat([p.detach().flatten() for p in module.parameters()])
        result = {"weights": flat.tolist(), "steps": trainer.global_step}
        path = pathlib.Path(f"{self.path}-{trainer.global_rank}.json")
        path.write_text(json.dumps(result), encoding="utf-8")


class Net(L.LightningModule):
    def __init__(self, optimizer):
        super().__init__()
        self.optimizer = optimizer
        self.net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return getattr(lc, self.optimizer)(self.parameters())

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(1)
        x = 3 * torch.randn(96, 6, generator=generator)
        y = torch.randint(3, (96,), generator=generator)
        # Both ranks together see the batches of one process.
        rows = torch.arange(96).view(6, self.trainer.world_size, -1)[:, self.trainer.global_rank]
        return DataLoader(TensorDataset(x, y), batch_sampler=rows.tolist())


def train(optimizer, strategy, ranks, path):
    """Train, exactly: "auto" takes forward mode if float32 products are not computed in full."""
    torch.set_float32_matmul_precision("medium")
    torch.manual_seed(0)
    name = "ddp" if strategy == "callback" else strategy
    trainer = L.Trainer(
        accelerator="cpu", devices=ranks, strategy=name, precision="64-true", max_epochs=2,
        callbacks=[Record(path), *([lc.CurvatureCallback()] if strategy == "callback" else [])],
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False,
    )
    trainer.fit(Net(optimizer))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for optimizer in sys.argv[3:]:
        for strategy in STRATEGIES[sys.argv[1]]:
            train(optimizer, strategy, 2, f"{sys.argv[2]}/{optimizer}-{strategy}")
'''

# Results of the ranks, by optimizer and strategy.
Results = dict[tuple[str, str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def launched(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, repo_root: Path
) -> Callable[..., Results]:
    """Run the script with a launcher and return what the ranks wrote, once for each launcher."""
    known: dict[str, Results] = {}
    # Of the tests that this session runs.
    wanted: dict[str, list[str]] = {}
    for item in request.session.items:
        contract = contract_of(item)
        if contract is not None and request.fixturename in getattr(item, "fixturenames", ()):
            names = wanted.setdefault(item.callspec.params["launcher"], [])
            names.append(contract.info.cls.__name__)

    def launch(launcher: str, *others: str) -> Results:
        optimizers = [*wanted.get(launcher, ()), *others]
        if launcher not in known:
            folder = tmp_path_factory.mktemp(launcher)
            (folder / "out").mkdir()
            (folder / "train.py").write_text(SCRIPT, encoding="utf-8")
            done = subprocess.run(
                [sys.executable, "-W", "ignore", "train.py", launcher, "out", *optimizers],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": str(repo_root)},
                capture_output=True,
                text=True,
                timeout=300,
                check=False,
            )
            assert done.returncode == 0, done.stderr[-3000:]
            known[launcher] = {}
            for path in sorted((folder / "out").iterdir()):
                optimizer, strategy, _ = path.stem.split("-")
                ranks = known[launcher].setdefault((optimizer, strategy), [])
                ranks.append(json.loads(path.read_text(encoding="utf-8")))
        return known[launcher]

    return launch


def single(optimizer: str, folder: Path) -> dict[str, Any]:
    """Run the same in this process."""
    path = folder / "train.py"
    path.write_text(SCRIPT, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("train", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.train(optimizer, "single_device_curvature", 1, folder / "single")
    result: dict[str, Any] = json.loads((folder / "single-0.json").read_text(encoding="utf-8"))
    return result


def assert_as_single(
    results: Results, contract: Contract, folder: Path, strategies: list[str]
) -> None:
    """Assert that the ranks agree with each other and, unless they draw, with one process."""
    optimizer = contract.info.cls.__name__
    expected = single(optimizer, folder)
    for strategy in strategies:
        first, second = results[optimizer, strategy]
        assert first == second
        assert first["steps"] == expected["steps"] == 12
        if contract.sampler is not None or "fisher_type" in contract.exact:
            continue
        torch.testing.assert_close(
            torch.tensor(first["weights"], dtype=torch.float64),
            torch.tensor(expected["weights"], dtype=torch.float64),
            rtol=0,
            atol=1e-12,
        )


LAUNCHED = {
    "popen": ["ddp_curvature", "ddp", "callback"],
    "fork": ["ddp_curvature_fork", "ddp_curvature_notebook_find_unused_parameters_true"],
}


@every_family
@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHED)
@pytest.mark.feature(
    "Distributed", "A script that starts its ranks (ddp_curvature, _fork, _notebook)"
)
def test_script(
    contract: Contract,
    launcher: str,
    launched: Callable[..., Results],
    tmp_path: Path,
) -> None:
    """As users run it."""
    assert_as_single(launched(launcher), contract, tmp_path, LAUNCHED[launcher])


@pytest.mark.slow
def test_spawn(launched: Callable[..., Results], tmp_path: Path) -> None:
    """For one optimizer: every process imports everything anew, and gets the module in a pickle."""
    results = launched("spawn", LEADER.info.cls.__name__)
    assert_as_single(results, LEADER, tmp_path, ["ddp_curvature_spawn"])
