r"""The quadratic model of the loss along one direction.

With theta the parameters, d a direction that points uphill, a = <grad, d> its slope, C a curvature
matrix and lambda the damping, the model of the loss after the step theta - t d is

    M(t) = L0 + q(t),      q(t) = 1/2 t^2 kappa - t a,      kappa = d^T C d + lambda d^T d.

Its minimizer is t = a / kappa. The reduction ratio compares what happened with what M promised:
rho = (L(theta - t d) - L0) / q(t). (Clarke and Hernandez-Lobato, 2024, arXiv:2310.14963.)

All functions take and return 0-dim tensors and are free of branches on their values.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["StepLength", "model_change", "reduction_ratio", "step_length"]


class StepLength(NamedTuple):
    """Answer of `step_length`.

    Attributes:
        length: The step length t, 0 where none could be found.
        kappa: The damped curvature that was used.
        found: Boolean 0-dim tensor: whether the step is usable.
    """

    length: Tensor
    kappa: Tensor
    found: Tensor


def step_length(
    slope: Tensor,
    curvature: Tensor,
    damping_term: Tensor,
    *,
    saddle_free: bool = False,
    guard: bool = True,
) -> StepLength:
    """Minimize the damped quadratic model along a direction.

    Args:
        slope: <grad, d>.
        curvature: d^T C d, undamped; may be negative for a Hessian.
        damping_term: lambda d^T d, at least 0.
        saddle_free: Whether to divide by the absolute value of kappa.
        guard: Whether a kappa that is not positive or not finite is replaced by
            ``|d^T C d| + lambda d^T d``. Without it a negative kappa climbs, as in the official
            code.
    """
    kappa = curvature + damping_term
    if saddle_free:
        kappa = kappa.abs()
    tiny = torch.finfo(kappa.dtype).tiny
    if guard:
        sound = torch.isfinite(kappa) & (kappa > tiny)
        # A non-finite curvature leaves the damping alone to set the scale.
        magnitude = torch.nan_to_num(curvature.abs(), nan=0.0, posinf=0.0)
        kappa = torch.where(sound, kappa, magnitude + damping_term)
    length = slope / kappa
    found = torch.isfinite(length) & (kappa.abs() > tiny)
    return StepLength(torch.where(found, length, torch.zeros_like(length)), kappa, found)


def model_change(length: Tensor, slope: Tensor, kappa: Tensor) -> Tensor:
    """Return the predicted change q(t) of the loss; negative for a step that promises progress."""
    return 0.5 * length * (length * kappa) - length * slope


def reduction_ratio(new_loss: Tensor, old_loss: Tensor, predicted: Tensor) -> Tensor:
    """Return (actual change) / (predicted change); NaN where no step was taken."""
    return (new_loss - old_loss) / predicted
