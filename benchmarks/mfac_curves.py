"""MFAC against SGD and AdamW on Fashion-MNIST, in the same time and in the same number of steps.

    python benchmarks/mfac_curves.py --data DIR --png curves.png

The network is that of ``paper_tasks.py``, 784-50-10. SGD (momentum 0.9) and AdamW run over grids of
learning rates, MFAC over learning rates and dampings. For each kind the run with the smallest
validation loss counts. With what was best for MFAC there are runs of its variants, and the best of
each kind runs again with other seeds. All runs have the same time on the processor, spent in
training steps, and the same batch. Learning rates are constant.
"""

import argparse
import csv
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import fashion_mnist
import torch
from fashion_mnist import Contestant, Data
from report import Measurement, add_common_arguments, append_csv, markdown_table, number
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_curvature import MFAC

__all__ = ["Run", "TimedContestant", "main"]

_SGD = "SGD"
_ADAMW = "AdamW"
_MFAC = "MFAC"
_COLORS = {_SGD: "tab:green", _ADAMW: "tab:orange", _MFAC: "tab:blue"}


class TimedContestant(Contestant):
    """A run whose time is that on the processor, which other work on the machine does not change.

    See `Contestant` for the arguments.
    """

    @override
    def train_until(self, seconds: float, data: Data) -> None:
        """Train until the given time was spent in training steps, loading of batches included."""
        if self._batches is None:
            self._batches = _epochs(data.train, self.batch)
        while self.seconds < seconds:
            start = time.process_time()
            images, labels = next(self._batches)
            self.optimizer.zero_grad()
            self._criterion(self.network(images), labels).backward()
            self.optimizer.step()
            self.seconds += time.process_time() - start
            self.steps += 1


def _epochs(part: tuple[Tensor, Tensor], batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield shuffled batches for ever, without the rows that do not fill a batch."""
    images, labels = part
    while True:
        for rows in torch.randperm(len(images)).split(batch):
            if len(rows) == batch:
                yield images[rows], labels[rows]


class Run(NamedTuple):
    """One run, what it belongs to, and how to make its optimizer again."""

    kind: str
    make: Callable[[Iterable[nn.Parameter]], Optimizer]
    contestant: TimedContestant

    @property
    def loss(self) -> float:
        """Smallest validation loss."""
        return self.contestant.best.loss


def _run(
    kind: str,
    title: str,
    make: Callable[[Iterable[nn.Parameter]], Optimizer],
    args: argparse.Namespace,
    data: Data,
    seed: int,
) -> Run:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(784, 50), nn.ReLU(), nn.Linear(50, 10))
    contestant = TimedContestant(title, args.batch, network, make(network.parameters()))
    torch.manual_seed(seed)
    contestant.evaluate(data)
    for i in range(1, args.points + 1):
        try:
            contestant.train_until(args.seconds * i / args.points, data)
        except RuntimeError as error:
            print(f"  {title} stopped after {contestant.steps} steps: {error}", flush=True)
            break
        contestant.evaluate(data)
    print(f"  {title}, seed {seed}: {contestant.best.loss:.4f}", flush=True)
    return Run(kind, make, contestant)


def _grid(args: argparse.Namespace, data: Data) -> list[Run]:
    """Return the runs over all learning rates and dampings."""
    runs = []
    for lr in args.sgd_lr:
        make: Callable[..., Optimizer] = partial(torch.optim.SGD, lr=lr, momentum=0.9)
        runs.append(_run(_SGD, f"SGD {lr:g}", make, args, data, args.seeds[0]))
    for lr in args.adamw_lr:
        make = partial(torch.optim.AdamW, lr=lr)
        runs.append(_run(_ADAMW, f"AdamW {lr:g}", make, args, data, args.seeds[0]))
    for lr, damping in itertools.product(args.mfac_lr, args.mfac_damping):
        make = partial(MFAC, lr=lr, damping=damping, num_grads=args.num_grads)
        title = f"MFAC {lr:g}, damping {damping:g}, m={args.num_grads}"
        runs.append(_run(_MFAC, title, make, args, data, args.seeds[0]))
    return runs


def _variants(best: Run, args: argparse.Namespace, data: Data) -> list[Run]:
    """Return runs of MFAC with one thing changed."""
    assert isinstance(best.make, partial)
    options: list[tuple[str, dict[str, Any]]] = [
        ("window_normalization count", {"window_normalization": "count"}),
        ("momentum 0.9 (ema)", {"momentum": 0.9}),
        (f"m={2 * args.num_grads}", {"num_grads": 2 * args.num_grads}),
        ("gram_dtype float32", {"gram_dtype": "float32"}),
    ]
    return [
        _run(f"- {name}", f"- {name}", partial(best.make, **changed), args, data, args.seeds[0])
        for name, changed in options
    ]


def _best(runs: Sequence[Run]) -> dict[str, Run]:
    best: dict[str, Run] = {}
    for run in runs:
        if run.kind not in best or run.loss < best[run.kind].loss:
            best[run.kind] = run
    return best


def _within(contestant: Contestant, steps: int) -> float:
    """Return the smallest validation loss in so many steps."""
    return min(point.loss for point in contestant.curve if point.steps <= steps)


def _table(runs: Sequence[Run], best: dict[str, Run]) -> str:
    fewest = min(run.contestant.steps for run in best.values())
    rows = []
    for run in runs:
        one = run.contestant
        rows.append(
            [
                one.name + (" (best of its grid)" if best.get(run.kind) is run else ""),
                number(one.best.loss, 4),
                f"{one.best.seconds:.1f}",
                str(one.best.steps),
                f"{one.best.accuracy:.1%}",
                f"{one.best.test_accuracy:.1%}",
                number(_within(one, fewest), 4),
                f"{1e3 * one.seconds / max(one.steps, 1):.2f}",
            ]
        )
    header = ["", "best validation loss", "after s", "after steps", "accuracy there"]
    header += ["test accuracy there", f"best loss in {fewest} steps", "ms per step"]
    return markdown_table(header, rows)


def _over_seeds(groups: dict[str, list[Run]]) -> str:
    """Return the table of the best of each kind over all seeds."""
    fewest = min(run.contestant.steps for runs in groups.values() for run in runs)
    rows = []
    for runs in groups.values():
        own = [run.contestant for run in runs]
        rows.append(
            [
                own[0].name,
                _spread([one.best.loss for one in own], "{:.4f}"),
                _spread([100 * one.best.test_accuracy for one in own], "{:.1f}"),
                _spread([one.best.seconds for one in own], "{:.1f}"),
                _spread([_within(one, fewest) for one in own], "{:.4f}"),
                str(len(own)),
            ]
        )
    header = ["", "best validation loss", "test accuracy there, %", "after s"]
    return markdown_table([*header, f"best loss in {fewest} steps", "seeds"], rows)


def _spread(values: Sequence[float], form: str) -> str:
    mean = form.format(statistics.fmean(values))
    return f"{mean} ± {form.format(statistics.stdev(values))}" if len(values) > 1 else mean


def _draw(runs: Sequence[Run], best: dict[str, Run], path: Path) -> None:
    """Draw validation loss over time and over steps; the best of each kind in color."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for run in runs:
        style: dict[str, object] = {"color": "0.85", "linewidth": 0.8, "zorder": 1}
        if run.kind not in _COLORS:
            style = {"linestyle": "--", "linewidth": 0.9, "label": run.contestant.name}
        elif best[run.kind] is run:
            style = {"color": _COLORS[run.kind], "label": run.contestant.name}
        points = run.contestant.curve
        losses = [point.loss for point in points]
        left.plot([point.seconds for point in points], losses, **style)
        right.plot([max(point.steps, 1) for point in points], losses, **style)
    lowest = min(run.loss for run in runs)
    left.set_ylim(0.97 * lowest, 1.8 * lowest)
    left.set_ylabel("validation loss")
    left.set_xlabel("training time on the processor [s]")
    right.set_xlabel("steps")
    right.set_xscale("log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend(fontsize="x-small")
    figure.suptitle("Fashion-MNIST, MLP 784-50-10 (gray: other runs of the grids)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _write_curves(runs: Sequence[Run], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["run", *fashion_mnist.Point._fields])
        for run in runs:
            for point in run.contestant.curve:
                writer.writerow([run.contestant.name, *(f"{value:.6g}" for value in point)])


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark.

    Args:
        argv: Arguments of the command line, None for those of the process.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seconds", type=float, default=5.0, help="training time per run")
    parser.add_argument("--points", type=int, default=40, help="points on each curve")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--num-grads", type=int, default=32, help="window of MFAC")
    parser.add_argument("--sgd-lr", type=float, nargs="+", default=[0.01, 0.03, 0.1, 0.3])
    parser.add_argument("--adamw-lr", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--mfac-lr", type=float, nargs="+", default=[0.01, 0.03, 0.1])
    parser.add_argument("--mfac-damping", type=float, nargs="+", default=[1e-4, 1e-3, 1e-2])
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="the first decides on the grids"
    )
    parser.add_argument("--smoke", action="store_true", help="a few images, a moment per run")
    parser.add_argument("--png", type=Path, default=Path("mfac_curves.png"))
    add_common_arguments(parser)
    args = parser.parse_args(argv)

    torch.set_num_threads(args.threads)
    try:
        data = fashion_mnist.load(args.data)
    except FileNotFoundError as error:
        parser.error(str(error))
    if args.smoke:
        data = Data(*((images[:20], labels[:20]) for images, labels in data))
        args.batch, args.seconds, args.points, args.num_grads = 10, 0.02, 2, 4
    runs = _grid(args, data)
    best = _best(runs)
    runs += _variants(best[_MFAC], args, data)
    groups = {}
    for kind, run in best.items():
        again = [
            _run(kind, run.contestant.name, run.make, args, data, seed) for seed in args.seeds[1:]
        ]
        groups[kind] = [run, *again]
    print(
        f"\n### Fashion-MNIST, MLP 784-50-10, batch {args.batch}, {args.seconds:g} s on the "
        f"processor each, seed {args.seeds[0]}\n\n{_table(runs, best)}"
        f"\n\n### The best of each kind over seeds\n\n{_over_seeds(groups)}"
    )
    _draw(runs, best, args.png)
    _write_curves(runs, args.png.with_suffix(".csv"))
    print(f"\nCurves: {args.png}, {args.png.with_suffix('.csv')}")
    append_csv(args.csv, _measurements(runs, best, args.seconds))


def _measurements(runs: Sequence[Run], best: dict[str, Run], seconds: float) -> list[Measurement]:
    rival = best[_ADAMW].contestant
    found = []
    for run in runs:
        one = run.contestant
        per_step, other = (c.seconds / max(c.steps, 1) for c in (one, rival))
        for metric, value, own in (
            ("best validation loss", one.best.loss, rival.best.loss),
            ("seconds per step", per_step, other),
        ):
            ratio = value / own if own else math.nan
            name = f"best AdamW: {rival.name}"
            task = f"fashion_mnist, {seconds:g} s"
            found.append(Measurement("mfac_curves", task, one.name, metric, value, name, ratio))
    return found


if __name__ == "__main__":
    main()
