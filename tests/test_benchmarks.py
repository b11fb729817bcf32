"""Every script of ``benchmarks/`` runs, on tiny data, and appends what it found to the CSV."""

import csv
import dataclasses
import importlib
import logging
import re
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks"
SCRIPTS = (
    "paper_tasks",
    "step_time",
    "memory",
    "ddp",
    "monitor",
    "char_lm",
    "adafisher_sgd",
    "kfac_curves",
    "mfac_curves",
    "pruning",
)

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="benchmarks are not shipped")


@pytest.fixture
def load_script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Import a script as it sees itself: its own folder is on the path."""
    monkeypatch.syspath_prepend(FOLDER)
    loggers = [logging.getLogger(f"lightning.{name}") for name in ("pytorch", "fabric")]
    levels = [logger.level for logger in loggers]
    yield importlib.import_module
    for name in [path.stem for path in FOLDER.glob("*.py")]:
        sys.modules.pop(name, None)
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture
def uci_folder(tmp_path: Path) -> Path:
    """Return a folder with two small data sets in the layout of the real ones."""
    generator = np.random.default_rng(0)
    (tmp_path / "data" / "uci").mkdir(parents=True)
    for name, rows, features in (("energy", 80, 8), ("protein", 120, 9)):
        x = generator.normal(size=(rows, features))
        x[:, -1] = 3.0  # a column without spread
        np.savez(
            tmp_path / "data" / "uci" / f"{name}.npz",
            x=x,
            y=x @ np.ones(features) + 0.1 * generator.normal(size=rows),
            perm_adamqlr=generator.permutation(rows).astype(np.uint16),
        )
    return tmp_path / "data"


@pytest.fixture
def fashion_folder(tmp_path: Path) -> Path:
    """Return a folder with a few random images in the files of Fashion-MNIST."""
    raw = tmp_path / "data" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for part, count in (("train", 60), ("t10k", 10)):
        images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = generator.integers(0, 10, count, dtype=np.uint8)
        header = struct.pack(">IIII", 0x803, count, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = struct.pack(">II", 0x801, count)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
    return tmp_path / "data"


@pytest.fixture
def image_folder(fashion_folder: Path) -> Path:
    """Return the same folder with a few random images of CIFAR-10 beside."""
    generator = np.random.default_rng(0)
    (fashion_folder / "cifar10_small").mkdir()
    images = generator.integers(0, 256, (24, 3, 32, 32), dtype=np.uint8)
    labels = generator.integers(0, 10, 24, dtype=np.uint8)
    np.savez(
        fashion_folder / "cifar10_small" / "cifar10_small.npz",
        x_train=images,
        y_train=labels,
        x_test=images,
        y_test=labels,
    )
    return fashion_folder


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# The scripts


def test_scripts_explain_themselves(
    load_script: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in SCRIPTS:
        with pytest.raises(SystemExit) as stopped:
            load_script(name).main(["--help"])
        assert stopped.value.code == 0
        assert "usage:" in capsys.readouterr().out


def test_runs_as_a_script(run_python: Callable[..., object], tmp_path: Path) -> None:
    result = run_python([FOLDER / "paper_tasks.py", "uci_energy", "--data", tmp_path])
    assert result.returncode == 2
    assert "--data must name the folder that holds uci/energy.npz" in result.stderr


@pytest.mark.parametrize(("task", "batch"), [("uci_energy", None), ("uci_protein", 30)])
def test_uci(
    task: str,
    batch: int | None,
    load_script: Callable[[str], ModuleType],
    uci_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [task, "--data", str(uci_folder), "--seeds", "1", "--epochs", "12"]
    arguments += ["--csv", str(tmp_path / "out.csv")]
    load_script("paper_tasks").main(arguments + (["--batch", str(batch)] if batch else []))
    printed = capsys.readouterr().out
    assert f"### {task}" in printed
    assert "| train @12" in printed
    found = rows_of(tmp_path / "out.csv")
    assert {row["optimizer"] for row in found} >= {"torch Adam 1e-2"}
    assert all(float(row["value"]) < 10 and row["torch"] == torch.__version__ for row in found)


def test_fashion_mnist(
    load_script: Callable[[str], ModuleType],
    fashion_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["fashion_mnist", "--data", str(fashion_folder), "--csv", str(tmp_path / "o.csv")]
    arguments += ["--png", str(tmp_path / "curves.png"), "--seconds", "0.1", "--points", "3"]
    arguments += ["--batch", "50", "--adamw-lr", "1e-3", "--adamw-batch", "10", "20"]
    load_script("paper_tasks").main(arguments)
    assert "(best AdamW)" in capsys.readouterr().out
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert len({row["optimizer"] for row in rows_of(tmp_path / "o.csv")}) == 3


@pytest.mark.parametrize("task", ["fashion_mnist", "cifar10"])
def test_kfac_curves(
    task: str,
    load_script: Callable[[str], ModuleType],
    image_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [task, "--data", str(image_folder), "--csv", str(tmp_path / "o.csv"), "--smoke"]
    arguments += ["--adamw-lr", "1e-3", "1e-2", "--kfac-lr", "0.03"]
    load_script("kfac_curves").main([*arguments, "--png", str(tmp_path / "curves.png")])
    assert "to AdamW's best" in capsys.readouterr().out
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    found = rows_of(tmp_path / "o.csv")
    assert len({row["optimizer"] for row in found}) == 5
    rivals = {row["rival"].partition(": ")[2] for row in found}
    best = [row for row in found if row["optimizer"] in rivals]
    # AdamW's best run compared with itself.
    assert next(float(row["ratio"]) for row in best if "loss" in row["metric"]) == 1.0


@pytest.mark.parametrize("task", ["fashion_mnist", "cifar10"])
# Next to nothing is left of some layers, and the networks have hardly been trained.
@pytest.mark.filterwarnings("ignore:No weight of:RuntimeWarning")
def test_pruning(
    task: str,
    load_script: Callable[[str], ModuleType],
    image_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = load_script("pruning")
    files = ["--runs", str(tmp_path / "runs" / "runs.csv"), "--csv", str(tmp_path / "out.csv")]
    arguments = [task, "--data", str(image_folder), "--smoke", "--sparsities", "0.5", *files]
    script.main(["train", *arguments, "--seeds", "0", "1"])
    first = capsys.readouterr().out
    assert "one-shot, M-FAC, joint, 16 steps" in first
    # All of it has been run.
    script.main(["train", *arguments, "--seeds", "0"])
    assert capsys.readouterr().out == ""
    runs = load_script("pruning_report").read_runs(tmp_path / "runs" / "runs.csv")
    assert len(runs) == 2 * (1 + len({run.setting.way for run in runs} - {"dense"}))
    assert all(run.reached == pytest.approx(run.setting.sparsity, abs=1e-3) for run in runs)
    script.main(["report", *files])
    printed = capsys.readouterr().out
    assert re.search(rf"### {task}, dense .* ± .*: test accuracy before fine-tuning", printed)
    assert re.search(r"gradual, magnitude +\| .* ± ", printed)
    means = [float(row["value"]) for row in rows_of(tmp_path / "out.csv")]
    assert means
    assert all(0 <= mean <= 1 for mean in means)


def test_pruning_grid(
    load_script: Callable[[str], ModuleType],
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = load_script("pruning")
    settings = script.grid("fashion_mnist", 0)
    assert len(set(settings)) == len(settings)
    monkeypatch.setattr(script, "grid", lambda task, seed: [settings[0], settings[-1]])
    files = ["--runs", str(tmp_path / "runs.csv"), "--csv", str(tmp_path / "out.csv")]
    script.main(["grid", "fashion_mnist", "--data", str(image_folder), "--smoke", *files])
    script.main(["report", *files])
    assert re.search(r"damping=0.001, .*\| +0\.\d+ \|", capsys.readouterr().out)
    with pytest.raises(SystemExit):
        script.main(["train", *files])


def test_mfac_curves(
    load_script: Callable[[str], ModuleType],
    fashion_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--data", str(fashion_folder), "--csv", str(tmp_path / "o.csv"), "--smoke"]
    arguments += ["--sgd-lr", "1e-2", "--adamw-lr", "1e-3", "1e-2", "--seeds", "0", "1"]
    arguments += ["--mfac-lr", "1e-2", "--mfac-damping", "1e-2", "1e-1"]
    load_script("mfac_curves").main([*arguments, "--png", str(tmp_path / "curves.png")])
    assert "### The best of each kind over seeds" in capsys.readouterr().out
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    points = rows_of(tmp_path / "curves.csv")
    found = rows_of(tmp_path / "o.csv")
    names = {row["optimizer"] for row in found}
    assert {row["run"] for row in points} == names
    assert len(names) == 1 + 2 + 2 + 4
    own = [row for row in found if row["optimizer"] == row["rival"].partition(": ")[2]]
    assert {float(row["ratio"]) for row in own} == {1.0}


def test_step_time(
    load_script: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load_script("step_time")
    arguments = ["--workloads", "conv", "--rounds", "1", "--cycles", "1", "--batch-size", "2"]
    script.main([*arguments, "--csv", str(tmp_path / "out.csv")])
    assert "everything every step" in capsys.readouterr().out
    found = rows_of(tmp_path / "out.csv")
    assert [row["optimizer"] for row in found] == list(script.VARIANTS)
    assert all(float(row["value"]) > 0 for row in found)
    assert float(found[0]["ratio"]) == 1.0


def test_step_time_without_a_backward(
    load_script: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    script = load_script("step_time")
    arguments = ["--suite", "zeroth", "--workloads", "conv", "--rounds", "1", "--cycles", "1"]
    script.main([*arguments, "--batch-size", "2", "--csv", str(tmp_path / "out.csv")])
    found = rows_of(tmp_path / "out.csv")
    assert [row["optimizer"] for row in found] == list(script.suites()["zeroth"].variants)


def test_step_time_of_mfac(
    load_script: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--suite", "mfac", "--num-grads", "4", "1000000000", "--num-parameters", "50000"]
    arguments += ["--rounds", "1", "--cycles", "3", "--csv", str(tmp_path / "out.csv")]
    load_script("step_time").main(arguments)
    printed = capsys.readouterr().out
    assert "### MFAC, 50,000 parameters, window of 4 gradients" in printed
    assert re.search(r"m=1000000000, .*: left out\. .* are free", printed)
    found = rows_of(tmp_path / "out.csv")
    names = [f"MFAC, {name}" for name in load_script("mfac_step_time").VARIANTS]
    assert list(dict.fromkeys(row["optimizer"] for row in found)) == names
    sizes = [float(row["value"]) for row in found if row["metric"].startswith("bytes")]
    assert min(sizes) > 4 * 50_000 * 2
    assert all(float(row["ratio"]) > 0 for row in found if "seconds" in row["metric"])


def test_step_time_of_mfac_compares_rounds(load_script: Callable[[str], ModuleType]) -> None:
    """A slow round is slow for both, so it does not change the ratio."""
    script = load_script("mfac_step_time")
    rounds = script.Rounds([3.0, 30.0, 3.0], [1.0, 10.0, 1.0], [1.0, 10.0, 1.0], [1.0] * 3, 8, 1e9)
    table, found = script.summarize("task", {"name": rounds})
    assert [m.ratio for m in found][:2] == [1.5, 3.0]
    assert "FAIL" in table


# On random data its curvature has no effect, and it says so.
@pytest.mark.filterwarnings("ignore:Sophia.* clips more than 99%:RuntimeWarning")
def test_step_time_of_diagonal_optimizers(
    load_script: Callable[[str], ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = load_script("step_time")
    large = script.WORKLOADS["mlp5m"]
    assert round(sum(p.numel() for p in large.network().parameters()) / 1e6, 2) == 4.99
    assert large.batch_size == 256
    small = dataclasses.replace(large, network=lambda: torch.nn.Linear(784, 10))
    monkeypatch.setitem(script.WORKLOADS, "mlp5m", small)
    arguments = ["--suite", "diagonal", "--rounds", "1", "--batch-size", "2"]
    script.main([*arguments, "--cycles", "10", "--csv", str(tmp_path / "out.csv")])
    assert "| AdamW, fused" in capsys.readouterr().out
    found = rows_of(tmp_path / "out.csv")
    suite = script.suites()["diagonal"]
    assert [row["optimizer"] for row in found] == list(suite.variants)
    assert {row["rival"] for row in found} == {"AdamW, foreach"}
    goals = {row["optimizer"].split(",")[0]: row["goal"] for row in found}
    for name, goal in (("SophiaG", "1.1"), ("FAdam", "1.05"), ("AdaFisher", "1.1")):
        assert goals[name] == goal
    assert (goals["BetaFTRL"], goals["AdaHessian"]) == ("1.02", "3")
    with pytest.raises(SystemExit):
        script.main([*arguments, "--cycles", "15"])


def test_step_time_without_the_others(
    load_script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    suite = load_script("step_time").suites()["diagonal"]
    assert not any("pytorch_optimizer" in name for name in suite.variants)
    assert suite.notes == ["pytorch_optimizer is not installed, so its SophiaH is left out."]


def test_step_time_joins_cycles(load_script: Callable[[str], ModuleType]) -> None:
    """One dear cycle in ten counts by a tenth, and not in the median of all."""
    script = load_script("step_time")
    make = torch.optim.SGD
    variants = {
        "rival": script.Variant(make),
        "joined": script.Variant(make, cycles=10),
        "apart": script.Variant(make),
    }
    dear = [1.0] * 3 + [2.0] + [1.0] * 6
    seconds = {"rival": [1.0] * 20, "joined": dear * 2, "apart": dear * 2}
    _, measurements = script.summarize("mlp5m", seconds, variants)
    assert [m.ratio for m in measurements] == pytest.approx([1.0, 1.1, 1.0])
    assert {m.rival for m in measurements} == {"rival"}


@pytest.mark.ddp
def test_ddp(
    load_script: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load_script("ddp")
    arguments = ["--workloads", "conv", "--rounds", "1", "--cycles", "1", "--batch-size", "2"]
    script.main([*arguments, "--csv", str(tmp_path / "out.csv")])
    assert "### Communication" in capsys.readouterr().out
    found = rows_of(tmp_path / "out.csv")
    sent = {
        (row["optimizer"], row["metric"].split()[0]): float(row["value"])
        for row in found
        if "beyond" in row["metric"]
    }
    everything = "AdamQLR, everything every step"
    assert sent[script.RIVAL, "collectives"] == sent[script.RIVAL, "bytes"] == 0
    assert sent[everything, "collectives"] == 2
    assert 0 < sent[everything, "bytes"] < 100
    times = [row for row in found if row["metric"] == "seconds per step"]
    assert [row["optimizer"] for row in times] == list(script.VARIANTS)
    assert all(float(row["value"]) > 0 for row in times)


def test_ddp_subtracts_the_rival(load_script: Callable[[str], ModuleType]) -> None:
    script = load_script("ddp")
    rival = [("all_reduce", 8), ("broadcast", 8)]
    assert script.beyond(rival, [*rival, ("all_reduce", 8)]) == [("all_reduce", 8)]
    assert script.beyond(rival, rival) == []

    def rank(*sizes: int) -> object:
        steps = [[["all_reduce", size] for size in (400, *sizes)]] * 20
        return script.Found({script.RIVAL: [[["all_reduce", 400]]] * 20, "other": steps}, {})

    table, measurements = script.summarize_communication([rank(60, 4), rank(60, 4)])
    assert re.search(r"\| other +\| +2 \| +64 \| +2.0 \| +64.0 \| +2, 64 \| pass \|", table)
    assert [m.value for m in measurements] == [0, 0, 2, 64]
    assert "FAIL" in script.summarize_communication([rank(60, 60), rank(60, 60)])[0]
    assert "FAIL" in script.summarize_communication([rank(4, 4, 4), rank(4, 4, 4)])[0]
    with pytest.raises(RuntimeError, match="other: the ranks sent different things"):
        script.summarize_communication([rank(4), rank(8)])


def test_monitor(
    load_script: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load_script("monitor")
    arguments = ["--rounds", "1", "--steps", "12", "--log-every-n-steps", "5", "--width", "4"]
    script.main([*arguments, "--batch-size", "2", "--csv", str(tmp_path / "out.csv")])
    assert "| CurvatureMonitor, per_layer |" in capsys.readouterr().out
    found = rows_of(tmp_path / "out.csv")
    assert [row["optimizer"] for row in found[::2]] == list(script.VARIANTS)
    hooks = [float(row["value"]) for row in found if row["metric"] == "percent in its hooks"]
    assert hooks[0] == 0
    assert min(hooks[1:]) > 0


def test_monitor_weighs_steps_as_they_occur(load_script: Callable[[str], ModuleType]) -> None:
    script = load_script("monitor")
    setting = script.Setting(1, 20, 10, 4, 2, 1)
    # Steps 11 ... 30: the tenth and the last of them log.
    plain = [1.0] * 20
    slow = [2.0 if step % 10 == 0 else 1.1 for step in range(11, 31)]
    found = {name: (plain, [0.0] * 20) for name in script.VARIANTS}
    found["CurvatureMonitor"] = (slow, [second - 1 for second in slow])
    table, measurements = script.summarize(found, setting)
    values = {(m.optimizer, m.metric): m.value for m in measurements}
    expected = 0.9 * 10 + 0.1 * 100
    assert values["CurvatureMonitor", "percent of a step"] == pytest.approx(expected)
    assert values["CurvatureMonitor", "percent in its hooks"] == pytest.approx(expected)
    assert "+100.00 %" in table
    assert "FAIL" in table


def test_memory_without_a_backward(
    load_script: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    script = load_script("memory")
    # Large enough for the parameters to outweigh the activations.
    arguments = ["--suite", "zeroth", "--workloads", "mlp", "--steps", "2", "--batch-size", "8"]
    script.main([*arguments, "--csv", str(tmp_path / "out.csv")])
    found = {row["optimizer"]: float(row["ratio"]) for row in rows_of(tmp_path / "out.csv")}
    assert found["MeZO"] < found["HiZOO"] < found["ZOAdam"] < 1


def test_memory(
    load_script: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load_script("memory")
    arguments = ["--workloads", "conv", "--steps", "2", "--batch-size", "1"]
    script.main([*arguments, "--csv", str(tmp_path / "out.csv")])
    assert "peak, MiB" in capsys.readouterr().out
    found = rows_of(tmp_path / "out.csv")
    assert [row["optimizer"] for row in found] == list(script.VARIANTS)
    # Parameters, gradients and two moments at the least.
    module = script.WORKLOADS["conv"].network()
    least = 16 * sum(p.numel() for p in module.parameters())
    assert all(float(row["value"]) > least for row in found)


def test_char_lm(
    load_script: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load_script("char_lm")
    (tmp_path / "input.txt").write_text("to be or not to be, " * 20, encoding="utf-8")
    files = ["--runs", str(tmp_path / "runs"), "--csv", str(tmp_path / "out.csv")]
    sizes = [*files, "--batch", "2", "--context", "8"]
    text = ["--data", str(tmp_path)]
    with pytest.raises(SystemExit, match=r"No times in .*: measure them first with `time`"):
        script.main(["train", "AdamW", *text, *sizes, "--lr", "1e-3"])
    script.main(["time", "--cycles", "1", *sizes])
    for name in script.OPTIMIZERS:
        arguments = ["train", name, *text, *sizes, "--budget", "10", "--points", "2"]
        script.main([*arguments, "--lr", "1e-5", "1e-3", "--seeds", "0"])
        script.main([*arguments, "--lr", "1e-3", "--seeds", "1", "2"])
    with pytest.raises(SystemExit, match="name the folder it is in with --data "):
        script.main(["train", "AdamW", "--data", str(tmp_path / "runs"), *sizes, "--lr", "1e-3"])
    capsys.readouterr()
    script.main(["report", *files, "--png", str(tmp_path / "curves.png")])
    table = capsys.readouterr().out.split("\n\n")[1]
    for name in script.OPTIMIZERS:
        assert re.search(rf"\| {name}, lr 0.001, .* ± .*\| +2 \|", table)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    losses = [row for row in rows_of(tmp_path / "out.csv") if "loss" in row["metric"]]
    assert len(losses) == 2 * len(script.OPTIMIZERS)


# Their parts


@pytest.mark.parametrize("data", ["digits", "fashion"])
def test_adafisher_sgd(
    data: str,
    load_script: Callable[[str], ModuleType],
    fashion_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--csv", str(tmp_path / "out.csv"), "--seeds", "0", "--interval", "2"]
    arguments += ["--batch", "16", "--start", "8", "--span", "4", "--steps", "4"]
    if data == "fashion":
        arguments += ["--data", str(fashion_folder), "--images", "20"]
    load_script("adafisher_sgd").main(arguments)
    assert "### 4 steps beside momentum SGD, from step 8 on" in capsys.readouterr().out
    found = {
        (row["optimizer"], row["metric"]): float(row["value"])
        for row in rows_of(tmp_path / "out.csv")
    }
    assert found["AdaFisher, reference", "cosine"] > 0.95
    assert found["AdaFisher, corrected", "cosine"] < found["AdaFisher, reference", "cosine"]
    assert 0.05 < found["SGD, lr 7 % smaller (reference)", "distance / travel"] < 0.09
    assert {"SGD, lr 0.1", "SGD, lr 0.03"} < {name for name, _ in found}


def test_char_lm_limits(load_script: Callable[[str], ModuleType]) -> None:
    script = load_script("char_lm")
    factors = [script.share_of_lr(step, 200) for step in range(200)]
    assert factors[9] == max(factors) == 1.0
    assert factors[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert factors[9:] == sorted(factors[9:], reverse=True)
    assert factors[-1] == pytest.approx(0.1, abs=1e-3)

    weights = [torch.nn.Parameter(torch.tensor([2.0, -1.0])), torch.nn.Parameter(torch.ones(1))]
    optimizer = script.SignMomentum(
        [{"params": weights[:1]}, {"params": weights[1:], "weight_decay": 0.0}], 0.1, 0.75, 0.5
    )
    for grads in ([4.0, 0.0], [-1.0, 0.0]):
        weights[0].grad, weights[1].grad = torch.tensor(grads), torch.ones(1)
        optimizer.step()
    # The average is 1, then 0.5: both steps go down by lr, after the decay.
    expected = (2.0 * 0.95 - 0.1) * 0.95 - 0.1
    torch.testing.assert_close(weights[0].data, torch.tensor([expected, -0.95 * 0.95]))
    torch.testing.assert_close(weights[1].data, torch.tensor([0.8]))


def test_char_lm_chooses_by_the_tuning_seed(load_script: Callable[[str], ModuleType]) -> None:
    report = load_script("char_lm_report")

    def curve(lr: float, seed: int, loss: float, name: str = "AdamW") -> object:
        points = (report.Point(10, 9.0, loss, float("nan")),)
        return report.Curve(report.Setting(name, lr, 0.1), seed, 10, points)

    curves = [
        curve(1e-3, 0, 2.0),
        curve(2e-3, 0, 1.5),
        curve(4e-3, 0, float("nan")),
        curve(1e-3, 1, 1.0),
        curve(2e-3, 1, 1.7),
        curve(2e-3, 2, 1.9),
        curve(1e-4, 0, 3.0, "SophiaG"),
        curve(1e-4, 1, 1.6, "SophiaG"),
        curve(1e-4, 2, 2.0, "SophiaG"),
    ]
    groups = report.chosen(curves)
    assert [c.final for c in groups["AdamW"]] == [1.7, 1.9]
    table = report.comparison(curves, {"AdamW": (0.1, 1.0), "SophiaG": (0.11, 1.1)})
    assert re.search(r"AdamW, lr 0.002.*1.8000 ± 0.1414 \| +- \|", table)
    assert re.search(r"SophiaG, lr 0.0001.*1.8000 ± 0.2828 \| \+0.0000 ± 0.1414", table)


def test_uci_split_and_statistics(load_script: Callable[[str], ModuleType], tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    (tmp_path / "uci").mkdir()
    x, y = generator.normal(5, 3, (768, 8)), generator.normal(size=768)
    order = generator.permutation(768)
    np.savez(tmp_path / "uci" / "energy.npz", x=x, y=y, perm_adamqlr=order)
    problem = load_script("uci_regression").load(tmp_path, "energy", torch.float64)
    assert [len(part[0]) for part in problem] == [588, 76]
    known = x[order[:692]]
    expected = (x[order] - known.mean(0)) / known.std(0)
    np.testing.assert_allclose(problem.train[0], expected[:588])
    np.testing.assert_allclose(problem.test[0], expected[692:])


def test_uci_weights(load_script: Callable[[str], ModuleType]) -> None:
    network = load_script("uci_regression").make_network(8, 4000, seed=0, dtype=torch.float32)
    weight = network[0].weight
    assert weight.abs().max() <= 2 / 8**0.5
    # A normal distribution cut at two deviations keeps 0.880 of its deviation.
    torch.testing.assert_close(weight.std().item(), 0.8796 / 8**0.5, rtol=0.02, atol=0)
    assert not network[0].bias.any()


def test_uci_reports_a_broken_file(
    load_script: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    (tmp_path / "uci").mkdir()
    np.savez(tmp_path / "uci" / "energy.npz", x=np.ones((3, 2)))
    with pytest.raises(KeyError, match=r"lacks \['perm_adamqlr', 'y'\]"):
        load_script("uci_regression").load(tmp_path, "energy")


def test_relay_takes_turns(load_script: Callable[[str], ModuleType]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    relay = load_script("step_time").Relay(3)
    order: list[int] = []

    def run(runner: int) -> None:
        relay.wait(runner)
        for _ in range(runner + 1):
            order.append(runner)
            relay.hand_over(runner)
            relay.wait(runner)
        relay.hand_over(runner, leaves=True)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(run, range(3)))
    assert order == [0, 1, 2, 1, 2, 2]


def test_report(load_script: Callable[[str], ModuleType], tmp_path: Path) -> None:
    report = load_script("report")
    assert report.verdict(1.05, 1.0, slack=0.1) == "pass"
    assert report.verdict(1.2, 1.0, slack=0.1) == report.verdict(float("nan"), 1.0) == "FAIL"
    assert report.verdict(1.2, float("nan")) == ""
    table = report.markdown_table(["name", "x"], [["a", "1"], ["long name", "22"]])
    assert table.splitlines()[1] == "| --------- | --: |"
    assert len({len(line) for line in table.splitlines()}) == 1

    path = tmp_path / "new" / "out.csv"
    measurement = report.Measurement("b", "t", "o", "m", 0.5)
    for _ in range(2):
        report.append_csv(path, [measurement])
    assert [row["value"] for row in rows_of(path)] == ["0.5", "0.5"]
    assert rows_of(path)[0]["ratio"] == ""
    path.write_text("date,other\n", encoding="utf-8")
    with pytest.raises(ValueError, match="name another file with --csv"):
        report.append_csv(path, [measurement])
