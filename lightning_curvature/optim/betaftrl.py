"""BetaFTRL: Adam seen as a learner of updates that follows the regularized leader.

Kwangjun Ahn, Zhiyu Zhang, Yunbum Kook and Yan Dai, "Understanding Adam Optimizer via Online
Learning of Updates: Adam is FTRL in Disguise", 2024, arXiv:2402.01567; there is no official code.
The norm form, the clip-free form and the random step length are those of the analyses that followed
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
from lightning_curvature.optim.per_tensor import (
    advance_,
    can_split,
    discounted_count,
    split,
    whole_norms,
)
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

    With :math:`\beta_2 = \beta_1^2` and the constants absorbed this is Adam without bias
    correction, and nothing in it has a scale: gradients multiplied by any positive number give the
    same updates. 0 / 0 is 0.

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
    # Of a state that is being checked.
    _checked_mode: str | None = None

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
        mode = self._checked_mode or self.param_groups[0]["clip_mode"]
        return ("step", "grad_sum") if mode == "norm" else ("step", "grad_sum", "grad_sq_sum")

    def _check_state(self, saved: Any) -> None:
        # The mode is loaded, too.
        groups = saved.get("param_groups") if isinstance(saved, dict) else None
        first = groups[0] if isinstance(groups, list) and groups else None
        self._checked_mode = first.get("clip_mode") if isinstance(first, dict) else None
        try:
            super()._check_state(saved)
            by_norm = self._checked_mode == "norm" and saved["state"]
        finally:
            self._checked_mode = None
        if by_norm and _SCALAR not in saved["curvature"]["scalars"]:
            raise ValueError(
                f"Cannot load the state into {type(self).__name__}: 'scalars' has no '{_SCALAR}', "
                "which clip_mode='norm' needs. The state is cut off."
            )

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
        self._size = sum(p.numel() for p in params)
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
        if group["clip_mode"] == "norm":
            self._move_along_sums(group, params, usable)
            return
        sums, squares, steps = self._state_lists(params, "grad_sum", "grad_sq_sum", "step")
        advance_(steps, usable)
        grads = [p.grad for p in params if p.grad is not None]
        if usable is None and group["foreach"] is not False and can_split(params):
            for row in zip(params, grads, sums, squares, steps, strict=True):
                count = self._update_in_parts(group, *row)
                if group["max_update"] is not None:
                    stats["win_rate"] += count / self._size
            return
        alphas, eps = (list(x.unbind()) for x in _numbers(group, torch.stack(steps)))
        for part in vectors.chunks(len(params), group["foreach"]):
            updates = _multi_tensor_updates(
                group,
                self._grads(group, grads[part]),
                sums[part],
                squares[part],
                alphas[part],
                eps[part],
                usable,
            )
            if group["max_update"] is not None:
                inside = _clip_(updates, group["max_update"]).to(stats["win_rate"].dtype)
                stats["win_rate"] += inside / self._size
            self._move(group, params[part], updates, usable)

    def _update_in_parts(
        self, group: dict[str, Any], p: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: Tensor
    ) -> float:
        """Update a tensor on the CPU, in parts that stay in the cache.

        Args:
            group: The group.
            p: The parameter.
            grad: Its gradient, finite.
            m: Discounted sum of its gradients.
            v: Discounted sum of the squares.
            step: Number of this update.

        Returns:
            The number of coordinates that were not clipped, if there is a limit.
        """
        beta1, beta2 = _betas(group)
        alpha, eps = (float(x) for x in _numbers(group, step.double()))
        limit, kept = group["max_update"], 1 - _decay(group)
        parts = split((p, grad, m, v))
        buffer = torch.empty_like(parts[0][3])
        inside = 0.0
        for p_, grad_, m_, v_ in parts:
            (g,) = self._grads(group, [grad_])
            x = buffer if buffer.shape == v_.shape else buffer[: len(v_)]
            torch.add(g, m_, alpha=beta1, out=m_)
            v_.mul_(beta2).addcmul_(g, g)
            torch.sqrt(v_, out=x)
            if eps > 0:
                x.add_(eps)
            else:
                x.clamp_min_(_tiny(x))
            y = p_ if p_.dtype == x.dtype else p_.to(x.dtype)
            if kept != 1:
                y.mul_(kept)
            if limit is None:
                y.addcdiv_(m_, x, value=-alpha * self._random)
            else:
                torch.div(m_, x, out=x)
                y.add_(x.mul_(alpha).clamp_(-limit, limit), alpha=-self._random)
                inside += float(x.abs_().lt_(limit).sum())
            if y is not p_:
                p_.copy_(y)
        return inside

    def _move(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        updates: list[Tensor],
        usable: Tensor | None,
    ) -> None:
        """Take the step and decay the parameters, which are rounded once.

        Args:
            group: The group.
            params: The parameters.
            updates: Updates uphill; they are changed.
            usable: See `_update_group`.
        """
        if self._random != 1:
            torch._foreach_mul_(updates, self._random)
        if group["weight_decay"] != 0:
            torch._foreach_add_(updates, params, alpha=_decay(group))
        vectors.move_(params, updates, -1.0, usable)

    # One sum of squares for all

    def _prepare_norm(
        self, params: list[Tensor], usable: Tensor | None, stats: dict[str, Tensor]
    ) -> None:
        """Update all sums; set the factors by which those of gradients become updates.

        Args:
            params: All parameters with a gradient.
            usable: See `_update_group`.
            stats: What was measured so far.
        """
        first = self.param_groups[0]
        before = self._scalar(_SCALAR, stats["grad_norm"])
        total = _betas(first)[1] * before + stats["grad_norm"].square()
        total = total if usable is None else torch.where(usable, total, before)
        self._scalars[_SCALAR] = total
        members = set(params)
        self._factors: dict[int, Tensor] = {}
        squared = torch.zeros_like(total)
        for group in self.param_groups:
            ps = [p for p in group["params"] if p in members]
            if not ps:
                continue
            sums, steps = self._state_lists(ps, "grad_sum", "step")
            advance_(steps, usable)
            grads = [p.grad for p in ps if p.grad is not None]
            for gs, parts in vectors.blocks(grads, sums, foreach=group["foreach"]):
                _discount_(parts, _betas(group)[0], usable)
                torch._foreach_add_(parts, self._grads(group, gs))
            alphas, eps = _numbers(group, torch.stack(steps))
            factors = alphas / (total.sqrt() + eps).clamp_min(_tiny(total))
            norms = torch.stack(whole_norms(torch._foreach_norm(sums)))
            squared = squared + (factors * norms).square().sum()
            self._factors[id(group)] = factors
        limit = first["max_update"]
        if limit is not None:
            length = squared.sqrt()
            stats["win_rate"] = (length <= limit).to(length.dtype)
            for key in self._factors:
                self._factors[key] = self._factors[key] * (limit / length).clamp_max(1.0)

    def _move_along_sums(
        self, group: dict[str, Any], params: list[Tensor], usable: Tensor | None
    ) -> None:
        """Take the step that `_prepare_norm` prepared."""
        (sums,) = self._state_lists(params, "grad_sum")
        factors = list(self._factors[id(group)].unbind())
        for part in vectors.chunks(len(params), group["foreach"]):
            updates = list(torch._foreach_mul(sums[part], factors[part]))
            self._move(group, params[part], updates, usable)


def _betas(group: dict[str, Any]) -> tuple[float, float]:
    beta1, beta2 = group["betas"]
    return beta1, beta1**2 if beta2 is None else beta2


def _decay(group: dict[str, Any]) -> float:
    return float(group["lr"]) * float(group["weight_decay"])


def _tiny(like: Tensor) -> float:
    """Return what takes the place of a root that is zero, so that 0 / 0 is 0.

    It is the least number that can be squared: what is smaller moves in proportion.
    """
    return float(torch.finfo(like.dtype).tiny ** 0.5)


def _discount_(sums: list[Tensor], beta: float, usable: Tensor | None) -> None:
    """Multiply sums by a factor in place, unless the step is not ``usable``."""
    factor = beta if usable is None else 1 - (1 - beta) * usable.to(sums[0].dtype)
    torch._foreach_mul_(sums, factor)


def _numbers(group: dict[str, Any], steps: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors on updates and what is added to the roots of the sums of squares.

    Args:
        group: The group.
        steps: Numbers of updates, of any shape.
    """
    beta1, beta2 = _betas(group)
    count = discounted_count(steps, beta1)
    alphas = torch.full_like(count, float(group["lr"]))
    eps = torch.full_like(count, float(group["eps"]))
    if group["scale"] == "adam":
        root = discounted_count(steps, beta2).sqrt()
        alphas, eps = alphas * root / count, eps * root
    return alphas, eps + group["damping"] * alphas * count


def _multi_tensor_updates(
    group: dict[str, Any],
    grads: list[Tensor],
    sums: list[Tensor],
    squares: list[Tensor],
    alphas: list[Tensor],
    eps: list[Tensor],
    usable: Tensor | None,
) -> list[Tensor]:
    """Update the sums of several tensors; return the updates that they make, uphill and unlimited.

    Args:
        group: The group.
        grads: Gradients, zero if not ``usable``.
        sums: Discounted sums of gradients.
        squares: Discounted sums of squares.
        alphas: Factors on updates.
        eps: What is added to the roots of the sums of squares.
        usable: Boolean 0-dim tensor: if False nothing changes. None for True.
    """
    beta1, beta2 = _betas(group)
    _discount_(sums, beta1, usable)
    torch._foreach_add_(sums, grads)
    _discount_(squares, beta2, usable)
    torch._foreach_addcmul_(squares, grads, grads)
    roots = torch._foreach_sqrt(squares)
    torch._foreach_add_(roots, eps)
    torch._foreach_clamp_min_(roots, _tiny(squares[0]))
    updates = list(torch._foreach_div(sums, roots))
    torch._foreach_mul_(updates, alphas)
    return updates


def _clip_(updates: list[Tensor], limit: float) -> Any:
    """Limit every coordinate in place; return the number of those that are within the limit."""
    torch._foreach_clamp_min_(updates, -limit)
    torch._foreach_clamp_max_(updates, limit)
    inside: list[Any] = [(update.abs() < limit).sum() for update in updates]
    # Sums over shards of tensors are made whole.
    return sum(x.full_tensor() if hasattr(x, "full_tensor") else x for x in inside)
