"""KroneckerLayers: which layers K-FAC and EK-FAC watch, and the state they keep for them."""

import logging
from abc import abstractmethod
from typing import Any, ClassVar

import torch

from lightning_curvature import vectors
from lightning_curvature.curvature.factor_window import FactorWindow
from lightning_curvature.curvature.kronecker import State, basis_of
from lightning_curvature.curvature.kronecker_blocks import Blocks
from lightning_curvature.curvature.kronecker_memory import MemoryEstimate, estimate_memory
from lightning_curvature.curvature.kronecker_shares import Shares
from lightning_curvature.curvature.kronecker_sums import Basis
from lightning_curvature.optim.damped import DampedOptimizer
from lightning_curvature.optim.inverse_failures import InverseFailures
from lightning_curvature.optim.saved_blocks import (
    check_saved_blocks,
    entries_of,
    moved,
    states_of,
)
from lightning_curvature.optim.saved_state import STATE_KEY
from lightning_curvature.oracle.protocol import Oracle
from lightning_curvature.oracle.ranks import rank
from lightning_curvature.oracle.replay import is_compiled

__all__ = ["KroneckerLayers"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_log = logging.getLogger(__name__)


class KroneckerLayers(DampedOptimizer):
    """Base of `KroneckerOptimizer`: attaching to a model, and checkpoints.

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

    # What kind of matrix it is

    @property
    def _corrected(self) -> bool:
        """Whether the eigenvalues are corrected."""
        return False

    @property
    @abstractmethod
    def _in_eigenbasis(self) -> bool:
        """Whether eigenbases are kept instead of inverses."""

    @property
    def _factor_dtype(self) -> torch.dtype:
        return self._chosen_dtype("factor_dtype")

    @property
    def _inverse_dtype(self) -> torch.dtype:
        return self._chosen_dtype("inverse_dtype")

    def _chosen_dtype(self, name: str) -> torch.dtype:
        chosen = _DTYPES.get(self.param_groups[0][name])
        return vectors.scalar_dtype(self._all_params()) if chosen is None else chosen

    @abstractmethod
    def _factors_due(self) -> bool:
        """Tell whether the coming step looks at the layers."""

    def _lacks_inverse(self, name: str) -> bool:
        state = self._states[name]
        kept = ("a_inverse", "a_cholesky", "a_values")
        return "a_factor" in state and not any(key in state for key in kept)

    def _watches_main_pass(self) -> bool:
        # Hooks inside a compiled region are unreliable: there an extra pass is made.
        return not self._compiled and self._factors_due()

    # Attaching

    def detach(self) -> None:
        """Remove the oracle and the hooks on the layers."""
        if self._unwrapped() is self and self._window is not None and self._saved is None:
            self._saved = self._entries()
        super().detach()
        if self._unwrapped() is self:
            self._forget_layers()

    def _watch(self, oracle: Oracle) -> None:
        self._watch_layers(oracle)
        self._tell()

    def _watch_layers(self, oracle: Oracle) -> None:
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
        assert isinstance(real, KroneckerLayers)
        if real._window is None:
            return []
        return [real._parts.names[number] for number in real._parts.fallback]

    def memory_estimate(self) -> MemoryEstimate:
        """Return how much memory factors, inverses and momentum take on this rank, in bytes.

        Raises:
            RuntimeError: If no model is attached.
        """
        real = self._unwrapped()
        assert isinstance(real, KroneckerLayers)
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
            id(p): self._diagonals[old[id(p)]] for p in params if old.get(id(p)) in self._diagonals
        }
        self._watch_anew()
        now = self._covered_by()
        # A layer that was without its bias has other factors with it.
        unchanged = [name for name in self._states if now.get(name) == before.get(name)]
        self._has_new_layers = True
        self._states = {name: self._states[name] for name in unchanged}
        found = ((n, kept.get(id(params[n]))) for n in self._parts.diagonal_numbers)
        self._diagonals = {number: state for number, state in found if state is not None}
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
        self._watch_layers(self.oracle)

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
