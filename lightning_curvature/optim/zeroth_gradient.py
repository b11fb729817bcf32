"""Base of the zeroth-order optimizers that treat slope times direction as a gradient.

Three estimators of the slope, of arXiv:2305.17333 (Algorithms 1 and 2, appendix B) and 2402.11592:
two-sided, (l+ - l-) / (2 eps); one-sided, (l+ - l0) / eps; and residual, which compares l+ with
that of the step before and needs one pass. Layers may be perturbed in proportion (appendix B.3).
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_curvature.curvature.perturbation import Piece
from lightning_curvature.optim.displacement import Point
from lightning_curvature.optim.zeroth_order import ZerothOrderOptimizer
from lightning_curvature.optim.zeroth_passes import Passes
from lightning_curvature.vectors import scalar_dtype

__all__ = ["ZerothGradientOptimizer", "decay_", "step_"]

_INTERVAL = "layer_scale_update_interval"
# Of directions that are not for the step itself.
_SCALE_SAMPLE = -1
_TINY = 1e-12


class ZerothGradientOptimizer(ZerothOrderOptimizer):
    """Base of the zeroth-order optimizers with the update of a first-order method.

    Args:
        params: Parameters or parameter groups.
        defaults: Hyper-parameters.
    """

    state_names: ClassVar[tuple[str, ...]] = ()

    # The slope

    def _first_point(self) -> Point | None:
        group = self.param_groups[0]
        if group["estimator"] == "one_sided" or self._scales_are_due():
            return None
        return Point(0, self._length())

    def _length(self) -> float:
        return float(self.param_groups[0]["perturbation_scale"])

    def _visit(self, passes: Passes, block: int) -> list[Tensor]:
        group, length = self.param_groups[0], self._length()
        samples = range(int(group["num_samples"]))
        if group["estimator"] == "two_sided":
            signed = [(sample, sign) for sample in samples for sign in (length, -length)]
            return [self._loss_at(passes, Point(*point, block)) for point in signed]
        above = [Point(sample, length, block) for sample in samples]
        if group["estimator"] == "residual":
            return [self._loss_at(passes, point) for point in above]
        return [self._loss_at(passes, point) for point in (None, *above)]

    def _read(self, averages: Tensor) -> tuple[Tensor, Tensor]:
        group, length = self.param_groups[0], self._length()
        if group["estimator"] == "two_sided":
            above, below = averages.view(-1, 2).unbind(1)
            slopes, loss = (above - below) / (2 * length), averages.mean()
        elif group["estimator"] == "one_sided":
            slopes, loss = (averages[1:] - averages[0]) / length, averages[0]
        else:
            loss = averages[0]
            before = self._scalars.get("previous_loss", loss).to(averages)
            slopes = (averages - before) / length
            # A loss that is not finite is not compared with, either.
            self._scalars["previous_loss"] = torch.where(loss.isfinite(), loss, before)
        return self._limited(slopes).unsqueeze(1), loss

    # Scales of layers

    def _scales_are_due(self) -> bool:
        scaled = self.param_groups[0].get("layer_scale", "none") != "none"
        return scaled and self._due(_INTERVAL)

    def _prepare(self, passes: Passes) -> None:
        super()._prepare(passes)
        if not self._scales_are_due():
            return
        params = self.directions.params
        if self.param_groups[0]["layer_scale"] == "parameter_norm":
            dtype = scalar_dtype(params)
            norms = torch.stack([torch.linalg.vector_norm(p.detach(), dtype=dtype) for p in params])
        else:
            norms = self._gradient_norms(passes)
        entries = [self.directions.shape(i).numel() for i in range(len(params))]
        sizes = torch.tensor(entries, dtype=norms.dtype, device=norms.device)
        # Factors that leave the mean square of all entries of the perturbation as it is.
        norms = norms.clamp_min(norms.max() * 1e-3).clamp_min(_TINY)
        factors = ((sizes / norms.square()).sum() / sizes.sum()).rsqrt() / norms
        for p, factor in zip(params, factors, strict=True):
            self.state[p]["layer_scale"] = factor.clone()

    def _gradient_norms(self, passes: Passes) -> Tensor:
        """Estimate the norm of the gradient of each tensor from a perturbation of it alone."""
        moving, length = self._begin(), self._length()
        # Old scales would be measured along with the gradient.
        for p in moving.directions.params:
            self.state[p].pop("layer_scale", None)
        blocks, moving.blocks = moving.blocks, [[i] for i in range(len(moving.directions.params))]
        losses = []
        try:
            for block in range(len(moving.blocks)):
                for sign in (length, -length):
                    moving.go(Point(_SCALE_SAMPLE, sign, block))
                    losses.append(passes.loss())
        finally:
            moving.home()
            moving.blocks = blocks

        def read(averages: Tensor) -> tuple[Tensor, Tensor]:
            above, below = averages.view(-1, 2).unbind(1)
            return ((above - below) / (2 * length)).abs(), averages.mean()

        return passes.settle(losses, read)[0].nan_to_num(0.0, posinf=0.0)

    def _displacing(self, piece: Piece) -> list[Tensor]:
        factors = self._factors(piece)
        return piece.noise if factors is None else list(torch._foreach_mul(piece.noise, factors))

    def _estimate(self, pieces: Sequence[Piece], answer: Tensor) -> list[Tensor]:
        """Return slope times direction; along a scaled one, what has the same mean."""
        estimate = super()._estimate(pieces, answer)
        factors = self._factors(pieces[0])
        if factors is not None:
            torch._foreach_div_(estimate, factors)
        return estimate

    def _factors(self, piece: Piece) -> list[Tensor] | None:
        if self.param_groups[0].get("layer_scale", "none") == "none":
            return None
        states = [self.state[p] for p in self._params_of(piece)]
        if not all("layer_scale" in state for state in states):
            return None  # while the scales themselves are measured
        return [
            state["layer_scale"].to(noise.dtype)
            for state, noise in zip(states, piece.noise, strict=True)
        ]


def decay_(estimate: list[Tensor], values: list[Tensor], group: dict[str, Any]) -> None:
    """Add ``weight_decay * values`` to an estimate of the gradient in place.

    Args:
        estimate: The estimate.
        values: The values that it is of.
        group: Their group.
    """
    if group["weight_decay"] != 0:
        torch._foreach_add_(estimate, values, alpha=float(group["weight_decay"]))


def step_(values: list[Tensor], updates: list[Tensor], lr: float, on: float | Tensor) -> None:
    """Subtract ``lr * updates`` from values in place.

    Args:
        values: Values to change.
        updates: Updates.
        lr: Learning rate.
        on: 1, or a tensor that is 0 where nothing may change.
    """
    if isinstance(on, Tensor):
        updates = list(torch._foreach_mul(updates, on.to(updates[0].dtype)))
    torch._foreach_add_(values, updates, alpha=-lr)
