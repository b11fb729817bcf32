"""ForwardGradient: exact slopes along random directions, by forward-mode differentiation.

Baydin, Pearlmutter, Syme, Wood and Torr, "Gradients without backpropagation", 2022,
arXiv:2202.08587; in the comparison of Zhang et al., 2024, arXiv:2402.11592.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_curvature.curvature.perturbation import Distribution, Piece
from lightning_curvature.optim.zeroth_arguments import Blockwise, ModelMode
from lightning_curvature.optim.zeroth_gradient import decay_, step_
from lightning_curvature.optim.zeroth_order import ZerothOrderOptimizer
from lightning_curvature.optim.zeroth_passes import Passes
from lightning_curvature.optim.zeroth_storage import HalfPrecision

__all__ = ["ForwardGradient"]


class ForwardGradient(ZerothOrderOptimizer):
    r"""Gradient descent with exact slopes along random directions; no backward, no graph.

    .. math::
        \theta \leftarrow \theta - \eta\,((\nabla L \cdot v)\, v + \lambda \theta)

    The derivative comes from dual numbers that are pushed through the model together with its
    activations: no perturbation scale to choose and no cancellation, so it also suits half
    precision. Every operator of the model must have a forward-mode rule.

    Cost per step: one forward pass, and per direction one with dual numbers, about two more.
    Memory: one copy of the parameters per direction in turn, and twice the activations of a layer.

    Args:
        params: Parameters to optimize, or parameter groups. Groups with ``first_order=True`` get
            true gradients by a backward, see `MeZO`.
        lr: Learning rate, >= 0. Groups may differ in it and in ``weight_decay``.
        weight_decay: Weight decay, >= 0.
        num_samples: Directions per step, >= 1, whose estimates are averaged.
        distribution: Of the directions: "normal"; "rademacher", random signs; "sphere", normal
            numbers scaled to the norm that they have on average.
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
        >>> optimizer = ForwardGradient(model.parameters(), lr=1e-2)
        >>> loss_fn = optimizer.attach_model(model, torch.nn.functional.cross_entropy)
        >>> x, y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
        >>> loss = optimizer.step(lambda: loss_fn(model(x), y))
        >>> all(p.grad is None for p in model.parameters())
        True

    References:
        Baydin et al., 2022, arXiv:2202.08587.
    """

    asks: ClassVar[frozenset[str]] = frozenset({"forward", "slope"})

    def __init__(
        self,
        params: Any,
        lr: float = 1e-6,
        weight_decay: float = 0.0,
        num_samples: int = 1,
        distribution: Distribution = "normal",
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
            "weight_decay": weight_decay,
            "num_samples": num_samples,
            "distribution": distribution,
            "half_precision": half_precision,
            "model_mode": model_mode,
            "blockwise": blockwise,
            "max_projected_grad": max_projected_grad,
            "seed": seed,
            "max_failures": max_failures,
            "foreach": foreach,
            "maximize": maximize,
            "restore": "fused",
        }
        super().__init__(params, defaults)

    def _visit(self, passes: Passes, block: int) -> list[Tensor]:
        moving = self._begin()
        members = moving.blocks[block]
        params = [moving.directions.params[i] for i in members]
        slopes = []
        for sample in range(int(self.param_groups[0]["num_samples"])):
            whole = moving.whole(sample, members)
            with self._precisely():
                slopes.append(passes.slope(whole, params))
        loss = self._loss_at(passes, None)
        return [loss, *[slope.to(loss) for slope in slopes]]

    def _read(self, averages: Tensor) -> tuple[Tensor, Tensor]:
        loss = averages[0]
        # A slope may be finite where the loss is not.
        slopes = torch.where(loss.isfinite(), self._limited(averages[1:]), torch.nan)
        return slopes.unsqueeze(1), loss

    def _rule(
        self,
        group: dict[str, Any],
        piece: Piece,
        values: list[Tensor],
        estimate: list[Tensor],
        on: float | Tensor,
    ) -> None:
        decay_(estimate, values, group)
        step_(values, estimate, float(group["lr"]), on)
