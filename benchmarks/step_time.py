"""Time per optimizer step inside a Trainer, relative to torch AdamW.

Every variant trains in a Trainer of its own. The Trainers take turns after every step, so that a
slow spell of the machine hits all of them. Ten steps in a row of a variant make a cycle, so that an
optimizer that works harder on every tenth step is charged for it in full. A cycle is compared with
AdamW's cycle of the same time; the table shows the median of these ratios, and their quartiles.
Every round starts anew from the same weights. An optimizer that works harder on every hundredth
step is compared over ten cycles in a row, so that its one dear step counts as often as it occurs.

AdamW with two bare forward passes per step is what a step that asks everything costs at the very
least: one pass for the curvature, one for the reduction ratio.

The suite "qlr" has AdamQLR and what recording costs; the suite "diagonal" has the optimizers that
scale every coordinate by itself, beside AdamW as torch has it and pytorch_optimizer's SophiaH. Its
AdamW is the one that works on lists of tensors, which is not torch's default on CPUs. The suite
"kfac" has K-FAC and EK-FAC.

    python benchmarks/step_time.py
    python benchmarks/step_time.py --workloads transformer --rounds 6 --clock cpu
    python benchmarks/step_time.py --suite diagonal --workloads mlp5m --cycles 10
"""

import argparse
import os
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any, ClassVar

# AdamW's Trainer must be a stock one.
os.environ["LIGHTNING_CURVATURE_AUTO_ATTACH"] = "0"

import lightning.pytorch as pl
import mfac_step_time
import torch
from networks import USUAL, WORKLOADS, OptimizerFactory, Workload
from report import (
    Measurement,
    add_common_arguments,
    append_csv,
    markdown_table,
    number,
    quiet_trainers,
    verdict,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_curvature import (
    EKFAC,
    KFAC,
    AdamQLR,
    CurvatureOptimizer,
    HiZOO,
    HiZOOL,
    MeZO,
    get_optimizer_info,
)

RIVAL = "AdamW"
CYCLE = 10
_NEVER = 10**9
_CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
_GOAL_THINNED = 1.12
_GOAL_RECORDER = 1.03


class AskingAdamW(CurvatureOptimizer):
    """AdamW that is recorded as if it asked, but never asks: shows what recording costs.

    Args:
        params: Parameters to optimize.
        records: Whether every step is recorded.
    """

    asks: ClassVar[frozenset[str]] = frozenset({"loss"})

    def __init__(self, params: Iterable[nn.Parameter], *, records: bool) -> None:
        super().__init__(params, {})
        self._records = records
        self._adamw = torch.optim.AdamW(self._all_params())

    @override
    def wants_record(self) -> bool:
        """Tell whether to record the coming step."""
        return self._records

    @override
    def _update(self, params: list[Tensor], oracle: Any) -> None:
        self._adamw.step()


@dataclass(frozen=True)
class Variant:
    """An optimizer and what is wished of it.

    Attributes:
        make_optimizer: Called with the parameters.
        strategy: Strategy of its Trainer.
        extra_forwards: Bare forward passes per step.
        graph_interval: See `Classifier`.
        cycles: Cycles that are compared as one.
        goal: Gives the largest ratio wished for on a workload, by its name; None for none.
    """

    make_optimizer: OptimizerFactory
    strategy: str = "single_device_curvature"
    extra_forwards: int = 0
    graph_interval: int | None = None
    cycles: int = 1
    goal: Callable[[str], float | None] = lambda name: None


def _on_transformer(name: str) -> float | None:
    return _GOAL_RECORDER if name.startswith("transformer") else None


VARIANTS = {
    RIVAL: Variant(torch.optim.AdamW, "auto"),
    "AdamW and two bare forwards": Variant(torch.optim.AdamW, "auto", extra_forwards=2),
    "AdamQLR, everything every step": Variant(AdamQLR, goal=lambda name: WORKLOADS[name].goal),
    "AdamQLR, both intervals 10": Variant(
        partial(AdamQLR, curvature_update_interval=CYCLE, damping_update_interval=CYCLE),
        goal=lambda name: _GOAL_THINNED,
    ),
    "AdamQLR, steps that ask nothing": Variant(
        partial(AdamQLR, curvature_update_interval=_NEVER, damping_update_interval=_NEVER)
    ),
    "AdamW, recorder idle": Variant(partial(AskingAdamW, records=False), goal=_on_transformer),
    "AdamW, recorded, never asked": Variant(
        partial(AskingAdamW, records=True), goal=_on_transformer
    ),
}


@dataclass(frozen=True)
class Suite:
    """Variants that are measured together, the rival first.

    Attributes:
        variants: By name.
        workloads: Names of the workloads that are measured by default.
        notes: What is left out, and why.
    """

    variants: Mapping[str, Variant]
    workloads: Sequence[str]
    notes: Sequence[str] = ()


def _ours(name: str, goal: float | None, *, cycles: int = 1, **options: Any) -> dict[str, Variant]:
    cls = get_optimizer_info(name).cls
    words = ", ".join(f"{option} {value}" for option, value in options.items())
    strategy = "single_device_curvature" if cls.asks else "auto"
    return {
        f"{name}, {words}" if words else name: Variant(
            partial(cls, **options), strategy, cycles=cycles, goal=lambda _: goal
        )
    }


def _of_pytorch_optimizer() -> tuple[dict[str, Variant], list[str]]:
    """Return its SophiaH, whose user gives the gradients a graph, or a note that it is missing."""
    try:
        from pytorch_optimizer import SophiaH
    except ImportError:
        return {}, ["pytorch_optimizer is not installed, so its SophiaH is left out."]
    make = partial(SophiaH, update_period=CYCLE)
    found = {
        f"pytorch_optimizer SophiaH, update_period {CYCLE}, {words}": Variant(
            make, "auto", graph_interval=interval
        )
        for words, interval in (
            ("graph of every backward", 1),
            ("graph where it is used", CYCLE),
        )
    }
    return found, [f"pytorch_optimizer {version('pytorch_optimizer')}"]


def suites() -> dict[str, Suite]:
    """Return the suites by name."""
    theirs, notes = _of_pytorch_optimizer()
    adamw = torch.optim.AdamW
    diagonal = {
        f"{RIVAL}, foreach": Variant(partial(adamw, foreach=True), "auto"),
        f"{RIVAL}, one tensor at a time": Variant(partial(adamw, foreach=False), "auto"),
        f"{RIVAL}, fused": Variant(partial(adamw, fused=True), "auto"),
        **_ours("BetaFTRL", 1.02),
        **_ours("FAdam", 1.05),
        **_ours("SophiaG", 1.10, hessian_update_interval=CYCLE),
        **_ours("SophiaH", None, hessian_update_interval=CYCLE),
        **theirs,
        **_ours("AdaFisher", 1.10, cycles=10, factor_update_interval=10 * CYCLE),
        **_ours("AdaHessian", 3.0, hessian_update_interval=1),
    }
    return {
        "qlr": Suite(VARIANTS, USUAL),
        "diagonal": Suite(diagonal, ["mlp5m"], notes),
        "kfac": Suite(_kfac(), ["mlp", "mlp40k"]),
        "zeroth": Suite(_zeroth(), ["transformer20m"]),
    }


def _kfac() -> dict[str, Variant]:
    """Return K-FAC and EK-FAC with everything on every step, and thinned out."""
    fixed = {
        "factor_warmup": 0,
        "adaptive_lr": False,
        "adaptive_momentum": False,
        "damping_algorithm": "fixed",
        "norm_constraint": 1e-3,
        "lr": 0.01,
    }
    always = {"factor_warmup": 0, "inverse_update_interval": 1, "damping_update_interval": 1}
    seldom = {**fixed, "factor_update_interval": CYCLE, "inverse_update_interval": 10 * CYCLE}
    low = {"factor_dtype": "bfloat16", "inverse_dtype": "bfloat16"}

    def variant(goal: float | None, cycles: int = 1, cls: Any = KFAC, **options: Any) -> Variant:
        make = partial(cls, **options)
        return Variant(make, cycles=cycles, goal=lambda _: goal)

    return {
        RIVAL: Variant(torch.optim.AdamW, "auto"),
        "KFAC, adaptive, everything every step": variant(5.0, **always),
        "- the same in bfloat16": variant(5.0, **always, **low),
        "KFAC, adaptive, defaults": variant(None, factor_warmup=0),
        "KFAC, fixed, inverses every 10": variant(3.0, inverse_update_interval=CYCLE, **fixed),
        "- the same in bfloat16 ": variant(3.0, inverse_update_interval=CYCLE, **fixed, **low),
        "KFAC, fixed, factors every 10, inverses every 100": variant(1.3, 10, **seldom),
        "- the same in bfloat16  ": variant(1.3, 10, **seldom, **low),
        "EKFAC, adaptive, defaults": variant(None, cls=EKFAC, factor_warmup=0),
    }


def _zeroth() -> dict[str, Variant]:
    """Return the optimizers that run no backward."""

    def variant(cls: Any, goal: float | None = None, **options: Any) -> Variant:
        return Variant(partial(cls, **options), goal=lambda _: goal)

    return {
        RIVAL: Variant(torch.optim.AdamW, "auto"),
        "SGD": Variant(partial(torch.optim.SGD, lr=1e-3), "auto"),
        "MeZO": variant(MeZO, 0.78),
        "MeZO, random signs": variant(MeZO, 0.78, distribution="rademacher"),
        "HiZOO": variant(HiZOO, 1.15),
        "HiZOOL": variant(HiZOOL),
    }


class Relay:
    """Lets one of several threads run at a time, in turn.

    Args:
        runners: Number of threads.
    """

    def __init__(self, runners: int) -> None:
        self._waiting = list(range(runners))
        self._condition = threading.Condition()

    def wait(self, runner: int) -> None:
        """Wait for the turn of a runner."""
        with self._condition:
            self._condition.wait_for(lambda: self._waiting[0] == runner)

    def hand_over(self, runner: int, *, leaves: bool = False) -> None:
        """End the turn of a runner; ``leaves`` if it will not come back."""
        with self._condition:
            self._waiting.remove(runner)
            if not leaves:
                self._waiting.append(runner)
            self._condition.notify_all()


class StepTimer(pl.Callback):
    """Collects the seconds spent in training batches and lets others run after each of them.

    Args:
        pause: Returns when the next step may begin.
        clock: Returns the time in seconds.

    Attributes:
        seconds: Seconds of every step.
    """

    def __init__(self, pause: Callable[[], None], clock: Callable[[], float]) -> None:
        self.seconds: list[float] = []
        self._pause = pause
        self._clock = clock
        self._start = 0.0

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Start the clock."""
        if trainer.world_size > 1:
            torch.distributed.barrier()
        _synchronize(trainer)
        self._start = self._clock()

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Stop the clock."""
        _synchronize(trainer)
        self.seconds.append(self._clock() - self._start)
        self._pause()


def _synchronize(trainer: pl.Trainer) -> None:
    if trainer.strategy.root_device.type == "cuda":
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Setting:
    """How to measure.

    Attributes:
        rounds: Number of rounds; each starts from fresh weights.
        cycles: Cycles of ten steps per round.
        warmup: Cycles before them that do not count.
        batch_size: Examples per batch, None for the workload's own number.
        device: "cpu" or "cuda".
        clock: "wall" or "cpu".
        seed: Seed of weights and data.
        threads: Threads of torch.
        devices: Number of processes, all of which run this.
    """

    rounds: int
    cycles: int
    warmup: int = 1
    batch_size: int | None = None
    device: str = "cpu"
    clock: str = "wall"
    seed: int = 0
    threads: int = 1
    devices: int = 1


def train(
    workload: Workload, variant: Variant, setting: Setting, relay: Relay, turn: int
) -> list[float]:
    """Train in a Trainer and return the mean seconds per step of every cycle.

    Args:
        workload: What to train.
        variant: What to train it with.
        setting: How to measure.
        relay: Says when to run.
        turn: Number of this runner.
    """
    relay.wait(turn)
    try:
        torch.set_num_threads(setting.threads)
        # Numbers close to zero take the processor far longer: the times would depend on the values.
        torch.set_flush_denormal(True)
        warnings.filterwarnings("ignore", r"Using backward\(\) with create_graph=True")

        def pause() -> None:
            relay.hand_over(turn)
            relay.wait(turn)

        timer = StepTimer(pause, _CLOCKS[setting.clock])
        some = workload.batches(8, batch_size=setting.batch_size, seed=setting.seed)
        steps = (setting.warmup + setting.cycles) * CYCLE
        trainer = pl.Trainer(
            accelerator="gpu" if setting.device == "cuda" else "cpu",
            devices=setting.devices,
            strategy=variant.strategy,
            use_distributed_sampler=False,
            max_epochs=1,
            callbacks=[timer],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        module = workload.module(
            variant.make_optimizer,
            extra_forwards=variant.extra_forwards,
            graph_interval=variant.graph_interval,
            seed=setting.seed,
        )
        repeated = [some[i % len(some)] for i in range(steps)]
        trainer.fit(module, DataLoader(repeated, batch_size=None))
        starts = range(setting.warmup * CYCLE, steps, CYCLE)
        return [statistics.fmean(timer.seconds[start : start + CYCLE]) for start in starts]
    finally:
        relay.hand_over(turn, leaves=True)


def measure(
    workload: Workload, setting: Setting, variants: Mapping[str, Variant] = VARIANTS
) -> dict[str, list[float]]:
    """Return the mean seconds per step of every variant in every cycle of all rounds.

    Args:
        workload: What to train.
        setting: How to measure.
        variants: What to train it with.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(setting.rounds):
        relay = Relay(len(variants))
        with ThreadPoolExecutor(len(variants)) as pool:
            runs = {
                name: pool.submit(train, workload, variant, setting, relay, turn)
                for turn, (name, variant) in enumerate(variants.items())
            }
        for name, run in runs.items():
            seconds[name] += run.result()
    return seconds


def summarize(
    name: str,
    seconds: dict[str, list[float]],
    variants: Mapping[str, Variant] = VARIANTS,
    benchmark: str = "step_time",
) -> tuple[str, list[Measurement]]:
    """Return the table of a workload and its measurements.

    Args:
        name: Name of the workload.
        seconds: Mean seconds per step, by variant and cycle.
        variants: What was measured.
        benchmark: Name of the script.
    """
    rows, measurements = [], []
    rival = next(iter(variants))
    for variant, own in seconds.items():
        cycles = variants[variant].cycles
        pairs = zip(_joined(own, cycles), _joined(seconds[rival], cycles), strict=True)
        ratios = sorted(a / b for a, b in pairs)
        ratio = statistics.median(ratios)
        quarter = len(ratios) // 4
        goal = variants[variant].goal(name)
        limit = float("nan") if goal is None else goal
        rows.append(
            [
                variant,
                number(1e3 * statistics.median(own), 4),
                f"{ratio:.3f}",
                f"{ratios[quarter]:.3f} ... {ratios[-1 - quarter]:.3f}",
                number(limit),
                verdict(ratio, limit),
            ]
        )
        measurements.append(
            Measurement(
                benchmark,
                WORKLOADS[name].description,
                variant,
                "seconds per step",
                statistics.median(own),
                rival,
                ratio,
                limit,
            )
        )
    header = ["optimizer", "ms per step", f"ratio to {rival}", "quartiles", "goal", ""]
    return markdown_table(header, rows), measurements


def _joined(seconds: Sequence[float], cycles: int) -> list[float]:
    """Return the means of so many cycles in a row."""
    starts = range(0, len(seconds), cycles)
    return [statistics.fmean(seconds[start : start + cycles]) for start in starts]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark.

    Args:
        argv: Arguments of the command line, None for those of the process.
    """
    parser = argparse.ArgumentParser(
        description="Time per optimizer step inside a Trainer, relative to torch AdamW."
    )
    parser.add_argument(
        "--suite",
        choices=["qlr", "diagonal", "kfac", "zeroth", "mfac"],
        default="qlr",
        help="default: %(default)s",
    )
    parser.add_argument(
        "--workloads",
        nargs="+",
        choices=list(WORKLOADS),
        help="what to train (default: those of the suite)",
    )
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument(
        "--cycles",
        type=int,
        help="cycles of ten steps per round (default: 8, or 10 where variants need as many)",
    )
    parser.add_argument(
        "--batch-size", type=int, help="examples per batch instead of each workload's own number"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--clock",
        choices=list(_CLOCKS),
        default="wall",
        help="wall time, or time on the processor for a machine shared with others (with one "
        "thread, and not for cuda)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and data")
    mfac_step_time.add_arguments(parser)
    add_common_arguments(parser)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.suite == "mfac":
        mfac_step_time.run(args, _CLOCKS[args.clock])
        return
    quiet_trainers()
    suite = suites()[args.suite]
    most = max(variant.cycles for variant in suite.variants.values())
    cycles = args.cycles or max(8, most)
    if cycles % most:
        parser.error(f"--cycles must be a multiple of {most} for this suite, got {cycles}")

    setting = Setting(
        args.rounds,
        cycles,
        batch_size=args.batch_size,
        device=args.device,
        clock=args.clock,
        seed=args.seed,
        threads=args.threads,
    )
    measurements: list[Measurement] = []
    for name in args.workloads or suite.workloads:
        seconds = measure(WORKLOADS[name], setting, suite.variants)
        table, found = summarize(name, seconds, suite.variants)
        measurements += found
        notes = "".join(f"\n\n{note}" for note in suite.notes)
        print(f"\n### {WORKLOADS[name].description}\n\n{table}{notes}", flush=True)
    append_csv(args.csv, measurements, device=args.device)


if __name__ == "__main__":
    main()
