"""HiZOOL: HiZOO whose metric is a row and a column per matrix.

HiZOO-L of arXiv:2402.15173, of which no code was published: this is our reading. For a matrix of m
rows and n columns H_ij = r_i c_j / mean(r); averages of the rows and of the columns of a new
estimate are averaged into r and c, as Adafactor does. Vectors keep all of H; tensors with more axes
are matrices of their first axis and the rest.
"""

from collections.abc import Sequence
from contextlib import closing
from typing import ClassVar

import torch
from torch import Tensor

from lightning_curvature.curvature.perturbation import Piece
from lightning_curvature.optim.displacement import Displacement
from lightning_curvature.optim.hizoo import HiZOO
from lightning_curvature.optim.zeroth_passes import Passes

__all__ = ["HiZOOL"]

_MATRIX_AXES = 2


class HiZOOL(HiZOO):
    r"""HiZOO in the memory of MeZO: its metric is a row and a column per matrix.

    .. math::
        H_{ij} = r_i c_j / \bar r, \qquad
        r \leftarrow (1 - \alpha) r + \alpha\, \mathrm{mean}_j (s H z^2), \quad
        c \leftarrow (1 - \alpha) c + \alpha\, \mathrm{mean}_i (s H z^2)

    Use it like `HiZOO`, of which it is an approximation, exact where the Hessian's diagonal has
    rank one, for models whose size is the limit.

    Cost per step: three forward passes, and four draws of a direction.
    Memory: a row and a column per matrix, in float32.

    See `HiZOO` for the arguments.

    Examples:
        >>> import torch
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = HiZOOL(model.parameters(), lr=1e-2)
        >>> loss_fn = optimizer.attach_model(model, torch.nn.functional.cross_entropy)
        >>> x, y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
        >>> loss = optimizer.step(lambda: loss_fn(model(x), y))
        >>> sorted((name, tuple(x.shape)) for name, x in optimizer.state[model.weight].items())
        [('hess_cols', (3,)), ('hess_rows', (2,))]

    References:
        Zhao et al., 2024, arXiv:2402.15173, section on HiZOO-L.
    """

    state_names: ClassVar[tuple[str, ...]] = ()

    def _is_factored(self, p: Tensor) -> bool:
        return p.ndim >= _MATRIX_AXES and "mask" not in self.state[p]

    def _prepare(self, passes: Passes) -> None:
        for p in self.directions.params:
            if not self._is_factored(p):
                self._state_of(p, "hess_diag", 1.0)
            elif "hess_rows" not in self.state[p]:
                dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
                rows, columns = p.shape[0], p.numel() // max(p.shape[0], 1)
                self.state[p]["hess_rows"] = torch.ones(rows, dtype=dtype, device=p.device)
                self.state[p]["hess_cols"] = torch.ones(columns, dtype=dtype, device=p.device)

    def _hess(self, piece: Piece) -> list[Tensor]:
        found = []
        for i, p in enumerate(self._params_of(piece)):
            state = self.state[p]
            if self._is_factored(p):
                rows, columns = _cells(piece, p)
                r, c = state["hess_rows"], state["hess_cols"]
                cells = (r / r.mean())[rows] * c[columns]
                found.append(cells.view(piece.noise[i].shape))
            else:
                found.append(piece.of([state["hess_diag"]])[0])
        return found

    def _update_block(
        self, moving: Displacement, block: int, answer: Tensor, on: float | Tensor
    ) -> None:
        smoothing = float(self.param_groups[0]["hessian_smoothing"])
        if smoothing > 0:
            # The update divides by the new H, all of which must be known before.
            members = list(moving.blocks[block])
            sums: dict[Tensor, tuple[Tensor, Tensor]] = {}
            with closing(moving.returning(len(answer), members, block)) as visited:
                for pieces in visited:
                    self._add(pieces, answer, smoothing, on, sums)
            moving.blocks[block] = members
            low, high = self._limits()
            for p, (rows, columns) in sums.items():
                state = self.state[p]
                state["hess_rows"].copy_(rows / len(columns)).clamp_(low, high)
                state["hess_cols"].copy_(columns / len(rows)).clamp_(low, high)
        super()._update_block(moving, block, answer, on)

    def _add(
        self,
        pieces: Sequence[Piece],
        answer: Tensor,
        smoothing: float,
        on: float | Tensor,
        sums: dict[Tensor, tuple[Tensor, Tensor]],
    ) -> None:
        """Add what a piece contributes to the sums of the new H over columns and over rows."""
        old = self._hess(pieces[0])
        growth = self._growth(pieces, answer, smoothing, on)
        for p, hess, factor in zip(self._params_of(pieces[0]), old, growth, strict=True):
            if not self._is_factored(p):
                hess.mul_(factor).clamp_(*self._limits())
                continue
            state = self.state[p]
            if p not in sums:
                # Averages over what stays are r itself and c: H has their means.
                sums[p] = (
                    torch.zeros_like(state["hess_rows"]),
                    torch.zeros_like(state["hess_cols"]),
                )
            rows, columns = _cells(pieces[0], p)
            new = (hess * factor).view(-1)
            by_row, by_column = sums[p]
            by_row.index_add_(0, rows.expand(new.shape), new)
            by_column.index_add_(0, columns.expand(new.shape), new)

    def _learn(self, pieces: Sequence[Piece], answer: Tensor, on: float | Tensor) -> None:
        """Nothing: all has been learnt before."""


def _cells(piece: Piece, p: Tensor) -> tuple[Tensor, Tensor]:
    """Return row and column of every entry of a piece of a parameter, flattened.

    Args:
        piece: The piece.
        p: One of its parameters.
    """
    width = p.numel() // max(p.shape[0], 1)
    if piece.part is None:
        first, last = 0, p.numel()
    else:
        unit = 1 if piece.as_vector else width
        first = int(piece.part.start) * unit
        last = min(int(piece.part.stop) * unit, p.numel())
    cells = torch.arange(first, last, device=p.device)
    return cells // width, cells % width
