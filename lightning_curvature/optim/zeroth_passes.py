"""Where a zeroth-order step gets its numbers from: the loss, or the log of an earlier run."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lightning_curvature.oracle.protocol import Oracle

__all__ = ["LivePasses", "Passes", "RecordedPasses"]


class Passes(ABC):
    """Losses of one step at the parameters as they are, and what is concluded from them."""

    @abstractmethod
    def main(self) -> Tensor:
        """Return the loss of the main pass on this rank, a 0-dim tensor."""

    @abstractmethod
    def loss(self) -> Tensor:
        """Return the loss at the present parameters on this rank, a 0-dim tensor."""

    @abstractmethod
    def slope(self, direction: Sequence[Tensor], params: Sequence[Tensor]) -> Tensor:
        """Return the derivative of the loss along a direction on this rank, a 0-dim tensor.

        Args:
            direction: One tensor per parameter.
            params: The parameters.
        """

    @abstractmethod
    def settle(
        self, losses: Sequence[Tensor], read: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Average numbers over the ranks, in one collective, and conclude from them.

        Args:
            losses: Numbers of this rank, 0-dim tensors.
            read: Makes an answer and a loss out of their averages, a tensor of the shape [k].

        Returns:
            The answer that the step depends on, and the loss, NaN if it is not known.
        """


class LivePasses(Passes):
    """Numbers of the loss itself.

    Args:
        oracle: Evaluates it.
        log: Called with every answer.
    """

    def __init__(self, oracle: Oracle, log: Callable[[Tensor], None] | None = None) -> None:
        self._oracle = oracle
        self._log = log

    def main(self) -> Tensor:
        """Return the loss of the main pass on this rank."""
        return self._oracle.local_loss(main=True)

    def loss(self) -> Tensor:
        """Return the loss at the present parameters on this rank."""
        return self._oracle.local_loss()

    def slope(self, direction: Sequence[Tensor], params: Sequence[Tensor]) -> Tensor:
        """Return the derivative of the loss along a direction on this rank."""
        return self._oracle.local_slope(direction, params)

    def settle(
        self, losses: Sequence[Tensor], read: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Average numbers over the ranks and conclude from them."""
        answer, loss = read(self._oracle.mean_(torch.stack(list(losses))))
        if self._log is not None:
            self._log(answer)
        return answer, loss


class RecordedPasses(Passes):
    """Answers of an earlier run; the loss is not evaluated.

    Args:
        answers: Those of one step, in order.
        device: Where they are needed.
    """

    def __init__(self, answers: Sequence[Tensor], device: torch.device) -> None:
        self._answers: Iterator[Tensor] = iter(answers)
        self._device = device
        self._nothing = torch.zeros((), dtype=torch.float32, device=device)

    def main(self) -> Tensor:
        """Return zero."""
        return self._nothing

    def loss(self) -> Tensor:
        """Return zero."""
        return self._nothing

    def slope(self, direction: Sequence[Tensor], params: Sequence[Tensor]) -> Tensor:
        """Return zero."""
        return self._nothing

    def settle(
        self, losses: Sequence[Tensor], read: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Return the next answer of the log.

        Raises:
            ValueError: If the log has none left.
        """
        answer = next(self._answers, None)
        if answer is None:
            raise ValueError("The log of this step holds fewer answers than the optimizer asks.")
        return answer.to(self._device), torch.full_like(self._nothing, torch.nan)
