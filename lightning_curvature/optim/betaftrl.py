"""BetaFTRL: Adam seen as a learner of updates that follows the regularized leader.

Kwangjun Ahn, Zhiyu Zhang, Yunbum Kook and Yan Dai, "Understanding Adam Optimizer via Online Learning
of Updates: Adam is FTRL in Disguise", 2024, arXiv:2402.01567; there is no official code. The norm
form, the clip-free form and the random step length are those of the analyses that followed
(arXiv:2405.18199, 2510.03478, 2602.08372). Averages of the weights, which these return, are left to
`torch.optim.swa_utils` and Lightning's ``WeightAveraging`` callback.
"""

import random
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_curvature import vectors
from lightning_curvature.checks import (
    check_choice,
    check_in_range,
    check_interval,
    check_positive,
)
from lightning_curvature.optim.diagonal import DiagonalOptimizer
from lightning_curvature.optim.per_tensor import advance_, discounted_count, whole_norms
from lightning_curvature.oracle.protocol import Oracle

__all__ = ["BetaFTRL"]

_SCALAR = "grad_sq_sum"


class BetaFTRL(DiagonalOptimizer):
    r"""Adam seen as a learner of updates that follows the regularized leader.

    .. math::
        \Delta_{t+1} &= \arg\min_{|x| \le D}\; \sum_{s \le t} \beta_1^{t-s}
            \left(g_s x + \tfrac{\mu}{2} x^2\right) + \frac{\sqrt{V_t} + \epsilon}{2\alpha}\, x^2
            \quad \text{per coordinate} \\
        &= -\mathrm{clip}\left(\frac{\alpha M_t}{\sqrt{V_t} + \epsilon + \alpha\mu S_t}, D\right),
        \quad M_t = \sum_s \beta_1^{t-s} g_s, \quad V_t = \sum_s \beta_2^{t-s} g_s^2, \quad
        S_t = \sum_s \beta_1^{t-s} \\
        \theta_{t+1} &= \theta_t + \Delta_{t+1}

    With :math:`\beta_2 = \beta_1^2` and the constants absorbed this is Adam without bias correction,
    and the leader is one of a regularizer that needs no scale: gradients multiplied by any number
    give the same updates. 0 / 0 is 0.

    Use it where you would use Adam, to have one momentum less to tune or a limit on every update.

    Cost per step: forward and backward, as AdamW.
    Memory: two copies of the parameters as state, one with ``clip_mode="norm"``.

    Note:
        ``lr`` is Adam's only with ``scale="adam"``. Otherwise Adam's learning rate without bias
        correction is ``lr * sqrt(1 - beta2) / (1 - beta1)``, 4.4 times as much with the default
        betas.

    Args:
        params: Parameters to optimize, or parameter groups.
        lr: Step size alpha, >= 0: the first update of every coordinate has that size. Groups may
            differ in it.
        betas: Discounts of the sums of gradients and of their squares, each in [0, 1]; the second
            is the square of the first if it is None. (1, 1) forgets nothing, as AdaGrad. One value
            for all groups, as are ``max_update``, ``clip_mode``, ``random_scaling`` and ``seed``.
        scale: Units of ``lr`` and ``eps``. "ftrl" takes them as they stand; "adam" multiplies them
            by what makes the updates those of `torch.optim.AdamW`.
        max_update: Limit D of the updates; > 0, or None for none. It should be some multiples of
            ``lr``: an update without a limit grows to ``lr * sqrt((1 + beta) / (1 - beta))`` if the
            gradient stays the same.
        clip_mode: What is limited. "coordinate" is the size of every coordinate; "norm" is the norm
            of the whole update, and then one sum of squares over all parameters takes the place of
            that per coordinate, so that updates point along the momentum.
        eps: Added to the root of the sum of squares, >= 0. Above 0, gradients far below it move
            nothing, and updates depend on the scale of the loss.
        damping: Penalty mu on the square of updates, >= 0. It shortens long updates smoothly and
            may take the place of ``max_update``. Groups may differ in it.
        random_scaling: Whether every update is multiplied by a random number of mean 1 with
            exponential distribution, after the limit; the guarantees for losses that are not smooth
            need it. The number depends on ``seed`` and the step only.
        seed: Of the random numbers; they do not touch the global generators.
        weight_decay: Decoupled weight decay as in AdamW, >= 0. Groups may differ in it.
        max_failures: Gradients in a row that are not finite after which training stops with an
            error.
        foreach: False to work on one tensor at a time; otherwise on blocks that stay in the cache
            (CPU) or all tensors at once.
        maximize: Whether to climb.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
        >>> optimizer = BetaFTRL([w], lr=0.1)
        >>> (w * torch.tensor([1e-5, 1.0, 0.0])).sum().backward()
        >>> optimizer.step()
        >>> w.data
        tensor([ 0.9000, -2.1000,  3.0000])

    References:
        Ahn, Zhang, Kook and Dai, 2024, arXiv:2402.01567.
    """

    shared_names: ClassVar[tuple[str, ...]] = (
        *DiagonalOptimizer.shared_names,
        "betas",
        "max_update",
        "clip_mode",
        "random_scaling",
        "seed",
    )

    def __init__(
        self,
        params: Any,
        lr: float = 3e-4,
        betas: tuple[float, float | None] = (0.9, None),
        scale: Literal["ftrl", "adam"] = "ftrl",
        max_update: float | None = None,
        clip_mode: Literal["coordinate", "norm"] = "coordinate",
        eps: float = 0.0,
        damping: float = 0.0,
        random_scaling: bool = False,
        seed: int = 0,
        weight_decay: float = 0.0,
        max_failures: int = 20,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "scale": scale,
            "max_update": max_update,
            "clip_mode": clip_mode,
            "eps": eps,
            "damping": damping,
            "random_scaling": random_scaling,
            "seed": seed,
            "weight_decay": weight_decay,
            "max_failures": max_failures,
            "foreach": foreach,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    @property
    def state_names(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the tensors kept per parameter."""
        by_norm = self.param_groups[0]["clip_mode"] == "norm"
        return ("step", "grad_sum") if by_norm else ("step", "grad_sum", "grad_sq_sum")

    def _check_group(self, group: dict[str, Any]) -> None:
        check_positive("lr", group["lr"], zero=True)
        betas = group["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:  # noqa: PLR2004
            raise ValueError(
                f"Invalid betas={betas!r}: must be two numbers in [0, 1], the second may be None."
            )
        check_in_range("betas[0]", betas[0], 0, 1, include_high=True)
        if betas[1] is not None:
            check_in_range("betas[1]", betas[1], 0, 1, include_high=True)
        check_choice("scale", group["scale"], ("ftrl", "adam"))
        if group["max_update"] is not None:
            check_positive("max_update", group["max_update"])
        check_choice("clip_mode", group["clip_mode"], ("coordinate", "norm"))
        check_positive("eps", group["eps"], zero=True)
        check_positive("damping", group["damping"], zero=True)
        seed = group["seed"]
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise TypeError(
                f"Invalid seed={seed!r}: must be an integer, got {type(seed).__name__}."
            )
        check_positive("weight_decay", group["weight_decay"], zero=True)
        check_interval("max_failures", group["max_failures"])

    # One step

    def _prepare(
        self,
        params: list[Tensor],
        oracle: Oracle | None,
        usable: Tensor | None,
        stats: dict[str, Tensor],
    ) -> None:
        first = self.param_groups[0]
        self._random = 1.0
        if first["random_scaling"]:
            # Same seed and step, same number: on every rank, and after resuming.
            stream = random.Random(f"{first['seed']}/{self._steps_done}")
            self._random = stream.expovariate(1.0)
        self._count = sum(p.numel() for p in params)
        if first["max_update"] is not None:
            stats["win_rate"] = torch.zeros_like(stats["grad_norm"])
        if first["clip_mode"] == "norm":
            self._prepare_norm(params, usable, stats)

    def _update_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        usable: Tensor | None,
        stats: dict[str, Tensor],
    ) -> None:
        vectors.shrink_(params, float(group["lr"]) * group["weight_decay"], usable)
        if group["clip_mode"] == "norm":
            self._move_along_sums(group, params, usable)
            return
        sums, squares, steps = self._state_lists(params, "grad_sum", "grad_sq_sum", "step")
        advance_(steps, usable)
        grads = [p.grad for p in params if p.grad is not None]
        columns = (params, grads, sums, squares)
        if usable is not None:
            alphas, eps = _numbers(group, torch.stack(steps))
            for part in vectors.chunks(len(params), group["foreach"]):
                self._update_part(
                    group,
                    [column[part] for column in columns],
                    list(alphas.unbind())[part],
                    list(eps.unbind())[part],
                    usable,
                    stats,
                )
            return
        # Few parameters, if any, have been left out now and then: nearly always all are one set.
        alike: dict[float, list[int]] = {}
        for row, step in enumerate(steps):
            alike.setdefault(float(step), []).append(row)
        for step, rows in alike.items():
            alpha, eps = (float(x) for x in _numbers(group, torch.tensor(step).double()))
            chosen = [[column[row] for row in rows] for column in columns]
            for part in vectors.blocks(*chosen, foreach=group["foreach"]):
                self._update_part(group, part, alpha, eps, None, stats)

