"""HiZOOL: HiZOO whose metric is a row and a column per matrix.

HiZOO-L of arXiv:2402.15173, of which no code was published: this is our reading. For a matrix of m
rows and n columns H_ij = r_i c_j / mean(r); averages of the rows and of the columns of a new
estimate are averaged into r and c, as Adafactor does. Vectors keep all of H; tensors with more axes
are matrices of their first axis and the rest.
"""

from collections.abc import Sequence
from contextlib import closing
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_curvature.curvature.perturbation import Piece
from lightning_curvature.optim.displacement import Displacement
from lightning_curvature.optim.hizoo import HiZOO
from lightning_curvature.optim.saved_state import STATE_KEY
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
        return p.ndim >= _MATRIX_AXES and p.numel() > 0 and "mask" not in self.state[p]

    def _check_state(self, saved: Any) -> None:
        super()._check_state(saved)
        if saved[STATE_KEY]["steps_done"] > 0 and not saved["state"]:
            raise ValueError(
                f"Cannot load the state into {type(self).__name__}: it has taken steps, but "
                "'state' is empty."
            )
        for index, state in saved["state"].items():
            if ("hess_rows" in state) != ("hess_cols" in state):
                raise ValueError(
                    f"Cannot load the state into {type(self).__name__}: parameter {index} has one "
                    "of 'hess_rows' and 'hess_cols' without the other."
                )

    def _occasional_state(self, p: Tensor, mask: Tensor | None) -> dict[str, torch.Size]:
        shapes = super()._occasional_state(p, mask)
        shapes["hess_diag"] = shapes["master"]
        if p.ndim >= _MATRIX_AXES and p.numel() > 0 and mask is None:
            shapes["hess_rows"] = p.shape[:1]
            shapes["hess_cols"] = torch.Size([p.numel() // p.shape[0]])
        return shapes

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
                rows, columns = state["hess_rows"], state["hess_cols"]
                cells = _outer(piece, rows / rows.mean(), columns).clamp_(*self._limits())
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
            _add_sums(pieces[0], hess.mul_(factor), *sums[p])

    def _learn(self, pieces: Sequence[Piece], answer: Tensor, on: float | Tensor) -> None:
        """Nothing: all has been learnt before."""


def _outer(piece: Piece, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the products of a row and a column factor in a piece of a matrix.

    Args:
        piece: The piece.
        rows: One factor per row of the whole matrix.
        columns: One per column.
    """
    if piece.as_vector and piece.part is not None:
        cells = _cells(piece, len(rows) * len(columns), rows.device)
        return rows[cells // len(columns)] * columns[cells % len(columns)]
    return rows[piece.part or slice(None)].unsqueeze(1) * columns


def _add_sums(piece: Piece, values: Tensor, rows: Tensor, columns: Tensor) -> None:
    """Add the sums of values in a piece of a matrix over its columns and over its rows.

    Args:
        piece: The piece.
        values: The values there.
        rows: Sums over columns, changed in place.
        columns: Sums over rows, changed in place.
    """
    if piece.as_vector and piece.part is not None:
        cells = _cells(piece, len(rows) * len(columns), rows.device)
        rows.index_add_(0, cells // len(columns), values.view(-1))
        columns.index_add_(0, cells % len(columns), values.view(-1))
    else:
        matrix = values.view(-1, len(columns))
        rows[piece.part or slice(None)] += matrix.sum(1)
        columns += matrix.sum(0)


def _cells(piece: Piece, size: int, device: torch.device) -> Tensor:
    """Return the positions in the flattened matrix of a piece that ends within a row."""
    assert piece.part is not None
    return torch.arange(piece.part.start, min(piece.part.stop, size), device=device)
