"""Sparsity patterns: which weights are pruned together, and where they are among the coordinates.

A pattern divides the weights of each layer into groups. Coordinates are put in an order in which
each group that may still be pruned is consecutive and starts at a multiple of its size, so that
blocks of the Fisher matrix whose size is such a multiple never cut one.
"""

import math
import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lightning_curvature.pruning.parameters import PrunableParameters

__all__ = ["Layout", "Pattern", "layout_of"]

# Each needs a solve per group; 8:16, the first of those above, has 12870.
_MAX_SUBSETS = 1000
# The inverse of the Fisher matrix has this many squared entries per group.
_MAX_BLOCK = 1024


@dataclass(frozen=True)
class Pattern:
    """What is pruned together.

    Attributes:
        name: "unstructured", "N:M" or "RxC".
        size: Weights in a group, 1 for "unstructured".
        num_kept: Weights of a group that stay when it is pruned: N, or 0.
        block: Outputs and inputs of a group.

    Examples:
        >>> Pattern.parse("2:4")
        Pattern(name='2:4', size=4, num_kept=2, block=(1, 4))
    """

    name: str
    size: int = 1
    num_kept: int = 0
    block: tuple[int, int] = (1, 1)

    @classmethod
    def parse(cls, text: str) -> "Pattern":
        """Read a pattern.

        Args:
            text: "unstructured"; "N:M" keeps N of M weights that are consecutive along the inputs
                of one output, such as "2:4"; "RxC" prunes whole blocks of R outputs and C inputs,
                such as "4x1". Kernel positions of convolutions are apart.

        Raises:
            ValueError: If it is none of these, or too large.
        """
        if text == "unstructured":
            return cls(text)
        found = re.fullmatch(r"([1-9]\d*)([:x])([1-9]\d*)", str(text))
        if found is None:
            raise ValueError(
                f"Invalid pattern={text!r}: must be 'unstructured', 'N:M' such as '2:4', or 'RxC' "
                "such as '4x1'."
            )
        first, last = int(found[1]), int(found[3])
        if found[2] == "x":
            if first * last > _MAX_BLOCK:
                raise ValueError(
                    f"Invalid pattern={text!r}: a block has at most {_MAX_BLOCK} weights."
                )
            return cls(text, first * last, 0, (first, last))
        if first >= last:
            raise ValueError(f"Invalid pattern={text!r}: must keep fewer weights than there are.")
        subsets = math.comb(last, first)
        if subsets > _MAX_SUBSETS:
            raise ValueError(
                f"Invalid pattern={text!r}: there are {subsets} ways to keep {first} of {last} "
                f"weights, all of which are compared; at most {_MAX_SUBSETS} are allowed."
            )
        return cls(text, last, first, (1, last))

    @property
    def max_sparsity(self) -> float:
        """Sparsity once every group is pruned."""
        return (self.size - self.num_kept) / self.size


@dataclass(frozen=True)
class Layout:
    """Order of the coordinates, and the groups among them.

    Attributes:
        positions: Position of each coordinate in the vector of all weights, -1 for one that only
            fills a gap, int64 ``[d]``. Every survivor appears once.
        first: First coordinate of each group, int64 ``[n]``, ascending.
        size: Coordinates per group; they are consecutive.
        layer: Number of the parameter that each group belongs to, int64 ``[n]``.
        dense: Number of weights per parameter that no group contains.
    """

    positions: Tensor
    first: Tensor
    size: int
    layer: Tensor
    dense: list[int]

    def groups(self) -> Tensor:
        """Return the coordinates of each group, int64 ``[n, size]``."""
        return self.first[:, None] + torch.arange(self.size, device=self.first.device)

    def filled(self, num_columns: int) -> "Layout":
        """Return the same with at least so many coordinates."""
        missing = num_columns - len(self.positions)
        if missing <= 0:
            return self
        return replace(self, positions=_extended(self.positions, missing))


def layout_of(parameters: PrunableParameters, pattern: Pattern) -> Layout:
    """Return coordinates and groups that may still be pruned.

    Groups already decided are none: those of which nothing is left to prune. Their survivors are
    coordinates as any other, behind the groups of the same layer. A weight that is gone from an
    undecided group leaves a gap in it.

    Weights that do not fill a group stay dense: the last columns of a layer whose width is not
    divisible, for blocks also its last rows, and parameters of less than two dimensions.

    Args:
        parameters: The weights and what is pruned of them.
        pattern: What is pruned together.
    """
    keep = parameters.keep()
    if pattern.size == 1:
        survivors = keep.nonzero().view(-1)
        edges = torch.tensor(parameters.offsets()[1:], device=keep.device)
        layer = torch.bucketize(survivors, edges, right=True)
        return Layout(
            survivors, torch.arange(len(survivors), device=keep.device), 1, layer, [0] * len(edges)
        )
    positions, first, layers, dense = [], [], [], []
    start = 0
    owners = zip(parameters.owners(), parameters.tensors(), parameters.offsets(), strict=False)
    for number, ((module, _), parameter, offset) in enumerate(owners):
        kept = keep[offset : offset + parameter.numel()]
        groups = _groups(module, parameter.shape, pattern).to(keep.device)
        alive = kept[groups]
        undecided = alive.sum(1) > pattern.num_kept
        groups, alive = groups[undecided], alive[undecided]
        rest = kept.clone()
        rest[groups.view(-1)] = False
        single = rest.nonzero().view(-1) + offset
        grouped = torch.where(alive, groups + offset, -1).view(-1)
        first.append(torch.arange(len(groups), device=keep.device) * pattern.size + start)
        layers.append(torch.full((len(groups),), number, device=keep.device))
        positions += [grouped, _extended(single, -len(single) % pattern.size)]
        start += len(positions[-2]) + len(positions[-1])
        dense.append(parameter.numel() - int(undecided.numel()) * pattern.size)
    return Layout(torch.cat(positions), torch.cat(first), pattern.size, torch.cat(layers), dense)


def _extended(positions: Tensor, missing: int) -> Tensor:
    return torch.cat([positions, positions.new_full((missing,), -1)])


def _groups(module: nn.Module, shape: torch.Size, pattern: Pattern) -> Tensor:
    """Return the groups of a parameter as positions in it when flattened, int64 ``[n, size]``."""
    grid = _grid(module, shape)
    rows, columns = pattern.block
    outputs, inputs = grid.shape[0] // rows, grid.shape[2] // columns
    whole = grid[: outputs * rows, :, : inputs * columns]
    blocks = whole.reshape(outputs, rows, grid.shape[1], inputs, columns)
    return blocks.permute(0, 2, 3, 1, 4).reshape(-1, pattern.size)


def _grid(module: nn.Module, shape: torch.Size) -> Tensor:
    """Return positions in a flattened parameter as ``[outputs, kernel positions, inputs]``."""
    index = torch.arange(math.prod(shape))
    if len(shape) < 2:  # noqa: PLR2004 - rows and columns
        return index.new_empty(0, 1, 0)
    if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        # Stored as (inputs, outputs of one group, kernel); each group reads its own inputs.
        count = module.groups
        split = index.view(count, shape[0] // count, shape[1], -1)
        return split.permute(0, 2, 3, 1).reshape(count * shape[1], -1, shape[0] // count)
    return index.view(shape[0], shape[1], -1).transpose(1, 2)
