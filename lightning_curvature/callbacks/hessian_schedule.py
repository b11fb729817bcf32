"""HessianSchedule: decides when a curvature optimizer refreshes its curvature."""

import inspect
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_curvature.checks import check_interval
from lightning_curvature.curvature.schedule import (
    DriftInterval,
    FixedInterval,
    RefreshSchedule,
    WarmupInterval,
)
from lightning_curvature.curvature.time_budget import TimeBudget
from lightning_curvature.optim.base import CurvatureOptimizer
from lightning_curvature.oracle.ranks import mean_over_ranks

__all__ = ["HessianSchedule"]

# What is owned if nothing is named. The logged interval is that of one of these, too.
_CURVATURE_INTERVALS = (
    "hessian_update_interval",
    "curvature_update_interval",
    "factor_update_interval",
)


class HessianSchedule(Callback):
    """Decide when a curvature optimizer refreshes its curvature.

    Takes the place of the optimizer's ``hessian_update_interval``, ``curvature_update_interval`` or
    ``factor_update_interval`` while a fit lasts. Steps are optimizer steps, whatever the
    accumulation.

    - ``HessianSchedule(10)`` refreshes on every tenth step, as the interval itself would.
    - ``HessianSchedule(10, warmup_steps=100)`` refreshes on each of the first 100 steps before.
    - ``HessianSchedule(10, adaptive=True)`` doubles the interval while curvature changes little and
      halves it while it changes much.
    - ``max_extra_time_percent=5`` on top of any of these postpones refreshes that would cost more.

    | key | meaning | unit |
    | --- | --- | --- |
    | `curvature/update_interval` | present interval | optimizer steps |
    | `curvature/curvature_drift` | relative change by the last refresh, from the optimizer | 1 |

    Decisions are the same on all ranks. What they depend on is saved with the optimizer, so a run
    resumes exactly, in the middle of an interval too; but a time budget measures anew. Without this
    callback a checkpoint continues with the optimizer's own interval, and a later run with the
    callback from where the schedule stopped. If the settings here differ from those of the
    checkpoint they win, and only the step of the last refresh is taken from it.

    Cost: nothing, but for the time budget: on a GPU it waits for the device before and after two
    steps per refresh, and after the first dozen of refreshes at one in ten of them; several ranks
    then exchange two numbers.

    Args:
        interval: Optimizer steps between two refreshes, or the first interval if ``adaptive``. None
            for the optimizer's own.
        warmup_steps: Optimizer steps at the start with an interval of their own.
        warmup_interval: Interval during these steps.
        adaptive: Whether the interval follows the drift, the relative change that a refresh makes.
            The optimizer must measure it.
        min_interval: Shortest interval if ``adaptive``.
        max_interval: Longest interval if ``adaptive``; None for 16 times the first.
        low_drift: Drift below which the interval doubles.
        high_drift: Drift above which the interval halves.
        max_extra_time_percent: Most time that refreshing may take, in percent of the time of the
            steps without it; measured in the run, data loading left out. None for no limit.
        interval_name: Hyper-parameter to own, such as "damping_update_interval". None for the one
            of the three above that the optimizer has.

    Raises:
        MisconfigurationException: If no optimizer of the Trainer has such an interval, or somebody
            else owns it (when fit starts).
        ValueError: If an argument is out of range.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> schedule = HessianSchedule(10, warmup_steps=100, max_extra_time_percent=5)
        >>> trainer = Trainer(callbacks=[schedule], accelerator="cpu", logger=False)
    """

    def __init__(
        self,
        interval: int | None = None,
        warmup_steps: int = 0,
        warmup_interval: int = 1,
        adaptive: bool = False,
        min_interval: int = 1,
        max_interval: int | None = None,
        low_drift: float = 0.05,
        high_drift: float = 0.2,
        max_extra_time_percent: float | None = None,
        interval_name: str | None = None,
    ) -> None:
        super().__init__()
        if interval is not None:
            check_interval("interval", interval)
        if warmup_steps != 0:
            check_interval("warmup_steps", warmup_steps)
        check_interval("warmup_interval", warmup_interval)
        self.interval = interval
        self.warmup_steps = warmup_steps
        self.warmup_interval = warmup_interval
        self.adaptive = adaptive
        self.min_interval = min_interval
        self.max_interval = max_interval
        self.low_drift = low_drift
        self.high_drift = high_drift
        self.max_extra_time_percent = max_extra_time_percent
        self.interval_name = interval_name
        self._owned: list[_Owned] = []
        # The rest is checked where the rules are made; an interval that is not known yet suits all.
        first = interval or max(min_interval, max_interval or 1)
        self._make_rule(first, None)

    def _make_rule(
        self, interval: int, mean: Callable[[Sequence[float]], Sequence[float]] | None
    ) -> RefreshSchedule:
        """Make the rule for an optimizer whose own interval is given."""
        interval = self.interval or interval
        rule: RefreshSchedule = FixedInterval(interval)
        if self.adaptive:
            limits = (self.min_interval, self.max_interval, self.low_drift, self.high_drift)
            rule = DriftInterval(interval, *limits)
        if self.warmup_steps:
            then = rule if self.adaptive else interval
            rule = WarmupInterval(self.warmup_steps, self.warmup_interval, then)
        if self.max_extra_time_percent is not None:
            rule = TimeBudget(rule, self.max_extra_time_percent, mean)
        return rule

    @property
    def schedules(self) -> list[RefreshSchedule]:
        """The rules at work, one per optimizer; empty outside of a fit."""
        return [owned.rule for owned in self._owned]

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the intervals over; earlier the optimizers do not exist."""
        self._release()
        found = [
            (optimizer, name)
            for optimizer in trainer.optimizers
            if isinstance(optimizer, CurvatureOptimizer)
            and (name := self._name_in(optimizer)) is not None
        ]
        if not found:
            raise MisconfigurationException(self._nothing_found(trainer))
        for optimizer, name in found:
            self._refuse_second_owner(trainer, optimizer, name)
            device = optimizer.param_groups[0]["params"][0].device
            mean = _MeanOverRanks(device) if trainer.world_size > 1 else None
            rule = self._make_rule(int(optimizer.param_groups[0][name]), mean)
            optimizer.own_interval(name, rule)
            self._owned.append(_Owned(optimizer, name, rule, device))

    def _name_in(self, optimizer: CurvatureOptimizer) -> str | None:
        names = _CURVATURE_INTERVALS if self.interval_name is None else (self.interval_name,)
        return next((name for name in names if name in optimizer.intervals), None)

    def _nothing_found(self, trainer: Trainer) -> str:
        wanted = self.interval_name or ", ".join(_CURVATURE_INTERVALS[:2])
        if self.interval_name is None:
            wanted += f" or {_CURVATURE_INTERVALS[2]}"
        offers = [
            f"{type(optimizer).__name__} with "
            f"{', '.join(getattr(optimizer, 'intervals', ())) or 'no interval'}"
            for optimizer in trainer.optimizers
        ]
        return (
            f"HessianSchedule found no optimizer with {wanted}. Got: "
            f"{'; '.join(offers) or 'no optimizer'}. Use an optimizer of lightning_curvature that "
            "refreshes something, name its interval with interval_name, or remove the callback."
        )

    def _refuse_second_owner(
        self, trainer: Trainer, optimizer: CurvatureOptimizer, name: str
    ) -> None:
        owner: Any = optimizer._schedules.get(name)
        if owner is None:
            return
        others: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for callback in others:
            if isinstance(callback, HessianSchedule) and owner in callback.schedules:
                owner = callback
        raise MisconfigurationException(
            f"{name} of {type(optimizer).__name__} has two owners: {owner!r} and {self!r}. Remove "
            "one of them, or let them own different intervals with interval_name."
        )

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Show the present interval, and start the clock where the time is of use."""
        for owned in self._owned:
            owned.show_interval()
            owned.start()

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Stop the clock, and hand over the time of a complete step."""
        for owned in self._owned:
            owned.stop()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Give the intervals back: Lightning does not call ``teardown`` after an exception."""
        self._release()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the intervals back."""
        self._release()

    def _release(self) -> None:
        while self._owned:
            self._owned.pop().release()

    def __getstate__(self) -> dict[str, Any]:
        """Leave what belongs to one run out of pickles."""
        return {**self.__dict__, "_owned": []}

    def __repr__(self) -> str:
        arguments = inspect.signature(HessianSchedule).parameters
        shown = [
            f"{name}={getattr(self, name)!r}"
            for name, argument in arguments.items()
            if getattr(self, name) != argument.default
        ]
        return f"HessianSchedule({', '.join(shown)})"


class _Owned:
    """An interval that is owned, and the clock for its steps.

    Args:
        optimizer: The optimizer.
        name: The interval.
        rule: Decides in its place.
        device: Device of the parameters.
    """

    def __init__(
        self, optimizer: CurvatureOptimizer, name: str, rule: RefreshSchedule, device: torch.device
    ) -> None:
        self.optimizer = optimizer
        self.name = name
        self.rule = rule
        self._device = device
        self._stat = "update_interval" if name in _CURVATURE_INTERVALS else name
        self._shown = -1
        self._several = False
        # Of the step under way: its number, whether its time is wanted, the time so far.
        self._step: int | None = None
        self._wanted = False
        self._seconds = 0.0
        self._started: float | None = None

    def _next(self) -> int:
        """Return the number by which the optimizer asks about its next step."""
        # Those that refresh after a step ask about the one that comes then.
        return self.optimizer._steps_done + int(getattr(self.optimizer, "_ahead", 0))

    def show_interval(self) -> None:
        """Put the present interval into the optimizer's ``stats``."""
        interval = self.rule.interval_at(self._next())
        if interval != self._shown or self._stat not in self.optimizer.stats:
            # Filled on the device: copying a number there would wait for it.
            self.optimizer.stats[self._stat] = torch.full((), float(interval), device=self._device)
            self._shown = interval

    def start(self) -> None:
        """Start or continue to measure a step, if its duration is wanted."""
        if not isinstance(self.rule, TimeBudget):
            return
        if self._step is None:
            self._step = self._next()
            self._wanted = self._several or self.rule.wants_time(self._step)
            self._seconds = 0.0
        if self._wanted:
            self._started = self._now()

    def stop(self) -> None:
        """Stop the clock, and tell the rule if the step is complete."""
        if not isinstance(self.rule, TimeBudget) or self._step is None:
            return
        if self._started is not None:
            self._seconds += self._now() - self._started
            self._started = None
        steps = self._next() - self._step
        if steps == 0:  # in the middle of an accumulation window
            return
        if self._wanted:
            self.rule.measured(self._step, self._seconds, steps)
        # Manual optimization may take several steps per batch; then refreshes hide among them.
        self._several = steps > 1
        self._step = None

    def _now(self) -> float:
        if self._device.type != "cpu":
            torch.get_device_module(self._device).synchronize()
        return time.perf_counter()

    def release(self) -> None:
        """Let the interval decide again."""
        self.optimizer.release_interval(self.name)
        self.optimizer.stats.pop(self._stat, None)


class _MeanOverRanks:
    """Averages a few numbers over the ranks.

    Args:
        device: Where the ranks can exchange tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, values: Sequence[float]) -> list[float]:
        """Return the averages; one collective."""
        packed = torch.tensor(list(values), dtype=torch.float32, device=self._device)
        averages: list[float] = mean_over_ranks(packed).tolist()
        return averages
