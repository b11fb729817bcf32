"""AdamQLR: Adam's direction with a learning rate and damping derived from curvature.

Ross M. Clarke and Jose Miguel Hernandez-Lobato, "Studying K-FAC Heuristics by Viewing Adam through
a Second-Order Lens", ICML 2024, arXiv:2310.14963; official code
rmclarke/AdamThroughASecondOrderLens. The rule is that of the paper's code; `qlr.py` lists every
difference and the switch that undoes it.
"""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_curvature import vectors
from lightning_curvature.optim.qlr import DampingAlgorithm, QLROptimizer

__all__ = ["AdamQLR"]


class AdamQLR(QLROptimizer):
    r"""Adam with a learning rate and damping derived from curvature.

    .. math::
        d &= \hat m / (\sqrt{\hat v} + \epsilon) \\
        \alpha &= \frac{\langle g, d\rangle}{d^\top C d + \lambda d^\top d} \\
        \theta &\leftarrow \theta - \eta\,\alpha\,d \\
        \rho &= \frac{L(\theta - \eta\alpha d) - L(\theta)}{q(\eta\alpha)}, \quad
        q(t) = \tfrac12 t^2 (d^\top C d + \lambda d^\top d) - t \langle g, d\rangle

    The damping :math:`\lambda` grows where :math:`\rho < 1/4` and shrinks where
    :math:`\rho > 3/4`. C is the Fisher (Gauss-Newton) matrix or the Hessian of the mean loss of the
    present batch; only the scalar :math:`d^\top C d` is ever computed.

    Use it where you would use Adam and do not want to tune the learning rate. Large batches (above
    about 500) suit it best: the model is trusted to minimize the loss of the present batch. For
    small batches keep ``max_lr``, and lower it first if training is noisy.

    Cost per step: forward and backward, one forward for the curvature (finite differences of the
    model outputs; forward mode, about a forward and a half more, in low precision), one forward for
    the reduction ratio. ``curvature_update_interval`` and ``damping_update_interval`` thin these
    out.
    Memory: two copies of the parameters as state; one for the direction and one for the probe while
    the step lasts.

    Note:
        Moments of parameters in half precision are kept in float32. In a Trainer nothing else is
        needed; in a plain loop call `attach_model`, or pass a closure to `step`.

    Args:
        params: Parameters to optimize, or parameter groups.
        lr: Multiplies the derived step, so that learning-rate schedulers act as an envelope; >= 0.
            Groups may differ in it.
        betas: Decay of the running averages of the gradient and its square; each in [0, 1).
        eps: Guards the division by the root of the second moment; > 0.
        damping: Initial damping, >= 0, in the units of the curvature of the mean loss. It is
            adapted; the start matters little above 1e-4.
        damping_increase_factor: Factor when the reduction ratio is below 1/4; >= 1.
        damping_decrease_factor: Factor when the reduction ratio is above 3/4; in (0, 1].
        min_damping: Lower limit of the damping, >= 0.
        max_damping: Upper limit of the damping.
        damping_algorithm: Rule that adapts the damping. "levenberg-marquardt" looks at the
            reduction ratio; "decreasing-loss" undoes every step that raised the loss of its batch
            and needs three more copies of the parameters; "fixed" does nothing.
        damping_update_interval: Optimizer steps between two adaptations of the damping; each costs
            one forward.
        curvature: Matrix in the quadratic model. "fisher" is positive semi-definite; "hessian" is
            exact, may be negative, and costs a double backward.
        curvature_update_interval: Optimizer steps between two measurements of the curvature. In
            between, the running average of the measured step lengths (see ``lr_ema``) is carried
            over, never below 0; d^T C d itself varies far more from step to step.
        max_lr: Largest absolute derived step length before ``amplification``; None for none, as in
            the paper. The softmax Fisher vanishes when predictions saturate, and without a cap the
            step then explodes: leave it on below about 1000 examples per batch.
        amplification: Factor on the derived step length; > 0.
        lr_ema: Weight of the old value in a running average of the step length; in [0, 1). None for
            0 if the curvature is measured on every step and 0.8 otherwise.
        curvature_ema: Weight of the old value in a running average of the damped curvature; in [0,
            1).
        curvature_ema_init: Start of that average; None for the first measurement. The official code
            starts from 1e7, which keeps the first steps tiny.
        saddle_free: Whether to divide by the absolute value of the damped curvature.
        curvature_guard: Whether a damped curvature that is not positive is replaced by
            ``|d^T C d| + damping * |d|^2``. Without it a negative one climbs, as in the official
            code.
        grad_clip_norm: Largest norm of the gradient, applied before everything else; None for none.
        direction_clip: Largest absolute entry of the direction; None for none.
        update_clip_norm: Largest norm of the update, before ``lr``; None for none.
        weight_decay: Weight decay, >= 0. Groups may differ in it.
        decoupled_weight_decay: Whether the decay is scaled by the learning rate used, as in AdamW.
            Otherwise it is the official one, which is not and is far stronger.
        quad_model: Step that the predicted change belongs to. "taken" is the step with schedule and
            clipping; "derived" is the official one without; "adam" and "adam-sqrt" put the old
            second moment, or its root, in the place of C.
        official_regression_scaling: Whether squared errors of several outputs are summed in the
            curvature although the loss averages them, as in the official code.
        max_failures: Unusable steps in a row after which training stops with an error; also how
            often, in optimizer steps, the counts are read from the device while all goes well.
        foreach: False to compute the direction one tensor at a time, with less temporary memory;
            otherwise all tensors at once.
        maximize: Whether to climb.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> import torch
        >>> layers = torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)
        >>> model = torch.nn.Sequential(*layers)
        >>> optimizer = AdamQLR(model.parameters())
        >>> criterion = optimizer.attach_model(model, torch.nn.CrossEntropyLoss())
        >>> x, y = torch.randn(32, 3), torch.randint(2, (32,))
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     criterion(model(x), y).backward()
        ...     optimizer.step()
        >>> sorted(optimizer.stats)[:3]
        ['curvature', 'curvature_drift', 'damping']

    References:
        Clarke and Hernandez-Lobato, 2024, arXiv:2310.14963.
    """

    long_step: ClassVar[float | None] = 1.0
    state_names: ClassVar[tuple[str, ...]] = ("step", "exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        damping: float = 1e-3,
        damping_increase_factor: float = 2.0,
        damping_decrease_factor: float = 0.5,
        min_damping: float = 1e-8,
        max_damping: float = 1e8,
        damping_algorithm: DampingAlgorithm = "levenberg-marquardt",
        damping_update_interval: int = 1,
        curvature: Literal["fisher", "hessian"] = "fisher",
        curvature_update_interval: int = 1,
        max_lr: float | None = 0.1,
        amplification: float = 1.0,
        lr_ema: float | None = None,
        curvature_ema: float = 0.0,
        curvature_ema_init: float | None = None,
        saddle_free: bool = False,
        curvature_guard: bool = True,
        grad_clip_norm: float | None = None,
        direction_clip: float | None = None,
        update_clip_norm: float | None = None,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = True,
        quad_model: Literal["taken", "derived", "adam", "adam-sqrt"] = "taken",
        official_regression_scaling: bool = False,
        max_failures: int = 20,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "damping": damping,
            "damping_increase_factor": damping_increase_factor,
            "damping_decrease_factor": damping_decrease_factor,
            "min_damping": min_damping,
            "max_damping": max_damping,
            "damping_algorithm": damping_algorithm,
            "damping_update_interval": damping_update_interval,
            "curvature": curvature,
            "curvature_update_interval": curvature_update_interval,
            "max_lr": max_lr,
            "amplification": amplification,
            "lr_ema": lr_ema,
            "curvature_ema": curvature_ema,
            "curvature_ema_init": curvature_ema_init,
            "saddle_free": saddle_free,
            "curvature_guard": curvature_guard,
            "grad_clip_norm": grad_clip_norm,
            "direction_clip": direction_clip,
            "update_clip_norm": update_clip_norm,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "quad_model": quad_model,
            "official_regression_scaling": official_regression_scaling,
            "max_failures": max_failures,
            "foreach": foreach,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def _init_state(self, params: list[Tensor]) -> None:
        for p in params:
            state = self.state[p]
            if not state:
                half = p.dtype in (torch.bfloat16, torch.float16)
                dtype = torch.float32 if half else p.dtype
                state["step"] = torch.zeros((), dtype=dtype, device=p.device)
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name] = torch.zeros_like(
                        p, dtype=dtype, memory_format=torch.preserve_format
                    )

    def _direction(self, params: list[Tensor], grads: list[Tensor], usable: Tensor) -> list[Tensor]:
        self._init_state(params)
        group = self.param_groups[0]
        states = [self.state[p] for p in params]
        direction: list[Tensor] = []
        for part in vectors.chunks(len(params), group["foreach"]):
            direction += _adam_direction(
                grads[part],
                [state["exp_avg"] for state in states[part]],
                [state["exp_avg_sq"] for state in states[part]],
                [state["step"] for state in states[part]],
                usable,
                betas=group["betas"],
                eps=group["eps"],
            )
        return direction

    def _old_second_moments(
        self, params: list[Tensor], group: dict[str, Any]
    ) -> list[Tensor] | None:
        if group["quad_model"] not in ("adam", "adam-sqrt"):
            return None
        self._init_state(params)
        moments = vectors.clone([self.state[p]["exp_avg_sq"] for p in params])
        if group["quad_model"] == "adam-sqrt":
            torch._foreach_sqrt_(moments)
        return moments


def _adam_direction(
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    usable: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
) -> list[Tensor]:
    """Update the moments in place and return m_hat / (sqrt(v_hat) + eps).

    Args:
        grads: Gradients, zero if not ``usable``.
        exp_avgs: First moments.
        exp_avg_sqs: Second moments.
        steps: Number of updates of each, 0-dim tensors.
        usable: Boolean 0-dim tensor; if False, moments and counts stay as they are.
        betas: Decay rates.
        eps: Added to the root.
    """
    beta1, beta2 = betas
    counts = usable.to(steps[0].dtype)
    # As a list: a single 0-dim tensor would be read as a number.
    torch._foreach_add_(steps, [counts] * len(steps))
    weight = counts * (1 - beta1)
    if all(
        g.device.type == "cpu" and g.dtype == m.dtype for g, m in zip(grads, exp_avgs, strict=True)
    ):
        # One sweep through memory; on a GPU the two fused kernels below are the faster choice.
        torch._foreach_lerp_(exp_avgs, grads, [weight] * len(exp_avgs))
    else:
        torch._foreach_mul_(exp_avgs, 1 - weight)
        torch._foreach_add_(exp_avgs, grads, alpha=1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, 1 - counts * (1 - beta2))
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, value=1 - beta2)
    # Both bias corrections go into the denominator, one small kernel for all of them:
    # m / c1 / (sqrt(v / c2) + eps) = m / (sqrt(v) c1 / sqrt(c2) + eps c1). A count of 0 means m =
    # 0.
    t = torch.stack(steps).clamp_min(1.0)
    correction1, correction2 = 1 - beta1**t, 1 - beta2**t
    # The result grows in one new buffer: large allocations cost more than these sweeps.
    direction = list(torch._foreach_sqrt(exp_avg_sqs))
    torch._foreach_mul_(direction, list((correction1 / correction2.sqrt()).unbind()))
    torch._foreach_add_(direction, list((eps * correction1).unbind()))
    torch._foreach_reciprocal_(direction)
    torch._foreach_mul_(direction, exp_avgs)
    return direction
