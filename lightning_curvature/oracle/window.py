"""WindowOracle: answers over the micro-batches of one optimizer step."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_curvature.checks import check_choice
from lightning_curvature.oracle.directional import (
    PROBE_LENGTHS,
    Measured,
    finite_differences,
    forward_mode,
    hessian_form,
)
from lightning_curvature.oracle.extra_pass import ContextFactory
from lightning_curvature.oracle.plans import HvpMethod
from lightning_curvature.oracle.products import difference_product, exact_product
from lightning_curvature.oracle.protocol import (
    CurvatureKind,
    Directional,
    RegressionScaling,
)
from lightning_curvature.oracle.record import PassRecord
from lightning_curvature.oracle.recorded import RecordedOracle, is_out_of_memory
from lightning_curvature.oracle.self_check import TOLERANCES, SelfCheck

__all__ = ["DirectionalMethod", "WindowOracle"]

DirectionalMethod = Literal["auto", "fd", "jvp"]
_Question = tuple[Sequence[Tensor], CurvatureKind, RegressionScaling, Sequence[Tensor] | None]

# Share of the loss outside the captured losses above which the user is told.
_UNMODELED_LIMIT = 0.2


class WindowOracle(RecordedOracle):
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

    capabilities = frozenset({"loss", "directional", "hvp", "sampled", "layers"})

    def __init__(
        self,
        params: Sequence[Tensor],
        module: nn.Module | None,
        *,
        directional: DirectionalMethod = "auto",
        mean: Callable[[Tensor], Tensor] | None = None,
        contexts: Sequence[ContextFactory] = (),
    ) -> None:
        check_choice("directional", directional, ("auto", "fd", "jvp"))
        super().__init__(params, module, mean=mean, contexts=contexts)
        if module is None:
            self.capabilities = type(self).capabilities - {"layers"}
        self.method: Literal["fd", "jvp"] | None = None
        self.self_check = SelfCheck()
        self._gradient_differs = False
        self._choice: str | None = None
        self._resumed: dict[str, Any] = {}
        self._wanted_method: DirectionalMethod = directional
        self._tried: set[str] = set()
        self._impossible: set[str] = set()

    def evaluate(self, closure: Callable[[], Any]) -> Any:
        """Run the main pass by calling ``closure`` exactly once and return its result."""
        return closure()

    def grad_slope(self, slope: Tensor) -> Tensor | None:
        """Undo the gradient clipping of the training loop in <grad, d>."""
        if self.clipped_by_value or self._gradient_differs:
            return None
        return slope if self.clip_factor is None else slope / self.clip_factor.to(slope.dtype)

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
        self._start(curvature)
        question = (direction, curvature, regression_scaling, saved)
        answer, unmodeled, roundoff, differences = self._ask(*question)
        # Part of the data cannot confirm the gradient of all of it.
        expected = None if self.partial else grad_slope
        self.self_check.add(answer.slope, expected, unmodeled, roundoff)
        if self.self_check.due:
            deviation = self._read_self_check(differences)
            if deviation is not None:
                answer = self._second_opinion(question, answer, expected, deviation)
        return answer

    def _ask(
        self,
        direction: Sequence[Tensor],
        kind: CurvatureKind,
        scaling: RegressionScaling,
        saved: Sequence[Tensor] | None,
    ) -> tuple[Directional, Tensor, Tensor, Tensor]:
        """Return the answer and what the self-check wants to know.

        That is the share of the loss without curvature, the slope's round-off, and the share of the
        ranks that used finite differences. All are averaged over the ranks in one collective.
        """
        base = self._local(PassRecord.total)
        if kind == "hessian":
            measured = hessian_form(self._replay, self._recorded(), self._active, direction)
            modeled = base
        else:
            measured = self._fisher(direction, scaling, saved)
            modeled = self._local(PassRecord.modeled)
        differences = torch.full_like(base, float(self.method == "fd"))
        packed = self.mean_(torch.stack([*measured, base, modeled, differences]))
        slope, curvature, roundoff, base, modeled, differences = packed.unbind()
        self._base_loss = base
        size = base.abs().clamp_min(torch.finfo(packed.dtype).tiny)
        unmodeled = (base - modeled).abs() / size
        return Directional(slope, curvature), unmodeled, roundoff, differences

    def _fisher(
        self,
        direction: Sequence[Tensor],
        scaling: RegressionScaling,
        saved: Sequence[Tensor] | None,
    ) -> Measured:
        self._check_captured()
        arguments = (self._replay, self._recorded(), self._active, direction, scaling)
        if self.method == "fd":
            return finite_differences(*arguments, saved)
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
            return finite_differences(*arguments, saved)

    def state(self) -> dict[str, Any]:
        """Return the method in use and the self-check, which may change it."""
        if self._choice is None:
            return dict(self._resumed)
        return {
            "choice": self._choice,
            "method": self.method,
            "tried": sorted(self._tried),
            "gradient_differs": self._gradient_differs,
            **self.self_check.state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue with the method and self-check of a checkpoint.

        Args:
            state: What `state` returned; empty to start anew.
        """
        self._resumed = dict(state)
        self._choice = self.method = None
        self._tried = set()
        self._gradient_differs = False
        self.self_check = SelfCheck()

    def _start(self, kind: CurvatureKind) -> None:
        """Choose a method before the first ask, or resume with that of a checkpoint."""
        if self._choice is not None and (self.method is not None or kind == "hessian"):
            return
        if kind == "fisher":
            self.method = self._choose_method()
        self._choice = f"{self._wanted_method}: {self.method or kind}"
        state = self._resumed
        # Where the user, or the precision, leads to another choice nothing was learned.
        if state.get("choice") == self._choice:
            self.method = state["method"]
            self._tried = set(state["tried"])
            self._gradient_differs = state["gradient_differs"]
            self.self_check.load_state(state, self.device)
        self._resumed = {}

    def _choose_method(self) -> Literal["fd", "jvp"]:
        if self._wanted_method != "auto":
            return self._wanted_method
        if self.module is None:
            return "fd"
        return "fd" if self._precision() is None and self._full_precision() else "jvp"

    def _full_precision(self) -> bool:
        """Tell whether float32 is computed as such: the probe is far below TF32's resolution."""
        matmul = torch.get_float32_matmul_precision()
        if self.device.type == "cpu":
            return matmul != "medium"  # bfloat16, on some processors
        tf32_convolutions = (
            self.device.type == "cuda" and self._replay.cudnn and torch.backends.cudnn.allow_tf32
        )
        return matmul == "highest" and not tf32_convolutions

    def _precision(self) -> str | None:
        if not all(p.dtype in PROBE_LENGTHS for p in self.params):
            return "half"
        return "autocast" if self._autocast() else None

    def _autocast(self) -> bool:
        return any(record.environment.autocast[0] for record in self._recorded())

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

    # Self-check

    def _read_self_check(self, differences: Tensor) -> float | None:
        """Read the self-check and return the deviation if it is too large.

        Args:
            differences: Share of the ranks that used finite differences.
        """
        verdict = self.self_check.read()
        if self.method == "jvp" and float(differences) > 0:
            # Forward mode failed on another rank; all must take the decisions below alike.
            self._tried.add("jvp")
            self.method = "fd"
        if verdict.unmodeled > _UNMODELED_LIMIT:
            self._warn(
                "unmodeled",
                f"{verdict.unmodeled:.0%} of the loss does not come from a captured loss function "
                "(a penalty, or a hand-written term): its curvature is taken as zero. "
                "lightning_curvature.declare_loss can declare it.",
            )
        tolerance = TOLERANCES[self._precision() or self.method or "jvp"]
        return verdict.deviation if verdict.deviation > tolerance else None

    def _second_opinion(
        self, question: _Question, first: Directional, expected: Tensor | None, deviation: float
    ) -> Directional:
        """Ask by the other method, decide which one to go on with, and return the better answer.

        Args:
            question: Arguments of `_ask`.
            first: Answer of the present method.
            expected: The slope by the gradient.
            deviation: What the self-check found.
        """
        old = self.method or "jvp"
        other: Literal["fd", "jvp"] = "fd" if old == "jvp" else "jvp"
        known = question[1] == "fisher" and self.module is not None
        if not known or self._wanted_method != "auto" or other in self._tried:
            self._doubt(deviation)
            return first
        self.method = other
        try:
            second, _, _, differences = self._ask(*question)
        except BaseException:
            self.method = old
            raise
        gradient = second.slope if expected is None else expected.to(second.slope.dtype)
        share, old_slope, new_slope, slope, old_curvature, new_curvature = torch.stack(
            [differences, first.slope, second.slope, gradient, first.curvature, second.curvature]
        ).tolist()
        if other == "jvp" and share > 0:  # it is not possible here, or on another rank
            self._tried.add(other)
            self.method = old
            self._doubt(deviation)
        elif _close(old_slope, new_slope) and not (
            _close(old_slope, slope) or _close(new_slope, slope)
        ):
            self._gradient_differs = True
            self.method = old
            self._doubt(deviation)
        elif old == "fd" and _close(old_curvature, new_curvature) and _close(new_slope, slope):
            # On a plateau the probe's bias exceeds the slope, but the gradient gives that one.
            self.method = old
        else:
            self._tried.add(old)
            self._warn(
                f"switch-{other}",
                f"Self-check: the slope measured by method '{old}' deviates by {deviation:.1%} "
                f"from the gradient; going on with '{other}'.",
            )
        return second

    def _doubt(self, deviation: float) -> None:
        if self._gradient_differs:
            self._warn(
                "gradient",
                "Self-check: two methods agree on a slope that the gradient does not have. It was "
                "changed after the backward, by a hook or by torch.nn.utils.clip_grad_norm_, say, "
                "or terms were added to the loss outside the attached loss function. The slope is "
                "taken from the extra pass from now on. (The optimizer's own grad_clip_norm, and "
                "Trainer(gradient_clip_val=...), are known to it.)",
            )
            return
        self._warn(
            "self-check",
            f"Self-check: the slope measured by an extra pass deviates by {deviation:.1%} "
            "from the gradient. The curvature is doubtful. Usual "
            "causes: gradients clipped or changed after the backward, randomness that the library "
            "does not know (a generator of its own), reentrant checkpointing, a custom "
            "autograd.Function, or a training_step with side effects on its own result.",
        )


def _close(one: float, other: float) -> bool:
    return abs(one - other) <= TOLERANCES["fd"] * max(abs(one), abs(other))
