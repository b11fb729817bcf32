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
import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from report import add_common_arguments, append_csv
from sst2 import FINE_TUNING, PRETRAINING, PromptModel, Sentences, Sst2, evaluate, load, pretrain
from sst2_report import (
    TUNING_SEED,
    Method,
    Point,
    Run,
    append_run,
    best_rates,
    comparison,
    draw,
    read_runs,
)
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from lightning_curvature import HiZOO, MeZO
from lightning_curvature.optim.zeroth_order import ZerothOrderOptimizer
from lightning_curvature.optim.zeroth_storage import HalfPrecision

__all__ = ["METHODS", "Method", "Run", "main", "train"]

_BACKWARD_PASSES = 3
_PRETRAINING_LR = 3e-3
# Batches that tell which weights matter.
_SEARCH_BATCHES = 50


def _adamw(params: list[nn.Parameter], lr: float, seed: int) -> Optimizer:
    return torch.optim.AdamW(params, lr=lr)


_KEPT: tuple[tuple[HalfPrecision, str], ...] = (
    ("master", "tab:purple"),
    ("stochastic", "tab:pink"),
    ("nearest", "0.4"),
)
METHODS = {
    "AdamW": Method(_adamw, _BACKWARD_PASSES, (1e-4, 3e-4, 1e-3), "tab:orange"),
    "MeZO": Method(MeZO, 2, (1e-4, 3e-4, 1e-3), "tab:blue"),
    "HiZOO": Method(HiZOO, 3, (1e-4, 3e-4, 1e-3), "tab:cyan"),
    "MeZO, 1 % of the weights": Method(MeZO, 2, (3e-4, 1e-3, 3e-3), "tab:green", 0.01),
    "MeZO, 0.1 % of the weights": Method(MeZO, 2, (1e-3, 3e-3, 1e-2), "tab:red", 0.001),
    **{
        f"MeZO, bfloat16, {how}": Method(
            partial(MeZO, half_precision=how), 2, (1e-3,), color, dtype=torch.bfloat16
        )
        for how, color in _KEPT
    },
}


def train(
    name: str,
    lr: float,
    seed: int,
    weights: dict[str, Tensor],
    data: Sst2,
    args: argparse.Namespace,
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
    optimizer = method.make(list(masks) or list(model.parameters()), lr=lr, seed=seed)
    if isinstance(optimizer, ZerothOrderOptimizer):
        for p, positions in masks.items():
            optimizer.set_mask(p, positions)
        criterion = optimizer.attach_model(model, functional.cross_entropy)
        return lambda batch: float(
            optimizer.step(lambda: criterion(model(batch.words), batch.labels))
        )

    def by_backward(batch: Sentences) -> float:
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(batch.words), batch.labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    return by_backward


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
        len(data.train.labels), generator=torch.Generator().manual_seed(TUNING_SEED)
    )
    torch.manual_seed(TUNING_SEED)
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
            seed=TUNING_SEED,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path)
        print(f"Pretrained: {evaluate(model, asked.dev)[1]:.1%} in its own words", flush=True)
    asked = data.asked(FINE_TUNING)
    rest = asked.train.part(order[args.pretraining_labels :])
    return torch.load(path), asked._replace(train=rest)


def _run_all(args: argparse.Namespace, path: Path) -> None:
    weights, data = _pretrained(load(args.data), args)
    done = {run[:3] for run in read_runs(path)}

    def one(name: str, lr: float, seed: int) -> None:
        if (name, lr, seed) in done:
            return
        run = train(name, lr, seed, weights, data, args)
        append_run(path, run)
        last = run.points[-1]
        print(
            f"{name}, lr {lr:g}, seed {seed}: dev loss {last.dev_loss:.3f}, accuracy "
            f"{last.dev_accuracy:.1%}, {last.seconds:.0f} s",
            flush=True,
        )

    for name in args.methods:
        for lr in METHODS[name].rates if len(METHODS[name].rates) > 1 else ():
            one(name, lr, TUNING_SEED)
    best = best_rates(read_runs(path), METHODS)
    for seed in args.seeds:
        for name in args.methods:
            one(name, best[name], seed)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark.

    Args:
        argv: Arguments of the command line, None for those of the process.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="holds SST-2")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--passes", type=int, default=1200, help="forward passes of each run")
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
    runs = read_runs(path)
    table, measurements = comparison(runs, METHODS, args.passes, args.seeds)
    print(f"\n### SST-2, {args.passes} forward passes, batch {args.batch}\n\n{table}")
    draw(runs, METHODS, args.seeds, args.png)
    print(f"\nCurves: {args.png}")
    append_csv(args.csv, measurements)


if __name__ == "__main__":
    main()
