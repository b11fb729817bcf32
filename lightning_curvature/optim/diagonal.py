"""Base of optimizers whose step needs a gradient that is finite, and nothing of the loss but that.

They scale every coordinate of the gradient by itself, all but MFAC.
"""

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_curvature import vectors
from lightning_curvature.optim.base import CurvatureOptimizer
from lightning_curvature.optim.failures import FailureCounter
from lightning_curvature.optim.per_tensor import whole_norms
from lightning_curvature.optim.saved_state import is_count
from lightning_curvature.oracle.protocol import Oracle

__all__ = ["DiagonalOptimizer"]

_COUNTS = ("failures", "skipped_steps")


class DiagonalOptimizer(CurvatureOptimizer):
    """Base of the optimizers that scale every coordinate of the gradient by itself, and of MFAC.

    A subclass says in `_update_group` how parameters move. A step with a gradient that is not
    finite changes nothing and is counted. On a CPU the gradient is looked at before anything is
    done; on other devices, where looking means waiting, the arithmetic goes on with zeros and
    ``usable`` keeps state and parameters as they are.

    State of half-precision parameters is float32, and so is the arithmetic.

    Args:
        params: Parameters or parameter groups.
        defaults: Hyper-parameters; "lr", "foreach", "maximize" and "max_failures" are among them.
    """

    # Hyper-parameters that are one value for all groups.
    shared_names: ClassVar[tuple[str, ...]] = ("max_failures", "foreach")
    # Counts of the state that the user hears of: name -> (from which number on, the text).
    watched: ClassVar[dict[str, tuple[int, str]]] = {}

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self._check_group(defaults)
        super().__init__(params, defaults)
        self._failures = self._new_failure_counter()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickle or deep copy."""
        super().__setstate__(state)
        self._failures = self._new_failure_counter(resumed=True)

    @property
    def shared(self) -> tuple[str, ...]:
        """Names of the hyper-parameters that are one value for all groups."""
        return self.shared_names

    def _new_failure_counter(self, *, resumed: bool = False) -> FailureCounter:
        return FailureCounter(
            type(self).__name__,
            int(self.param_groups[0]["max_failures"]),
            cause="the gradient was not finite",
            advice="or lower lr",
            watched=self.watched,
            resumed=resumed,
        )

    def _load_curvature_state(self, state: dict[str, Any]) -> None:
        super()._load_curvature_state(state)
        self._failures = self._new_failure_counter(resumed=True)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group.

        Args:
            param_group: As for every torch optimizer.

        Raises:
            ValueError: If an argument is out of range, or differs from the other groups though it
                is one value for all.
        """
        self._check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)

    # One step

    def _update(self, params: list[Tensor], oracle: Oracle | None) -> None:
        grads = [p.grad for p in params if p.grad is not None]
        squared = _squared_norm(grads)
        finite = torch.isfinite(squared)
        stats = {"grad_norm": squared.sqrt()}
        if oracle is not None and oracle.ready:
            stats["loss"] = oracle.base_loss()
        usable = None if self._can_look(finite) else finite
        if usable is not None:
            for grad in grads:
                grad.masked_fill_(~finite, 0.0)
        if usable is not None or bool(finite):
            self._prepare(params, oracle, usable, stats)
            for group in self.param_groups:
                members = [p for p in group["params"] if p.grad is not None]
                if members:
                    self._update_group(group, members, usable, stats)
            self._finish(params, oracle, usable, stats)
        stats["lr"] = torch.full_like(squared, max(float(g["lr"]) for g in self.param_groups))
        self._count(finite, stats)

    def _can_look(self, scalar: Tensor) -> bool:
        """Tell whether reading a scalar costs nothing."""
        return scalar.device.type == "cpu"

    def _count(self, finite: Tensor, stats: dict[str, Tensor]) -> None:
        names = (*_COUNTS, *self.watched)
        counts = {name: self._scalar(name, stats["grad_norm"]) for name in names}
        self._failures.update(counts, finite, stats)
        self._scalars.update(counts)
        stats.update({name: counts[name] for name in names if name.startswith("skipped_")})
        self.stats = {**self.stats, **stats}
        self._failures.check(counts, self._steps_done + 1, self.stats)

    def _scalar(self, name: str, like: Tensor) -> Tensor:
        """Return a number of the state, 0 if it is not there yet."""
        return torch.as_tensor(self._scalars.get(name, 0.0), dtype=like.dtype, device=like.device)

    def _prepare(
        self,
        params: list[Tensor],
        oracle: Oracle | None,
        usable: Tensor | None,
        stats: dict[str, Tensor],
    ) -> None:
        """Refresh what all groups need, before any parameter moves.

        Args:
            params: All parameters with a gradient.
            oracle: The oracle, None if this optimizer asks nothing.
            usable: See `_update_group`.
            stats: What this step measured so far; more may be added.
        """

    def _finish(
        self,
        params: list[Tensor],
        oracle: Oracle | None,
        usable: Tensor | None,
        stats: dict[str, Tensor],
    ) -> None:
        """Do what comes after all parameters have moved; see `_prepare`."""

    @abstractmethod
    def _update_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        usable: Tensor | None,
        stats: dict[str, Tensor],
    ) -> None:
        """Update state and parameters of one group.

        Args:
            group: The group.
            params: Its parameters with a gradient.
            usable: Boolean 0-dim tensor: whether the gradient was finite; it has been replaced by
                zeros if not, and then nothing may change. None if it is known to be finite.
            stats: What this step measured so far; more may be added.
        """

    # State

    def _state_lists(self, params: list[Tensor], *names: str) -> list[list[Tensor]]:
        """Return state tensors of parameters by name; new ones are zero.

        Args:
            params: The parameters.
            *names: Names of the state; "step" and those that begin with "num_" are 0-dim tensors.
        """
        for p in params:
            state = self.state[p]
            half = p.dtype in (torch.bfloat16, torch.float16)
            dtype = torch.float32 if half else p.dtype
            for name in names:
                if name in state:
                    continue
                if is_count(name):
                    state[name] = torch.zeros((), dtype=dtype, device=p.device)
                else:
                    kind = torch.preserve_format
                    state[name] = torch.zeros_like(p, dtype=dtype, memory_format=kind)
        return [[self.state[p][name] for p in params] for name in names]

    def _accept(self, new: list[Tensor], size: Tensor, usable: Tensor | None) -> Tensor | None:
        """Judge a new estimate; one that is not finite is counted and replaced by zeros.

        Args:
            new: The estimate.
            size: Not finite if the estimate is not.
            usable: See `_update_group`.

        Returns:
            Whether it may be used, as ``usable`` says it of the gradient.
        """
        finite = torch.isfinite(size)
        good = finite if usable is None else finite & usable
        # A bad gradient is counted as a skipped step already.
        bad = ~finite if usable is None else ~finite & usable
        skipped = self._scalar("skipped_refreshes", size)
        self._scalars["skipped_refreshes"] = skipped + bad.to(size.dtype)
        if usable is None and self._can_look(finite) and bool(finite):
            return None
        for x in new:
            x.masked_fill_(~good, 0.0)
        return good

    def _drift(self, new: list[Tensor], old: list[Tensor], good: Tensor | None) -> Tensor:
        """Return the relative change of an average by an estimate; 1 where there was none.

        Args:
            new: The average now.
            old: The average before.
            good: What `_accept` returned.
        """
        change = vectors.norm(list(torch._foreach_sub(new, old)))
        drift = (change / vectors.norm(old)).nan_to_num(1.0, posinf=1.0)
        # An estimate that could not be used is no sign of a curvature that does not change.
        return drift if good is None else torch.where(good, drift, torch.ones_like(drift))

    def _grads(self, group: dict[str, Any], grads: list[Tensor]) -> list[Tensor]:
        """Return gradients in the precision of the arithmetic, turned around to climb.

        Args:
            group: The group of the parameters.
            grads: Gradients, or parts of them; they are not changed.
        """
        grads = [g.float() if g.dtype in (torch.bfloat16, torch.float16) else g for g in grads]
        return list(torch._foreach_neg(grads)) if group["maximize"] else grads


def _squared_norm(grads: list[Tensor]) -> Tensor:
    if not any(hasattr(grad, "full_tensor") for grad in grads):
        return vectors.dot(grads, grads)
    # Sharded tensors take no dtype here.
    dtype = vectors.scalar_dtype(grads)
    norms = torch._foreach_norm([grad.to(dtype) for grad in grads])
    return torch.stack(whole_norms(list(norms))).square().sum()
