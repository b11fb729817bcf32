"""AdaHessian: Adam whose second moment is that of the Hessian's diagonal.

Yao, Gholami, Shen, Mustafa, Keutzer and Mahoney, "ADAHESSIAN: An Adaptive Second Order Optimizer
for Machine Learning", AAAI 2021, arXiv:2006.00719. Where it differs from the official code:

- kernels of convolutions of one and three dimensions are averaged too; the official code hands
  one-dimensional ones the values of the parameter before;
- gradients of the user's backward carry no graph, and nothing is left behind;
- products are averaged over the ranks;
- the diagonal may be estimated less often than on every step.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_curvature import vectors
from lightning_curvature.checks import (
    check_betas,
    check_choice,
    check_count,
    check_in_range,
    check_interval,
    check_positive,
)
from lightning_curvature.curvature.diagonal import Distribution, ProbeSampler, hutchinson
from lightning_curvature.optim.diagonal import DiagonalOptimizer
from lightning_curvature.optim.per_tensor import advance_
from lightning_curvature.oracle.plans import HvpMethod, ProbePlan
from lightning_curvature.oracle.protocol import Oracle

__all__ = ["AdaHessian"]

_INTERVAL = "hessian_update_interval"


class AdaHessian(DiagonalOptimizer):
    r"""Adam with the Hessian's diagonal in the place of the gradient in the second moment.

    .. math::
        D = |z \odot (H z)|, \quad
        m \leftarrow \beta_1 m + (1-\beta_1) g, \quad
        v \leftarrow \beta_2 v + (1-\beta_2) D^2, \quad
        \theta \leftarrow \theta
            - \eta\Bigl(\frac{\hat m}{\hat v^{k/2} + \epsilon} + \lambda\theta\Bigr)

    with the bias corrections of Adam. D of a convolution is averaged over its kernel.

    Cost per step: forward and backward, and on every ``hessian_update_interval``-th step four
    backwards more on the same graph, which takes twice the memory. Memory: two copies of the
    parameters.

    Args:
        params: Parameters to optimize, or parameter groups.
        lr: Learning rate, >= 0.
        betas: Weights of the old value in the averages of gradient and squared diagonal; in [0, 1).
        eps: Added to the denominator after the power; > 0.
        hessian_power: Exponent k of the root mean square of the diagonal, in [0, 1]; 1 is a
            Newton-like step, 0 is momentum SGD.
        weight_decay: Decoupled weight decay, >= 0.
        hessian_update_interval: Optimizer steps between two estimates; the paper's is 1.
        spatial_average: Whether D is averaged over the kernels of convolutions, all axes from the
            third on.
        distribution: Entries of the probes: "rademacher" (+1 or -1) or "normal".
        num_probes: Probes per estimate; cost and precision grow with it.
        hvp_method: How products with the Hessian are computed; see `SophiaH`.
        seed: Seed of the probes, >= 0. They are drawn from streams of their own, one per step.
        max_failures: Steps without a finite gradient in a row after which training stops.
        foreach: False works on one tensor at a time, which needs the least temporary memory.
        maximize: Whether to climb.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> import torch
        >>> layer = torch.nn.Linear(3, 1)
        >>> optimizer = AdaHessian(layer.parameters(), lr=0.1)
        >>> criterion = optimizer.attach_model(layer, torch.nn.MSELoss())
        >>> criterion(layer(torch.ones(4, 3)), torch.zeros(4, 1)).backward()
        >>> optimizer.step()

    References:
        Yao et al., 2021, arXiv:2006.00719.
    """

    asks: ClassVar[frozenset[str]] = frozenset({"hvp"})
    state_names = ("step", "exp_avg", "hess_diag_sq", "num_estimates")
    shared_names: ClassVar[tuple[str, ...]] = (
        "hessian_update_interval",
        "spatial_average",
        "distribution",
        "num_probes",
        "hvp_method",
        "seed",
        "max_failures",
        "foreach",
    )
    watched: ClassVar[dict[str, tuple[int, str]]] = {
        "skipped_refreshes": (
            1,
            "{name} kept an old estimate of the Hessian's diagonal {count} times: the new one "
            "was not finite. stats['skipped_refreshes'] goes on counting.",
        )
    }

    # Draws the probes; tests put another one into an optimizer.
    sampler: type[ProbeSampler] = ProbeSampler

    def __init__(
        self,
        params: Any,
        lr: float = 0.15,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        hessian_power: float = 1.0,
        weight_decay: float = 0.0,
        hessian_update_interval: int = 1,
        spatial_average: bool = True,
        distribution: Distribution = "rademacher",
        num_probes: int = 1,
        hvp_method: HvpMethod = "double-backward",
        seed: int = 0,
        max_failures: int = 20,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "hessian_power": hessian_power,
            "weight_decay": weight_decay,
            "hessian_update_interval": hessian_update_interval,
            "spatial_average": spatial_average,
            "distribution": distribution,
            "num_probes": num_probes,
            "hvp_method": hvp_method,
            "seed": seed,
            "max_failures": max_failures,
            "foreach": foreach,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        check_positive("lr", group["lr"], zero=True)
        check_betas(group["betas"])
        check_positive("eps", group["eps"])
        check_in_range("hessian_power", group["hessian_power"], 0, 1, include_high=True)
        check_positive("weight_decay", group["weight_decay"], zero=True)
        check_interval(_INTERVAL, group[_INTERVAL])
        check_choice("distribution", group["distribution"], ("rademacher", "normal"))
        check_count("num_probes", group["num_probes"])
        check_choice("hvp_method", group["hvp_method"], ("double-backward", "fd"))
        check_in_range("seed", group["seed"], 0, math.inf)
        check_interval("max_failures", group["max_failures"])

    def wants_record(self) -> bool:
        """Tell whether the coming step makes an estimate."""
        return self._due(_INTERVAL)

    def plan(self) -> ProbePlan | None:
        """Tell what products to compute in the main passes of the coming step, None for none."""
        if not self.wants_record():
            return None
        group = self.param_groups[0]
        sampler = self.sampler(group["distribution"], int(group["seed"]), self._steps_done)
        return ProbePlan(sampler.draw, int(group["num_probes"]), group["hvp_method"])

    # One step

    def _prepare(
        self,
        params: list[Tensor],
        oracle: Oracle | None,
        usable: Tensor | None,
        stats: dict[str, Tensor],
    ) -> None:
        averages = self._state_lists(params, *self.state_names)[2]
        if oracle is None or not self.wants_record():
            return
        diagonal = self._diagonal(oracle)
        size = vectors.dot(diagonal, diagonal)
        good = self._accept(diagonal, size, usable)
        advance_([self.state[p]["num_estimates"] for p in params], good)
        # Only who owns the interval wants to know, and it takes a copy.
        before = vectors.clone(averages) if _INTERVAL in self._schedules else None
        decays = {id(p): group["betas"][1] for group in self.param_groups for p in group["params"]}
        for decay in dict.fromkeys(decays.values()):
            chosen = [i for i, p in enumerate(params) if decays[id(p)] == decay]
            columns = ([averages[i] for i in chosen], [diagonal[i] for i in chosen])
            for old, new in vectors.blocks(*columns):
                vectors.ema_squares_(old, new, decay, good)
        stats["hess_diag_norm"] = size.sqrt()
        if before is not None:
            drift = self._drift(averages, before, good)
            stats["curvature_drift"] = drift
            self._refreshed(_INTERVAL, drift)

    def _diagonal(self, oracle: Oracle) -> list[Tensor]:
        """Return |z * (H z)|, averaged over kernels."""
        found = hutchinson(oracle)
        torch._foreach_abs_(found)
        if self.param_groups[0]["spatial_average"]:
            for x in found:
                if x.dim() > 2:  # noqa: PLR2004
                    x.copy_(x.mean(dim=tuple(range(2, x.dim())), keepdim=True).expand_as(x))
        return found

    def _update_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        usable: Tensor | None,
        stats: dict[str, Tensor],
    ) -> None:
        lr, (beta1, beta2), power = float(group["lr"]), group["betas"], group["hessian_power"]
        steps, exp_avgs, averages, counts = self._state_lists(params, *self.state_names)
        advance_(steps, usable)
        grads = [p.grad for p in params if p.grad is not None]
        t, n = torch.stack(steps).clamp_min(1.0), torch.stack(counts).clamp_min(1.0)
        # m_hat / (v_hat^(k/2) + eps) = m / (v^(k/2) a + b), one factor and one summand per tensor.
        correction = 1 - beta1**t
        factors = correction * (1 - beta2**n) ** (-0.5 * power)
        # Without a curvature there is no scale to move by.
        summands = torch.where(torch.stack(counts) > 0, correction * group["eps"], math.inf)
        # As lists: a single 0-dim tensor would be read as a number.
        numbers: list[Any] = [factors.unbind(), summands.unbind()]
        same = False
        if self._can_look(t):
            numbers = [factors.tolist(), summands.tolist()]
            same = len(set(zip(*numbers, strict=True))) == 1
        columns = (params, grads, exp_avgs, averages)
        parts = vectors.blocks(*columns, foreach=group["foreach"] if same else False)
        for number, (ps, gs, ms, vs) in enumerate(parts):
            row = 0 if same else number
            vectors.shrink_(ps, lr * group["weight_decay"], usable)
            vectors.ema_(ms, self._grads(group, gs), beta1, usable)
            scales = list(torch._foreach_sqrt(vs))
            if power != 1:
                torch._foreach_pow_(scales, power)
            torch._foreach_mul_(scales, [numbers[0][row]] * len(scales))
            torch._foreach_add_(scales, [numbers[1][row]] * len(scales))
            vectors.move_(ps, list(torch._foreach_div(ms, scales)), -lr, usable)
