"""ZOAdam: Adam with slopes along random directions in the place of the gradient.

Of Malladi et al., 2023, arXiv:2305.17333 (appendix B) and Zhang et al., 2024, arXiv:2402.11592.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_curvature.checks import check_betas, check_positive
from lightning_curvature.curvature.perturbation import Distribution, Piece
from lightning_curvature.optim.per_tensor import discounted_count
from lightning_curvature.optim.zeroth_arguments import Blockwise, Estimator, ModelMode
from lightning_curvature.optim.zeroth_gradient import ZerothGradientOptimizer, decay_, step_
from lightning_curvature.optim.zeroth_storage import HalfPrecision, Restore

__all__ = ["ZOAdam"]


class ZOAdam(ZerothGradientOptimizer):
    r"""Adam on slope times direction; forward passes only.

    .. math::
        m &\leftarrow \beta_1 m + (1 - \beta_1)\, g z, \quad
        v \leftarrow \beta_2 v + (1 - \beta_2)\, (g z)^2 \\
        \theta &\leftarrow \theta - \eta \left(\frac{m / (1 - \beta_1^t)}
        {\sqrt{v / (1 - \beta_2^t)} + \epsilon} + \lambda \theta\right)

    Every coordinate of an estimate has the size of the slope, so v tells coordinates apart only
    after many steps; until then this is momentum with a normalized step.

    Cost per step: two forward passes, and three draws of a direction.
    Memory: two copies of the parameters.

    Args:
        params: Parameters to optimize, or parameter groups. Groups with ``first_order=True`` get
            true gradients by a backward, see `MeZO`.
        lr: Learning rate, >= 0. Groups may differ in it and in ``weight_decay``.
        betas: Decay of the running averages of the estimate and of its square; each in [0, 1).
        eps: Guards the division by the root of the second average; > 0.
        weight_decay: Decoupled weight decay, >= 0.
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
        >>> optimizer = ZOAdam(model.parameters(), lr=1e-2)
        >>> loss_fn = optimizer.attach_model(model, torch.nn.functional.cross_entropy)
        >>> x, y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
        >>> loss = optimizer.step(lambda: loss_fn(model(x), y))
        >>> all(p.grad is None for p in model.parameters())
        True

    References:
        Malladi et al., 2023, arXiv:2305.17333.
        Zhang et al., 2024, arXiv:2402.11592.
    """

    state_names: ClassVar[tuple[str, ...]] = ("step", "exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Any,
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
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
            "betas": betas,
            "eps": eps,
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
        check_betas(group["betas"])
        check_positive("eps", group["eps"])

    def _advance(self, params: list[Tensor], on: float | Tensor) -> None:
        for p in params:
            state = self.state[p]
            if "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["step"] += on

    def _rule(
        self,
        group: dict[str, Any],
        piece: Piece,
        values: list[Tensor],
        estimate: list[Tensor],
        on: float | Tensor,
    ) -> None:
        averages, squares = self._state(piece, "exp_avg", "exp_avg_sq")
        shared = self.param_groups[0]
        beta1, beta2 = shared["betas"]
        torch._foreach_mul_(averages, 1 - (1 - beta1) * on)
        torch._foreach_mul_(squares, 1 - (1 - beta2) * on)
        torch._foreach_add_(averages, torch._foreach_mul(estimate, (1 - beta1) * on))
        torch._foreach_mul_(estimate, estimate)
        torch._foreach_add_(squares, torch._foreach_mul(estimate, (1 - beta2) * on))
        steps = [self.state[p]["step"] for p in self._params_of(piece)]
        for average, square, out, step in zip(averages, squares, estimate, steps, strict=True):
            count = step.to(square.dtype)
            first = (1 - beta1) * discounted_count(count, beta1)
            second = (1 - beta2) * discounted_count(count, beta2)
            torch.sqrt(square, out=out).div_(second.sqrt()).add_(shared["eps"]).mul_(first)
            torch.div(average, out, out=out)
        decay_(estimate, values, group)
        step_(values, estimate, float(group["lr"]), on)
