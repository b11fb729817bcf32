"""What an optimizer may ask of a mini-batch loss, and the errors when it cannot be answered."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor, nn

from lightning_curvature.oracle.plans import HvpMethod, Plan

__all__ = [
    "Attachment",
    "CurvatureKind",
    "Directional",
    "MissingCapabilityError",
    "NoLossCapturedError",
    "Oracle",
    "Quadratic",
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


class Quadratic(NamedTuple):
    """The loss along k directions: first and second derivatives.

    Attributes:
        slopes: <grad, d> of each direction d, shape ``[k]``, measured by the extra pass itself.
        matrix: d^T C e of all directions d and e without damping, shape ``[k, k]``, symmetric,
            averaged exactly like the loss.
    """

    slopes: Tensor
    matrix: Tensor


class Attachment(Protocol):
    """Something that watches the passes for an optimizer and lives as long as its oracle."""

    def clear(self) -> None:
        """Forget what belongs to the present step."""

    def close(self) -> None:
        """Undo what was installed."""

    def zeroed(self) -> None:
        """Hear that the gradients were set to zero."""

    def forward_dropped(self) -> None:
        """Hear that no loss will come of the forward pass that was watched last."""


class Oracle(ABC):
    """Answers questions about the loss of the micro-batches of one optimizer step.

    Every answer refers to the same examples, weights, random numbers and normalization as the
    gradient the optimizer holds. Scalars are averaged over the ranks already.

    Attributes:
        capabilities: What can be asked: any of "loss", "directional", "hvp", "sampled", "layers",
            "forward" (main passes without a backward), "slope" (forward-mode differentiation).
        without_backward: Whether the training loop left out the backward of this step, so that the
            gradients are stale.
        module: Module that holds the parameters, None if unknown.
        plan: Tells what to compute on the graphs of the main passes of the coming step, None for
            nothing; set by the optimizer.
        main: Surrounds every main pass of an optimizer that needs no backward, set by it; called
            with ``displace=False`` where the parameters must stay as they are. None for others.
        attachments: What else watches the passes, added by the optimizer.
    """

    capabilities: frozenset[str] = frozenset()
    without_backward: bool = False
    module: nn.Module | None = None
    plan: Callable[[], Plan | None] | None = None
    main: Callable[..., AbstractContextManager[None]] | None = None

    def __init__(self) -> None:
        self.attachments: list[Attachment] = []

    @property
    def num_ranks(self) -> int:
        """Number of ranks that answers are averaged over."""
        return 1

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

    def local_loss(self, *, main: bool = False) -> Tensor:
        """Return the loss on this rank, a 0-dim tensor in the highest precision there is.

        Args:
            main: Whether to return that of the main pass instead of that at the present
                parameters, which costs one forward.
        """
        raise NotImplementedError

    def local_slope(self, direction: Sequence[Tensor], params: Sequence[Tensor]) -> Tensor:
        """Return the derivative of the loss along a direction on this rank, by forward mode.

        Args:
            direction: One tensor per parameter.
            params: The parameters.
        """
        raise NotImplementedError

    def finish_main(self) -> None:  # noqa: B027 - most have nothing to do
        """Count main passes as finished that a backward would have finished."""

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

    def quadratic(
        self,
        directions: Sequence[Sequence[Tensor]],
        *,
        grad_slopes: Tensor | None = None,
        curvature: CurvatureKind = "fisher",
        regression_scaling: RegressionScaling = "mean",
        saved: Sequence[Tensor] | None = None,
    ) -> Quadratic:
        """Return the loss to second order in the span of some directions; one pass for each.

        `directional` is the case of one direction. Directions of zeros give exact zeros.

        Args:
            directions: At least one; each has one tensor per parameter that has a gradient, as told
                to `select`. The self-check watches the first.
            grad_slopes: <grad, d> of each direction as the optimizer sees it, shape ``[k]``, for
                the self-check; None if unknown.
            curvature: See `directional`.
            regression_scaling: See `directional`.
            saved: See `directional`.
        """
        raise NotImplementedError

    @abstractmethod
    def hvp(
        self, directions: Sequence[Tensor], *, method: HvpMethod = "double-backward"
    ) -> list[Tensor]:
        """Return the Hessian-vector product of the loss on this rank, one tensor per parameter.

        Args:
            directions: One tensor per parameter that has a gradient, as told to `select`.
            method: See `ProbePlan`.
        """

    def products(self) -> list[tuple[list[Tensor], list[Tensor]]]:
        """Return every probe that was planned with its product H z on this rank.

        Both have one tensor per parameter that has a gradient.
        """
        raise NotImplementedError

    def sampled_squares(self) -> list[Tensor]:
        """Return an estimate of the diagonal of the generalized Gauss-Newton matrix.

        It comes from gradients under labels drawn from the model, as `plan` says; one tensor per
        parameter that has a gradient, averaged over the ranks already.
        """
        raise NotImplementedError

    def see_layers(self) -> None:
        """Make sure that the observer of a `LayerPlan` has seen every micro-batch of the step."""
        raise NotImplementedError

    def gradient(self) -> list[Tensor]:
        """Return the gradient at the present parameters on this rank, by an eager extra pass."""
        raise NotImplementedError

    def mean_vectors(self, *vectors: Sequence[Tensor]) -> list[list[Tensor]]:
        """Average lists of tensors over the ranks; one collective per dtype."""
        raise NotImplementedError

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

    def clear(self) -> None:
        """Forget the recorded micro-batches; called after every optimizer step."""
        for attachment in self.attachments:
            attachment.clear()

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

    def close(self) -> None:
        """Undo what the oracle installed on the model; called by ``detach``."""
        for attachment in self.attachments:
            attachment.close()
        self.attachments = []
        self.plan = None
        self.main = None
