"""Shares: which rank inverts which block, and how the others learn of it.

    sharding    inverses of a block        after every refresh          at every step
    "none"      computed on every rank     nothing is sent              nothing is sent
    "compute"   computed on one rank       inverses go to all ranks     nothing is sent
    "memory"    kept on one rank           nothing is sent              preconditioned gradients

The last two are the two ends of KAISA (Pauloski et al., arXiv:2107.01739). What is sent goes
through one sum over the ranks to which all but the owner contribute zeros, so that every rank has
the same numbers bit for bit, whoever computed them.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from lightning_curvature.curvature.assignment import assign, inverse_cost
from lightning_curvature.curvature.kronecker import Refreshed, State, inverse_shapes
from lightning_curvature.curvature.kronecker_blocks import BlockInfo, Side
from lightning_curvature.curvature.packing import pack_symmetric, unpack_symmetric
from lightning_curvature.oracle.protocol import Oracle
from lightning_curvature.oracle.ranks import rank

__all__ = ["InverseSharding", "Shares", "block_cost"]

InverseSharding = Literal["none", "compute", "memory"]


def block_cost(info: BlockInfo) -> float:
    """Return the cost of inverting the factors of a block, in arbitrary units."""

    def of_side(side: Side) -> float:
        return inverse_cost(side.width, info.groups * side.cuts)

    return of_side(info.input) + of_side(info.output)


class Shares:
    """The blocks of this rank.

    Args:
        blocks: All blocks by name, the same on every rank.
        num_ranks: Number of ranks.
        sharding: See the head of this file.
        dtype: Of inverses and eigenvectors.
        in_eigenbasis: See `inverse_shapes`.
        corrected: See `inverse_shapes`.

    Attributes:
        own: Names of the blocks that this rank inverts.
        applied: Names of the blocks that this rank multiplies gradients with.
        memory: Whether inverses stay where they were computed.
    """

    def __init__(
        self,
        blocks: Mapping[str, BlockInfo],
        num_ranks: int,
        sharding: InverseSharding,
        *,
        dtype: torch.dtype,
        in_eigenbasis: bool,
        corrected: bool,
    ) -> None:
        names = list(blocks)
        self._blocks = dict(blocks)
        self._dtype = dtype
        self._kept = {"in_eigenbasis": in_eigenbasis, "corrected": corrected}
        shared = sharding != "none" and num_ranks > 1
        owners = assign([block_cost(blocks[name]) for name in names], num_ranks)
        self._owners = dict(zip(names, owners, strict=True))
        self._shared = shared
        self.memory = shared and sharding == "memory"
        self.own = [n for n in names if not shared or self._owners[n] == rank()]
        self.applied = self.own if self.memory else names

    def exchanged(
        self, oracle: Oracle, states: Mapping[str, State], new: Mapping[str, Refreshed]
    ) -> tuple[dict[str, State], dict[str, bool]]:
        """Return the new inverses that this rank needs, and which could be computed.

        Waits for the device. One collective per dtype if anything is sent.

        Args:
            oracle: Knows the other ranks.
            states: States of the blocks, with factors.
            new: What this rank computed.
        """
        found = {name: refreshed.state for name, refreshed in new.items()}
        if not self._shared:
            return found, _read({name: refreshed.good for name, refreshed in new.items()})
        names = [name for name in self._owners if "a_factor" in states.get(name, {})]
        like = states[names[0]]["positions"] if names else torch.zeros(())
        good = [
            new[name].good.to(like) if name in new else torch.zeros_like(like) for name in names
        ]
        if self.memory:
            (flags,) = oracle.mean_vectors(good)
        else:
            flags = self._sent(oracle, states, names, found, good)
        flags = [flag * oracle.num_ranks for flag in flags]
        return found, _read({n: flag > 0 for n, flag in zip(names, flags, strict=True)})

    def _sent(
        self,
        oracle: Oracle,
        states: Mapping[str, State],
        names: list[str],
        found: dict[str, State],
        good: list[Tensor],
    ) -> list[Tensor]:
        """Send the inverses to all ranks; fill those of others in."""
        places = [
            (name, key, shape)
            for name in names
            for key, shape in inverse_shapes(self._blocks[name], **self._kept).items()
        ]
        own = [
            found[name][key] if name in found else self._zeros(states[name], key, shape)
            for name, key, shape in places
        ]
        halves = [x for x, (_, key, _) in zip(own, places, strict=True) if _is_symmetric(key)]
        whole = [x for x, (_, key, _) in zip(own, places, strict=True) if not _is_symmetric(key)]
        packed = [pack_symmetric(halves)] if halves else []
        packed, whole, good = oracle.mean_vectors(packed, whole, good)
        sums = [unpack_symmetric(x * oracle.num_ranks, halves) for x in packed]
        rest = iter(sums[0] if sums else [])
        others = iter([x * oracle.num_ranks for x in whole])
        for name in names:
            found[name] = {}
        for name, key, _ in places:
            found[name][key] = next(rest) if _is_symmetric(key) else next(others)
        return good

    def _zeros(self, state: State, key: str, shape: tuple[int, ...]) -> Tensor:
        positions = state["positions"]
        matrix = key.endswith(("_inverse", "_vectors"))
        dtype = self._dtype if matrix else positions.dtype
        return torch.zeros(shape, dtype=dtype, device=positions.device)


def _is_symmetric(key: str) -> bool:
    return key.endswith("_inverse")


def _read(good: Mapping[str, Tensor]) -> dict[str, bool]:
    if not good:
        return {}
    values = torch.stack(list(good.values())).tolist()
    return {name: bool(value) for name, value in zip(good, values, strict=True)}
