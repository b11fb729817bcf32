"""What the monitoring callbacks cost, in percent of a step of a 5M-parameter MLP, batch 256.

Every run trains in a Trainer of its own, with the same weights and data. The Trainers take turns
after every step, so that a slow spell of the machine hits all of them, and steps are compared with
the step of the same number of the run without a callback. Steps that log and steps that do not are
summarized apart, by their medians; "all steps" weighs them as they occur. The time spent in the
hooks of the callback is measured directly, too: it is not hidden by the noise of the machine.

    python benchmarks/monitor.py
    python benchmarks/monitor.py --log-every-n-steps 50 --steps 200
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["LIGHTNING_CURVATURE_AUTO_ATTACH"] = "0"

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from networks import Classifier
from report import (
    Measurement,
    add_common_arguments,
    append_csv,
    markdown_table,
    number,
    quiet_trainers,
    verdict,
)
from step_time import Relay
from torch import nn
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_curvature import CurvatureMonitor, LayerStatistics, SophiaG

RIVAL = "no callback"
TASK = "MLP 784-1900-1900-10 (5.1M parameters), batch 256, SophiaG every 10"
_BATCHES = 8
_WARMUP = 10
_GOAL = 1.0  # percent

Make = Callable[[int], pl.Callback]
VARIANTS: dict[str, tuple[Make | None, float]] = {
    RIVAL: (None, float("nan")),
    "CurvatureMonitor": (lambda every: CurvatureMonitor(every, plot=False), _GOAL),
    "CurvatureMonitor, per_layer": (
        lambda every: CurvatureMonitor(every, plot=False, per_layer=True),
        float("nan"),
    ),
    "LayerStatistics": (lambda every: LayerStatistics(every, plot=False), float("nan")),
}


@dataclass(frozen=True)
class Setting:
    """How to measure.

    Attributes:
        rounds: Number of rounds; each starts from fresh weights.
        steps: Steps per round that count.
        log_every_n_steps: Steps between two rows of the log.
        width: Width of the two hidden layers.
        batch_size: Examples per batch.
        threads: Threads of torch.
    """

    rounds: int
    steps: int
    log_every_n_steps: int
    width: int
    batch_size: int
    threads: int


class Stopwatch(pl.Callback):
    """Takes the time of a step; one stands before all other callbacks, its end behind them.

    Attributes:
        seconds: Seconds of every step.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    @override
    def on_train_batch_start(self, *args: Any) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def stop(self) -> None:
        """Stop the clock."""
        self.seconds.append(time.perf_counter() - self._start)


class End(pl.Callback):
    """Stops a watch behind all other callbacks, and lets others run.

    Args:
        watch: The watch.
        pause: Returns when the next step may begin.
    """

    def __init__(self, watch: Stopwatch, pause: Callable[[], None]) -> None:
        self._watch = watch
        self._pause = pause

    @override
    def on_train_batch_end(self, *args: Any) -> None:
        """Stop the clock."""
        self._watch.stop()
        self._pause()


def time_hooks(callback: pl.Callback, spent: list[float]) -> None:
    """Add the seconds that a callback spends in every hook of a batch to the last entry.

    Args:
        callback: The callback.
        spent: Seconds by step; a new entry starts with every batch.
    """
    for name in ("on_train_batch_start", "on_before_backward", "on_train_batch_end"):
        hook = getattr(callback, name)

        def timed(*args: Any, _hook: Any = hook, _starts: bool = name.endswith("start")) -> None:
            if _starts:
                spent.append(0.0)
            start = time.perf_counter()
            _hook(*args)
            spent[-1] += time.perf_counter() - start

        vars(callback)[name] = timed


def train(
    name: str, setting: Setting, relay: Relay, turn: int, folder: str
) -> tuple[list[float], list[float]]:
    """Train in a Trainer; return the seconds of every step, and those spent in the callback.

    Args:
        name: Name of the variant.
        setting: How to measure.
        relay: Says when to run.
        turn: Number of this runner.
        folder: Where the logger writes.
    """
    relay.wait(turn)
    try:
        torch.set_num_threads(setting.threads)
        torch.set_flush_denormal(True)

        def pause() -> None:
            relay.hand_over(turn)
            relay.wait(turn)

        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Linear(784, setting.width),
            nn.ReLU(),
            nn.Linear(setting.width, setting.width),
            nn.ReLU(),
            nn.Linear(setting.width, 10),
        )
        some = [
            (torch.randn(setting.batch_size, 784), torch.randint(10, (setting.batch_size,)))
            for _ in range(_BATCHES)
        ]
        watch, spent = Stopwatch(), list[float]()
        callbacks: list[pl.Callback] = [watch]
        make, _ = VARIANTS[name]
        if make is not None:
            callbacks.append(make(setting.log_every_n_steps))
            time_hooks(callbacks[-1], spent)
        steps = _WARMUP + setting.steps
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            strategy="single_device_curvature",
            max_epochs=1,
            callbacks=[*callbacks, End(watch, pause)],
            logger=CSVLogger(folder, name=f"{turn}"),
            log_every_n_steps=setting.log_every_n_steps,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        module = Classifier(network, lambda params: SophiaG(params, lr=1e-4))
        repeated = [some[i % len(some)] for i in range(steps)]
        trainer.fit(module, DataLoader(repeated, batch_size=None))
        return watch.seconds[_WARMUP:], spent[_WARMUP:] or [0.0] * setting.steps
    finally:
        relay.hand_over(turn, leaves=True)


def measure(setting: Setting) -> dict[str, tuple[list[float], list[float]]]:
    """Return seconds per step, and seconds in the callback, of every variant in all rounds.

    Args:
        setting: How to measure.
    """
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in VARIANTS}
    for _ in range(setting.rounds):
        relay = Relay(len(VARIANTS))
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(VARIANTS)) as pool:
            runs = {
                name: pool.submit(train, name, setting, relay, turn, folder)
                for turn, name in enumerate(VARIANTS)
            }
            for name, run in runs.items():
                for kept, new in zip(found[name], run.result(), strict=True):
                    kept.extend(new)
    return found


def summarize(
    found: dict[str, tuple[list[float], list[float]]], setting: Setting
) -> tuple[str, list[Measurement]]:
    """Return the table and the measurements.

    Args:
        found: What `measure` returned.
        setting: How it was measured.
    """
    plain = found[RIVAL][0]
    every = setting.log_every_n_steps
    numbers = [_WARMUP + 1 + i % setting.steps for i in range(len(plain))]
    share = sum(number % every == 0 for number in numbers) / len(numbers)
    step = statistics.median(plain)
    rows, measurements = [], []
    for name, (seconds, spent) in found.items():

        def percent(extra: Sequence[float], logged: bool) -> float:
            chosen = [x for x, n in zip(extra, numbers, strict=True) if (n % every == 0) == logged]
            return 100 * statistics.median(chosen) / step if chosen else 0.0

        extra = [a - b for a, b in zip(seconds, plain, strict=True)]
        parts = [percent(extra, False), percent(extra, True)]
        whole = (1 - share) * parts[0] + share * parts[1]
        hooks = (1 - share) * percent(spent, False) + share * percent(spent, True)
        goal = VARIANTS[name][1]
        rows.append(
            [
                name,
                number(1e3 * statistics.median(seconds), 4),
                *(f"{value:+.2f} %" for value in (*parts, whole)),
                f"{hooks:.3f} %",
                "-" if goal != goal else f"{goal:g} %",  # noqa: PLR0124 - NaN
                verdict(hooks, goal),
            ]
        )
        for metric, value in (("percent of a step", whole), ("percent in its hooks", hooks)):
            measurements.append(
                Measurement(
                    f"monitor, logged every {every}", TASK, name, metric, value, RIVAL, goal=goal
                )
            )
    header = ["callback", "ms per step", "steps that do not log", "steps that log", "all steps"]
    header += ["in its hooks", "goal", ""]
    return markdown_table(header, rows), measurements


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark.

    Args:
        argv: Arguments of the command line, None for those of the process.
    """
    parser = argparse.ArgumentParser(
        description="What the monitoring callbacks cost, in percent of a step."
    )
    parser.add_argument("--rounds", type=int, default=2, help="default: %(default)s")
    parser.add_argument(
        "--steps", type=int, default=100, help="steps per round (default: %(default)s)"
    )
    parser.add_argument(
        "--log-every-n-steps",
        type=int,
        default=10,
        help="steps between two rows; a Trainer's own number is 50 (default: %(default)s)",
    )
    parser.add_argument("--width", type=int, default=1900, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=256, help="default: %(default)s")
    add_common_arguments(parser)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    quiet_trainers()
    setting = Setting(
        args.rounds, args.steps, args.log_every_n_steps, args.width, args.batch_size, args.threads
    )
    table, measurements = summarize(measure(setting), setting)
    print(f"\n### {TASK}, logged every {setting.log_every_n_steps} steps\n\n{table}", flush=True)
    append_csv(Path(args.csv), measurements)


if __name__ == "__main__":
    main()
