"""AdamQLR and SGDQLR the slow way: one flat float64 vector, every matrix formed entry by entry.

Follows the rule of arXiv:2310.14963 line by line, with a Python float for every scalar and an
``if`` for every decision. Nothing here uses the package under test. Arguments have the names of the
package; their defaults are the paper's (no cap, no guard, decay not scaled by the step).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.helpers.dense import DenseModel, Head


@dataclass
class Settings:
    """Hyper-parameters; see `lightning_curvature.AdamQLR`. ``betas=None`` makes it SGDQLR."""

    betas: tuple[float, float] | None = (0.9, 0.999)
    eps: float = 1e-8
    damping: float = 1e-3
    damping_increase_factor: float = 2.0
    damping_decrease_factor: float = 0.5
    min_damping: float = 1e-8
    max_damping: float = float("inf")
    damping_algorithm: str = "levenberg-marquardt"
    curvature: str = "fisher"
    max_lr: float | None = None
    amplification: float = 1.0
    lr_ema: float = 0.0
    curvature_ema: float = 0.0
    curvature_ema_init: float | None = None
    saddle_free: bool = False
    curvature_guard: bool = False
    grad_clip_norm: float | None = None
    direction_clip: float | None = None
    update_clip_norm: float | None = None
    weight_decay: float = 0.0
    decoupled_weight_decay: bool = False
    quad_model: str = "derived"
    official_regression_scaling: bool = False


class ReferenceQLR:
    """One model, one loss, one optimizer.

    Args:
        dense: The model; ``dense.theta`` is what the steps change.
        loss: Called as ``loss(output, target)``.
        settings: Hyper-parameters.
    """

    def __init__(
        self, dense: DenseModel, loss: Callable[[Tensor, Tensor], Tensor], settings: Settings
    ) -> None:
        self.dense, self.loss, self.settings = dense, loss, settings
        self.m = torch.zeros_like(dense.theta)
        self.v = torch.zeros_like(dense.theta)
        self.t = 0
        self.damping = settings.damping
        self.mean_alpha: float | None = None
        self.mean_curvature = settings.curvature_ema_init

    def _matrix(self, x: Tensor, y: Tensor) -> Tensor:
        def objective(output: Any) -> Tensor:
            return self.loss(output, y)

        if self.settings.curvature == "hessian":
            return self.dense.hessian((x,), objective)
        matrix = self.dense.ggn((x,), [Head(lambda output: output, objective)])
        if self.settings.official_regression_scaling and y.is_floating_point():
            matrix = matrix * y.shape[1]  # divided by N where the loss divides by N K
        return matrix

    def _direction(self, g: Tensor) -> Tensor:
        s = self.settings
        if s.betas is None:
            return g.clone()
        beta1, beta2 = s.betas
        self.t += 1
        self.m = beta1 * self.m + (1 - beta1) * g
        self.v = beta2 * self.v + (1 - beta2) * g * g
        m_hat = self.m / (1 - beta1**self.t)
        v_hat = self.v / (1 - beta2**self.t)
        return m_hat / (v_hat.sqrt() + s.eps)

    def _alpha(self, a: float, kappa: float) -> float:
        s = self.settings
        alpha = a / kappa
        if s.max_lr is not None:
            alpha = max(-s.max_lr, min(s.max_lr, alpha))
        alpha *= s.amplification
        if s.lr_ema > 0:
            old = alpha if self.mean_alpha is None else self.mean_alpha
            alpha = self.mean_alpha = s.lr_ema * old + (1 - s.lr_ema) * alpha
        return alpha

    # In one piece, in the order of the paper's algorithm.
    def step(  # noqa: PLR0912, PLR0915
        self, x: Tensor, y: Tensor, lr: float = 1.0
    ) -> dict[str, float]:
        """Take one step on a batch and return what was measured.

        Args:
            x: Inputs.
            y: Targets.
            lr: Envelope.
        """
        s, theta = self.settings, self.dense.theta

        def loss_at(point: Tensor) -> float:
            return self.dense.loss(point, (x,), lambda output: self.loss(output, y)).item()

        # 1. Loss and gradient.
        old_loss = loss_at(theta)
        g = self.dense.gradient((x,), lambda output: self.loss(output, y))
        if s.grad_clip_norm is not None and g.norm() > s.grad_clip_norm:
            g = g * s.grad_clip_norm / g.norm()
        # 2. Direction.
        before = (self.m, self.v, self.t)
        d = self._direction(g)
        if s.direction_clip is not None:
            d = d.clamp(-s.direction_clip, s.direction_clip)
        # 3. Curvature.
        measured = curvature = (d @ self._matrix(x, y) @ d).item()
        damping_term = self.damping * (d @ d).item()
        kappa = curvature + damping_term
        if s.curvature_ema > 0:
            old = kappa if self.mean_curvature is None else self.mean_curvature
            kappa = self.mean_curvature = s.curvature_ema * old + (1 - s.curvature_ema) * kappa
            curvature = kappa - damping_term
        if s.saddle_free:
            kappa = abs(kappa)
        if s.curvature_guard and kappa <= 0:
            kappa = abs(curvature) + damping_term
        # 4. Learning rate.
        a = (g @ d).item()
        alpha = self._alpha(a, kappa)
        # 5. Update.
        delta = alpha * d
        if not s.decoupled_weight_decay:
            delta = delta + s.weight_decay * theta
        factor = lr
        if s.update_clip_norm is not None and delta.norm() > s.update_clip_norm:
            factor = lr * s.update_clip_norm / delta.norm().item()
        new = theta - factor * delta
        # 6. Reduction ratio.
        new_loss = loss_at(new)
        model_kappa = kappa
        if s.quad_model in ("adam", "adam-sqrt"):
            diagonal = before[1] if s.quad_model == "adam" else before[1].sqrt()
            model_kappa = damping_term + (d @ (diagonal * d)).item()
        length = factor * alpha
        t = length if s.quad_model == "taken" else alpha
        q = 0.5 * t * t * model_kappa - t * a
        rho = (new_loss - old_loss) / q
        # 7. Damping.
        kept = True
        if s.damping_algorithm == "decreasing-loss":
            kept = new_loss <= old_loss
            if not kept:
                new = theta
                self.m, self.v, self.t = before
            self._adapt(s.damping_decrease_factor if kept else s.damping_increase_factor)
        elif s.damping_algorithm == "levenberg-marquardt":
            if rho > 3 / 4:
                self._adapt(s.damping_decrease_factor)
            elif rho < 1 / 4:
                self._adapt(s.damping_increase_factor)
            else:
                self._adapt(1.0)
        if s.decoupled_weight_decay and kept:
            new = new - max(length, 0.0) * s.weight_decay * new
        self.dense.theta = new
        return {
            "loss": old_loss,
            "new_loss": new_loss,
            "step_length": alpha,
            "lr": length,
            "slope": a,
            "curvature": measured,
            "quad_model_change": q,
            "reduction_ratio": rho,
            "damping": self.damping,
        }

    def _adapt(self, factor: float) -> None:
        s = self.settings
        self.damping = min(max(self.damping * factor, s.min_damping), s.max_damping)
