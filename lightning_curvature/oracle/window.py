"""WindowOracle: answers over the micro-batches of one optimizer step."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_curvature import vectors
from lightning_curvature.checks import check_choice
from lightning_curvature.oracle.directional import (
    PROBE_LENGTHS,
    Measured,
    finite_differences,
    forward_mode,
    hessian_form,
    hessian_product,
)
from lightning_curvature.oracle.extra_pass import ContextFactory
from lightning_curvature.oracle.protocol import (
    CurvatureKind,
    Directional,
    Oracle,
    RegressionScaling,
)
from lightning_curvature.oracle.record import PassRecord, no_loss_captured
from lightning_curvature.oracle.replay import Replay
from lightning_curvature.oracle.self_check import TOLERANCES, SelfCheck

__all__ = ["DirectionalMethod", "WindowOracle"]

DirectionalMethod = Literal["auto", "fd", "jvp"]
_Question = tuple[Sequence[Tensor], CurvatureKind, RegressionScaling, Sequence[Tensor] | None]

# Share of the loss outside the captured losses above which the user is told.
_UNMODELED_LIMIT = 0.2


class WindowOracle(Oracle):
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
        params: Parameters of the optimizer, in its order.
        module: Module that holds them.
        records: The micro-batches of the window.
        method: Method that `directional` uses: "fd", "jvp", or None before the first ask.
        self_check: Deviation between the measured slope and <grad, d>.
        clip_factor: What gradient clipping by norm multiplied the gradient with; None if it did
            not happen.
        clipped_by_value: Whether gradients were clipped by value in this step.
        partial: Whether the records are only a part of the data behind the gradient.
        unchanging_buffers: Ids of large buffers that main passes leave alone.

    Raises:
        ValueError: If some parameters are not in the module.
    """

    capabilities = frozenset({"loss", "directional", "hvp"})

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
        self.params = list(params)
        self.module = module
        self.records: list[PassRecord] = []
        self.method: Literal["fd", "jvp"] | None = None
        self.self_check = SelfCheck()
        self.clip_factor: Tensor | None = None
        self.clipped_by_value = False
        self.partial = False
        self.without_backward = False
        self._gradient_differs = False
        self._has_captured = False
        self._choice: str | None = None
        self._resumed: dict[str, Any] = {}
        self.unchanging_buffers: set[int] = set()
        self._wanted_method: DirectionalMethod = directional
        self._mean = mean
        self._replay = Replay(module, contexts)
        self._active = list(params)
        self._base_loss: Tensor | None = None
        self._tried: set[str] = set()
        self._warned: set[str] = set()
        if module is not None:
            missing = sum(id(p) not in self._replay.parameters for p in self.params)
            if missing:
                raise ValueError(
                    f"{missing} of {len(self.params)} optimized parameters are not in the attached "
                    f"{type(module).__name__}: its loss cannot be evaluated along them. Attach the "
                    "module that holds all parameters of the optimizer."
                )

    # The window

    @property
    def ready(self) -> bool:
        """Whether a main pass was recorded for the present step."""
        return bool(self._recorded())

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.params[0].device

    def _recorded(self) -> list[PassRecord]:
        return [record for record in self.records if record.loss is not None]

    def evaluate(self, closure: Callable[[], Any]) -> Any:
        """Run the main pass by calling ``closure`` exactly once and return its result."""
        return closure()

    def add(self, record: PassRecord) -> None:
        """Add a micro-batch to the window."""
        self.records.append(record)

    def select(self, params: Sequence[Tensor]) -> None:
        """Name the parameters that the vectors of the present step refer to."""
        self._active = list(params)

    def clear(self) -> None:
        """Forget the recorded micro-batches."""
        self.records = []
        self._base_loss = None
        self.clip_factor = None
        self.clipped_by_value = False
        self.without_backward = False

    def mean_(self, packed: Tensor) -> Tensor:
        """Average a tensor of packed scalars over the ranks; one collective."""
        return packed if self._mean is None else self._mean(packed)

    def grad_slope(self, slope: Tensor) -> Tensor | None:
        """Undo the gradient clipping of the training loop in <grad, d>."""
        if self.clipped_by_value or self._gradient_differs:
            return None
        return slope if self.clip_factor is None else slope / self.clip_factor.to(slope.dtype)

    # Losses

    def _local(self, total: Callable[[PassRecord], Tensor]) -> Tensor:
        """Return the weighted sum of a scalar over the micro-batches of this rank."""
        records = self._recorded()
        if not records:
            raise RuntimeError(
                "The oracle was asked before a main pass was recorded: compute the loss and its "
                "gradient first."
            )
        dtype = vectors.scalar_dtype(self.params)
        return torch.stack([total(record).to(dtype) * record.weight for record in records]).sum()

    def base_loss(self) -> Tensor:
        """Return the loss of the main pass, a 0-dim tensor."""
        if self._base_loss is None:
            self._base_loss = self.mean_(self._local(PassRecord.total).reshape(1))[0]
        return self._base_loss

    @torch.no_grad()
    def loss(self) -> Tensor:
        """Return the loss at the present parameters; one forward per micro-batch."""
        new = self._local(self._replay.total_alone)
        if self._base_loss is not None:
            return self.mean_(new.reshape(1))[0]
        packed = self.mean_(torch.stack([new, self._local(PassRecord.total)]))
        self._base_loss = packed[1]
        return packed[0]

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

    def _check_captured(self) -> None:
        """Check once that some rank has seen a loss function; waits for the device.

        Later batches without one have no curvature: none of their examples has a target, say.
        """
        if self._has_captured:
            return
        found = any(record.terms for record in self._recorded())
        flag = torch.tensor([float(found)], device=self.device)
        if not float(self.mean_(flag)) > 0:
            raise no_loss_captured()
        self._has_captured = True

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
            if self._wanted_method == "jvp" or _is_out_of_memory(error):
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

    def hvp(self, directions: Sequence[Tensor]) -> list[Tensor]:
        """Return the Hessian-vector product of the loss on this rank, by double backward."""
        sums = [torch.zeros_like(p) for p in self._active]
        for record in self._recorded():
            _, parts = hessian_product(self._replay, record, self._active, directions)
            for total, part in zip(sums, parts, strict=True):
                if part is not None:
                    total.add_(part * record.weight)
        return sums

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

    def _warn(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(message, RuntimeWarning, stacklevel=2)


def _is_out_of_memory(error: Exception) -> bool:
    # The allocator of the CPU, drivers and libraries raise an ordinary RuntimeError.
    text = str(error)
    plain = "can't allocate memory" in text or "out of memory" in text
    return plain or isinstance(error, torch.OutOfMemoryError)


def _close(one: float, other: float) -> bool:
    return abs(one - other) <= TOLERANCES["fd"] * max(abs(one), abs(other))
