"""What an optimizer may ask of a mini-batch loss, and the errors when it cannot be answered."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from torch import Tensor

__all__ = [
    "CurvatureKind",
    "Directional",
    "MissingCapabilityError",
    "NoLossCapturedError",
    "Oracle",
    "RegressionScaling",
]

CurvatureKind = Literal["fisher", "hessian"]
RegressionScaling = Literal["mean", "per_example"]


class MissingCapabilityError(RuntimeError):
    """Raised when an optimizer asks something its oracle cannot answer."""


class NoLossCapturedError(RuntimeError):
    """Raised when no known loss function was called, so the curvature of the loss is unknown."""


class Directional(NamedTuple):
    """The loss along a direction d: first and second derivative, 0-dim tensors.

    Attributes:
        slope: <grad, d>, measured by the extra pass itself (not from the gradient).
        curvature: d^T C d without damping, averaged exactly like the loss.
    """

    slope: Tensor
    curvature: Tensor


class Oracle(ABC):
    """Answers questions about the loss of the micro-batches of one optimizer step.

    Every answer refers to the same examples, weights, random numbers and normalization as the
    gradient the optimizer holds. Scalars are averaged over the ranks already.

    Attributes:
        capabilities: What can be asked: any of "loss", "directional", "hvp".
        without_backward: Whether the training loop left out the backward of this step, so that the
            gradients are stale.
    """

    capabilities: frozenset[str] = frozenset()
    without_backward: bool = False

    @property
    @abstractmethod
    def ready(self) -> bool:
        """Whether a main pass was recorded for the present step."""

    @abstractmethod
    def evaluate(self, closure: Callable[[], Any]) -> Any:
        """Run the main pass by calling ``closure`` exactly once and return its result."""

    @abstractmethod
    def base_loss(self) -> Tensor:
        """Return the loss of the main pass, a 0-dim tensor. Costs nothing."""

    @abstractmethod
    def loss(self) -> Tensor:
        """Return the loss at the present parameters: same data and random numbers, one forward."""

    @abstractmethod
    def directional(
        self,
        direction: Sequence[Tensor],
        *,
        grad_slope: Tensor | None = None,
        curvature: CurvatureKind = "fisher",
        regression_scaling: RegressionScaling = "mean",
        saved: Sequence[Tensor] | None = None,
    ) -> Directional:
        """Return slope and curvature of the loss along a direction; one extra pass.

        Args:
            direction: One tensor per parameter that has a gradient, as told to `select`.
            grad_slope: <grad, d> as the optimizer sees it, for the self-check.
            curvature: "fisher" (equal to the generalized Gauss-Newton matrix for the usual losses)
                or "hessian".
            regression_scaling: "mean" averages squared errors as the loss does; "per_example" sums
                them over the outputs of an example, as the official AdamQLR code does.
            saved: Copies of the parameters that have a gradient, if there are any: spares finite
                differences, which move the parameters for a while, their own.
        """

    @abstractmethod
    def hvp(self, directions: Sequence[Tensor]) -> list[Tensor]:
        """Return the Hessian-vector product of the loss on this rank, one tensor per parameter."""

    @abstractmethod
    def mean_(self, packed: Tensor) -> Tensor:
        """Average a tensor of packed scalars over the ranks; one collective."""

    @abstractmethod
    def grad_slope(self, slope: Tensor) -> Tensor | None:
        """Undo the gradient clipping of the training loop in <grad, d>.

        Args:
            slope: <clipped gradient, d>.

        Returns:
            <unclipped gradient, d>, or None when clipping by value made it unknowable.
        """

    @abstractmethod
    def select(self, params: Sequence[Tensor]) -> None:
        """Name the parameters that the vectors of the present step refer to."""

    @abstractmethod
    def clear(self) -> None:
        """Forget the recorded micro-batches; called after every optimizer step."""

    def state(self) -> dict[str, Any]:
        """Return what of the oracle must survive a checkpoint, in plain types."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:  # noqa: B027 - most have none
        """Continue where a checkpoint was taken.

        Args:
            state: What `state` returned; empty to start anew.
        """

    def zeroed(self) -> None:  # noqa: B027 - most oracles need not know
        """Hear that the gradients were set to zero."""

    def missing(self) -> str | None:
        """Return what to tell the user when gradients came without a recorded loss.

        None if that is no mistake: a training step may return nothing.
        """
        return None

    def close(self) -> None:  # noqa: B027 - most oracles hold nothing that must be undone
        """Undo what the oracle installed on the model; called by ``detach``."""
