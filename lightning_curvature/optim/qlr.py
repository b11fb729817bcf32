r"""The learning rate that minimizes a quadratic model along a given direction.

Ross M. Clarke and Jose Miguel Hernandez-Lobato, "Studying K-FAC Heuristics by Viewing Adam through
a Second-Order Lens", ICML 2024, arXiv:2310.14963. This file holds what AdamQLR and SGDQLR share:
everything but the direction.

Where it differs from the official code, by default (each has a switch back):

- the step length is capped (``max_lr``): the softmax Fisher vanishes when predictions saturate,
  also wrong ones, and the derived step then explodes;
- the predicted change belongs to the step that was taken, with learning-rate schedule and clipping
  (``quad_model="taken"``; the official one ignores both and then mistrusts a good model);
- weight decay scales with the learning rate as in AdamW and is applied after the reduction ratio
  was measured (``decoupled_weight_decay``);
- squared errors of several outputs are averaged in the curvature as they are in the loss
  (``official_regression_scaling``);
- a curvature that is not positive is replaced by its magnitude (``curvature_guard``);
- gradient, curvature and new loss see the same dropout masks.
"""

from abc import abstractmethod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_curvature import vectors
from lightning_curvature.curvature.damping import accept_or_raise, levenberg_marquardt
from lightning_curvature.curvature.quadratic import model_change, reduction_ratio, step_length
from lightning_curvature.optim.damped import DampedOptimizer
from lightning_curvature.optim.failures import FailureCounter
from lightning_curvature.optim.gradient import Gradient, clip_factor
from lightning_curvature.optim.qlr_arguments import check_arguments
from lightning_curvature.oracle.protocol import Oracle

__all__ = ["DampingAlgorithm", "QLROptimizer"]

DampingAlgorithm = Literal["levenberg-marquardt", "decreasing-loss", "fixed"]

# Running average of the step length when it is carried over from step to step; measured on three
# tasks in docs/how-to/adamqlr.md, "Intervals".
_CARRIED_LR_EMA = 0.8


_CURVATURE, _DAMPING = "curvature_update_interval", DampedOptimizer.damping_interval

# Where the groups keep the argument ``max_lr``: torch's OneCycleLR writes its own "max_lr" there.
_CAP = "max_step_length"


def _renamed(group: dict[str, Any]) -> dict[str, Any]:
    """Return hyper-parameters under the names that groups have for them."""
    return {
        _CAP if key == "max_lr" else key: value
        for key, value in group.items()
        if key != "max_lr" or _CAP not in group
    }


class QLROptimizer(DampedOptimizer):
    """Base of the optimizers that derive their learning rate from a quadratic model.

    A subclass gives a direction d that points uphill; theta moves to theta - lr * alpha * d with

        alpha = <g, d> / (d^T C d + damping * |d|^2).

    Hyper-parameters other than ``lr`` and ``weight_decay`` are one value for all groups. Groups
    with different ``lr`` scale their part of d in proportion, and the quadratic model knows.

    Args:
        params: Parameters or parameter groups.
        defaults: Hyper-parameters, as in `AdamQLR`.
    """

    asks: ClassVar[frozenset[str]] = frozenset({"loss", "directional"})
    argument_names: ClassVar[dict[str, str]] = {_CAP: "max_lr"}
    # Step length above which the user is told, None where d has no natural scale.
    long_step: ClassVar[float | None] = None

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        check_arguments(defaults)
        super().__init__(params, _renamed(defaults))

    def _new_failure_counter(self, *, resumed: bool = False) -> FailureCounter:
        limit = int(self.param_groups[0]["max_failures"])
        return FailureCounter(type(self).__name__, limit, self.long_step, resumed=resumed)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group.

        Args:
            param_group: As for every torch optimizer.

        Raises:
            ValueError: If an argument is out of range, or differs from the other groups though it
                is one value for all.
        """
        super().add_param_group(_renamed(param_group))

    def _check_group(self, group: dict[str, Any]) -> None:
        damping = group["damping"]
        if isinstance(damping, Tensor):
            damping = float(damping)
        check_arguments({**group, "max_lr": group[_CAP], "damping": damping})

    def wants_record(self) -> bool:
        """Tell whether the coming step needs curvature or a new loss."""
        return self._curvature_due() or self._damping_due()

    def _curvature_due(self) -> bool:
        return self._due(_CURVATURE)

    def _measures_always(self) -> bool:
        schedule = self._schedules.get(_CURVATURE)
        if schedule is not None:
            return schedule.every_step
        return int(self.param_groups[0][_CURVATURE]) == 1

    # One step

    def _runs_again(self) -> bool:
        return self.wants_record()

    def _step_with(
        self, params: list[Tensor], oracle: Oracle, damping: Tensor, saved: list[Tensor] | None
    ) -> dict[str, Tensor]:
        group = self._settings()
        rejects = self._damping_due() and group["damping_algorithm"] == "decreasing-loss"
        backup = self._backup(params, saved) if rejects and saved is not None else None

        gradient = Gradient.read(params, group["grad_clip_norm"], maximize=group["maximize"])
        old_moments = self._old_second_moments(params, group)
        direction = self._direction(params, gradient.values, gradient.finite)
        if group["direction_clip"] is not None:
            torch._foreach_clamp_min_(direction, -group["direction_clip"])
            torch._foreach_clamp_max_(direction, group["direction_clip"])
        top_lr = self._scale_by_group_lr(params, direction)
        squared = vectors.dot(direction, direction)
        old_form = None if old_moments is None else _diagonal_form(direction, old_moments)
        stats = {"grad_norm": gradient.norm}
        slope, alpha, kappa, found = self._line_search(
            oracle, direction, squared, damping, gradient, group, stats, saved
        )
        found = found & torch.isfinite(alpha * top_lr * squared.sqrt())
        # Nothing to descend is not a failure.
        found = found | (squared <= torch.finfo(squared.dtype).tiny)
        usable = gradient.finite & found
        alpha = torch.where(usable, alpha, torch.zeros_like(alpha))

        length, move = self._apply(params, direction, alpha, usable, top_lr, squared, group)
        stats.update(step_length=alpha, lr=length, update_norm=length.abs() * squared.sqrt())
        before, raised = damping, self._clamped(damping * group["damping_increase_factor"], group)
        kept = usable
        if self._damping_due():
            if old_form is not None:
                kappa = damping * squared + old_form
            predicted = model_change(
                length if group["quad_model"] == "taken" else alpha, slope, kappa
            )
            damping, kept = self._adapt(
                params, oracle, damping, predicted, (direction, move), backup, group, stats
            )
        if group["decoupled_weight_decay"]:
            self._decay(torch.where(kept, length, torch.zeros_like(length)), top_lr)
        if group["damping_algorithm"] != "fixed":
            # A bad batch says nothing about the model; a bad model calls for more damping.
            adapted = torch.where(found, damping, raised)
            self._share_damping(torch.where(gradient.finite, adapted, before))
        counts = {name: self._scalar(name, damping) for name in ("failures", "skipped_steps")}
        if oracle.ready:
            stats["loss"] = oracle.base_loss()
        stats["damping"] = self.param_groups[0]["damping"]
        self._failures.update(counts, usable, stats)
        self._scalars.update(counts)
        stats["skipped_steps"] = self._scalars["skipped_steps"]
        self.stats = {**self.stats, **stats}
        if self._curvature_due():
            self._refreshed(_CURVATURE, stats.get("curvature_drift"))
        if self._damping_due():
            owned = _DAMPING in self._schedules
            new = self.param_groups[0]["damping"]
            self._refreshed(_DAMPING, (new - before).abs() / before if owned else None)
        return counts

    @abstractmethod
    def _direction(self, params: list[Tensor], grads: list[Tensor], usable: Tensor) -> list[Tensor]:
        """Return a new direction that points uphill, and update its state where ``usable``.

        Args:
            params: Parameters with a gradient.
            grads: Their gradients, zero if not ``usable``.
            usable: Boolean 0-dim tensor: whether the gradient is finite.
        """

    def _line_search(
        self,
        oracle: Oracle,
        direction: list[Tensor],
        squared: Tensor,
        damping: Tensor,
        gradient: Gradient,
        group: dict[str, Any],
        stats: dict[str, Tensor],
        saved: list[Tensor] | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return slope, step length, damped curvature and whether they can be used."""
        carried = self._scalar("lr_average", squared).nan_to_num(0.0).clamp_min(0.0)
        if not self.wants_record():  # nothing will be predicted, so no slope is needed either
            unread = torch.zeros_like(carried)
            return unread, carried, unread, torch.ones_like(gradient.finite)
        slope = vectors.dot(gradient.values, direction)
        unclipped = oracle.grad_slope(slope)
        if not self._curvature_due():
            slope = stats["slope"] = slope if unclipped is None else unclipped
            # The model whose minimizer is the step length carried over.
            return slope, carried, slope / carried, torch.ones_like(gradient.finite)
        answer = oracle.directional(
            direction,
            # What the gradient says before this optimizer clipped it or turned it around.
            grad_slope=None if unclipped is None else unclipped / gradient.factor,
            curvature=group["curvature"],
            regression_scaling="per_example" if group["official_regression_scaling"] else "mean",
            saved=saved,
        )
        # Asked anew: the answer may have shown that the gradient was clipped.
        unclipped = oracle.grad_slope(slope)
        curvature = answer.curvature.to(slope.dtype)
        if group["curvature"] == "hessian" and group["maximize"]:
            curvature = -curvature
        slope = answer.slope.to(slope.dtype) * gradient.factor if unclipped is None else unclipped
        stats.update(slope=slope, curvature=curvature)
        term = damping * squared
        if group["curvature_ema"] > 0:
            curvature = self._averaged_kappa(curvature + term, group) - term
        old = self._scalars.get("lr_average")
        alpha, kappa, found = self._step_length(slope, curvature, term, gradient.finite, group)
        if old is not None:
            # How far this refresh moved what is used until the next one. Where it failed, it says
            # nothing about the curvature.
            drift = (self._scalars["lr_average"] - old).abs() / old.abs()
            stats["curvature_drift"] = torch.where(found & gradient.finite, drift, torch.nan)
        return slope, alpha, kappa, found

    def _averaged_kappa(self, kappa: Tensor, group: dict[str, Any]) -> Tensor:
        """Return the running average of the damped curvature."""
        average = self._scalars.get("curvature_average")
        start = group["curvature_ema_init"]
        if average is None and start is not None:
            average = torch.full_like(kappa, start)
        decay = group["curvature_ema"]
        average = _running_average(average, kappa, decay, torch.isfinite(kappa))
        self._scalars["curvature_average"] = average
        return average

    def _step_length(
        self,
        slope: Tensor,
        curvature: Tensor,
        damping_term: Tensor,
        finite: Tensor,
        group: dict[str, Any],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the capped and amplified step length, the damped curvature, and its soundness."""
        alpha, kappa, found = step_length(
            slope,
            curvature,
            damping_term,
            saddle_free=group["saddle_free"],
            guard=group["curvature_guard"],
        )
        cap = group[_CAP]
        if cap is not None:
            alpha = alpha.clamp(-cap, cap)
        alpha = alpha * group["amplification"]
        decay = group["lr_ema"]
        if decay is None:
            decay = 0.0 if self._measures_always() else _CARRIED_LR_EMA
        average = _running_average(self._scalars.get("lr_average"), alpha, decay, found & finite)
        self._scalars["lr_average"] = average
        alpha = torch.where(found, average, alpha)
        return alpha, kappa, found

    def _apply(
        self,
        params: list[Tensor],
        direction: list[Tensor],
        alpha: Tensor,
        usable: Tensor,
        top_lr: float,
        squared: Tensor,
        group: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """Move the parameters by ``-move * direction``; return the step length used, and move."""
        limit = group["update_clip_norm"]
        if group["decoupled_weight_decay"]:
            factor = top_lr * clip_factor(alpha.abs() * squared.sqrt(), limit)
            length, move = alpha * factor, alpha * factor
        else:
            # The reference adds the decay to the step: delta = alpha d + wd theta, times lr.
            vectors.scale_(direction, alpha)
            for p, d, decay in zip(params, direction, self._decays(params, top_lr), strict=True):
                d.add_(p, alpha=decay)
            move = top_lr * clip_factor(vectors.norm(direction), limit) * usable
            length = alpha * move
        vectors.add_scaled_(params, direction, -move)
        return length, move

    def _decays(self, params: list[Tensor], top_lr: float) -> list[float]:
        """Return the weight decay of each parameter in proportion to its group's ``lr``."""
        decays = {
            id(p): g["weight_decay"] * (float(g["lr"]) / top_lr if top_lr > 0 else 0.0)
            for g in self.param_groups
            for p in g["params"]
        }
        return [decays[id(p)] for p in params]

    # Damping

    def _adapt(
        self,
        params: list[Tensor],
        oracle: Oracle,
        damping: Tensor,
        predicted: Tensor,
        moved: tuple[list[Tensor], Tensor],
        backup: list[tuple[list[Tensor], list[Tensor]]] | None,
        group: dict[str, Any],
        stats: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Look at the new loss; return the next damping and whether the step was kept."""
        new_loss = oracle.loss().to(damping.dtype)
        old_loss = oracle.base_loss().to(damping.dtype)
        stats.update(new_loss=new_loss, quad_model_change=predicted)
        sign = -1.0 if group["maximize"] else 1.0
        ratio = reduction_ratio(sign * new_loss, sign * old_loss, predicted)
        stats["reduction_ratio"] = ratio
        factors = {
            "increase_factor": group["damping_increase_factor"],
            "decrease_factor": group["damping_decrease_factor"],
        }
        if backup is not None:
            kept = sign * new_loss <= sign * old_loss
            for present, before in backup:
                for now, old in zip(present, before, strict=True):
                    now.copy_(torch.where(kept, now, old))
            damping = accept_or_raise(damping, kept, **factors)
        else:
            kept = torch.isfinite(new_loss) | ~torch.isfinite(old_loss)
            # A step into an infinite loss is taken back.
            direction, move = moved
            vectors.add_scaled_(params, direction, torch.where(kept, torch.zeros_like(move), move))
            damping = levenberg_marquardt(damping, ratio, failed=~kept, **factors)
        return self._clamped(damping, group), kept

    def _state_tensors(self, params: list[Tensor]) -> list[Tensor]:
        """Return the tensors that a rejected step must restore besides the parameters."""
        return [
            value for p in params for value in self.state[p].values() if isinstance(value, Tensor)
        ]

    def _backup(
        self, params: list[Tensor], saved: list[Tensor]
    ) -> list[tuple[list[Tensor], list[Tensor]]]:
        self._init_state(params)
        state = self._state_tensors(params)
        return [(params, saved), (state, vectors.clone(state))]

    def _init_state(self, params: list[Tensor]) -> None:
        """Create the per-parameter state; the base has none."""

    def _old_second_moments(
        self, params: list[Tensor], group: dict[str, Any]
    ) -> list[Tensor] | None:
        """Return the diagonal that stands for the curvature in q, before this step changes it."""
        return None


def _diagonal_form(direction: list[Tensor], diagonal: list[Tensor]) -> Tensor:
    """Return d^T diag(v) d."""
    return vectors.dot(torch._foreach_mul(direction, direction), diagonal)


def _running_average(average: Tensor | None, new: Tensor, decay: float, usable: Tensor) -> Tensor:
    """Return ``decay * average + (1 - decay) * new``; it starts at the first usable value.

    NaN stands for an average that has not started.
    """
    if average is None:
        average = torch.full_like(new, torch.nan)
    mixed = torch.where(torch.isnan(average), new, decay * average + (1 - decay) * new)
    return torch.where(usable, mixed, average)
