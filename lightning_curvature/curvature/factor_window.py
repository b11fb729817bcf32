"""FactorWindow: what the micro-batches of one step say about the factors of all blocks."""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from lightning_curvature.curvature.kronecker_blocks import BlockInfo, Blocks, find_blocks
from lightning_curvature.curvature.kronecker_sums import (
    Basis,
    BlockSums,
    ExampleWeights,
    block_sums,
)
from lightning_curvature.curvature.layer_rows import (
    KRONECKER_LAYERS,
    SCALE_LAYERS,
    KfacApprox,
    scale_squares,
    shift_squares,
)
from lightning_curvature.curvature.layer_tape import LayerCall, LayerTape
from lightning_curvature.curvature.packing import pack_symmetric, unpack_symmetric
from lightning_curvature.oracle.protocol import Oracle
from lightning_curvature.oracle.record import PassRecord

__all__ = ["FactorWindow", "WindowSums"]

_Gradients = Sequence[tuple[list[Tensor | None], list[Tensor | None]]]


class WindowSums(NamedTuple):
    """Sums over micro-batches.

    Attributes:
        blocks: By name of the block; only those something was seen of.
        diagonals: By number of the parameter, likewise.
        bypassed: Names of blocks whose parameters had a gradient though none of their layers was
            called: something uses the weights by themselves.
        reached: Whether a rank saw something of a diagonal, boolean 0-dim tensors by number of the
            parameter. None for certainly.
    """

    blocks: dict[str, BlockSums]
    diagonals: dict[int, Tensor]
    bypassed: frozenset[str]
    reached: Mapping[int, Tensor] | None = None

    def plus(self, other: "WindowSums", factor: float | Tensor) -> "WindowSums":
        """Return this plus a multiple of another."""
        blocks, diagonals = dict(self.blocks), dict(self.diagonals)
        for name, sums in other.blocks.items():
            part = sums.times(factor)
            blocks[name] = blocks[name].plus(part) if name in blocks else part
        for number, squares in other.diagonals.items():
            term = squares * factor
            diagonals[number] = diagonals[number] + term if number in diagonals else term
        return WindowSums(blocks, diagonals, self.bypassed | other.bypassed)


_NOTHING = WindowSums({}, {}, frozenset())


class FactorWindow:
    """Watches the layers of a module that belong to an optimizer, and adds up what they see.

    Args:
        module: The module.
        params: Parameters of the optimizer, in its order.
        enabled: Tells whether the main passes of the coming step are to be watched.
        max_factor_dim: See `find_blocks`.
        kfac_approx: See `block_sums`.
        factor_dtype: See `block_sums`.
        kinds: See `find_blocks`.
        without: See `find_blocks`.
        settled: Whether ``without`` is complete; otherwise the first batch tells what is missing.

    Attributes:
        parts: Blocks and the rest.
        trained: Numbers of the parameters that required a gradient at the beginning.
        without: Numbers of weights whose layers have no block after all.
        bases: Where to sum squared gradients, by name of the block.
    """

    def __init__(
        self,
        module: nn.Module,
        params: Sequence[Tensor],
        enabled: Callable[[], bool],
        *,
        max_factor_dim: int = 8192,
        kfac_approx: KfacApprox = "expand",
        factor_dtype: torch.dtype | None = None,
        kinds: tuple[type[nn.Module], ...] = KRONECKER_LAYERS,
        without: frozenset[int] = frozenset(),
        settled: bool = False,
    ) -> None:
        self.params = list(params)
        self.trained = frozenset(n for n, p in enumerate(self.params) if p.requires_grad)
        self.bases: Mapping[str, Basis | None] = {}
        self.kfac_approx = kfac_approx
        self.factor_dtype = factor_dtype
        self.without = without
        self._find = functools.partial(find_blocks, module, self.params, kinds=kinds)
        self._max_factor_dim = max_factor_dim
        self.parts: Blocks = self.parts_without(without, max_factor_dim)
        self._settled = settled
        # Blocks and diagonals that some rank has seen something of.
        self._known: set[str | int] = set()
        self._tape = LayerTape(self.parts.layers, self.parts.attentions, enabled)
        self._calls: list[LayerCall] = []
        self._asked: list[int] = []
        self._owners = self._named_calls()
        self._waiting: list[tuple[ref[PassRecord], WindowSums]] = []
        self._sums = _NOTHING

    def parts_without(self, without: frozenset[int], max_factor_dim: int) -> Blocks:
        """Return the blocks that other arguments would give.

        Args:
            without: See `find_blocks`.
            max_factor_dim: See `find_blocks`.
        """
        return self._find(without=without, max_factor_dim=max_factor_dim)

    def _named_calls(self) -> dict[str, str]:
        return {call: name for name, block in self.parts.blocks.items() for call in block.calls}

    # What the oracle calls

    @property
    def has_blocks(self) -> bool:
        """Whether there are layers that a pass should call."""
        return bool(self.parts.blocks)

    def edges(self) -> tuple[list[GradientEdge], list[Tensor]]:
        """Return the outputs of the layers called in this pass, and parameters."""
        self._calls = [call for call in self._tape.take() if call.is_sound]
        called = {self._owners[call.name] for call in self._calls if call.name in self._owners}
        numbers = dict.fromkeys(self.parts.fallback)
        if not self._settled:
            for name, block in self.parts.blocks.items():
                if name not in called:
                    numbers.update(dict.fromkeys(piece.number for piece in block.pieces))
        self._asked = [number for number in numbers if self.params[number].requires_grad]
        return [call.edge for call in self._calls], [self.params[n] for n in self._asked]

    @torch.no_grad()
    def observe(
        self,
        record: PassRecord,
        gradients: _Gradients,
        weights: Sequence[Tensor],
        behind: Sequence[tuple[int, ...]] | None = None,
    ) -> None:
        """Take in one micro-batch; see `LayerObserver`."""
        every = tuple(range(len(weights)))
        examples: dict[tuple[int, ...], ExampleWeights] = {}
        blocks: dict[str, BlockSums] = {}
        diagonals: dict[int, Tensor] = {}
        unreached: list[LayerCall] = []
        for index, call in enumerate(self._calls):
            found = [g for outputs, _ in gradients for g in outputs[index : index + 1]]
            grads = [g for g in found if g is not None]
            if not grads:
                unreached.append(call)
                continue
            owner = self._owners.get(call.name)
            if owner is not None:
                losses = every if behind is None else behind[index]
                if losses not in examples:
                    examples[losses] = ExampleWeights.of([weights[n] for n in losses])
                sums = self._block_sums(self.parts.blocks[owner], call, grads, examples[losses])
                blocks[owner] = blocks[owner].plus(sums) if owner in blocks else sums
            for number, squares in self._scale_sums(call, grads):
                old = diagonals.get(number)
                diagonals[number] = squares if old is None else old + squares
        # Of another forward, perhaps, whose loss comes later.
        self._tape.calls = unreached + self._tape.calls
        self._calls = []
        for place, number in enumerate(self._asked):
            parts = [params[place] for _, params in gradients]
            terms = [_precise(g).square() for g in parts if g is not None]
            if terms:
                diagonals[number] = torch.stack(terms).sum(0) if terms[1:] else terms[0]
        bypassed = frozenset(
            name
            for name, block in self.parts.blocks.items()
            if name not in blocks and any(p.number in diagonals for p in block.pieces)
        )
        self._fold()
        self._waiting.append((ref(record), WindowSums(blocks, diagonals, bypassed)))

    def drop_finished(self, kept: Sequence[PassRecord]) -> None:
        """Forget the micro-batches whose gradient is gone.

        Args:
            kept: Those whose gradient is not.
        """
        self._waiting = [
            (found, sums)
            for found, sums in self._waiting
            for record in [found()]
            if record is not None
            and (record.loss is None or any(record is other for other in kept))
        ]
        self._sums = _NOTHING

    @contextmanager
    def during_extra_pass(self) -> Iterator[None]:
        """Watch the extra passes made inside, and nothing else."""
        self._tape.open()
        try:
            yield
        finally:
            self._tape.shut()

    def clear(self) -> None:
        """Forget what belongs to the present step."""
        self._tape.take()
        self._calls = []
        self._waiting = []
        self._sums = _NOTHING

    def zeroed(self) -> None:
        """Hear that the gradients were set to zero; the oracle tells which batches are gone."""

    def forward_dropped(self) -> None:
        """Forget the calls of a forward pass that has no loss."""
        self._tape.take()

    def close(self) -> None:
        """Remove the hooks."""
        self._tape.close()
        self.clear()

    # Sums

    def _block_sums(
        self, block: BlockInfo, call: LayerCall, grads: list[Tensor], weights: ExampleWeights
    ) -> BlockSums:
        return block_sums(
            block,
            call,
            grads,
            weights,
            kfac_approx=self.kfac_approx,
            basis=self.bases.get(block.name),
            factor_dtype=self.factor_dtype,
        )

    def _scale_sums(self, call: LayerCall, grads: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
        scale = self.parts.scales.get(call.name)
        if scale is None:
            return
        given = call.given.movedim(call.batch_axis, 0)
        for grad in grads:
            if scale.bias is not None and not isinstance(scale.layer, SCALE_LAYERS):
                yield scale.bias, shift_squares(scale.layer, _precise(grad))
                continue
            weight, bias = scale_squares(scale.layer, given, _precise(grad))
            for number, squares in ((scale.weight, weight), (scale.bias, bias)):
                if number is not None and squares is not None:
                    yield number, squares.view(self.params[number].shape)

    def _fold(self) -> None:
        """Add up what belongs to micro-batches whose weight in the step is known by now."""
        waiting, self._waiting = self._waiting, []
        for found, sums in waiting:
            record = found()
            if record is None:
                continue
            if record.loss is None:
                self._waiting.append((found, sums))
                continue
            weight = record.weight
            if isinstance(weight, Tensor):
                weight = weight.detach().clamp_min(0.0)
            self._sums = self._sums.plus(sums, weight)

    @torch.no_grad()
    def collect(self, oracle: Oracle) -> WindowSums:
        """Return the sums of this step, averaged over the ranks; one collective per dtype.

        The first time it looks for blocks none of whose layers was called though their weights
        are used; these go into ``without``, and a diagonal takes their place.

        Args:
            oracle: Averages over the ranks.
        """
        self._fold()
        sums = self._over_ranks(self._sums, oracle)
        if not (self._settled or (not sums.blocks and not sums.diagonals)):
            if sums.bypassed:
                blocks = self.parts.blocks
                self.without |= {blocks[name].weight.number for name in sums.bypassed}
                self.parts = self.parts_without(self.without, self._max_factor_dim)
                self._owners = self._named_calls()
                sums = self._over_ranks(self._sums, oracle)
            self._settled = True
        return sums

    def _over_ranks(self, sums: WindowSums, oracle: Oracle) -> WindowSums:
        """Average sums over the ranks, which may have seen different layers."""
        if oracle.num_ranks == 1:
            blocks = {n: s for n, s in sums.blocks.items() if n in self.parts.blocks}
            return WindowSums(blocks, sums.diagonals, sums.bypassed)
        blocks = {
            name: sums.blocks.get(name) or self.no_sums(block)
            for name, block in self.parts.blocks.items()
        }
        numbers = self.parts.diagonal_numbers
        diagonals = [
            sums.diagonals[n] if n in sums.diagonals else torch.zeros_like(_precise(self.params[n]))
            for n in numbers
        ]
        like = _precise(self.params[0])
        seen = like.new_tensor(
            [name in sums.bypassed for name in blocks]
            + [name in sums.blocks for name in blocks]
            + [n in sums.diagonals for n in numbers]
        )
        matrices = [x for s in blocks.values() for x in (s.a_sum, s.g_sum)]
        squares = [s.squares for s in blocks.values() if s.squares is not None]
        positions = [s.positions for s in blocks.values()]
        packed = _packed(matrices)
        means = oracle.mean_vectors(packed, squares, positions, diagonals, [seen])
        matrices = _unpacked(means[0], matrices)
        squares_left, flags = iter(means[1]), means[4][0]
        averaged = {}
        for index, (name, s) in enumerate(blocks.items()):
            averaged[name] = BlockSums(
                matrices[2 * index],
                matrices[2 * index + 1],
                means[2][index],
                None if s.squares is None else next(squares_left),
            )
        bypassed: frozenset[str] = frozenset()
        count = len(blocks)
        names: list[str | int] = [*blocks, *numbers]
        if not self._settled or not self._known.issuperset(names):
            # Waits for the device, until everything was seen once.
            known = [flag > 0 for flag in flags.tolist()]
            bypassed = frozenset(itertools.compress(blocks, known[:count]))
            self._known.update(itertools.compress(names, known[count:]))
        return WindowSums(
            {name: s for name, s in averaged.items() if name in self._known},
            {n: x for n, x in zip(numbers, means[3], strict=True) if n in self._known},
            frozenset() if self._settled else bypassed,
            dict(zip(numbers, (flags[2 * count :] > 0).unbind(), strict=True)),
        )

    def no_sums(self, block: BlockInfo) -> BlockSums:
        """Return the sums of a block of which nothing was seen."""
        like = _precise(block.weight.of(self.params[block.weight.number]))
        a, g = (
            like.new_zeros(block.groups, side.cuts, side.width, side.width)
            for side in (block.input, block.output)
        )
        squares = None
        if self.bases.get(block.name) is not None:
            squares = like.new_zeros(block.groups, block.output.filled, block.input.filled)
        return BlockSums(a, g, like.new_zeros(()), squares)


def _precise(x: Tensor) -> Tensor:
    x = x.detach()
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _packed(matrices: list[Tensor]) -> list[Tensor]:
    """Put the halves of symmetric matrices into one tensor per dtype."""
    dtypes = dict.fromkeys(x.dtype for x in matrices)
    return [pack_symmetric([x for x in matrices if x.dtype == dtype]) for dtype in dtypes]


def _unpacked(packed: list[Tensor], like: list[Tensor]) -> list[Tensor]:
    found: dict[int, Tensor] = {}
    for dtype, flat in zip(dict.fromkeys(x.dtype for x in like), packed, strict=True):
        places = [i for i, x in enumerate(like) if x.dtype == dtype]
        halves = unpack_symmetric(flat, [like[i] for i in places])
        found.update(zip(places, halves, strict=True))
    return [found[i] for i in range(len(like))]
