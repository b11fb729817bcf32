"""FAdam: Adam as natural gradient descent with a diagonal empirical Fisher matrix.

Dongseong Hwang, "FAdam: Adam is a natural gradient optimizer using diagonal empirical Fisher
information", 2024, arXiv:2405.12807; official code lessw2020/FAdam_PyTorch. The rule is that of the
code, and of the paper where they differ and an option says so:

- ``clip_mode="limit"`` is the paper's; the code's ("scale") multiplies by ``clip`` everywhere.
- ``eps_mode="max"`` is the code's; the paper's ("min") needs a floor, or it divides 0 by 0.
- ``weight_decay=0.001`` is the paper's; the code's is 0.1.
- ``skip_unused=True`` is ours; paper and code decay what has no gradient most of all.
- The Fisher diagonal f of the code is kept as v = (1 - beta2^t) f, which is Adam's second moment:
  its correction is then one number per tensor. It is computed in the precision of the parameters
  (in the code always in float32).
"""

from collections.abc import Iterable
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
from lightning_curvature.optim.per_tensor import (
    advance_,
    can_block,
    discounted_count,
    whole_norms,
)
from lightning_curvature.oracle.protocol import Oracle

__all__ = ["FAdam"]

_SQRT = 0.5
# Of the paper: eps_hat = min(eps, 0.01 RMS(g)).
_EPS_RATIO = 0.01
# Least number to divide by: large enough for quotients to be finite in float32.
_FLOOR = 1e-30
# A first update has RMS 1 up to rounding, which is not clipping.
_ROUNDING = 1e-6


class FAdam(DiagonalOptimizer):
    r"""Adam as natural gradient descent with a diagonal empirical Fisher matrix.

    .. math::
        f &\leftarrow \hat\beta_2 f + (1 - \hat\beta_2)\, g^2, \quad
        \hat\beta_2 = \beta_2 \frac{1 - \beta_2^{t-1}}{1 - \beta_2^t} \\
        d &= f^{p} + \hat\epsilon, \quad \hat\epsilon = \epsilon \max(1, \mathrm{RMS}(g)) \\
        m &\leftarrow \beta_1 m + (1 - \beta_1)\, C(g / d) \\
        \theta &\leftarrow \theta - \eta\,(m + \lambda\, C(\theta / d)), \quad
        C(z) = z / \max(1, \mathrm{RMS}(z) / c)

    RMS is the root mean square over one parameter tensor. Unlike in Adam the gradient is scaled
    first and averaged afterwards, the scaled gradient is clipped per tensor, and so is the weight
    decay, which follows the same metric. The average m is not corrected: the first steps are short.

    Use it where you would use AdamW, with its learning rate. The derivation wants a loss that is
    the negative logarithm of a probability, such as cross entropy. Prefer it where single tensors
    have gradients that jump.

    Cost per step: forward and backward, as AdamW.
    Memory: two copies of the parameters as state.

    Note:
        ``weight_decay`` is not AdamW's: its steps have RMS ``lr * weight_decay * clip`` at most,
        however large the parameters are, and the coordinates with the smallest gradients get most
        of it.

    Args:
        params: Parameters to optimize, or parameter groups.
        lr: Learning rate, >= 0. Groups may differ in it and in all that follows up to
            ``decay_unused``.
        betas: Decay of the running averages of the scaled gradient and of the square of the
            gradient; each in [0, 1).
        eps: Guards the division by the Fisher diagonal; > 0.
        clip: Largest root mean square of a scaled gradient, per tensor; > 0. The average of them is
            not limited again.
        clip_mode: What ``clip`` does. "limit" divides by max(1, RMS / clip), so that only what is
            too long is changed; "scale", as in the official code, multiplies by clip / max(1, RMS),
            also where nothing is too long, which is another learning rate. Both are the same for
            ``clip=1``.
        eps_mode: How eps is adapted to the gradient. "max" multiplies it by max(1, RMS(g)), as the
            official code does now; "min" takes min(eps, 0.01 RMS(g)), to the power of ``2 * power``
            and never below 1e-30, as in the paper. With "min", what has no gradient at all is
            divided by the floor, so "max" is the default.
        power: Power of the Fisher diagonal; in (0, 1]. 0.5 is Adam's square root; 1 is the natural
            gradient. Any other power costs ten times as much as the square root.
        weight_decay: Weight decay in the metric of the Fisher diagonal, >= 0. The default is the
            paper's; with the official code's 0.1, a weight of size 0.03 that is decayed at full
            rate shrinks to a tenth within 700 steps at ``lr=1e-3``.
        decay_unused: Whether coordinates that never had a gradient are decayed too, as in the
            official code. There d is eps, so that these coordinates take all of the decay of their
            tensor: rows of an embedding that no batch contained vanish, and the others are not
            decayed at all. Off, they stay as they are.
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
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = FAdam(model.parameters(), lr=1e-2)
        >>> loss = torch.nn.functional.cross_entropy(model(torch.ones(4, 3)), torch.ones(4).long())
        >>> loss.backward()
        >>> optimizer.step()
        >>> sorted(optimizer.stats)
        ['grad_norm', 'lr', 'skipped_steps', 'win_rate']

    References:
        Hwang, 2024, arXiv:2405.12807.
    """

    state_names: ClassVar[tuple[str, ...]] = ("step", "exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        clip: float = 1.0,
        clip_mode: Literal["limit", "scale"] = "limit",
        eps_mode: Literal["max", "min"] = "max",
        power: float = 0.5,
        weight_decay: float = 0.001,
        decay_unused: bool = False,
        max_failures: int = 20,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "clip": clip,
            "clip_mode": clip_mode,
            "eps_mode": eps_mode,
            "power": power,
            "weight_decay": weight_decay,
            "decay_unused": decay_unused,
            "max_failures": max_failures,
            "foreach": foreach,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        check_positive("lr", group["lr"], zero=True)
        betas = group["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:  # noqa: PLR2004
            raise ValueError(f"Invalid betas={betas!r}: must be two numbers in [0, 1).")
        check_in_range("betas[0]", betas[0], 0, 1)
        check_in_range("betas[1]", betas[1], 0, 1)
        check_positive("eps", group["eps"])
        check_positive("clip", group["clip"])
        check_choice("clip_mode", group["clip_mode"], ("limit", "scale"))
        check_choice("eps_mode", group["eps_mode"], ("max", "min"))
        check_in_range("power", group["power"], 0, 1, include_low=False, include_high=True)
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
        self._tensors = len(params)
        stats["win_rate"] = torch.zeros_like(stats["grad_norm"])
        # Where no gradient is long as a whole, none has an RMS above 1.
        limit = min(p.numel() for p in params)
        self._short = usable is None and float(stats["grad_norm"]) ** 2 <= limit

    def _update_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        usable: Tensor | None,
        stats: dict[str, Tensor],
    ) -> None:
        averages, squares, steps = self._state_lists(params, "exp_avg", "exp_avg_sq", "step")
        advance_(steps, usable)
        grads = [p.grad for p in params if p.grad is not None]
        if usable is None and can_block(params, group["foreach"]):
            rows = zip(params, grads, averages, squares, steps, strict=True)
            unclipped = sum(self._update_blocks(group, *row) for row in rows)
            stats["win_rate"] += unclipped / self._tensors
            return
        for part in vectors.chunks(len(params), group["foreach"]):
            unclipped = _multi_tensor_fadam(
                params[part],
                self._grads(group, grads[part]),
                averages[part],
                squares[part],
                steps[part],
                usable,
                group,
            )
            stats["win_rate"] += unclipped / self._tensors

    def _update_blocks(
        self,
        group: dict[str, Any],
        p: Tensor,
        grad: Tensor,
        average: Tensor,
        square: Tensor,
        step: Tensor,
    ) -> bool:
        """Update a tensor on the CPU, in parts that stay in the cache.

        Args:
            group: The group.
            p: The parameter.
            grad: Its gradient, finite.
            average: Average of scaled gradients.
            square: Second moment.
            step: Number of the step.

        Returns:
            Whether its scaled gradient was not clipped.
        """
        root_size = max(p.numel(), 1) ** 0.5
        correction, eps = _correction(group, step.double()), group["eps"]
        if group["eps_mode"] == "min" or not self._short:
            norm = torch.linalg.vector_norm(grad, dtype=square.dtype).double()
            eps = _eps(group, norm / root_size)
        correction, eps = float(correction), float(correction * eps)
        # Allocated once: fresh memory would cost more than all this arithmetic.
        scale = self._scratch_like(square)
        parts = [part for (part,) in zip(*[vectors.blocks([p], [grad], [average], [square], [scale])])]
        grad_norm = decay_norm = 0.0
        for (x,), (g,), _, (v,), (q,) in parts:
            (g,) = self._grads(group, [g])
            v.mul_(group["betas"][1]).addcmul_(g, g, value=1 - group["betas"][1])
            _single_tensor_scale(v, eps, group, out=q)
            scaled = torch.mul(g, q).view(-1)
            grad_norm += float(torch.dot(scaled, scaled))
            if group["weight_decay"] != 0:
                scaled = torch.mul(x, q).view(-1)
                decay_norm += float(torch.dot(scaled, scaled))
