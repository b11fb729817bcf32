"""How much memory a block-diagonal curvature matrix takes, before anything is allocated."""

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_curvature import vectors
from lightning_curvature.curvature.kronecker import inverse_shapes
from lightning_curvature.curvature.kronecker_blocks import BlockInfo, Blocks, Side
from lightning_curvature.curvature.kronecker_shares import Shares

__all__ = ["MemoryEstimate", "estimate_memory"]

_NAMED = 3
_GIGABYTE = 1e9
# Share of the free memory above which the user is told: activations want some, too.
_TOO_MUCH = 0.8


class MemoryEstimate(NamedTuple):
    """Bytes that stay allocated on this rank.

    Attributes:
        factors: Running averages of the factors.
        inverses: Inverses, or eigenbases with eigenvalues.
        diagonals: Diagonals of what has no block.
        momentum: The last update.
        largest: Names of the largest blocks with their bytes.
    """

    factors: int
    inverses: int
    diagonals: int
    momentum: int
    largest: tuple[tuple[str, int], ...]

    @property
    def total(self) -> int:
        """All of it."""
        return self.factors + self.inverses + self.diagonals + self.momentum

    def __str__(self) -> str:
        """Say it in words."""
        largest = ", ".join(f"{name} {_text(size)}" for name, size in self.largest)
        return (
            f"{_text(self.total)} of state: factors {_text(self.factors)}, inverses "
            f"{_text(self.inverses)}, diagonals {_text(self.diagonals)}, momentum "
            f"{_text(self.momentum)}. Largest blocks: {largest or 'none'}."
        )

    def warn_if_too_large(self, name: str, device: torch.device) -> None:
        """Warn if it will hardly fit into the free memory of a device.

        Args:
            name: Name of the optimizer.
            device: Device of the parameters.
        """
        free = _free_memory(device)
        if free is not None and self.total > _TOO_MUCH * free:
            warnings.warn(
                f"{name} needs {self} Only {_text(free)} are free on {device}. Lower "
                "max_factor_dim, set factor_dtype and inverse_dtype to 'bfloat16', or train fewer "
                "layers with it.",
                RuntimeWarning,
                stacklevel=3,
            )


def _text(size: float) -> str:
    for unit, factor in (("GB", _GIGABYTE), ("MB", 1e6)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size / 1e3:.1f} kB"


def _free_memory(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    return int(torch.cuda.mem_get_info(device)[0])


def estimate_memory(
    parts: Blocks,
    params: Sequence[Tensor],
    shares: Shares,
    *,
    factor_dtype: torch.dtype,
    inverse_dtype: torch.dtype,
    in_eigenbasis: bool,
    corrected: bool,
) -> MemoryEstimate:
    """Return what factors, inverses, diagonals and momentum take on this rank.

    Args:
        parts: Blocks and the rest.
        params: Parameters of the optimizer.
        shares: The blocks of this rank.
        factor_dtype: In which factors are kept.
        inverse_dtype: In which inverses and eigenvectors are kept.
        in_eigenbasis: See `inverse_shapes`.
        corrected: See `inverse_shapes`.
    """
    precise = vectors.scalar_dtype(params).itemsize
    kept = set(shares.own) if shares.memory else set(parts.blocks)
    factors, inverses = {}, {}
    for name, block in parts.blocks.items():
        shapes = inverse_shapes(block, in_eigenbasis=in_eigenbasis, corrected=corrected)
        size = sum(
            math.prod(shape) * (inverse_dtype.itemsize if _is_matrix(key) else precise)
            for key, shape in shapes.items()
        )
        factors[name] = _factor_numbers(block) * factor_dtype.itemsize
        inverses[name] = size if name in kept else 0
    covered = {piece.number for block in parts.blocks.values() for piece in block.pieces}
    rest = [p for number, p in enumerate(params) if number not in covered and p.requires_grad]
    sizes = {name: factors[name] + inverses[name] for name in factors}
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:_NAMED]
    return MemoryEstimate(
        sum(factors.values()),
        sum(inverses.values()),
        sum(p.numel() for p in rest) * precise,
        sum(p.numel() * max(p.element_size(), 4) for p in params if p.requires_grad),
        tuple(largest),
    )


def _is_matrix(key: str) -> bool:
    return key.endswith(("_inverse", "_vectors"))


def _factor_numbers(block: BlockInfo) -> int:
    def of_side(side: Side) -> int:
        return side.cuts * side.width**2

    return block.groups * (of_side(block.input) + of_side(block.output))
