"""KroneckerOptimizer: gradients times the inverse of a block-diagonal curvature matrix."""

import logging
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_curvature import vectors
from lightning_curvature.curvature.factor_window import FactorWindow
from lightning_curvature.curvature.kronecker import (
    FACTORS,
    Refreshed,
    State,
    averaged,
    averaged_diagonal,
    basis_of,
    multiplied,
    preconditioned,
)
from lightning_curvature.curvature.kronecker_blocks import BlockInfo, Blocks
from lightning_curvature.curvature.kronecker_memory import MemoryEstimate, estimate_memory
from lightning_curvature.curvature.kronecker_shares import Shares
from lightning_curvature.curvature.kronecker_sums import Basis
from lightning_curvature.curvature.layer_rows import from_matrix, to_matrix
from lightning_curvature.optim.damped import DampedOptimizer
from lightning_curvature.optim.inverse_failures import InverseFailures
from lightning_curvature.optim.saved_blocks import (
    check_saved_blocks,
    entries_of,
    moved,
    states_of,
)
from lightning_curvature.optim.saved_state import STATE_KEY
from lightning_curvature.oracle.plans import LayerPlan, Plan
from lightning_curvature.oracle.protocol import Oracle
from lightning_curvature.oracle.ranks import rank
from lightning_curvature.oracle.replay import is_compiled

__all__ = ["KroneckerOptimizer"]

_FACTORS, _INVERSES = "factor_update_interval", "inverse_update_interval"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_log = logging.getLogger(__name__)


class KroneckerOptimizer(DampedOptimizer):
    """Base of K-FAC and EK-FAC: everything about the curvature matrix.

    Args:
        params: Parameters or parameter groups.
        defaults: Hyper-parameters, as in `KFAC`.
    """

    asks = frozenset({"loss", "directional", "layers", "sampled"})
    state_names: ClassVar[tuple[str, ...]] = ("velocity",)

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self._forget_layers()
        self._states: dict[str, State] = {}
        self._diagonals: dict[int, State] = {}
        # Of a checkpoint, until it is known whose they are.
        self._saved: dict[str, Any] | None = None
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickle or deep copy; it has to be attached anew."""
        if "_window" not in self.__dict__:
            self._forget_layers()
            self._states, self._diagonals, self._saved = {}, {}, None
        super().__setstate__(state)

    def _forget_layers(self) -> None:
        self._window: FactorWindow | None = None
        self._compiled = False
        self._shares: Shares | None = None
        # Blocks that some rank has an inverse of.
        self._inverted: set[str] = set()
        # Blocks that no known loss has led to.
        self._unseen: set[str] = set()
        self._has_new_layers = False
        self._inverse_failures = InverseFailures(type(self).__name__)

    # Attaching

    def attach(self, oracle: Oracle) -> None:
        """Give the optimizer the oracle it will ask, and watch the layers of its module.

        Args:
            oracle: Oracle over the parameters of this optimizer.

        Raises:
            MissingCapabilityError: If the oracle does not know the module.
            ValueError: If a loaded state belongs to other layers.
        """
        real = self._unwrapped()
        if real is not self:
            real.attach(oracle)
            return
        self._require_module(oracle)
        super().attach(oracle)
        try:
            self._watch(oracle)
        except BaseException:
            self.detach()
            raise
        self._tell()

    def detach(self) -> None:
        """Remove the oracle and the hooks on the layers."""
        if self._unwrapped() is self and self._window is not None and self._saved is None:
            self._saved = self._entries()
        super().detach()
        if self._unwrapped() is self:
            self._forget_layers()

    def _watch(self, oracle: Oracle) -> None:
        """Install the hooks and find the blocks of a loaded state."""
        assert oracle.module is not None
        group = self.param_groups[0]
        self._compiled = is_compiled(oracle.module)
        without = frozenset() if self._saved is None else frozenset(self._saved["bypassed"])
        self._window = FactorWindow(
            oracle.module,
            self._all_params(),
            self._watches_main_pass,
            max_factor_dim=group["max_factor_dim"],
            kfac_approx=group["kfac_approx"],
            factor_dtype=_DTYPES.get(group["factor_dtype"]),
            without=without,
            settled=self._saved is not None and bool(self._saved["blocks"]),
        )
        oracle.attachments.append(self._window)
        if self._saved is not None:
            where = self._cannot_load
            self._states, self._diagonals = states_of(
                self._window.parts, self._saved, self._all_params(), where=where
            )
            self._saved = None
        self._share()

    def _share(self) -> None:
        assert self._window is not None
        assert self.oracle is not None
        known = self._window.parts.blocks
        self._states = {name: state for name, state in self._states.items() if name in known}
        self._window.bases = self._bases()
        self._shares = Shares(
            known,
            self.oracle.num_ranks,
            self.param_groups[0]["inverse_sharding"],
            dtype=self._inverse_dtype,
            in_eigenbasis=self._in_eigenbasis,
            corrected=self._corrected,
        )
        # A checkpoint has the inverses of one rank; here nobody knows what others have.
        sure = [] if self._shares.memory else list(self._states)
        self._inverted = {name for name in sure if not self._lacks_inverse(name)}
        masses = {name: state["mass"] for name, state in self._states.items()}
        self._unseen = {n for n, x in masses.items() if not x.is_meta and float(x) == 0}

    def _bases(self) -> dict[str, Basis | None]:
        """Return where squared gradients are summed up; the same on every rank."""
        if not self._corrected:
            return {}
        return {name: basis_of(state) for name, state in self._states.items()}

    @property
    def _parts(self) -> Blocks:
        assert self._window is not None
        return self._window.parts

    @property
    def fallback_parameters(self) -> list[str]:
        """Names of the parameters that are in no layer's block; empty while nothing is attached."""
        real = self._unwrapped()
        assert isinstance(real, KroneckerOptimizer)
        if real._window is None:
            return []
        return [real._parts.names[number] for number in real._parts.fallback]

    def memory_estimate(self) -> MemoryEstimate:
        """Return how much memory factors, inverses and momentum take on this rank, in bytes.

        Raises:
            RuntimeError: If no model is attached.
        """
        real = self._unwrapped()
        assert isinstance(real, KroneckerOptimizer)
        if real._window is None or real._shares is None:
            raise RuntimeError(
                f"{type(real).__name__} does not know the layers yet: attach a model first."
            )
        return estimate_memory(
            real._parts,
            real._all_params(),
            real._shares,
            factor_dtype=real._factor_dtype,
            inverse_dtype=real._inverse_dtype,
            corrected=real._corrected,
            in_eigenbasis=real._in_eigenbasis,
        )

    def _tell(self) -> None:
        """Log what there is to know before the first batch; warn if it will not fit."""
        name, parts = type(self).__name__, self._parts
        estimate = self.memory_estimate()
        if rank() == 0:
            _log.info(f"{name}: {estimate}")
        estimate.warn_if_too_large(name, self._all_params()[0].device)
        if parts.fallback:
            lines = ", ".join(f"{parts.names[n]} ({of})" for n, of in parts.fallback.items())
            self._say(f"no layer block, a diagonal instead, for {lines}.")
        for block in parts.blocks.values():
            for label, side in (("input", block.input), ("output", block.output)):
                if side.kind != "dense" and not (block.is_embedding and label == "input"):
                    kept = "its diagonal" if side.kind == "diagonal" else f"{side.cuts} blocks"
                    self._say(
                        f"the {label} factor of {block.name} has {side.size} rows, more than "
                        f"max_factor_dim; {kept} of it are kept."
                    )

    def _say(self, text: str) -> None:
        """Tell the user, on one rank, what is otherwise than usual."""
        if rank() == 0:
            _log.warning(f"{type(self).__name__}: {text}")

    # What a step needs

    @property
    def _corrected(self) -> bool:
        """Whether the eigenvalues are corrected."""
        return False

    @property
    @abstractmethod
    def _in_eigenbasis(self) -> bool:
        """Whether eigenbases are kept instead of inverses."""

    @abstractmethod
    def _refreshed_block(self, info: BlockInfo, state: State, damping: Tensor) -> Refreshed:
        """Return a new inverse of a block.

        Args:
            info: The block.
            state: Its state.
            damping: What is added to it.
        """

    @property
    def _factor_dtype(self) -> torch.dtype:
        return self._chosen_dtype("factor_dtype")

    @property
    def _inverse_dtype(self) -> torch.dtype:
        return self._chosen_dtype("inverse_dtype")

    def _chosen_dtype(self, name: str) -> torch.dtype:
        chosen = _DTYPES.get(self.param_groups[0][name])
        return vectors.scalar_dtype(self._all_params()) if chosen is None else chosen

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

    def _lacks_inverse(self, name: str) -> bool:
        state = self._states[name]
        kept = ("a_inverse", "a_cholesky", "a_values")
        return "a_factor" in state and not any(key in state for key in kept)

    def _watches_main_pass(self) -> bool:
        # Hooks inside a compiled region are unreliable: there an extra pass is made.
        return not self._compiled and self._factors_due()

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

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; its layers count from the next refresh on.

        Args:
            param_group: As for every torch optimizer.

        Raises:
            ValueError: If an argument is out of range, or differs from the other groups though it
                is one value for all.
        """
        super().add_param_group(param_group)
        self._find_layers()

    def _find_layers(self) -> None:
        """Look whether there are other parameters, or some are trained by now that were not.

        Some callbacks write to ``param_groups``, and anybody to ``requires_grad``.
        """
        if self._window is None or self.oracle is None:
            return
        params = self._all_params()
        same = [id(p) for p in self._window.params] == [id(p) for p in params]
        trained = {number for number, p in enumerate(params) if p.requires_grad}
        if same and trained <= self._window.trained:
            return
        old = {id(p): number for number, p in enumerate(self._window.params)}
        before = self._covered_by()
        kept = {
            id(p): self._diagonals[old[id(p)]]
            for p in self._all_params()
            if old.get(id(p)) in self._diagonals
        }
        self._watch_anew()
        now = self._covered_by()
        # A layer that was without its bias has other factors with it.
        unchanged = [name for name in self._states if now.get(name) == before.get(name)]
        self._has_new_layers = True
        self._states = {name: self._states[name] for name in unchanged}
        self._diagonals = {
            number: kept[id(p)] for number, p in enumerate(self._all_params()) if id(p) in kept
        }
        self._share()

    def _covered_by(self) -> dict[str, list[tuple[int, int | None, int | None]]]:
        """Return what parts of which parameters are in each block."""
        assert self._window is not None
        params = self._window.params
        return {
            name: [(id(params[part.number]), part.start, part.stop) for part in block.pieces]
            for name, block in self._parts.blocks.items()
        }

    def _watch_anew(self) -> None:
        """Install the hooks again, for other parameters or another state."""
        assert self._window is not None
        assert self.oracle is not None
        self.oracle.attachments.remove(self._window)
        self._window.close()
        self._watch(self.oracle)

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
        covered = {p.number for block in self._parts.blocks.values() for p in block.pieces}
        for number, x in own.items():
            state = self._diagonals.get(number)
            if number in covered or state is None:
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

    # State

    def _curvature_state(self) -> dict[str, Any]:
        self._find_layers()
        state = super()._curvature_state()
        if self._saved is not None:
            return {**state, **self._saved}
        return {**state, **self._entries()}

    def _entries(self) -> dict[str, Any]:
        if self._window is None:
            return {"blocks": {}, "diagonals": {}, "bypassed": []}
        return entries_of(self._parts, self._states, self._diagonals, self._window.without)

    def _load_curvature_state(self, state: dict[str, Any]) -> None:
        super()._load_curvature_state(state)
        self._saved = moved(state, self._all_params())
        self._states, self._diagonals = {}, {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; dtypes are kept and tensors move to the parameters' device.

        Args:
            state_dict: What `state_dict` returned.

        Raises:
            ValueError: If the state is damaged, or belongs to another optimizer, another model or
                a newer version; the present state is then left as it was.
        """
        super().load_state_dict(state_dict)
        if self._unwrapped() is self and self._window is not None:
            self._watch_anew()

    def _check_state(self, saved: Any) -> None:
        super()._check_state(saved)
        self._find_layers()
        params = self._all_params()
        own, groups = saved[STATE_KEY], saved["param_groups"]
        if not groups or sum(len(group["params"]) for group in groups) != len(params):
            return  # torch refuses that
        check_saved_blocks(own, len(params), corrected=self._corrected, where=self._cannot_load)
        if self._window is not None:
            parts = self._window.parts_without(
                frozenset(own["bypassed"]), int(groups[0]["max_factor_dim"])
            )
            states_of(parts, own, params, where=self._cannot_load)

    @property
    def _cannot_load(self) -> str:
        return f"Cannot load the state into {type(self).__name__}"


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros_like(x, dtype=vectors.scalar_dtype([x]))


def _alone(x: Tensor) -> Tensor:
    """Return a contiguous tensor that keeps no memory alive but its own.

    A bias is a contiguous column of a transposed block: as a velocity it would keep all of it.
    """
    x = x.contiguous()
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone()
