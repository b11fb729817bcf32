r"""Learning rate and momentum that minimize a quadratic model over two directions.

With V = (Delta, v), the preconditioned gradient and the last update, A = V^T C V, b = V^T grad and
D = V^T V, the model of the loss after the update V w is

    M(w) = L0 + q(w),      q(w) = 1/2 w^T (A + lambda D) w + w^T b.

The update is -alpha Delta + beta v, that is w = (-alpha, beta). (Martens and Grosse,
arXiv:1503.05671, section 7.) All functions are free of branches on values of tensors.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Coefficients", "quadratic_change", "solve_coefficients"]

# Share of the second direction that is not along the first, below which it adds nothing but the
# error of the measurement: relative to the size of both, squared.
_LEAST_ANGLE = 1e-8


class Coefficients(NamedTuple):
    """Answer of `solve_coefficients`.

    Attributes:
        values: w, ``[2]``.
        found: Boolean 0-dim tensor: whether they are usable.
    """

    values: Tensor
    found: Tensor


def solve_coefficients(
    matrix: Tensor,
    slopes: Tensor,
    *,
    first: Tensor | None = None,
    second: Tensor | None = None,
    second_limit: float | None = None,
) -> Coefficients:
    """Minimize the model over the coefficients that are free.

    Where the second direction is zero, or parallel to the first, its coefficient is 0; where the
    first one is zero, as at a minimum, that is 0, too.

    Args:
        matrix: A + lambda D, ``[2, 2]``, symmetric, positive semi-definite but for errors.
        slopes: b, ``[2]``.
        first: The first coefficient if it is given.
        second: The second coefficient if it is given.
        second_limit: Largest absolute value of the second one if it is free, None for any. The
            first one minimizes the model with what is left of it.
    """
    dtype = matrix.dtype
    # There is no float64 on some devices.
    precise = dtype if matrix.device.type == "mps" else torch.float64
    m, b = matrix.to(precise), slopes.to(precise)
    a11, a12, a22 = m[0, 0], m[0, 1], m[1, 1]
    zero = torch.zeros_like(a11)
    still = (a11 == 0) & (b[0] == 0)
    if first is not None and second is not None:
        w1, w2 = first.to(precise), second.to(precise)
    elif second is not None:
        w2 = second.to(precise)
        w1 = torch.where(still, zero, -(b[0] + a12 * w2) / a11)
    elif first is not None:
        w1 = first.to(precise)
        w2 = torch.where(a22 > 0, -(b[1] + a12 * w1) / a22, zero)
        w2 = _within(w2, second_limit)
    else:
        determinant = a11 * a22 - a12 * a12
        both = (a22 > 0) & (determinant > _LEAST_ANGLE * a11 * a22)
        safe = torch.where(both, determinant, torch.ones_like(determinant))
        w1 = torch.where(both, (a12 * b[1] - a22 * b[0]) / safe, -b[0] / a11)
        w1 = torch.where(still, zero, w1)
        w2 = torch.where(both, (a12 * b[0] - a11 * b[1]) / safe, zero)
        w2 = torch.where(still & (a22 > 0), -b[1] / a22, w2)
        kept = _within(w2, second_limit)
        alone = torch.where(still, zero, -(b[0] + a12 * kept) / a11)
        w1, w2 = torch.where(kept == w2, w1, alone), kept
    values = torch.stack([w1, w2])
    given = first is not None
    found = torch.isfinite(values).all() & ((a11 > 0) | still | given)
    return Coefficients(torch.where(found, values, torch.zeros_like(values)).to(dtype), found)


def _within(value: Tensor, limit: float | None) -> Tensor:
    return value if limit is None else value.clamp(-limit, limit)


def quadratic_change(coefficients: Tensor, matrix: Tensor, slopes: Tensor) -> Tensor:
    """Return the predicted change q(w) of the loss.

    Args:
        coefficients: w.
        matrix: A, with or without damping.
        slopes: b.
    """
    return 0.5 * coefficients @ matrix @ coefficients + coefficients @ slopes
