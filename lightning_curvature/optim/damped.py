"""DampedOptimizer: an optimizer with a damping that is adapted, by itself or from outside."""

from abc import abstractmethod
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_curvature import vectors
from lightning_curvature.curvature.damping import clamp
from lightning_curvature.optim.base import CurvatureOptimizer
from lightning_curvature.optim.failures import FailureCounter
from lightning_curvature.oracle.protocol import Oracle

__all__ = ["DampedOptimizer", "plain"]

_OWN_PER_GROUP = ("params", "lr", "weight_decay")


def plain(group: dict[str, Any]) -> dict[str, Any]:
    """Return hyper-parameters as they are kept: numbers of torch or Python, no others."""
    return {
        key: value if isinstance(value, int) or not isinstance(value, Real) else float(value)
        for key, value in group.items()
    }


class DampedOptimizer(CurvatureOptimizer):
    """Base of the optimizers that adapt their damping.

    Hyper-parameters other than ``lr`` and ``weight_decay`` are one value for all groups. The
    damping is kept in the groups, as a tensor.

    Args:
        params: Parameters or parameter groups.
        defaults: Hyper-parameters.
    """

    damping_interval: ClassVar[str] = "damping_update_interval"

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        damping = torch.tensor(float(defaults["damping"]), dtype=torch.float64)
        super().__init__(params, plain({**defaults, "damping": damping}))
        self.damping = self.param_groups[0]["damping"]
        self._failures = self._new_failure_counter()
        # Hyper-parameters about the damping that hold while somebody else owns it.
        self._damping_settings: dict[str, Any] | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickle or deep copy."""
        super().__setstate__(state)
        self.__dict__.setdefault("_damping_settings", None)
        self._failures = self._new_failure_counter(resumed=True)

    @abstractmethod
    def _new_failure_counter(self, *, resumed: bool = False) -> FailureCounter:
        """Return what watches for unusable steps.

        Args:
            resumed: Whether counts come from a checkpoint.
        """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group.

        Args:
            param_group: As for every torch optimizer.

        Raises:
            ValueError: If an argument is out of range, or differs from the other groups though it
                is one value for all.
        """
        self._check_group({**self.defaults, **plain(param_group)})
        super().add_param_group(plain(param_group))

    @property
    def shared(self) -> tuple[str, ...]:
        """Names of the hyper-parameters that are one value for all groups."""
        own = {*_OWN_PER_GROUP, "differentiable"}  # torch adds the last one to the defaults
        return tuple(name for name in self.defaults if name not in own)

    @property
    def damping(self) -> float:
        """Present damping; reading it waits for the device."""
        return float(self.param_groups[0]["damping"])

    @damping.setter
    def damping(self, value: float | Tensor) -> None:
        params = self._all_params()
        dtype = vectors.scalar_dtype(params)
        self._share_damping(torch.as_tensor(value, dtype=dtype, device=params[0].device))

    def _share_damping(self, damping: Tensor) -> None:
        for group in self.param_groups:
            group["damping"] = damping

    def own_damping(self, algorithm: str, **settings: float | None) -> None:
        """Replace the algorithm that adapts the damping, until `release_damping`.

        Groups and checkpoints keep the optimizer's own settings.

        Args:
            algorithm: What adapts the damping; "fixed" if somebody sets it from outside.
            **settings: Arguments of the algorithm, as in the constructor; None for the optimizer's
                own.

        Raises:
            RuntimeError: If the damping is owned already.
            ValueError: If a setting is out of range.
            TypeError: If a setting has the wrong type.
        """
        real = self._unwrapped()
        assert isinstance(real, DampedOptimizer)
        if real._damping_settings is not None:
            raise RuntimeError(f"The damping of {type(real).__name__} has an owner already.")
        given = {name: value for name, value in settings.items() if value is not None}
        owned = {"damping_algorithm": algorithm, **given}
        real._check_group({**real.param_groups[0], **owned})
        real._damping_settings = owned

    def release_damping(self) -> None:
        """Let the optimizer's own algorithm go on from the present damping."""
        real = self._unwrapped()
        assert isinstance(real, DampedOptimizer)
        real._damping_settings = None

    def _settings(self) -> dict[str, Any]:
        """Return the hyper-parameters in force: those of the first group, unless owned."""
        group = self.param_groups[0]
        return group if self._damping_settings is None else {**group, **self._damping_settings}

    def _scalar(self, name: str, like: Tensor) -> Tensor:
        """Return a number of the state, 0 if it is not there yet."""
        return torch.as_tensor(self._scalars.get(name, 0.0), dtype=like.dtype, device=like.device)

    def _damping_due(self) -> bool:
        """Tell whether the coming step adapts the damping."""
        return self._settings()["damping_algorithm"] != "fixed" and self._due(self.damping_interval)

    def _clamped(self, damping: Tensor, group: dict[str, Any]) -> Tensor:
        return clamp(damping, group["min_damping"], group["max_damping"])

    def _scale_by_group_lr(self, params: list[Tensor], direction: list[Tensor]) -> float:
        """Make the direction proportional to the groups' ``lr`` and return the largest."""
        rates = [float(group["lr"]) for group in self.param_groups]
        top = max(rates)
        if top > 0 and any(rate != top for rate in rates):
            relative = {
                id(p): rate / top
                for group, rate in zip(self.param_groups, rates, strict=True)
                for p in group["params"]
            }
            for p, d in zip(params, direction, strict=True):
                d.mul_(relative[id(p)])
        return top

    # One step

    def _update(self, params: list[Tensor], oracle: Oracle | None) -> None:
        assert oracle is not None
        dtype = vectors.scalar_dtype(params)
        damping = self.param_groups[0]["damping"]
        damping = torch.as_tensor(damping, dtype=dtype, device=params[0].device)
        # Extra passes run user code: whatever it raises, the weights are those before the step.
        saved = vectors.clone(params) if self._runs_again() else None
        try:
            counts = self._step_with(params, oracle, damping, saved)
        except BaseException:
            if saved is not None:
                vectors.copy_(params, saved)
            raise
        self._failures.check(counts, self._steps_done + 1, self.stats)

    @abstractmethod
    def _runs_again(self) -> bool:
        """Tell whether the coming step evaluates its batches again, with other parameters."""

    @abstractmethod
    def _step_with(
        self, params: list[Tensor], oracle: Oracle, damping: Tensor, saved: list[Tensor] | None
    ) -> dict[str, Tensor]:
        """Take the step; return the counts of unusable ones.

        Args:
            params: Parameters with a gradient.
            oracle: The oracle.
            damping: Present damping, a 0-dim tensor.
            saved: Copies of the parameters, if the step runs its batches again.
        """

    def _decay(self, length: Tensor, top_lr: float) -> None:
        """Shrink the weights as AdamW does, in proportion to the learning rate used.

        Args:
            length: That of the group with the largest ``lr``, a 0-dim tensor.
            top_lr: The largest ``lr``.
        """
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if group["weight_decay"] != 0 and top_lr > 0 and params:
                rate = length.clamp_min(0.0) * (float(group["lr"]) / top_lr * group["weight_decay"])
                vectors.scale_(params, 1.0 - rate)
