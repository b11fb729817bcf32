"""SGDQLR: gradient descent whose learning rate minimizes a quadratic model of the loss.

Clarke and Hernandez-Lobato, ICML 2024, arXiv:2310.14963. The ablation of AdamQLR without moments;
see `qlr.py` for the differences from the official code.
"""

from typing import Any, Literal

from torch import Tensor

from lightning_curvature import vectors
from lightning_curvature.optim.qlr import DampingAlgorithm, QLROptimizer

__all__ = ["SGDQLR"]


class SGDQLR(QLROptimizer):
    r"""Gradient descent with a learning rate and damping derived from curvature.

    .. math::
        d = g, \quad \alpha = \frac{\langle g, d\rangle}{d^\top C d + \lambda d^\top d}, \quad
        \theta \leftarrow \theta - \eta\,\alpha\,d

    Cost per step: forward and backward, one forward for the curvature, one for the reduction ratio.
    Memory: no state.

    Args:
        params: Parameters to optimize, or parameter groups.
        lr: Multiplies the derived step, so that learning-rate schedulers act as an envelope; >= 0.
        damping: Initial damping, >= 0, in the units of the curvature of the mean loss.
        damping_increase_factor: Factor when the reduction ratio is below 1/4; >= 1.
        damping_decrease_factor: Factor when the reduction ratio is above 3/4; in (0, 1].
        min_damping: Lower limit of the damping, >= 0.
        max_damping: Upper limit of the damping.
        damping_algorithm: Rule that adapts the damping; see `AdamQLR`.
        damping_update_interval: Optimizer steps between two adaptations of the damping.
        curvature: Matrix in the quadratic model; see `AdamQLR`.
        curvature_update_interval: Optimizer steps between two measurements of the curvature. In
            between, the running average of the measured step lengths (see ``lr_ema``) is carried
            over, never below 0.
        max_lr: Largest absolute derived step length before ``amplification``; None for none.
        amplification: Factor on the derived step length; > 0.
        lr_ema: Weight of the old value in a running average of the step length; in [0, 1). None for
            0 if the curvature is measured on every step and 0.8 otherwise.
        curvature_ema: Weight of the old value in a running average of the damped curvature; in [0,
            1).
        curvature_ema_init: Start of that average; None for the first measurement.
        saddle_free: Whether to divide by the absolute value of the damped curvature.
        curvature_guard: Whether a curvature that is not positive is replaced by its magnitude.
        grad_clip_norm: Largest norm of the gradient, applied before everything else.
        direction_clip: Largest absolute entry of the direction.
        update_clip_norm: Largest norm of the update, before ``lr``.
        weight_decay: Weight decay, >= 0.
        decoupled_weight_decay: Whether the decay scales with the learning rate used, as in AdamW.
        quad_model: Step that the predicted change belongs to; see `AdamQLR`.
        official_regression_scaling: Whether squared errors of several outputs are summed in the
            curvature, as in the official code.
        max_failures: Unusable steps in a row after which training stops with an error.
        foreach: For the common interface; the direction is the gradient, so nothing changes.
        maximize: Whether to climb.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> import torch
        >>> layer = torch.nn.Linear(3, 1)
        >>> optimizer = SGDQLR(layer.parameters(), damping=0.1)
        >>> criterion = optimizer.attach_model(layer, torch.nn.MSELoss())
        >>> criterion(layer(torch.ones(4, 3)), torch.zeros(4, 1)).backward()
        >>> optimizer.step()

    References:
        Clarke and Hernandez-Lobato, 2024, arXiv:2310.14963.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        damping: float = 1e-3,
        damping_increase_factor: float = 2.0,
        damping_decrease_factor: float = 0.5,
        min_damping: float = 1e-8,
        max_damping: float = 1e8,
        damping_algorithm: DampingAlgorithm = "levenberg-marquardt",
        damping_update_interval: int = 1,
        curvature: Literal["fisher", "hessian"] = "fisher",
        curvature_update_interval: int = 1,
        max_lr: float | None = 1.0,
        amplification: float = 1.0,
        lr_ema: float | None = None,
        curvature_ema: float = 0.0,
        curvature_ema_init: float | None = None,
        saddle_free: bool = False,
        curvature_guard: bool = True,
        grad_clip_norm: float | None = None,
        direction_clip: float | None = None,
        update_clip_norm: float | None = None,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = True,
        quad_model: Literal["taken", "derived"] = "taken",
        official_regression_scaling: bool = False,
        max_failures: int = 20,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "damping": damping,
            "damping_increase_factor": damping_increase_factor,
            "damping_decrease_factor": damping_decrease_factor,
            "min_damping": min_damping,
            "max_damping": max_damping,
            "damping_algorithm": damping_algorithm,
            "damping_update_interval": damping_update_interval,
            "curvature": curvature,
            "curvature_update_interval": curvature_update_interval,
            "max_lr": max_lr,
            "amplification": amplification,
            "lr_ema": lr_ema,
            "curvature_ema": curvature_ema,
            "curvature_ema_init": curvature_ema_init,
            "saddle_free": saddle_free,
            "curvature_guard": curvature_guard,
            "grad_clip_norm": grad_clip_norm,
            "direction_clip": direction_clip,
            "update_clip_norm": update_clip_norm,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "quad_model": quad_model,
            "official_regression_scaling": official_regression_scaling,
            "max_failures": max_failures,
            "foreach": foreach,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def _direction(self, params: list[Tensor], grads: list[Tensor], usable: Tensor) -> list[Tensor]:
        return vectors.clone(grads)
