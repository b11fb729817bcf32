"""Fashion-MNIST in the same time: untuned AdamQLR with its cap against tuned AdamW.

Task of arXiv:2310.14963: network 784-50-10 with ReLU, images flattened and standardized per pixel
with the statistics of all training images, the last sixth of which (10,000 of 60,000) validate.
Weights as torch draws them, the same for all.

AdamQLR runs with its defaults, which are the paper's "Untuned" preset with a cap on the learning
rate, and the preset's batch of 3200. AdamW runs over a grid of learning rates and batch sizes; the
run with the smallest validation loss at any time counts. All runs take turns, so that a slow spell
of the machine hits all of them; only training counts as time.
"""

import argparse
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from report import Measurement, append_csv, markdown_table, number
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from lightning_curvature import AdamQLR, CurvatureOptimizer

__all__ = ["Contestant", "Data", "add_arguments", "draw", "load", "run"]

_HIDDEN = 50
_CLASSES = 10
_VALIDATION_SHARE = 1 / 6


class Data(NamedTuple):
    """Images ``[N, 784]`` and labels ``[N]`` of each part."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


class Point(NamedTuple):
    """What a contestant had reached after some seconds of training."""

    seconds: float
    steps: int
    loss: float
    accuracy: float
    test_accuracy: float


@dataclass
class Contestant:
    """One run: a network, its optimizer, and what it reached so far.

    Attributes:
        name: Optimizer and learning rate.
        batch: Images per batch.
        network: The network.
        optimizer: Its optimizer.
        curve: Points in the order of time.
        seconds: Time spent in training steps.
        steps: Number of training steps.
    """

    name: str
    batch: int
    network: nn.Module
    optimizer: Optimizer
    curve: list[Point] = field(default_factory=list)
    seconds: float = 0.0
    steps: int = 0

    def __post_init__(self) -> None:
        self._criterion: Callable[[Tensor, Tensor], Tensor] = functional.cross_entropy
        if isinstance(self.optimizer, CurvatureOptimizer):
            self._criterion = self.optimizer.attach_model(self.network, functional.cross_entropy)
        self._batches: Iterator[tuple[Tensor, Tensor]] | None = None

    @property
    def title(self) -> str:
        """Name and batch size."""
        return f"{self.name}, batch {self.batch}"

    @property
    def best(self) -> Point:
        """The point of the smallest validation loss."""
        return min(self.curve, key=lambda point: point.loss)

    def train_until(self, seconds: float, data: Data) -> None:
        """Train until the given time was spent in training steps, loading of batches included."""
        if self._batches is None:
            self._batches = _epochs(data.train, self.batch)
        while self.seconds < seconds:
            start = time.perf_counter()
            images, labels = next(self._batches)
            self.optimizer.zero_grad()
            self._criterion(self.network(images), labels).backward()
            self.optimizer.step()
            self.seconds += time.perf_counter() - start
            self.steps += 1

    @torch.no_grad()
    def evaluate(self, data: Data) -> None:
        """Add a point to the curve."""
        images, labels = data.validation
        logits = self.network(images)
        loss = functional.cross_entropy(logits, labels).item()
        self.curve.append(
            Point(
                self.seconds,
                self.steps,
                loss if math.isfinite(loss) else math.inf,
                _accuracy(logits, labels),
                _accuracy(self.network(data.test[0]), data.test[1]),
            )
        )


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(-1) == labels).float().mean().item()


def _epochs(part: tuple[Tensor, Tensor], batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield shuffled batches for ever; a last one may be smaller."""
    images, labels = part
    while True:
        for rows in torch.randperm(len(images)).split(batch):
            yield images[rows], labels[rows]


def load(folder: Path) -> Data:
    """Read and standardize the images.

    Args:
        folder: Folder that holds ``FashionMNIST/raw``.

    Raises:
        FileNotFoundError: If the files are not there.
    """
    from torchvision.datasets import FashionMNIST

    try:
        train, test = (FashionMNIST(folder, train=part, download=False) for part in (True, False))
    except RuntimeError as error:
        raise FileNotFoundError(
            f"No Fashion-MNIST in {folder}: --data must name the folder that holds "
            "FashionMNIST/raw with the four idx files."
        ) from error
    images, test_images = (part.data.flatten(1).float() / 255 for part in (train, test))
    deviation, mean = torch.std_mean(images, dim=0, correction=0)
    deviation[deviation == 0] = 1
    images, test_images = (images - mean) / deviation, (test_images - mean) / deviation
    rows = len(images) - round(_VALIDATION_SHARE * len(images))
    return Data(
        (images[:rows], train.targets[:rows]),
        (images[rows:], train.targets[rows:]),
        (test_images, test.targets),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the task."""
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="training time per run (default: %(default)s)"
    )
    parser.add_argument(
        "--points", type=int, default=60, help="points on each curve (default: %(default)s)"
    )
    parser.add_argument(
        "--batch",
        type=int,
        nargs="+",
        default=[3200],
        help="AdamQLR's batch; the first is drawn in color (default: %(default)s)",
    )
    parser.add_argument(
        "--adamw-lr",
        type=float,
        nargs="+",
        default=[1e-4, 3e-4, 1e-3, 3e-3, 1e-2],
        help="AdamW's learning rates (default: %(default)s)",
    )
    parser.add_argument(
        "--adamw-batch",
        type=int,
        nargs="+",
        default=[50, 512, 3200],
        help="AdamW's batches (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and order")
    parser.add_argument(
        "--png",
        type=Path,
        default=Path("fashion_mnist.png"),
        help="file for the curves (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    """Train all contestants in turns, print the table, draw the curves.

    Args:
        args: Parsed arguments.
    """
    data = load(args.data)
    ours = [_contestant("AdamQLR untuned", batch, AdamQLR, args.seed) for batch in args.batch]
    contestants = list(ours)
    for batch, lr in itertools.product(args.adamw_batch, args.adamw_lr):

        def adamw(params: Iterator[nn.Parameter], lr: float = lr) -> Optimizer:
            return torch.optim.AdamW(params, lr=lr)

        contestants.append(_contestant(f"AdamW {lr:g}", batch, adamw, args.seed))
    torch.manual_seed(args.seed)
    for contestant in contestants:
        contestant.evaluate(data)
    for i in range(1, args.points + 1):
        for contestant in contestants:
            contestant.train_until(args.seconds * i / args.points, data)
            contestant.evaluate(data)
    rival = min(contestants[len(ours) :], key=lambda contestant: contestant.best.loss)
    print(
        f"\n### fashion_mnist: MLP 784-{_HIDDEN}-10, {args.seconds:g} s of training each, seed "
        f"{args.seed}\n\n{_table(contestants, rival)}\n\n{_over_time(ours[0], rival)}"
    )
    draw(contestants, rival, args.png)
    print(f"\nCurves: {args.png}")
    append_csv(args.csv, _measurements(contestants, rival, args.seconds))


def _contestant(
    name: str, batch: int, make: Callable[[Iterator[nn.Parameter]], Optimizer], seed: int
) -> Contestant:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(784, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, _CLASSES))
    return Contestant(name, batch, network, make(network.parameters()))


def _table(contestants: list[Contestant], rival: Contestant) -> str:
    rows = [
        [
            contestant.title + (" (best AdamW)" if contestant is rival else ""),
            number(contestant.best.loss, 4),
            f"{contestant.best.seconds:.1f}",
            f"{contestant.best.accuracy:.2%}",
            f"{contestant.best.test_accuracy:.2%}",
            number(contestant.curve[-1].loss, 4),
            f"{contestant.curve[-1].accuracy:.2%}",
            f"{max(point.accuracy for point in contestant.curve):.2%}",
            str(contestant.steps),
        ]
        for contestant in contestants
    ]
    header = [
        "optimizer",
        "best validation loss",
        "after s",
        "accuracy there",
        "test accuracy there",
        "final loss",
        "final accuracy",
        "best accuracy",
        "steps",
    ]
    return markdown_table(header, rows)


def _over_time(ours: Contestant, rival: Contestant) -> str:
    """Return a table of loss and accuracy over time."""
    last = len(ours.curve) - 1
    picked = sorted({max(1, round(last * share)) for share in (1 / 60, 1 / 12, 1 / 4, 1 / 2, 1)})
    rows = []
    for contestant in (ours, rival):
        points = [contestant.curve[i] for i in picked]
        cells = [f"{number(point.loss, 3)} / {point.accuracy:.1%}" for point in points]
        rows.append([contestant.title, *cells])
    times = [f"{ours.curve[i].seconds:.3g} s" for i in picked]
    return markdown_table(["validation loss / accuracy after", *times], rows)


def draw(contestants: list[Contestant], rival: Contestant, path: Path) -> None:
    """Draw validation loss and accuracy over time.

    Args:
        contestants: AdamQLR first, then the others.
        rival: The best of the others.
        path: File to write.

    Raises:
        ModuleNotFoundError: If matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'The curves need matplotlib: pip install "lightning-curvature[bench]".'
        ) from error
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for contestant in contestants:
        style: dict[str, object] = {"color": "0.85", "linewidth": 0.8, "zorder": 1}
        if contestant is contestants[0]:
            style = {"color": "tab:blue", "label": contestant.title}
        elif contestant is rival:
            style = {"color": "tab:orange", "label": f"{contestant.title} (best of the grid)"}
        points = contestant.curve[1:]
        seconds = [point.seconds for point in points]
        left.plot(seconds, [point.loss for point in points], **style)
        right.plot(seconds, [100 * point.accuracy for point in points], **style)
    # The interesting part of both: learning rates far off may lie outside.
    lowest = min(one.best.loss for one in contestants)
    highest = max(one.curve[-1].loss for one in (contestants[0], rival))
    if math.isfinite(highest):
        left.set_ylim(0.97 * lowest, 1.05 * max(1.6 * lowest, highest))
    best = max(point.accuracy for one in contestants for point in one.curve)
    right.set_ylim(100 * best - 10, 100 * best + 1)
    left.set_ylabel("validation loss")
    right.set_ylabel("validation accuracy [%]")
    for axes in (left, right):
        axes.set_xlabel("training time [s]")
        axes.grid(alpha=0.3)
    left.legend(fontsize="small")
    figure.suptitle("Fashion-MNIST, MLP 784-50-10 (gray: all other runs)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _measurements(
    contestants: list[Contestant], rival: Contestant, seconds: float
) -> list[Measurement]:
    task = f"fashion_mnist, {seconds:g} s"
    found = []
    for contestant in contestants:
        values = {
            "best validation loss": lambda one: one.best.loss,
            "final validation loss": lambda one: one.curve[-1].loss,
            "best validation accuracy": lambda one: max(point.accuracy for point in one.curve),
            "test accuracy at the best validation loss": lambda one: one.best.test_accuracy,
        }
        for metric, value in values.items():
            own, other = value(contestant), value(rival)
            found.append(
                Measurement(
                    "paper_tasks",
                    task,
                    contestant.title,
                    metric,
                    own,
                    f"best AdamW: {rival.title}",
                    own / other if other else math.nan,
                )
            )
    return found
