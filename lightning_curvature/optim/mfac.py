"""MFAC: descent along the inverse Fisher matrix of the last gradients, applied exactly.

Elias Frantar, Eldar Kurtic and Dan Alistarh, "M-FAC: Efficient matrix-free approximations of
second-order information", 2021, arXiv:2107.03356, section 3.2; official code IST-DASLab/M-FAC. The
rule is that of the code. Differences:

- Inverse products go through a core in float64 instead of the paper's recursion, see
  `curvature/gradient_window.py`: the same numbers, but for the digits that float32 loses.
- The window is in checkpoints, its columns can be dealt out over ranks, any number of gradients and
  any device will do. Gradients that are not finite never enter it.
- ``l2_reg`` is the code's ``weight_decay``. Decoupled decay and plain momentum are those of its
  successor IST-DASLab/EFCP (arXiv:2306.06098).
"""

import warnings
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_curvature import vectors
from lightning_curvature.checks import (
    check_choice,
    check_count,
    check_in_range,
    check_interval,
    check_positive,
)
from lightning_curvature.curvature.gradient_window import GramDtype, WindowNormalization
from lightning_curvature.curvature.window_memory import window_bytes
from lightning_curvature.curvature.window_rows import Placement, RowDtype, row_dtype_of
from lightning_curvature.optim.diagonal import DiagonalOptimizer
from lightning_curvature.optim.saved_state import STATE_KEY
from lightning_curvature.optim.saved_window import (
    check_finite_tensor,
    check_saved_window,
    gathered_window,
)
from lightning_curvature.optim.sharded_window import (
    ShardedWindow,
    check_device,
    check_window_memory,
    check_window_memory_of_ranks,
    num_columns,
    num_shards,
)
from lightning_curvature.oracle.protocol import Oracle

__all__ = ["MFAC", "MomentumType"]

MomentumType = Literal["ema", "heavy_ball"]

_WINDOW = "window"
# Above this part of itself per step a parameter changes its sign and grows.
_FAST = 2.0
_BOOLEANS = ("l2_in_window", "sparse", "shard_window", "gather_state", "maximize")


class MFAC(DiagonalOptimizer):
    r"""Descent along the inverse Fisher matrix of the last gradients, applied exactly.

    .. math::
        g_t &= \nabla L + \lambda_2 \theta, \quad
        H_t = \delta I + \frac{1}{m} \sum_{i=t-m+1}^{t} g_i g_i^T \\
        v_t &= \beta v_{t-1} + (1 - \beta) H_t^{-1} g_t, \quad
        \theta \leftarrow \theta - \eta\, v_t

    The matrix is the empirical Fisher matrix of the last m mini-batch gradients, over all
    parameters at once: neither diagonal nor block-diagonal. Its inverse is applied without
    approximation, by products with the window of gradients.

    Use it for fine-tuning, and where a model has up to some millions of parameters: the window is
    m copies of them. ``lr`` is not that of SGD: a step is about ``lr * m / ||g||`` long where the
    gradients of the window are unlike each other, and longer the more alike they are, up to
    ``lr * sqrt(m / damping) / 2``. Start from 1e-3 and lower ``damping`` only with it.

    Cost per step: forward and backward, two passes over the window, and a Cholesky decomposition
    of m x m numbers.
    Memory: m copies of the trained parameters (half of that with ``row_dtype="bfloat16"``), one
    more with momentum. On several ranks each keeps its part of the columns, and all ranks together
    one window.

    Args:
        params: Parameters to optimize, or parameter groups.
        lr: Learning rate, >= 0. Groups may differ in it, in ``l2_reg`` and in ``weight_decay``.
        num_grads: m, number of gradients in the window, >= 1. The papers use 512 and 1024.
        damping: What is added to the diagonal of the Fisher matrix, > 0. The smaller it is, the
            longer are steps across the gradients of the window.
        momentum: Share of the old direction that is kept, in [0, 1).
        momentum_type: "ema" averages preconditioned gradients, as the official code does;
            "heavy_ball" adds them up, which is 1 / (1 - momentum) times as long in the end.
        l2_reg: Weight of the penalty l2_reg / 2 ||theta||^2, >= 0; its gradient is part of what
            is preconditioned. It is called weight_decay in the official code.
        l2_in_window: Whether the gradient of the penalty is also part of the Fisher matrix. If
            not, every step shrinks what no gradient of the window points along by about
            ``lr * l2_reg / damping``, which must be far below 1.
        weight_decay: Decoupled weight decay, >= 0: every step shrinks parameters by
            ``lr * weight_decay``. May be used beside ``l2_reg``.
        window_normalization: What the Fisher matrix divides by while the window fills: "capacity"
            for m, as the paper, "count" for the number of gradients there are, which makes first
            steps up to m times shorter.
        row_dtype: In which gradients are kept: "auto" for the parameters' precision (at least
            float32), "float32", or "bfloat16" or "float16" with a scale per gradient.
        gram_dtype: In which inner products of gradients are summed: "float64", or "float32", which
            takes less time on a CPU but loses digits where gradients are alike and damping is low.
        placement: Where gradients are kept: on the "device", or in the memory of the "host", from
            where they stream to the device twice a step.
        sparse: Whether entries that are exactly zero at the first step have no columns and stay
            zero. For pruned models: biases that start at zero are frozen, too.
        shard_window: Whether ranks of a data-parallel run share one window: each keeps its part of
            the columns, and a step sums m numbers over the ranks and gathers the direction. False
            for a whole window on every rank and no communication.
        gather_state: Whether ``state_dict`` on rank 0 holds the columns of all ranks. All ranks
            must then call it, as Lightning does. If False the state of every rank holds its own
            columns, and your loop must save all of them, see `join_window_shards`: Lightning's
            checkpoints hold the state of rank 0 only and cannot be resumed from.
        max_failures: Gradients in a row that are not finite after which training stops with an
            error.
        foreach: False to update one tensor at a time.
        maximize: Whether to climb.

    Raises:
        ValueError: If an argument is out of range, or the window does not fit into the free memory;
            the message has the largest ``num_grads`` that does.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> import torch
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = MFAC(model.parameters(), num_grads=16, damping=1e-3)
        >>> loss = torch.nn.functional.cross_entropy(model(torch.ones(4, 3)), torch.ones(4).long())
        >>> loss.backward()
        >>> optimizer.step()
        >>> sorted(optimizer.stats)
        ['direction_norm', 'grad_norm', 'lr', 'skipped_directions', 'skipped_steps',
        'skipped_windows']

    References:
        Frantar, Kurtic and Alistarh, 2021, arXiv:2107.03356.
    """

    shared_names: ClassVar[tuple[str, ...]] = (
        *("num_grads", "damping", "momentum", "momentum_type", "l2_in_window"),
        *("window_normalization", "row_dtype", "gram_dtype", "placement", "sparse"),
        *("shard_window", "gather_state", "max_failures", "foreach"),
    )
    needs_whole_params: ClassVar[bool] = True
    watched: ClassVar[dict[str, tuple[int, str]]] = {
        "skipped_directions": (
            1,
            "{name} left out {count} directions that were not finite. "
            "stats['skipped_directions'] goes on counting.",
        ),
        "skipped_windows": (
            1,
            "{name} took {count} steps along the newest gradient alone: the window's core could "
            "not be factorized. Raise damping. stats['skipped_windows'] goes on counting.",
        ),
    }

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        num_grads: int = 64,
        damping: float = 1e-5,
        momentum: float = 0.0,
        momentum_type: MomentumType = "ema",
        l2_reg: float = 0.0,
        l2_in_window: bool = True,
        weight_decay: float = 0.0,
        window_normalization: WindowNormalization = "capacity",
        row_dtype: RowDtype = "auto",
        gram_dtype: GramDtype = "float64",
        placement: Placement = "device",
        sparse: bool = False,
        shard_window: bool = True,
        gather_state: bool = True,
        max_failures: int = 20,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "num_grads": num_grads,
            "damping": damping,
            "momentum": momentum,
            "momentum_type": momentum_type,
            "l2_reg": l2_reg,
            "l2_in_window": l2_in_window,
            "weight_decay": weight_decay,
            "window_normalization": window_normalization,
            "row_dtype": row_dtype,
            "gram_dtype": gram_dtype,
            "placement": placement,
            "sparse": sparse,
            "shard_window": shard_window,
            "gather_state": gather_state,
            "max_failures": max_failures,
            "foreach": foreach,
            "maximize": maximize,
        }
        self._forget()
        super().__init__(params, defaults)
        check_window_memory(self._trained(), self.param_groups[0])
        self._warn_of_shrinking()

    def _warn_of_shrinking(self) -> None:
        for group in self.param_groups:
            rate = group["lr"] * group["l2_reg"] / float(group["damping"])
            if not group["l2_in_window"] and rate > _FAST:
                warnings.warn(
                    "MFAC with l2_in_window=False changes weights by lr * l2_reg / damping = "
                    f"{rate:.2g} of their size per step: above 2 they grow without end. Lower "
                    "l2_reg, raise damping, or use weight_decay.",
                    RuntimeWarning,
                    stacklevel=4,
                )
                return

    def _forget(self) -> None:
        self._window: ShardedWindow | None = None
        self._directions: dict[Tensor, Tensor] = {}
        self._told_of_missing = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickle or deep copy."""
        self._forget()
        super().__setstate__(state)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group.

        Args:
            param_group: As for every torch optimizer.

        Raises:
            ValueError: If an argument is out of range, or differs from the other groups though it
                is one value for all, or parameters are on several devices.
        """
        super().add_param_group(param_group)
        try:
            check_device(self._all_params())
        except ValueError:
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        check_positive("lr", group["lr"], zero=True)
        check_count("num_grads", group["num_grads"])
        damping = group["damping"]
        check_positive("damping", float(damping) if isinstance(damping, Tensor) else damping)
        check_in_range("momentum", group["momentum"], 0, 1)
        check_choice("momentum_type", group["momentum_type"], ("ema", "heavy_ball"))
        check_positive("l2_reg", group["l2_reg"], zero=True)
        check_positive("weight_decay", group["weight_decay"], zero=True)
        choice = group["window_normalization"]
        check_choice("window_normalization", choice, ("capacity", "count"))
        row_dtype_of(group["row_dtype"], torch.float32)
        check_choice("gram_dtype", group["gram_dtype"], ("float64", "float32"))
        check_choice("placement", group["placement"], ("device", "host"))
        for name in _BOOLEANS:
            if not isinstance(group[name], bool):
                raise TypeError(f"Invalid {name}={group[name]!r}: must be True or False.")
        check_interval("max_failures", group["max_failures"])

    def _trained(self) -> list[Tensor]:
        return [p for p in self._all_params() if p.requires_grad]

    @property
    def window_bytes(self) -> int:
        """Bytes that the window takes on this rank, with its working memory."""
        group, params = self.param_groups[0], self._trained()
        size = num_columns(params, group) if self._window is None else self._window.columns.size
        share = -(-size // num_shards(group))
        row_dtype = row_dtype_of(group["row_dtype"], vectors.scalar_dtype(params))
        return window_bytes(int(group["num_grads"]), share, row_dtype)

    # One step

    def _prepare(
        self,
        params: list[Tensor],
        oracle: Oracle | None,
        usable: Tensor | None,
        stats: dict[str, Tensor],
    ) -> None:
        group = self.param_groups[0]
        if not isinstance(group["damping"], Tensor):
            check_positive("damping", group["damping"])
        window = self._window_for(params)
        gradients, penalties = self._gradients(window)
        vector = window.vector(gradients)
        penalty = window.vector(penalties) if penalties else None
        sound = usable
        if penalty is not None:
            # Large parameters can make it overflow where the gradient does not.
            sound = torch.isfinite(torch.linalg.vector_norm(penalty, float("inf")))
            sound = sound if usable is None else sound & usable
            if group["l2_in_window"]:
                vector += penalty
                penalty = None
        window.insert(vector, sound)
        inverse = window.window.inverse(group["damping"])
        direction = window.direction(inverse, penalty)
        stats["direction_norm"] = torch.linalg.vector_norm(direction)
        finite = torch.isfinite(stats["direction_norm"])
        if sound is not None:
            finite = finite & sound
        good = finite if usable is None else finite & usable
        if not (usable is None and self._can_look(finite) and bool(finite)):
            direction = direction.masked_fill_(~good, 0.0)
        columns = window.columns
        self._directions = dict(zip(columns.params, columns.tensors(direction), strict=True))
        for name, bad in (("directions", ~finite), ("windows", ~inverse.good)):
            counted = bad if usable is None else bad & usable
            key = f"skipped_{name}"
            like = stats["grad_norm"]
            self._scalars[key] = self._scalar(key, like) + counted.to(like.dtype)

    def _gradients(self, window: ShardedWindow) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Return gradients of the loss and of the penalties; no list of those if there are none."""
        groups = {p: group for group in self.param_groups for p in group["params"]}
        gradients: list[Tensor | None] = []
        penalties: list[Tensor | None] = []
        for p in window.columns.params:
            group, grad = groups[p], p.grad
            gradients.append(None if grad is None else self._grads(group, [grad])[0])
            decays = grad is not None and group["l2_reg"] != 0
            penalties.append(p.to(window.window.dtype) * group["l2_reg"] if decays else None)
        missing = sum(p.requires_grad and p.grad is None for p in window.columns.params)
        if missing and not self._told_of_missing:
            self._told_of_missing = True
            warnings.warn(
                f"{missing} of {len(gradients)} parameters of MFAC have no gradient in this step, "
                "though they had one before: they stay as they are, and are zeros in the window.",
                RuntimeWarning,
                stacklevel=6,
            )
        return gradients, penalties if any(c is not None for c in penalties) else []

    def _update_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        usable: Tensor | None,
        stats: dict[str, Tensor],
    ) -> None:
        directions = [self._directions[p] for p in params]
        beta = group["momentum"]
        if beta > 0:
            (averages,) = self._state_lists(params, "momentum_buffer")
            # One parameter in float64 makes all directions so.
            directions = [x.to(v.dtype) for x, v in zip(directions, averages, strict=True)]
            if group["momentum_type"] == "ema":
                vectors.ema_(averages, directions, beta, usable)
            else:
                kept = beta if usable is None else 1 - usable.to(averages[0].dtype) * (1 - beta)
                torch._foreach_mul_(averages, kept)
                torch._foreach_add_(averages, directions)
            torch._foreach_copy_(directions, averages)
        lr = float(group["lr"])
        for part in vectors.chunks(len(params), group["foreach"]):
            vectors.shrink_(params[part], lr * group["weight_decay"], usable)
            vectors.move_(params[part], directions[part], -lr, usable)

    def _finish(
        self,
        params: list[Tensor],
        oracle: Oracle | None,
        usable: Tensor | None,
        stats: dict[str, Tensor],
    ) -> None:
        self._directions = {}

    def _window_for(self, params: list[Tensor]) -> ShardedWindow:
        """Return the window; parameters with a first gradient get columns."""
        group, window = self.param_groups[0], self._window
        known = set() if window is None else set(window.columns.params)
        new = [p for p in params if p not in known]
        if new:
            numbers = {p: number for number, p in enumerate(self._all_params())}
            theirs = [numbers[p] for p in new]
            old = [] if window is None else window.columns.params
            check_window_memory_of_ranks([*old, *new], group)
            if window is None:
                window = ShardedWindow(new, theirs, group)
            else:
                saved = window.state()
                if window.num_ranks > 1:
                    saved = gathered_window(saved, window.num_ranks, everywhere=True)
                window = window.grown(new, theirs, group, saved)
            self._window = window
        assert window is not None
        return window

    # State

    def _curvature_state(self) -> dict[str, Any]:
        window = None if self._window is None else self._window.state()
        return {**super()._curvature_state(), _WINDOW: window}

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state; see ``gather_state`` for runs on several ranks."""
        real = self._unwrapped()
        if real is not self:
            return real.state_dict()
        state = super().state_dict()
        window, group = state[STATE_KEY][_WINDOW], self.param_groups[0]
        count = 1 if self._window is None else self._window.num_ranks
        if count > 1 and group["gather_state"]:
            state[STATE_KEY][_WINDOW] = gathered_window(window, count)
        return state

    def _check_state(self, saved: Any) -> None:
        super()._check_state(saved)
        where = f"Cannot load the state into {type(self).__name__}"
        if _WINDOW not in saved[STATE_KEY]:
            raise ValueError(f"{where}: it has no '{_WINDOW}'. The state is cut off.")
        # Other numbers of groups are torch's to refuse.
        for group in saved["param_groups"][:1]:
            check_saved_window(saved[STATE_KEY][_WINDOW], self._all_params(), group, where)
        ids = [index for group in saved["param_groups"] for index in group["params"]]
        for index, p in zip(ids, self._all_params(), strict=False):
            average = saved["state"].get(index, {}).get("momentum_buffer")
            if average is not None:
                name = f"{where}: 'momentum_buffer' of parameter {index}"
                check_finite_tensor(name, average, tuple(p.shape))

    def _finish_loading(self, saved: dict[str, Any]) -> None:
        # The window is not copied on the way: it may take most of the memory.
        rest = {key: value for key, value in saved[STATE_KEY].items() if key != _WINDOW}
        window = saved[STATE_KEY].get(_WINDOW)
        super()._finish_loading({**saved, STATE_KEY: {**rest, _WINDOW: None}})
        self._load_window(window)

    def _load_curvature_state(self, state: dict[str, Any]) -> None:
        super()._load_curvature_state(state)
        self._load_window(state.get(_WINDOW))

    def _load_window(self, saved: dict[str, Any] | None) -> None:
        self._window = None
        if saved is not None:
            params, group = self._all_params(), self.param_groups[0]
            self._window = ShardedWindow.restored(saved, params, group)
