"""Time of an MFAC step beside what memory allows: part of ``step_time.py --suite mfac``.

There is no network: gradients are random and only ``optimizer.step()`` counts, which is all that
MFAC adds to a training step. It goes through its window of m gradients twice, and factorizes a core
of m x m numbers. So the floor is

- two passes over a buffer of the window's size, at the rate at which this processor reads memory:
  one matrix-vector product over chunks of the buffer, or its sum, whichever is faster, and
- the Cholesky decomposition of the core in float64, with one solve.

Each round measures the floor, AdamW and MFAC one after another, so that a slow spell of the machine
hits all of them, and compares what was measured in the same round. The window is full.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from report import Measurement, append_csv, markdown_table, number, verdict
from torch import nn

from lightning_curvature import MFAC

__all__ = ["VARIANTS", "Rounds", "add_arguments", "measure", "run", "summarize"]

_GOAL = 1.3
_TENSORS = 16
_CHUNKS = 32
_FLOAT = 4
# Read passes of both kinds that decide which of them is the faster, before anything counts.
_TRIALS = 3

VARIANTS: dict[str, dict[str, Any]] = {
    "sums in float64 (default)": {},
    "sums in float32": {"gram_dtype": "float32"},
    "rows in bfloat16": {"row_dtype": "bfloat16"},
    "rows in bfloat16, sums in float32": {"row_dtype": "bfloat16", "gram_dtype": "float32"},
}


class Rounds(NamedTuple):
    """Seconds of each round, and bytes.

    Attributes:
        step: Of a step of MFAC.
        passes: Of two passes over a buffer of the window's size.
        core: Of the core alone.
        adamw: Of a step of AdamW.
        window_bytes: What MFAC says it needs.
        rate: Bytes per second, in the fastest pass.
    """

    step: list[float]
    passes: list[float]
    core: list[float]
    adamw: list[float]
    window_bytes: int
    rate: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the suite."""
    parser.add_argument(
        "--num-grads",
        type=int,
        nargs="+",
        default=[64, 256, 1024],
        help="suite mfac: sizes of the window (default: %(default)s)",
    )
    parser.add_argument(
        "--num-parameters",
        type=int,
        default=1_000_000,
        help="suite mfac: size of the gradient (default: %(default)s)",
    )


def run(args: argparse.Namespace, clock: Callable[[], float]) -> None:
    """Measure all windows, print a table for each.

    Args:
        args: Parsed arguments.
        clock: Returns the time in seconds.
    """
    # Numbers close to zero take the processor far longer: the times would depend on the values.
    torch.set_flush_denormal(True)
    measurements: list[Measurement] = []
    for num_grads in args.num_grads:
        found: dict[str, Rounds] = {}
        for name, options in VARIANTS.items():
            torch.manual_seed(args.seed)
            count = args.rounds * (args.cycles or 8)
            try:
                found[name] = measure(num_grads, args.num_parameters, options, count, clock)
            except (ValueError, MemoryError) as error:
                print(f"\nm={num_grads}, {name}: left out. {error}", flush=True)
            gc.collect()
        if found:
            title = f"MFAC, {args.num_parameters:,} parameters, window of {num_grads} gradients"
            table, more = summarize(title, found)
            print(f"\n### {title}\n\n{table}", flush=True)
            measurements += more
    append_csv(args.csv, measurements)


def measure(
    num_grads: int,
    num_parameters: int,
    options: dict[str, Any],
    count: int,
    clock: Callable[[], float] = time.process_time,
) -> Rounds:
    """Return the seconds of so many rounds.

    Args:
        num_grads: m.
        num_parameters: d.
        options: Arguments of MFAC.
        count: Number of rounds.
        clock: Returns the time in seconds.

    Raises:
        ValueError: If the window and a buffer as large do not fit into memory.
    """
    # Twice the window: the buffer that is read for comparison is as large.
    MFAC(_parameters(num_parameters), num_grads=2 * num_grads, **options)
    params = _parameters(num_parameters)
    adamw = torch.optim.AdamW(params)
    mfac = MFAC(params, lr=1e-6, num_grads=num_grads, **options)
    _draw_gradients(params)
    mfac.step()
    _fill(mfac)
    row_bytes = 2 if "row_dtype" in options else _FLOAT
    read, size = _reader(num_grads * num_parameters * row_bytes, clock)
    core = torch.randn(num_grads, num_grads, dtype=torch.float64)
    core = core @ core.T + num_grads * torch.eye(num_grads, dtype=torch.float64)
    unit = torch.zeros(num_grads, 1, dtype=torch.float64)

    def two_passes() -> None:
        read()
        read()

    def solve() -> None:
        torch.cholesky_solve(unit, torch.linalg.cholesky_ex(core)[0])

    seconds: list[list[float]] = [[], [], [], []]
    for i in range(count + 1):
        _draw_gradients(params)
        for times, work in zip(seconds, (mfac.step, two_passes, solve, adamw.step), strict=True):
            start = clock()
            work()
            # The first round warms up.
            if i > 0:
                times.append(clock() - start)
    return Rounds(*seconds, mfac.window_bytes, 2 * size / min(seconds[1]))


def _parameters(count: int) -> list[nn.Parameter]:
    return [nn.Parameter(part.clone()) for part in torch.randn(count).chunk(_TENSORS)]


def _draw_gradients(params: list[nn.Parameter]) -> None:
    for p in params:
        p.grad = torch.randn_like(p)


def _fill(mfac: MFAC) -> None:
    """Fill the window with random gradients: memory that was never written to is read faster."""
    window = mfac._window
    assert window is not None
    rows = window.window._rows._data
    for chunk in rows:
        chunk.normal_()
    # Inner products of random rows are small beside their squares.
    window.window.gram.copy_(torch.eye(len(window.window.gram)) * rows[0].numel())


def _reader(num_bytes: int, clock: Callable[[], float]) -> tuple[Callable[[], None], int]:
    """Return what reads a buffer of that size once, the fastest way of two, and its size."""
    chunk = max(num_bytes // (_FLOAT * _CHUNKS), 1)
    width = min(chunk, 8192)
    buffer = torch.ones(_CHUNKS, chunk // width, width)
    vector = torch.ones(width)

    def product() -> None:
        for part in buffer:
            torch.mv(part, vector)

    def total() -> None:
        for part in buffer:
            part.sum()

    def fastest(read: Callable[[], None]) -> float:
        times = []
        for _ in range(_TRIALS):
            start = clock()
            read()
            times.append(clock() - start)
        return min(times)

    return min((product, total), key=fastest), buffer.numel() * _FLOAT


def summarize(task: str, found: dict[str, Rounds]) -> tuple[str, list[Measurement]]:
    """Return the table of one size of the window, and its measurements.

    Args:
        task: What was measured.
        found: Rounds of each variant.
    """
    rows, measurements = [], []
    for name, rounds in found.items():
        floors = [a + b for a, b in zip(rounds.passes, rounds.core, strict=True)]
        ratios = sorted(a / b for a, b in zip(rounds.step, floors, strict=True))
        ratio, quarter = statistics.median(ratios), len(ratios) // 4
        beside = statistics.median(a / b for a, b in zip(rounds.step, rounds.adamw, strict=True))
        step = statistics.median(rounds.step)
        rows.append(
            [
                name,
                number(1e3 * step),
                *(number(1e3 * statistics.median(times)) for times in rounds[1:3]),
                f"{ratio:.2f}",
                f"{ratios[quarter]:.2f} ... {ratios[-1 - quarter]:.2f}",
                verdict(ratio, _GOAL),
                number(1e3 * statistics.median(rounds.adamw)),
                number(beside),
                f"{rounds.window_bytes / 2**20:,.0f}",
                number(rounds.rate / 1e9),
            ]
        )
        floor = "two passes over the window, and the core"
        for metric, value, rival, quotient, goal in (
            ("seconds per step", step, floor, ratio, _GOAL),
            ("seconds per step", step, "AdamW", beside, float("nan")),
            ("bytes of the window", float(rounds.window_bytes), "", float("nan"), float("nan")),
        ):
            measurements.append(
                Measurement(
                    "step_time", task, f"MFAC, {name}", metric, value, rival, quotient, goal
                )
            )
    header = ["MFAC", "ms per step", "two passes", "core", "ratio to both", "quartiles"]
    header += [f"goal {_GOAL}", "AdamW, ms", "ratio to it", "MiB", "read, GB/s"]
    return markdown_table(header, rows), measurements
