"""EKFAC: K-FAC with corrected eigenvalues.

Thomas George, Cesar Laurent, Xavier Bouthillier, Nicolas Ballas and Pascal Vincent, "Fast
Approximate Natural Gradient Descent in a Kronecker-factored Eigenbasis", NeurIPS 2018,
arXiv:1806.03884.
"""

from typing import Any, Literal

from torch import Tensor

from lightning_curvature import vectors
from lightning_curvature.checks import check_choice
from lightning_curvature.curvature.kronecker import Refreshed, State, eigen_state, rounded
from lightning_curvature.curvature.kronecker_blocks import BlockInfo
from lightning_curvature.curvature.layer_rows import KfacApprox
from lightning_curvature.optim.kfac_step import KFACStep
from lightning_curvature.oracle.plans import FisherType

__all__ = ["EKFAC"]

_SHARDING = ("none", "compute")


class EKFAC(KFACStep):
    r"""K-FAC with corrected eigenvalues, and all of its adaptive rules.

    .. math::
        \Delta = Q_G\left[\frac{Q_G^\top g\,Q_A}{s + \lambda}\right]Q_A^\top, \quad
        s = \mathbb{E}\left[(Q_G^\top g_n Q_A)^2\right]

    Q are the eigenvectors of K-FAC's factors. K-FAC takes the products of their eigenvalues for s;
    here s is the mean square of the gradients of single examples in that basis, which is the best
    diagonal there is: the error to the true block is never larger. Between two inversions only s
    is refreshed, which is cheap, so bases may be older than K-FAC's inverses.

    Layers, learning rate, momentum and damping are those of `KFAC`.

    Cost per step: that of `KFAC`, with an eigendecomposition (five to ten times an inverse) every
    ``inverse_update_interval`` steps, and two rotations per layer for s.
    Memory: as `KFAC`, and one copy of the parameters for s. For layers with many positions
    gradients of single examples are there for a moment, 64 MB of them at a time, at least one.

    Args:
        params: Parameters to optimize, or parameter groups.
        lr: With ``adaptive_lr`` it multiplies the derived step, so that learning-rate schedulers
            act as an envelope; otherwise it is the learning rate. At least 0. Groups may differ.
        momentum: Weight of the last update, unless ``adaptive_momentum``; in [0, 1).
        damping: Initial damping, > 0, in the units of the curvature of the mean loss. Large is
            safe: it is adapted, and falls quickly where the model can be trusted.
        weight_decay: Decoupled weight decay, scaled by the learning rate used; >= 0. Groups may
            differ.
        l2_reg: Coefficient of a penalty ``0.5 * l2_reg * |theta|^2`` that the loss contains, so
            that the model of the loss knows its curvature; >= 0. The optimizer does not add it.
        adaptive_lr: Whether the learning rate minimizes the quadratic model of the present batch.
        adaptive_momentum: Whether the momentum minimizes it, too.
        max_momentum: Largest absolute value of an adaptive momentum, > 0; None for none, as in
            kfac-jax. Above 1 the last update grows, which small batches may do on every step.
        max_relative_update: Largest norm of an update relative to that of all parameters, > 0. It
            is reached only when something goes wrong: the model of a small batch has directions
            without curvature. None for no limit, as in kfac-jax.
        norm_constraint: Largest ``lr^2 <Delta, grad>`` with a learning rate that is not adaptive;
            longer steps are shortened. None for none; 1e-3 is a usual value.
        damping_algorithm: Rule that adapts the damping: "levenberg-marquardt" looks at the
            reduction ratio, "fixed" does nothing.
        damping_increase_factor: Factor when the reduction ratio is below 1/4; >= 1.
        damping_decrease_factor: Factor when the reduction ratio is above 3/4; in (0, 1].
        min_damping: Lower limit of the damping, >= 0. Every step fits its own batch better with
            less damping, whatever it does to the others; below 1e-5 runs on mini-batches diverge.
        max_damping: Upper limit of the damping. At kinks of ReLU networks no model is right at any
            step length; without a limit the damping grows until nothing moves.
        include_damping_in_quad_change: Whether the predicted change of the loss counts the damping
            as if it were curvature.
        step_rejection: Whether a step that raised the loss of its batch is undone; costs a forward
            on every step.
        rejection_increase_factor: What the damping is multiplied with then, >= 1.
        quad_model: Where the model of the loss gets its curvature from. "exact" is the Gauss-Newton
            matrix itself, one forward per direction; "factors" is the approximation that
            preconditions, which costs no forward and knows less.
        factor_decay: Weight of old observations in the running averages of the factors, against 1
            for a new one; in [0, 1).
        fisher_type: Which curvature the factors approximate. "mc": gradients under labels drawn
            from the model; "curvature-propagation": random combinations of its output curvature;
            "type-2": exact, one backward per output of the model, for few outputs; "empirical":
            gradients under the labels of the data, which is not the Fisher matrix.
        mc_samples: Draws per example with the first two; each costs one backward.
        kfac_approx: What is done with positions (tokens, pixels) of an example: "expand" takes each
            for an example of its own, "reduce" averages inputs and sums output gradients
            (arXiv:2311.00636), and is cheaper.
        official_empirical_scaling: Whether the empirical factors are divided by the number of
            examples once more, as in kfac-jax.
        factor_update_interval: Optimizer steps between two updates of the factors; each costs a
            backward and a product per layer.
        inverse_update_interval: Optimizer steps between two inversions.
        curvature_update_interval: Optimizer steps between two measurements of the quadratic model;
            in between learning rate and momentum stay.
        damping_update_interval: Optimizer steps between two adaptations of the damping, at the end
            of each interval; each costs one forward.
        factor_warmup: In that many first steps factors and inverses are refreshed every time, and
            factors are plain means; >= 0.
        max_factor_dim: Largest number of rows of a dense factor. A larger one is cut into up to 8
            blocks, one still larger is kept as a diagonal; the log names them.
        factor_dtype: What factors are computed and stored in: "float32" or "bfloat16"; None for the
            precision of the parameters, at least float32. What rounding may have made negative is
            damped.
        inverse_dtype: What inverses and eigenvectors are stored and multiplied in, likewise.
            "bfloat16" multiplies several times faster on hardware that has it. They are always
            computed in float32 or float64.
        inverse_sharding: What ranks share out. "none": every rank finds all bases; "compute":
            every rank finds its part and gives it to the others.
        seed: Seed of the labels, >= 0. They are drawn from streams of their own, one per step, rank
            and micro-batch; the global random state is left alone.
        max_failures: Unusable steps in a row after which training stops with an error; also how
            often, in optimizer steps, the counts are read from the device while all goes well.
        maximize: Whether to climb.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> import torch
        >>> layers = torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)
        >>> model = torch.nn.Sequential(*layers)
        >>> optimizer = EKFAC(model.parameters())
        >>> criterion = optimizer.attach_model(model, torch.nn.CrossEntropyLoss())
        >>> x, y = torch.randn(32, 3), torch.randint(2, (32,))
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     criterion(model(x), y).backward()
        ...     optimizer.step()
        >>> sorted(optimizer.stats)[:3]
        ['curvature', 'damping', 'grad_norm']

    References:
        George et al., 2018, arXiv:1806.03884; Martens and Grosse, 2015, arXiv:1503.05671.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        momentum: float = 0.9,
        damping: float = 1.0,
        weight_decay: float = 0.0,
        l2_reg: float = 0.0,
        adaptive_lr: bool = True,
        adaptive_momentum: bool = True,
        max_momentum: float | None = 0.9,
        max_relative_update: float | None = 0.1,
        norm_constraint: float | None = None,
        damping_algorithm: Literal["levenberg-marquardt", "fixed"] = "levenberg-marquardt",
        damping_increase_factor: float = 1.67,
        damping_decrease_factor: float = 0.6,
        min_damping: float = 1e-4,
        max_damping: float = 10.0,
        include_damping_in_quad_change: bool = False,
        step_rejection: bool = False,
        rejection_increase_factor: float = 1.0,
        quad_model: Literal["exact", "factors"] = "exact",
        factor_decay: float = 0.95,
        fisher_type: FisherType = "mc",
        mc_samples: int = 1,
        kfac_approx: KfacApprox = "expand",
        official_empirical_scaling: bool = False,
        factor_update_interval: int = 1,
        inverse_update_interval: int = 5,
        curvature_update_interval: int = 1,
        damping_update_interval: int = 5,
        factor_warmup: int = 10,
        max_factor_dim: int = 8192,
        factor_dtype: Literal["float32", "bfloat16"] | None = None,
        inverse_dtype: Literal["float32", "bfloat16"] | None = None,
        inverse_sharding: Literal["none", "compute"] = "none",
        seed: int = 0,
        max_failures: int = 20,
        *,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "damping": damping,
            "weight_decay": weight_decay,
            "l2_reg": l2_reg,
            "adaptive_lr": adaptive_lr,
            "adaptive_momentum": adaptive_momentum,
            "max_momentum": max_momentum,
            "max_relative_update": max_relative_update,
            "norm_constraint": norm_constraint,
            "damping_algorithm": damping_algorithm,
            "damping_increase_factor": damping_increase_factor,
            "damping_decrease_factor": damping_decrease_factor,
            "min_damping": min_damping,
            "max_damping": max_damping,
            "include_damping_in_quad_change": include_damping_in_quad_change,
            "step_rejection": step_rejection,
            "rejection_increase_factor": rejection_increase_factor,
            "quad_model": quad_model,
            "factor_decay": factor_decay,
            "fisher_type": fisher_type,
            "mc_samples": mc_samples,
            "kfac_approx": kfac_approx,
            "official_empirical_scaling": official_empirical_scaling,
            "factor_update_interval": factor_update_interval,
            "inverse_update_interval": inverse_update_interval,
            "curvature_update_interval": curvature_update_interval,
            "damping_update_interval": damping_update_interval,
            "factor_warmup": factor_warmup,
            "max_factor_dim": max_factor_dim,
            "factor_dtype": factor_dtype,
            "inverse_dtype": inverse_dtype,
            "inverse_sharding": inverse_sharding,
            "seed": seed,
            "max_failures": max_failures,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_choice("inverse_sharding", group["inverse_sharding"], _SHARDING)

    @property
    def _corrected(self) -> bool:
        return True

    @property
    def _in_eigenbasis(self) -> bool:
        return True

    def _refreshed_block(self, info: BlockInfo, state: State, damping: Tensor) -> Refreshed:
        dtype = vectors.scalar_dtype(self._all_params())
        return rounded(eigen_state(info, state, dtype, corrected=True), self._inverse_dtype)
