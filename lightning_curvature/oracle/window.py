"""WindowOracle: answers over the micro-batches of one optimizer step."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_curvature.oracle.checked import Answer, CheckedOracle, DirectionalMethod, Question
from lightning_curvature.oracle.directional import (
    Measured,
    finite_differences,
    forward_mode,
    hessian_forms,
)
from lightning_curvature.oracle.extra_pass import ContextFactory
from lightning_curvature.oracle.forms import symmetric
from lightning_curvature.oracle.plans import HvpMethod
from lightning_curvature.oracle.products import difference_product, exact_product
from lightning_curvature.oracle.protocol import (
    CurvatureKind,
    Directional,
    Quadratic,
    RegressionScaling,
)
from lightning_curvature.oracle.record import PassRecord
from lightning_curvature.oracle.recorded import is_out_of_memory

__all__ = ["DirectionalMethod", "WindowOracle"]


class WindowOracle(CheckedOracle):
    """Answers over the recorded micro-batches of one optimizer step.

    Args:
        params: Parameters of the optimizer, in its order.
        module: Module that holds them; None if unknown (finite differences only, and buffers are
            not protected).
        directional: "fd" for finite differences of the model outputs, "jvp" for forward-mode
            differentiation (exact, three times the cost), "auto" for the first in full precision
            and the second otherwise, changed when the self-check fails.
        mean: Averages a tensor over the ranks and returns it; None for one process.
        contexts: Makers of contexts that every extra pass enters.

    Attributes:
        method: Method that `directional` uses: "fd", "jvp", or None before the first ask.
        self_check: Deviation between the measured slope and <grad, d>.

    Raises:
        ValueError: If some parameters are not in the module.
    """

    capabilities = frozenset(
        {"loss", "directional", "hvp", "sampled", "layers", "forward", "slope"}
    )

    def __init__(
        self,
        params: Sequence[Tensor],
        module: nn.Module | None,
        *,
        directional: DirectionalMethod = "auto",
        mean: Callable[[Tensor], Tensor] | None = None,
        contexts: Sequence[ContextFactory] = (),
    ) -> None:
        super().__init__(params, module, directional=directional, mean=mean, contexts=contexts)
        if module is None:
            self.capabilities = type(self).capabilities - {"layers", "slope"}
        self._impossible: set[str] = set()

    def evaluate(self, closure: Callable[[], Any]) -> Any:
        """Run the main pass by calling ``closure`` exactly once and return its result."""
        return closure()

    # Derivatives

    def directional(
        self,
        direction: Sequence[Tensor],
        *,
        grad_slope: Tensor | None = None,
        curvature: CurvatureKind = "fisher",
        regression_scaling: RegressionScaling = "mean",
        saved: Sequence[Tensor] | None = None,
    ) -> Directional:
        """Return slope and curvature of the loss along a direction; see `Oracle.directional`.

        Raises:
            NoLossCapturedError: If the curvature of the loss is unknown.
            RuntimeError: If a pass does not do the same when it runs again.
        """
        answer = self.quadratic(
            [direction],
            grad_slopes=None if grad_slope is None else grad_slope.reshape(1),
            curvature=curvature,
            regression_scaling=regression_scaling,
            saved=saved,
        )
        return Directional(answer.slopes[0], answer.matrix[0, 0])

    def quadratic(
        self,
        directions: Sequence[Sequence[Tensor]],
        *,
        grad_slopes: Tensor | None = None,
        curvature: CurvatureKind = "fisher",
        regression_scaling: RegressionScaling = "mean",
        saved: Sequence[Tensor] | None = None,
    ) -> Quadratic:
        """Return the loss to second order along some directions; see `Oracle.quadratic`.

        Raises:
            ValueError: If there is no direction.
            NoLossCapturedError: If the curvature of the loss is unknown.
            RuntimeError: If a pass does not do the same when it runs again.
        """
        if not directions:
            raise ValueError("Invalid directions=[]: must have at least one direction.")
        return self._checked(
            Question(directions, curvature, regression_scaling, saved), grad_slopes
        )

    def _ask(self, question: Question) -> Answer:
        """Answer by the present method; one collective for all that is averaged over the ranks."""
        base = self._local(PassRecord.total)
        if question.kind == "hessian":
            measured = hessian_forms(
                self._replay, self._recorded(), self._active, question.directions
            )
            modeled = base
        else:
            measured = self._fisher(question)
            modeled = self._local(PassRecord.modeled)
        differences = torch.full_like(base, float(self.method == "fd"))
        slopes, forms, roundoff = measured
        packed = self.mean_(torch.stack([*slopes, *forms, roundoff, base, modeled, differences]))
        count = len(slopes)
        *_, roundoff, base, modeled, differences = packed.unbind()
        self._base_loss = base
        size = base.abs().clamp_min(torch.finfo(packed.dtype).tiny)
        unmodeled = (base - modeled).abs() / size
        matrix = symmetric(packed[count : count + len(forms)], count)
        return Answer(Quadratic(packed[:count], matrix), unmodeled, roundoff, differences)

    def _fisher(self, question: Question) -> Measured:
        self._check_captured()
        arguments = (
            *(self._replay, self._recorded(), self._active),
            *(question.directions, question.scaling),
        )
        if self.method == "fd":
            return finite_differences(*arguments, question.saved)
        try:
            return forward_mode(*arguments)
        except (NotImplementedError, RuntimeError) as error:
            if self._wanted_method == "jvp" or is_out_of_memory(error):
                raise
            self._warn(
                "jvp",
                f"Forward-mode differentiation is not possible in this model ({error}); curvature "
                "comes from finite differences instead.",
            )
            self._tried.add("jvp")
            self.method = "fd"
            return finite_differences(*arguments, question.saved)

    def hvp(
        self, directions: Sequence[Tensor], *, method: HvpMethod = "double-backward"
    ) -> list[Tensor]:
        """Return the Hessian-vector product of the loss on this rank; see `Oracle.hvp`."""
        if method == "fd" or "double-backward" in self._impossible:
            return difference_product(self._replay, self._recorded(), self._active, directions)
        try:
            return exact_product(self._replay, self._recorded(), self._active, directions)
        except (NotImplementedError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            self._impossible.add("double-backward")
            self._warn(
                "double-backward",
                f"This model cannot be differentiated twice ({error}); Hessian-vector products "
                "come from central differences of gradients instead, which also count the kinks of "
                "activations such as ReLU.",
            )
            return difference_product(self._replay, self._recorded(), self._active, directions)
