"""CheckedOracle: which method measures along directions, and how far its answers are trusted."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_curvature.checks import check_choice
from lightning_curvature.oracle.directional import PROBE_LENGTHS
from lightning_curvature.oracle.extra_pass import ContextFactory
from lightning_curvature.oracle.protocol import CurvatureKind, Quadratic, RegressionScaling
from lightning_curvature.oracle.recorded import RecordedOracle
from lightning_curvature.oracle.self_check import TOLERANCES, SelfCheck

__all__ = ["Answer", "CheckedOracle", "DirectionalMethod", "Question"]

DirectionalMethod = Literal["auto", "fd", "jvp"]

# Share of the loss outside the captured losses above which the user is told.
_UNMODELED_LIMIT = 0.2


class Question(NamedTuple):
    """What is asked along directions; see `Oracle.quadratic`."""

    directions: Sequence[Sequence[Tensor]]
    kind: CurvatureKind
    scaling: RegressionScaling
    saved: Sequence[Tensor] | None


class Answer(NamedTuple):
    """An answer and what the self-check wants to know, averaged over the ranks.

    Attributes:
        found: Slopes and curvature.
        unmodeled: Share of the loss without curvature.
        roundoff: Deviation of the first slope that round-off alone may cause.
        differences: Share of the ranks that used finite differences.
    """

    found: Quadratic
    unmodeled: Tensor
    roundoff: Tensor
    differences: Tensor


class CheckedOracle(RecordedOracle):
    """Chooses a method, compares its slopes with the gradient, and asks another one if in doubt.

    Args:
        params: Parameters of the optimizer, in its order.
        module: Module that holds them; None if unknown.
        directional: See `WindowOracle`.
        mean: Averages a tensor over the ranks and returns it; None for one process.
        contexts: Makers of contexts that every extra pass enters.

    Attributes:
        method: Method in use: "fd", "jvp", or None before the first ask.
        self_check: Deviation between the measured slope and <grad, d>.

    Raises:
        ValueError: If some parameters are not in the module.
    """

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
        self.method: Literal["fd", "jvp"] | None = None
        self.self_check = SelfCheck()
        self._gradient_differs = False
        self._choice: str | None = None
        self._resumed: dict[str, Any] = {}
        self._wanted_method: DirectionalMethod = directional
        self._tried: set[str] = set()

    @abstractmethod
    def _ask(self, question: Question) -> Answer:
        """Answer by the present method."""

    def _checked(self, question: Question, grad_slopes: Tensor | None) -> Quadratic:
        """Answer, and look at the self-check if it is due.

        Args:
            question: What is asked.
            grad_slopes: <grad, d> of each direction, None if unknown.
        """
        self._start(question.kind)
        answer = self._ask(question)
        # Part of the data cannot confirm the gradient of all of it.
        expected = None if self.partial or grad_slopes is None else grad_slopes[0]
        self.self_check.add(answer.found.slopes[0], expected, answer.unmodeled, answer.roundoff)
        if self.self_check.due:
            deviation = self._read_self_check(answer.differences)
            if deviation is not None:
                return self._second_opinion(question, answer.found, expected, deviation)
        return answer.found

    def grad_slope(self, slope: Tensor) -> Tensor | None:
        """Undo the gradient clipping of the training loop in <grad, d>."""
        if self.clipped_by_value or self._gradient_differs:
            return None
        return slope if self.clip_factor is None else slope / self.clip_factor.to(slope.dtype)

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
        self, question: Question, first: Quadratic, expected: Tensor | None, deviation: float
    ) -> Quadratic:
        """Ask by the other method, decide which one to go on with, and return the better answer.

        The first direction decides.

        Args:
            question: What was asked.
            first: Answer of the present method.
            expected: The first slope by the gradient.
            deviation: What the self-check found.
        """
        old = self.method or "jvp"
        other: Literal["fd", "jvp"] = "fd" if old == "jvp" else "jvp"
        known = question.kind == "fisher" and self.module is not None
        if not known or self._wanted_method != "auto" or other in self._tried:
            self._doubt(deviation)
            return first
        self.method = other
        try:
            second, _, _, differences = self._ask(question)
        except BaseException:
            self.method = old
            raise
        slope_dtype = second.slopes.dtype
        gradient = second.slopes[0] if expected is None else expected.to(slope_dtype)
        share, old_slope, new_slope, slope, old_curvature, new_curvature = torch.stack(
            [
                differences,
                *(first.slopes[0], second.slopes[0], gradient),
                *(first.matrix[0, 0], second.matrix[0, 0]),
            ]
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
