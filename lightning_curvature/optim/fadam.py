"""FAdam: Adam as natural gradient descent with a diagonal empirical Fisher matrix.

Dongseong Hwang, "FAdam: Adam is a natural gradient optimizer using diagonal empirical Fisher
information", 2024, arXiv:2405.12807; official code lessw2020/FAdam_PyTorch. The rule is that of the
code, and of the paper where they differ and an option says so:

- ``clip_mode="limit"`` is the paper's; the code's ("scale") multiplies by ``clip`` everywhere.
- ``eps_mode="max"`` is the code's; the paper's ("min") needs a floor, or it divides 0 by 0.
- ``weight_decay=0.001`` is the paper's; the code's is 0.1.
- ``decay_unused=False`` is ours; paper and code decay what has no gradient most of all.
- The Fisher diagonal f of the code is kept as v = (1 - beta2^t) f, which is Adam's second moment:
  its correction is then one number per tensor. It is computed in the precision of the parameters
  (in the code always in float32).
"""

import math
from collections.abc import Sequence
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
    Numbers,
    Part,
    add_quotients_,
    advance_,
    bundles,
    discounted_count,
    numbers,
    whole_norms,
)
from lightning_curvature.oracle.protocol import Oracle

__all__ = ["FAdam"]

_SQRT = 0.5
# Of the paper: eps_hat = min(eps, 0.01 RMS(g)).
_EPS_RATIO = 0.01
# Of eps_hat. Whatever is divided by it stays finite in float32.
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
        # No root mean square is above 1 if the norm of all is not that large.
        short = group["eps_mode"] == "max" and usable is None
        short = short and float(stats["grad_norm"]) ** 2 <= min(p.numel() for p in params)
        columns = (params, grads, averages, squares)
        for rows, parts in bundles(*columns, foreach=group["foreach"]):
            sizes = [params[row].numel() for row in rows]
            counts = torch.stack([steps[row] for row in rows])
            counts = counts.double() if usable is None else counts
            rms = None if short else _rms(torch._foreach_norm([grads[r] for r in rows]), sizes)
            # The Fisher diagonal is v / (1 - beta2^t); what belongs to its power is one number.
            correction = (1 - group["betas"][1]) * discounted_count(counts, group["betas"][1])
            correction = correction.pow(group["power"])
            eps = numbers(correction * _eps(group, rms, correction), usable)
            grad_rms, decay_rms = self._measure(group, parts, sizes, eps, usable)
            limit = group["clip"] * (1 + _ROUNDING)
            stats["win_rate"] += (correction * grad_rms <= limit).sum() / self._tensors
            self._move(
                group,
                parts,
                eps,
                numbers(correction * _shrinkage(group, correction * grad_rms), usable),
                numbers(correction * _shrinkage(group, correction * decay_rms), usable),
                usable,
            )

    def _measure(
        self,
        group: dict[str, Any],
        parts: list[Part],
        sizes: list[int],
        eps: Numbers,
        usable: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Update the second moments; return the RMS of what is scaled by them.

        Args:
            group: The group.
            parts: Parts of some parameters: they, gradients, averages and second moments.
            sizes: Numbers of entries of these parameters.
            eps: What is added to the power of the second moments.
            usable: See `_update_group`.

        Returns:
            Root mean square of scaled gradients and of scaled parameters, ``[k]`` each.
        """
        grad_norms: list[Tensor] = []
        decay_norms: list[Tensor] = []
        for where, (ps, gs, _, squares) in parts:
            scaled = self._grads(group, gs)
            vectors.ema_squares_(squares, scaled, group["betas"][1], usable)
            denominators = _denominators(group, squares, eps[where])
            grad_norms += torch._foreach_norm(torch._foreach_div(scaled, denominators))
            if group["weight_decay"] != 0:
                decay = torch._foreach_div(_wide(ps), denominators)
                decay_norms += torch._foreach_norm(decay)
        if not decay_norms:
            rms = _rms(grad_norms, sizes)
            return rms, torch.zeros_like(rms)
        count = len(grad_norms)
        norms = whole_norms(grad_norms + decay_norms)
        return _rms(norms[:count], sizes), _rms(norms[count:], sizes)

    def _move(
        self,
        group: dict[str, Any],
        parts: list[Part],
        eps: Numbers,
        grad_factors: Numbers,
        decay_factors: Numbers,
        usable: Tensor | None,
    ) -> None:
        """Update averages and parameters.

        Args:
            group: The group.
            parts: See `_measure`.
            eps: What is added to the power of the second moments.
            grad_factors: Factors on the scaled gradients.
            decay_factors: Factors on the scaled parameters.
            usable: See `_update_group`.
        """
        beta1, lr = group["betas"][0], float(group["lr"])
        on = 1.0 if usable is None else usable.to(parts[0][1][2][0].dtype)
        grad_factors = [(1 - beta1) * factor for factor in grad_factors]
        decay_factors = [-lr * group["weight_decay"] * on * factor for factor in decay_factors]
        for where, (ps, gs, averages, squares) in parts:
            denominators = _denominators(group, squares, eps[where])
            torch._foreach_mul_(averages, 1 - (1 - beta1) * on)
            add_quotients_(averages, self._grads(group, gs), denominators, grad_factors[where])
            moved = _wide(ps)
            if group["weight_decay"] != 0:
                add_quotients_(moved, moved, denominators, decay_factors[where])
            updates = averages if usable is None else torch._foreach_mul(averages, on)
            torch._foreach_add_(moved, updates, alpha=-lr)
            if moved is not ps:
                torch._foreach_copy_(ps, moved)


def _wide(ps: list[Tensor]) -> list[Tensor]:
    """Return tensors in the precision of the arithmetic; the same list if they have it."""
    if all(p.dtype in (torch.float32, torch.float64) for p in ps):
        return ps
    return [p.float() if p.dtype in (torch.bfloat16, torch.float16) else p for p in ps]


def _rms(norms: Sequence[Tensor], sizes: list[int]) -> Tensor:
    """Return the root mean squares of tensors, ``[k]``.

    Args:
        norms: Their norms; if there is only one tensor, those of its parts.
        sizes: Their numbers of entries.
    """
    whole = whole_norms(norms)
    if len(sizes) == 1:
        whole = [torch.linalg.vector_norm(torch.stack(whole))]
    # Numbers in a list need no copy to the device.
    return torch.stack(torch._foreach_div(whole, [max(size, 1) ** 0.5 for size in sizes]))


def _eps(group: dict[str, Any], rms: Tensor | None, like: Tensor) -> Tensor:
    """Return what is added to the power of the Fisher diagonal.

    Args:
        group: The group.
        rms: Root mean squares of the gradients, ``[k]``; None if all are known to be at most 1.
        like: Vector of the same size.
    """
    eps: float = group["eps"]
    if rms is None:
        return torch.full_like(like, eps)
    if group["eps_mode"] == "max":
        return eps * rms.clamp_min(1.0)
    small = (_EPS_RATIO * rms).clamp_max(eps)
    return small.pow(2 * group["power"]).clamp_min(_FLOOR)


def _shrinkage(group: dict[str, Any], rms: Tensor) -> Tensor:
    """Return the factors by which vectors of given root mean squares are clipped."""
    clip: float = group["clip"]
    if group["clip_mode"] == "limit":
        return 1.0 / (rms / clip).clamp_min(1.0)
    return clip / rms.clamp_min(1.0)


def _denominators(group: dict[str, Any], squares: list[Tensor], eps: Numbers) -> list[Tensor]:
    """Return the power of second moments plus eps; infinity where there was no gradient yet.

    Args:
        group: The group; with ``decay_unused`` nothing is infinite.
        squares: Second moments.
        eps: Numbers to add.
    """
    if group["power"] == _SQRT:
        result = list(torch._foreach_sqrt(squares))
    else:
        result = list(torch._foreach_pow(squares, group["power"]))
    if not group["decay_unused"] and all(type(x) is Tensor and x.is_cpu for x in result):
        for x in result:
            torch.threshold_(x, 0.0, math.inf)
        torch._foreach_add_(result, eps)
    elif not group["decay_unused"]:
        used = torch._foreach_sign(result)
        torch._foreach_add_(result, eps)
        torch._foreach_div_(result, used)
    else:
        torch._foreach_add_(result, eps)
    return result
