"""What AdaFisher does beyond momentum SGD: both modes beside the SGD with the same step.

The authors' code adds a damping that is larger than its Fisher diagonal in every coordinate, so
after some refreshes of the factors it descends like SGD with momentum and the learning rate
lr / damping. Here a convolutional network with batch normalization is trained by AdaFisher for some
steps; then an SGD takes over a copy of weights and momentum, and both go on over the same batches.
The cosine between their displacements and their distance, relative to how far the SGD went, say how
much of AdaFisher's path is its own. A second SGD with a slightly smaller learning rate shows what
such numbers mean. The same is done with the corrected mode and the SGD of the same step for a
coordinate of average curvature. Besides, all four train from the start.
"""

import argparse
import copy
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fashion_mnist import load
from report import Measurement, add_common_arguments, append_csv, markdown_table, number
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD

from lightning_curvature import AdaFisher

__all__ = ["Comparison", "Images", "compare", "digits", "main"]

_CLASSES = 10
# Of the second SGD, relative to the first: what 7 % of curvature beside the damping can do at most.
_OTHER_LR = 0.93
_MODES = ("reference", "corrected")


class Images(NamedTuple):
    """Images ``[N, 1, side, side]`` and labels ``[N]`` to train on, and others."""

    name: str
    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]


class Comparison(NamedTuple):
    """How two runs from the same point compare.

    Attributes:
        cosine: Cosine between their displacements.
        distance: Their distance relative to the displacement of the second.
    """

    cosine: float
    distance: float


def digits() -> Images:
    """Return the 8 by 8 digits that come with scikit-learn.

    Raises:
        ModuleNotFoundError: If it is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'The digits need scikit-learn: pip install "lightning-curvature[bench]".'
        ) from error
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(found.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, validation = order[:1437], order[1437:]
    return Images(
        "digits", (images[train], labels[train]), (images[validation], labels[validation])
    )


def _fashion_mnist(folder: Path, count: int) -> Images:
    data = load(folder)
    (x, y), (v, w) = data.train, data.validation
    return Images(
        "Fashion-MNIST", (x[:count].view(-1, 1, 28, 28), y[:count]), (v.view(-1, 1, 28, 28), w)
    )


def _network(side: int) -> nn.Module:
    """Return two convolutions with batch normalization and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(min(4, side // 2)),
        nn.Flatten(),
        nn.Linear(32 * min(4, side // 2) ** 2, _CLASSES),
    )


def _adafisher(mode: str, args: argparse.Namespace, params: Any) -> AdaFisher:
    return AdaFisher(
        params,
        mode=mode,  # type: ignore[arg-type]
        weight_decay=args.weight_decay,
        factor_update_interval=args.interval,
    )


def _sgd_lr(optimizer: AdaFisher) -> float:
    """Return the learning rate of the SGD that takes the same steps but for the curvature."""
    group = optimizer.param_groups[0]
    scale = group["damping"] if group["mode"] == "reference" else 1.0
    return float(group["lr"] * (1 - group["beta"]) / scale)


def _like(optimizer: AdaFisher, params: Sequence[Tensor], factor: float = 1.0) -> SGD:
    """Return an SGD on copies of the parameters that takes over the momentum."""
    group = optimizer.param_groups[0]
    sgd = SGD(
        params,
        lr=factor * _sgd_lr(optimizer),
        momentum=group["beta"],
        weight_decay=group["weight_decay"],
    )
    for p, q in zip(group["params"], params, strict=True):
        if p in optimizer.state:
            # Its momentum is a sum, the other's an average.
            average = optimizer.state[p]["exp_avg"]
            sgd.state[q]["momentum_buffer"] = average / (1 - group["beta"])
    return sgd


def _batches(images: Images, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x, y = images.train
    while True:
        for rows in torch.randperm(len(x), generator=generator).split(batch):
            if len(rows) == batch:
                yield x[rows], y[rows]


Step = Callable[[Tensor, Tensor], None]


def _step(network: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    criterion: Callable[[Tensor, Tensor], Tensor] = functional.cross_entropy
    if isinstance(optimizer, AdaFisher):
        criterion = optimizer.attach_model(network, functional.cross_entropy)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        criterion(network(x), y).backward()
        optimizer.step()

    return step


def _theta(network: nn.Module) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in network.parameters()])


def _paths(one: Tensor, other: Tensor) -> Comparison:
    cosine = torch.cosine_similarity(one, other, dim=0).item()
    return Comparison(cosine, ((one - other).norm() / other.norm()).item())


def compare(
    images: Images, mode: str, args: argparse.Namespace, seed: int
) -> tuple[Comparison, Comparison, dict[str, float]]:
    """Follow AdaFisher and its SGD from a point on AdaFisher's way.

    Args:
        images: The data.
        mode: Mode of AdaFisher.
        args: Parsed arguments.
        seed: Seed of weights and order.

    Returns:
        AdaFisher beside SGD, the other SGD beside SGD, and AdaFisher's stats at the end.
    """
    torch.manual_seed(seed)
    network = _network(images.train[0].shape[-1])
    optimizer = _adafisher(mode, args, network.parameters())
    step, batches = _step(network, optimizer), _batches(images, args.batch, seed)
    for _ in range(args.start):
        step(*next(batches))
    # Copies carry the hooks without their effect.
    copies = [copy.deepcopy(network) for _ in range(2)]
    others = [
        _step(twin, _like(optimizer, list(twin.parameters()), factor))
        for twin, factor in zip(copies, (1.0, _OTHER_LR), strict=True)
    ]
    start = _theta(network)
    for _ in range(args.span):
        x, y = next(batches)
        for advance in (step, *others):
            advance(x, y)
    mine, sgd, slower = (_theta(one) - start for one in (network, *copies))
    stats = {name: value.item() for name, value in optimizer.stats.items()}
    return _paths(mine, sgd), _paths(slower, sgd), stats


def train(images: Images, mode: str, sgd: bool, args: argparse.Namespace, seed: int) -> list[float]:
    """Train from the start; return training loss, validation loss and validation accuracy.

    Args:
        images: The data.
        mode: Mode of AdaFisher.
        sgd: Whether its SGD trains instead.
        args: Parsed arguments.
        seed: Seed of weights and order.
    """
    torch.manual_seed(seed)
    network = _network(images.train[0].shape[-1])
    optimizer: torch.optim.Optimizer = _adafisher(mode, args, network.parameters())
    if sgd:
        assert isinstance(optimizer, AdaFisher)
        optimizer = _like(optimizer, list(network.parameters()))
    step, batches = _step(network, optimizer), _batches(images, args.batch, seed)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    for _ in range(args.steps):
        step(*next(batches))
        cosine.step()
    network.eval()
    with torch.no_grad():
        (x, y), (v, w) = images.train, images.validation
        logits = network(v)
        return [
            functional.cross_entropy(network(x), y).item(),
            functional.cross_entropy(logits, w).item(),
            (logits.argmax(-1) == w).float().mean().item(),
        ]


def _mean(values: Sequence[float]) -> float:
    return statistics.mean(values)


def _beside_sgd(
    images: Images, args: argparse.Namespace
) -> tuple[list[list[str]], list[Measurement]]:
    rows, found = [], []
    for mode in _MODES:
        results = [compare(images, mode, args, seed) for seed in args.seeds]
        for name, index in ((f"AdaFisher, {mode}", 0), (f"SGD, lr 7 % smaller ({mode})", 1)):
            cosine = _mean([result[index].cosine for result in results])
            distance = _mean([result[index].distance for result in results])
            cells = ["", ""]
            if index == 0:
                stats = [result[2] for result in results]
                cells = [
                    number(_mean([s["fisher_max"] for s in stats])),
                    f"{_mean([s['damped_fraction'] for s in stats]):.0%}",
                ]
            rows.append([name, f"{cosine:.4f}", f"{distance:.2%}", *cells])
            for metric, value in (("cosine", cosine), ("distance / travel", distance)):
                found.append(Measurement("adafisher_sgd", images.name, name, metric, value, "SGD"))
    return rows, found


def _from_the_start(
    images: Images, args: argparse.Namespace
) -> tuple[list[list[str]], list[Measurement]]:
    rows, found = [], []
    for mode in _MODES:
        lr = _sgd_lr(_adafisher(mode, args, [nn.Parameter(torch.zeros(1))]))
        for name, sgd in ((f"AdaFisher, {mode}", False), (f"SGD, lr {lr:g}", True)):
            results = [train(images, mode, sgd, args, seed) for seed in args.seeds]
            loss, other, accuracy = (_mean(column) for column in zip(*results, strict=True))
            spread = statistics.pstdev([result[2] for result in results])
            shown = f"{accuracy:.2%} ± {spread:.2%}"
            rows.append([name, number(loss), number(other), shown])
            for metric, value in (
                ("training loss", loss),
                ("validation loss", other),
                ("validation accuracy", accuracy),
            ):
                found.append(Measurement("adafisher_sgd", images.name, name, metric, value))
    return rows, found


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark.

    Args:
        argv: Arguments; None for those of the command line.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_arguments(parser)
    parser.add_argument(
        "--data",
        type=Path,
        help="folder that holds FashionMNIST/raw; without it the digits of scikit-learn are used",
    )
    parser.add_argument("--images", type=int, default=6000, help="of Fashion-MNIST, to train on")
    parser.add_argument("--batch", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--start", type=int, default=300, help="steps before SGD takes over")
    parser.add_argument("--span", type=int, default=200, help="steps side by side")
    parser.add_argument("--steps", type=int, default=600, help="steps of a run from the start")
    parser.add_argument("--interval", type=int, default=100, help="factor_update_interval")
    parser.add_argument("--weight-decay", type=float, default=5e-4, help="default: %(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        images = digits() if args.data is None else _fashion_mnist(args.data, args.images)
    except FileNotFoundError as error:
        parser.error(str(error))
    runs = f"{images.name}, batch {args.batch}, mean of {len(args.seeds)} seeds"

    rows, measurements = _beside_sgd(images, args)
    header = ["beside SGD", "cosine", "distance / travel", "max F / damping", "F < damping"]
    title = f"{args.span} steps beside momentum SGD, from step {args.start} on ({runs})"
    print(f"\n### {title}\n\n{markdown_table(header, rows)}", flush=True)
    rows, found = _from_the_start(images, args)
    header = ["from the start", "training loss", "validation loss", "validation accuracy"]
    title = f"{args.steps} steps, cosine schedule ({runs})"
    print(f"\n### {title}\n\n{markdown_table(header, rows)}", flush=True)
    append_csv(args.csv, measurements + found)


if __name__ == "__main__":
    main()
