"""SophiaG: Sophia with the Gauss-Newton-Bartlett estimator.

Liu et al., ICLR 2024, arXiv:2305.14342, algorithms 2 and 3; see `sophia.py` for the update and
`lightning_curvature/oracle/sampling.py` for the estimator. Where it differs from the official code:

- labels are drawn on the graph of the main pass, so an estimate costs one backward and no forward;
- the gradient is squared per micro-batch and rank before it is averaged (``squared``): as unbiased,
  and its variance falls with their number. The official code averages first;
- every rank draws labels of its own. The official script seeds all ranks alike, which biases the
  estimate;
- masked positions, ragged batches, class weights and several losses are weighted as they are in the
  loss; squared errors and binary cross-entropies draw from their own likelihoods.
"""

from typing import Any, ClassVar

from torch import Tensor

from lightning_curvature.checks import check_choice, check_in_range, check_positive
from lightning_curvature.optim.sophia import HessianTiming, SophiaOptimizer
from lightning_curvature.oracle.labels import LabelSampler
from lightning_curvature.oracle.plans import SamplePlan, Squared
from lightning_curvature.oracle.protocol import Oracle

__all__ = ["SophiaG"]


class SophiaG(SophiaOptimizer):
    r"""Clipped steps scaled by the diagonal of the Gauss-Newton matrix, from sampled labels.

    .. math::
        m \leftarrow \beta_1 m + (1-\beta_1) g, \quad
        h \leftarrow \beta_2 h + (1-\beta_2) \hat h \text{ every } k \text{ steps}, \quad
        \theta \leftarrow (1 - \eta\lambda)\theta
            - \eta\,\mathrm{clip}\Bigl(\frac{m}{\max(\rho h, \epsilon)}, 1\Bigr)

    h estimates the diagonal of the Gauss-Newton matrix of the mean loss. Where ``rho * h`` is below
    the size of the momentum the entry moves by ``lr``, as in sign descent; ``stats["win_rate"]`` is
    the share of the other entries, those that curvature scales. Choose ``rho`` so that it is
    between 0.1 and 0.5; ``lr`` somewhat below that of AdamW.

    Cost per step: forward and backward, and one backward more on every
    ``hessian_update_interval``-th step. Memory: two copies of the parameters, a third and fourth
    during an estimate.

    Args:
        params: Parameters to optimize, or parameter groups.
        lr: Learning rate, the largest move of an entry in one step; >= 0.
        betas: Weights of the old value in the averages of gradient and curvature; in [0, 1).
        rho: Scales the curvature; > 0. The larger, the fewer entries are clipped. It goes with the
            curvature of the mean loss, so the number of examples need not be given anywhere.
        eps: Least value of ``rho * h``; > 0.
        weight_decay: Decoupled weight decay, >= 0.
        hessian_update_interval: Optimizer steps between two estimates.
        squared: "micro_batch" squares the gradient of every micro-batch on every rank and averages
            the squares, which has the smaller variance; "window" averages first, as the official
            code does.
        hessian_batch_fraction: Share of the examples of a batch that an estimate uses, in (0, 1].
            It is there for published settings, such as half of the batch: on the graph of the main
            pass a part costs what the whole does, so the default is all.
        hessian_clip_norm: Largest norm of the mean gradient under drawn labels, None for any. The
            official script clips at 1; that shrinks estimates where they are largest, so it is off
            by default.
        hessian_timing: "before" estimates on the graph of a step that uses it; "after" at the
            parameters after every k-th step, as the official script does, by one forward more.
        bias_correction: Whether to divide both averages by the sum of their weights. Without it, as
            in the official code, the curvature is underestimated for hundreds of steps, which acts
            as a warm-up of mostly clipped steps.
        seed: Seed of the labels, >= 0. They are drawn from streams of their own, one per step, rank
            and micro-batch.
        max_failures: Steps without a finite gradient in a row after which training stops.
        foreach: False works on one tensor at a time, which needs the least temporary memory.
        maximize: Whether to climb.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> import torch
        >>> layer = torch.nn.Linear(3, 2)
        >>> optimizer = SophiaG(layer.parameters(), lr=0.01, rho=1.0)
        >>> criterion = optimizer.attach_model(layer, torch.nn.CrossEntropyLoss())
        >>> criterion(layer(torch.ones(4, 3)), torch.tensor([0, 1, 1, 0])).backward()
        >>> optimizer.step()
        >>> 0 <= optimizer.stats["win_rate"] <= 1
        tensor(True)

    References:
        Liu et al., 2024, arXiv:2305.14342.
    """

    asks: ClassVar[frozenset[str]] = frozenset({"sampled"})
    shared_names: ClassVar[tuple[str, ...]] = (
        *SophiaOptimizer.shared_names,
        "squared",
        "hessian_batch_fraction",
        "hessian_clip_norm",
    )

    # Draws the labels; tests put another one into an optimizer.
    sampler: type[LabelSampler] = LabelSampler

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float = 0.04,
        eps: float = 1e-12,
        weight_decay: float = 0.1,
        hessian_update_interval: int = 10,
        squared: Squared = "micro_batch",
        hessian_batch_fraction: float = 1.0,
        hessian_clip_norm: float | None = None,
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
            "squared": squared,
            "hessian_batch_fraction": hessian_batch_fraction,
            "hessian_clip_norm": hessian_clip_norm,
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
        check_choice("squared", group["squared"], ("micro_batch", "window"))
        check_in_range(
            "hessian_batch_fraction",
            group["hessian_batch_fraction"],
            0,
            1,
            include_low=False,
            include_high=True,
        )
        if group["hessian_clip_norm"] is not None:
            check_positive("hessian_clip_norm", group["hessian_clip_norm"])

    def plan(self) -> SamplePlan | None:
        """Tell what to sample in the main passes of the coming step, None for nothing."""
        if not self._estimates():
            return None
        group = self.param_groups[0]
        return SamplePlan(
            seed=int(group["seed"]),
            step=self._steps_done,
            squared=group["squared"],
            fraction=float(group["hessian_batch_fraction"]),
            clip_norm=group["hessian_clip_norm"],
            again=group["hessian_timing"] == "after",
            sampler=self.sampler,
        )

    def _estimate(self, params: list[Tensor], oracle: Oracle) -> list[Tensor]:
        return oracle.sampled_squares()
