"""Base of the optimizers that know the loss only by its values: no backward, no gradients.

Malladi et al., "Fine-tuning language models with just forward passes", 2023, arXiv:2305.17333. One
step measures the loss at theta + eps z and theta - eps z along a random direction z that is drawn
again whenever it is needed, takes g = (l+ - l-) / (2 eps) for the slope, and g z for the gradient.

A subclass says in `_visit` and `_read` where it looks at the loss and what it concludes, and in
`_rule` what it does with an estimate of the gradient. Where this differs from the official codes:

- numbers come from private keyed generators, the global ones are never touched;
- parameters are changed in place; the last restoring sweep and the update share one draw;
- slopes are differences of losses averaged over micro-batches and ranks;
- the first evaluation is the training step as Lightning runs it, so hooks and logs happen once.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_curvature.optim.displaced import DisplacedOptimizer
from lightning_curvature.optim.displacement import Point
from lightning_curvature.optim.failures import FailureCounter
from lightning_curvature.optim.saved_state import STATE_KEY
from lightning_curvature.optim.zeroth_passes import LivePasses, Passes, RecordedPasses
from lightning_curvature.optim.zeroth_storage import is_half
from lightning_curvature.oracle.full_precision import FullPrecisionLosses
from lightning_curvature.oracle.protocol import MissingCapabilityError, Oracle
from lightning_curvature.oracle.window import DirectionalMethod
from lightning_curvature.vectors import scalar_dtype

__all__ = ["LARGEST_SLOPE", "ZerothOrderOptimizer"]

_COUNTS = ("failures", "skipped_steps")
# What is larger counts as not finite: float32 could not square it.
LARGEST_SLOPE = 1e18


class ZerothOrderOptimizer(DisplacedOptimizer):
    """Base of the optimizers whose steps run no backward.

    Groups with ``first_order=True`` get their gradient by an ordinary backward through the layers
    that need one, at the undisplaced parameters; the update is the same.

    Args:
        params: Parameters or parameter groups.
        defaults: Hyper-parameters.

    Attributes:
        noise_source: Gives the random directions instead of the keyed generators, None for those.
        on_answer: Called with every answer that a step depends on, None for nobody.
    """

    asks: ClassVar[frozenset[str]] = frozenset({"forward"})

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self.on_answer: Callable[[Tensor], None] | None = None
        super().__init__(params, defaults)
        self._failures = self._new_failure_counter()

    def _reset(self) -> None:
        super()._reset()
        # Where the main passes of the step were made, and whether their loss is still to be used.
        self._main_at: Point | None = None
        self._main_is_new = False
        self._stepping = False
        # Since the last step: displacements for main passes and back; whether the coming step
        # begins at the first point.
        self._trips = 0
        self._begins_away = True

    def attach_model(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Tensor],
        *,
        directional: DirectionalMethod = "auto",
        grad_scaler: torch.amp.GradScaler | None = None,
    ) -> Callable[..., Tensor]:
        """Prepare an ordinary PyTorch loop; see `CurvatureOptimizer.attach_model`.

        With ``step(closure)`` the first evaluation of the closure is one of those that the slope
        needs; in a loop that calls the model by itself it is one more.

        Args:
            model: Model that holds all parameters of this optimizer.
            loss_fn: Called as ``loss_fn(model_output, *targets)``, returns a scalar.
            directional: Of no effect here.
            grad_scaler: Refused unless it is disabled: there are no gradients to scale.

        Returns:
            A function with the arguments and the result of ``loss_fn`` that also records the batch.

        Raises:
            ValueError: If some parameters of this optimizer are not in ``model``.
            MissingCapabilityError: If there is a gradient scaler.
        """
        if grad_scaler is not None and grad_scaler.is_enabled():
            raise MissingCapabilityError(
                f"{type(self).__name__} has no gradients for a GradScaler to scale. Leave it out, "
                "and use bfloat16 or float16 weights, or autocast to bfloat16."
            )
        return super().attach_model(model, loss_fn, directional=directional)

    def _home(self) -> None:
        if self._displacement is not None and self._displacement.away is not None:
            self._displacement.home()
            self._trips += 1

    def _watch(self, oracle: Oracle) -> None:
        known = {id(p) for p in self._all_params()} & self._indices.keys()
        if not known:
            module = oracle.module
            ordered = self._all_params() if module is None else list(module.parameters())
            self._indices = {id(p): index for index, p in enumerate(ordered)}
        oracle.main = self._main_pass

    # Main passes

    def _first_point(self) -> Point | None:
        """Tell where the first evaluation of a step takes place, None for the parameters as are."""
        return None

    @contextmanager
    def _main_pass(self, *, displace: bool = True) -> Iterator[None]:
        """Surround a main pass: no graph, and the parameters at the first point of the step.

        Args:
            displace: Whether they may be displaced.
        """
        hybrid = self.has_gradients
        first = self._first_point() if displace and not hybrid else None
        with ExitStack() as stack:
            stack.enter_context(_in_mode(self._module(), self.param_groups[0]["model_mode"]))
            stack.enter_context(self.only_gradients() if hybrid else torch.no_grad())
            stack.enter_context(self._precisely())
            # Within a step the next evaluation, or the update, starts from here.
            if first is not None:
                with torch.no_grad():
                    self._begin().go(first)
            # Casts of other weights, where one autocast region surrounds several steps.
            torch.clear_autocast_cache()
            self._main_at, self._main_is_new = first, True
            try:
                yield
            except BaseException:
                with torch.no_grad():
                    self._home()
                raise
            if not self._stepping:
                with torch.no_grad():
                    try:
                        self._home()
                    except BaseException:  # an interrupt: nobody else would bring them back
                        self._home()
                        raise

    def _module(self) -> nn.Module | None:
        module = None if self.oracle is None else self.oracle.module
        if module is None and self.param_groups[0]["model_mode"] == "eval":
            raise MissingCapabilityError(
                f"{type(self).__name__}(model_mode='eval') must know the model, which a bare "
                "closure does not tell. Call optimizer.attach_model(model, loss_fn), or put the "
                "model into eval mode yourself and use model_mode='train', which leaves it alone."
            )
        return module

    def _loss_at(self, passes: Passes, point: Point | None) -> Tensor:
        """Return the loss at a point on this rank; the main pass is not repeated.

        Args:
            passes: Evaluates it.
            point: The point, None for the parameters as they are.
        """
        moving = self._begin()
        if self._main_is_new and self._main_at == point:
            self._main_is_new = False
            return passes.main()
        if point is None:
            moving.home()
        else:
            moving.go(point)
        with self._precisely():
            return passes.loss()

    def _precisely(self) -> AbstractContextManager[Any]:
        """Make a context in which losses of half-precision models are float32."""
        return (
            FullPrecisionLosses() if any(is_half(p) for p in self._all_params()) else nullcontext()
        )

    # One step

    def _step(self, oracle: Oracle | None, closure: Callable[[], Any] | None) -> Any:
        assert oracle is not None
        self._stepping = True
        result = None
        try:
            if closure is not None:
                with torch.enable_grad():
                    result = oracle.evaluate(closure)
            if oracle.without_backward:
                return result
            oracle.finish_main()
            if oracle.ready:
                oracle.select(self._trained())
                self._take(LivePasses(oracle, self.on_answer))
                return self._shown(result)
            if _is_empty(closure) and oracle.missing() is not None:
                raise MissingCapabilityError(f"{type(self).__name__} {oracle.missing()}")
        finally:
            self._home()
            torch.clear_autocast_cache()
            self._stepping = False
            self._main_is_new = False
        return result

    def _shown(self, result: Any) -> Any:
        """Return the step's loss in the place of the one that a closure returned, if it did."""
        if isinstance(result, Tensor):
            return self.stats["loss"]
        return self.stats["loss"].item() if isinstance(result, (int, float)) else result

    @property
    def stream_indices(self) -> list[int]:
        """Numbers of the parameters in the keys of their random streams, in the order of groups."""
        return [self._index(p) for p in self._all_params()]

    @stream_indices.setter
    def stream_indices(self, indices: Sequence[int]) -> None:
        self._indices = {id(p): i for p, i in zip(self._all_params(), indices, strict=True)}
        self._reset()

    @property
    def main_moves(self) -> tuple[int, bool]:
        """How main passes moved the parameters, for `replay_step`; to be read in ``on_answer``.

        How often they went to the first point and back since the last step, and whether they were
        there when the step began. Without copies the round-off of these ways stays in them.
        """
        return self._trips, self._begins_away

    @torch.no_grad()
    def replay_step(
        self, answers: Sequence[Tensor], main_moves: tuple[int, bool] = (0, True)
    ) -> None:
        """Take a step from what an earlier run concluded, without any loss.

        Args:
            answers: What ``on_answer`` was called with in that step, in order.
            main_moves: What `main_moves` was then.

        Raises:
            ValueError: If they are fewer than the optimizer asks for.
        """
        self._stepping = True
        first = self._first_point()
        trips, begins_away = main_moves
        try:
            if first is not None:
                for _ in range(trips):
                    self._begin().go(first)
                    self._home()
                if begins_away:
                    self._begin().go(first)
            self._main_at, self._main_is_new = first, True
            self._take(RecordedPasses(answers, self._all_params()[0].device))
        finally:
            self._home()
            self._stepping = False
            self._main_is_new = False

    def _take(self, passes: Passes) -> None:
        moving = self._begin()
        unmoved = self._main_is_new and self._main_at is not None
        self._begins_away = moving.away is not None or not unmoved
        self._prepare(passes)
        blocks = list(range(len(moving.blocks)))
        coordinate = self.param_groups[0]["blockwise"] == "coordinate"
        answers: list[Tensor] = []
        loss: Tensor | None = None
        finite: Tensor | None = None
        for together in [[block] for block in blocks] if coordinate else [blocks]:
            answer, found = self._measure(passes, together)
            loss = found if loss is None else loss
            # Not so for NaN, either.
            usable = (answer.abs() <= LARGEST_SLOPE).all()
            finite = usable if finite is None else usable & finite
            on = self._judge(answer, finite)
            if on is not None:
                for block, part in zip(together, answer.chunk(len(together)), strict=True):
                    self._update_block(moving, block, part, on)
            answers.append(answer)
        assert loss is not None
        assert finite is not None
        if on is not None:
            for group in self.param_groups:
                if group["first_order"]:
                    self._update_by_gradient(group, on)
        self._finish(torch.cat(answers), loss, finite)
        self._home()
        self._trips = 0
        self._steps_done += 1

    def _prepare(self, passes: Passes) -> None:
        """Make room for state, before anything is displaced.

        Args:
            passes: For those that measure something beforehand.
        """

    def _measure(self, passes: Passes, blocks: list[int]) -> tuple[Tensor, Tensor]:
        """Look at the loss and conclude, for several blocks in one collective.

        Args:
            passes: Gives losses.
            blocks: Numbers of the blocks.

        Returns:
            What `_read` concluded, one block after the other, and the loss.
        """
        found = [self._visit(passes, block) for block in blocks]
        sizes = [len(part) for part in found]

        def read(averages: Tensor) -> tuple[Tensor, Tensor]:
            parts = [self._read(part) for part in torch.split(averages, sizes)]
            return torch.cat([answer for answer, _ in parts]), parts[0][1]

        settled = passes.settle([x for part in found for x in part], read)
        if self.param_groups[0]["restore"] == "inplace":
            self._home()
        return settled

    def _judge(self, answer: Tensor, finite: Tensor) -> float | Tensor | None:
        """Return what updates are multiplied by: 1, or 0 where the loss was not finite.

        Args:
            answer: See `_read`; replaced by zeros if not finite.
            finite: Whether all that the step has concluded so far is finite.

        Returns:
            1.0, None to leave out the update; on devices where looking means waiting, a tensor.
        """
        if self._can_look(finite):
            return 1.0 if bool(finite) else None
        answer.masked_fill_(~finite, 0.0)
        return finite.to(scalar_dtype(self._all_params()))

    @abstractmethod
    def _visit(self, passes: Passes, block: int) -> list[Tensor]:
        """Look at the loss where the estimate needs it.

        Args:
            passes: Gives losses.
            block: Number of the block of parameters to displace.

        Returns:
            Numbers of this rank, 0-dim tensors; they are averaged over the ranks.
        """

    @abstractmethod
    def _read(self, averages: Tensor) -> tuple[Tensor, Tensor]:
        """Conclude from what `_visit` returned.

        Args:
            averages: Averages over the ranks, ``[k]``.

        Returns:
            One row per direction, ``[num_samples, columns]``: the slope, and what else the update
            needs; and the loss, a 0-dim tensor.
        """

    # Failures and statistics

    def _new_failure_counter(self, *, resumed: bool = False) -> FailureCounter:
        return FailureCounter(
            type(self).__name__,
            int(self.param_groups[0]["max_failures"]),
            cause="a loss was not finite",
            advice="or lower lr or perturbation_scale",
            resumed=resumed,
        )

    def _finish(self, answer: Tensor, loss: Tensor, finite: Tensor) -> None:
        """Count, and show what the step measured.

        Args:
            answer: All that was concluded.
            loss: The loss, NaN if unknown.
            finite: Whether all of it was finite.
        """
        slopes = answer[:, 0]
        like = torch.zeros((), dtype=answer.dtype, device=answer.device)
        stats = {
            "loss": loss,
            "projected_grad": slopes.square().mean().sqrt(),
            "lr": torch.full_like(like, max(float(g["lr"]) for g in self.param_groups)),
        }
        counts = {
            name: torch.as_tensor(self._scalars.get(name, 0.0), dtype=like.dtype).to(like.device)
            for name in _COUNTS
        }
        self._failures.update(counts, finite, stats)
        self._scalars.update(counts)
        self.stats = {**self.stats, **stats, "skipped_steps": counts["skipped_steps"]}
        self._failures.check(counts, self._steps_done + 1, self.stats)

    def _curvature_state(self) -> dict[str, Any]:
        indices = [self._indices.get(id(p), -1) for p in self._all_params()]
        return {**super()._curvature_state(), "streams": indices}

    def _check_state(self, saved: Any) -> None:
        super()._check_state(saved)
        streams = saved[STATE_KEY].get("streams")
        sound = isinstance(streams, list) and all(type(index) is int for index in streams)
        if not sound or len(streams) != len(self._all_params()):
            raise ValueError(
                f"Cannot load the state into {type(self).__name__}: 'streams' must be a list of "
                f"{len(self._all_params())} integers, one per parameter."
            )

    def _load_curvature_state(self, state: dict[str, Any]) -> None:
        super()._load_curvature_state(state)
        saved = zip(self._all_params(), state["streams"], strict=True)
        self._indices = {id(p): index for p, index in saved if index >= 0}
        self._reset()
        self._failures = self._new_failure_counter(resumed=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickle or deep copy; it has to be attached anew."""
        self.__dict__.setdefault("noise_source", None)
        self.__dict__.setdefault("on_answer", None)
        self.__dict__.setdefault("_indices", {})
        self._reset()
        super().__setstate__(state)
        self._failures = self._new_failure_counter(resumed=True)

    def _update(self, params: list[Tensor], oracle: Oracle | None) -> None:
        raise NotImplementedError("A zeroth-order step is not made of gradients.")


def _is_empty(closure: Callable[[], Any] | None) -> bool:
    """Tell whether there is no closure, or that of Lightning where the user gave none."""
    inner = getattr(closure, "args", (closure,))[-1:]
    return any(
        part is None or getattr(part, "__name__", "") == "do_nothing_closure" for part in inner
    )


@contextmanager
def _in_mode(module: nn.Module | None, mode: str) -> Iterator[None]:
    """Put a module into eval mode for a while, if that is wanted."""
    if module is None or mode == "train":
        yield
        return
    changed = [part for part in module.modules() if part.training]
    try:
        for part in changed:
            part.training = False
        yield
    finally:
        for part in changed:
            part.training = True
