"""What the micro-batches of a window have sampled so far."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_curvature import vectors
from lightning_curvature.oracle.plans import SamplePlan
from lightning_curvature.oracle.record import PassRecord
from lightning_curvature.oracle.sampling import Sample

__all__ = ["WindowSamples"]


class WindowSamples:
    """Adds the samples of a window up, holding one set of gradients besides the sum.

    Attributes:
        count: Number of micro-batches seen.
    """

    def __init__(self) -> None:
        self.count = 0
        self._last: PassRecord | None = None
        self._waiting: list[tuple[PassRecord, Sample]] = []
        self._sums: list[Tensor | None] = []
        self._mass: list[Tensor] = []
        self._squared_mass: list[Tensor] = []

    def index(self, record: PassRecord) -> int:
        """Return the number of a micro-batch in its window.

        Args:
            record: The one that is observed now.
        """
        if record is not self._last:
            self._last = record
            self.count += 1
        return self.count - 1

    def add(self, record: PassRecord, sample: Sample) -> None:
        """Add a sample of a micro-batch."""
        self._waiting.append((record, sample))

    def drop_finished(self) -> None:
        """Forget the micro-batches whose gradient is gone."""
        waiting = [(record, sample) for record, sample in self._waiting if record.loss is None]
        self.__init__()  # type: ignore[misc]
        self._waiting = waiting

    def fold(self, plan: SamplePlan) -> None:
        """Add up what belongs to micro-batches whose weight in the step is known by now.

        Args:
            plan: How.
        """
        finished = [(r, s) for r, s in self._waiting if r.loss is not None]
        self._waiting = [(r, s) for r, s in self._waiting if r.loss is None]
        for record, sample in finished:
            self._fold_one(plan, sample, record.weight)

    @torch.no_grad()
    def _fold_one(self, plan: SamplePlan, sample: Sample, weight: float | Tensor) -> None:
        weight = torch.as_tensor(weight, dtype=sample.mass.dtype, device=sample.mass.device)
        weight = weight.clamp_min(0.0)
        factor = weight.sqrt()
        squared = plan.squared == "micro_batch"
        if squared:
            factor = factor * _clip_factor(
                [g for g in sample.grads if g is not None],
                sample.mass,
                sample.squared_mass,
                plan.clip_norm,
            )
        else:
            self._mass.append(weight * sample.mass)
            self._squared_mass.append(weight.square() * sample.squared_mass)
        if not self._sums:
            self._sums = [None] * len(sample.grads)
        for i, grad in enumerate(sample.grads):
            if grad is None:
                continue
            scaled = grad.to(vectors.scalar_dtype([grad])) * factor
            value = scaled.square_() if squared else scaled
            total = self._sums[i]
            self._sums[i] = value if total is None else total.add_(value)

    def squares(
        self,
        plan: SamplePlan,
        params: Sequence[Tensor],
        active: Sequence[Tensor],
        mean: Callable[..., list[list[Tensor]]],
        ranks: int,
    ) -> list[Tensor]:
        """Return the estimate for the window, averaged over the ranks.

        Args:
            plan: How.
            params: All parameters.
            active: Those wanted.
            mean: Averages lists of tensors over the ranks.
            ranks: Their number.
        """
        found = {id(p): x for p, x in zip(params, self._sums, strict=False) if x is not None}
        sums = [
            found.get(id(p), torch.zeros_like(p, dtype=vectors.scalar_dtype([p]))) for p in active
        ]
        if plan.squared == "micro_batch":
            return mean(sums)[0]
        zero = torch.zeros((), dtype=vectors.scalar_dtype(params), device=params[0].device)
        masses = torch.stack(
            [torch.stack([zero, *x]).sum() for x in (self._mass, self._squared_mass)]
        )
        sums, (masses,) = mean(sums, [masses])
        # One window over all ranks: every gradient counts by the root of its share.
        sums = [x * ranks**0.5 for x in sums]
        factor = _clip_factor(sums, masses[0], masses[1] / ranks, plan.clip_norm)
        return [(x * factor).square_() for x in sums]


def _clip_factor(
    grads: Sequence[Tensor], mass: Tensor, squared_mass: Tensor, limit: float | None
) -> Tensor:
    """Return what brings the gradient of the mean loss down to a norm, as torch's clipping does."""
    if limit is None or not grads:
        return torch.ones_like(mass)
    # The gradient of the mean is g times the root of the weight of one example.
    size = vectors.norm(grads) * (squared_mass / mass).sqrt()
    return (limit / (size + 1e-6)).clamp_max(1.0).nan_to_num(1.0)
