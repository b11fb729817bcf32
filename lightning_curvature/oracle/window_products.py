"""Products of the Hessian with probes over the micro-batches of a window."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_curvature.oracle.plans import ProbePlan
from lightning_curvature.oracle.record import PassRecord

__all__ = ["WindowProducts", "graph_products"]

_Vector = list[Tensor | None]


def graph_products(
    total: Tensor, params: Sequence[Tensor], probes: Sequence[Sequence[Tensor]]
) -> list[_Vector]:
    """Return H z for several probes on the graph of a loss, which is kept.

    Args:
        total: The loss.
        params: Parameters, all of which require a gradient.
        probes: Vectors z, one tensor per parameter.
    """
    found = torch.autograd.grad(total, params, create_graph=True, allow_unused=True)
    grads: Sequence[Tensor | None] = found
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
        self._waiting: list[tuple[PassRecord, list[_Vector]]] = []
        self._sums: list[_Vector] = [[None] * len(self.params) for _ in self.probes]

    def add(self, record: PassRecord, products: list[_Vector]) -> None:
        """Add the products of a micro-batch, one vector per probe."""
        self.fold()
        self._waiting.append((record, products))

    @torch.no_grad()
    def fold(self) -> None:
        """Add up what belongs to micro-batches whose weight in the step is known by now."""
        finished = [(r, found) for r, found in self._waiting if r.loss is not None]
        self._waiting = [(r, found) for r, found in self._waiting if r.loss is None]
        for record, products in finished:
            for sums, product in zip(self._sums, products, strict=True):
                for i, part in enumerate(product):
                    if part is None:
                        continue
                    # The product is ours: no copies.
                    weighted = part if _is_one(record.weight) else part.mul_(record.weight)
                    total = sums[i]
                    sums[i] = weighted if total is None else total.add_(weighted)

    def drop_finished(self) -> None:
        """Forget the micro-batches whose gradient is gone."""
        self._waiting = [(r, found) for r, found in self._waiting if r.loss is None]
        self._sums = [[None] * len(self.params) for _ in self.probes]

    def of(self, active: Sequence[Tensor]) -> list[tuple[list[Tensor], list[Tensor]]]:
        """Return every probe and its product, restricted to some parameters.

        Args:
            active: The parameters.
        """
        self.fold()
        places = {id(p): i for i, p in enumerate(self.params)}
        pairs = []
        for probe, sums in zip(self.probes, self._sums, strict=True):
            chosen = [(probe[places[id(p)]], sums[places[id(p)]]) for p in active]
            z = [x for x, _ in chosen]
            pairs.append((z, [torch.zeros_like(x) if h is None else h for x, h in chosen]))
        return pairs


def _is_one(weight: float | Tensor) -> bool:
    return not isinstance(weight, Tensor) and weight == 1
