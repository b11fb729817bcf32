"""ZOSignSGD: the sign of slopes along random directions.

Of the benchmark in Zhang et al., 2024, arXiv:2402.11592, whose text takes the sign of every
coordinate of the estimate and whose code that of the slope.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_curvature.checks import check_choice
from lightning_curvature.curvature.perturbation import Distribution, Piece
from lightning_curvature.optim.zeroth_arguments import Blockwise, Estimator, ModelMode
from lightning_curvature.optim.zeroth_gradient import ZerothGradientOptimizer, decay_, step_
from lightning_curvature.optim.zeroth_storage import HalfPrecision, Restore

__all__ = ["ZOSignSGD"]


class ZOSignSGD(ZerothGradientOptimizer):
    r"""Steps along the sign of slope times direction; forward passes only.

    .. math::
        \theta \leftarrow \theta - \eta\, \mathrm{sign}(g z)

    The size of the slope has no influence on the length of a step, which makes the method robust
    against batches with huge losses, and unable to settle: lower the learning rate towards the end.

    Cost per step: two forward passes, and three draws of a direction.
    Memory: nothing per parameter.

    Args:
        params: Parameters to optimize, or parameter groups. Groups with ``first_order=True`` get
            true gradients by a backward, see `MeZO`.
        lr: Learning rate, >= 0. Groups may differ in it and in ``weight_decay``.
        sign: What the sign is taken of: "element", every coordinate of the estimate, all of which
            move by ``lr``; "scalar", the slope of each direction alone.
        weight_decay: Weight decay, >= 0.
        perturbation_scale: Length epsilon of a displacement, per coordinate; > 0.
        estimator: Where the loss is looked at: "two_sided", "one_sided" or "residual", see `MeZO`.
        num_samples: Directions per step, >= 1, whose estimates are averaged.
        distribution: Of the directions: "normal"; "rademacher", random signs; "sphere", normal
            numbers scaled to the norm that they have on average.
        restore: How parameters come back: "fused", "inplace" or "snapshot", see `MeZO`.
        half_precision: How updates of bfloat16 and float16 parameters are kept: "stochastic" rounds
            them at random; "master" keeps float32 copies; "nearest" loses most of them.
        model_mode: "train" leaves dropout on, with the same masks in all passes of a step; "eval"
            evaluates in eval mode.
        blockwise: Whether parameter groups are perturbed one after the other: "none", "coordinate"
            or "joint", see `MeZO`.
        max_projected_grad: Largest absolute value of a slope, > 0; None for no limit.
        seed: Seed of the directions, >= 0. All ranks must have the same.
        max_failures: Losses in a row that are not finite after which training stops with an error.
        foreach: False to work on one tensor at a time; otherwise small ones are worked on together.
        maximize: Whether to climb.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> import torch
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = ZOSignSGD(model.parameters(), lr=1e-2)
        >>> loss_fn = optimizer.attach_model(model, torch.nn.functional.cross_entropy)
        >>> x, y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
        >>> loss = optimizer.step(lambda: loss_fn(model(x), y))
        >>> all(p.grad is None for p in model.parameters())
        True

    References:
        Zhang et al., 2024, arXiv:2402.11592.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-6,
        sign: Literal["element", "scalar"] = "element",
        weight_decay: float = 0.0,
        perturbation_scale: float = 1e-3,
        estimator: Estimator = "two_sided",
        num_samples: int = 1,
        distribution: Distribution = "normal",
        restore: Restore = "fused",
        half_precision: HalfPrecision = "stochastic",
        model_mode: ModelMode = "train",
        blockwise: Blockwise = "none",
        max_projected_grad: float | None = None,
        seed: int = 0,
        max_failures: int = 10,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "sign": sign,
            "weight_decay": weight_decay,
            "perturbation_scale": perturbation_scale,
            "estimator": estimator,
            "num_samples": num_samples,
            "distribution": distribution,
            "restore": restore,
            "half_precision": half_precision,
            "model_mode": model_mode,
            "blockwise": blockwise,
            "max_projected_grad": max_projected_grad,
            "seed": seed,
            "max_failures": max_failures,
            "foreach": foreach,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_choice("sign", group["sign"], ("element", "scalar"))

    def _estimate(self, pieces: Sequence[Piece], answer: Tensor) -> list[Tensor]:
        if self.param_groups[0]["sign"] == "scalar":
            return super()._estimate(pieces, answer.sign())
        return super()._estimate(pieces, answer)

    def _rule(
        self,
        group: dict[str, Any],
        piece: Piece,
        values: list[Tensor],
        estimate: list[Tensor],
        on: float | Tensor,
    ) -> None:
        if self.param_groups[0]["sign"] == "element" or piece.is_gradient:
            torch._foreach_sign_(estimate)
        decay_(estimate, values, group)
        step_(values, estimate, float(group["lr"]), on)
