"""Checks of the arguments that all zeroth-order optimizers share."""

import math
from typing import Any, Literal

from lightning_curvature.checks import (
    check_choice,
    check_count,
    check_in_range,
    check_interval,
    check_positive,
)

__all__ = ["Blockwise", "Estimator", "LayerScale", "ModelMode", "check_zeroth_order"]

Blockwise = Literal["none", "coordinate", "joint"]
Estimator = Literal["two_sided", "one_sided", "residual"]
LayerScale = Literal["none", "parameter_norm", "gradient_norm"]
ModelMode = Literal["train", "eval"]

_CHOICES = {
    "estimator": ("two_sided", "one_sided", "residual"),
    "distribution": ("normal", "rademacher", "sphere"),
    "restore": ("fused", "inplace", "snapshot"),
    "half_precision": ("stochastic", "master", "nearest"),
    "model_mode": ("train", "eval"),
    "blockwise": ("none", "coordinate", "joint"),
    "layer_scale": ("none", "parameter_norm", "gradient_norm"),
}


def check_zeroth_order(group: dict[str, Any]) -> None:
    """Check the arguments that all zeroth-order optimizers share; those not there are not checked.

    Args:
        group: A whole group.

    Raises:
        ValueError: If one is out of range.
        TypeError: If one has the wrong type.
    """
    check_positive("lr", group["lr"], zero=True)
    for name in ("weight_decay",):
        if name in group:
            check_positive(name, group[name], zero=True)
    if "perturbation_scale" in group:
        check_positive("perturbation_scale", group["perturbation_scale"])
        check_in_range("perturbation_scale", group["perturbation_scale"], 0, math.inf)
    if "num_samples" in group:
        check_count("num_samples", group["num_samples"])
    for name, choices in _CHOICES.items():
        if name in group:
            check_choice(name, group[name], choices)
    if group.get("estimator") == "residual" and group.get("num_samples", 1) != 1:
        raise ValueError(
            f"Invalid num_samples={group['num_samples']!r}: estimator='residual' compares one loss "
            "per step with that of the step before, so it must be 1."
        )
    if group.get("max_projected_grad") is not None:
        check_positive("max_projected_grad", group["max_projected_grad"])
    if "layer_scale_update_interval" in group:
        check_interval("layer_scale_update_interval", group["layer_scale_update_interval"])
    check_in_range("seed", group["seed"], 0, math.inf)
    check_interval("max_failures", group["max_failures"])
