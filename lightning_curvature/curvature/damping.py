"""Rules that adapt the damping, as pure functions of 0-dim tensors.

Nothing here reads a value back from the device: a rule is a `torch.where`.
"""

import math

import torch
from torch import Tensor

__all__ = ["accept_or_raise", "clamp", "levenberg_marquardt"]


def clamp(damping: Tensor, min_damping: float, max_damping: float) -> Tensor:
    """Return the damping confined to [``min_damping``, ``max_damping``]."""
    high = None if math.isinf(max_damping) else max_damping
    return damping.clamp(min_damping, high)


def levenberg_marquardt(
    damping: Tensor,
    reduction_ratio: Tensor,
    *,
    increase_factor: float,
    decrease_factor: float,
    failed: Tensor | None = None,
    low: float = 0.25,
    high: float = 0.75,
) -> Tensor:
    """Raise the damping where the model promised too much and lower it where it was right.

    Args:
        damping: Present damping, at least 0.
        reduction_ratio: (actual change) / (predicted change). NaN leaves the damping unchanged.
        increase_factor: Factor for a ratio below ``low``, at least 1.
        decrease_factor: Factor for a ratio above ``high``, in (0, 1].
        failed: Boolean 0-dim tensor: raise whatever the ratio says (a new loss that is not finite).
        low: Ratio below which the model is mistrusted.
        high: Ratio above which the model is trusted.

    References:
        Clarke and Hernandez-Lobato, 2024, arXiv:2310.14963; Martens and Grosse, 2015,
        arXiv:1503.05671, section 6.5.
    """
    raised = damping * increase_factor
    adapted = torch.where(reduction_ratio > high, damping * decrease_factor, damping)
    too_low = reduction_ratio < low
    if failed is not None:
        too_low = too_low | failed
    return torch.where(too_low, raised, adapted)


def accept_or_raise(
    damping: Tensor, accepted: Tensor, *, increase_factor: float, decrease_factor: float
) -> Tensor:
    """Lower the damping after an accepted step and raise it after a rejected one."""
    return torch.where(accepted, damping * decrease_factor, damping * increase_factor)
