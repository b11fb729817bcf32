"""AdaFisherW: momentum divided by a Fisher diagonal made of layer factors; decoupled weight decay.

Arxiv 2405.16397; see `adafisher_base.py` for the rule and where it differs from the authors' code.
"""

from typing import Any, ClassVar

from lightning_curvature.curvature.layer_diagonals import Normalization
from lightning_curvature.optim.adafisher_base import AdaFisherOptimizer, Mode

__all__ = ["AdaFisherW"]


class AdaFisherW(AdaFisherOptimizer):
    """TODO."""

    decoupled: ClassVar[bool] = True

    def __init__(
        self,
        params: Any,
        lr: float | None = None,
        beta: float = 0.9,
        damping: float | None = None,
        factor_update_interval: int = 100,
        factor_decay: float = 0.8,
        weight_decay: float = 5e-4,
        mode: Mode = "corrected",
        normalization: Normalization = "mean",
        max_failures: int = 20,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "beta": beta,
            "damping": damping,
            "factor_update_interval": factor_update_interval,
            "factor_decay": factor_decay,
            "weight_decay": weight_decay,
            "mode": mode,
            "normalization": normalization,
            "max_failures": max_failures,
            "foreach": foreach,
            "maximize": maximize,
        }
        super().__init__(params, defaults)
