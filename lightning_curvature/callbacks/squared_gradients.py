"""Squared gradients of the training loss, measured beside a Trainer's training without a trace."""

import copy
import random
import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_curvature.oracle.extra_pass import Environment, extra_pass
from lightning_curvature.oracle.ranks import mean_over_ranks, rank
from lightning_curvature.oracle.replay import eager
from lightning_curvature.oracle.streams import stream

__all__ = ["squared_gradients"]


def squared_gradients(
    trainer: Trainer,
    params: Sequence[Tensor],
    num_batches: int,
    *key: int,
    batch: Any = None,
    eval_mode: bool = False,
) -> list[Tensor]:
    """Return the mean over batches of the squared gradient of a batch's mean loss.

    Runs the module's ``training_step`` on an iterator of the train loader of its own, between the
    batches of training. Random numbers depend on the key only. Nothing of it is seen afterwards:
    not in buffers, metrics, logs, gradients or random numbers.

    Args:
        trainer: The Trainer, while it trains.
        params: The parameters.
        num_batches: Number of batches of each rank, fewer if the loader ends before.
        *key: What the random numbers depend on, such as a seed and the step.
        batch: The first batch, where the Trainer has prepared one already.
        eval_mode: Whether to evaluate in eval mode.

    Returns:
        One tensor per parameter, float32; on several ranks the mean over them.

    Raises:
        MisconfigurationException: If the loader cannot be iterated twice, or gave no loss.
    """
    module = trainer.lightning_module
    device = params[0].device
    plugin_context = trainer.strategy.precision_plugin.train_step_context
    sums = [torch.zeros_like(p, dtype=torch.float32).detach() for p in params]
    done, ready = 0, [] if batch is None else [batch]
    with plugin_context():
        environment = Environment.of(module, device)
    if eval_mode:
        environment.training = [(part, False) for part, _ in environment.training]
    contexts = (plugin_context, lambda: _silenced(module))
    with extra_pass(environment, contexts):
        _seed(device, *key, rank())
        own = _own_batches(trainer, num_batches - len(ready), key)
        with own as more, torch.enable_grad(), eager():
            for batch_idx, one in enumerate(chain(ready, more)):
                loss = _loss(trainer, one, batch_idx)
                if loss is not None:
                    _add_squares(sums, torch.autograd.grad(loss, list(params), allow_unused=True))
                    done += 1
    counts = torch.tensor([float(done)], device=device)
    if trainer.world_size > 1:
        flat = mean_over_ranks(torch.cat([counts, *(total.view(-1) for total in sums)]))
        counts, *parts = torch.split(flat, [1, *(total.numel() for total in sums)])
        sums = [part.view(p.shape) for part, p in zip(parts, params, strict=True)]
    if not float(counts) > 0:
        raise MisconfigurationException(
            "Squared gradients could not be measured: the train loader gave no batch for which "
            "training_step returned a loss."
        )
    return [total.div_(counts) for total in sums]


def _prepared(trainer: Trainer, batch: Any) -> Any:
    """Send a batch the way that Lightning's loop would."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _loss(trainer: Trainer, batch: Any, batch_idx: int) -> Tensor | None:
    module = trainer.lightning_module
    kwargs = trainer.fit_loop.epoch_loop._build_kwargs(OrderedDict(), batch, batch_idx)
    output = module.training_step(*kwargs.values())
    loss = output.get("loss") if isinstance(output, dict) else output
    return loss if isinstance(loss, Tensor) and loss.requires_grad else None


def _add_squares(sums: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    for total, grad in zip(sums, grads, strict=True):
        if grad is not None:
            total.add_((grad.to_dense() if grad.is_sparse else grad).float().square())


def _seed(device: torch.device, *key: int) -> None:
    """Seed everything that `extra_pass` puts back."""
    seed = stream(torch.device("cpu"), "squared gradients", *key).initial_seed()
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


@contextmanager
def _silenced(module: LightningModule) -> Iterator[None]:
    """Let the module's logging calls do nothing."""
    names = ("log", "log_dict")
    before = {name: module.__dict__[name] for name in names if name in module.__dict__}
    module.__dict__.update(dict.fromkeys(names, _nothing))
    try:
        yield
    finally:
        for name in names:
            del module.__dict__[name]
        module.__dict__.update(before)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Stand for a logging call."""


@contextmanager
def _own_batches(trainer: Trainer, most: int, key: tuple[int, ...]) -> Iterator[Iterator[Any]]:
    """Iterate over the train loader though training may be in the middle of it."""
    combined = trainer.fit_loop._combined_loader
    assert combined is not None
    own = CombinedLoader(combined.iterables, combined._mode)
    own.flattened = [_copied(loader) for loader in combined.flattened]
    own.limits = combined.limits
    generators = {
        id(generator): generator for loader in own.flattened for generator in _generators(loader)
    }
    states = {number: generator.get_state() for number, generator in generators.items()}
    most = int(min(most, trainer.num_training_batches))
    try:
        for number, generator in enumerate(generators.values()):
            generator.manual_seed(
                stream(torch.device("cpu"), "order of batches", *key, number).initial_seed()
            )
        iterator = iter(own)
        found = zip(range(most), iterator, strict=False)
        yield (_prepared(trainer, batch) for _, (batch, *_) in found)
    finally:
        own.reset()  # ends its workers
        for number, generator in generators.items():
            generator.set_state(states[number])


def _copied(loader: Any) -> Any:
    """Return a loader over the same data whose iterators do not disturb those of the first."""
    if isinstance(loader, Iterator):
        raise MisconfigurationException(
            f"The train loader, a {type(loader).__name__}, can be iterated only once, and squared "
            "gradients need batches of their own. Use criterion='magnitude' or 'random'."
        )
    own = copy.copy(loader)
    if isinstance(own, DataLoader):
        # Persistent workers belong to one iterator, which a second use would reset.
        own.__dict__.update(_iterator=None, persistent_workers=False)
    return own


def _generators(loader: Any) -> Iterator[torch.Generator]:
    """Yield the generators that a loader draws its order from."""
    parts, seen = [loader], set()
    for part in parts:
        if part is None or id(part) in seen:
            continue
        seen.add(id(part))
        parts += [getattr(part, name, None) for name in ("sampler", "batch_sampler")]
        generator = getattr(part, "generator", None)
        if isinstance(generator, torch.Generator):
            yield generator
