"""SophiaH: Sophia with Hutchinson's estimator.

Liu et al., ICLR 2024, arXiv:2305.14342, algorithm 1; see `sophia.py` for the update. There is no
official PyTorch code. Where it differs from the paper: probes are signs by default, which removes
the part of the variance that the diagonal itself causes.
"""

from typing import Any, ClassVar

from torch import Tensor

from lightning_curvature.checks import check_choice, check_count
from lightning_curvature.curvature.diagonal import Distribution, ProbeSampler, hutchinson
from lightning_curvature.optim.sophia import HessianTiming, SophiaOptimizer
from lightning_curvature.oracle.plans import HvpMethod, ProbePlan
from lightning_curvature.oracle.protocol import Oracle

__all__ = ["SophiaH"]


class SophiaH(SophiaOptimizer):
    r"""Clipped steps scaled by the diagonal of the Hessian, from random products.

    .. math::
        m \leftarrow \beta_1 m + (1-\beta_1) g, \quad
        h \leftarrow \beta_2 h + (1-\beta_2)\, z \odot (H z) \text{ every } k \text{ steps}, \quad
        \theta \leftarrow (1 - \eta\lambda)\theta
            - \eta\,\mathrm{clip}\Bigl(\frac{m}{\max(\rho h, \epsilon)}, 1\Bigr)

    h is signed: where the curvature is not positive, the entry moves by ``lr`` along the sign of
    the momentum. Unlike `SophiaG` it works for every loss and uses the whole Hessian; an estimate
    costs more.

    Cost per step: forward and backward; on every ``hessian_update_interval``-th step four backwards
    more on the same graph, which takes twice the memory. Memory: two copies of the parameters.

    Args:
        params: Parameters to optimize, or parameter groups.
        lr: Learning rate, the largest move of an entry in one step; >= 0.
        betas: Weights of the old value in the averages of gradient and curvature; in [0, 1).
        rho: Scales the curvature; > 0. The larger, the fewer entries are clipped.
        eps: Least value of ``rho * h``; > 0.
        weight_decay: Decoupled weight decay, >= 0.
        hessian_update_interval: Optimizer steps between two estimates.
        distribution: Entries of the probes: "rademacher" (+1 or -1) or "normal".
        num_probes: Probes per estimate; cost and precision grow with it.
        hvp_method: How products with the Hessian are computed: "double-backward" is exact; where a
            model cannot be differentiated twice the other one steps in, with a warning. "fd" takes
            central differences of gradients, which needs less memory but in networks of ReLUs
            mostly sees their kinks.
        hessian_timing: "before" estimates at the parameters of a step that uses it; "after" at
            those after every k-th step.
        bias_correction: Whether to divide both averages by the sum of their weights; see `SophiaG`.
        seed: Seed of the probes, >= 0. They are drawn from streams of their own, one per step.
        max_failures: Steps without a finite gradient in a row after which training stops.
        foreach: False works on one tensor at a time, which needs the least temporary memory.
        maximize: Whether to climb; the curvature of the negative loss is used then.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> import torch
        >>> layer = torch.nn.Linear(3, 1)
        >>> optimizer = SophiaH(layer.parameters(), lr=0.01)
        >>> criterion = optimizer.attach_model(layer, torch.nn.MSELoss())
        >>> criterion(layer(torch.ones(4, 3)), torch.zeros(4, 1)).backward()
        >>> optimizer.step()

    References:
        Liu et al., 2024, arXiv:2305.14342.
    """

    asks: ClassVar[frozenset[str]] = frozenset({"hvp"})
    shared_names: ClassVar[tuple[str, ...]] = (
        *SophiaOptimizer.shared_names,
        "distribution",
        "num_probes",
        "hvp_method",
        "maximize",
    )

    # Draws the probes; tests put another one into an optimizer.
    sampler: type[ProbeSampler] = ProbeSampler

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float = 0.01,
        eps: float = 1e-12,
        weight_decay: float = 0.1,
        hessian_update_interval: int = 10,
        distribution: Distribution = "rademacher",
        num_probes: int = 1,
        hvp_method: HvpMethod = "double-backward",
        hessian_timing: HessianTiming = "before",
        bias_correction: bool = False,
        seed: int = 0,
        max_failures: int = 20,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "rho": rho,
            "eps": eps,
            "weight_decay": weight_decay,
            "hessian_update_interval": hessian_update_interval,
            "distribution": distribution,
            "num_probes": num_probes,
            "hvp_method": hvp_method,
            "hessian_timing": hessian_timing,
            "bias_correction": bias_correction,
            "seed": seed,
            "max_failures": max_failures,
            "foreach": foreach,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_choice("distribution", group["distribution"], ("rademacher", "normal"))
        check_count("num_probes", group["num_probes"])
        check_choice("hvp_method", group["hvp_method"], ("double-backward", "fd"))

    def plan(self) -> ProbePlan | None:
        """Tell what products to compute in the main passes of the coming step, None for none."""
        if not self._estimates():
            return None
        group = self.param_groups[0]
        sampler = self.sampler(group["distribution"], int(group["seed"]), self._steps_done)
        return ProbePlan(
            sampler.draw,
            int(group["num_probes"]),
            group["hvp_method"],
            again=group["hessian_timing"] == "after",
        )

    def _estimate(self, params: list[Tensor], oracle: Oracle) -> list[Tensor]:
        found = hutchinson(oracle)
        return [-x for x in found] if self.param_groups[0]["maximize"] else found
