"""Denominators of an update that are two vectors per matrix, formed while they are used."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lightning_curvature import vectors
from lightning_curvature.curvature.layer_diagonals import Diagonal, RankOne

__all__ = ["Denominator", "denominated"]

Part = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]

# Entries per thread that stay in its cache.
_BLOCK = 1 << 15


class Denominator:
    """``correction * (diagonal + damping)``, formed when and where it is needed.

    Args:
        diagonal: Diagonal of a parameter.
        correction: 0-dim tensor.
        damping: Added to the diagonal.
    """

    def __init__(self, diagonal: Diagonal, correction: Tensor, damping: float) -> None:
        self.diagonal = diagonal
        self.correction = correction
        self.damping = damping

    def whole(self, p: Tensor) -> Tensor:
        """Return all of it, in the layout of the parameter."""
        if isinstance(self.diagonal, RankOne):
            return self.part(0, len(self.diagonal.rows)).view(p.shape)
        return (self.diagonal + self.damping) * self.correction

    def part(self, start: int, stop: int) -> Tensor:
        """Return some of its rows."""
        assert isinstance(self.diagonal, RankOne)
        rows = self.diagonal.rows[start:stop, None] * self.correction
        return (rows * self.diagonal.columns).add_(self.correction * self.damping)


def denominated(
    params: list[Tensor],
    grads: list[Tensor],
    averages: list[Tensor],
    denominators: list[Denominator],
    foreach: bool | None,
) -> Iterator[Part]:
    """Cut parameters and what belongs to them as `vectors.blocks` does; denominators come last.

    Those of large matrices are formed piece by piece, so that they never leave the cache.

    Args:
        params: The parameters.
        grads: Their gradients.
        averages: Their average gradients.
        denominators: What these are divided by.
        foreach: ``False`` for one tensor at a time.
    """
    limit = _BLOCK * torch.get_num_threads()
    rest: list[tuple[Tensor, Tensor, Tensor, Denominator]] = []
    for row in zip(params, grads, averages, denominators, strict=True):
        *tensors, denominator = row
        diagonal = denominator.diagonal
        whole = foreach is False or params[0].device.type != "cpu" or tensors[0].numel() <= limit
        if whole or not isinstance(diagonal, RankOne) or not all(map(_is_plain, tensors)):
            rest.append(row)
            continue
        p, g, m = (x.detach().view(len(diagonal.rows), -1) for x in tensors)
        step = max(1, limit // p.shape[1])
        for start in range(0, len(p), step):
            stop = start + step
            part = denominator.part(start, stop)
            yield [p[start:stop]], [g[start:stop]], [m[start:stop]], [part]
    if foreach is False or not rest:
        for p, g, m, denominator in rest:
            yield [p], [g], [m], [denominator.whole(p)]
        return
    ps, gs, ms, ds = zip(*rest, strict=True)
    formed = [d.whole(p) for p, d in zip(ps, ds, strict=True)]
    for block in vectors.blocks(ps, gs, ms, formed):
        yield block[0], block[1], block[2], block[3]


def _is_plain(x: Tensor) -> bool:
    return x.is_contiguous() and type(x) in (Tensor, nn.Parameter)
