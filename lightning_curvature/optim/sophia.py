"""What SophiaG and SophiaH share: a clipped step scaled by an average of the Hessian's diagonal.

Liu, Li, Hall, Liang and Ma, "Sophia: A Scalable Stochastic Second-order Optimizer for Language
Model Pre-training", ICLR 2024, arXiv:2305.14342. The update is that of the ICLR version,

    m <- beta1 m + (1 - beta1) g
    h <- beta2 h + (1 - beta2) h_new                    on every k-th step
    theta <- (1 - lr weight_decay) theta - lr clip(m / max(rho h, eps), 1),

with gamma called rho, as in the official code. Where it differs from that code:

- h holds the diagonal of the curvature of the mean loss, the number of examples (or tokens)
  included. The official code leaves that number to an argument of ``step``, which a Trainer cannot
  give, and multiplies the present one to estimates of older batches;
- the estimate is made before the step that first uses it (``hessian_timing``);
- state is float32 for half-precision parameters: in float16 the official 1e-15 is zero.
"""

import math
from abc import abstractmethod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_curvature import vectors
from lightning_curvature.checks import (
    check_betas,
    check_choice,
    check_in_range,
    check_interval,
    check_positive,
)
from lightning_curvature.optim.diagonal import DiagonalOptimizer
from lightning_curvature.optim.per_tensor import advance_
from lightning_curvature.oracle.protocol import Oracle

__all__ = ["HessianTiming", "SophiaOptimizer"]

HessianTiming = Literal["before", "after"]

_INTERVAL = "hessian_update_interval"
_LOW_WIN_RATE = 0.01
# Estimates in a row with a lower win rate after which the user is told.
_LOW_FOR = 10


class SophiaOptimizer(DiagonalOptimizer):
    """Base of the two Sophias; a subclass gives the estimate.

    Args:
        params: Parameters or parameter groups.
        defaults: Hyper-parameters, as in `SophiaG`.
    """

    state_names = ("step", "exp_avg", "hess_diag", "num_estimates")
    shared_names: ClassVar[tuple[str, ...]] = (
        "hessian_update_interval",
        "hessian_timing",
        "bias_correction",
        "seed",
        "max_failures",
        "foreach",
    )
    watched: ClassVar[dict[str, tuple[int, str]]] = {
        "skipped_refreshes": (
            1,
            "{name} kept an old estimate of the Hessian's diagonal {count} times: the new one was "
            "not finite. stats['skipped_refreshes'] goes on counting.",
        ),
        "low_win_rates": (
            _LOW_FOR,
            "{name} clips more than 99% of all entries, for {count} estimates in a row by now: it "
            "descends along the sign of the momentum, and the curvature has no effect. Raise rho "
            "until stats['win_rate'] is between 0.1 and 0.5.",
        ),
    }

    def _check_group(self, group: dict[str, Any]) -> None:
        check_positive("lr", group["lr"], zero=True)
        check_betas(group["betas"])
        check_positive("rho", group["rho"])
        check_positive("eps", group["eps"])
        check_positive("weight_decay", group["weight_decay"], zero=True)
        check_interval(_INTERVAL, group[_INTERVAL])
        check_choice("hessian_timing", group["hessian_timing"], ("before", "after"))
        check_interval("max_failures", group["max_failures"])
        check_in_range("seed", group["seed"], 0, math.inf)

    def wants_record(self) -> bool:
        """Tell whether the coming step makes an estimate."""
        return self._estimates()

    def _estimates(self) -> bool:
        return self._due(_INTERVAL, ahead=self._ahead)

    @property
    def _ahead(self) -> int:
        # After step t, 2t, ... as the official script does, instead of before step 1, t + 1, ...
        return int(self.param_groups[0]["hessian_timing"] == "after")

    @abstractmethod
    def _estimate(self, params: list[Tensor], oracle: Oracle) -> list[Tensor]:
        """Return a new estimate of the diagonal, averaged over the ranks.

        Args:
            params: All parameters with a gradient.
            oracle: Answers about the loss of this step.
        """

    # One step

    def _prepare(
        self,
        params: list[Tensor],
        oracle: Oracle | None,
        usable: Tensor | None,
        stats: dict[str, Tensor],
    ) -> None:
        self._state_lists(params, *self.state_names)
        self._unclipped: list[Tensor] = []
        if not self._ahead:
            self._refresh(params, oracle, usable, stats)

    def _finish(
        self,
        params: list[Tensor],
        oracle: Oracle | None,
        usable: Tensor | None,
        stats: dict[str, Tensor],
    ) -> None:
        if self._unclipped:
            total = sum(p.numel() for p in params)
            rate = torch.stack(self._unclipped).sum().to(stats["grad_norm"].dtype) / max(total, 1)
            stats["win_rate"] = rate
            low = (rate < _LOW_WIN_RATE).to(rate.dtype)
            before = self._scalar("low_win_rates", rate)
            after = (before + low) * low
            # A step that was not taken says nothing.
            self._scalars["low_win_rates"] = (
                after if usable is None else torch.where(usable, after, before)
            )
        self._unclipped = []
        if self._ahead:
            self._refresh(params, oracle, usable, stats)

    def _refresh(
        self,
        params: list[Tensor],
        oracle: Oracle | None,
        usable: Tensor | None,
        stats: dict[str, Tensor],
    ) -> None:
        """Put a new estimate into the average, unless it is not finite."""
        if oracle is None or not self._estimates():
            return
        new = self._estimate(params, oracle)
        old = [self.state[p]["hess_diag"] for p in params]
        good = self._accept(new, vectors.dot(new, new), usable)
        advance_([self.state[p]["num_estimates"] for p in params], good)
        # Only who owns the interval wants to know.
        watched = _INTERVAL in self._schedules
        before = vectors.clone(old) if watched else old
        decays = {id(p): group["betas"][1] for group in self.param_groups for p in group["params"]}
        for decay in dict.fromkeys(decays.values()):
            chosen = [i for i, p in enumerate(params) if decays[id(p)] == decay]
            vectors.ema_([old[i] for i in chosen], [new[i] for i in chosen], decay, good)
        stats["hess_diag_norm"] = vectors.norm(old)
        if watched:
            drift = self._drift(old, before, good)
            stats["curvature_drift"] = drift
            self._refreshed(_INTERVAL, drift, ahead=self._ahead)

    def _update_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        usable: Tensor | None,
        stats: dict[str, Tensor],
    ) -> None:
        lr, beta1, rho = float(group["lr"]), group["betas"][0], group["rho"]
        steps, exp_avgs, hess_diags, counts = self._state_lists(params, *self.state_names)
        advance_(steps, usable)
        grads = [p.grad for p in params if p.grad is not None]
        counting = self._estimates()
        columns = (params, grads, exp_avgs, hess_diags)
        corrections = None
        if group["bias_correction"]:
            corrections = _corrections(steps, counts, group["betas"])
        # Every tensor has a correction of its own.
        foreach = group["foreach"] if corrections is None else False
        parts = vectors.blocks(*columns, foreach=foreach)
        for number, (ps, gs, ms, hs) in enumerate(parts):
            vectors.shrink_(ps, lr * group["weight_decay"], usable)
            vectors.ema_(ms, self._grads(group, gs), beta1, usable)
            scales = torch._foreach_mul(hs, rho)
            if corrections is not None:
                torch._foreach_mul_(scales, corrections[number])
            if counting:
                self._unclipped += [
                    torch.count_nonzero(m.abs() < s) for m, s in zip(ms, scales, strict=True)
                ]
            torch._foreach_clamp_min_(scales, group["eps"])
            updates = list(torch._foreach_div(ms, scales))
            torch._foreach_clamp_min_(updates, -1.0)
            torch._foreach_clamp_max_(updates, 1.0)
            vectors.move_(ps, updates, -lr, usable)


def _corrections(
    steps: list[Tensor], counts: list[Tensor], betas: tuple[float, float]
) -> list[Tensor]:
    """Return what turns h into h_hat / m_hat's correction: (1 - beta1^t) / (1 - beta2^n)."""
    t, n = torch.stack(steps).clamp_min(1.0), torch.stack(counts).clamp_min(1.0)
    return list(((1 - betas[0] ** t) / (1 - betas[1] ** n)).unbind())
