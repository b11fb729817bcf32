"""Runs of ``pruning.py``: how they are kept in a file, and the tables made of them."""

import csv
import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from report import Measurement, append_csv, markdown_table

__all__ = ["Run", "Setting", "append_run", "read_runs", "report"]


_USUAL_NUM_GRADS = 64


class Setting(NamedTuple):
    """How a network was pruned.

    Attributes:
        task: What was trained.
        seed: Seed of the weights and of everything else.
        sparsity: Sparsity to reach.
        how: Whether at once, or in several epochs.
        criterion: See `MFACPruning`, and there for what follows.
        weight_update: How the weights that stay were changed.
        num_recomputations: Steps of an event.
        num_grads: Gradients per step.
        damping: What was added to the Fisher matrix.
        block_size: Coordinates per block, 0 for one block.
        fisher_batch_size: Examples per gradient.
    """

    task: str
    seed: int
    sparsity: float
    how: Literal["dense", "one-shot", "gradual"] = "one-shot"
    criterion: Literal["fisher", "magnitude", "random"] = "fisher"
    weight_update: Literal["joint", "sum", "none"] = "joint"
    num_recomputations: int = 16
    num_grads: int = 64
    damping: float = 1e-5
    block_size: int = 128
    fisher_batch_size: int = 32

    @property
    def way(self) -> str:
        """What is compared, in words."""
        if self.how == "dense":
            return "dense"
        if self.criterion != "fisher":
            return f"{self.how}, {self.criterion}"
        steps = f", {self.num_recomputations} steps" if self.how == "one-shot" else ""
        size = f", m={self.num_grads}" if self.num_grads != _USUAL_NUM_GRADS else ""
        return f"{self.how}, M-FAC, {self.weight_update}{steps}{size}"

    @property
    def title(self) -> str:
        """The setting without its seed, in words."""
        return (
            f"{self.task} {self.sparsity:g}: {self.way}; m={self.num_grads}, "
            f"damping={self.damping:g}, block={self.block_size or 'all'}, "
            f"batch={self.fisher_batch_size}"
        )


class Run(NamedTuple):
    """What came of it.

    Attributes:
        setting: How the network was pruned.
        reached: Sparsity at the end.
        seconds: Time on the processor until the first event was over.
        validation_loss: Right after the first event, and so what follows.
        validation_accuracy: Fraction that is right.
        loss: On test images.
        accuracy: On test images.
        tuned_loss: On test images after fine-tuning.
        tuned_accuracy: Likewise.
    """

    setting: Setting
    reached: float
    seconds: float
    validation_loss: float
    validation_accuracy: float
    loss: float
    accuracy: float
    tuned_loss: float
    tuned_accuracy: float


_COLUMNS = (*Setting._fields, *Run._fields[1:])


def append_run(path: Path, run: Run) -> None:
    """Append a run to a file.

    Args:
        path: The file; it is created if it is not there.
        run: What to append.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(_COLUMNS)
        writer.writerow([*run.setting, *run[1:]])


def read_runs(path: Path) -> list[Run]:
    """Return the runs in a file, none if there is no file.

    Args:
        path: The file.
    """
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))[1:]
    kinds = [str, int, float, str, str, str, int, int, float, int, int]
    count = len(kinds)
    return [
        Run(
            Setting(*(kind(cell) for kind, cell in zip(kinds, row[:count], strict=True))),
            *map(float, row[count:]),
        )
        for row in rows
    ]


def report(runs: Sequence[Run], grid: Sequence[Run], path: Path) -> None:
    """Print tables of the comparisons and of the grids, append the numbers to a CSV file.

    Args:
        runs: Runs that are compared.
        grid: Runs in which one thing at a time was varied.
        path: File that the numbers are appended to.
    """
    measurements: list[Measurement] = []
    for task in dict.fromkeys(run.setting.task for run in runs):
        own = [run for run in runs if run.setting.task == task]
        dense = [run.accuracy for run in own if run.setting.how == "dense"]
        for tuned in (False, True):
            after = "after fine-tuning" if tuned else "before fine-tuning"
            table, found = _comparison(own, task, tuned=tuned)
            measurements += found
            print(f"\n### {task}, dense {_spread(dense)}: test accuracy {after}\n\n{table}")
    varied = [run for run in grid if run.setting.how != "dense"]
    if varied:
        print(f"\n### One-shot, validation, no fine-tuning\n\n{_grid(varied)}")
    append_csv(path, measurements)


def _comparison(runs: Sequence[Run], task: str, *, tuned: bool) -> tuple[str, list[Measurement]]:
    """Return a table of the ways to prune, by sparsity."""
    sparsities = sorted({run.setting.sparsity for run in runs if run.setting.sparsity})
    ways = dict.fromkeys(run.setting.way for run in runs if run.setting.how != "dense")
    rows, measurements = [], []
    for way in ways:
        # In the gradual runs there is no moment between pruning and fine-tuning.
        if way.startswith("gradual") and not tuned:
            continue
        cells = []
        for sparsity in sparsities:
            found = [
                run.tuned_accuracy if tuned else run.accuracy
                for run in runs
                if run.setting.way == way and run.setting.sparsity == sparsity
            ]
            cells.append(_spread(found))
            if found:
                metric = f"test accuracy{', fine-tuned' if tuned else ''}, sparsity {sparsity:g}"
                mean = statistics.fmean(found)
                measurements.append(Measurement("pruning", task, way, metric, mean))
        rows.append([way, *cells])
    return markdown_table(["", *(f"{s:.0%}" for s in sparsities)], rows), measurements


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{spread}"


def _grid(runs: Sequence[Run]) -> str:
    """Return a table of everything that was varied, the mean over the seeds."""

    def key(run: Run) -> str:
        return run.setting._replace(seed=0).title

    rows = []
    for title, group in itertools.groupby(sorted(runs, key=key), key):
        found = list(group)
        rows.append(
            [
                title,
                _spread([run.validation_accuracy for run in found]),
                f"{statistics.fmean(run.validation_loss for run in found):.3f}",
                f"{statistics.fmean(run.seconds for run in found):.1f}",
            ]
        )
    return markdown_table(["", "accuracy", "loss", "seconds"], rows)
