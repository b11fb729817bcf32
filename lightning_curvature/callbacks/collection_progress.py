"""A bar for what takes long between the batches of training, of the kind that the Trainer shows."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

__all__ = ["collection_progress"]


@contextmanager
def collection_progress(
    trainer: Trainer, description: str, total: int
) -> Iterator[Callable[[], None]]:
    """Show a bar below that of training while the context lasts; nothing if the Trainer has none.

    Args:
        trainer: The Trainer.
        description: What is going on.
        total: Number of times that the function given will be called.
    """
    shown = trainer.progress_bar_callback
    if isinstance(shown, TQDMProgressBar) and shown.is_enabled:
        # The bar of validation looks as the user wants bars to look, and leaves nothing behind.
        bar = shown.init_validation_tqdm()
        bar.set_description(description)
        bar.reset(total=total)

        def advance() -> None:
            bar.update()

        try:
            yield advance
        finally:
            bar.close()
    elif isinstance(shown, RichProgressBar) and shown.is_enabled and shown.progress is not None:
        progress, task = shown.progress, shown._add_task(total, description)
        try:
            yield lambda: progress.update(task, advance=1)
        finally:
            progress.remove_task(task)
    else:
        yield lambda: None
