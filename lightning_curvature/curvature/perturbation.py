"""Random directions that are never stored: drawn again, piece by piece, whenever they are needed.

A direction has one normal (or other) number per entry of the parameters. Its numbers come from
private generators, one per parameter, keyed by (base seed, step, sample, index of the parameter):
groups, frozen parameters and the order of evaluation do not change it, and the global generators
are left alone. Malladi et al., 2023, arXiv:2305.17333, reset one global generator instead.
"""

import hashlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_curvature.vectors import scalar_dtype

__all__ = [
    "STREAM_VERSION",
    "Directions",
    "Distribution",
    "NoiseSource",
    "Piece",
    "direction_seed",
    "put_entries",
]

Distribution = Literal["normal", "rademacher", "sphere"]
# Called with (step, sample, index of the parameter, the parameter); returns the noise of the whole
# parameter, in its shape. Stands for the generators in tests and replays of other codes.
NoiseSource = Callable[[int, int, int, Tensor], Tensor]

# Changes whenever the same key gives other numbers.
STREAM_VERSION = 1
# Numbers drawn at once: on a CPU they stay in the cache, elsewhere a kernel is worth its launch.
_CHUNK = {"cpu": 1 << 16}
_LARGE_CHUNK = 1 << 22
_SIGNS_PER_WORD = 64
# Row b: the eight bits of the byte b as signs.
_SIGNS = (((torch.arange(256).unsqueeze(1) >> torch.arange(8)) & 1) * 2 - 1).to(torch.float32)


def direction_seed(base_seed: int, step: int, sample: int, index: int) -> int:
    """Mix the key of a stream into one number.

    Args:
        base_seed: Seed of the run.
        step: Number of the optimizer step.
        sample: Number of the direction within the step.
        index: Index of the parameter.

    Returns:
        An integer in [0, 2^63).
    """
    key = repr((STREAM_VERSION, base_seed, step, sample, index))
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1


@dataclass
class Piece:
    """Parts of some parameters and what a direction has there.

    Attributes:
        positions: Which parameters, in the numbering of `Directions`.
        values: Parts of the parameters; changed in place.
        noise: Part of the direction, one tensor per part, of its shape; may be changed.
        part: Slice of every parameter in question; None for all of it. Only single parameters are
            cut: along their first axis, or as one vector.
        as_vector: Whether the slice is one of the flattened parameter.
    """

    positions: list[int]
    values: list[Tensor]
    noise: list[Tensor]
    part: slice | None = None
    as_vector: bool = False

    @property
    def is_gradient(self) -> bool:
        """Whether the noise stands for a true gradient."""
        return False

    def of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the same parts of other tensors.

        Args:
            tensors: One per position of this piece, of the shapes of the parameters.
        """
        if self.part is None:
            return list(tensors)
        return [(x.view(-1) if self.as_vector else x)[self.part] for x in tensors]


class Directions:
    """Random directions of some parameters.

    Args:
        params: The parameters.
        indices: Number of each in the key of its stream.
        seed: Base seed of the run.
        distribution: "normal"; "rademacher" for random signs; "sphere" for normal numbers scaled to
            the norm sqrt(d) of all d entries together.
        foreach: False to work on one parameter at a time; otherwise small ones are worked on
            together.
        source: Gives the noise instead of the generators.
        masks: Positions in the flattened parameter that directions are restricted to, by position
            of the parameter; others are whole.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        indices: Sequence[int],
        *,
        seed: int,
        distribution: Distribution = "normal",
        foreach: bool | None = None,
        source: NoiseSource | None = None,
        masks: dict[int, Tensor] | None = None,
    ) -> None:
        self.params = list(params)
        self.indices = list(indices)
        self.seed = seed
        self.distribution = distribution
        self.foreach = foreach
        self.source = source
        self.masks = dict(masks or {})
        # Of "sphere": factors of the directions of one step.
        self._factors: dict[tuple[int, int], Tensor] = {}

    @property
    def size(self) -> int:
        """Number of entries that directions have."""
        return sum(self._size(position) for position in range(len(self.params)))

    def _size(self, position: int) -> int:
        mask = self.masks.get(position)
        return self.params[position].numel() if mask is None else mask.numel()

    def shape(self, position: int) -> torch.Size:
        """Return the shape of what a direction has of a parameter.

        Args:
            position: Which one.
        """
        mask = self.masks.get(position)
        return self.params[position].shape if mask is None else mask.shape

    def sweep(
        self,
        step: int,
        sample: int,
        positions: Sequence[int] | None = None,
        *,
        write: bool = True,
    ) -> Generator[Piece, None, None]:
        """Visit parameters with the noise of a direction.

        The memory of the noise is used again for the next piece. Pieces are the same in every
        sweep over the same parameters.

        Args:
            step: Number of the optimizer step.
            sample: Number of the direction within the step.
            positions: Parameters to visit; all by default.
            write: Whether changed values of masked parameters, which are copies, are written back.
        """
        factor = self._factor(step, sample) if self.distribution == "sphere" else None
        chosen = range(len(self.params)) if positions is None else positions
        for piece in self._pieces(step, sample, chosen, write=write):
            if factor is not None:
                torch._foreach_mul_(piece.noise, factor.to(piece.noise[0]))
            yield piece

    def _factor(self, step: int, sample: int) -> Tensor:
        """Return what brings a direction to the norm sqrt(d)."""
        if (step, sample) not in self._factors:
            # Of older steps nothing is asked any more.
            self._factors = {key: f for key, f in self._factors.items() if key[0] == step}
            norms: list[Tensor] = []
            device, dtype = self.params[0].device, scalar_dtype(self.params)
            for piece in self._pieces(step, sample, range(len(self.params)), write=False):
                norms += [n.to(device, dtype) for n in torch._foreach_norm(piece.noise)]
            self._factors[(step, sample)] = (self.size / torch.stack(norms).square().sum()).sqrt()
        return self._factors[(step, sample)]

    def _pieces(
        self, step: int, sample: int, positions: Sequence[int], *, write: bool
    ) -> Iterator[Piece]:
        waiting: list[int] = []
        size = 0
        for position in positions:
            p = self.params[position]
            chunk = _CHUNK.get(p.device.type, _LARGE_CHUNK)
            masked = position in self.masks
            alone = masked or self.foreach is False or p.numel() > chunk
            like = self.params[waiting[0]] if waiting else p
            other = like.device != p.device or like.dtype != p.dtype
            if waiting and (alone or other or size + p.numel() > chunk):
                yield self._together(step, sample, waiting)
                waiting, size = [], 0
            if masked:
                yield from self._masked(step, sample, position, write=write)
            elif alone:
                yield from self._cut(step, sample, position, chunk)
            else:
                waiting.append(position)
                size += p.numel()
        if waiting:
            yield self._together(step, sample, waiting)

    def _together(self, step: int, sample: int, positions: list[int]) -> Piece:
        params = [self.params[position] for position in positions]
        sizes = [p.numel() for p in params]
        buffer = _buffer(params[0], sum(sizes))
        noise = [
            part.view(p.shape) for part, p in zip(torch.split(buffer, sizes), params, strict=True)
        ]
        for position, part in zip(positions, noise, strict=True):
            self._draw(self._stream(step, sample, position), part)
        return Piece(list(positions), [p.detach() for p in params], noise)

    def _cut(self, step: int, sample: int, position: int, chunk: int) -> Iterator[Piece]:
        """Visit a large parameter in parts."""
        p = self.params[position].detach()
        rows = p.shape[0] if p.ndim else 1
        width = p.numel() // max(rows, 1)
        as_vector = p.ndim < 2 or width > chunk  # noqa: PLR2004
        if p.numel() <= chunk or (as_vector and not p.is_contiguous()):
            rows, as_vector, length = 1, False, 1
            whole = p.unsqueeze(0)
        else:
            whole = p.view(-1) if as_vector else p
            rows = whole.shape[0]
            length = chunk if as_vector else max(chunk // width, 1)
        draws = self._stream(step, sample, position)
        is_whole = length >= rows
        buffer = _buffer(p, whole[:length].numel())
        for start in range(0, rows, length):
            values = whole[start : start + length]
            noise = buffer[: values.numel()].view(values.shape)
            part = None if is_whole else slice(start, start + length)
            self._draw(draws, noise, part, as_vector=as_vector)
            if is_whole:
                values, noise = p, noise.view(p.shape)
            yield Piece([position], [values], [noise], part, as_vector)

    def _masked(self, step: int, sample: int, position: int, *, write: bool) -> Iterator[Piece]:
        """Visit the entries of a parameter that its mask names."""
        p, mask = self.params[position].detach(), self.masks[position]
        values = p.take(mask)
        noise = _buffer(p, mask.numel())
        draws = self._stream(step, sample, position)
        if isinstance(draws, Tensor):
            noise.copy_(draws.take(mask))
        else:
            self._draw(draws, noise)
        try:
            yield Piece([position], [values], [noise])
        finally:
            if write:
                put_entries(p, mask, values)

    def _stream(self, step: int, sample: int, position: int) -> torch.Generator | Tensor:
        """Return what the noise of a parameter is drawn from: a generator, or all of it at once."""
        p, index = self.params[position], self.indices[position]
        if self.source is not None:
            return self.source(step, sample, index, p)
        generator = torch.Generator(p.device)
        generator.manual_seed(direction_seed(self.seed, step, sample, index))
        return generator

    def _draw(
        self,
        draws: torch.Generator | Tensor,
        out: Tensor,
        part: slice | None = None,
        *,
        as_vector: bool = False,
    ) -> None:
        if isinstance(draws, Tensor):
            if part is not None:
                draws = (draws.reshape(-1) if as_vector else draws)[part]
            out.copy_(draws.view(out.shape))
        else:
            # Also where memory lies so that a large parameter must be visited at once.
            for chunk in torch.split(out.view(-1), _CHUNK.get(out.device.type, _LARGE_CHUNK)):
                if self.distribution == "rademacher":
                    _draw_signs(chunk, draws)
                else:
                    chunk.normal_(generator=draws)


def put_entries(tensor: Tensor, positions: Tensor, values: Tensor) -> None:
    """Write entries of a tensor. Not ``put_``, which deterministic algorithms refuse.

    Args:
        tensor: Changed in place.
        positions: Positions in the flattened tensor, without repetition.
        values: One per position, of the dtype of the tensor.
    """
    if tensor.is_contiguous():
        tensor.view(-1).index_copy_(0, positions, values)
    else:
        tensor.index_put_(torch.unravel_index(positions, tensor.shape), values)


def _draw_signs(out: Tensor, generator: torch.Generator) -> None:
    """Fill a vector with random signs."""
    if out.device.type != "cpu":
        out.random_(0, 2, generator=generator).mul_(2).sub_(1)
        return
    # Eight signs per random byte, from a table: six times faster than normal numbers.
    count = -(-out.numel() // _SIGNS_PER_WORD)
    words = torch.empty(count, dtype=torch.int64).random_(-(2**63), None, generator=generator)
    signs = _SIGNS.to(out.dtype).index_select(0, words.view(torch.uint8).to(torch.int32))
    out.copy_(signs.view(-1)[: out.numel()])


def _buffer(p: Tensor, size: int) -> Tensor:
    """Return memory for noise: float32 also for half precision, whose own draws are coarse."""
    dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
    return torch.empty(size, dtype=dtype, device=p.device)
