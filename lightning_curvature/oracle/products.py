"""Gradients and Hessian-vector products of recorded passes, on this rank."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_curvature import vectors
from lightning_curvature.oracle.directional import hessian_product
from lightning_curvature.oracle.record import PassRecord
from lightning_curvature.oracle.replay import Replay, eager

__all__ = ["difference_product", "exact_product", "gradients"]

Vector = Sequence[Tensor]

# Length of a central difference of gradients relative to the parameters: the third derivative
# and round-off balance near the cube root of the machine precision.
_LENGTHS = {torch.float32: 2e-3, torch.float64: 1e-5}
# A model near zero has no scale of its own.
_MIN_PARAMETER_NORM = 1e-2


def gradients(replay: Replay, records: Sequence[PassRecord], params: Vector) -> list[Tensor]:
    """Return the gradient at the present parameters; one forward and backward per micro-batch.

    Args:
        replay: Runs passes again.
        records: Micro-batches of the window.
        params: Parameters to differentiate with respect to.
    """
    sums = [torch.zeros_like(p) for p in params]
    trained = _trained(params)
    for record in records:
        with torch.enable_grad(), eager(), replay.running(record) as total:
            if not (total.requires_grad and trained):
                continue
            found = torch.autograd.grad(total, [params[i] for i in trained], allow_unused=True)
        _accumulate([sums[i] for i in trained], found, record.weight)
    return sums


def exact_product(
    replay: Replay, records: Sequence[PassRecord], params: Vector, direction: Vector
) -> list[Tensor]:
    """Return H d by double backward.

    Args:
        replay: Runs passes again.
        records: Micro-batches of the window.
        params: Parameters that have a component in ``direction``.
        direction: The direction d, one tensor per parameter.
    """
    sums = [torch.zeros_like(p) for p in params]
    trained = _trained(params)
    for record in records if trained else ():
        _, parts = hessian_product(
            replay, record, [params[i] for i in trained], [direction[i] for i in trained]
        )
        _accumulate([sums[i] for i in trained], parts, record.weight)
    return sums


def _trained(params: Vector) -> list[int]:
    """Number the parameters that are not frozen; those that are may have an old gradient."""
    return [i for i, p in enumerate(params) if p.requires_grad]


def _accumulate(sums: list[Tensor], parts: Sequence[Tensor | None], weight: float | Tensor) -> None:
    with torch.no_grad():
        for total, part in zip(sums, parts, strict=True):
            if part is not None:
                total.add_(part * weight)


@torch.no_grad()
def difference_product(
    replay: Replay, records: Sequence[PassRecord], params: Vector, direction: Vector
) -> list[Tensor]:
    """Return H d as a central difference of gradients; two forwards and backwards.

    The parameters move for a while and are put back bit for bit, whatever happens.

    Args:
        replay: Runs passes again.
        records: Micro-batches of the window.
        params: Parameters that have a component in ``direction``.
        direction: The direction d, one tensor per parameter.
    """
    length = vectors.norm(params).clamp_min(_MIN_PARAMETER_NORM)
    # The coarsest parameters must still move.
    eps = max(_LENGTHS.get(p.dtype, max(_LENGTHS.values())) for p in params) * length
    eps = eps / vectors.norm(direction).clamp_min(torch.finfo(eps.dtype).tiny)
    saved = vectors.clone(params)
    try:
        vectors.add_scaled_(params, direction, eps)
        ahead = gradients(replay, records, params)
        vectors.copy_(params, saved)
        vectors.add_scaled_(params, direction, -eps)
        behind = gradients(replay, records, params)
    finally:
        vectors.copy_(params, saved)
    torch._foreach_sub_(ahead, behind)
    vectors.scale_(ahead, 0.5 / eps)
    return ahead
