"""KFACStep: learning rate, momentum and damping from a quadratic model over two directions.

James Martens and Roger Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate
Curvature", ICML 2015, arXiv:1503.05671, sections 6 and 7, as google-deepmind/kfac-jax does it.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_curvature import vectors
from lightning_curvature.curvature.damping import levenberg_marquardt
from lightning_curvature.curvature.quadratic import reduction_ratio
from lightning_curvature.curvature.quadratic_solve import quadratic_change, solve_coefficients
from lightning_curvature.optim.failures import FailureCounter
from lightning_curvature.optim.gradient import Gradient, clip_factor
from lightning_curvature.optim.kfac_arguments import check_arguments
from lightning_curvature.optim.kronecker import KroneckerOptimizer
from lightning_curvature.oracle.protocol import Oracle

__all__ = ["KFACStep"]

_CURVATURE = "curvature_update_interval"
# Units of the machine precision that the difference of two losses may be off by.
_ROUNDING = 32.0
# Root mean square of parameters below which they are taken for zeros.
_LEAST_SCALE = 0.01
_WATCHED = {
    "skipped_refreshes": (
        1,
        "{name} kept old factors {count} times: activations or output gradients of a layer were "
        "not finite. stats['skipped_refreshes'] goes on counting.",
    ),
}


class _Model(NamedTuple):
    """The quadratic model over (Delta, v), or over one direction.

    Attributes:
        matrix: V^T C V with the penalty's share, without damping.
        squares: V^T V.
        slopes: V^T grad.
    """

    matrix: Tensor
    squares: Tensor
    slopes: Tensor

    def damped(self, damping: Tensor) -> Tensor:
        """Return V^T (C + damping I) V."""
        return self.matrix + damping * self.squares


class KFACStep(KroneckerOptimizer):
    """Base of K-FAC and EK-FAC: what happens with the preconditioned gradient.

    Args:
        params: Parameters or parameter groups.
        defaults: Hyper-parameters, as in `KFAC`.
    """

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        check_arguments(defaults)
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        damping = group["damping"]
        check_arguments(
            {**group, "damping": float(damping)} if isinstance(damping, Tensor) else group
        )

    def _new_failure_counter(self, *, resumed: bool = False) -> FailureCounter:
        limit = int(self.param_groups[0]["max_failures"])
        return FailureCounter(
            type(self).__name__,
            limit,
            cause="gradient, curvature or preconditioned gradient was not finite",
            advice="raise damping or min_damping",
            watched=_WATCHED,
            resumed=resumed,
        )

    def wants_record(self) -> bool:
        """Tell whether the coming step looks at its batches again, or at their layers."""
        return self._factors_due() or self._model_due() or self._looks_back()

    def _adaptive(self) -> bool:
        group = self.param_groups[0]
        return bool(group["adaptive_lr"] or group["adaptive_momentum"])

    def _model_due(self) -> bool:
        """Tell whether coefficients are derived anew."""
        return self._adaptive() and (self._due(_CURVATURE) or "alpha" not in self._scalars)

    def _damping_due(self) -> bool:
        # At the end of an interval: the inverses that come next know the new damping.
        if self._settings()["damping_algorithm"] == "fixed":
            return False
        return self._due(self.damping_interval, ahead=1)

    def _looks_back(self) -> bool:
        """Tell whether the loss after the step is evaluated."""
        return self._damping_due() or bool(self.param_groups[0]["step_rejection"])

    # One step

    def _runs_again(self) -> bool:
        return self._model_due() or self._looks_back()

    def _step_with(
        self, params: list[Tensor], oracle: Oracle, damping: Tensor, saved: list[Tensor] | None
    ) -> dict[str, Tensor]:
        self._find_layers()
        group = self._settings()
        gradient = Gradient.read(params, maximize=group["maximize"])
        stats = {"grad_norm": gradient.norm}
        if self._factors_due():
            self._refresh_factors(oracle, gradient.finite, stats)
        if self._inverses_due():
            self._refresh_inverses(oracle, damping + group["l2_reg"], stats)
        total_damping = damping + group["l2_reg"]
        delta = self._blockwise(params, gradient.values, total_damping, oracle)
        top_lr = self._scale_by_group_lr(params, delta)
        velocity = self._velocities(params)
        coefficients, model, found = self._coefficients(
            params, oracle, delta, velocity, damping, gradient, top_lr, stats, saved
        )
        usable = gradient.finite & found
        coefficients = torch.where(usable, coefficients, torch.zeros_like(coefficients))
        update = _combined(delta, velocity, coefficients)
        stats["update_norm"] = vectors.norm(update)
        if self._looks_back() and model is None:
            model = self._model(params, oracle, [update], gradient, saved)
            coefficients = torch.ones_like(model.slopes)
        vectors.add_scaled_(params, update, torch.ones_like(damping))
        raised = self._clamped(damping * group["damping_increase_factor"], group)
        kept, adapted = usable, damping
        if self._looks_back():
            assert model is not None
            assert saved is not None
            adapted, kept = self._look_back(params, oracle, damping, coefficients, model, stats)
            if not _is_known(kept):
                for now, old in zip(params, saved, strict=True):
                    now.copy_(torch.where(kept, now, old))
            kept = kept & usable
        known = _is_known(kept)
        for p, old, new in zip(params, velocity, update, strict=True):
            self.state[p]["velocity"] = new if known else torch.where(kept, new, old)
        length = torch.where(kept, stats["lr"], torch.zeros_like(stats["lr"]))
        self._decay(length, top_lr)
        if group["damping_algorithm"] != "fixed":
            adapted = torch.where(found, adapted, raised)
            self._share_damping(torch.where(gradient.finite, adapted, damping))
        return self._finish(oracle, damping, usable, stats)

    def _finish(
        self, oracle: Oracle, damping: Tensor, usable: Tensor, stats: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        names = ("failures", "skipped_steps", "skipped_refreshes")
        counts = {name: self._scalar(name, damping) for name in names}
        if oracle.ready:
            stats["loss"] = oracle.base_loss()
        new = stats["damping"] = self.param_groups[0]["damping"]
        self._failures.update(counts, usable, stats)
        self._scalars.update(counts)
        for name in names[1:]:
            stats[name] = self._scalars[name]
        self.stats = {**self.stats, **stats}
        if self._adaptive() and self._due(_CURVATURE):
            self._refreshed(_CURVATURE, stats.get("model_drift"))
        if self._damping_due():
            owned = self.damping_interval in self._schedules
            drift = (new - damping).abs() / damping if owned else None
            self._refreshed(self.damping_interval, drift, ahead=1)
        return counts

    def _velocities(self, params: list[Tensor]) -> list[Tensor]:
        """Return the last updates, in at least float32."""
        for p in params:
            if "velocity" not in self.state[p]:
                self.state[p]["velocity"] = torch.zeros_like(
                    p, dtype=vectors.scalar_dtype([p]), memory_format=torch.preserve_format
                )
        return [self.state[p]["velocity"] for p in params]

    # The model

    def _coefficients(
        self,
        params: list[Tensor],
        oracle: Oracle,
        delta: list[Tensor],
        velocity: list[Tensor],
        damping: Tensor,
        gradient: Gradient,
        top_lr: float,
        stats: dict[str, Tensor],
        saved: list[Tensor] | None,
    ) -> tuple[Tensor, _Model | None, Tensor]:
        """Return w = (-alpha, beta), the model they come from, and whether they are usable."""
        group = self.param_groups[0]
        like = damping
        first = None if group["adaptive_lr"] else torch.full_like(like, -top_lr)
        second = None if group["adaptive_momentum"] else torch.full_like(like, group["momentum"])
        model = None
        if self._model_due():
            model = self._model(params, oracle, [delta, velocity], gradient, saved)
            answer = solve_coefficients(
                model.damped(damping),
                model.slopes,
                first=first,
                second=second,
                second_limit=group["max_momentum"],
            )
            w, found = answer.values, answer.found
            old = [self._scalar(name, like) for name in ("alpha", "beta")]
            sound = found & gradient.finite
            if _CURVATURE in self._schedules and "alpha" in self._scalars:
                moved = (-w[0] - old[0]).abs() / old[0].abs()
                stats["model_drift"] = torch.where(sound, moved, torch.zeros_like(moved))
            self._scalars["alpha"] = torch.where(sound, -w[0], old[0])
            self._scalars["beta"] = torch.where(sound, w[1], old[1])
            stats["curvature"] = model.matrix[0, 0]
            stats["slope"] = model.slopes[0]
        else:
            if self._adaptive():
                first = -self._scalar("alpha", like) if first is None else first
                second = self._scalar("beta", like) if second is None else second
            assert first is not None
            assert second is not None
            w, found = torch.stack([first, second]), torch.ones_like(gradient.finite)
        if not group["adaptive_lr"] and group["norm_constraint"] is not None:
            w = self._constrained(w, delta, gradient, float(group["norm_constraint"]), stats)
        if group["adaptive_lr"]:
            # Not by a tensor of both numbers, which a GPU would have to wait for.
            w = torch.stack([w[0] * top_lr, w[1] * (top_lr if group["adaptive_momentum"] else 1.0)])
        if group["max_relative_update"] is not None:
            squares = None if model is None else model.squares
            w = self._shortened(w, params, delta, velocity, squares)
        stats["lr"], stats["momentum"] = -w[0], w[1]
        found = found & torch.isfinite(vectors.dot(delta, delta)) & torch.isfinite(w).all()
        return w, model, found

    def _shortened(
        self,
        w: Tensor,
        params: list[Tensor],
        delta: list[Tensor],
        velocity: list[Tensor],
        squares: Tensor | None,
    ) -> Tensor:
        """Shorten the update to a share of the norm of the parameters."""
        if squares is None:
            norms = torch.stack([vectors.norm(delta), vectors.norm(velocity)])
            size = (w.abs() * norms).sum()
        else:
            size = (w @ squares @ w).clamp_min(0.0).sqrt()
        # Parameters that start near zero have no scale of their own.
        least = _LEAST_SCALE * sum(p.numel() for p in params) ** 0.5
        limit = self.param_groups[0]["max_relative_update"] * vectors.norm(params).clamp_min(least)
        factor: Tensor = (limit / size).nan_to_num(1.0, posinf=1.0).clamp_max(1.0)
        return w * factor

    def _constrained(
        self,
        w: Tensor,
        delta: list[Tensor],
        gradient: Gradient,
        limit: float,
        stats: dict[str, Tensor],
    ) -> Tensor:
        """Shorten the step along Delta to ``alpha^2 <Delta, grad> <= limit``."""
        size = w[0].square() * vectors.dot(delta, gradient.values)
        stats["scaled_grad_norm_sq"] = size
        factor = clip_factor(size.clamp_min(0.0).sqrt(), limit**0.5)
        return torch.stack([w[0] * factor, w[1]])

    def _model(
        self,
        params: list[Tensor],
        oracle: Oracle,
        directions: list[list[Tensor]],
        gradient: Gradient,
        saved: list[Tensor] | None,
    ) -> _Model:
        """Return the quadratic model of the loss over one or two directions."""
        group = self.param_groups[0]
        clipped = torch.stack([vectors.dot(gradient.values, d) for d in directions])
        slopes = oracle.grad_slope(clipped)
        squares = _gram(directions, directions)
        if group["quad_model"] == "factors":
            with_c = [self._blockwise(params, d, None, oracle) for d in directions]
            matrix = _gram(directions, with_c)
            slopes = clipped if slopes is None else slopes
        else:
            answer = oracle.quadratic(
                directions,
                grad_slopes=None if slopes is None else slopes / gradient.factor,
                saved=saved,
            )
            matrix = answer.matrix.to(squares.dtype)
            # Asked anew: the answer may have shown that the gradient was clipped.
            slopes = oracle.grad_slope(clipped)
            if slopes is None:
                slopes = answer.slopes.to(squares.dtype) * gradient.factor
        return _Model(matrix + group["l2_reg"] * squares, squares, slopes)

    # Damping

    def _look_back(
        self,
        params: list[Tensor],
        oracle: Oracle,
        damping: Tensor,
        coefficients: Tensor,
        model: _Model,
        stats: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Look at the new loss; return the next damping and whether the step was kept."""
        group = self._settings()
        matrix = model.damped(damping) if group["include_damping_in_quad_change"] else model.matrix
        predicted = quadratic_change(coefficients, matrix, model.slopes)
        new_loss, old_loss = oracle.loss(), oracle.base_loss()
        # What rounding makes of a loss says nothing about the model. A step too short to tell may
        # as well be longer: otherwise damping that has grown at a kink would stay.
        noise = _ROUNDING * torch.finfo(new_loss.dtype).eps * old_loss.abs()
        new_loss, old_loss = new_loss.to(damping.dtype), old_loss.to(damping.dtype)
        sign = -1.0 if group["maximize"] else 1.0
        ratio = reduction_ratio(sign * new_loss, sign * old_loss, predicted)
        telling = predicted.abs() > noise
        ratio = torch.where(telling, ratio, torch.nan)
        stats.update(new_loss=new_loss, quad_model_change=predicted, reduction_ratio=ratio)
        finite = torch.isfinite(new_loss)
        kept = finite | ~torch.isfinite(old_loss)
        if group["step_rejection"]:
            kept = kept & ~(sign * new_loss > sign * old_loss)
            stats["step_rejected"] = (~kept).to(damping.dtype)
        if self._damping_due():
            # No step at all, as with a learning rate of 0, is no reason for a longer one.
            silent = ~torch.isfinite(predicted) | (predicted == 0)
            damping = levenberg_marquardt(
                damping,
                torch.where(telling | silent, ratio, 1.0),
                increase_factor=group["damping_increase_factor"],
                decrease_factor=group["damping_decrease_factor"],
                failed=~finite,
            )
            damping = self._clamped(damping, group)
        rejected = self._clamped(damping * group["rejection_increase_factor"], group)
        damping = torch.where(kept, damping, rejected)
        return damping, kept


def _is_known(flag: Tensor) -> bool:
    """Tell whether a flag is known to be True without waiting for a device."""
    return flag.device.type == "cpu" and bool(flag)


def _combined(delta: list[Tensor], velocity: list[Tensor], w: Tensor) -> list[Tensor]:
    """Return ``w1 Delta + w2 v`` in the place of Delta."""
    moves = w[0] != 0
    if not _is_known(moves):
        for d in delta:
            # Not finite times zero would not be zero.
            d.masked_fill_(~moves, 0.0)
    vectors.scale_(delta, w[0])
    vectors.add_scaled_(delta, velocity, w[1])
    return delta


def _gram(left: list[list[Tensor]], right: list[list[Tensor]]) -> Tensor:
    """Return the inner products of vectors, symmetric."""
    size = len(left)
    found = {(i, j): vectors.dot(left[i], right[j]) for i in range(size) for j in range(i, size)}
    rows = [[found[min(i, j), max(i, j)] for j in range(size)] for i in range(size)]
    return torch.stack([torch.stack(row) for row in rows])
