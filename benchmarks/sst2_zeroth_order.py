"""Fine-tuning with forward passes only: MeZO, HiZOO and MeZO on few weights against AdamW.

python benchmarks/sst2_zeroth_order.py --data DIR --png curves.png

A small masked word model (see ``sst2.py``) that knows the sentiment of film reviews is asked for it
in new words. All methods start from the same pretrained weights and get the same number of forward
passes, where a step with a backward counts as three. Learning rates are chosen on seed 0 by the
loss on the development set after the last pass; other seeds, of batches and directions, count.

"Sparse" trains the weights with the largest squared gradients, summed over some batches; the passes
and the time of that search count. In bfloat16 the weights are kept in three ways.

Runs are written to a folder, and those that are there already are not repeated.
"""

import argparse
import csv
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from report import Measurement, add_common_arguments, append_csv, markdown_table
from sst2 import FINE_TUNING, PRETRAINING, PromptModel, Sentences, Sst2, evaluate, load, pretrain
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from lightning_curvature.optim.base import CurvatureOptimizer
from lightning_curvature.optim.hizoo import HiZOO
from lightning_curvature.optim.mezo import MeZO
from lightning_curvature.optim.zeroth_order import ZerothOrderOptimizer

__all__ = ["METHODS", "Method", "Run", "main", "train"]

_TUNING_SEED = 0
_BACKWARD_PASSES = 3
_PRETRAINING_LR = 3e-3
# Batches that tell which weights matter.
_SEARCH_BATCHES = 50


class Method(NamedTuple):
    """A way to fine-tune, and the learning rates to choose from; one needs no choice."""

    make: Callable[..., Optimizer]
    passes: int
    rates: tuple[float, ...]
    color: str
    share: float = 1.0
    dtype: torch.dtype = torch.float32


_RIVAL = "AdamW"
METHODS = {
    _RIVAL: Method(torch.optim.AdamW, _BACKWARD_PASSES, (1e-4, 3e-4, 1e-3), "tab:orange"),
    "MeZO": Method(MeZO, 2, (1e-4, 3e-4, 1e-3), "tab:blue"),
    "HiZOO": Method(HiZOO, 3, (1e-4, 3e-4, 1e-3), "tab:cyan"),
    "MeZO, 1 % of the weights": Method(MeZO, 2, (3e-4, 1e-3, 3e-3), "tab:green", 0.01),
    "MeZO, 0.1 % of the weights": Method(MeZO, 2, (1e-3, 3e-3, 1e-2), "tab:red", 0.001),
    **{
        f"MeZO, bfloat16, {how}": Method(
            partial(MeZO, half_precision=how), 2, (3e-4,), color, dtype=torch.bfloat16
        )
        for how, color in (("master", "tab:purple"), ("stochastic", "tab:pink"), ("nearest", "0.4"))
    },
}


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


def train(
    name: str, lr: float, seed: int, weights: dict[str, Tensor], data: Sst2, args: argparse.Namespace
) -> Run:
    """Fine-tune pretrained weights.

    Args:
        name: One of `METHODS`.
        lr: Learning rate.
        seed: Seed of batches and directions.
        weights: The pretrained weights.
        data: Sentences with the prompt, those of the training part for this training only.
        args: Arguments of the command line.
    """
    method = METHODS[name]
    model = PromptModel(data.vocabulary)
    model.load_state_dict(weights)
    model.expect(FINE_TUNING)
    masks, passes, start = {}, 0, time.process_time()
    if method.share < 1:
        masks = _sensitive(model, data.train, method.share, args)
        passes = _BACKWARD_PASSES * args.search_batches
    # On one thread the time on the processor is what the wall clock of an idle machine would show.
    seconds = time.process_time() - start
    model.to(method.dtype)
    step = _stepper(method, model, lr, seed, masks)
    points = [_point(passes, seconds, math.nan, model, data, last=False)]
    marks = [round(args.passes * i / args.points) for i in range(1, args.points + 1)]
    losses: list[float] = []
    for batch in data.train.epochs(args.batch, 1000 + seed):
        start = time.process_time()
        losses.append(step(batch))
        seconds += time.process_time() - start
        passes += method.passes
        if passes < marks[0]:
            continue
        marks = [mark for mark in marks if mark > passes]
        mean, losses = statistics.fmean(losses), []
        points.append(_point(passes, seconds, mean, model, data, last=not marks))
        if not marks or not math.isfinite(points[-1].dev_loss):
            break
    return Run(name, lr, seed, points)


def _stepper(
    method: Method, model: PromptModel, lr: float, seed: int, masks: dict[nn.Parameter, Tensor]
) -> Callable[[Sentences], float]:
    """Return what takes one step on a batch and returns the loss."""
    params = list(masks) or list(model.parameters())
    if not issubclass(getattr(method.make, "func", method.make), CurvatureOptimizer):  # type: ignore[arg-type]
        optimizer = method.make(params, lr=lr)

        def by_backward(batch: Sentences) -> float:
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(batch.words), batch.labels)
            loss.backward()
            optimizer.step()
            return loss.item()

        return by_backward

    zeroth = method.make(params, lr=lr, seed=seed)
    assert isinstance(zeroth, ZerothOrderOptimizer)
    for p, positions in masks.items():
        zeroth.set_mask(p, positions)
    criterion = zeroth.attach_model(model, functional.cross_entropy)
    return lambda batch: float(zeroth.step(lambda: criterion(model(batch.words), batch.labels)))


def _sensitive(
    model: PromptModel, train: Sentences, share: float, args: argparse.Namespace
) -> dict[nn.Parameter, Tensor]:
    """Return the weights with the largest squared gradients, as positions in each parameter."""
    params = list(model.parameters())
    squares = [torch.zeros_like(p) for p in params]
    for batch, _ in zip(train.epochs(args.batch, 99), range(args.search_batches), strict=False):
        loss = functional.cross_entropy(model(batch.words), batch.labels)
        for square, grad in zip(squares, torch.autograd.grad(loss, params), strict=True):
            square.addcmul_(grad, grad)
    everything = torch.cat([square.flatten() for square in squares])
    least = everything.topk(round(share * len(everything))).values[-1]
    found = [(square.flatten() >= least).nonzero().flatten() for square in squares]
    return {p: positions for p, positions in zip(params, found, strict=True) if len(positions)}


def _point(
    passes: int, seconds: float, loss: float, model: PromptModel, data: Sst2, *, last: bool
) -> Point:
    test = evaluate(model, data.test)[1] if last or passes == 0 else math.nan
    return Point(passes, seconds, loss, *evaluate(model, data.dev), test)


# Runs in a folder


def _pretrained(data: Sst2, args: argparse.Namespace) -> tuple[dict[str, Tensor], Sst2]:
    """Return the pretrained weights, and the data that is left with the new prompt."""
    order = torch.randperm(
        len(data.train.labels), generator=torch.Generator().manual_seed(_TUNING_SEED)
    )
    torch.manual_seed(_TUNING_SEED)
    model = PromptModel(data.vocabulary)
    path = args.runs / "pretrained.pt"
    if not path.exists():
        asked = data.asked(PRETRAINING)
        model.expect(PRETRAINING)
        labeled = asked.train.part(order[: args.pretraining_labels])
        pretrain(
            model,
            asked.train,
            labeled,
            steps=args.pretraining_steps,
            lr=_PRETRAINING_LR,
            batch=args.batch,
            seed=_TUNING_SEED,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path)
        print(f"Pretrained: {evaluate(model, asked.dev)[1]:.1%} in its own words", flush=True)
    asked = data.asked(FINE_TUNING)
    rest = asked.train.part(order[args.pretraining_labels :])
    return torch.load(path), asked._replace(train=rest)


def _read(path: Path) -> list[Run]:
    if not path.exists():
        return []
    runs: dict[tuple[str, float, int], Run] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for name, lr, seed, passes, *numbers in list(csv.reader(file))[1:]:
            key = (name, float(lr), int(seed))
            run = runs.setdefault(key, Run(*key, []))
            run.points.append(Point(int(passes), *(float(value) for value in numbers)))
    return list(runs.values())


def _append(path: Path, run: Run) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(["method", "lr", "seed", *Point._fields])
        writer.writerows([run.method, run.lr, run.seed, *point] for point in run.points)


def _best_rates(runs: Iterable[Run]) -> dict[str, float]:
    """Return for each method the learning rate with the smallest loss on the tuning seed."""
    best: dict[str, tuple[float, float]] = {}
    for run in runs:
        loss = run.points[-1].dev_loss
        if run.seed == _TUNING_SEED:
            key = (loss if math.isfinite(loss) else math.inf, run.lr)
            best[run.method] = min(best.get(run.method, key), key)
    return {name: lr for name, (_, lr) in best.items()}


def _run_all(args: argparse.Namespace, path: Path) -> None:
    weights, data = _pretrained(load(args.data), args)
    done = {run[:3] for run in _read(path)}

    def one(name: str, lr: float, seed: int) -> None:
        if (name, lr, seed) in done:
            return
        run = train(name, lr, seed, weights, data, args)
        _append(path, run)
        last = run.points[-1]
        print(
            f"{name}, lr {lr:g}, seed {seed}: dev loss {last.dev_loss:.3f}, accuracy "
            f"{last.dev_accuracy:.1%}, {last.seconds:.0f} s",
            flush=True,
        )

    for name in args.methods:
        for lr in METHODS[name].rates:
            one(name, lr, _TUNING_SEED)
    best = _best_rates(_read(path))
    for seed in args.seeds:
        for name in args.methods:
            one(name, best[name], seed)


# Report


def _report(runs: list[Run], args: argparse.Namespace) -> tuple[str, list[Measurement]]:
    best = _best_rates(runs)
    tuning, rows, measurements, tests = [], [], [], {}
    for name, lr in best.items():
        tried = sorted((run.lr, run) for run in runs if run[0] == name and run.seed == _TUNING_SEED)
        losses = [f"{rate:g}: {run.points[-1].dev_loss:.3f}" for rate, run in tried]
        tuning.append([name, ", ".join(losses)])
        counted = [run.points for run in runs if run[:2] == (name, lr) and run.seed in args.seeds]
        if not counted:
            continue
        early, late = (
            [
                min(points, key=lambda point: abs(point.passes - share * args.passes)).dev_accuracy
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
            ratio = tests[name] / tests.get(_RIVAL, math.nan) if metric != "seconds" else math.nan
            task = f"{args.passes} forward passes"
            title = rows[-1][0]
            measurements.append(
                Measurement("sst2_zeroth_order", task, title, metric, value, _RIVAL, ratio)
            )
    header = ["", f"dev after {args.passes // 6} passes", f"after {args.passes}", "test", "seconds"]
    text = markdown_table(["dev loss of the tuning seed by learning rate", ""], tuning)
    return f"{text}\n\n{markdown_table(header, rows)}", measurements


def _spread(values: Sequence[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return f"{100 * statistics.fmean(values):.1f} ± {100 * deviation:.1f} %"


def _draw(runs: list[Run], args: argparse.Namespace) -> None:
    """Draw accuracy over passes and over time, and bfloat16 beside float32; means of seeds."""
    from matplotlib.figure import Figure

    best = _best_rates(runs)
    figure = Figure(figsize=(12, 4), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for name, lr in best.items():
        counted = [run.points for run in runs if run[:2] == (name, lr) and run.seed in args.seeds]
        if not counted:
            continue
        half = METHODS[name].dtype != torch.float32
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
                axes.plot(x, mean, color=METHODS[name].color, label=f"{name}, lr {lr:g}")
    labels = ("forward passes", "time on the processor [s]", "forward passes")
    for axes, label in zip(panels, labels, strict=True):
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy on dev [%]")
    panels[0].legend(fontsize="x-small", loc="lower right")
    panels[2].legend(fontsize="x-small", loc="lower right")
    figure.suptitle("SST-2, a new prompt for a pretrained model (a step with backward: 3 passes)")
    args.png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.png, dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark.

    Args:
        argv: Arguments of the command line, None for those of the process.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="holds SST-2")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--passes", type=int, default=1800, help="forward passes of each run")
    parser.add_argument("--batch", type=int, default=64, help="sentences per batch")
    parser.add_argument("--points", type=int, default=12, help="points on each curve")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--pretraining-steps", type=int, default=1500)
    parser.add_argument("--pretraining-labels", type=int, default=30_000)
    parser.add_argument("--search-batches", type=int, default=_SEARCH_BATCHES)
    parser.add_argument("--smoke", action="store_true", help="a few steps")
    parser.add_argument("--runs", type=Path, default=Path("sst2"), help="folder of the runs")
    parser.add_argument("--png", type=Path, default=Path("sst2_zeroth_order.png"))
    add_common_arguments(parser)
    args = parser.parse_args(argv)

    torch.set_num_threads(args.threads)
    if args.smoke:
        args.passes, args.points, args.pretraining_steps, args.search_batches = 12, 2, 2, 1
    path = args.runs / "curves.csv"
    try:
        _run_all(args, path)
    except FileNotFoundError as error:
        parser.error(str(error))
    runs = _read(path)
    table, measurements = _report(runs, args)
    print(f"\n### SST-2, {args.passes} forward passes, batch {args.batch}\n\n{table}")
    _draw(runs, args)
    print(f"\nCurves: {args.png}")
    append_csv(args.csv, measurements)


if __name__ == "__main__":
    main()
