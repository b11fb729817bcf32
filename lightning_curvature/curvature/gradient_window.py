"""GradientWindow: the last gradients, and products with the inverse of their Fisher matrix.

Frantar, Kurtic and Alistarh, "M-FAC: Efficient matrix-free approximations of second-order
information", 2021, arXiv:2107.03356. For a window G of m gradients of d numbers

    H = damping I + G^T G / m,    K = damping m I + G G^T

and H^{-1} is applied without ever being formed. The paper's recursion starts from 1 / damping and
subtracts down to the answer, which leaves 2 to 4 correct digits in float32 at the published
dampings. Here the core K, of m x m numbers in float64, is factorized at every step, and

    H^{-1} g_j = m G^T K^{-1} e_j                       for a gradient of the window (push-through)
    H^{-1} x   = (x - G^T K^{-1} G x) / damping         for any other vector (Woodbury)

The first has no difference of nearly equal vectors. G G^T is kept: a new gradient changes one row
and one column of it, found from the rows as they are stored, so nothing drifts.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_curvature.checks import check_choice, check_count, check_positive
from lightning_curvature.curvature.window_rows import (
    Placement,
    RowDtype,
    WindowRows,
    row_dtype_of,
)

__all__ = ["GradientWindow", "GramDtype", "WindowInverse", "WindowNormalization"]

WindowNormalization = Literal["capacity", "count"]
GramDtype = Literal["float64", "float32"]


class GradientWindow:
    r"""The last gradients :math:`G`, and products with the inverse of their Fisher matrix.

    .. math:: H = \lambda I + \frac{1}{m} G^T G

    A ring of ``num_grads`` rows; those not filled yet are zero. Time per gradient: one pass over
    the window to insert it, one to multiply with the inverse, and a Cholesky decomposition of
    ``num_grads`` x ``num_grads`` numbers.

    Args:
        num_grads: m, number of gradients that are kept, at least 1.
        num_columns: d, numbers of a gradient (of this rank, if the columns are dealt out).
        window_normalization: What H divides by: "capacity" for m also while the window fills, as
            in the paper; "count" for the number of gradients there are.
        row_dtype: In which gradients are kept: "auto" for ``dtype``, "float32", or "bfloat16" or
            "float16" with a scale per gradient, which takes half the memory.
        gram_dtype: In which inner products of gradients are summed: "float64", or "float32" in
            parts of thousands, which is faster but loses digits where gradients are alike.
        placement: Where gradients are kept: on the "device", or on the "host" from where they
            stream to the device in every product.
        device: Where gradients come from.
        dtype: Their precision, float32 or float64.
        sum_over_ranks: Sums a tensor over the ranks that hold the other columns; None if all
            columns are here.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> window = GradientWindow(2, 3)
        >>> window.insert(torch.tensor([1.0, 2.0, 0.0]))
        >>> window.inverse(damping=0.5) @ torch.tensor([0.0, 0.0, 1.0])
        tensor([0., 0., 2.])
    """

    def __init__(
        self,
        num_grads: int,
        num_columns: int,
        *,
        window_normalization: WindowNormalization = "capacity",
        row_dtype: RowDtype = "auto",
        gram_dtype: GramDtype = "float64",
        placement: Placement = "device",
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        check_count("num_grads", num_grads)
        check_count("num_columns", num_columns)
        check_choice("window_normalization", window_normalization, ("capacity", "count"))
        check_choice("gram_dtype", gram_dtype, ("float64", "float32"))
        check_choice("placement", placement, ("device", "host"))
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"Invalid dtype={dtype}: must be torch.float32 or torch.float64.")
        if torch.device(device).type == "mps":
            raise ValueError(
                "A window of gradients needs float64, which the device mps does not have. Train on "
                "the CPU or on CUDA."
            )
        self.num_grads = num_grads
        self.num_columns = num_columns
        self.window_normalization = window_normalization
        self._rows = WindowRows(
            num_grads,
            num_columns,
            dtype=dtype,
            stored=row_dtype_of(row_dtype, dtype),
            device=device,
            placement=placement,
            gram_dtype=getattr(torch, gram_dtype),
        )
        self._sum_over_ranks = sum_over_ranks
        device = self._rows.device
        self._gram = torch.zeros((num_grads, num_grads), dtype=torch.float64, device=device)
        # On the device: whether a gradient was inserted may be known there only.
        self._inserted = torch.zeros((), dtype=torch.int64, device=device)
        # How often it has changed, which is known without waiting for the device.
        self._version = 0

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the arithmetic with vectors of d numbers."""
        return self._rows.dtype

    @property
    def gram(self) -> Tensor:
        """G G^T, ``[m, m]`` in float64, in the order of the slots."""
        return self._gram

    @property
    def inserted(self) -> Tensor:
        """Number of gradients that were ever inserted, a 0-dim tensor."""
        return self._inserted

    @property
    def count(self) -> Tensor:
        """Number of gradients in the window, a 0-dim tensor."""
        return self._inserted.clamp(max=self.num_grads)

    @property
    def position(self) -> Tensor:
        """Slot of the next gradient, a 0-dim tensor."""
        return self._inserted % self.num_grads

    @property
    def nbytes(self) -> int:
        """Bytes that the gradients take."""
        return self._rows.nbytes

    def rows(self) -> Tensor:
        """Return the gradients as they are kept, ``[m, d]`` by slot: a copy in host memory."""
        rows = self._rows.matrix().to(self._rows.dtype)
        return rows * self._rows.scales.to(rows.device).unsqueeze(1)

    # Products

    @torch.no_grad()
    def insert(
        self, gradient: Tensor, usable: Tensor | None = None, *, largest: Tensor | None = None
    ) -> None:
        """Put a gradient into the place of the oldest one.

        Args:
            gradient: ``[d]``, finite.
            usable: Boolean 0-dim tensor: if False, nothing changes. None for True.
            largest: Largest absolute value of the gradient, where columns are dealt out over ranks
                and kept in half precision: all of them have one scale then.

        Raises:
            ValueError: If the gradient has another shape.
        """
        if tuple(gradient.shape) != (self.num_columns,):
            raise ValueError(
                f"Invalid gradient of shape {list(gradient.shape)}: must be [{self.num_columns}]."
            )
        self._version += 1
        slot = self._slot(0)
        row, scale = self._rows.rounded(gradient, largest)
        if usable is not None:
            old_row, old_scale = self._rows.read(slot)
            row = torch.where(usable, row, old_row)
            scale = torch.where(usable, scale, old_scale)
        self._rows.write(slot, row, scale)
        products = self._summed(self._rows.products(self._rows.widened(row, scale)))
        if usable is not None:
            # Of an old row that stays they may come out with other last bits than they had.
            place = torch.as_tensor(slot, device=products.device).view(1)
            products = torch.where(usable, products, self._gram.index_select(0, place).view(-1))
        if isinstance(slot, Tensor):
            self._gram.index_copy_(0, slot.view(1), products.view(1, -1))
            self._gram.index_copy_(1, slot.view(1), products.view(-1, 1))
        else:
            self._gram[slot] = products
            self._gram[:, slot] = products
        self._inserted = self._inserted + (1 if usable is None else usable.long())

    def newest_direction(self, damping: float | Tensor) -> Tensor:
        """Return H^{-1} g for the gradient that was inserted last, ``[d]``.

        Args:
            damping: Damping, > 0.
        """
        return self.inverse(damping).newest_direction()

    def inverse_product(self, x: Tensor, damping: float | Tensor) -> Tensor:
        """Return H^{-1} x.

        Args:
            x: ``[d]`` or ``[d, k]``.
            damping: Damping, > 0.
        """
        return self.inverse(damping) @ x

    def inverse(self, damping: float | Tensor) -> "WindowInverse":
        """Return H^{-1} with the present gradients; use it before the next one is inserted.

        Args:
            damping: Damping, > 0.

        Raises:
            ValueError: If the damping is not positive.
            TypeError: If it is no number.
        """
        if not isinstance(damping, Tensor):
            check_positive("damping", damping)
        return WindowInverse(self, damping)

    def _slot(self, back: int) -> int | Tensor:
        """Return the slot that is filled next, or some steps before that.

        It is a tensor where reading it would wait for the device.
        """
        slot = (self._inserted - back) % self.num_grads
        return int(slot) if self._rows.on_host or _can_look(slot) else slot

    def _summed(self, x: Tensor) -> Tensor:
        return x if self._sum_over_ranks is None else self._sum_over_ranks(x)

    # State

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds, in plain types; the gradients are copied."""
        return {
            "rows": self._rows.matrix(),
            "scales": self._rows.scales.clone(),
            "gram": self._gram.clone(),
            "inserted": self._inserted.clone(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a state of a window of the same size.

        Args:
            state: What `state` returned.
        """
        self._version += 1
        self._rows.load(state["rows"], state["scales"])
        self._gram.copy_(state["gram"])
        self._inserted = state["inserted"].to(self._inserted.device, copy=True)


def _can_look(scalar: Tensor) -> bool:
    """Tell whether reading a scalar costs nothing."""
    return scalar.device.type == "cpu"


class WindowInverse:
    """The inverse of a window's damped Fisher matrix: ``inverse @ x``.

    Args:
        window: The window.
        damping: Damping, > 0.

    Attributes:
        good: Boolean 0-dim tensor: whether the core could be factorized. If not,
            `newest_direction` is that of a window with the newest gradient alone, and other
            products ignore the window.
    """

    def __init__(self, window: GradientWindow, damping: float | Tensor) -> None:
        self._window = window
        gram = window.gram
        self._version = window._version
        if isinstance(damping, Tensor):
            self._damping = damping.to(device=gram.device, dtype=torch.float64)
        else:
            # A tensor made from a number is copied to the device, which waits for it.
            self._damping = gram.new_full((), damping)
        size = torch.full_like(self._damping, window.num_grads)
        if window.window_normalization == "count":
            size = window.count.clamp(min=1).double()
        self._size = size
        self._diagonal = gram.diagonal() + self._damping * size
        core = gram.clone()
        core.diagonal().copy_(self._diagonal)
        # A gradient of another size than the rest would cost all of them digits.
        self._roots = self._diagonal.rsqrt()
        core *= self._roots.unsqueeze(1) * self._roots
        factor, info = torch.linalg.cholesky_ex(core)
        self.good = (info == 0) & factor.diagonal().isfinite().all()
        self._factor = torch.where(
            self.good, factor, torch.eye(len(core), out=torch.empty_like(core))
        )

    def _solve(self, vectors: Tensor) -> Tensor:
        """Return K^{-1} times vectors, ``[m, k]``; of the diagonal alone if there is no factor."""
        roots = self._roots.unsqueeze(1)
        return roots * torch.cholesky_solve(roots * vectors, self._factor)

    def _check(self, x: Tensor | None = None) -> None:
        window = self._window
        if self._version != window._version:
            raise RuntimeError(
                "This inverse is of a window that has changed since. Call window.inverse(damping) "
                "after every insert."
            )
        if x is not None and (x.ndim not in (1, 2) or len(x) != window.num_columns):
            raise ValueError(
                f"Invalid x of shape {list(x.shape)}: must be [{window.num_columns}] or "
                f"[{window.num_columns}, k]."
            )

    @torch.no_grad()
    def newest_direction(self) -> Tensor:
        """Return H^{-1} g for the gradient that was inserted last, ``[d]``."""
        self._check()
        return self._window._rows.combination(self._newest_coefficients())

    def _newest_coefficients(self) -> Tensor:
        slot = torch.as_tensor(self._window._slot(1), device=self._factor.device)
        unit = torch.zeros_like(self._diagonal).index_fill_(0, slot.view(1), 1.0)
        return self._solve(unit.unsqueeze(1)).squeeze(1) * self._size

    @torch.no_grad()
    def newest_direction_and(self, x: Tensor) -> Tensor:
        """Return H^{-1} (g + x) for the gradient g that was inserted last, ``[d]``.

        Args:
            x: Another vector, ``[d]``.
        """
        self._check(x)
        window = self._window
        coefficients = self._newest_coefficients()
        products = window._summed(window._rows.products(x)) * self.good
        coefficients -= self._solve(products.unsqueeze(1)).squeeze(1) / self._damping
        # Without a factor there is nothing that would hold the second part back.
        outside: Tensor = (self.good / self._damping).to(x.dtype)
        return window._rows.combination(coefficients) + x * outside

    @torch.no_grad()
    def __matmul__(self, x: Tensor) -> Tensor:
        """Return H^{-1} x.

        Args:
            x: ``[d]`` or ``[d, k]``.

        Raises:
            ValueError: If ``x`` has another shape.
            RuntimeError: If a gradient was inserted since.
        """
        self._check(x)
        window = self._window
        products = window._summed(window._rows.products(x)) * self.good
        columns = products.unsqueeze(1) if x.ndim == 1 else products
        solved = self._solve(columns).view(products.shape)
        difference = x.to(window._rows.dtype) - window._rows.combination(solved)
        return (difference / self._damping).to(x.dtype)
