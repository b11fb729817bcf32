"""What pruning costs in accuracy: Fisher matrix, magnitude and chance, one-shot and gradual.

    python benchmarks/pruning.py grid fashion_mnist --data DIR
    python benchmarks/pruning.py train fashion_mnist --data DIR --seeds 0 1 2
    python benchmarks/pruning.py train cifar10 --data DIR --seeds 0 1 2
    python benchmarks/pruning.py report

"fashion_mnist" is a network of two convolutions and two linear layers (55,000 weights), "cifar10"
the residual network of ``cifar10.py`` (77,000 weights) on a part of CIFAR-10. Each is trained once
per seed. All ways to prune start from these weights, through `MFACPruning` in a Trainer, and then
train what is left with the same batches:

- one-shot: prune to the sparsity, in 16 steps with new gradients each (or 4), then fine-tune;
- gradual: prune at the start of each of six short epochs, by a cubic schedule, and fine-tune for
  two more. Both have the same number of fine-tuning steps.

"grid" varies what there is to choose, one-shot at one sparsity, and looks at validation only. Runs
are kept in a file, and what it holds is not run again; "report" makes tables of it.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cifar10
import fashion_mnist
import lightning.pytorch as pl
import torch
from fashion_mnist import Data
from pruning_report import Run, Setting, append_run, read_runs, report
from report import add_common_arguments, quiet_trainers
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from lightning_curvature import CubicSparsity, MFACPruning

__all__ = ["TASKS", "Task", "grid", "main", "prune", "ways"]

SPARSITIES = (0.8, 0.9, 0.95, 0.98)
_GRID_SPARSITY = 0.95
_BATCH = 128
_EPOCHS = 8
_LAST_EVENT = 5
_TUNING_LR = 0.01


class Task(NamedTuple):
    """A data set, its network, and how much is done with it.

    Attributes:
        load: Reads the data.
        network: Makes the network.
        shape: Shape of an image.
        epochs: Epochs of dense training.
        steps: Steps of fine-tuning.
        batch: Examples per gradient.
        all_ways: Whether all ways to prune are compared, or only the most important.
    """

    load: Callable[[Path], Data]
    network: Callable[[], nn.Module]
    shape: tuple[int, ...]
    epochs: int
    steps: int
    batch: int
    all_ways: bool


def _convolutions() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
        nn.Flatten(),
        *(nn.Linear(1568, 32), nn.ReLU()),
        nn.Linear(32, 10),
    )


TASKS = {
    "fashion_mnist": Task(fashion_mnist.load, _convolutions, (1, 28, 28), 4, 400, 32, True),
    "cifar10": Task(cifar10.load, cifar10.ResidualNetwork, (3, 32, 32), 12, 96, 16, False),
}


class Classifier(pl.LightningModule):
    """Trains a network with cross-entropy: dense with AdamW, what is left of it with SGD.

    Args:
        network: The network.
        dense_steps: Steps of dense training, 0 for fine-tuning.
    """

    def __init__(self, network: nn.Module, dense_steps: int = 0) -> None:
        super().__init__()
        self.network = network
        self._dense_steps = dense_steps

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss of a batch."""
        images, labels = batch
        return functional.cross_entropy(self.network(images), labels)

    @override
    def configure_optimizers(self) -> Any:
        """Return AdamW with one cycle of the learning rate, or SGD with momentum."""
        if not self._dense_steps:
            return torch.optim.SGD(self.parameters(), lr=_TUNING_LR, momentum=0.9)
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=self._dense_steps)
        return [optimizer], [{"scheduler": cycle, "interval": "step"}]


class BeforeTuning(pl.Callback):
    """Calls something right before the first batch, when weights have been pruned.

    Args:
        look: What to call.

    Attributes:
        found: What it returned.
    """

    def __init__(self, look: Callable[[], Any]) -> None:
        self.found: Any = None
        self._look = look

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Look once."""
        if trainer.global_step == 0:
            self.found = self._look()


class Part(NamedTuple):
    """A network's loss and accuracy on one part of the data."""

    loss: float
    accuracy: float


@torch.no_grad()
def _evaluate(network: nn.Module, part: tuple[Tensor, Tensor]) -> Part:
    was_training = network.training
    network.eval()
    chunks = zip(part[0].split(2000), part[1].split(2000), strict=True)
    found = [(network(images), labels) for images, labels in chunks]
    network.train(was_training)
    logits, labels = (torch.cat(tensors) for tensors in zip(*found, strict=True))
    loss = functional.cross_entropy(logits, labels).item()
    return Part(loss, (logits.argmax(-1) == labels).float().mean().item())


def _fit(
    module: Classifier, data: Data, seed: int, callbacks: list[pl.Callback], **options: Any
) -> None:
    torch.manual_seed(seed)
    loader = DataLoader(TensorDataset(*data.train), _batch(data), shuffle=True, drop_last=True)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, loader)


def _batch(data: Data) -> int:
    return min(_BATCH, len(data.train[0]) // 2)


def _dense(task: Task, data: Data, seed: int, path: Path) -> nn.Module:
    """Return the trained network of a seed; train it if it is not in the file."""
    torch.manual_seed(seed)
    network = task.network()
    if path.is_file():
        network.load_state_dict(torch.load(path, weights_only=True))
        return network
    steps = task.epochs * (len(data.train[0]) // _batch(data))
    _fit(Classifier(network, steps), data, seed, [], max_steps=steps)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(network.state_dict(), path)
    return network


def prune(setting: Setting, network: nn.Module, data: Data, steps: int) -> Run:
    """Prune a trained network, fine-tune what is left.

    Args:
        setting: How.
        network: The network; it is changed.
        data: Images and labels.
        steps: Steps of fine-tuning.
    """
    epochs = _EPOCHS if setting.how == "gradual" else 1
    how: dict[str, Any] = {"sparsity": setting.sparsity}
    if setting.how == "gradual":
        # The first event, at epoch 0, takes a share of its own.
        cubic = CubicSparsity(setting.sparsity, 0, _LAST_EVENT, initial=setting.sparsity / 2)
        how = {"schedule": cubic}
    pruning = MFACPruning(
        **how,
        num_grads=setting.num_grads,
        damping=setting.damping,
        block_size=setting.block_size or None,
        num_recomputations=setting.num_recomputations,
        fisher_batch_size=setting.fisher_batch_size,
        criterion=setting.criterion,
        weight_update=setting.weight_update,
        plot=False,
        verbose=0,
        seed=setting.seed,
    )
    clock = time.process_time()

    def look() -> tuple[float, Part, Part]:
        seconds = time.process_time() - clock
        return seconds, _evaluate(network, data.validation), _evaluate(network, data.test)

    before = BeforeTuning(look)
    length = max(1, steps // epochs)
    callbacks = [pruning, before]
    module = Classifier(network)
    _fit(module, data, setting.seed, callbacks, max_epochs=epochs, limit_train_batches=length)
    seconds, validation, test = before.found
    gone = sum(int((m.weight == 0).sum()) for m in _layers(network))
    total = sum(m.weight.numel() for m in _layers(network))
    tuned = _evaluate(network, data.test)
    return Run(setting, gone / total, seconds, *validation, *test, *tuned)


def _layers(network: nn.Module) -> list[nn.Conv2d | nn.Linear]:
    return [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]


def ways(task: str, sparsity: float, seed: int) -> list[Setting]:
    """Return the ways to prune that are compared.

    Args:
        task: Name of the task.
        sparsity: Sparsity to reach.
        seed: Seed of the weights and of everything else.
    """
    setting = Setting(task, seed, sparsity, fisher_batch_size=TASKS[task].batch)
    chance = {"weight_update": "none", "num_recomputations": 1}
    magnitude, random = (
        setting._replace(criterion=name, **chance) for name in ("magnitude", "random")
    )
    gradual = setting._replace(how="gradual", num_recomputations=1)
    found = [setting, magnitude, random, gradual, magnitude._replace(how="gradual")]
    if TASKS[task].all_ways:
        found += [
            setting._replace(num_recomputations=4),
            setting._replace(weight_update="sum"),
            random._replace(how="gradual"),
        ]
    else:
        # As many gradients as a block has coordinates, and more.
        found += [
            setting._replace(num_grads=256, num_recomputations=4),
            gradual._replace(num_grads=256),
        ]
    return found


def grid(task: str, seed: int) -> list[Setting]:
    """Return what there is to choose, one thing at a time, and damping with the batch size.

    Args:
        task: Name of the task.
        seed: Seed of the weights and of everything else.
    """
    setting = Setting(task, seed, _GRID_SPARSITY)
    found = [
        setting._replace(damping=damping, fisher_batch_size=batch)
        for batch in (32, 1, 8, 128)
        for damping in (1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
    ]
    for batch in (1, 32):
        base = setting._replace(fisher_batch_size=batch)
        found += [base._replace(block_size=size) for size in (32, 512, 0)]
        found += [base._replace(num_grads=count) for count in (256, 512)]
        found += [base._replace(weight_update=name) for name in ("sum", "none")]
        found += [base._replace(num_recomputations=count) for count in (1, 4)]
    return found


def _grid_file(runs: Path) -> Path:
    return runs.with_name(f"grid_{runs.name}")


def _run(settings: Sequence[Setting], args: argparse.Namespace, data: Data, task: Task) -> None:
    file = _grid_file(args.runs) if args.command == "grid" else args.runs
    done = {run.setting for run in read_runs(file)}
    for setting in settings:
        if setting in done:
            continue
        path = args.runs.parent / f"{setting.task}_{setting.seed}.pt"
        network = _dense(task, data, setting.seed, path)
        dense = Setting(setting.task, setting.seed, 0.0, "dense")
        if dense not in done:
            found = _evaluate(network, data.validation), _evaluate(network, data.test)
            append_run(file, Run(dense, 0.0, 0.0, *found[0], *found[1], *found[1]))
            done.add(dense)
        steps = 1 if args.command == "grid" else task.steps
        start = time.process_time()
        run = prune(setting, network, data, steps)
        append_run(file, run)
        print(
            f"{setting.title}, seed {setting.seed}: {run.accuracy:.2%}, tuned "
            f"{run.tuned_accuracy:.2%}, {time.process_time() - start:.1f} s",
            flush=True,
        )
        done.add(setting)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a part of the benchmark.

    Args:
        argv: Arguments of the command line, None for those of the process.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("command", choices=["grid", "train", "report"])
    parser.add_argument("task", nargs="?", choices=list(TASKS))
    parser.add_argument("--data", type=Path, metavar="DIR")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--sparsities", type=float, nargs="+", default=list(SPARSITIES))
    parser.add_argument("--runs", type=Path, default=Path("pruning_runs") / "runs.csv")
    parser.add_argument("--smoke", action="store_true", help="a few images and steps")
    add_common_arguments(parser)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    quiet_trainers()
    if args.command == "report":
        report(read_runs(args.runs), read_runs(_grid_file(args.runs)), args.csv)
        return
    if args.task is None or args.data is None:
        parser.error(f"{args.command} needs a task and --data")
    task = TASKS[args.task]
    try:
        data = task.load(args.data)
    except FileNotFoundError as error:
        parser.error(str(error))
    data = Data(*((images.view(-1, *task.shape), labels) for images, labels in data))
    if args.smoke:
        data = Data(*((images[:256], labels[:256]) for images, labels in data))
        task = task._replace(epochs=1, steps=_EPOCHS)
    settings = []
    for seed in args.seeds:
        if args.command == "grid":
            settings += grid(args.task, seed)
        for sparsity in args.sparsities if args.command == "train" else []:
            settings += ways(args.task, sparsity, seed)
    if args.smoke:
        small = {"num_grads": 2, "fisher_batch_size": 4}
        settings = [one._replace(**small) for one in settings]
    _run(settings, args, data, task)


if __name__ == "__main__":
    main()
