"""HiZOO: MeZO in a metric learnt from second differences of the loss.

Zhao, Dang, Ye, Dai, Qian and Tsang, "Second-order fine-tuning without pain for LLMs: a Hessian
informed zeroth-order optimizer", 2024, arXiv:2402.15173; official code Yanjun-Zhao/HiZOO, whose
release of February 2025 is followed, not that of 2024 (which multiplied where this divides) nor the
text (whose estimate has a further term). Where it differs:

- H is float32 for half-precision parameters. In float16 the published settings never change it;
- second differences are sums of two differences of losses, in float64;
- three passes per step, not four;
- ``normalized``, ``hess_clip`` and several directions per step are ours.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_curvature.checks import check_in_range, check_positive
from lightning_curvature.curvature.perturbation import Distribution, Piece
from lightning_curvature.optim.displacement import Point
from lightning_curvature.optim.zeroth_arguments import Blockwise, ModelMode
from lightning_curvature.optim.zeroth_gradient import decay_, step_
from lightning_curvature.optim.zeroth_order import ZerothOrderOptimizer
from lightning_curvature.optim.zeroth_passes import Passes
from lightning_curvature.optim.zeroth_storage import HalfPrecision, Restore

__all__ = ["HiZOO"]

# Far outside of all that is sensible, and far inside of what float32 can square.
_LEAST, _LARGEST = 1e-18, 1e18


class HiZOO(ZerothOrderOptimizer):
    r"""MeZO in a metric H learnt from second differences of the loss; forward passes only.

    .. math::
        u &= z / \sqrt{H}, \qquad
        g = \frac{L(\theta + \epsilon u) - L(\theta - \epsilon u)}{2 \epsilon} \\
        s &= \frac{|L(\theta + \epsilon u) + L(\theta - \epsilon u) - 2 L(\theta)|}{2 \epsilon^2},
        \qquad H \leftarrow (1 - \alpha) H + \alpha\, s\, H z^2 \\
        \theta &\leftarrow \theta - \eta\,(g z / \sqrt{H} + \lambda \theta)

    Coordinates along which the loss bends more are perturbed and moved less. H starts at 1. Where
    curvatures differ a lot it overtakes `MeZO` after thousands of passes; before, and where they do
    not, it is MeZO at one and a half times the cost.

    On a quadratic with d parameters H tends to (d + 2) / 2 times the diagonal of the Hessian, so
    steps get shorter while it grows; ``normalized=True`` takes that factor out.

    Cost per step: three forward passes, and three draws of a direction.
    Memory: one copy of the parameters, in float32 for half precision.

    Args:
        params: Parameters to optimize, or parameter groups. Groups with ``first_order=True`` get
            true gradients by a backward, see `MeZO`.
        lr: Learning rate, >= 0. Groups may differ in it and in ``weight_decay``.
        hessian_smoothing: Weight alpha of a new estimate in H, in [0, 1); 0 is MeZO. Below 3e-8 H
            can only grow in float32.
        perturbation_scale: Length epsilon of a displacement, per coordinate in the metric; > 0. The
            second difference needs a larger one than the slope.
        num_samples: Directions per step, >= 1, whose estimates are averaged.
        weight_decay: Weight decay, >= 0.
        normalized: Whether estimates of H are multiplied by 2 / (d + 2), so that H tends to the
            diagonal itself. With it, ``hessian_smoothing`` must be large enough to forget 1.
        hess_clip: Least and largest value of H; None for no limits.
        distribution: Of the directions: "normal"; "rademacher", random signs, which tell nothing
            about single coordinates; "sphere", normal numbers scaled to the norm that they have on
            average.
        restore: How parameters come back: "fused", "inplace" or "snapshot", see `MeZO`.
        half_precision: How updates of bfloat16 and float16 parameters are kept: "stochastic" rounds
            them at random; "master" keeps float32 copies; "nearest" loses most of them.
        model_mode: "train" leaves dropout on, with the same masks in all passes of a step; "eval"
            evaluates in eval mode.
        blockwise: Whether parameter groups are perturbed one after the other: "none", "coordinate"
            or "joint", see `MeZO`.
        max_projected_grad: Largest absolute value of a slope, > 0; None for no limit.
        seed: Seed of the directions, >= 0. All ranks must have the same.
        max_failures: Losses in a row that are not finite after which training stops with an error.
        foreach: False to work on one tensor at a time; otherwise small ones are worked on together.
        maximize: Whether to climb.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> import torch
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = HiZOO(model.parameters(), lr=1e-2)
        >>> loss_fn = optimizer.attach_model(model, torch.nn.functional.cross_entropy)
        >>> x, y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
        >>> loss = optimizer.step(lambda: loss_fn(model(x), y))
        >>> sorted(optimizer.stats)
        ['curvature', 'loss', 'lr', 'projected_grad', 'skipped_steps']

    References:
        Zhao et al., 2024, arXiv:2402.15173, Algorithm 1.
    """

    state_names: ClassVar[tuple[str, ...]] = ("hess_diag",)

    def __init__(
        self,
        params: Any,
        lr: float = 1e-6,
        hessian_smoothing: float = 1e-6,
        perturbation_scale: float = 1e-3,
        num_samples: int = 1,
        weight_decay: float = 0.0,
        normalized: bool = False,
        hess_clip: tuple[float, float] | None = None,
        distribution: Distribution = "normal",
        restore: Restore = "fused",
        half_precision: HalfPrecision = "stochastic",
        model_mode: ModelMode = "train",
        blockwise: Blockwise = "none",
        max_projected_grad: float | None = None,
        seed: int = 0,
        max_failures: int = 10,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "hessian_smoothing": hessian_smoothing,
            "perturbation_scale": perturbation_scale,
            "num_samples": num_samples,
            "weight_decay": weight_decay,
            "normalized": normalized,
            "hess_clip": hess_clip,
            "distribution": distribution,
            "restore": restore,
            "half_precision": half_precision,
            "model_mode": model_mode,
            "blockwise": blockwise,
            "max_projected_grad": max_projected_grad,
            "seed": seed,
            "max_failures": max_failures,
            "foreach": foreach,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_in_range("hessian_smoothing", group["hessian_smoothing"], 0, 1)
        clip = group["hess_clip"]
        if clip is not None:
            for number, limit in enumerate(clip):
                check_positive(f"hess_clip[{number}]", limit)
            if len(clip) != 2 or clip[0] > clip[1]:  # noqa: PLR2004
                raise ValueError(
                    f"Invalid hess_clip={clip!r}: must be two numbers, the smaller one first."
                )

    # Looking at the loss

    def _visit(self, passes: Passes, block: int) -> list[Tensor]:
        length = float(self.param_groups[0]["perturbation_scale"])
        samples = range(int(self.param_groups[0]["num_samples"]))
        sides = [Point(s, side, block) for s in samples for side in (length, -length)]
        return [self._loss_at(passes, point) for point in (None, *sides)]

    def _read(self, averages: Tensor) -> tuple[Tensor, Tensor]:
        length = float(self.param_groups[0]["perturbation_scale"])
        loss = averages[0]
        above, below = averages[1:].view(-1, 2).unbind(1)
        slopes = (above - below) / (2 * length)
        bends = self._second_difference(loss, above, below).abs() / (2 * length**2)
        return torch.stack([self._limited(slopes), bends], dim=1), loss

    def _second_difference(self, loss: Tensor, above: Tensor, below: Tensor) -> Tensor:
        # Differences of nearly equal numbers are exact; their sum is not rounded like the losses.
        return (above - loss) + (below - loss)

    # The metric

    def _prepare(self, passes: Passes) -> None:
        super()._prepare(passes)
        for p in self.directions.params:
            self._state_of(p, "hess_diag", 1.0)

    def _hess(self, piece: Piece) -> list[Tensor]:
        """Return the part of H that belongs to a piece."""
        return self._state(piece, "hess_diag")[0]

    def _displacing(self, piece: Piece) -> list[Tensor]:
        return list(torch._foreach_div(piece.noise, torch._foreach_sqrt(self._hess(piece))))

    def _update_piece(
        self,
        group: dict[str, Any],
        pieces: Sequence[Piece],
        values: list[Tensor],
        answer: Tensor,
        on: float | Tensor,
    ) -> None:
        self._learn(pieces, answer, on)
        super()._update_piece(group, pieces, values, answer, on)

    def _learn(self, pieces: Sequence[Piece], answer: Tensor, on: float | Tensor) -> None:
        """Average new estimates into a part of H: H <- H (1 + alpha (s z^2 - 1))."""
        smoothing = float(self.param_groups[0]["hessian_smoothing"])
        if smoothing == 0:
            return
        hess = self._hess(pieces[0])
        torch._foreach_mul_(hess, self._growth(pieces, answer, smoothing, on))
        low, high = self._limits()
        torch._foreach_clamp_min_(hess, low)
        torch._foreach_clamp_max_(hess, high)

    def _limits(self) -> tuple[float, float]:
        low, high = self.param_groups[0]["hess_clip"] or (_LEAST, _LARGEST)
        return float(low), float(high)

    def _growth(
        self, pieces: Sequence[Piece], answer: Tensor, smoothing: float, on: float | Tensor
    ) -> list[Tensor]:
        """Return 1 + alpha (s z^2 - 1), s z^2 averaged over the directions."""
        growth = torch._foreach_mul(pieces[0].noise, pieces[0].noise)
        bends = self._numbers(answer[:, 1] * (smoothing * self._share() / len(answer)) * on)
        torch._foreach_mul_(growth, bends[0])
        for piece, bend in zip(pieces[1:], bends[1:], strict=True):
            squares = torch._foreach_mul(piece.noise, piece.noise)
            torch._foreach_add_(growth, torch._foreach_mul(squares, bend))
        rest = 1 - smoothing * on
        # One tensor for all would be read as a number, which waits for the device.
        torch._foreach_add_(growth, [rest] * len(growth) if isinstance(rest, Tensor) else rest)
        return list(growth)

    def _share(self) -> float:
        """Return what estimates of H are multiplied by."""
        if not self.param_groups[0]["normalized"]:
            return 1.0
        return 2.0 / (self._present().dimension + 2)

    def _estimate(self, pieces: Sequence[Piece], answer: Tensor) -> list[Tensor]:
        """Return slope times direction, in the new metric."""
        estimate = super()._estimate(pieces, answer)
        torch._foreach_div_(estimate, torch._foreach_sqrt(self._hess(pieces[0])))
        return estimate

    def _rule(
        self,
        group: dict[str, Any],
        piece: Piece,
        values: list[Tensor],
        estimate: list[Tensor],
        on: float | Tensor,
    ) -> None:
        decay_(estimate, values, group)
        step_(values, estimate, float(group["lr"]), on)

    def _finish(self, answer: Tensor, loss: Tensor, finite: Tensor) -> None:
        self.stats = {**self.stats, "curvature": 2 * answer[:, 1].mean()}
        super()._finish(answer, loss, finite)
