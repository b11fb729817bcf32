"""The rule of the two Sophias as it is written down, one flat vector at a time."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_curvature import SophiaG, SophiaH
from tests.helpers.estimates import flat
from tests.helpers.scripted import script

STEPS = 7
KINDS = (SophiaG, SophiaH)


def settings(**options: Any) -> dict[str, Any]:
    """Return arguments under which clipped and scaled entries are about as many."""
    return {
        "lr": 0.03,
        "betas": (0.6, 0.8),
        "rho": 0.7,
        "weight_decay": 0.1,
        "hessian_update_interval": 2,
        **options,
    }


def estimates(kind: type, steps: int = STEPS, **options: Any) -> list[list[Tensor]]:
    """Draw estimates, which are positive for SophiaG."""
    found = script(steps, seed=9, **options)
    return [[x.abs() for x in xs] for xs in found] if kind is SophiaG else found


def reference(
    theta: Tensor,
    grads: Sequence[Tensor],
    new: Sequence[Tensor],
    *,
    kind: type,
    lr: float = 1e-4,
    betas: tuple[float, float] = (0.965, 0.99),
    rho: float,
    eps: float = 1e-12,
    weight_decay: float = 0.1,
    hessian_update_interval: int = 10,
    hessian_timing: str = "before",
    bias_correction: bool = False,
    maximize: bool = False,
) -> tuple[Tensor, Tensor, list[float]]:
    """Return parameters, diagonal, and the shares of entries that were scaled."""
    beta1, beta2 = betas
    m, h = torch.zeros_like(theta), torch.zeros_like(theta)
    count, rates, sign = 0, [], -1.0 if maximize else 1.0
    waiting = list(new)

    def refresh() -> None:
        nonlocal h, count
        turned = -1.0 if maximize and kind is SophiaH else 1.0
        h = beta2 * h + (1 - beta2) * turned * waiting.pop(0)
        count += 1

    for step, g in enumerate(grads, start=1):
        k = hessian_update_interval
        due = step % k == 0 if hessian_timing == "after" else (step - 1) % k == 0
        if due and hessian_timing == "before":
            refresh()
        theta = (1 - lr * weight_decay) * theta
        m = beta1 * m + (1 - beta1) * sign * g
        m_hat, h_hat = m, h
        if bias_correction:
            m_hat = m / (1 - beta1**step)
            h_hat = h / (1 - beta2 ** max(count, 1))
        if due:
            rates.append(float((m_hat.abs() < rho * h_hat).double().mean()))
        theta = theta - lr * (m_hat / (rho * h_hat).clamp_min(eps)).clamp(-1.0, 1.0)
        if due and hessian_timing == "after":
            refresh()
    return theta, h, rates


def joined(xs: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Return each list as one vector."""
    return [flat(x) for x in xs]
