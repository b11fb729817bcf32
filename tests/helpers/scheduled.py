"""What tests of schedules need: who refreshed when, an optimizer that costs time, and the time."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_curvature import HessianSchedule
from lightning_curvature.callbacks import hessian_schedule
from lightning_curvature.checks import check_positive
from lightning_curvature.optim.diagonal import DiagonalOptimizer
from lightning_curvature.oracle import Oracle
from tests.helpers.modules import loader, mlp_module, vectors
from tests.helpers.probing import make_trainer
from tests.helpers.ranks import world


class Clock:
    """A clock that goes on only when it is told to.

    Attributes:
        now: Seconds.
        readings: How often it was read.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.readings = 0

    def __call__(self) -> float:
        """Return the time."""
        self.readings += 1
        return self.now


class Sparse(DiagonalOptimizer):
    """SGD that estimates something now and then; it asks no oracle.

    Args:
        params: Parameters.
        lr: Learning rate.
        damping: A number that does nothing but be there.
        hessian_update_interval: Steps between two estimates.
        drift: Called with the number of the step, returns the drift of its estimate.
        clock: Goes on by 1 in a step, and by ``cost`` more if it estimates.
        cost: Seconds.

    Attributes:
        estimates: Numbers of the steps that estimated, from 0.
        dampings: Damping of every step.
    """

    shared_names = ("hessian_update_interval", "max_failures", "foreach")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.1,
        damping: float = 1e-3,
        hessian_update_interval: int = 1,
        drift: Callable[[int], float] = lambda step: 0.1,
        clock: Clock | None = None,
        cost: float = 0.0,
    ) -> None:
        defaults = {
            "lr": lr,
            "damping": damping,
            "hessian_update_interval": hessian_update_interval,
            "max_failures": 20,
            "foreach": None,
            "maximize": False,
        }
        super().__init__(params, defaults)
        self.drift = drift
        self.clock = Clock() if clock is None else clock
        self.cost = cost
        self.estimates: list[int] = []
        self.dampings: list[float] = []

    def _check_group(self, group: dict[str, Any]) -> None:
        check_positive("damping", group["damping"], zero=True)

    def _prepare(
        self,
        params: list[Tensor],
        oracle: Oracle | None,
        usable: Tensor | None,
        stats: dict[str, Tensor],
    ) -> None:
        self.dampings.append(self.param_groups[-1]["damping"])
        self.clock.now += 1.0
        if self._due("hessian_update_interval"):
            self.estimates.append(self._steps_done)
            self.clock.now += self.cost
            drift = torch.tensor(self.drift(self._steps_done))
            stats["curvature_drift"] = drift
            self._refreshed("hessian_update_interval", drift)

    def _update_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        usable: Tensor | None,
        stats: dict[str, Tensor],
    ) -> None:
        for p in params:
            p.add_(p.grad, alpha=-group["lr"])


class Refreshes(Callback):
    """Notes the optimizer steps that refreshed, whatever the optimizer, and the logged interval.

    Attributes:
        steps: Numbers of the steps by interval, from 0.
        intervals: ``stats["update_interval"]`` after every batch.
    """

    def __init__(self) -> None:
        self.steps: dict[str, list[int]] = {}
        self.intervals: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to the optimizer."""
        optimizer = trainer.optimizers[0]
        original = optimizer._refreshed

        def refreshed(name: str, *args: Any, **kwargs: Any) -> None:
            self.steps.setdefault(name, []).append(optimizer._steps_done)
            original(name, *args, **kwargs)

        optimizer._refreshed = refreshed

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Note the interval."""
        stats = trainer.optimizers[0].stats
        if "update_interval" in stats:
            self.intervals.append(float(stats["update_interval"]))


def fit_sparse(
    schedule: Callback | None,
    batches: int = 20,
    *,
    options: dict[str, Any] | None = None,
    callbacks: Sequence[Callback] = (),
    **settings: Any,
) -> Sparse:
    """Fit on this rank with `Sparse` and return it."""
    module = mlp_module(lambda params: Sparse(params, **(options or {})))
    ranks = world()[1]
    if ranks > 1:
        settings = {"strategy": "ddp", "devices": ranks, **settings}
    trainer = make_trainer(
        "none",
        callbacks=[*([] if schedule is None else [schedule]), *callbacks],
        **settings,
    )
    trainer.fit(module, loader(vectors(4 * batches * ranks)))
    (optimizer,) = trainer.optimizers
    return optimizer


def fit_on_budget(costs: Sequence[float], batches: int) -> tuple[list[int], list[float], int]:
    """Fit with a time budget of 25 % and the refreshes of this rank costing what is given.

    Returns:
        Steps that estimated, intervals after every step, and readings of the clock.
    """
    clock = Clock()
    original = hessian_schedule.time.perf_counter
    hessian_schedule.time.perf_counter = clock
    try:
        noted = Refreshes()
        optimizer = fit_sparse(
            HessianSchedule(1, max_extra_time_percent=25.0),
            batches,
            options={"clock": clock, "cost": costs[world()[0]]},
            callbacks=[noted],
        )
    finally:
        hessian_schedule.time.perf_counter = original
    return optimizer.estimates, noted.intervals, clock.readings
