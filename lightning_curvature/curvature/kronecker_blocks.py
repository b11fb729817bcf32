"""Which blocks the curvature matrix is cut into: one per layer, and what is left over.

A block is the weight of a layer, with its bias if it has one, seen as a matrix. Layers that share a
weight, and layers used several times, have one block. What has no block of its own is scaled by a
diagonal, and named.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_curvature.curvature.attention_calls import PROJECTIONS
from lightning_curvature.curvature.layer_rows import (
    KRONECKER_LAYERS,
    SCALE_LAYERS,
    matrix_shape,
)

__all__ = ["BlockInfo", "Blocks", "Piece", "Scale", "Side", "find_blocks"]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

SideKind = Literal["dense", "blocked", "diagonal"]
# How a layer makes rows of its input, besides the shape of its matrix. What one has not, none of
# its type has.
_GEOMETRY = ("stride", "padding", "dilation", "padding_mode", "output_padding", "padding_idx")
# A side larger than the limit is cut into at most that many blocks; beyond it goes diagonal.
_MAX_CUTS = 8


class Side(NamedTuple):
    """One of the two sides of a block, and how much of its factor is kept.

    Attributes:
        size: Number of rows of the factor.
        cuts: Number of diagonal blocks it is cut into: 1 for a dense factor, ``size`` for a
            diagonal one.
    """

    size: int
    cuts: int

    @property
    def width(self) -> int:
        """Rows of each diagonal block; the last one may be filled up with zeros."""
        return -(-self.size // self.cuts)

    @property
    def filled(self) -> int:
        """Rows of all diagonal blocks together."""
        return self.cuts * self.width

    @property
    def kind(self) -> SideKind:
        """How much of the factor is kept."""
        if self.cuts == 1:
            return "dense"
        return "diagonal" if self.width == 1 else "blocked"


class Piece(NamedTuple):
    """A parameter of the optimizer, or some of its rows.

    Attributes:
        number: Number of the parameter in the order of the optimizer.
        start: First row; None for the whole parameter.
        stop: Row after the last one.
    """

    number: int
    start: int | None = None
    stop: int | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """Return the rows of a tensor that has the shape of the parameter, as a view."""
        return tensor if self.start is None else tensor[self.start : self.stop]


class BlockInfo(NamedTuple):
    """A block.

    Attributes:
        name: Its name, that of the first of its layers.
        calls: Names under which calls of its layers are recorded.
        layer: One of its layers, or a stand-in of the same geometry.
        weight: The weight.
        bias: The bias, None if the block has none.
        groups: Number of independent parts, those of a grouped convolution.
        output: Side of the outputs of one part.
        input: Side of the inputs of one part, with a last one for the bias.
    """

    name: str
    calls: tuple[str, ...]
    layer: nn.Module
    weight: Piece
    bias: Piece | None
    groups: int
    output: Side
    input: Side

    @property
    def pieces(self) -> list[Piece]:
        """Weight and bias."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    @property
    def is_embedding(self) -> bool:
        """Whether its inputs are indices."""
        return isinstance(self.layer, nn.Embedding)


class Scale(NamedTuple):
    """A layer that multiplies and shifts, of which the diagonal is known per example.

    Attributes:
        layer: A normalization layer, or a transposed convolution, of which this is the bias.
        weight: Number of the weight among the parameters, None if there is none to train.
        bias: Likewise.
    """

    layer: nn.Module
    weight: int | None
    bias: int | None


class Blocks(NamedTuple):
    """All parts of the curvature matrix.

    Attributes:
        blocks: Blocks by name.
        scales: Layers with a diagonal of their own by name.
        fallback: For every parameter that is in neither, by number, what it belongs to. Its
            diagonal comes from gradients of whole batches.
        names: Names of the parameters of the optimizer by number.
        layers: Layers to record by name.
        attentions: Attention layers to record by name.
    """

    blocks: dict[str, BlockInfo]
    scales: dict[str, Scale]
    fallback: dict[int, str]
    names: dict[int, str]
    layers: dict[str, nn.Module]
    attentions: dict[str, nn.MultiheadAttention]

    @property
    def diagonal_numbers(self) -> list[int]:
        """Numbers of the parameters that have a diagonal instead of a block."""
        numbers = list(self.fallback)
        for scale in self.scales.values():
            numbers += [n for n in (scale.weight, scale.bias) if n is not None]
        return numbers


class _Candidate(NamedTuple):
    name: str
    layer: nn.Module
    weight: Piece
    bias: Piece | None

    def is_like(self, other: "_Candidate") -> bool:
        same = type(self.layer) is type(other.layer)
        return (
            same
            and matrix_shape(self.layer) == matrix_shape(other.layer)
            and _geometry(self.layer) == _geometry(other.layer)
            and self.bias == other.bias
        )


def _geometry(layer: nn.Module) -> list[object]:
    return [getattr(layer, name, None) for name in _GEOMETRY]


def find_blocks(
    module: nn.Module,
    params: Sequence[Tensor],
    *,
    max_factor_dim: int = 8192,
    kinds: tuple[type[nn.Module], ...] = KRONECKER_LAYERS,
    without: frozenset[int] = frozenset(),
) -> Blocks:
    """Cut the parameters of an optimizer into blocks.

    Args:
        module: Module that holds the parameters.
        params: Parameters of the optimizer, in its order.
        max_factor_dim: Largest number of rows of a dense factor. A larger one is cut into up to 8
            diagonal blocks, one still larger is kept as a diagonal.
        kinds: Classes of the layers that get a block, out of the known ones.
        without: Numbers of parameters whose layers get no block.
    """
    numbers = {id(p): number for number, p in enumerate(params) if p.requires_grad}
    owners: dict[int, str] = {}
    names: dict[int, str] = {}
    # In how many places a parameter is. What a parametrization computes is nobody's parameter.
    places: Counter[int] = Counter()
    for prefix, layer in module.named_modules():
        for role, p in layer._parameters.items():
            if p is not None and id(p) in numbers:
                number = numbers[id(p)]
                places[number] += 1
                names.setdefault(number, f"{prefix}.{role}" if prefix else role)
                owners.setdefault(number, type(layer).__name__)
    candidates = [c for c in _candidates(module, numbers, kinds) if c.weight.number not in without]
    blocks = {
        same[0].name: _block(same, places, max_factor_dim) for same in _grouped(candidates, places)
    }
    taken = {piece.number for block in blocks.values() for piece in block.pieces}
    scales = dict(_scales(module, numbers, places, taken))
    taken |= {n for s in scales.values() for n in (s.weight, s.bias) if n is not None}
    fallback = {number: owners[number] for number in sorted(names) if number not in taken}
    recorded = {call for block in blocks.values() for call in block.calls} | set(scales)
    layers = {name: layer for name, layer in module.named_modules() if name in recorded}
    attentions = {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.MultiheadAttention)
        and any(f"{name}.{role}" in recorded for role in PROJECTIONS)
    }
    # The projection of an attention layer is a layer by name, but its forward never runs.
    layers = {
        name: layer
        for name, layer in layers.items()
        if not isinstance(layer, NonDynamicallyQuantizableLinear)
    }
    return Blocks(blocks, scales, fallback, names, layers, attentions)


def _candidates(
    module: nn.Module, numbers: dict[int, int], kinds: tuple[type[nn.Module], ...]
) -> Iterator[_Candidate]:
    for name, layer in module.named_modules():
        if isinstance(layer, nn.MultiheadAttention):
            yield from _projections(name, layer, numbers)
        unused = isinstance(layer, NonDynamicallyQuantizableLinear)
        if not isinstance(layer, kinds) or unused:
            continue
        weight = numbers.get(id(layer._parameters.get("weight")))
        bias = numbers.get(id(layer._parameters.get("bias")))
        if weight is not None:
            joined = bias is not None and not isinstance(layer, _TRANSPOSED)
            yield _Candidate(
                name, layer, Piece(weight), Piece(bias) if joined and bias is not None else None
            )


def _projections(
    name: str, layer: nn.MultiheadAttention, numbers: dict[int, int]
) -> Iterator[_Candidate]:
    """Yield the four projections of an attention layer as linear layers."""
    size = layer.embed_dim
    sizes = (size, layer.kdim, layer.vdim)
    bias = numbers.get(id(layer.in_proj_bias))
    for index, (role, given) in enumerate(zip(PROJECTIONS[:3], sizes, strict=True)):
        rows = (index * size, (index + 1) * size)
        packed = layer._parameters.get("in_proj_weight")
        own = layer._parameters.get(f"{role}_weight") if packed is None else packed
        number = numbers.get(id(own))
        piece = None
        if number is not None:
            piece = Piece(number) if packed is None else Piece(number, *rows)
        if piece is not None:
            own_bias = None if bias is None else Piece(bias, *rows)
            stand_in = nn.Linear(given, size, bias=own_bias is not None, device="meta")
            yield _Candidate(f"{name}.{role}", stand_in, piece, own_bias)
    out, bias = (numbers.get(id(p)) for p in (layer.out_proj.weight, layer.out_proj.bias))
    if out is not None:
        stand_in = nn.Linear(size, size, bias=bias is not None, device="meta")
        own_bias = None if bias is None else Piece(bias)
        yield _Candidate(f"{name}.{PROJECTIONS[3]}", stand_in, Piece(out), own_bias)


def _grouped(candidates: list[_Candidate], places: Counter[int]) -> Iterator[list[_Candidate]]:
    """Yield the layers of each weight that can have a block: alike, and nobody else uses it."""
    by_weight: dict[Piece, list[_Candidate]] = {}
    for candidate in candidates:
        by_weight.setdefault(candidate.weight, []).append(candidate)
    for weight, same in by_weight.items():
        alike = all(candidate.is_like(same[0]) for candidate in same[1:])
        if alike and places[weight.number] == len(same):
            yield same


def _block(same: list[_Candidate], places: Counter[int], max_factor_dim: int) -> BlockInfo:
    name, layer, weight, bias = same[0]
    if bias is not None and places[bias.number] != len(same):
        bias = None
    groups, d_out, d_in = matrix_shape(layer)
    d_in += bias is not None
    cuts_in = d_in if isinstance(layer, nn.Embedding) else _cuts(d_in, max_factor_dim)
    return BlockInfo(
        name,
        tuple(candidate.name for candidate in same),
        layer,
        weight,
        bias,
        groups,
        Side(d_out, _cuts(d_out, max_factor_dim)),
        Side(d_in, cuts_in),
    )


def _cuts(size: int, limit: int) -> int:
    cuts = -(-size // limit)
    return cuts if cuts <= _MAX_CUTS else size


def _scales(
    module: nn.Module, numbers: dict[int, int], places: Counter[int], taken: set[int]
) -> Iterator[tuple[str, Scale]]:
    kinds: tuple[type[nn.Module], ...] = (*SCALE_LAYERS, *_TRANSPOSED)
    for name, layer in module.named_modules():
        if not isinstance(layer, kinds):
            continue
        roles = ("bias",) if isinstance(layer, _TRANSPOSED) else ("weight", "bias")
        found = {role: numbers.get(id(layer._parameters.get(role))) for role in roles}
        own = {role: n for role, n in found.items() if n is not None and n not in taken}
        if own and all(places[n] == 1 for n in own.values()):
            yield name, Scale(layer, own.get("weight"), own.get("bias"))
