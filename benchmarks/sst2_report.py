"""Runs of sst2_zeroth_order.py: their file, the tables and the curves."""

import csv
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from report import Measurement, markdown_table
from torch.optim import Optimizer

__all__ = [
    "TUNING_SEED",
    "Method",
    "Point",
    "Run",
    "append_run",
    "best_rates",
    "comparison",
    "draw",
    "read_runs",
]

TUNING_SEED = 0
_TASK = "sst2_zeroth_order"


class Method(NamedTuple):
    """A way to fine-tune, and the learning rates to choose from; one needs no choice."""

    make: Callable[..., Optimizer]
    passes: int
    rates: tuple[float, ...]
    color: str
    share: float = 1.0
    dtype: torch.dtype = torch.float32


class Point(NamedTuple):
    """What a run had reached after some forward passes."""

    passes: int
    seconds: float
    loss: float
    dev_loss: float
    dev_accuracy: float
    test_accuracy: float


class Run(NamedTuple):
    """A run and its curve."""

    method: str
    lr: float
    seed: int
    points: list[Point]


def read_runs(path: Path) -> list[Run]:
    """Return the runs in a file, none if it is not there.

    Args:
        path: The file.
    """
    if not path.exists():
        return []
    runs: dict[tuple[str, float, int], Run] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for name, lr, seed, passes, *numbers in list(csv.reader(file))[1:]:
            key = (name, float(lr), int(seed))
            run = runs.setdefault(key, Run(*key, []))
            run.points.append(Point(int(passes), *(float(value) for value in numbers)))
    return list(runs.values())


def append_run(path: Path, run: Run) -> None:
    """Append a run to a file.

    Args:
        path: The file.
        run: The run.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(["method", "lr", "seed", *Point._fields])
        writer.writerows([run.method, run.lr, run.seed, *point] for point in run.points)


def best_rates(runs: Iterable[Run], methods: Mapping[str, Method]) -> dict[str, float]:
    """Return the learning rates with the smallest loss on the tuning seed, where there is choice.

    Args:
        runs: The runs.
        methods: The methods by name.
    """
    best: dict[str, tuple[float, float]] = {}
    for run in runs:
        loss = run.points[-1].dev_loss
        if run.seed == TUNING_SEED:
            key = (loss if math.isfinite(loss) else math.inf, run.lr)
            best[run.method] = min(best.get(run.method, key), key)
    only = {name: method.rates[0] for name, method in methods.items() if len(method.rates) == 1}
    found = {name: lr for name, (_, lr) in best.items()} | only
    return {name: found[name] for name in methods if name in found}


def comparison(
    runs: list[Run], methods: Mapping[str, Method], passes: int, seeds: Sequence[int]
) -> tuple[str, list[Measurement]]:
    """Return the tables, and the numbers for the CSV; the first method is the rival.

    Args:
        runs: The runs.
        methods: The methods by name.
        passes: Forward passes of each run.
        seeds: Seeds that count.
    """
    rival = next(iter(methods))
    best = best_rates(runs, methods)
    tuning, rows, measurements, tests = [], [], [], {}
    for name, lr in best.items():
        tried = sorted((run.lr, run) for run in runs if run[0] == name and run.seed == TUNING_SEED)
        losses = [f"{rate:g}: {run.points[-1].dev_loss:.3f}" for rate, run in tried]
        if losses:
            tuning.append([name, ", ".join(losses)])
        counted = [run.points for run in runs if run[:2] == (name, lr) and run.seed in seeds]
        if not counted:
            continue
        early, late = (
            [
                min(points, key=lambda point: abs(point.passes - share * passes)).dev_accuracy
                for points in counted
            ]
            for share in (1 / 6, 1)
        )
        test = [points[-1].test_accuracy for points in counted]
        seconds = statistics.fmean(points[-1].seconds for points in counted)
        tests[name] = statistics.fmean(test)
        rows.append(
            [f"{name}, lr {lr:g}", _spread(early), _spread(late), _spread(test), f"{seconds:.1f}"]
        )
        for metric, value in (("test accuracy", tests[name]), ("seconds", seconds)):
            ratio = tests[name] / tests.get(rival, math.nan) if metric != "seconds" else math.nan
            task, title = f"{passes} forward passes", rows[-1][0]
            measurements.append(Measurement(_TASK, task, title, metric, value, rival, ratio))
    header = ["", f"dev after {passes // 6} passes", f"after {passes}", "test", "seconds"]
    text = markdown_table(["dev loss of the tuning seed by learning rate", ""], tuning)
    return f"{text}\n\n{markdown_table(header, rows)}", measurements


def _spread(values: Sequence[float]) -> str:
    mean = f"{100 * statistics.fmean(values):.1f}"
    return f"{mean} ± {100 * statistics.stdev(values):.1f} %" if len(values) > 1 else f"{mean} %"


def draw(runs: list[Run], methods: Mapping[str, Method], seeds: Sequence[int], path: Path) -> None:
    """Draw accuracy over passes and over time, and bfloat16 beside float32; means of seeds.

    Args:
        runs: The runs.
        methods: The methods by name.
        seeds: Seeds that count.
        path: File to write.
    """
    from matplotlib.figure import Figure

    best = best_rates(runs, methods)
    figure = Figure(figsize=(12, 4), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for name, lr in best.items():
        counted = [run.points for run in runs if run[:2] == (name, lr) and run.seed in seeds]
        if not counted:
            continue
        half = methods[name].dtype != torch.float32
        together = list(zip(*counted, strict=False))
        mean = [statistics.fmean(100 * point.dev_accuracy for point in at) for at in together]
        passes = [at[0].passes for at in together]
        seconds = [statistics.fmean(point.seconds for point in at) for at in together]
        for axes, x, wanted in (
            (panels[0], passes, not half),
            (panels[1], seconds, not half),
            (panels[2], passes, half or name == "MeZO"),
        ):
            if wanted:
                axes.plot(x, mean, color=methods[name].color, label=f"{name}, lr {lr:g}")
    labels = ("forward passes", "time on the processor [s]", "forward passes")
    for axes, label in zip(panels, labels, strict=True):
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy on dev [%]")
    for axes in (panels[0], panels[2]):
        if axes.lines:
            axes.legend(fontsize="x-small", loc="lower right")
    figure.suptitle("SST-2, a new prompt for a pretrained model (a step with backward: 3 passes)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
