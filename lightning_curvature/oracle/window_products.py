"""Products of the Hessian with probes over the micro-batches of a window."""

from collections.abc import Sequence
from weakref import ref

import torch
from torch import Tensor

from lightning_curvature import vectors
from lightning_curvature.oracle.hidden import check_differentiable_twice
from lightning_curvature.oracle.plans import ProbePlan
from lightning_curvature.oracle.record import PassRecord

__all__ = ["WindowProducts", "graph_products"]

_Vector = list[Tensor | None]


def graph_products(
    total: Tensor,
    params: Sequence[Tensor],
    probes: Sequence[Sequence[Tensor]],
    *,
    check: bool = True,
) -> list[_Vector]:
    """Return H z for several probes on the graph of a loss, which is kept.

    Args:
        total: The loss.
        params: Parameters, all of which require a gradient.
        probes: Vectors z, one tensor per parameter.
        check: Whether to look for functions that cannot be differentiated twice, which torch
            passes over in silence.
    """
    found = torch.autograd.grad(total, params, create_graph=True, allow_unused=True)
    grads: Sequence[Tensor | None] = found
    if check:
        check_differentiable_twice(total, grads)
    # Where the loss is linear the gradient has no graph, and the product is zero.
    used = [i for i, g in enumerate(grads) if g is not None and g.requires_grad]
    outputs = [found[i] for i in used]
    products: list[_Vector] = []
    for probe in probes:
        product: _Vector = [None] * len(params)
        if outputs:
            vector = [probe[i].to(found[i].dtype) for i in used]
            product = list(
                torch.autograd.grad(outputs, params, vector, retain_graph=True, allow_unused=True)
            )
        products.append(product)
    return products


class WindowProducts:
    """Adds products up, weighted as the micro-batches are in the step.

    Args:
        params: Parameters that are trained.
        plan: Gives the probes.
    """

    def __init__(self, params: Sequence[Tensor], plan: ProbePlan) -> None:
        self.params = list(params)
        self.probes = [plan.draw(self.params, index) for index in range(plan.num_probes)]
        self._waiting: list[tuple[ref[PassRecord], list[_Vector]]] = []
        self._forget_sums()

    def _forget_sums(self) -> None:
        self._sums: list[_Vector] = [[None] * len(self.params) for _ in self.probes]

    def add(self, record: PassRecord, products: list[_Vector]) -> None:
        """Add the products of a micro-batch, one vector per probe."""
        self.fold()
        # A loss that is only looked at takes its record along, and with it these go.
        self._waiting.append((ref(record), products))

    @torch.no_grad()
    def fold(self) -> None:
        """Add up what belongs to micro-batches whose weight in the step is known by now."""
        waiting, self._waiting = self._waiting, []
        for found, products in waiting:
            record = found()
            if record is None:
                continue
            if record.loss is None:
                self._waiting.append((found, products))
                continue
            for sums, product in zip(self._sums, products, strict=True):
                for i, part in enumerate(product):
                    if part is None:
                        continue
                    # Not in place: parameters that are added up share one product.
                    weighted = part if _is_one(record.weight) else part * record.weight
                    total = sums[i]
                    sums[i] = weighted if total is None else total + weighted

    def drop_finished(self, kept: Sequence[PassRecord]) -> None:
        """Forget the micro-batches whose gradient is gone.

        Args:
            kept: Those whose gradient is not.
        """
        self._waiting = [
            (found, products)
            for found, products in self._waiting
            for record in [found()]
            if record is not None
            and (record.loss is None or any(record is other for other in kept))
        ]
        self._forget_sums()

    def cover(self, active: Sequence[Tensor]) -> bool:
        """Tell whether products were computed for all of these parameters that are trained.

        Args:
            active: The parameters.
        """
        known = {id(p) for p in self.params}
        return all(id(p) in known for p in active if p.requires_grad)

    def of(self, active: Sequence[Tensor]) -> list[tuple[list[Tensor], list[Tensor]]]:
        """Return every probe and its product, restricted to some parameters.

        Args:
            active: The parameters.
        """
        self.fold()
        places = {id(p): i for i, p in enumerate(self.params)}
        pairs = []
        for probe, sums in zip(self.probes, self._sums, strict=True):
            z, products = [], []
            for p in active:
                # What was frozen meanwhile may have an old gradient.
                i = places.get(id(p))
                z.append(_zeros(p) if i is None else probe[i])
                product = None if i is None else sums[i]
                products.append(_zeros(p) if product is None else product)
            pairs.append((z, products))
        return pairs


def _zeros(p: Tensor) -> Tensor:
    return torch.zeros_like(p, dtype=vectors.scalar_dtype([p]))


def _is_one(weight: float | Tensor) -> bool:
    return not isinstance(weight, Tensor) and weight == 1
