"""Epochs and time to AdamW's best validation loss: K-FAC against AdamW on two image tasks.

python benchmarks/kfac_curves.py fashion_mnist --data DIR --png curves.png
python benchmarks/kfac_curves.py cifar10 --data DIR --png curves.png

"fashion_mnist" is the network 784-50-10 of ``paper_tasks.py``. "cifar10" is a residual network of
seven convolutions with BatchNorm on a part of CIFAR-10 (4,000 images, 1,000 more validate), without
augmentation. AdamW and K-FAC with a fixed learning rate run over small grids of learning rates; for
each kind the run with the smallest validation loss counts. K-FAC with adaptive learning rate,
momentum and damping has nothing to choose and gets a large batch. All runs take turns after every
point, so that a slow spell of the machine hits all of them; only training counts as time.
"""

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cifar10
import fashion_mnist
import torch
from fashion_mnist import Contestant, Data
from report import Measurement, add_common_arguments, append_csv, markdown_table, number
from torch import nn
from torch.optim import Optimizer

from lightning_curvature import EKFAC, KFAC

__all__ = ["TASKS", "Run", "Task", "main"]

_ADAPTIVE = "K-FAC, adaptive"
_EIGENBASIS = "EK-FAC, adaptive"
_FIXED = "K-FAC, fixed lr"
_RIVAL = "AdamW"
_NEAR = 1.1
_COLORS = {
    _RIVAL: "tab:orange",
    _ADAPTIVE: "tab:blue",
    _EIGENBASIS: "tab:cyan",
    _FIXED: "tab:green",
}
# The rate is not adaptive, so the damping is not either: nothing but the factors is measured.
_fixed = partial(
    KFAC,
    adaptive_lr=False,
    adaptive_momentum=False,
    momentum=0.9,
    damping_algorithm="fixed",
    norm_constraint=1e-3,
    factor_update_interval=10,
    inverse_update_interval=50,
)


class Task(NamedTuple):
    """A data set, its network, and batches: the large one is for the adaptive rate."""

    load: Callable[[Path], Data]
    network: Callable[[], nn.Module]
    description: str
    batch: int
    large_batch: int
    epochs: int


TASKS = {
    "fashion_mnist": Task(
        fashion_mnist.load,
        lambda: nn.Sequential(nn.Linear(784, 50), nn.ReLU(), nn.Linear(50, 10)),
        "MLP 784-50-10",
        512,
        3200,
        15,
    ),
    "cifar10": Task(
        cifar10.load, cifar10.ResidualNetwork, "residual network with BatchNorm", 128, 500, 12
    ),
}


class Run(NamedTuple):
    """One run and the kind of optimizer it belongs to."""

    kind: str
    contestant: Contestant


def _runs(task: Task, args: argparse.Namespace) -> list[Run]:
    runs = []

    def add(
        kind: str, title: str, batch: int, make: Callable[[Iterable[nn.Parameter]], Optimizer]
    ) -> None:
        torch.manual_seed(args.seed)
        network = task.network()
        runs.append(Run(kind, Contestant(title, batch, network, make(network.parameters()))))

    for lr in args.adamw_lr:
        add(_RIVAL, f"AdamW {lr:g}", args.batch, partial(torch.optim.AdamW, lr=lr))
    add(_ADAPTIVE, "K-FAC (defaults)", args.large_batch, KFAC)
    add(_EIGENBASIS, "EK-FAC (defaults)", args.large_batch, EKFAC)
    for lr in args.kfac_lr:
        make = partial(_fixed, lr=lr, damping=args.kfac_damping)
        add(_FIXED, f"K-FAC, fixed lr {lr:g}", args.batch, make)
    return runs


def _train(runs: list[Run], data: Data, epochs: int, seed: int) -> None:
    """Train all runs epoch by epoch in turns; one that breaks down ends there."""
    torch.manual_seed(seed)
    running = [run.contestant for run in runs]
    for contestant in running:
        _evaluate(contestant, data)
    for epoch in range(1, epochs + 1):
        for contestant in list(running):
            try:
                _train_epoch(contestant, data, epoch)
            except RuntimeError as error:
                print(f"  {contestant.title} stopped in epoch {epoch}: {error}", flush=True)
                running.remove(contestant)
                continue
            _evaluate(contestant, data)


def _train_epoch(contestant: Contestant, data: Data, epoch: int) -> None:
    goal = epoch * math.ceil(len(data.train[0]) / contestant.batch)
    contestant.network.train()
    while contestant.steps < goal:
        # One step: it ends as soon as any time has passed.
        contestant.train_until(math.nextafter(contestant.seconds, math.inf), data)


def _evaluate(contestant: Contestant, data: Data) -> None:
    contestant.network.eval()
    contestant.evaluate(data)


def _reached(contestant: Contestant, loss: float) -> tuple[float, float]:
    """Return epochs and seconds to the first point with that loss or less, infinite for none."""
    for epoch, point in enumerate(contestant.curve):
        if point.loss <= loss:
            return epoch, point.seconds
    return math.inf, math.inf


def _report(runs: list[Run], name: str, args: argparse.Namespace) -> tuple[str, list[Measurement]]:
    best = _best(runs)
    target = best[_RIVAL].best.loss
    rows, measurements = [], []
    epochs_there, seconds_there = _reached(best[_RIVAL], target)
    for kind, one in runs:
        epochs, seconds = _reached(one, target)
        near = [number(value) for value in _reached(one, _NEAR * target)]
        rows.append(
            [
                one.title + (" (best of its kind)" if one is best[kind] else ""),
                number(one.best.loss, 4),
                str(one.curve.index(one.best)),
                f"{one.best.accuracy:.1%}",
                f"{number(epochs)} / {number(seconds)}",
                " / ".join(near),
                f"{one.seconds / max(1, len(one.curve) - 1):.2f}",
            ]
        )
        rival = f"best AdamW: {best[_RIVAL].title}"
        for metric, value, other in (
            ("best validation loss", one.best.loss, target),
            ("epochs to AdamW's best validation loss", epochs, epochs_there),
            ("seconds to AdamW's best validation loss", seconds, seconds_there),
        ):
            ratio = value / other if other else math.nan
            task = f"{name}, {args.epochs} epochs"
            measurements.append(
                Measurement("kfac_curves", task, one.title, metric, value, rival, ratio)
            )
    header = ["", "best validation loss", "in epoch", "accuracy there"]
    header += ["epochs / seconds to AdamW's best", "to 10 % above it", "seconds per epoch"]
    return markdown_table(header, rows), measurements


def _best(runs: list[Run]) -> dict[str, Contestant]:
    """Return for each kind the run with the smallest validation loss."""
    best: dict[str, Contestant] = {}
    for kind, one in runs:
        if kind not in best or one.best.loss < best[kind].best.loss:
            best[kind] = one
    return best


def _draw(runs: list[Run], title: str, path: Path) -> None:
    """Draw validation loss over epochs and over time; the best of each kind in color."""
    from matplotlib.figure import Figure

    best = _best(runs)
    target = best[_RIVAL].best.loss
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for kind, one in runs:
        style: dict[str, object] = {"color": "0.85", "linewidth": 0.8, "zorder": 1}
        if one is best[kind]:
            style = {"color": _COLORS[kind], "label": one.title}
        losses = [point.loss for point in one.curve]
        left.plot(range(len(losses)), losses, **style)
        right.plot([point.seconds for point in one.curve], losses, **style)
    for axes, label in ((left, "epochs"), (right, "training time [s]")):
        axes.axhline(target, color="0.5", linestyle=":", linewidth=1)
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    lowest = min(one.best.loss for _, one in runs)
    left.set_ylim(0.95 * lowest, 2.0 * target)
    left.set_ylabel("validation loss")
    left.legend(fontsize="small")
    figure.suptitle(f"{title} (gray: other runs; dotted: AdamW's best)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a task.

    Args:
        argv: Arguments of the command line, None for those of the process.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--epochs", type=int, help="passes over the data")
    parser.add_argument("--batch", type=int, help="batch of AdamW and of the fixed rate")
    parser.add_argument("--large-batch", type=int, help="batch of the adaptive rate")
    parser.add_argument("--adamw-lr", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--kfac-lr", type=float, nargs="+", default=[0.01, 0.03, 0.1])
    parser.add_argument("--kfac-damping", type=float, default=1e-2, help="with the fixed rate")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and order")
    parser.add_argument("--smoke", action="store_true", help="one epoch of a few images")
    parser.add_argument("--png", type=Path, default=Path("kfac_curves.png"))
    add_common_arguments(parser)
    args = parser.parse_args(argv)

    torch.set_num_threads(args.threads)
    task = TASKS[args.task]
    for name in ("epochs", "batch", "large_batch"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(task, name))
    try:
        data = task.load(args.data)
    except FileNotFoundError as error:
        parser.error(str(error))
    if args.smoke:
        data = Data(*((images[:20], labels[:20]) for images, labels in data))
        args.epochs, args.batch, args.large_batch = 1, 10, 20
    runs = _runs(task, args)
    _train(runs, data, args.epochs, args.seed)
    table, measurements = _report(runs, args.task, args)
    title = f"{args.task}, {task.description}"
    print(f"\n### {title}, {args.epochs} epochs, seed {args.seed}\n\n{table}")
    _draw(runs, title, args.png)
    print(f"\nCurves: {args.png}")
    append_csv(args.csv, measurements)


if __name__ == "__main__":
    main()
