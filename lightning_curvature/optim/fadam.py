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

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_curvature import vectors
from lightning_curvature.checks import (
    check_betas,
    check_choice,
    check_in_range,
    check_interval,
    check_positive,
)
from lightning_curvature.optim.diagonal import DiagonalOptimizer
from lightning_curvature.optim.per_tensor import (
    advance_,
    can_split,
    discounted_count,
    split,
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
    Memory: two copies of the parameters as state; on a CPU one more of the largest of them.

    Note:
        ``weight_decay`` is not AdamW's: its steps have RMS ``lr * weight_decay * clip`` at most,
        however large the parameters are, and the coordinates with the smallest gradients get most
        of it.

    Args:
        params: Parameters to optimize, or parameter groups.
        lr: Learning rate, >= 0. Groups may differ in it and in all that follows up to
            ``skip_unused``.
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
            paper's. The official code has 0.1, which moves weights by 1e-4 per step at ``lr=1e-3``:
            where the loss does not hold them, those of size 0.03 are gone after 300 steps.
        skip_unused: Whether coordinates without a gradient stay as they are: they have
            d = f^p + eps_hat^2 / f^p instead of f^p + eps_hat. With the latter, which is that of
            the official code, they take all of the decay of their tensor: rows of an embedding that
            no batch contained vanish, and the others are not decayed at all.
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
        skip_unused: bool = True,
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
            "skip_unused": skip_unused,
            "max_failures": max_failures,
            "foreach": foreach,
            "maximize": maximize,
        }
        super().__init__(params, defaults)
        self._scratch: dict[torch.dtype, Tensor] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickle or deep copy."""
        super().__setstate__(state)
        self._scratch = {}

    def _check_group(self, group: dict[str, Any]) -> None:
        check_positive("lr", group["lr"], zero=True)
        check_betas(group["betas"])
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
        columns = (params, grads, averages, squares, steps)
        if usable is None and group["foreach"] is not False and can_split(params):
            total_norm = float(stats["grad_norm"])
            for row in zip(*columns, strict=True):
                ratio = self._update_in_blocks(group, *row, total_norm)
                stats["win_rate"] += (ratio <= 1) / self._tensors
            return
        for part in vectors.chunks(len(params), group["foreach"]):
            ratios = _multi_tensor_fadam(
                group,
                params[part],
                self._grads(group, grads[part]),
                averages[part],
                squares[part],
                steps[part],
                usable,
            )
            stats["win_rate"] += (ratios <= 1).sum() / self._tensors

    def _update_in_blocks(
        self,
        group: dict[str, Any],
        p: Tensor,
        grad: Tensor,
        m: Tensor,
        v: Tensor,
        step: Tensor,
        total_norm: float,
    ) -> Tensor:
        """Update a tensor on the CPU, in parts that stay in the cache.

        Args:
            group: The group.
            p: The parameter.
            grad: Its gradient, finite.
            m: Average of its scaled gradients.
            v: Its second moment.
            step: Number of this update.
            total_norm: Norm of the gradients of all parameters.

        Returns:
            Root mean square of the scaled gradient in units of its limit.
        """
        root_size = max(p.numel(), 1) ** 0.5
        norm = step.new_tensor(total_norm, dtype=torch.float64)
        # If not even all gradients together are that long, the RMS of this one is not above 1.
        if group["eps_mode"] == "min" or total_norm > root_size:
            norm = torch.linalg.vector_norm(grad, dtype=v.dtype).double()
        correction = _correction(group, step.double())
        eps = float(correction * _eps(group, norm / root_size))
        beta1, beta2 = group["betas"]
        decays = group["weight_decay"] != 0
        parts = split((p, grad, m, v, self._scratch_like(v)))
        ready = grad.dtype == v.dtype and not group["maximize"]
        buffer = torch.empty_like(parts[0][3])
        squares = [0.0, 0.0]
        for p_, grad_, _, v_, q in parts:
            g = grad_ if ready else self._grads(group, [grad_])[0]
            x = buffer if buffer.shape == q.shape else buffer[: len(q)]
            v_.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            _single_tensor_scale(group, v_, eps, x, out=q)
            squares[0] += _square(torch.mul(g, q, out=x))
            if decays:
                squares[1] += _square(torch.mul(p_, q, out=x))
        rms = [correction * square**0.5 / root_size for square in squares]
        towards = float(correction * _shrinkage(group, rms[0])) * (1 - beta1)
        lr = float(group["lr"])
        decay = float(correction * _shrinkage(group, rms[1])) * lr * group["weight_decay"]
        # Backwards: the last parts are in the cache still.
        for p_, grad_, m_, _, q in reversed(parts):
            g = grad_ if ready else self._grads(group, [grad_])[0]
            m_.mul_(beta1).addcmul_(g, q, value=towards)
            x = p_ if p_.dtype == q.dtype else p_.to(q.dtype)
            if decays:
                x.addcmul_(x, q, value=-decay)
            x.add_(m_, alpha=-lr)
            if x is not p_:
                p_.copy_(x)
        return _in_units(rms[0], group)

    def _scratch_like(self, x: Tensor) -> Tensor:
        """Return memory for a tensor; fresh one would cost more than all the arithmetic."""
        strides = zip(x.shape, x.stride(), strict=True)
        span = 1 + sum((size - 1) * stride for size, stride in strides)
        memory = self._scratch.get(x.dtype)
        if memory is None or memory.numel() < span:
            memory = self._scratch[x.dtype] = torch.empty(max(span, 1), dtype=x.dtype)
        return memory.as_strided(x.shape, x.stride())


def _square(x: Tensor) -> float:
    flat = x.reshape(-1)
    return float(torch.dot(flat, flat))


# The Fisher diagonal is f = v / (1 - beta2^t). With k = (1 - beta2^t)^p this makes f^p = v^p / k
# and 1 / (f^p + eps) = k q with q = 1 / (v^p + k eps): only q has an entry per coordinate.


def _correction(group: dict[str, Any], steps: Tensor) -> Tensor:
    """Return k of the comment above.

    Args:
        group: The group.
        steps: Numbers of updates.
    """
    beta2: float = group["betas"][1]
    corrected: Tensor = (1 - beta2) * discounted_count(steps, beta2)
    return corrected.pow(group["power"])


def _eps(group: dict[str, Any], rms: Tensor) -> Tensor:
    """Return what is added to the power of the Fisher diagonal.

    Args:
        group: The group.
        rms: Root mean squares of gradients.
    """
    eps: float = group["eps"]
    if group["eps_mode"] == "max":
        return eps * rms.clamp_min(1.0)
    return (_EPS_RATIO * rms).clamp_max(eps).pow(2 * group["power"]).clamp_min(_FLOOR)


def _shrinkage(group: dict[str, Any], rms: Tensor) -> Tensor:
    """Return the factors that clip tensors of given root mean squares."""
    clip: float = group["clip"]
    if group["clip_mode"] == "limit":
        return 1.0 / (rms / clip).clamp_min(1.0)
    return clip / rms.clamp_min(1.0)


def _in_units(rms: Tensor, group: dict[str, Any]) -> Tensor:
    """Return root mean squares in units of their limit."""
    limit: float = group["clip"] * (1 + _ROUNDING)
    return rms.div(limit)


def _single_tensor_scale(
    group: dict[str, Any], v: Tensor, eps: float, buffer: Tensor, *, out: Tensor
) -> None:
    """Compute q of the comment above.

    Args:
        group: The group.
        v: Second moment.
        eps: Its k eps.
        buffer: Memory to work in.
        out: Gets the result.
    """
    root = group["power"] == _SQRT
    if root:
        torch.sqrt(v, out=out)
    else:
        torch.pow(v, group["power"], out=out)
    if group["skip_unused"]:
        power = v if root else torch.square(out, out=buffer)
        out.div_(torch.add(power, max(eps**2, _FLOOR), out=buffer))
    else:
        out.add_(eps).reciprocal_()


def _multi_tensor_fadam(
    group: dict[str, Any],
    params: list[Tensor],
    grads: list[Tensor],
    averages: list[Tensor],
    squares: list[Tensor],
    steps: list[Tensor],
    usable: Tensor | None,
) -> Tensor:
    """Update tensors together; nothing is read from the device.

    Args:
        group: The group.
        params: Parameters.
        grads: Their gradients, zero if not ``usable``.
        averages: Averages of scaled gradients.
        squares: Second moments.
        steps: Numbers of this update.
        usable: Boolean 0-dim tensor: if False nothing changes. None for True.

    Returns:
        Root mean squares of the scaled gradients in units of their limit, ``[k]``.
    """
    (beta1, beta2), lr = group["betas"], float(group["lr"])
    # Numbers in a list need no copy to the device.
    root_sizes = [max(p.numel(), 1) ** 0.5 for p in params] * 2
    norms = whole_norms(torch._foreach_norm(grads))
    rms = torch.stack(torch._foreach_div(norms, root_sizes[: len(norms)]))
    correction = _correction(group, torch.stack(steps))
    eps = correction * _eps(group, rms)
    vectors.ema_squares_(squares, grads, beta2, usable)
    scales = _multi_tensor_scale(group, squares, eps)
    scaled = torch._foreach_mul(grads, scales)
    decays = torch._foreach_mul(params, scales)
    norms = whole_norms(torch._foreach_norm([*scaled, *decays]))
    rms, decay_rms = torch.stack(torch._foreach_div(norms, root_sizes)).view(2, -1) * correction
    on = 1.0 if usable is None else usable.to(correction.dtype)
    torch._foreach_mul_(averages, 1 - (1 - beta1) * on)
    factors = (1 - beta1) * correction * _shrinkage(group, rms)
    torch._foreach_mul_(scaled, list(factors.unbind()))
    torch._foreach_add_(averages, scaled)
    # From here on the updates.
    factors = group["weight_decay"] * correction * _shrinkage(group, decay_rms)
    torch._foreach_mul_(decays, list(factors.unbind()))
    torch._foreach_add_(decays, averages)
    vectors.move_(params, decays, -lr, usable)
    return _in_units(rms, group)


def _multi_tensor_scale(group: dict[str, Any], squares: list[Tensor], eps: Tensor) -> list[Tensor]:
    """Return q of the comment above for several tensors.

    Args:
        group: The group.
        squares: Second moments.
        eps: Their k eps, ``[k]``.
    """
    root = group["power"] == _SQRT
    powers = torch._foreach_sqrt(squares) if root else torch._foreach_pow(squares, group["power"])
    if group["skip_unused"]:
        denominators = squares if root else torch._foreach_mul(powers, powers)
        added = eps.square().clamp_min(_FLOOR)
        torch._foreach_div_(powers, torch._foreach_add(denominators, list(added.unbind())))
    else:
        torch._foreach_add_(powers, list(eps.unbind()))
        torch._foreach_reciprocal_(powers)
    return list(powers)
