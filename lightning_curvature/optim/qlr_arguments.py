"""Checks of the hyper-parameters that AdamQLR and SGDQLR share."""

import math
from typing import Any

from lightning_curvature.checks import (
    check_betas,
    check_choice,
    check_in_range,
    check_interval,
    check_positive,
)

__all__ = ["check_arguments"]


def check_arguments(a: dict[str, Any]) -> None:
    """Check all hyper-parameters, in the order of the signature.

    Args:
        a: Hyper-parameters by name.

    Raises:
        ValueError: If one is out of range.
        TypeError: If one has the wrong type.
    """
    check_positive("lr", a["lr"], zero=True)
    if "betas" in a:
        check_betas(a["betas"])
        check_positive("eps", a["eps"])
    check_positive("damping", a["damping"], zero=True)
    check_in_range("damping_increase_factor", a["damping_increase_factor"], 1, math.inf)
    check_in_range(
        "damping_decrease_factor",
        a["damping_decrease_factor"],
        0,
        1,
        include_low=False,
        include_high=True,
    )
    check_positive("min_damping", a["min_damping"], zero=True)
    check_in_range("max_damping", a["max_damping"], a["min_damping"], math.inf, include_high=True)
    check_choice(
        "damping_algorithm",
        a["damping_algorithm"],
        ("levenberg-marquardt", "decreasing-loss", "fixed"),
    )
    check_interval("damping_update_interval", a["damping_update_interval"])
    check_choice("curvature", a["curvature"], ("fisher", "hessian"))
    check_interval("curvature_update_interval", a["curvature_update_interval"])
    for name in ("max_lr", "grad_clip_norm", "direction_clip", "update_clip_norm"):
        if a[name] is not None:
            check_positive(name, a[name])
    check_positive("amplification", a["amplification"])
    if a["lr_ema"] is not None:
        check_in_range("lr_ema", a["lr_ema"], 0, 1)
    check_in_range("curvature_ema", a["curvature_ema"], 0, 1)
    if a["curvature_ema_init"] is not None:
        check_positive("curvature_ema_init", a["curvature_ema_init"])
    check_positive("weight_decay", a["weight_decay"], zero=True)
    models = ("taken", "derived", "adam", "adam-sqrt") if "betas" in a else ("taken", "derived")
    check_choice("quad_model", a["quad_model"], models)
    check_interval("max_failures", a["max_failures"])
