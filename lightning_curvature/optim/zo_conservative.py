"""ZOConservative: of a step along a random direction, against it, or none, takes the best.

Of the benchmark in Zhang et al., 2024, arXiv:2402.11592 (ZO-SGD-Cons).
"""

from typing import Any

import torch
from torch import Tensor

from lightning_curvature.curvature.perturbation import Distribution, Piece
from lightning_curvature.optim.displacement import Point
from lightning_curvature.optim.zeroth_arguments import Blockwise, ModelMode
from lightning_curvature.optim.zeroth_gradient import ZerothGradientOptimizer, step_
from lightning_curvature.optim.zeroth_order import LARGEST_SLOPE
from lightning_curvature.optim.zeroth_passes import Passes
from lightning_curvature.optim.zeroth_storage import HalfPrecision, Restore

__all__ = ["ZOConservative"]


class ZOConservative(ZerothGradientOptimizer):
    r"""Gradient descent with slopes along random directions that looks before it leaps.

    After the slope g the loss is evaluated at both candidates, :math:`\theta \mp \eta g z`, and
    the step goes where it is least: downhill, uphill, or nowhere. The loss of the batch never
    rises, so a learning rate that is too large costs time instead of the run. Where candidates are
    so far away that the way back costs digits, use ``restore="snapshot"``. With
    ``blockwise="joint"`` candidates of one block are compared at a time, but taken together.

    Cost per step: five forward passes, and four draws of a direction.
    Memory: nothing per parameter.

    Args:
        params: Parameters to optimize, or parameter groups.
        lr: Learning rate, >= 0, the same for all groups.
        perturbation_scale: Length epsilon of a displacement, per coordinate; > 0.
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
        >>> optimizer = ZOConservative(model.parameters(), lr=1e-2)
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
        perturbation_scale: float = 1e-3,
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
            "perturbation_scale": perturbation_scale,
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
            "num_samples": 1,
            "estimator": "two_sided",
        }
        super().__init__(params, defaults)

    @property
    def shared(self) -> tuple[str, ...]:
        """Names of the hyper-parameters that are one value for all groups."""
        return (*super().shared, "lr")

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if group.get("weight_decay"):
            raise ValueError(
                f"Invalid weight_decay={group['weight_decay']!r}: ZOConservative has none, its "
                "candidates differ in the direction only. Use MeZO, or add a penalty to the loss."
            )
        if group["first_order"]:
            raise ValueError(
                "Invalid first_order=True: ZOConservative compares losses along one direction. Use "
                "MeZO for parameters with gradients."
            )

    def _first_point(self) -> Point | None:
        return None

    def _visit(self, passes: Passes, block: int) -> list[Tensor]:
        length = self._length()
        points = (None, Point(0, length, block), Point(0, -length, block))
        return [self._loss_at(passes, point) for point in points]

    def _read(self, averages: Tensor) -> tuple[Tensor, Tensor]:
        loss, above, below = averages.unbind()
        slope = (above - below) / (2 * self._length())
        # The loss itself is compared with those of the candidates.
        return torch.stack([self._limited(slope), loss]).unsqueeze(0), loss

    def _measure(self, passes: Passes, blocks: list[int]) -> tuple[Tensor, Tensor]:
        answers, loss = super()._measure(passes, blocks)
        chosen = [
            self._choose(passes, block, answer)
            for block, answer in zip(blocks, answers.unsqueeze(1), strict=True)
        ]
        return torch.cat(chosen), loss

    def _choose(self, passes: Passes, block: int, answer: Tensor) -> Tensor:
        """Look at both candidates and return the slope with its sign, zero to stay."""
        group = self.param_groups[0]
        slope, loss = answer[0]
        # A slope that is not finite must not displace anything; it is refused below.
        usable = slope.abs() <= LARGEST_SLOPE
        # Where the update goes if the answer is the slope itself.
        rate = float(group["lr"]) if group["maximize"] else -float(group["lr"])
        lengths = torch.where(usable, slope * rate, 0.0).reshape(1)
        (length,) = self._numbers(lengths)
        sides = (length, -length)
        found = [self._loss_at(passes, Point(0, side, block)) for side in sides]

        def read(averages: Tensor) -> tuple[Tensor, Tensor]:
            averages = -averages if group["maximize"] else averages
            base = -loss if group["maximize"] else loss
            down, up = averages.unbind()
            stays = (down > base) & (base < up)
            choice = torch.where((down <= base) & (down < up), 1.0, torch.where(stays, 0.0, -1.0))
            finite = torch.isfinite(averages).all() & torch.isfinite(answer).all()
            return torch.where(finite, choice * slope, torch.nan).view(1, 1), base

        return passes.settle(found, read)[0]

    def _rule(
        self,
        group: dict[str, Any],
        piece: Piece,
        values: list[Tensor],
        estimate: list[Tensor],
        on: float | Tensor,
    ) -> None:
        # Of the first group, whose candidates were compared.
        step_(values, estimate, float(self.param_groups[0]["lr"]), on)
