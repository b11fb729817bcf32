"""LayerTape: records the calls of the layers of a main pass, so that gradients can be sent to them.

What `statistics.py` reports belongs to the gradient of the loss. K-FAC needs other gradients on the
same graph (under labels drawn from the model), and these only as far as the outputs of the layers:
so a call is kept as its input and the place of its output in the graph.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from lightning_curvature.curvature.attention_calls import AttentionCalls
from lightning_curvature.oracle.extra_pass import in_extra_pass, version_of

__all__ = ["LayerCall", "LayerTape"]


class LayerCall(NamedTuple):
    """One call of a layer.

    Attributes:
        name: Name of the layer.
        given: Its input, detached.
        version: Version counter of the input when the layer saw it.
        edge: Where its output is in the graph.
        batch_axis: Axis of the examples in input and output.
    """

    name: str
    given: Tensor
    version: int
    edge: GradientEdge
    batch_axis: int = 0

    @property
    def is_sound(self) -> bool:
        """Whether the input still is what the layer saw."""
        return version_of(self.given) == self.version


class _Hook:
    """A hook that copies and pickles of the model carry along without its effect."""

    def __init__(self, function: Callable[..., Any] | None = None) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return None if self.function is None else self.function(*args)

    def __reduce__(self) -> tuple[type["_Hook"], tuple[()]]:
        return type(self), ()


class LayerTape:
    """Records the calls of chosen layers in passes with gradients.

    Not recorded are evaluation, the second forward of a checkpointed block, compiled regions, and
    extra passes other than those made between `open` and `shut`. The output of a layer may be
    changed in place afterwards.

    Args:
        layers: Layers by name.
        attentions: Attention layers by name; the calls of their projections are recorded under
            ``{name}.q_proj``, ``{name}.k_proj``, ``{name}.v_proj`` and ``{name}.out_proj``.
        enabled: Tells at every forward of a layer whether to record it.

    Attributes:
        calls: The calls, in order.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        attentions: Mapping[str, nn.MultiheadAttention],
        enabled: Callable[[], bool],
    ) -> None:
        self.calls: list[LayerCall] = []
        self._enabled = enabled
        self._in_extra_pass = False
        # In front of all others: what they see and keep is what the layer finally returns.
        self._handles = [
            layer.register_forward_hook(
                _Hook(_Recorder(self, name).after_forward), prepend=True, with_kwargs=True
            )
            for name, layer in layers.items()
        ]
        for name, attention in attentions.items():
            recorder = _Recorder(self, name)
            self._handles += [
                attention.register_forward_pre_hook(_Hook(recorder.before_attention)),
                attention.register_forward_hook(_Hook(recorder.after_attention), always_call=True),
            ]

    def open(self) -> None:
        """Record extra passes from now on, and nothing else."""
        self.calls = []
        self._in_extra_pass = True

    def shut(self) -> None:
        """Record main passes again."""
        self.calls = []
        self._in_extra_pass = False

    def take(self) -> list[LayerCall]:
        """Return the calls recorded so far and forget them."""
        calls, self.calls = self.calls, []
        return calls

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.calls = []

    @property
    def is_recording(self) -> bool:
        """Whether a layer called now is recorded."""
        # The compiler may trace through here; its regions must not depend on what comes below.
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return False
        # Inside a backward: a checkpointed block runs for the second time.
        if torch._C._current_graph_task_id() != -1:
            return False
        if self._in_extra_pass:
            return in_extra_pass()
        return not in_extra_pass() and self._enabled()

    def record(self, name: str, given: Tensor, output: Tensor, batch_axis: int = 0) -> Tensor:
        """Record a call.

        Args:
            name: Name of the layer.
            given: Its input.
            output: Its output.
            batch_axis: Axis of the examples in both.

        Returns:
            What is to take the place of the output.
        """
        if not output.requires_grad:
            return output
        # An operation in place on a view puts its place out of the graph.
        replaced = output.clone() if output._is_view() else output
        edge = get_gradient_edge(replaced)
        given = given.detach()
        self.calls.append(LayerCall(name, given, version_of(given), edge, batch_axis))
        return replaced


class _Recorder:
    """What the hooks of one layer call."""

    def __init__(self, tape: LayerTape, name: str) -> None:
        self._tape = tape
        self._name = name
        self._attention: AttentionCalls | None = None

    def after_forward(self, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        given = args[0] if args else kwargs.get("input")
        both = isinstance(output, Tensor) and isinstance(given, Tensor)
        if not both or not self._tape.is_recording:
            return None
        replaced = self._tape.record(self._name, given, output)
        return None if replaced is output else replaced

    def before_attention(self, layer: nn.Module, args: Any) -> None:
        record = self._tape.record if self._tape.is_recording else None
        if record is not None or _may_run_twice():
            self._attention = AttentionCalls(self._name, record or _unrecorded)
            self._attention.__enter__()  # type: ignore[no-untyped-call]

    def after_attention(self, layer: nn.Module, args: Any, output: Any) -> None:
        if self._attention is not None:
            attention, self._attention = self._attention, None
            attention.__exit__(None, None, None)  # type: ignore[no-untyped-call]


def _may_run_twice() -> bool:
    """Whether this may be a forward under checkpointing, or its repetition in a backward.

    Both have to compute alike, whether they are recorded or not: checkpointing counts the tensors
    that each of them saves.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    if torch._C._current_graph_task_id() != -1:
        return True
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _unrecorded(name: str, given: Tensor, output: Tensor, batch_axis: int) -> Tensor:
    return output
