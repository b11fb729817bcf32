"""Tables and curves of char_lm.py, from the files that its runs wrote."""

import csv
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from report import Measurement, markdown_table

__all__ = [
    "TUNING_SEED",
    "Curve",
    "Point",
    "Setting",
    "append_curve",
    "chosen",
    "comparison",
    "draw",
    "measurements",
    "read_curves",
    "read_times",
    "tuning",
    "write_times",
]

TUNING_SEED = 0
_RIVAL = "AdamW"
_COLORS = {"AdamW": "tab:orange", "sign-momentum": "tab:green", "SophiaG": "tab:blue"}

Times = dict[str, tuple[float, float]]  # seconds per step, and relative to AdamW


@dataclass(frozen=True)
class Setting:
    """An optimizer and its hyper-parameters.

    Attributes:
        optimizer: Its name.
        lr: Largest learning rate.
        weight_decay: Decoupled weight decay of matrices.
        rho: SophiaG's rho, 0 for the others.
    """

    optimizer: str
    lr: float
    weight_decay: float
    rho: float = 0.0

    @property
    def title(self) -> str:
        """The setting in words."""
        return f"{self.optimizer}, {self.numbers}"

    @property
    def numbers(self) -> str:
        """The hyper-parameters in words."""
        rho = f", rho {self.rho:g}" if self.rho else ""
        return f"lr {self.lr:g}, weight decay {self.weight_decay:g}{rho}"


@dataclass(frozen=True)
class Point:
    """What a run had reached after some steps.

    Attributes:
        step: Steps taken.
        train_loss: Mean over the steps since the last point, nats per character.
        val_loss: Over the whole validation part, nats per character.
        win_rate: Share of coordinates that SophiaG did not clip; NaN for the others.
    """

    step: int
    train_loss: float
    val_loss: float
    win_rate: float


@dataclass(frozen=True)
class Curve:
    """One run.

    Attributes:
        setting: Optimizer and hyper-parameters.
        seed: Seed of weights and windows.
        steps: Steps that fit the budget.
        points: What it reached; fewer than planned if it broke down.
    """

    setting: Setting
    seed: int
    steps: int
    points: tuple[Point, ...]

    @property
    def final(self) -> float:
        """Last validation loss, infinite if the run broke down."""
        last = self.points[-1]
        done = last.step == self.steps and math.isfinite(last.val_loss)
        return last.val_loss if done else math.inf


_RUN_COLUMNS = [*(field.name for field in fields(Setting)), "seed", "steps"]
_COLUMNS = [*_RUN_COLUMNS, *(field.name for field in fields(Point))]


# Files


def append_curve(folder: Path, curve: Curve) -> None:
    """Add a run to ``curves.csv``.

    Args:
        folder: Folder of the file.
        curve: The run.
    """
    path = folder / "curves.csv"
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, _COLUMNS)
        if new:
            writer.writeheader()
        run = {**asdict(curve.setting), "seed": curve.seed, "steps": curve.steps}
        writer.writerows({**run, **asdict(point)} for point in curve.points)


def read_curves(folder: Path) -> list[Curve]:
    """Return all runs; of two runs alike the later one.

    Args:
        folder: Folder of ``curves.csv``.

    Raises:
        SystemExit: If it is not there.
    """
    found: dict[tuple[Setting, int, int], list[Point]] = {}
    try:
        with (folder / "curves.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError as error:
        raise SystemExit(f"No curves in {folder}: `train` first.") from error
    for row in rows:
        numbers = [float(row[name]) for name in ("lr", "weight_decay", "rho")]
        key = Setting(row["optimizer"], *numbers), int(row["seed"]), int(row["steps"])
        losses = [float(row[name]) for name in ("train_loss", "val_loss", "win_rate")]
        point = Point(int(row["step"]), *losses)
        points = found.setdefault(key, [])
        if points and point.step <= points[-1].step:
            points.clear()
        points.append(point)
    return [Curve(*key, tuple(points)) for key, points in found.items()]


def write_times(folder: Path, times: Times) -> None:
    """Write ``times.csv``.

    Args:
        folder: Folder of the file; it is created.
        times: What to write.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "times.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["optimizer", "seconds", "relative"])
        writer.writerows([name, *numbers] for name, numbers in times.items())


def read_times(folder: Path) -> Times:
    """Return what `write_times` wrote.

    Args:
        folder: Folder of ``times.csv``.

    Raises:
        SystemExit: If it is not there.
    """
    try:
        with (folder / "times.csv").open(newline="", encoding="utf-8") as file:
            return {
                row["optimizer"]: (float(row["seconds"]), float(row["relative"]))
                for row in csv.DictReader(file)
            }
    except FileNotFoundError as error:
        raise SystemExit(f"No times in {folder}: measure them first with `time`.") from error


# Tables


def chosen(curves: Sequence[Curve]) -> dict[str, list[Curve]]:
    """Return the runs that count: by optimizer the best setting of the tuning seed, other seeds.

    Args:
        curves: All runs.
    """
    best: dict[str, Curve] = {}
    for curve in curves:
        name = curve.setting.optimizer
        if curve.seed == TUNING_SEED and (name not in best or curve.final < best[name].final):
            best[name] = curve
    return {
        name: [c for c in curves if c.setting == tuned.setting and c.seed != TUNING_SEED]
        for name, tuned in sorted(best.items(), key=lambda item: list(_COLORS).index(item[0]))
    }


def tuning(curves: Sequence[Curve]) -> str:
    """Return the table of the runs that the hyper-parameters were chosen by.

    Args:
        curves: All runs.
    """
    runs = [curve for curve in curves if curve.seed == TUNING_SEED]
    order = list(_COLORS)
    runs.sort(key=lambda c: (order.index(c.setting.optimizer), c.final))
    rows = [
        [c.setting.title, str(c.steps), f"{c.final:.4f}", _percent(_win_rate([c]))] for c in runs
    ]
    return markdown_table(["tuning, one seed", "steps", "validation loss", "not clipped"], rows)


def comparison(curves: Sequence[Curve], times: Times) -> str:
    """Return the table of the runs that count.

    Args:
        curves: All runs.
        times: Times per step.
    """
    groups = chosen(curves)
    rival = {curve.seed: curve.final for curve in groups.get(_RIVAL, [])}
    rows = []
    for name, runs in groups.items():
        if not runs:
            continue
        gaps = [curve.final - rival[curve.seed] for curve in runs if curve.seed in rival]
        rows.append(
            [
                f"{name}, {runs[0].setting.numbers}",
                f"{times[name][1]:.3f}",
                str(runs[0].steps),
                _spread([curve.final for curve in runs], "{:.4f}"),
                "-" if name == _RIVAL or not gaps else _spread(gaps, "{:+.4f}"),
                _percent(_win_rate(runs)),
                str(len(runs)),
            ]
        )
    header = ["same time", "time per step", "steps", "validation loss", "minus AdamW"]
    return markdown_table([*header, "not clipped", "seeds"], rows)


def _spread(values: Sequence[float], form: str) -> str:
    """Return mean and standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return f"{form.format(statistics.fmean(values))} ± {deviation:.4f}"


def _win_rate(runs: Sequence[Curve]) -> float:
    """Return the mean over runs and over the second half of each."""
    late = [p.win_rate for c in runs for p in c.points if p.step > c.steps / 2]
    return statistics.fmean(late) if late else math.nan


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{share:.0%}"


def measurements(curves: Sequence[Curve]) -> list[Measurement]:
    """Return the numbers for the CSV that all benchmarks share.

    Args:
        curves: All runs.
    """
    groups = chosen(curves)
    rival = [curve.final for curve in groups.get(_RIVAL, [])]
    found = []
    for runs in groups.values():
        for curve in runs:
            mean = statistics.fmean(rival) if rival else math.nan
            task = f"tiny Shakespeare, {curve.steps} steps, seed {curve.seed}"
            found.append(
                Measurement(
                    "char_lm",
                    task,
                    curve.setting.title,
                    "final validation loss",
                    curve.final,
                    f"{_RIVAL}, mean" if rival else "",
                    curve.final / mean,
                )
            )
    return found


# Picture


def draw(curves: Sequence[Curve], times: Times, path: Path) -> None:
    """Draw the validation loss over time and over steps, and what tuning found.

    Args:
        curves: All runs.
        times: Times per step.
        path: File to write.

    Raises:
        ModuleNotFoundError: If matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'The curves need matplotlib: pip install "lightning-curvature[bench]".'
        ) from error
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    by_time, by_step, by_lr = figure.subplots(1, 3)
    groups = {name: runs for name, runs in chosen(curves).items() if runs}
    for name, runs in groups.items():
        losses = defaultdict(list)
        for curve in runs:
            for point in curve.points:
                losses[point.step].append(point.val_loss)
        steps = sorted(losses)
        seconds = [step * times[_RIVAL][0] * times[name][1] for step in steps]
        mean = [statistics.fmean(losses[step]) for step in steps]
        low, high = ([of(losses[step]) for step in steps] for of in (min, max))
        label = f"{name}, {runs[0].setting.numbers}"
        for axes, xs in ((by_time, seconds), (by_step, steps)):
            axes.plot(xs, mean, color=_COLORS[name], label=label, linewidth=1.4)
            axes.fill_between(xs, low, high, color=_COLORS[name], alpha=0.2, linewidth=0)
    _draw_tuning(by_lr, curves)
    finals = [curve.final for runs in groups.values() for curve in runs]
    if finals and math.isfinite(max(finals)):
        for axes in (by_time, by_step):
            axes.set_ylim(min(finals) - 0.03, max(finals) + 0.6)
    by_time.set_xlabel("training time on one core [s]")
    by_step.set_xlabel("steps")
    by_lr.set_xlabel("learning rate")
    by_lr.set_xscale("log")
    by_time.set_ylabel("validation loss [nats per character]")
    by_lr.set_ylabel("final validation loss")
    for axes in (by_time, by_lr):
        if axes.has_data():
            axes.legend(fontsize="small")
    seeds = max((len(runs) for runs in groups.values()), default=0)
    by_time.set_title(f"mean and range of {seeds} seeds", fontsize="medium")
    by_step.set_title("the same over steps", fontsize="medium")
    by_lr.set_title("tuning, another seed", fontsize="medium")
    for axes in (by_time, by_step, by_lr):
        axes.grid(alpha=0.3)
    figure.suptitle("Tiny Shakespeare, character GPT, the same training time for all")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _draw_tuning(axes: object, curves: Sequence[Curve]) -> None:
    """Draw the final loss over the learning rate: the best of the other hyper-parameters."""
    for name, color in _COLORS.items():
        best: dict[float, float] = {}
        for curve in curves:
            if curve.seed == TUNING_SEED and curve.setting.optimizer == name:
                lr = curve.setting.lr
                best[lr] = min(best.get(lr, math.inf), curve.final)
        finite = sorted((lr, loss) for lr, loss in best.items() if math.isfinite(loss))
        if finite:
            axes.plot(*zip(*finite, strict=True), "o-", color=color, label=name)
