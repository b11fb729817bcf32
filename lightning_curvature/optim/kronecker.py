"""KroneckerOptimizer: gradients times the inverse of a block-diagonal curvature matrix."""

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_curvature import vectors
from lightning_curvature.curvature.kronecker import (
    FACTORS,
    Refreshed,
    State,
    averaged,
    averaged_diagonal,
    multiplied,
    preconditioned,
)
from lightning_curvature.curvature.kronecker_blocks import BlockInfo
from lightning_curvature.curvature.layer_rows import from_matrix, to_matrix
from lightning_curvature.optim.kronecker_layers import KroneckerLayers
from lightning_curvature.oracle.plans import LayerPlan, Plan
from lightning_curvature.oracle.protocol import Oracle

__all__ = ["KroneckerOptimizer"]

_FACTORS, _INVERSES = "factor_update_interval", "inverse_update_interval"


class KroneckerOptimizer(KroneckerLayers):
    """Base of K-FAC and EK-FAC: factors, inverses, and products with them.

    Args:
        params: Parameters or parameter groups.
        defaults: Hyper-parameters, as in `KFAC`.
    """

    @abstractmethod
    def _refreshed_block(self, info: BlockInfo, state: State, damping: Tensor) -> Refreshed:
        """Return a new inverse of a block.

        Args:
            info: The block.
            state: Its state.
            damping: What is added to it.
        """

    # When

    def _in_warmup(self) -> bool:
        return self._steps_done < int(self.param_groups[0]["factor_warmup"])

    def _factors_due(self) -> bool:
        return self._in_warmup() or self._has_new_layers or self._due(_FACTORS)

    def _inverses_due(self) -> bool:
        # Every rank has to answer alike, also about blocks that others invert.
        missing = any(name not in self._inverted for name in self._states)
        return self._in_warmup() or missing or self._due(_INVERSES)

    def _inverts_always(self) -> bool:
        """Whether an inverse serves for one step only, and on this rank."""
        group = self.param_groups[0]
        always = int(group[_INVERSES]) == 1 and _INVERSES not in self._schedules
        full = self._inverse_dtype != torch.bfloat16
        return always and full and group["inverse_sharding"] == "none"

    def plan(self) -> Plan | None:
        """Tell whether and how the coming step looks at the layers."""
        if self._window is None or not self._factors_due():
            return None
        group = self.param_groups[0]
        return LayerPlan(
            seed=int(group["seed"]),
            step=self._steps_done,
            observer=self._window,
            fisher_type=group["fisher_type"],
            num_samples=int(group["mc_samples"]),
            official_empirical_scaling=bool(group["official_empirical_scaling"]),
        )

    # Factors

    def _refresh_factors(self, oracle: Oracle, usable: Tensor, stats: dict[str, Tensor]) -> None:
        """Put the statistics of this step into the averages, unless they are not finite."""
        window = self._window
        assert window is not None
        oracle.see_layers()
        before = len(window.without)
        sums = window.collect(oracle)
        if len(window.without) != before:
            bypassed = ", ".join(window.parts.names[number] for number in sorted(window.without))
            self._say(f"{bypassed} is used without calling its layer; a diagonal takes its place.")
            self._share()
        decay = 1.0 if self._in_warmup() else float(self.param_groups[0]["factor_decay"])
        changes: list[Tensor] = []
        failures: list[Tensor] = []
        for name, found in sums.blocks.items():
            finite = torch.isfinite(found.a_sum.sum() + found.g_sum.sum())
            if found.squares is not None:
                finite = finite & torch.isfinite(found.squares.sum())
            old = self._states.get(name, {})
            watched = {
                key: old[key].clone()
                for key in ("a_factor", "g_factor")
                if key in old and _FACTORS in self._schedules
            }
            new = averaged(old, found, decay, usable & finite, self._factor_dtype)
            failures.append(~finite)
            changes += [
                (new[key] - x).float().norm() / x.float().norm() for key, x in watched.items()
            ]
            self._states[name] = new
            if name in self._unseen:
                # Its inverse is that of nothing but the damping.
                self._unseen.discard(name)
                self._inverted.discard(name)
        for number, squares in sums.diagonals.items():
            finite = torch.isfinite(squares.sum())
            old = self._diagonals.get(number, {})
            sound = usable & finite
            if sums.reached is not None:
                sound = sound & sums.reached[number]
            self._diagonals[number] = averaged_diagonal(old, squares, decay, sound)
            failures.append(~finite)
        drift = torch.stack(changes).mean() if changes else None
        if drift is not None:
            stats["curvature_drift"] = drift
        skipped = self._scalar("skipped_refreshes", stats["grad_norm"])
        failed = torch.stack(failures).any() if failures else torch.zeros_like(usable)
        self._scalars["skipped_refreshes"] = skipped + failed.to(skipped)
        if sums.blocks or sums.diagonals:
            self._start_others(usable)
            self._has_new_layers = False
        if self._due(_FACTORS):
            self._refreshed(_FACTORS, drift)

    def _start_others(self, usable: Tensor) -> None:
        """Give what no known loss leads to a curvature of zero, so that the damping scales it."""
        assert self._window is not None
        nothing = torch.zeros_like(usable)
        params = self._all_params()
        for name, block in self._parts.blocks.items():
            # What has no gradient either is not used at all.
            used = any(params[piece.number].grad is not None for piece in block.pieces)
            if used and name not in self._states:
                sums = self._window.no_sums(block)
                self._states[name] = averaged({}, sums, 1.0, nothing, self._factor_dtype)
                self._unseen.add(name)
        for number in self._parts.diagonal_numbers:
            if params[number].grad is not None and number not in self._diagonals:
                squares = _zeros(params[number])
                self._diagonals[number] = averaged_diagonal({}, squares, 1.0, nothing)

    def _refresh_inverses(self, oracle: Oracle, damping: Tensor, stats: dict[str, Tensor]) -> None:
        """Invert the blocks of this rank, and hear of the others; waits for the device."""
        assert self._shares is not None
        new: dict[str, Refreshed] = {}
        for name in self._shares.own:
            state = self._states.get(name, {})
            if "a_factor" in state:
                new[name] = self._refreshed_block(self._parts.blocks[name], state, damping)
        found, good = self._shares.exchanged(oracle, self._states, new)
        for name, fine in good.items():
            if not fine:
                continue
            self._inverted.add(name)
            if name in found:
                # Nothing old besides the factors: what is kept may be of another kind by now.
                factors = {key: self._states[name][key] for key in FACTORS}
                self._states[name] = {**factors, **found[name]}
        retries = sum(refreshed.retries for refreshed in new.values())
        self._inverse_failures.add([n for n, fine in good.items() if not fine], retries)
        for key, count in self._inverse_failures.counts().items():
            stats[key] = torch.full_like(damping, count)
        assert self._window is not None
        self._window.bases = self._bases()
        if self._due(_INVERSES):
            self._refreshed(_INVERSES, None)

    # Products

    def _blockwise(
        self, params: list[Tensor], values: list[Tensor], damping: Tensor | None, oracle: Oracle
    ) -> list[Tensor]:
        """Multiply a vector with the inverse of the damped matrix, or with the matrix.

        Args:
            params: Parameters the vector has components of.
            values: The vector.
            damping: What is added to the matrix; None to multiply with the matrix itself.
            oracle: Knows the other ranks.
        """
        assert self._shares is not None
        numbers = {id(p): number for number, p in enumerate(self._all_params())}
        own = {numbers[id(p)]: x for p, x in zip(params, values, strict=True)}
        result: dict[int, Tensor] = {}
        names = self._parts.blocks if damping is None else self._shares.applied
        for name in names:
            self._multiply_block(self._parts.blocks[name], own, result, damping)
        if damping is not None and self._shares.memory and oracle.num_ranks > 1:
            order = list(own)
            (parts,) = oracle.mean_vectors(
                [result[n] if n in result else _zeros(own[n]) for n in order]
            )
            result = {n: x * oracle.num_ranks for n, x in zip(order, parts, strict=True)}
        for number, x in own.items():
            state = self._diagonals.get(number)
            if state is None:
                continue
            diagonal = state["diagonal"]
            value = x.to(diagonal.dtype)
            result[number] = value * diagonal if damping is None else value / (diagonal + damping)
        return [result[n] if n in result else _zeros(x) for n, x in own.items()]

    def _multiply_block(
        self,
        block: BlockInfo,
        own: Mapping[int, Tensor],
        result: dict[int, Tensor],
        damping: Tensor | None,
    ) -> None:
        """Multiply the part of a vector that belongs to a block."""
        state = self._states.get(block.name, {})
        numbers = [piece.number for piece in block.pieces]
        unknown = "a_factor" not in state or (
            damping is not None and self._lacks_inverse(block.name)
        )
        if unknown or not any(n in own for n in numbers):
            return
        dtype = vectors.scalar_dtype([own[n] for n in numbers if n in own])
        params = self._all_params()
        parts = [
            (
                piece.of(own[piece.number])
                if piece.number in own
                else torch.zeros_like(piece.of(params[piece.number]))
            ).to(dtype)
            for piece in block.pieces
        ]
        matrix = to_matrix(block.layer, parts[0], parts[1] if block.bias is not None else None)
        if damping is None:
            matrix = multiplied(block, state, matrix)
        else:
            matrix = preconditioned(block, state, matrix, damping)
        found = from_matrix(block.layer, matrix, has_bias=block.bias is not None)
        for piece, value in zip(block.pieces, found, strict=False):
            if piece.number not in own or value is None:
                continue
            if piece.start is None:
                result[piece.number] = _alone(value)
                continue
            if piece.number not in result:
                result[piece.number] = _zeros(own[piece.number])
            piece.of(result[piece.number]).copy_(value)


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros_like(x, dtype=vectors.scalar_dtype([x]))


def _alone(x: Tensor) -> Tensor:
    """Return a contiguous tensor that keeps no memory alive but its own.

    A bias is a contiguous column of a transposed block: as a velocity it would keep all of it.
    """
    x = x.contiguous()
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone()
