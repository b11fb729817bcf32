"""Moves parameters along directions and back, in their own memory or from a copy.

Adding and subtracting the same numbers does not give a float back exactly; half precision loses
1.5 % of the weights' size in a thousand steps. Where there is a copy, displaced values are written
from it, and going home is copying it back.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_curvature.curvature.perturbation import Directions, Piece, put_entries
from lightning_curvature.curvature.rounding import stochastic_round
from lightning_curvature.optim.per_tensor import can_split, split

__all__ = ["HalfPrecision", "Restore", "Storage", "is_half"]

Restore = Literal["fused", "inplace", "snapshot"]
HalfPrecision = Literal["stochastic", "master", "nearest"]


def is_half(tensor: Tensor) -> bool:
    """Tell whether a tensor has half precision."""
    return tensor.dtype in (torch.bfloat16, torch.float16)


class Storage:
    """The values of parameters that are displaced for a while.

    Args:
        directions: Of the parameters.
        restore: "snapshot" keeps a copy; "fused" and "inplace" do not.
        half_precision: How updates of half-precision parameters are kept: "stochastic" rounds them
            at random, "master" keeps float32 copies, "nearest" rounds them away.
        state: The optimizer's state, where float32 copies are kept.
    """

    def __init__(
        self,
        directions: Directions,
        restore: Restore,
        half_precision: HalfPrecision,
        state: dict[Any, Any],
    ) -> None:
        self.directions = directions
        self._stochastic = half_precision == "stochastic"
        self._snapshots: dict[int, Tensor] = {}
        self._masters: dict[int, Tensor] = {}
        for position, p in enumerate(directions.params):
            if is_half(p) and half_precision == "master":
                if "master" not in state[p]:
                    state[p]["master"] = self._whole(position).float().clone()
                self._masters[position] = state[p]["master"]
            elif restore == "snapshot":
                self._snapshots[position] = self._whole(position).clone()
        self._origins = {**self._snapshots, **self._masters}

    def _whole(self, position: int) -> Tensor:
        p, mask = self.directions.params[position].detach(), self.directions.masks.get(position)
        return p if mask is None else p.take(mask)

    def begin(self, positions: Sequence[int] | None = None) -> None:
        """Take the present values for those that will be gone back to.

        Args:
            positions: Of the parameters in question; all by default.
        """
        for position in self._origins if positions is None else positions:
            if position in self._snapshots:
                self._snapshots[position].copy_(self._whole(position))
            elif position in self._masters:
                master, p = self._masters[position], self._whole(position)
                for m, x in split([master, p]) if can_split([master, p]) else [(master, p)]:
                    # Somebody else has changed some since: loaded weights, say.
                    m.copy_(torch.where(m.to(x.dtype) == x, m, x.float()))

    def _origin(self, piece: Piece) -> list[Tensor] | None:
        if piece.positions[0] not in self._origins:
            return None
        return piece.of([self._origins[position] for position in piece.positions])

    def has_copy(self, position: int) -> bool:
        """Tell whether going home costs no draw.

        Args:
            position: Of a parameter.
        """
        return position in self._origins

    def shift(
        self, piece: Piece, noise: list[Tensor], new: float | Tensor, old: float | Tensor
    ) -> None:
        """Move values that are displaced by ``old * noise`` to ``new * noise``.

        Args:
            piece: Where.
            noise: The direction there.
            new: Coefficient wanted.
            old: Coefficient present.
        """
        origin = self._origin(piece)
        length = new - old if origin is None else new
        if isinstance(length, Tensor):
            noise, length = list(torch._foreach_mul(noise, length.to(noise[0].dtype))), 1.0
        if origin is None:
            torch._foreach_add_(piece.values, noise, alpha=length)
        elif length == 0:
            torch._foreach_copy_(piece.values, origin)
        else:
            moved = torch._foreach_add([x.to(noise[0].dtype) for x in origin], noise, alpha=length)
            torch._foreach_copy_(piece.values, list(moved))

    def home(self, positions: list[int]) -> None:
        """Copy parameters back that have a copy.

        Args:
            positions: Of the parameters.
        """
        for position in positions:
            p, mask = self.directions.params[position].detach(), self.directions.masks.get(position)
            if mask is None:
                p.copy_(self._origins[position])
            else:
                put_entries(p, mask, self._origins[position].to(p.dtype))

    def opened(self, piece: Piece) -> list[Tensor]:
        """Return the values of a piece to update, in the precision of the arithmetic.

        Args:
            piece: A piece that is at home.
        """
        origin = self._origin(piece)
        values = piece.values if origin is None else origin
        return [x.float() for x in values] if is_half(values[0]) else values

    def commit(self, piece: Piece, updated: list[Tensor], generator: torch.Generator) -> None:
        """Write updated values into the parameters.

        Args:
            piece: The piece.
            updated: What `opened` returned, changed.
            generator: For random rounding.
        """
        if is_half(piece.values[0]) and piece.positions[0] not in self._masters:
            if self._stochastic:
                rounded = [
                    stochastic_round(new, value.dtype, generator)
                    for value, new in zip(piece.values, updated, strict=True)
                ]
                torch._foreach_copy_(piece.values, rounded)
                return
        elif updated is piece.values:
            return
        torch._foreach_copy_(piece.values, updated)
