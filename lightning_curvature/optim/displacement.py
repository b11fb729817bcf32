"""Where the parameters are while a zeroth-order step looks at the loss, and the way back."""

from collections.abc import Callable, Generator, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_curvature.curvature.perturbation import Directions, Piece, put_entries
from lightning_curvature.optim.zeroth_storage import Storage
from lightning_curvature.oracle.extra_pass import version_of

__all__ = ["Displacement", "Point"]


class Point(NamedTuple):
    """Where the loss is looked at: parameters displaced along a direction.

    Attributes:
        sample: Number of the direction within the step.
        coefficient: Multiple of the direction.
        block: Number of the block of parameters that is displaced.
    """

    sample: int
    coefficient: float | Tensor
    block: int = 0


class Displacement:
    """Displaces parameters along random directions and brings them back.

    Args:
        directions: The directions.
        storage: Keeps the values.
        displacing: Returns what parameters are displaced along, of a piece with its noise.

    Attributes:
        directions: The directions.
        storage: Keeps the values.
        step: Number of the optimizer step that directions belong to.
        blocks: Positions of the parameters of each block.
        away: Where the parameters are, None for at home.
        dimension: Number of entries displaced together, of the block that `returning` visits.
    """

    def __init__(
        self,
        directions: Directions,
        storage: Storage,
        displacing: Callable[[Piece], list[Tensor]],
    ) -> None:
        self.directions = directions
        self.storage = storage
        self.step = 0
        self.blocks: list[list[int]] = []
        self.dimension = 0
        self._dimensions: list[int] = []
        self.away: Point | None = None
        self._displacing = displacing

    def begin(self, step: int, blocks: list[list[int]]) -> None:
        """Start a step, if the parameters are not away in it already.

        Args:
            step: Number of the step.
            blocks: Positions of the parameters of each block.
        """
        if self.away is None:
            self.step, self.blocks = step, blocks
            shape = self.directions.shape
            self._dimensions = [sum(shape(i).numel() for i in block) for block in blocks]

    def sweep(self, sample: int, positions: Sequence[int]) -> Generator[Piece, None, None]:
        """Visit parameters with the noise of a direction of the present step.

        Args:
            sample: Number of the direction.
            positions: Which parameters.
        """
        return self.directions.sweep(self.step, sample, positions)

    def whole(self, sample: int, positions: Sequence[int]) -> list[Tensor]:
        """Return a direction of the present step in full, one tensor per parameter.

        Args:
            sample: Number of the direction.
            positions: Which parameters.
        """
        params = self.directions.params
        masks = self.directions.masks
        parts = {i: params[i].new_zeros(self.directions.shape(i)) for i in positions}
        for piece in self.directions.sweep(self.step, sample, positions, write=False):
            torch._foreach_copy_(piece.of([parts[i] for i in piece.positions]), piece.noise)
        found = dict(parts)
        for i in parts.keys() & masks.keys():
            found[i] = torch.zeros_like(params[i])
            put_entries(found[i], masks[i], parts[i])
        return list(found.values())

    def go(self, point: Point) -> None:
        """Displace the parameters to a point.

        Args:
            point: The point.
        """
        away = self.away
        if away is not None and (away.sample, away.block) != (point.sample, point.block):
            self.home()
            away = None
        if away is None:
            self.storage.begin()
        old = 0.0 if away is None else away.coefficient
        self._shift(point.sample, self.blocks[point.block], old, point.coefficient)
        self.away = point

    def home(self) -> None:
        """Bring the parameters back, if they are displaced."""
        away = self.away
        if away is None:
            return
        copied = [i for i in self.blocks[away.block] if self.storage.has_copy(i)]
        rest = [i for i in self.blocks[away.block] if not self.storage.has_copy(i)]
        self.storage.home(copied)
        self._shift(away.sample, rest, away.coefficient, 0.0)
        self.away = None

    def _shift(
        self, sample: int, positions: list[int], old: float | Tensor, new: float | Tensor
    ) -> None:
        done, present = 0, None
        try:
            for piece in self.sweep(sample, positions):
                present = (piece.values[0], version_of(piece.values[0]))
                self.storage.shift(piece, self._displacing(piece), new, old)
                done, present = done + 1, None
        except BaseException:
            done += _has_changed(present)
            # An interrupt, say. What has moved goes back, so that all is where ``away`` says.
            for piece in islice(self.sweep(sample, positions), done):
                self.storage.shift(piece, self._displacing(piece), old, new)
            raise

    def returning(
        self, num_samples: int, positions: Sequence[int], block: int
    ) -> Generator[tuple[Piece, ...], None, None]:
        """Visit parameters with the noise of several directions, and leave them at home.

        A displacement along one of these directions ends as the pieces go by, without a sweep of
        its own. Close the generator, or exhaust it.

        Args:
            num_samples: Number of directions.
            positions: Which parameters; all of one block.
            block: Number of the block.

        Yields:
            The same parts of parameters, once per direction.
        """
        self.dimension = self._dimensions[block]
        away = self.away
        if away is not None and (away.block != block or away.sample >= num_samples):
            self.home()
            away = None
        if away is None:
            # Nothing may have been displaced since somebody else changed the parameters.
            self.storage.begin(positions)
        sweeps = [
            self.directions.sweep(self.step, sample, positions, write=sample == 0)
            for sample in range(num_samples)
        ]
        done, present, is_complete = 0, None, False
        try:
            for pieces in zip(*sweeps, strict=True):
                if away is not None:
                    moved = self._displacing(pieces[away.sample])
                    present = (pieces[0].values[0], version_of(pieces[0].values[0]))
                    self.storage.shift(pieces[0], moved, 0.0, away.coefficient)
                done, present = done + 1, None
                yield pieces
            is_complete = True
        finally:
            done += _has_changed(present)
            # Before others look: what masked parameters hold is written when a sweep goes on.
            for sweep in sweeps:
                sweep.close()
            if away is not None:
                rest = () if is_complete else islice(self.sweep(away.sample, positions), done, None)
                for piece in rest:
                    self.storage.shift(piece, self._displacing(piece), 0.0, away.coefficient)
                self._arrived(block, positions)

    def _arrived(self, block: int, positions: Sequence[int]) -> None:
        """Note that parameters are at home though others of their block may not be yet."""
        gone = set(positions)
        self.blocks[block] = [i for i in self.blocks[block] if i not in gone]
        if not self.blocks[block]:
            self.away = None


def _has_changed(present: tuple[Tensor, int] | None) -> bool:
    """Tell whether values moved though an interrupt came before that was noted."""
    return present is not None and version_of(present[0]) != present[1]
