"""Squared gradients of the training loss, measured beside a Trainer's training without a trace."""

from collections.abc import Sequence
from itertools import chain, islice
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_curvature.callbacks.extra_batches import (
    extra_training_steps,
    own_batches,
    training_loss,
)
from lightning_curvature.oracle.ranks import mean_over_ranks

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
    device = params[0].device
    sums = [torch.zeros_like(p, dtype=torch.float32).detach() for p in params]
    done, ready = 0, [] if batch is None else [batch]
    steps = extra_training_steps(trainer, device, "squared gradients", *key, eval_mode=eval_mode)
    with steps, own_batches(trainer, "squared gradients need", key) as more:
        for batch_idx, one in enumerate(chain(ready, islice(more, num_batches - len(ready)))):
            loss = training_loss(trainer, one, batch_idx)
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


def _add_squares(sums: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    for total, grad in zip(sums, grads, strict=True):
        if grad is not None:
            total.add_((grad.to_dense() if grad.is_sparse else grad).float().square())
