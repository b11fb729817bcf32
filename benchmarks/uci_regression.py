"""UCI Energy and Protein as in the AdamQLR paper: small networks, many epochs, squared error.

Besides AdamQLR and Adam there are K-FAC with the setting of the paper's code and with our defaults.

Protocol of arXiv:2310.14963 and its official code: the rows in the order of ``perm_adamqlr``; the
first 90 % are training and validation rows (of which 15 % validation, the last ones), the rest test
rows; inputs and targets standardized with the statistics of training plus validation rows; weights
from a normal distribution of deviation 1/sqrt(fan in), cut at two deviations, and zero biases; loss
0.5 * mean squared error.

One difference: where the batch does not divide the training rows the official code fills up with
rows that do not count. Here an epoch is cut into as many batches of (almost) equal size.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from report import Measurement, append_csv, markdown_table, number, verdict
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from lightning_curvature import EKFAC, KFAC, AdamQLR, CurvatureOptimizer

__all__ = ["TASKS", "Problem", "Task", "load", "make_network", "run", "train"]

_TEST_SHARE = 0.1
_VALIDATION_SHARE = 0.15
_PAPER_RULE = "AdamQLR untuned, the paper's rule"
_KFAC = "K-FAC, every step"
_DTYPES = {"float32": torch.float32, "float64": torch.float64}

# The "Untuned" preset. Without a cap it is the paper's rule.
_untuned = partial(
    AdamQLR,
    damping=1e-3,
    damping_increase_factor=2.0,
    damping_decrease_factor=0.5,
    min_damping=1e-8,
)
# What the paper's code sets: everything on every step, no warm-up, and none of our limits.
_kfac = partial(
    KFAC,
    damping=1.0,
    damping_increase_factor=1 / 0.9,
    damping_decrease_factor=0.9,
    min_damping=1e-8,
    max_damping=1e8,
    max_momentum=None,
    max_relative_update=None,
    inverse_update_interval=1,
    damping_update_interval=1,
    factor_warmup=0,
)
OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], Optimizer]] = {
    _PAPER_RULE: partial(_untuned, max_lr=None),
    "AdamQLR untuned, max_lr=0.1 (default)": partial(_untuned, max_lr=0.1),
    "torch Adam 1e-3": partial(torch.optim.Adam, lr=1e-3),
    "torch Adam 1e-2": partial(torch.optim.Adam, lr=1e-2),
    _KFAC: _kfac,
    "K-FAC (defaults)": KFAC,
    "EK-FAC (defaults)": EKFAC,
}

Key = tuple[str, int]  # ("train" or "test", epoch)


class Goals(NamedTuple):
    """Losses to reach, and the relative excess allowed for seeds."""

    losses: dict[Key, float]
    slack: float


@dataclass(frozen=True)
class Task:
    """A data set and what is known about it.

    Attributes:
        file: Name of its file below ``uci/``.
        hidden: Width of the hidden layer.
        batch: Rows per batch, None for all.
        epochs: Passes over the data.
        marks: Epochs at whose end losses are reported, besides the last.
        seeds: Number of seeds.
        official: Losses of the official code, by optimizer: medians over seeds, float32.
        goals: Losses to reach, by optimizer.
    """

    file: str
    hidden: int
    batch: int | None
    epochs: int
    marks: tuple[int, ...]
    seeds: int
    official: dict[str, dict[Key, float]]
    goals: dict[str, Goals]


TASKS = {
    "uci_energy": Task(
        file="energy",
        hidden=50,
        batch=None,
        epochs=4000,
        marks=(100, 500, 1000, 2000, 3000),
        seeds=5,
        official={
            _PAPER_RULE: {
                ("train", 100): 7.7e-3,
                ("train", 500): 6.4e-4,
                ("train", 4000): 3.7e-4,
                ("test", 500): 9.5e-4,
                ("test", 4000): 8.5e-4,
            },
            "torch Adam 1e-3": {
                ("train", 100): 5.1e-2,
                ("train", 500): 2.8e-2,
                ("train", 4000): 6.1e-4,
                ("test", 500): 3.2e-2,
                ("test", 4000): 1.2e-3,
            },
            "torch Adam 1e-2": {
                ("train", 100): 2.7e-2,
                ("train", 500): 1.2e-3,
                ("train", 4000): 3.1e-4,
                ("test", 500): 2.2e-3,
                ("test", 4000): 8.8e-4,
            },
            # Not a number from epoch 650 to 1120 on.
            _KFAC: {("train", 100): 4.3e-4, ("train", 500): 2.9e-4, ("test", 500): 1.0e-3},
        },
        goals={
            _PAPER_RULE: Goals(
                {("train", 500): 6.4e-4, ("train", 4000): 3.7e-4, ("test", 4000): 8.5e-4}, 0.1
            ),
            _KFAC: Goals({("train", 500): 2.9e-4, ("train", 4000): 2.9e-4}, 0.0),
        },
    ),
    "uci_protein": Task(
        file="protein",
        hidden=100,
        batch=1000,
        epochs=200,
        marks=(10,),
        seeds=3,
        official={
            _PAPER_RULE: {
                ("train", 10): 0.278,
                ("train", 200): 0.227,
                ("test", 10): 0.287,
                ("test", 200): 0.243,
            },
            "torch Adam 1e-3": {
                ("train", 10): 0.321,
                ("train", 200): 0.251,
                ("test", 10): 0.327,
                ("test", 200): 0.265,
            },
            "torch Adam 1e-2": {
                ("train", 10): 0.284,
                ("train", 200): 0.232,
                ("test", 10): 0.291,
                ("test", 200): 0.247,
            },
        },
        goals={_PAPER_RULE: Goals({("train", 200): 0.227, ("test", 200): 0.243}, 0.02)},
    ),
}
# The presets' own batch; Adam was not run with it.
_PROTEIN_3200: dict[str, dict[Key, float]] = {
    _PAPER_RULE: {
        ("train", 10): 0.297,
        ("train", 200): 0.243,
        ("test", 10): 0.304,
        ("test", 200): 0.255,
    },
    _KFAC: {
        ("train", 10): 0.253,
        ("train", 200): 0.200,
        ("test", 10): 0.264,
        ("test", 200): 0.228,
    },
}
_PROTEIN_3200_GOALS = {_KFAC: Goals({("train", 200): 0.200, ("test", 200): 0.228}, 0.02)}


class Problem(NamedTuple):
    """Standardized inputs ``[rows, features]`` and targets ``[rows, 1]``."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load(folder: Path, file: str, dtype: torch.dtype = torch.float32) -> Problem:
    """Read and split a data set.

    Args:
        folder: Folder that holds ``uci/<file>.npz``.
        file: Name of the data set.
        dtype: Precision of the tensors.

    Raises:
        FileNotFoundError: If the file is not there.
        KeyError: If it lacks the paper's permutation.
    """
    path = folder / "uci" / f"{file}.npz"
    if not path.is_file():
        raise FileNotFoundError(
            f"No file {path}: --data must name the folder that holds uci/{file}.npz, with the "
            "arrays x, y and perm_adamqlr."
        )
    with np.load(path) as arrays:
        missing = {"x", "y", "perm_adamqlr"} - set(arrays.files)
        if missing:
            raise KeyError(f"{path} lacks {sorted(missing)}; it holds {sorted(arrays.files)}.")
        order = arrays["perm_adamqlr"]
        x, y = arrays["x"][order], arrays["y"][order].reshape(-1, 1)
    known = len(x) - math.floor(_TEST_SHARE * len(x))
    rows = known - math.floor(known * _VALIDATION_SHARE + 0.5)
    x, y = (_standardized(values, known) for values in (x, y))
    tensors = [torch.tensor(values, dtype=dtype) for values in (x, y)]
    return Problem((tensors[0][:rows], tensors[1][:rows]), (tensors[0][known:], tensors[1][known:]))


def _standardized(values: np.ndarray, rows: int) -> np.ndarray:
    """Standardize with the statistics of the first rows; a zero deviation counts as one."""
    deviation = values[:rows].std(axis=0)
    return (values - values[:rows].mean(axis=0)) / np.where(deviation == 0, 1, deviation)


def make_network(features: int, hidden: int, *, seed: int, dtype: torch.dtype) -> nn.Sequential:
    """Return a network with one hidden layer.

    Args:
        features: Number of inputs.
        hidden: Width of the hidden layer.
        seed: Seed of the weights.
        dtype: Precision.
    """
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, 1))
    for layer in network:
        if isinstance(layer, nn.Linear):
            deviation = 1 / math.sqrt(layer.in_features)
            nn.init.trunc_normal_(layer.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
            nn.init.zeros_(layer.bias)
    return network.to(dtype)


def half_mse(output: Tensor, target: Tensor) -> Tensor:
    """Return the mean over rows of half the squared error."""
    return 0.5 * functional.mse_loss(output, target)


def train(
    problem: Problem,
    network: nn.Module,
    optimizer: Optimizer,
    *,
    batch: int | None,
    epochs: int,
    marks: Sequence[int],
    seed: int,
    directional: Literal["auto", "fd", "jvp"] = "auto",
) -> dict[Key, float]:
    """Train and return the losses on all training and test rows at the end of some epochs.

    A run that breaks down ends there; what is missing is infinite.

    Args:
        problem: The data.
        network: The network.
        optimizer: Its optimizer.
        batch: Rows per batch, None for all.
        epochs: Passes over the data.
        marks: Epochs to report.
        seed: Seed of the order of the rows.
        directional: Method of the curvature.
    """
    criterion: Callable[[Tensor, Tensor], Tensor] = half_mse
    if isinstance(optimizer, CurvatureOptimizer):
        criterion = optimizer.attach_model(network, half_mse, directional=directional)
    x, y = problem.train
    count = 1 if batch is None else math.ceil(len(x) / batch)
    generator = torch.Generator().manual_seed(seed)
    losses = {(part, mark): math.inf for mark in marks for part in ("train", "test")}
    for epoch in range(1, epochs + 1):
        order = torch.randperm(len(x), generator=generator)
        parts = [slice(None)] if count == 1 else order.tensor_split(count)
        try:
            for rows in parts:
                optimizer.zero_grad()
                criterion(network(x[rows]), y[rows]).backward()
                optimizer.step()
        except RuntimeError as error:
            print(f"  stopped in epoch {epoch}: {error}", flush=True)
            break
        if epoch in marks:
            with torch.no_grad():
                for part, (inputs, targets) in problem._asdict().items():
                    losses[part, epoch] = half_mse(network(inputs), targets).item()
    return losses


def add_arguments(parser: argparse.ArgumentParser, task: Task) -> None:
    """Add the arguments of a task."""
    parser.add_argument("--seeds", type=int, default=task.seeds, help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=task.epochs, help="default: %(default)s")
    if task.batch is not None:
        parser.add_argument(
            "--batch", type=int, default=task.batch, help="rows per batch (default: %(default)s)"
        )
    parser.add_argument("--dtype", choices=list(_DTYPES), default="float32")
    parser.add_argument(
        "--directional",
        choices=["auto", "fd", "jvp"],
        default="auto",
        help="how AdamQLR measures curvature (default: %(default)s)",
    )
    parser.add_argument(
        "--optimizers",
        nargs="+",
        choices=list(OPTIMIZERS),
        default=list(OPTIMIZERS),
        metavar="NAME",
        help="some of: " + "; ".join(OPTIMIZERS),
    )


def run(name: str, args: argparse.Namespace) -> None:
    """Train every optimizer from every seed and print the medians beside the official numbers.

    Args:
        name: Name of the task.
        args: Parsed arguments.
    """
    task = _adjusted(TASKS[name], args)
    dtype = _DTYPES[args.dtype]
    problem = load(args.data, task.file, dtype)
    marks = sorted({mark for mark in task.marks if mark < task.epochs} | {task.epochs})
    keys = [(part, mark) for mark in marks for part in ("train", "test")]
    medians: dict[str, dict[Key, float]] = {}
    minutes: dict[str, float] = {}
    for title in args.optimizers:
        start = time.perf_counter()
        runs = []
        for seed in range(args.seeds):
            network = make_network(problem.train[0].shape[1], task.hidden, seed=seed, dtype=dtype)
            losses = train(
                problem,
                network,
                OPTIMIZERS[title](network.parameters()),
                batch=task.batch,
                epochs=task.epochs,
                marks=marks,
                seed=seed,
                directional=args.directional,
            )
            print(f"{title}, seed {seed}: " + _one_line(losses), flush=True)
            runs.append(losses)
        medians[title] = {key: statistics.median(losses[key] for losses in runs) for key in keys}
        minutes[title] = (time.perf_counter() - start) / 60 / args.seeds
    print(f"\n{_title(name, task, problem, args)}\n\n{_table(task, medians, minutes, keys)}\n")
    print(_goals(task, medians))
    append_csv(args.csv, _measurements(name, task, medians, args))


def _adjusted(task: Task, args: argparse.Namespace) -> Task:
    """Return the task with the arguments of the command line."""
    batch = getattr(args, "batch", None)
    if batch != task.batch:
        # Official numbers and goals belong to the task's own batch.
        known = batch == 3200
        official, goals = (_PROTEIN_3200, _PROTEIN_3200_GOALS) if known else ({}, {})
        task = replace(task, batch=batch, official=official, goals=goals)
    return replace(task, epochs=args.epochs)


def _one_line(losses: dict[Key, float]) -> str:
    return ", ".join(f"{part}@{mark} {number(loss)}" for (part, mark), loss in losses.items())


def _title(name: str, task: Task, problem: Problem, args: argparse.Namespace) -> str:
    features = problem.train[0].shape[1]
    rows = "/".join(str(len(part[0])) for part in problem)
    batch = "full batch" if task.batch is None else f"batch {task.batch}"
    return (
        f"### {name}: {rows} training/test rows, MLP {features}-{task.hidden}-1, {batch}, "
        f"{args.dtype}, medians over {args.seeds} seeds"
    )


def _table(
    task: Task, medians: dict[str, dict[Key, float]], minutes: dict[str, float], keys: list[Key]
) -> str:
    """Return the table: one row for each optimizer, and one for its official numbers."""
    rows = []
    for title, losses in medians.items():
        rows.append([title, *(number(losses[key]) for key in keys), f"{minutes[title]:.2f}"])
        official = task.official.get(title)
        if official:
            cells = [number(official.get(key, math.nan)) for key in keys]
            rows.append(["- official code", *cells, "-"])
    return markdown_table(
        ["loss", *(f"{part} @{mark}" for part, mark in keys), "minutes per run"], rows
    )


def _goals(task: Task, medians: dict[str, dict[Key, float]]) -> str:
    """Say for every goal whether its optimizer reached it."""
    rows = [
        [
            f"{title}: {key[0]} @{key[1]}",
            number(medians[title][key]),
            number(goal),
            f"{goals.slack:.0%}",
            verdict(medians[title][key], goal, slack=goals.slack),
        ]
        for title, goals in task.goals.items()
        for key, goal in goals.losses.items()
        if key in medians.get(title, {})
    ]
    return markdown_table(["goal of", "loss", "goal", "slack", ""], rows) if rows else ""


def _measurements(
    name: str, task: Task, medians: dict[str, dict[Key, float]], args: argparse.Namespace
) -> list[Measurement]:
    setting = f"{name}, batch {task.batch or 'full'}, {args.dtype}, {args.seeds} seeds"
    found = []
    for title, losses in medians.items():
        goals = task.goals[title].losses if title in task.goals else {}
        for (part, mark), loss in losses.items():
            official = task.official.get(title, {}).get((part, mark), math.nan)
            found.append(
                Measurement(
                    "paper_tasks",
                    setting,
                    title,
                    f"{part} loss after {mark} epochs",
                    loss,
                    "" if math.isnan(official) else "official code",
                    loss / official,
                    goals.get((part, mark), math.nan),
                )
            )
    return found
