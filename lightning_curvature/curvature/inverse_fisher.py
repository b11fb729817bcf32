"""InverseFisher: the inverse of an empirical Fisher matrix, which is never formed.

Frantar, Kurtic and Alistarh, "M-FAC: Efficient matrix-free approximations of second-order
information", 2021, arXiv:2107.03356, the static algorithm, and its variant with diagonal blocks.

The paper adds one gradient at a time to the inverse, starting from I / damping. In float32 that
cancels down to the answer, and diagonal entries come out wrong or negative where the gradients
outnumber the columns of a block; the official code collects one gradient fewer than it divides by.
Here each block is factorized once in float64: as it is where it has no more columns than there
are gradients (primal), through the inner products of the gradients elsewhere (dual). What is
divided by is the number of gradients given.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from lightning_curvature.checks import (
    check_choice,
    check_count,
    check_in_range,
    check_positive,
)
from lightning_curvature.curvature.column_blocks import ColumnBlocks
from lightning_curvature.curvature.fisher_blocks import FisherBlocks
from lightning_curvature.curvature.fisher_dual import DualFisher
from lightning_curvature.curvature.fisher_entries import check_columns, submatrices_of
from lightning_curvature.curvature.fisher_primal import PrimalFisher
from lightning_curvature.curvature.gradient_checks import check_finite_rows, check_floating

__all__ = ["FisherForm", "InverseFisher"]

FisherForm = Literal["auto", "primal", "dual"]

# Vectors that are multiplied at a time.
_VECTORS = 256


class InverseFisher:
    r"""The inverse of a damped empirical Fisher matrix, to multiply with and to read entries of.

    .. math:: H = \lambda I + \frac{1}{m} \sum_i g_i g_i^T

    With a ``block_size`` only the diagonal blocks of it, of consecutive columns. All arithmetic is
    in float64, whatever the precision of the gradients; temporary tensors are of bounded size.

    Note:
        Where H is applied through inner products (``form`` "dual"), the gradients are read again
        by every product: do not change them in the meantime. A factorization takes
        min(m, block_size)² numbers per block.

    Args:
        gradients: Gradients :math:`g_i`, ``[m, d]``, of any floating-point dtype, on any device;
            not copied. Rows may be zero or alike.
        damping: Damping :math:`\lambda`, > 0. Its size goes with that of the gradients squared:
            gradients of larger batches are smaller.
        block_size: Columns per block, at least 1; the last block may be smaller. None for one
            block of all columns, the Fisher matrix itself.
        form: What is factorized: "primal" for the blocks, "dual" for inner products of gradients,
            "auto" for the smaller of the two.
        num_grads: What is divided by, if that is not the number of gradients, m.
        device: Where to compute and to keep the factorization, and where entries are returned;
            gradients may be elsewhere and come in pieces. None for where the gradients are.
        sum_over_ranks: If other ranks have the other columns of the same gradients: returns the
            sum of a tensor over the ranks. Every rank then passes its own columns of vectors, and
            all call the same methods. For one block in the dual form only; there may be ranks
            without a column.

    Attributes:
        shape: ``(d, d)``.
        damping: See above.
        num_grads: What is divided by.
        block_size: Columns per block, at most d.
        form: "primal" or "dual".

    Raises:
        ValueError: If an argument is out of range, or a gradient is not finite.
        TypeError: If an argument has the wrong type.
        RuntimeError: If the damping is too small, beside the gradients, for float64.

    Examples:
        >>> gradients = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 0.0]])
        >>> inverse = InverseFisher(gradients, damping=0.5)
        >>> inverse @ torch.tensor([0.0, 10.0, 0.0])
        tensor([0., 2., 0.])
        >>> inverse.diagonal()
        tensor([1.6667, 0.2000, 0.6667], dtype=torch.float64)

    References:
        Frantar, Kurtic, Alistarh (2021), https://arxiv.org/abs/2107.03356.
    """

    def __init__(
        self,
        gradients: Tensor,
        damping: float = 1e-5,
        *,
        block_size: int | None = None,
        form: FisherForm = "auto",
        num_grads: int | None = None,
        device: torch.device | str | None = None,
        sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        check_floating("gradients", gradients)
        if gradients.ndim != 2 or len(gradients) == 0:  # noqa: PLR2004
            raise ValueError(
                f"Invalid gradients of shape {list(gradients.shape)}: must be [m, d] with m >= 1."
            )
        if block_size is not None:
            check_count("block_size", block_size)
        check_choice("form", form, ("auto", "primal", "dual"))
        if sum_over_ranks is not None and (block_size is not None or form == "primal"):
            raise ValueError(
                "Columns of several ranks (sum_over_ranks) must be one block in the dual form. "
                f"Got: block_size={block_size}, form={form!r}."
            )
        rows, num_columns = gradients.shape
        gradients = gradients.detach()
        columns = ColumnBlocks.of(num_columns, block_size)
        where = gradients.device if device is None else torch.device(device)
        self._prepare(columns, damping, rows if num_grads is None else num_grads, where)
        check_finite_rows(gradients, where, sum_over_ranks)
        primal = columns.block_size <= rows and sum_over_ranks is None
        self._form: PrimalFisher | DualFisher
        with torch.no_grad():
            if form == "primal" or (form == "auto" and primal):
                self._form = self._primal(PrimalFisher.sums_of_gradients(columns, gradients, where))
            else:
                self._form = DualFisher(
                    columns,
                    gradients,
                    self.num_grads,
                    damping,
                    where,
                    self._factorized,
                    sum_over_ranks,
                )

    @classmethod
    def from_blocks(
        cls,
        blocks: FisherBlocks,
        damping: float = 1e-5,
        *,
        num_grads: int | None = None,
        device: torch.device | str | None = None,
    ) -> "InverseFisher":
        """Build it from sums over gradients that are not there any more, in the primal form.

        Args:
            blocks: The sums; not needed afterwards.
            damping: Damping, > 0.
            num_grads: What is divided by, if that is not the number of gradients.
            device: Where to compute and to keep the factorization. None for where the sums are.

        Raises:
            ValueError: If an argument is out of range, or a gradient was not finite.
            TypeError: If an argument has the wrong type.
            RuntimeError: If no gradient was added, or the damping is too small, beside the
                gradients, for float64.
        """
        if blocks.num_grads == 0:
            raise RuntimeError("There is no Fisher matrix yet: no gradient was added.")
        diagonals = blocks.sums().diagonal(dim1=-2, dim2=-1)
        if not diagonals.isfinite().all():
            raise ValueError("Invalid blocks: a gradient that was added is not finite.")
        inverse = cls.__new__(cls)
        where = blocks.device if device is None else torch.device(device)
        count = blocks.num_grads if num_grads is None else num_grads
        inverse._prepare(blocks.columns, damping, count, where)
        with torch.no_grad():
            inverse._form = inverse._primal(PrimalFisher.sums_of_blocks(blocks))
        return inverse

    def _prepare(
        self, columns: ColumnBlocks, damping: float, num_grads: int, device: torch.device
    ) -> None:
        check_positive("damping", damping)
        check_in_range("damping", damping, 0, float("inf"))
        check_count("num_grads", num_grads)
        self.damping = damping
        self.num_grads = num_grads
        self.shape = (columns.num_columns, columns.num_columns)
        self.block_size = columns.block_size
        self._columns = columns
        self._device = device

    def _primal(self, sums: Callable[..., Tensor]) -> PrimalFisher:
        return PrimalFisher(
            self._columns, sums, self.num_grads, self.damping, self._device, self._factorized
        )

    @property
    def form(self) -> Literal["primal", "dual"]:
        """What is factorized: "primal" for the blocks, "dual" for inner products of gradients."""
        return "primal" if isinstance(self._form, PrimalFisher) else "dual"

    def __repr__(self) -> str:
        return (
            f"InverseFisher(shape={self.shape}, damping={self.damping}, "
            f"block_size={self.block_size}, num_grads={self.num_grads}, form={self.form!r})"
        )

    # What it is for

    @torch.no_grad()
    def __matmul__(self, x: Tensor) -> Tensor:
        """Return H^{-1} x.

        Args:
            x: ``[d]`` or ``[d, k]``, floating-point.

        Returns:
            In the shape and dtype of ``x``, where ``x`` is.

        Raises:
            ValueError: If ``x`` has another shape.
            TypeError: If ``x`` is not a floating-point tensor.
        """
        check_floating("x", x)
        if x.ndim not in (1, 2) or len(x) != self.shape[0]:
            raise ValueError(
                f"Invalid x of shape {list(x.shape)}: must be [{self.shape[0]}] or "
                f"[{self.shape[0]}, k]."
            )
        found = torch.empty_like(x)
        vectors, products = (y.unsqueeze(1) if x.ndim == 1 else y for y in (x, found))
        for start in range(0, vectors.shape[1], _VECTORS):
            some = slice(start, start + _VECTORS)
            self._form.product(vectors[:, some], products[:, some])
        return found

    @torch.no_grad()
    def diagonal(self) -> Tensor:
        """Return the diagonal of H^{-1}, ``[d]`` in float64, all of it positive.

        Raises:
            RuntimeError: If rounding made an entry zero or negative: the damping is too small,
                beside the gradients, for float64.
        """
        found = torch.empty(self.shape[0], dtype=torch.float64, device=self._device)
        self._form.diagonal(found)
        wrong = ~(found > 0)
        if wrong.any():
            raise RuntimeError(
                f"{int(wrong.sum())} of {len(found)} diagonal entries of the inverse Fisher matrix "
                f"are not positive, the first in column {int(wrong.nonzero()[0])}: "
                + self._too_small()
            )
        return found

    def elements(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return entries of H^{-1}, ``[n]`` in float64; zeros between columns of two blocks.

        Args:
            rows: Numbers of rows, int64 ``[n]``.
            columns: Numbers of columns, int64 ``[n]``.

        Raises:
            ValueError: If the shapes differ, or a number is out of range.
            TypeError: If they are not int64.
        """
        if rows.ndim != 1 or rows.shape != columns.shape:
            raise ValueError(
                f"Invalid rows and columns of shapes {list(rows.shape)} and {list(columns.shape)}: "
                "must be [n], the same for both."
            )
        return self.submatrices(torch.stack([rows, columns], 1))[:, 0, 1]

    @torch.no_grad()
    def submatrices(self, groups: Tensor) -> Tensor:
        """Return the entries of H^{-1} within groups of columns.

        Args:
            groups: Numbers of the columns of each group, int64 ``[n, k]``.

        Returns:
            ``[n, k, k]`` in float64; zeros between columns of two blocks.

        Raises:
            ValueError: If the shape is another one, or a number is out of range.
            TypeError: If they are not int64.
        """
        check_columns(groups, self.shape[0])
        return submatrices_of(self._form, groups.to(self._device))

    @torch.no_grad()
    def joint_update(self, weights: Tensor, pruned: Tensor) -> Tensor:
        """Return the change of all weights that removes some of them at the least increase.

        It minimizes 1/2 dw^T H dw where dw is minus the weight for the weights that are removed:
        the others make up for all of them jointly, within a block.

        Args:
            weights: Weights, ``[d]``, floating-point.
            pruned: Which weights are removed, boolean ``[d]``.

        Returns:
            The change, in the dtype of the weights, where they are: exactly minus the weight for
            those that are removed, zero in blocks of which none is.

        Raises:
            ValueError: If a shape is another one.
            TypeError: If the weights are not floating-point, or ``pruned`` is not boolean.
            RuntimeError: If the damping is too small, beside the gradients, for float64.
        """
        check_floating("weights", weights)
        if pruned.dtype != torch.bool:
            raise TypeError(f"Invalid pruned of dtype {pruned.dtype}: must be torch.bool.")
        for name, x in (("weights", weights), ("pruned", pruned)):
            if tuple(x.shape) != self.shape[:1]:
                raise ValueError(
                    f"Invalid {name} of shape {list(x.shape)}: must be [{self.shape[0]}]."
                )
        pruned = pruned.to(weights.device)
        found = torch.empty_like(weights)
        self._form.joint_update(weights, pruned, found)
        return torch.where(pruned, -weights, found)

    @torch.no_grad()
    def logdet(self) -> Tensor:
        """Return log det H, a 0-dim tensor in float64; of the columns of all ranks."""
        return self._form.logdet()

    # How

    def _factorized(self, matrices: Tensor, first: int) -> Tensor:
        """Return Cholesky factors of a tile's matrices, the first of which is block ``first``."""
        factors: Tensor
        factors, info = torch.linalg.cholesky_ex(matrices)
        good = (info == 0) & factors.diagonal(dim1=-2, dim2=-1).isfinite().all(-1)
        if not good.all():
            block = first + int((~good).nonzero()[0])
            raise RuntimeError(
                f"The Fisher matrix of block {block} of {self._columns.num_blocks} is not positive "
                "definite: " + self._too_small()
            )
        return factors

    def _too_small(self) -> str:
        return (
            f"damping={self.damping} is too small, beside these gradients, for float64. Raise it."
        )
