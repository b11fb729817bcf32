"""What the metric of HiZOO is good for, on a quadratic whose curvatures differ by a thousand."""

from typing import Any

import torch
from torch import nn

from lightning_curvature import HiZOO, MeZO

SIZE, STEPS = 20, 1500


def curvatures() -> torch.Tensor:
    order = torch.randperm(SIZE, generator=torch.Generator().manual_seed(0))
    return torch.logspace(-2, 1, SIZE, dtype=torch.float64)[order]


def descend(cls: Any, steps: int = STEPS, **options: Any) -> tuple[float, Any]:
    """Minimize the quadratic and return its last value and the optimizer."""
    bends = curvatures()
    w = nn.Parameter(torch.ones(SIZE, dtype=torch.float64))
    optimizer = cls([w], perturbation_scale=1e-3, **options)
    optimizer.attach_model(nn.ParameterList([w]), nn.MSELoss())
    for _ in range(steps):
        optimizer.step(lambda: 0.5 * (bends * w * w).sum())
    return float(0.5 * (bends * w * w).sum().detach()), optimizer


def median_ratio(optimizer: Any) -> float:
    (state,) = optimizer.state.values()
    return float((state["hess_diag"] / curvatures()).median())


def test_normalized_estimates_are_of_the_size_of_the_hessian_and_win() -> None:
    """The rule as published overestimates (d + 2) / 2 times, so its steps are too short."""
    reference = {lr: descend(HiZOO, lr=lr, hessian_smoothing=0.01) for lr in (0.1, 0.2)}
    normalized, optimizer = descend(HiZOO, lr=0.04, hessian_smoothing=0.03, normalized=True)
    # Of equal cost: three passes and two.
    mezo = min(descend(MeZO, STEPS * 3 // 2, lr=lr)[0] for lr in (0.02, 0.04))
    assert normalized < 0.1 * min(loss for loss, _ in reference.values())
    assert normalized < 0.1 * mezo
    assert 0.7 < median_ratio(optimizer) < 1.5
    assert all(7 < median_ratio(found) < 15 for _, found in reference.values())
