"""ZOMomentum: momentum over slopes along random directions, as ZO-SGD-MMT of arXiv:2402.11592."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_curvature.checks import check_in_range
from lightning_curvature.curvature.perturbation import Distribution, Piece
from lightning_curvature.optim.zeroth_arguments import Blockwise, Estimator, ModelMode
from lightning_curvature.optim.zeroth_gradient import ZerothGradientOptimizer, decay_, step_
from lightning_curvature.optim.zeroth_storage import HalfPrecision, Restore

__all__ = ["ZOMomentum"]


class ZOMomentum(ZerothGradientOptimizer):
    r"""Gradient descent with momentum and slopes along random directions; forward passes only.

    .. math::
        m \leftarrow \mu m + g z + \lambda \theta, \qquad \theta \leftarrow \theta - \eta m

    The momentum averages the estimates of 1 / (1 - mu) steps, each of which knows one direction;
    the learning rate is that many times smaller than that of `MeZO`.

    Cost per step: two forward passes, and three draws of a direction.
    Memory: one copy of the parameters.

    Args:
        params: Parameters to optimize, or parameter groups. Groups with ``first_order=True`` get
            true gradients by a backward, see `MeZO`.
        lr: Learning rate, >= 0. Groups may differ in it and in ``weight_decay``.
        momentum: Share mu of the last update that is kept, in [0, 1).
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
        >>> optimizer = ZOMomentum(model.parameters(), lr=1e-2)
        >>> loss_fn = optimizer.attach_model(model, torch.nn.functional.cross_entropy)
        >>> x, y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
        >>> loss = optimizer.step(lambda: loss_fn(model(x), y))
        >>> all(p.grad is None for p in model.parameters())
        True

    References:
        Zhang et al., 2024, arXiv:2402.11592.
    """

    state_names: ClassVar[tuple[str, ...]] = ("momentum_buffer",)

    def __init__(
        self,
        params: Any,
        lr: float = 1e-7,
        momentum: float = 0.9,
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
            "momentum": momentum,
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
        check_in_range("momentum", group["momentum"], 0, 1)

    def _rule(
        self,
        group: dict[str, Any],
        piece: Piece,
        values: list[Tensor],
        estimate: list[Tensor],
        on: float | Tensor,
    ) -> None:
        (buffers,) = self._state(piece, "momentum_buffer")
        decay_(estimate, values, group)
        torch._foreach_mul_(buffers, 1 - (1 - self.param_groups[0]["momentum"]) * on)
        if isinstance(on, Tensor):
            torch._foreach_mul_(estimate, on.to(estimate[0].dtype))
        torch._foreach_add_(buffers, estimate)
        step_(values, buffers, float(group["lr"]), on)
