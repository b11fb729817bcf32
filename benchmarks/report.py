"""What all benchmarks share: arguments, the environment they ran in, markdown tables, one CSV."""

import argparse
import csv
import datetime
import logging
import math
import platform
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import lightning
import torch

import lightning_curvature

__all__ = [
    "DEFAULT_CSV",
    "Measurement",
    "add_common_arguments",
    "append_csv",
    "describe_environment",
    "markdown_table",
    "number",
    "quiet_trainers",
    "verdict",
]

DEFAULT_CSV = Path(__file__).parent / "results.csv"


@dataclass(frozen=True)
class Measurement:
    """One number.

    Attributes:
        benchmark: Script, and its subcommand if it has any.
        task: What was trained.
        optimizer: Optimizer and the settings that matter.
        metric: What the number is, with its unit.
        value: The number.
        rival: What it is compared with, empty for nothing.
        ratio: value / value of the rival, NaN for no rival.
        goal: Largest value or ratio that is wished for, NaN for none.
    """

    benchmark: str
    task: str
    optimizer: str
    metric: str
    value: float
    rival: str = ""
    ratio: float = math.nan
    goal: float = math.nan


def add_common_arguments(parser: argparse.ArgumentParser, *, threads: int = 1) -> None:
    """Add the arguments that every benchmark has.

    Args:
        parser: Parser to extend.
        threads: Default number of threads.
    """
    parser.add_argument(
        "--threads", type=int, default=threads, help="threads of torch (default: %(default)s)"
    )
    parser.add_argument(
        "--csv",
        type=Path,
        default=DEFAULT_CSV,
        help="file that the numbers are appended to (default: results.csv beside the script)",
    )


def describe_environment(device: str = "cpu") -> dict[str, str]:
    """Return versions and hardware, as they go into the CSV.

    Args:
        device: Kind of device that was measured, "cpu" or "cuda".
    """
    gpu = torch.cuda.get_device_name() if device == "cuda" else ""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "lightning_curvature": lightning_curvature.__version__,
        "cpu": _cpu_model(),
        "gpu": gpu,
        "threads": str(torch.get_num_threads()),
    }


def _cpu_model() -> str:
    """Return the marketing name of the processor where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def append_csv(path: Path, measurements: Iterable[Measurement], *, device: str = "cpu") -> None:
    """Append measurements to a CSV file and say so.

    Args:
        path: The file; it is created, with its header, if it is not there.
        measurements: What to append.
        device: Kind of device that was measured.

    Raises:
        ValueError: If the file has other columns.
    """
    environment = describe_environment(device)
    columns = ["date", *(field.name for field in fields(Measurement)), *environment]
    new = not path.exists() or path.stat().st_size == 0
    if not new:
        with path.open(newline="", encoding="utf-8") as file:
            found = next(csv.reader(file))
        if found != columns:
            raise ValueError(
                f"{path} has the columns {found}, expected {columns}. Move it away or name another "
                "file with --csv."
            )
    date = datetime.datetime.now(tz=datetime.timezone.utc).isoformat(timespec="seconds")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        if new:
            writer.writeheader()
        for measurement in measurements:
            row = {"date": date, **asdict(measurement), **environment}
            writer.writerow({key: _cell(value) for key, value in row.items()})
    print(f"\nAppended to {path}: " + ", ".join(f"{k} {v}" for k, v in environment.items() if v))


def _cell(value: object) -> str:
    """Return a value as it stands in the CSV: NaN as nothing, floats in six digits."""
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return str(value)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a markdown table with aligned columns, numbers to the right.

    Args:
        header: Titles; the first column is taken to hold names.
        rows: Cells.
    """
    table = [list(header), *(list(row) for row in rows)]
    widths = [max(3, *(len(row[i]) for row in table)) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return f"| {' | '.join(cells)} |"

    rule = ["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join([line(table[0]), line(rule), *(line(row) for row in table[1:])])


def number(value: float, digits: int = 3) -> str:
    """Return a number in few digits; a dash stands for none."""
    return "-" if math.isnan(value) else f"{value:.{digits}g}"


def verdict(value: float, goal: float, *, slack: float = 0.0) -> str:
    """Say whether a number meets its goal.

    Args:
        value: The number; NaN never meets a goal.
        goal: Largest number allowed; NaN for no goal.
        slack: Relative excess that is allowed.
    """
    if math.isnan(goal):
        return ""
    return "pass" if value <= goal * (1 + slack) else "FAIL"


def quiet_trainers() -> None:
    """Leave the Trainers' advice out of the tables."""
    for package in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(package).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning, module="lightning")
    warnings.filterwarnings("ignore", category=FutureWarning)
