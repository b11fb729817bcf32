"""RecordedOracle: the recorded micro-batches of one optimizer step, and what they say at once.

Losses, gradients and samples; `window.py` adds what needs a second look along a direction.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_curvature import vectors
from lightning_curvature.oracle.capture import LossCapture, RawCall
from lightning_curvature.oracle.directional import forward_mode
from lightning_curvature.oracle.extra_pass import ContextFactory, in_extra_pass, marked
from lightning_curvature.oracle.hidden import hidden_parameters
from lightning_curvature.oracle.layer_gradients import layer_gradients
from lightning_curvature.oracle.plans import LayerPlan, ProbePlan, SamplePlan
from lightning_curvature.oracle.products import gradients
from lightning_curvature.oracle.protocol import Oracle
from lightning_curvature.oracle.ranks import mean_over_ranks, rank, world_size
from lightning_curvature.oracle.record import LossTerm, PassRecord, loss_terms, no_loss_captured
from lightning_curvature.oracle.replay import Replay, eager, matched_terms
from lightning_curvature.oracle.sampling import sample_gradients
from lightning_curvature.oracle.window_products import WindowProducts, graph_products
from lightning_curvature.oracle.window_samples import WindowSamples

__all__ = ["RecordedOracle", "is_out_of_memory"]


class RecordedOracle(Oracle):
    """Holds the recorded micro-batches of one optimizer step.

    Args:
        params: Parameters of the optimizer, in its order.
        module: Module that holds them; None if unknown (buffers are not protected).
        mean: Averages a tensor over the ranks and returns it; None for one process.
        contexts: Makers of contexts that every extra pass enters.

    Attributes:
        params: Parameters of the optimizer, in its order.
        module: Module that holds them.
        records: The micro-batches of the window.
        clip_factor: What gradient clipping by norm multiplied the gradient with; None if it did
            not happen.
        clipped_by_value: Whether gradients were clipped by value in this step.
        partial: Whether the records are only a part of the data behind the gradient.
        unchanging_buffers: Ids of large buffers that main passes leave alone.

    Raises:
        ValueError: If some parameters are not in the module.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        module: nn.Module | None,
        *,
        mean: Callable[[Tensor], Tensor] | None = None,
        contexts: Sequence[ContextFactory] = (),
    ) -> None:
        super().__init__()
        self.params = list(params)
        self.module = module
        self.records: list[PassRecord] = []
        self.clip_factor: Tensor | None = None
        self.clipped_by_value = False
        self.partial = False
        self.without_backward = False
        self.unchanging_buffers: set[int] = set()
        self._mean = mean
        self._replay = Replay(module, contexts)
        self._active = list(params)
        self._base_loss: Tensor | None = None
        self._has_captured = False
        self._warned: set[str] = set()
        self._samples = WindowSamples()
        self._products: WindowProducts | None = None
        self._layer_calls = 0
        self._hidden: set[int] | None = None
        # Of parameters that came while the main passes ran nothing was computed.
        self._incomplete = False
        # Code compiled by torch frees parts of its graph early.
        self._passes_again = self._replay.compiled
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

    def add(self, record: PassRecord) -> None:
        """Add a micro-batch to the window."""
        self.records.append(record)

    def observe(self, record: PassRecord, total: Tensor, calls: Sequence[RawCall]) -> None:
        """Learn what a main pass has computed, while its graph is there.

        Args:
            record: The pass.
            total: Its loss, or a part of it.
            calls: The loss calls captured in it.
        """
        terms = loss_terms(total, calls)
        plan = self.plan() if self.plan is not None else None
        if plan is not None and self._hidden is None and total.requires_grad:
            self._hidden = hidden_parameters(total, self._trained())
        if plan is not None and not (plan.again or self._passes_again) and total.requires_grad:
            try:
                if isinstance(plan, ProbePlan):
                    self._probe(plan, record, total)
                elif isinstance(plan, LayerPlan):
                    self._see_layers(plan, record, terms)
                elif terms:
                    self._draw(plan, record, terms)
            except (NotImplementedError, RuntimeError) as error:
                if is_out_of_memory(error):
                    raise
                # Fused kernels that cannot be differentiated twice, say; a pass of its own
                # chooses others, and names what it cannot do either.
                self._passes_again = True
        record.terms += [term.detached() for term in terms]

    def select(self, params: Sequence[Tensor]) -> None:
        """Name the parameters that the vectors of the present step refer to."""
        self._active = list(params)
        known = {id(p) for p in self.params}
        new = [p for p in params if id(p) not in known]
        if new:  # a group was added
            self.params += new
            self._incomplete = True

    def clear(self) -> None:
        """Forget the recorded micro-batches."""
        super().clear()
        self._forget()
        self.clip_factor = None
        self.clipped_by_value = False
        self.without_backward = False

    def _forget(self) -> None:
        self.records = []
        self._layer_calls = 0
        self._base_loss = None
        self._samples = WindowSamples()
        self._products = None
        self._incomplete = False

    def _drop_finished(self) -> None:
        """Forget what was computed on graphs of micro-batches whose gradient is gone."""
        kept = self._recorded()
        self._samples.drop_finished(kept)
        if self._products is not None:
            self._products.drop_finished(kept)
        plan = self.plan() if self.plan is not None else None
        if isinstance(plan, LayerPlan):
            plan.observer.drop_finished(kept)

    # Ranks

    @property
    def num_ranks(self) -> int:
        """Number of ranks that answers are averaged over."""
        return 1 if self._mean is None else world_size()

    def mean_(self, packed: Tensor) -> Tensor:
        """Average a tensor of packed scalars over the ranks; one collective."""
        return packed if self._mean is None else self._mean(packed)

    def mean_vectors(self, *vectors: Sequence[Tensor]) -> list[list[Tensor]]:
        """Average lists of tensors over the ranks; one collective per dtype."""
        lists = [list(vector) for vector in vectors]
        alone = self._mean is mean_over_ranks and world_size() == 1
        if self._mean is None or alone:
            return lists
        flat = [x for one in lists for x in one]
        for dtype in dict.fromkeys(x.dtype for x in flat):
            chosen = [i for i, x in enumerate(flat) if x.dtype == dtype]
            packed = self._mean(torch.cat([flat[i].reshape(-1) for i in chosen]))
            parts = torch.split(packed, [flat[i].numel() for i in chosen])
            for i, part in zip(chosen, parts, strict=True):
                flat[i] = part.view(flat[i].shape)
        rest = iter(flat)
        return [[next(rest) for _ in one] for one in lists]

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

    @torch.no_grad()
    def local_loss(self, *, main: bool = False) -> Tensor:
        """Return the loss on this rank; see `Oracle.local_loss`."""
        total = PassRecord.total if main else self._replay.total_alone
        if main:
            self._check_precision()
        # Slopes are differences of nearly equal losses.
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        parts = [total(record).detach().to(dtype) * record.weight for record in self._recorded()]
        return torch.stack(parts).sum()

    def _check_precision(self) -> None:
        half = (torch.bfloat16, torch.float16)
        found = [record.loss.dtype for record in self._recorded() if record.loss is not None]
        if any(dtype in half for dtype in found):
            self._warn(
                "half",
                f"The loss is {str(found[0]).removeprefix('torch.')}, which cannot tell nearly "
                "equal losses apart, so their differences are mostly noise. Compute it in float32: "
                "convert the model's output before the loss, as in `loss_fn(output.float(), y)`.",
            )

    @torch.no_grad()
    def local_slope(self, direction: Sequence[Tensor], params: Sequence[Tensor]) -> Tensor:
        """Return the derivative of the loss along a direction on this rank."""
        records = self._recorded()
        return forward_mode(self._replay, records, params, [direction], "mean").slopes[0]

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

    # Gradients

    def gradient(self) -> list[Tensor]:
        """Return the gradient at the present parameters on this rank, by an eager extra pass."""
        return gradients(self._replay, self._recorded(), self._active)

    def sampled_squares(self) -> list[Tensor]:
        """Return an estimate of the diagonal of the generalized Gauss-Newton matrix.

        Raises:
            NoLossCapturedError: If the curvature of the loss is unknown.
            RuntimeError: If nothing was planned.
        """
        plan = self.plan() if self.plan is not None else None
        if not isinstance(plan, SamplePlan):
            raise RuntimeError("Samples were not planned for this step.")
        self._check_reached()
        self._check_captured()
        records = self._recorded()
        if plan.again or self._passes_again or self._incomplete:
            self._samples = WindowSamples()
            for record in records:
                self._sample_again(plan, record)
        self._samples.fold(plan)
        return self._samples.squares(
            plan,
            self.params,
            self._active,
            self.mean_vectors,
            self.num_ranks,
        )

    def _sample_again(self, plan: SamplePlan, record: PassRecord) -> None:
        with self._terms_again(record) as terms:
            self._draw(plan, record, terms)

    @contextmanager
    def _terms_again(self, record: PassRecord) -> Iterator[list[LossTerm]]:
        """Run a pass again and give its losses, connected to a new graph."""
        with (
            torch.enable_grad(),
            eager(),
            LossCapture() as capture,
            self._replay.running(record),
        ):
            yield [
                LossTerm(term.index, loss, term.coefficient, None)
                for term, loss in matched_terms(record, capture.calls)
            ]

    def see_layers(self) -> None:
        """Make sure that the observer of the plan has seen every micro-batch of the step.

        Raises:
            NoLossCapturedError: If the curvature of the loss is unknown.
            RuntimeError: If nothing was planned.
        """
        plan = self.plan() if self.plan is not None else None
        if not isinstance(plan, LayerPlan):
            raise RuntimeError("Nothing about layers was planned for this step.")
        self._check_reached()
        self._check_captured()
        if not (self._passes_again or self._incomplete):
            return
        plan.observer.drop_finished([])
        # The same draws as on the graphs of the main passes.
        self._layer_calls = 0
        with plan.observer.during_extra_pass():
            for record in self._recorded():
                with self._terms_again(record) as terms:
                    self._see_layers(plan, record, terms)

    def _see_layers(self, plan: LayerPlan, record: PassRecord, terms: Sequence[LossTerm]) -> None:
        self._layer_calls += 1
        own = rank() if self._mean is not None else 0
        edges, params = plan.observer.edges()
        if terms and not edges and plan.observer.has_blocks and not in_extra_pass():
            # A compiled training_step hides its layers: the pass that runs again is eager.
            self._passes_again = True
            return
        # Outside of autocast, as every backward: it would square activations in half precision.
        full = torch.autocast(self.device.type, enabled=False)
        with torch.enable_grad(), marked(), full:
            found = layer_gradients(terms, edges, params, plan, (own, self._layer_calls - 1))
            if found is not None:
                plan.observer.observe(record, *found)

    def _draw(self, plan: SamplePlan, record: PassRecord, terms: Sequence[LossTerm]) -> None:
        # The gradients of one micro-batch wait until its weight is known, not those of all.
        self._samples.fold(plan)
        own = rank() if self._mean is not None else 0
        sampler = plan.sampler(plan.seed, plan.step, own, self._samples.index())
        # Hooks on layer outputs must not take this for the gradient of the loss.
        with torch.enable_grad(), marked():
            sample = sample_gradients(terms, self.params, sampler, plan.fraction)
        if sample is not None:
            self._samples.add(record, sample)

    def products(self) -> list[tuple[list[Tensor], list[Tensor]]]:
        """Return every probe that was planned with its product H z on this rank.

        Raises:
            RuntimeError: If nothing was planned.
        """
        plan = self.plan() if self.plan is not None else None
        if not isinstance(plan, ProbePlan):
            raise RuntimeError("Products were not planned for this step.")
        self._check_reached()
        known = self._products is not None and self._products.cover(self._active)
        if self._products is not None and known and not (plan.again or self._passes_again):
            return self._products.of(self._active)
        pairs = WindowProducts(self._trained(), plan).of(self._active)
        return [(z, self.hvp(z, method=plan.method)) for z, _ in pairs]

    def _check_reached(self) -> None:
        """Check that what is asked for can be differentiated with respect to chosen parameters."""
        hidden = sum(id(p) in (self._hidden or ()) for p in self._active)
        if hidden:
            raise RuntimeError(
                f"{hidden} of {len(self._active)} parameters with a gradient are used inside of "
                "activation checkpointing with use_reentrant=True only, which hides them from "
                "everything but `backward`. Set use_reentrant=False."
            )

    def _trained(self) -> list[Tensor]:
        return [p for p in self.params if p.requires_grad]

    def _probe(self, plan: ProbePlan, record: PassRecord, total: Tensor) -> None:
        """Compute products on the graph of a main pass."""
        if plan.method == "fd":
            return
        if self._products is None:
            self._products = WindowProducts(self._trained(), plan)
        with torch.enable_grad(), marked():
            found = graph_products(
                total,
                self._products.params,
                self._products.probes,
                check=not self._replay.checked_twice,
            )
        self._replay.checked_twice = True
        self._products.add(record, found)

    def _warn(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(message, RuntimeWarning, stacklevel=2)


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether memory ran out, which another method would not mend."""
    # The allocator of the CPU, drivers and libraries raise an ordinary RuntimeError.
    text = str(error)
    plain = "can't allocate memory" in text or "out of memory" in text
    return plain or isinstance(error, torch.OutOfMemoryError)
