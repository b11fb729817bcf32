"""Checks of the arguments that K-FAC and EK-FAC share."""

import math
from collections.abc import Mapping
from typing import Any, get_args

from lightning_curvature.checks import (
    check_choice,
    check_count,
    check_in_range,
    check_interval,
    check_positive,
)
from lightning_curvature.curvature.kronecker_shares import InverseSharding
from lightning_curvature.curvature.layer_rows import KfacApprox
from lightning_curvature.oracle.plans import FisherType

__all__ = ["check_arguments"]

_INTERVALS = (
    "factor_update_interval",
    "inverse_update_interval",
    "curvature_update_interval",
    "damping_update_interval",
)
_BOOLEANS = (
    "adaptive_lr",
    "adaptive_momentum",
    "include_damping_in_quad_change",
    "step_rejection",
    "official_empirical_scaling",
    "maximize",
)


def check_arguments(a: Mapping[str, Any]) -> None:
    """Check hyper-parameters.

    Args:
        a: They by name.

    Raises:
        ValueError: If one is out of range.
        TypeError: If one has the wrong type.
    """
    check_positive("lr", a["lr"], zero=True)
    check_in_range("momentum", a["momentum"], 0, 1)
    check_positive("damping", a["damping"])
    check_positive("weight_decay", a["weight_decay"], zero=True)
    check_positive("l2_reg", a["l2_reg"], zero=True)
    for name in _BOOLEANS:
        if not isinstance(a[name], bool):
            raise TypeError(f"Invalid {name}={a[name]!r}: must be True or False.")
    for name in ("max_momentum", "max_relative_update"):
        if a[name] is not None:
            check_positive(name, a[name])
    if a["norm_constraint"] is not None:
        check_positive("norm_constraint", a["norm_constraint"])
        if a["adaptive_lr"]:
            raise ValueError(
                f"Invalid norm_constraint={a['norm_constraint']!r}: an adaptive learning rate has "
                "no need of it. Set it to None, or adaptive_lr to False."
            )
    check_choice("damping_algorithm", a["damping_algorithm"], ("levenberg-marquardt", "fixed"))
    check_in_range("damping_increase_factor", a["damping_increase_factor"], 1, math.inf)
    check_in_range(
        "damping_decrease_factor",
        a["damping_decrease_factor"],
        0,
        1,
        include_low=False,
        include_high=True,
    )
    check_in_range("rejection_increase_factor", a["rejection_increase_factor"], 1, math.inf)
    check_positive("min_damping", a["min_damping"], zero=True)
    check_in_range("max_damping", a["max_damping"], a["min_damping"], math.inf, include_high=True)
    check_choice("quad_model", a["quad_model"], ("exact", "factors"))
    check_in_range("factor_decay", a["factor_decay"], 0, 1)
    check_choice("fisher_type", a["fisher_type"], get_args(FisherType))
    check_count("mc_samples", a["mc_samples"])
    check_choice("kfac_approx", a["kfac_approx"], get_args(KfacApprox))
    for name in _INTERVALS:
        check_interval(name, a[name])
    check_in_range("factor_warmup", a["factor_warmup"], 0, math.inf)
    check_count("max_factor_dim", a["max_factor_dim"])
    for name in ("factor_dtype", "inverse_dtype"):
        if a[name] is not None:
            check_choice(name, a[name], ("float32", "bfloat16"))
    check_choice("inverse_sharding", a["inverse_sharding"], get_args(InverseSharding))
    check_in_range("seed", a["seed"], 0, math.inf)
    for name in ("factor_warmup", "seed"):
        if not isinstance(a[name], int):
            raise TypeError(f"Invalid {name}={a[name]!r}: must be an integer.")
    check_interval("max_failures", a["max_failures"])
