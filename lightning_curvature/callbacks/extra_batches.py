"""The user's training step on batches of one's own, beside a Trainer's training without a trace."""

import copy
import random
import sys
from collections import OrderedDict
from collections.abc import Iterator, Sized
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset

from lightning_curvature.oracle.extra_pass import Environment, extra_pass
from lightning_curvature.oracle.ranks import rank
from lightning_curvature.oracle.replay import eager
from lightning_curvature.oracle.streams import stream

__all__ = ["extra_training_steps", "own_batches", "prepared", "training_loss"]


@contextmanager
def extra_training_steps(
    trainer: Trainer, device: torch.device, purpose: str, *key: int, eval_mode: bool = False
) -> Iterator[None]:
    """Let ``training_step`` be called, and nothing of it be seen afterwards.

    Neither in buffers, metrics, logs nor random numbers; gradients are the caller's business, who
    asks `torch.autograd.grad` for them.

    Args:
        trainer: The Trainer, while it trains.
        device: Device of the parameters.
        purpose: What random numbers are for, in words.
        *key: What else they depend on, such as a seed and the step; the rank always is.
        eval_mode: Whether to evaluate in eval mode.
    """
    module = trainer.lightning_module
    plugin_context = trainer.strategy.precision_plugin.train_step_context
    with plugin_context():
        environment = Environment.of(module, device)
    if eval_mode:
        environment.training = [(part, False) for part, _ in environment.training]
    with ExitStack() as stack:
        contexts = (plugin_context, lambda: _silenced(module))
        stack.enter_context(extra_pass(environment, contexts))
        _seed(device, purpose, *key, rank())
        stack.enter_context(torch.enable_grad())
        stack.enter_context(eager())
        yield


def training_loss(trainer: Trainer, batch: Any, batch_idx: int) -> Tensor | None:
    """Return the loss of a batch, None if the training step gave none that has a gradient.

    Args:
        trainer: The Trainer.
        batch: The batch, on its device.
        batch_idx: Its number.
    """
    module = trainer.lightning_module
    kwargs = trainer.fit_loop.epoch_loop._build_kwargs(OrderedDict(), batch, batch_idx)
    output = module.training_step(*kwargs.values())
    loss = output.get("loss") if isinstance(output, dict) else output
    return loss if isinstance(loss, Tensor) and loss.requires_grad else None


def prepared(trainer: Trainer, batch: Any) -> Any:
    """Send a batch the way that Lightning's loop would.

    Args:
        trainer: The Trainer.
        batch: What a loader gave.
    """
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


@contextmanager
def own_batches(
    trainer: Trainer,
    who: str,
    key: tuple[int, ...],
    batch_size: int | None = None,
    reshuffle: bool = False,
) -> Iterator[Iterator[Any]]:
    """Iterate once over the train loader though training may be in the middle of it.

    Args:
        trainer: The Trainer.
        who: What needs the batches and their verb, for errors: "squared gradients need".
        key: What the order of shuffled batches depends on.
        batch_size: Examples per batch; None for the batches of training.
        reshuffle: Whether samplers that shuffle by the number of the epoch use the key instead.

    Raises:
        MisconfigurationException: If the loader cannot be iterated twice, or not be made with
            another batch size.
    """
    combined = trainer.fit_loop._combined_loader
    assert combined is not None
    own = CombinedLoader(combined.iterables, combined._mode)
    if batch_size is None:
        own.flattened = [_copied(loader, who) for loader in combined.flattened]
        own.limits = combined.limits
        most = trainer.num_training_batches
    else:
        own.flattened = [_rebuilt(loader, batch_size) for loader in combined.flattened]
        # No more examples than an epoch of training has, as with `overfit_batches`.
        examples = max(loader.batch_size or 1 for loader in combined.flattened)
        most = trainer.num_training_batches * examples / batch_size
    if reshuffle:
        for loader in own.flattened:
            _reshuffle(loader, key)
    generators = {
        id(generator): generator for loader in own.flattened for generator in _generators(loader)
    }
    states = {number: generator.get_state() for number, generator in generators.items()}
    try:
        for number, generator in enumerate(generators.values()):
            # Its own seed tells apart ranks whose samplers draw for themselves.
            drawn = stream(
                torch.device("cpu"), "order of batches", *key, number, generator.initial_seed()
            )
            generator.manual_seed(drawn.initial_seed())
        iterator = iter(own)
        yield (prepared(trainer, batch) for batch in _first(iterator, most))
    finally:
        own.reset()  # ends its workers
        for number, generator in generators.items():
            generator.set_state(states[number])


def _first(iterator: Iterator[Any], most: float) -> Iterator[Any]:
    done = 0
    # Not one batch more is fetched than is given on.
    while done < most:
        try:
            batch, *_ = next(iterator)
        except StopIteration:
            return
        yield batch
        done += 1


def _copied(loader: Any, who: str) -> Any:
    """Return a loader over the same data whose iterators do not disturb those of the first."""
    if isinstance(loader, Iterator):
        raise MisconfigurationException(
            f"The train loader, a {type(loader).__name__}, can be iterated only once, and {who} "
            "batches of their own. Use criterion='magnitude' or 'random'."
        )
    own = copy.copy(loader)
    if isinstance(own, DataLoader):
        # Persistent workers belong to one iterator, which a second use would reset.
        own.__dict__.update(_iterator=None, persistent_workers=False)
    return own


def _rebuilt(loader: Any, batch_size: int) -> DataLoader[Any]:
    """Return a loader over the same data, in the same kind of order, with another batch size."""
    name, reason = type(loader).__name__, None
    if not isinstance(loader, DataLoader):
        reason = "is no DataLoader of torch"
    elif type(loader).__iter__ is not DataLoader.__iter__:
        reason = "has an __iter__ of its own"
    elif loader.batch_sampler is None:
        reason = "has batch_size=None: its data set makes the batches"
    elif type(loader.batch_sampler) is not BatchSampler:
        reason = f"has batches made by a {type(loader.batch_sampler).__name__}"
    if reason is not None:
        raise MisconfigurationException(
            f"The train loader, a {name}, cannot be made again with "
            f"fisher_batch_size={batch_size}: it {reason}. Use fisher_batch_size=None, which takes "
            "the batches of training."
        )
    iterable = isinstance(loader.dataset, IterableDataset)
    return DataLoader(
        loader.dataset,
        batch_size=batch_size,
        sampler=None if iterable else loader.sampler,
        # The gradient of the few examples that are left over would count like that of a whole
        # batch, and is larger.
        drop_last=isinstance(loader.sampler, Sized) and len(loader.sampler) >= batch_size,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
    )


def _reshuffle(loader: Any, key: tuple[int, ...]) -> None:
    """Give a loader of ours an order of its own where the number of the epoch would decide."""
    sampler = getattr(loader, "sampler", None)
    if isinstance(loader, DataLoader) and isinstance(sampler, DistributedSampler):
        own = copy.copy(sampler)
        seed = stream(torch.device("cpu"), "order of epochs", *key).initial_seed()
        own.set_epoch(seed % 2**31)
        loader.__dict__["sampler"] = own
        batches = loader.batch_sampler
        if type(batches) is BatchSampler:
            of_own = BatchSampler(own, batches.batch_size, batches.drop_last)
            loader.__dict__["batch_sampler"] = of_own


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


def _seed(device: torch.device, *key: int | str) -> None:
    """Seed everything that `extra_pass` puts back."""
    seed = stream(torch.device("cpu"), *key).initial_seed()
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
