"""Gradients of single batches as rows on the host, measured beside a Trainer's training."""

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import count
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
from lightning_curvature.oracle.ranks import mean_over_ranks, rank, world_size

__all__ = ["GradientRows", "gradient_rows"]

# So many batches in a row without a gradient are taken to go on forever, if not the whole loader.
_PATIENCE = 100


@dataclass(frozen=True)
class GradientRows:
    """Gradients that were collected.

    Attributes:
        rows: The rows of this rank, ``[rows, positions]``, float32, on the host.
        skipped: Batches left out on all ranks, because the gradient of one of them was not finite
            or ``training_step`` gave no loss.
    """

    rows: Tensor
    skipped: int


def gradient_rows(
    trainer: Trainer,
    params: Sequence[Tensor],
    num_grads: int,
    *key: int,
    positions: Tensor | None = None,
    batch_size: int | None = None,
    advance: Callable[[], None] = lambda: None,
) -> GradientRows:
    """Collect gradients, each of the mean loss of one batch, in eval mode.

    Runs the module's ``training_step`` on an iterator of the train loader of its own, from the
    start as often as it takes. Random numbers depend on the key only. Nothing of it is seen
    afterwards: not in buffers, metrics, logs, gradients or random numbers.

    Args:
        trainer: The Trainer, while it trains.
        params: The parameters; together they are one vector.
        num_grads: Number of gradients of all ranks together; the first ones may have one more than
            the others.
        *key: What random numbers and the order of shuffled batches depend on.
        positions: Entries of the vector to keep, ascending; None for all.
        batch_size: Examples per batch and rank; None for the batches of training. The mean over
            fewer examples has more noise, about as much more curvature.
        advance: Called after every gradient, for a progress bar.

    Raises:
        MisconfigurationException: If the loader cannot be iterated twice, or not be made with that
            batch size, or gave no batch.
        RuntimeError: If there are only batches without a loss, or without a finite gradient.
    """
    device, ranks = params[0].device, world_size()
    columns = _Columns(params, positions)
    own = num_grads // ranks + (rank() < num_grads % ranks)
    # All ranks run the same number of training steps, which may hold collectives.
    rounds = -(-num_grads // ranks)
    rows = torch.empty(own, columns.total, dtype=torch.float32)
    done = skipped = in_a_row = number = 0
    batches = _Batches(trainer, key, batch_size)
    steps = extra_training_steps(trainer, device, "gradient rows", *key, eval_mode=True)
    with steps, closing(batches.endlessly()) as more:
        while done < rounds:
            batch = next(more, None)
            row = None if batch is None else _row(trainer, params, columns, batch[0], number)
            whole, is_there = _on_all_ranks(device, row is not None, batch is not None)
            if not is_there:
                raise MisconfigurationException(
                    "Gradients could not be collected: the train loader gave no batch."
                )
            number += 1
            if whole and row is not None:
                if done < own:
                    rows[done] = row
                done, in_a_row = done + 1, 0
                advance()
                continue
            skipped, in_a_row = skipped + 1, in_a_row + 1
            # Ranks may know of loaders of different lengths: they give up together.
            goes_on, _ = _on_all_ranks(device, in_a_row < batches.patience, True)
            if not goes_on:
                raise RuntimeError(
                    f"Gradients could not be collected: of {in_a_row} batches in a row none had a "
                    "loss from training_step with a finite gradient on every rank. Check the loss, "
                    "or use precision='bf16-mixed' or '32-true', or criterion='magnitude'."
                )
    return GradientRows(rows, skipped)


class _Batches:
    """Batches of the train loader, from its start again when it ends; none if it is empty."""

    def __init__(self, trainer: Trainer, key: tuple[int, ...], batch_size: int | None) -> None:
        self.trainer = trainer
        self.key = key
        self.batch_size = batch_size
        self.patience = _PATIENCE

    def endlessly(self) -> Generator[tuple[Any], None, None]:
        """Yield batches, each in a tuple, since a batch may be None."""
        for number in count():
            given = 0
            with own_batches(
                self.trainer,
                "the gradients of pruning need",
                (*self.key, number),
                batch_size=self.batch_size,
                reshuffle=True,
            ) as batches:
                for batch in batches:
                    given += 1
                    yield (batch,)
            self.patience = min(self.patience, given)
            if not given:
                return


class _Columns:
    """The kept entries of gradients."""

    def __init__(self, params: Sequence[Tensor], positions: Tensor | None) -> None:
        ends = torch.tensor([p.numel() for p in params]).cumsum(0)
        self.total = int(ends[-1]) if positions is None else positions.numel()
        self._of_each: list[Tensor | None] = [None] * len(params)
        if positions is not None:
            at = positions.to("cpu")
            bounds = [0, *torch.searchsorted(at, ends).tolist()]
            self._of_each = [
                (at[low:high] - (end - p.numel())).to(p.device)
                for p, end, low, high in zip(params, ends, bounds, bounds[1:], strict=False)
            ]

    def of(self, params: Sequence[Tensor], grads: Sequence[Tensor | None], scale: float) -> Tensor:
        """Return the kept entries, float32, on the host."""
        parts = []
        for p, grad, at in zip(params, grads, self._of_each, strict=True):
            if grad is None:
                size = p.numel() if at is None else at.numel()
                parts.append(torch.zeros(size, dtype=torch.float32, device=p.device))
                continue
            flat = (grad.to_dense() if grad.is_sparse else grad).reshape(-1)
            parts.append((flat if at is None else flat[at]).float())
        row = torch.cat(parts)
        return (row if scale == 1.0 else row.div_(scale)).cpu()


def _row(
    trainer: Trainer, params: Sequence[Tensor], columns: _Columns, batch: Any, number: int
) -> Tensor | None:
    """Return the gradient of one batch, None if there is none that is finite."""
    loss = training_loss(trainer, batch, number)
    if loss is None or not bool(torch.isfinite(loss).all()):
        return None
    # As in training: float16 gradients would vanish without.
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    scale = 1.0 if scaler is None else float(scaler.get_scale())
    grads = torch.autograd.grad(loss * scale, list(params), allow_unused=True)
    row = columns.of(params, grads, scale)
    return row if bool(torch.isfinite(row).all()) else None


def _on_all_ranks(device: torch.device, *flags: bool) -> tuple[bool, ...]:
    """Tell which of the flags are set on all ranks."""
    if world_size() == 1:
        return flags
    means = mean_over_ranks(torch.tensor([float(flag) for flag in flags], device=device))
    return tuple(mean == 1 for mean in means.tolist())
