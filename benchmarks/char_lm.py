"""A small GPT on tiny Shakespeare: SophiaG, tuned AdamW and sign momentum in the same time.

python benchmarks/char_lm.py time
python benchmarks/char_lm.py train AdamW --data DIR --lr 1e-3 2e-3 4e-3
python benchmarks/char_lm.py report --png curves.png

All optimizers share weights and windows of a seed, weight decay on matrices only, clipping of the
gradient's norm at 1, a linear warm-up over 5 % of the steps and a cosine down to 10 % of the
learning rate. The budget is the time of a number of AdamW's steps: `time` measures a step of each
optimizer in turns, and `train` gives each the number of steps that fits. So a busy machine changes
nothing: seconds are steps times the time of a step.

Sign momentum is SophiaG for rho -> 0, without the cost of curvature: what SophiaG gains over it
comes from curvature.

Hyper-parameters are chosen on seed 0 by the smallest final validation loss; seeds from 1 on count.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from char_lm_report import (
    TUNING_SEED,
    Curve,
    Point,
    Setting,
    append_curve,
    comparison,
    draw,
    measurements,
    read_curves,
    read_times,
    tuning,
    write_times,
)
from report import Measurement, add_common_arguments, append_csv, markdown_table
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from typing_extensions import override

from lightning_curvature import CurvatureOptimizer, SophiaG
from lightning_curvature.demos import CharData, CharLM
from lightning_curvature.demos.char_lm import WindowLoader

__all__ = ["OPTIMIZERS", "SignMomentum", "train"]

_WARM_UP = 0.05
_MIN_LR = 0.1
_MAX_GRAD_NORM = 1.0
_CYCLE = 10  # steps: SophiaG's hessian_update_interval


class SignMomentum(Optimizer):
    """The limit of SophiaG for rho -> 0: every coordinate moves by lr.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate.
        beta: Decay of the average of gradients.
        weight_decay: Decoupled weight decay.
    """

    def __init__(self, params: Any, lr: float, beta: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "weight_decay": weight_decay})

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Take one step."""
        for group in self.param_groups:
            params = group["params"]
            averages = [self.state[p].setdefault("exp_avg", torch.zeros_like(p)) for p in params]
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_lerp_(averages, [p.grad for p in params], 1 - group["beta"])
            torch._foreach_add_(params, torch._foreach_sign(averages), alpha=-group["lr"])


def _adamw(params: Any, setting: Setting) -> Optimizer:
    return torch.optim.AdamW(
        params, lr=setting.lr, betas=(0.9, 0.95), weight_decay=setting.weight_decay, foreach=True
    )


def _sign(params: Any, setting: Setting) -> Optimizer:
    return SignMomentum(params, setting.lr, 0.965, setting.weight_decay)


def _sophia(params: Any, setting: Setting) -> Optimizer:
    return SophiaG(
        params,
        lr=setting.lr,
        betas=(0.965, 0.99),
        rho=setting.rho,
        weight_decay=setting.weight_decay,
        hessian_update_interval=_CYCLE,
    )


OPTIMIZERS: dict[str, Callable[[Any, Setting], Optimizer]] = {
    "AdamW": _adamw,
    "sign-momentum": _sign,
    "SophiaG": _sophia,
}


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


class _Run:
    """A model in training.

    Args:
        setting: Optimizer and hyper-parameters.
        seed: Seed of weights and windows.
        vocab_size: Characters of the model.
        context: Characters per window.
    """

    def __init__(self, setting: Setting, seed: int, vocab_size: int, context: int) -> None:
        torch.manual_seed(seed)
        self.model = CharLM(vocab_size, context)
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        gains = [p for p in self.model.parameters() if p.dim() <= 1]
        groups = [{"params": matrices}, {"params": gains, "weight_decay": 0.0}]
        self.optimizer = OPTIMIZERS[setting.optimizer](groups, setting)
        self._criterion: Callable[[Tensor, Tensor], Tensor] = _loss
        if isinstance(self.optimizer, CurvatureOptimizer):
            self._criterion = self.optimizer.attach_model(self.model, _loss)

    def step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Take one step and return the loss before it."""
        tokens, targets = batch
        self.optimizer.zero_grad()
        loss = self._criterion(self.model(tokens), targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), _MAX_GRAD_NORM)
        self.optimizer.step()
        return loss.detach()

    def win_rate(self) -> float:
        """Return the share of coordinates that are not clipped, NaN if there is no such thing."""
        return float(getattr(self.optimizer, "stats", {}).get("win_rate", math.nan))

    @torch.no_grad()
    def evaluate(self, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
        """Return the mean loss per character."""
        total, count = 0.0, 0
        for tokens, targets in batches:
            total += _loss(self.model(tokens), targets).item() * targets.numel()
            count += targets.numel()
        return total / count


def share_of_lr(step: int, steps: int) -> float:
    """Return the factor on the learning rate: linear warm-up, then a cosine.

    Args:
        step: Steps taken so far.
        steps: Steps in all.
    """
    warm_up = max(1, round(_WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))
    return _MIN_LR + (1 - _MIN_LR) * cosine


def train(setting: Setting, data: CharData, *, seed: int, steps: int, points: int) -> Curve:
    """Train from scratch; a run that breaks down ends there.

    Args:
        setting: Optimizer and hyper-parameters.
        data: The text, set up.
        seed: Seed of weights and windows.
        steps: Number of steps.
        points: Points on the curve.
    """
    run = _Run(setting, seed, data.vocab_size, data.context)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        run.optimizer, lambda step: share_of_lr(step, steps)
    )
    validation = data.val_dataloader()
    data.seed = seed
    batches = _forever(data.train_dataloader())
    found: list[Point] = []
    losses: list[Tensor] = []
    marks = {round(steps * i / points) for i in range(1, points + 1)}
    for step in range(1, steps + 1):
        losses.append(run.step(next(batches)))
        scheduler.step()
        if step in marks:
            mean = torch.stack(losses).mean().item()
            losses = []
            found.append(Point(step, mean, run.evaluate(validation), run.win_rate()))
            if not math.isfinite(found[-1].val_loss):
                break
    return Curve(setting, seed, steps, tuple(found))


def _forever(loader: WindowLoader) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from loader


# Commands


def run_time(args: argparse.Namespace) -> None:
    """Measure a step of every optimizer, in turns.

    Args:
        args: Parsed arguments.
    """
    settings = [Setting(name, 1e-3, 0.1, 0.04) for name in args.optimizers]
    loader = WindowLoader(torch.randint(65, (10_000,)), args.context, args.batch, 100, seed=0)
    runs = [_Run(setting, 0, 65, args.context) for setting in settings]
    cycles: list[list[float]] = [[] for _ in runs]
    for _ in range(args.cycles + 1):
        batches = [loader.draw(i) for i in range(_CYCLE)]
        for run, seconds in zip(runs, cycles, strict=True):
            # On one thread the time on the processor is what the wall clock of an idle machine
            # would show.
            start = time.process_time()
            for batch in batches:
                run.step(batch)
            seconds.append((time.process_time() - start) / _CYCLE)
    found = {}
    for setting, seconds in zip(settings, cycles, strict=True):
        # Of the first cycle everything is slow.
        ratios = [own / other for own, other in zip(seconds[1:], cycles[0][1:], strict=True)]
        found[setting.optimizer] = statistics.median(seconds[1:]), statistics.median(ratios)
    write_times(args.runs, found)
    rows = [[name, f"{1000 * s:.1f}", f"{ratio:.3f}"] for name, (s, ratio) in found.items()]
    print(markdown_table(["optimizer", "ms per step", "relative"], rows))
    append_csv(
        args.csv,
        [
            Measurement("char_lm", "time", name, "seconds per step", seconds, args.optimizers[0], r)
            for name, (seconds, r) in found.items()
        ],
    )


def run_train(args: argparse.Namespace) -> None:
    """Train an optimizer with all combinations of the hyper-parameters given.

    Args:
        args: Parsed arguments.
    """
    data = CharData(args.data, batch_size=args.batch, context=args.context)
    try:
        data.setup("fit")
    except FileNotFoundError as error:
        raise SystemExit(str(error).replace("--data.root", "--data")) from error
    times = read_times(args.runs)
    if args.optimizer not in times:
        raise SystemExit(f"{args.optimizer} is not in {args.runs / 'times.csv'}: `time` it first.")
    steps = round(args.budget / times[args.optimizer][1])
    rhos = args.rho if args.optimizer == "SophiaG" else [0.0]
    for lr in args.lr:
        for rho in rhos:
            for weight_decay in args.weight_decay:
                setting = Setting(args.optimizer, lr, weight_decay, rho)
                for seed in args.seeds:
                    curve = train(setting, data, seed=seed, steps=steps, points=args.points)
                    append_curve(args.runs, curve)
                    print(
                        f"{setting.title}, seed {seed}, {steps} steps: {curve.final:.4f}",
                        flush=True,
                    )


def run_report(args: argparse.Namespace) -> None:
    """Print the tables and draw the curves of all runs in the folder.

    Args:
        args: Parsed arguments.
    """
    curves, times = read_curves(args.runs), read_times(args.runs)
    print(f"{tuning(curves)}\n\n{comparison(curves, times)}")
    draw(curves, times, args.png)
    print(f"\nCurves: {args.png}")
    append_csv(args.csv, measurements(curves))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="A small GPT on tiny Shakespeare: SophiaG, tuned AdamW and sign momentum in "
        "the same time."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    timing = commands.add_parser("time", help="measure a step of every optimizer, in turns")
    timing.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    timing.add_argument("--cycles", type=int, default=15, help="default: %(default)s")

    training = commands.add_parser("train", help="train one optimizer with some settings")
    training.add_argument("optimizer", choices=OPTIMIZERS)
    training.add_argument("--data", required=True, metavar="DIR", help="folder of the text")
    training.add_argument("--lr", type=float, nargs="+", required=True)
    training.add_argument("--rho", type=float, nargs="+", default=[0.04])
    training.add_argument("--weight-decay", type=float, nargs="+", default=[0.1])
    training.add_argument("--seeds", type=int, nargs="+", default=[TUNING_SEED])
    training.add_argument(
        "--budget", type=int, default=2000, help="steps that AdamW takes (default: %(default)s)"
    )
    training.add_argument("--points", type=int, default=20, help="default: %(default)s")

    reporting = commands.add_parser("report", help="print the tables, draw the curves")
    reporting.add_argument(
        "--png",
        type=Path,
        default=Path("char_lm.png"),
        help="file for the curves (default: %(default)s)",
    )

    for command in (timing, training):
        command.add_argument("--batch", type=int, default=16, help="default: %(default)s")
        command.add_argument("--context", type=int, default=64, help="default: %(default)s")
    for command in (timing, training, reporting):
        command.add_argument(
            "--runs",
            type=Path,
            default=Path("char_lm"),
            help="folder of what was measured (default: %(default)s)",
        )
        add_common_arguments(command)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        argv: Arguments of the command line, None for those of the process.
    """
    args = _parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    {"time": run_time, "train": run_train, "report": run_report}[args.command](args)


if __name__ == "__main__":
    main()
