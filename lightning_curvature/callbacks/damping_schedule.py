"""DampingSchedule: sets or adapts the damping of curvature optimizers."""

import math
from collections.abc import Callable
from numbers import Real
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_curvature.checks import check_choice, check_in_range, check_interval, check_positive
from lightning_curvature.curvature.damping_shapes import DAMPING_SHAPES, shaped_damping
from lightning_curvature.curvature.schedule import FixedInterval
from lightning_curvature.optim.base import CurvatureOptimizer

__all__ = ["DampingSchedule"]

_LM: Literal["levenberg-marquardt"] = "levenberg-marquardt"
_INTERVAL = "damping_update_interval"
_RULE_ARGUMENTS = (
    "damping_increase_factor",
    "damping_decrease_factor",
    _INTERVAL,
    "min_damping",
    "max_damping",
)


class DampingSchedule(Callback):
    """Set the damping as a function of the step, or let it adapt by Levenberg-Marquardt.

    Owns the damping of every optimizer in the Trainer that has one, while a fit lasts. The
    optimizer's own algorithm rests meanwhile, and goes on from the last damping afterwards.

    - ``DampingSchedule("exponential", start=1.0, end=1e-4, steps=1000)`` goes from one value to
      another and stays there.
    - ``DampingSchedule(lambda step: 1 / (1 + step))`` does what you want.
    - ``DampingSchedule("levenberg-marquardt", damping_decrease_factor=0.9)`` raises the damping
      where the reduction ratio is below 1/4 and lowers it where it is above 3/4.

    The step is the number of optimizer steps done, which is saved with the optimizer, as the
    damping is: a run resumes exactly. All parameter groups get the same damping. A schedule of
    values looks at no new loss, so `AdamQLR` then measures no reduction ratio, which saves a
    forward. Without this callback a checkpoint continues with the optimizer's own algorithm.

    Args:
        schedule: A shape from ``start`` to ``end``, the rule "levenberg-marquardt", or a function
            from step to damping.
        start: Damping of the first step, for a shape; at least 0.
        end: Damping after ``steps`` steps, for a shape other than "constant"; at least 0.
        steps: Optimizer steps from ``start`` to ``end``; None for all of the fit.
        damping_increase_factor: Factor for a low reduction ratio; at least 1. None, here and below,
            for the optimizer's own. These five belong to "levenberg-marquardt".
        damping_decrease_factor: Factor for a high reduction ratio; in (0, 1].
        damping_update_interval: Optimizer steps between two adaptations; each costs one forward.
        min_damping: Lower limit of the adapted damping; at least 0.
        max_damping: Upper limit of the adapted damping.

    Raises:
        MisconfigurationException: If no optimizer of the Trainer is damped, one measures no
            reduction ratio and "levenberg-marquardt" was asked for, or there is a second owner
            (when fit starts).
        ValueError: If an argument, or what a function returned, is out of range.
        TypeError: If an argument, or what a function returned, has the wrong type.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> schedule = DampingSchedule("exponential", start=1.0, end=1e-4, steps=1000)
        >>> trainer = Trainer(callbacks=[schedule], accelerator="cpu", logger=False)
    """

    def __init__(
        self,
        schedule: Literal["constant", "linear", "exponential", "cosine", "levenberg-marquardt"]
        | Callable[[int], float],
        start: float | None = None,
        end: float | None = None,
        steps: int | None = None,
        damping_increase_factor: float | None = None,
        damping_decrease_factor: float | None = None,
        damping_update_interval: int | None = None,
        min_damping: float | None = None,
        max_damping: float | None = None,
    ) -> None:
        super().__init__()
        self.schedule = schedule
        self.start = start
        self.end = end
        self.steps = steps
        self.rule_settings: dict[str, Any] = {
            "damping_increase_factor": damping_increase_factor,
            "damping_decrease_factor": damping_decrease_factor,
            _INTERVAL: damping_update_interval,
            "min_damping": min_damping,
            "max_damping": max_damping,
        }
        self._check()
        self._owned: list[tuple[CurvatureOptimizer, RemovableHandle | None]] = []
        self._own_intervals: list[CurvatureOptimizer] = []

    def _check(self) -> None:
        if not callable(self.schedule):
            check_choice("schedule", self.schedule, (*DAMPING_SHAPES, _LM))
        shaped = self.schedule in DAMPING_SHAPES
        wanted = {"start": shaped, "end": shaped and self.schedule != "constant"}
        given = {"start": self.start, "end": self.end, "steps": self.steps}
        for name, value in given.items():
            if value is None and wanted.get(name):
                raise ValueError(f"Invalid {name}=None: schedule={self.schedule!r} needs it.")
            if value is not None and not wanted.get(name, wanted["end"]):
                raise ValueError(
                    f"Invalid {name}={value!r}: it has no meaning with schedule={self.schedule!r}."
                )
        zero = self.schedule != "exponential"  # which never gets there by factors
        for name in ("start", "end"):
            if given[name] is not None:
                check_positive(name, given[name], zero=zero)
                check_in_range(name, given[name], 0, math.inf)
        if self.steps is not None:
            check_interval("steps", self.steps)
        self._check_rule()

    def _check_rule(self) -> None:
        given = {name: value for name, value in self.rule_settings.items() if value is not None}
        if given and self.schedule != _LM:
            name, value = next(iter(given.items()))
            raise ValueError(
                f"Invalid {name}={value!r}: it has no meaning with schedule={self.schedule!r}."
            )
        for name, value in given.items():
            if name == "damping_increase_factor":
                check_in_range(name, value, 1, math.inf)
            elif name == "damping_decrease_factor":
                check_in_range(name, value, 0, 1, include_low=False, include_high=True)
            elif name == _INTERVAL:
                check_interval(name, value)
            elif name == "min_damping":
                check_positive(name, value, zero=True)
            else:
                low = given.get("min_damping", 0)
                check_in_range(name, value, low, math.inf, include_high=True)

    # A fit

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the damping over; earlier the optimizers do not exist."""
        self._release()
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        both = [callback for callback in callbacks if isinstance(callback, DampingSchedule)]
        if len(both) > 1:
            raise MisconfigurationException(
                f"The damping has two owners: {both[0]!r} and {both[1]!r}. Remove one of them."
            )
        damped = [
            optimizer
            for optimizer in trainer.optimizers
            if isinstance(optimizer, CurvatureOptimizer) and "damping" in optimizer.defaults
        ]
        if not damped:
            names = ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers)
            raise MisconfigurationException(
                f"DampingSchedule found no optimizer with a damping. Got: {names or 'none'}. Use "
                "one such as AdamQLR, or remove the callback."
            )
        values = None if self.schedule == _LM else self._values(trainer)
        for optimizer in damped:
            if values is None:
                self._adapt(optimizer)
            else:
                self._set(optimizer, values)

    def _values(self, trainer: Trainer) -> Callable[[int], float]:
        """Return the damping as a function of the step."""
        schedule = self.schedule
        if callable(schedule):
            return schedule
        steps = self.steps
        if steps is None and schedule != "constant":
            known = trainer.estimated_stepping_batches
            if math.isinf(known) or known < 0:  # loaders without a length give -1
                raise MisconfigurationException(
                    f"{self!r} needs steps: the Trainer does not know how many there will be."
                )
            steps = max(int(known), 1)
        start, end = float(self.start or 0), float(self.end or 0)
        # The word was checked to be one of the shapes.
        return lambda step: shaped_damping(schedule, step, start, end, steps or 1)  # type: ignore[arg-type]

    def _set(self, optimizer: CurvatureOptimizer, values: Callable[[int], float]) -> None:
        """Set the damping before every step."""
        own_damping = getattr(optimizer, "own_damping", None)
        if own_damping is not None:
            own_damping("fixed")
            self._owned.append((optimizer, None))
        first = self._checked(values, optimizer._steps_done)
        optimizer._check_group({**optimizer.param_groups[0], "damping": first})

        def before_step(_: Optimizer, args: Any, kwargs: Any) -> None:
            _write(optimizer, self._checked(values, optimizer._steps_done))

        self._owned.append((optimizer, optimizer.register_step_pre_hook(before_step)))

    def _checked(self, values: Callable[[int], float], step: int) -> float:
        value: object = values(step)
        where = f"schedule({step}) of DampingSchedule returned {value!r}"
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        if not isinstance(value, Real):
            raise TypeError(f"{where}: must be a number.")
        number = float(value)
        if not (math.isfinite(number) and number >= 0):
            raise ValueError(f"{where}: must be finite and >= 0.")
        return number

    def _adapt(self, optimizer: CurvatureOptimizer) -> None:
        """Let the optimizer's rule run with the arguments given here."""
        name = type(optimizer).__name__
        own_damping = getattr(optimizer, "own_damping", None)
        if own_damping is None:
            raise MisconfigurationException(
                f"{name} measures no reduction ratio, which DampingSchedule('{_LM}') goes by. Use "
                "a schedule of values such as 'exponential', or an optimizer such as AdamQLR."
            )
        settings = dict(self.rule_settings)
        interval = settings.pop(_INTERVAL)
        own_damping(_LM, **settings)
        self._owned.append((optimizer, None))
        if interval is not None:
            try:
                optimizer.own_interval(_INTERVAL, FixedInterval(interval))
            except RuntimeError as error:
                raise MisconfigurationException(
                    f"{error} Leave {_INTERVAL} of {self!r} away."
                ) from error
            self._own_intervals.append(optimizer)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Give the damping back: Lightning does not call ``teardown`` after an exception."""
        self._release()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the damping back."""
        self._release()

    def _release(self) -> None:
        while self._owned:
            optimizer, hook = self._owned.pop()
            if hook is not None:
                hook.remove()
            else:
                optimizer.release_damping()  # type: ignore[attr-defined]
        while self._own_intervals:
            self._own_intervals.pop().release_interval(_INTERVAL)

    def __getstate__(self) -> dict[str, Any]:
        """Leave what belongs to one run out of pickles."""
        return {**self.__dict__, "_owned": [], "_own_intervals": []}

    def __repr__(self) -> str:
        arguments = {"start": self.start, "end": self.end, "steps": self.steps}
        given = {**arguments, **self.rule_settings}
        words = [f"{name}={value!r}" for name, value in given.items() if value is not None]
        return f"DampingSchedule({', '.join([repr(self.schedule), *words])})"


def _write(optimizer: CurvatureOptimizer, damping: float) -> None:
    """Set the damping of all groups, without waiting for the device."""
    groups = optimizer.param_groups
    old = groups[0]["damping"]
    # One tensor for all groups, as the optimizer has it.
    new = torch.full_like(old, damping) if isinstance(old, Tensor) else damping
    for group in groups:
        group["damping"] = new
