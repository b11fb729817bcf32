"""What the micro-batches of a window have sampled so far."""

from collections.abc import Callable, Sequence
from weakref import ref

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
        count: Number of samples drawn.
    """

    def __init__(self) -> None:
        self.count = 0
        self._waiting: list[tuple[ref[PassRecord], Sample]] = []
        self._forget_sums()

    def _forget_sums(self) -> None:
        # Sums of squares, or the two vectors that are multiplied with each other in the end.
        self._sums: list[Tensor | None] = []
        self._partners: list[Tensor | None] | None = None
        self._mass: list[Tensor] = []
        self._squared_mass: list[Tensor] = []

    def index(self) -> int:
        """Return the number of the sample that is drawn next; every one has its own."""
        self.count += 1
        return self.count - 1

    def add(self, record: PassRecord, sample: Sample) -> None:
        """Add a sample of a micro-batch."""
        # A loss that is only looked at takes its record along, and with it the sample goes.
        self._waiting.append((ref(record), sample))

    def drop_finished(self, kept: Sequence[PassRecord]) -> None:
        """Forget the micro-batches whose gradient is gone.

        Args:
            kept: Those whose gradient is not.
        """
        self._waiting = [
            (found, sample)
            for found, sample in self._waiting
            if _is_unfinished(found()) or any(found() is record for record in kept)
        ]
        self._forget_sums()

    def fold(self, plan: SamplePlan) -> None:
        """Add up what belongs to micro-batches whose weight in the step is known by now.

        Args:
            plan: How.
        """
        waiting, self._waiting = self._waiting, []
        for found, sample in waiting:
            record = found()
            if _is_unfinished(record):
                self._waiting.append((found, sample))
            elif record is not None:
                self._fold_one(plan, sample, record.weight)

    @torch.no_grad()
    def _fold_one(self, plan: SamplePlan, sample: Sample, weight: float | Tensor) -> None:
        weight = torch.as_tensor(weight, dtype=sample.mass.dtype, device=sample.mass.device)
        weight = weight.clamp_min(0.0)
        factor = weight.sqrt()
        squared = plan.squared == "micro_batch"
        if squared:
            factor = factor * _clip_factor(
                sample.grads,
                sample.partners,
                sample.mass,
                sample.squared_mass,
                plan.clip_norm,
            )
        else:
            self._mass.append(weight * sample.mass)
            self._squared_mass.append(weight.square() * sample.squared_mass)
        grads = _scaled(sample.grads, factor)
        partners = grads if sample.partners is None else _scaled(sample.partners, factor)
        if squared:
            pairs = zip(grads, partners, strict=True)
            self._sums = _added(self._sums, [_multiplied(g, h) for g, h in pairs])
            return
        if self._partners is not None or partners is not grads:
            self._partners = _added(
                self._sums if self._partners is None else self._partners, partners
            )
        self._sums = _added(self._sums, grads)

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
        sums = _of(self._sums, params, active)
        if plan.squared == "micro_batch":
            return mean(sums)[0]
        # Another rank may have other losses: what is sent must not depend on them.
        partners = sums if self._partners is None else _of(self._partners, params, active)
        zero = torch.zeros((), dtype=vectors.scalar_dtype(params), device=params[0].device)
        masses = torch.stack(
            [torch.stack([zero, *x]).sum() for x in (self._mass, self._squared_mass)]
        )
        sums, partners, (masses,) = mean(sums, partners, [masses])
        # One window over all ranks: every gradient counts by the root of its share.
        sums, partners = ([x * ranks**0.5 for x in xs] for xs in (sums, partners))
        factor = _clip_factor(sums, partners, masses[0], masses[1] / ranks, plan.clip_norm)
        return [(x * factor).mul_(y * factor) for x, y in zip(sums, partners, strict=True)]


def _is_unfinished(record: PassRecord | None) -> bool:
    return record is not None and record.loss is None


def _scaled(grads: Sequence[Tensor | None], factor: Tensor) -> list[Tensor | None]:
    return [None if g is None else g.to(vectors.scalar_dtype([g])) * factor for g in grads]


def _multiplied(grad: Tensor | None, partner: Tensor | None) -> Tensor | None:
    return None if grad is None or partner is None else grad * partner


def _added(totals: Sequence[Tensor | None], values: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return the sums of two vectors of which parts may be missing."""
    if not totals:
        return list(values)
    return [
        (total if value is None else value) if total is None or value is None else total + value
        for total, value in zip(totals, values, strict=True)
    ]


def _of(
    sums: Sequence[Tensor | None], params: Sequence[Tensor], active: Sequence[Tensor]
) -> list[Tensor]:
    """Return the parts of some parameters, zeros where nothing was found."""
    found = {id(p): x for p, x in zip(params, sums, strict=False) if x is not None}
    return [
        found[id(p)] if id(p) in found else torch.zeros_like(p, dtype=vectors.scalar_dtype([p]))
        for p in active
    ]


def _clip_factor(
    grads: Sequence[Tensor | None],
    partners: Sequence[Tensor | None] | None,
    mass: Tensor,
    squared_mass: Tensor,
    limit: float | None,
) -> Tensor:
    """Return what brings the gradient of the mean loss down to a norm, as torch's clipping does."""
    present = [g for g in grads if g is not None]
    if limit is None or not present:
        return torch.ones_like(mass)
    others = [g for g in partners or grads if g is not None]
    norm = (vectors.norm(present) * vectors.norm(others)).sqrt()
    # The gradient of the mean is g times the root of the weight of one example.
    size = norm * (squared_mass / mass).sqrt()
    return (limit / (size + 1e-6)).clamp_max(1.0).nan_to_num(1.0)
