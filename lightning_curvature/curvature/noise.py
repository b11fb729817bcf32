"""Directions in the order of the official codes, for replaying their runs.

They set one generator to the seed of the step and draw one tensor per parameter, in the order of
``named_parameters()`` and in the dtype of the parameter. See `Directions` for ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["SingleStreamNoise"]


@dataclass
class _Stream:
    """A generator, and which parameter it draws next."""

    generator: torch.Generator
    next: int


class SingleStreamNoise:
    """Noise of one stream per direction, as official codes draw it: a `NoiseSource`.

    A parameter that is asked for out of order costs the draws of those before it. Numbers depend
    on dtype and device, and on CUDA on the model of the GPU. The global generators are left alone.

    Args:
        seeds: Seed of each step, or one list of seeds per step for several directions.
        params: Parameters in the order of the stream. All must be on one device.
        block_sizes: Numbers of consecutive parameters before each of which the generator is set to
            the seed anew, so that equal blocks get equal numbers; None for a single block.

    Raises:
        ValueError: If the block sizes are not those of a partition of the parameters.

    Examples:
        >>> import torch
        >>> from lightning_curvature.optim.mezo import MeZO
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = MeZO(model.parameters())
        >>> optimizer.noise_source = SingleStreamNoise([123, 456], list(model.parameters()))
    """

    def __init__(
        self,
        seeds: Sequence[int] | Sequence[Sequence[int]],
        params: Sequence[Tensor],
        *,
        block_sizes: Sequence[int] | None = None,
    ) -> None:
        sizes = [len(params)] if block_sizes is None else list(block_sizes)
        if sum(sizes) != len(params) or min(sizes, default=1) < 1:
            raise ValueError(
                f"Invalid block_sizes={sizes}: must be positive numbers with the sum {len(params)}."
            )
        self.seeds = seeds
        self.params = list(params)
        self._positions = {id(p): position for position, p in enumerate(self.params)}
        self._first = [sum(sizes[:k]) for k, size in enumerate(sizes) for _ in range(size)]
        # Of the present step, by (sample, first parameter of the block).
        self._step = -1
        self._streams: dict[tuple[int, int], _Stream] = {}

    def _seed(self, step: int, sample: int) -> int:
        if step >= len(self.seeds):
            raise ValueError(f"There is no seed of step {step}: {len(self.seeds)} were given.")
        seeds = self.seeds[step]
        if isinstance(seeds, int):
            seeds = [seeds]
        if not 0 <= sample < len(seeds):
            raise ValueError(
                f"There is no seed of direction {sample} of step {step}: {len(seeds)} were given."
            )
        return int(seeds[sample])

    def __call__(self, step: int, sample: int, index: int, param: Tensor) -> Tensor:
        """Draw the noise of one parameter.

        Args:
            step: Number of the optimizer step.
            sample: Number of the direction within the step.
            index: Not used: the order is that of ``params``.
            param: The parameter.

        Returns:
            A tensor of its shape, dtype and device.

        Raises:
            ValueError: If the parameter is not one of those given, or there is no such seed.
        """
        position = self._positions.get(id(param))
        if position is None:
            raise ValueError(
                f"A parameter of shape {list(param.shape)} is not one of those that this noise was "
                "made for."
            )
        if step != self._step:
            self._step, self._streams = step, {}
        first = self._first[position]
        stream = self._streams.get((sample, first))
        if stream is None or stream.next > position:
            generator = torch.Generator(param.device)
            generator.manual_seed(self._seed(step, sample))
            stream = self._streams[(sample, first)] = _Stream(generator, first)
        for skipped in self.params[stream.next : position]:
            self._draw(skipped, stream)
        return self._draw(param, stream)

    def _draw(self, param: Tensor, stream: _Stream) -> Tensor:
        stream.next += 1
        return torch.randn(
            param.shape, dtype=param.dtype, device=param.device, generator=stream.generator
        )
