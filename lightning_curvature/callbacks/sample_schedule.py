"""SampleSchedule: sets how many directions a zeroth-order optimizer looks along."""

import inspect
import math
from collections.abc import Callable
from typing import Any, Literal, TypeGuard

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_curvature.checks import check_choice, check_count, check_positive
from lightning_curvature.curvature.query_schedule import adazeta_num_samples, linear_num_samples
from lightning_curvature.optim.zeroth_order import ZerothOrderOptimizer

__all__ = ["SampleSchedule"]

_SHAPES = ("adazeta", "linear")


class SampleSchedule(Callback):
    """Set ``num_samples`` of zeroth-order optimizers as a function of epoch or step.

    Few directions do while the loss falls fast; more of them average the noise out later.

    - ``SampleSchedule("adazeta")`` grows from 1 to ``largest`` with the epochs: ``shrink * epoch **
      b`` rounded down, where b is such that ``nominal`` would be reached after the last one.
    - ``SampleSchedule("linear", largest=8)`` grows evenly with the optimizer steps.
    - ``SampleSchedule(lambda step: 1 + step // 1000)`` does what you want.

    Passes per step grow with the number, and so does the time of a step. Epochs and steps are those
    of the run as a whole, so a run resumes exactly. Without this callback a checkpoint continues
    with the number it was saved with.

    Args:
        schedule: A shape, "adazeta" or "linear", or a function from optimizer step to number.
        largest: Largest number, >= 1; None for 15, or for "linear" the optimizer's own.
        horizon: Epochs ("adazeta") or optimizer steps ("linear") in all, >= 1; None for those of
            the Trainer.
        nominal: Number that "adazeta" aims at, >= 1.
        shrink: Factor of "adazeta", > 0 and below ``nominal``.

    Raises:
        MisconfigurationException: If no optimizer of the Trainer has ``num_samples``, one has
            ``estimator="residual"``, the Trainer does not know the horizon, or there is a second
            owner (when fit starts).
        ValueError: If an argument, or what a function returned, is out of range.
        TypeError: If an argument, or what a function returned, has the wrong type.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_curvature import SampleSchedule
        >>> schedule = SampleSchedule("adazeta", nominal=20, largest=15)
        >>> trainer = Trainer(callbacks=[schedule], accelerator="cpu", logger=False)
    """

    def __init__(
        self,
        schedule: Literal["adazeta", "linear"] | Callable[[int], int] = "adazeta",
        largest: int | None = None,
        horizon: int | None = None,
        nominal: int = 20,
        shrink: float = 0.85,
    ) -> None:
        super().__init__()
        if not callable(schedule):
            check_choice("schedule", schedule, _SHAPES)
        if largest is not None:
            check_count("largest", largest)
        if horizon is not None:
            check_count("horizon", horizon)
        check_count("nominal", nominal)
        check_positive("shrink", shrink)
        if not shrink < nominal:
            raise ValueError(f"Invalid shrink={shrink!r}: must be below nominal={nominal}.")
        for name, value in (("largest", largest), ("horizon", horizon)):
            if callable(schedule) and value is not None:
                raise ValueError(f"Invalid {name}={value!r}: it has no meaning with a function.")
        self.schedule = schedule
        self.largest = largest
        self.horizon = horizon
        self.nominal = nominal
        self.shrink = shrink
        self._hooks: list[RemovableHandle] = []

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the number over; earlier the optimizers do not exist."""
        self._release()
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        both = [callback for callback in callbacks if isinstance(callback, SampleSchedule)]
        if len(both) > 1:
            raise MisconfigurationException(
                f"num_samples has two owners: {both[0]!r} and {both[1]!r}. Remove one of them."
            )
        found = [optimizer for optimizer in trainer.optimizers if _looks_along_some(optimizer)]
        if not found:
            names = ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers)
            raise MisconfigurationException(
                f"SampleSchedule found no optimizer with num_samples. Got: {names or 'none'}. Use "
                "one such as MeZO, or remove the callback."
            )
        for optimizer in found:
            if optimizer.param_groups[0].get("estimator") == "residual":
                raise MisconfigurationException(
                    f"{type(optimizer).__name__}(estimator='residual') takes one direction per "
                    "step. Use estimator='two_sided', or remove SampleSchedule."
                )
            self._own(optimizer, self._rule(trainer, optimizer))

    def _rule(self, trainer: Trainer, optimizer: Optimizer) -> Callable[[int], int]:
        """Return the number as a function of the optimizer step."""
        if callable(self.schedule):
            return self.schedule
        if self.schedule == "adazeta":
            epochs, largest = self._epochs(trainer), self.largest or 15
            return lambda _: adazeta_num_samples(
                trainer.current_epoch, epochs, self.nominal, self.shrink, largest
            )
        steps = self._steps(trainer)
        # Not that of a checkpoint, which is the one of its step.
        own = int(optimizer.defaults["num_samples"])
        return lambda step: linear_num_samples(step, steps, self.largest or own)

    def _epochs(self, trainer: Trainer) -> int:
        epochs = trainer.max_epochs if self.horizon is None else self.horizon
        if epochs is None or epochs < 1:
            raise MisconfigurationException(
                f"{self!r} needs horizon: the Trainer does not know how many epochs there will be."
            )
        return epochs

    def _steps(self, trainer: Trainer) -> int:
        if self.horizon is not None:
            return self.horizon
        known = trainer.estimated_stepping_batches
        if math.isinf(known) or known < 0:  # loaders without a length give -1
            raise MisconfigurationException(
                f"{self!r} needs horizon: the Trainer does not know how many steps there will be."
            )
        return max(int(known), 1)

    def _own(self, optimizer: ZerothOrderOptimizer, rule: Callable[[int], int]) -> None:
        def before_step(*_: Any) -> None:
            number = rule(optimizer._steps_done)
            check_count("num_samples", number)
            for group in optimizer.param_groups:
                group["num_samples"] = number

        self._hooks.append(optimizer.register_step_pre_hook(before_step))

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave the number alone: Lightning does not call ``teardown`` after an exception."""
        self._release()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the number alone from now on."""
        self._release()

    def _release(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def __getstate__(self) -> dict[str, Any]:
        """Leave what belongs to one run out of pickles."""
        return {**self.__dict__, "_hooks": []}

    def __repr__(self) -> str:
        return f"SampleSchedule({self.schedule!r}, largest={self.largest}, horizon={self.horizon})"


def _looks_along_some(optimizer: Optimizer) -> TypeGuard[ZerothOrderOptimizer]:
    """Tell whether the number of directions is an argument; some have a fixed one."""
    arguments = inspect.signature(type(optimizer)).parameters
    return isinstance(optimizer, ZerothOrderOptimizer) and "num_samples" in arguments
