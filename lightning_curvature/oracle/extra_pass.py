"""An extra look at a batch that leaves no trace.

The main pass is preceded by `Environment.of`, which remembers the random state, the buffers and the
autocast state it started from. `extra_pass` recreates that environment and afterwards puts back
what it found: random state of torch, NumPy and Python, buffers by reference and by value, the state
of torchmetrics. What it cannot know about (Python attributes changed in ``training_step``, direct
calls of a logger, an EMA copy) user code can protect with `in_extra_pass`.
"""

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Environment", "RandomState", "extra_pass", "in_extra_pass", "marked", "version_of"]

ContextFactory = Callable[[], AbstractContextManager[Any]]

# Buffers above this size that a first main pass did not change are not copied again.
LARGE_BUFFER = 1 << 20

_depth = 0


def in_extra_pass() -> bool:
    """Tell whether the code runs in an additional pass of an optimizer.

    Use it in a ``training_step`` or hook with side effects that the library cannot undo: counters,
    direct ``self.logger.experiment`` calls, updates of a teacher network.

    Examples:
        >>> in_extra_pass()
        False
    """
    return _depth > 0


def version_of(tensor: Tensor) -> int:
    """Return the version counter of a tensor, -1 for one made in inference mode, which has none."""
    return -1 if tensor.is_inference() else tensor._version


def _is_fixed(tensor: Tensor) -> bool:
    """Tell whether a buffer cannot be written to: made in inference mode, or expanded."""
    if tensor.is_inference():
        return True
    if tensor.layout != torch.strided:
        return False
    return any(n > 1 and step == 0 for n, step in zip(tensor.shape, tensor.stride(), strict=True))


@contextmanager
def marked() -> Iterator[None]:
    """Let `in_extra_pass` be true: what runs is not the main pass and its backward."""
    global _depth  # noqa: PLW0603 - one flag for the process, read by user code
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1


@dataclass(frozen=True)
class RandomState:
    """State of all random streams that a training step may draw from."""

    torch_cpu: Tensor
    device: torch.device | None
    torch_device: Tensor | None
    python: Any
    numpy: Any

    @classmethod
    def now(cls, device: torch.device) -> "RandomState":
        """Take the present state.

        Args:
            device: Device of the parameters; its generator is included if it has one of its own.
        """
        backend = getattr(torch, device.type, None) if device.type != "cpu" else None
        has_own = backend is not None and hasattr(backend, "get_rng_state")
        numpy = sys.modules.get("numpy")
        return cls(
            torch_cpu=torch.get_rng_state(),
            device=device if has_own else None,
            torch_device=_device_rng(device) if has_own else None,
            python=random.getstate(),
            numpy=None if numpy is None else numpy.random.get_state(),
        )

    def restore(self) -> None:
        """Put the streams back into this state."""
        torch.set_rng_state(self.torch_cpu)
        if self.device is not None:
            backend = getattr(torch, self.device.type)
            if self.device.type == "mps":
                backend.set_rng_state(self.torch_device)
            else:
                backend.set_rng_state(self.torch_device, self.device)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)


def _device_rng(device: torch.device) -> Tensor:
    backend = getattr(torch, device.type)
    state: Tensor = (
        backend.get_rng_state() if device.type == "mps" else backend.get_rng_state(device)
    )
    return state


@dataclass
class _Buffer:
    """A buffer slot as the main pass found it; ``value`` is None where no copy was taken."""

    slot: dict[str, Tensor | None]
    name: str
    tensor: Tensor
    value: Tensor | None
    version: int

    def is_unchanged(self) -> bool:
        """Tell whether the slot still holds the same tensor with the same value."""
        return self.slot.get(self.name) is self.tensor and version_of(self.tensor) == self.version


@dataclass
class Environment:
    """What a main pass started from.

    Attributes:
        device: Device of the parameters.
        random_state: Random streams.
        autocast: (enabled, dtype) of autocast on that device.
        default_dtype: torch's default dtype.
        buffers: Buffers of the module.
        metrics: Metrics (of torchmetrics) in the module.
        training: Each submodule with its training flag.
    """

    device: torch.device
    random_state: RandomState
    autocast: tuple[bool, torch.dtype]
    default_dtype: torch.dtype
    buffers: list[_Buffer] = field(default_factory=list)
    metrics: list[nn.Module] = field(default_factory=list)
    training: list[tuple[nn.Module, bool]] = field(default_factory=list)

    @classmethod
    def of(
        cls, module: nn.Module | None, device: torch.device, unchanging: set[int] | None = None
    ) -> "Environment":
        """Take the environment at the start of a main pass.

        Args:
            module: Module whose buffers are remembered; None for a bare closure.
            device: Device of the parameters.
            unchanging: Ids of large buffers known not to change; see `learn_unchanging`.
        """
        kind = device.type
        environment = cls(
            device,
            RandomState.now(device),
            (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)),
            torch.get_default_dtype(),
        )
        torchmetrics = sys.modules.get("torchmetrics")
        kinds = (
            (torchmetrics.Metric, torchmetrics.MetricCollection) if torchmetrics is not None else ()
        )
        skip = unchanging or set()
        for submodule in module.modules() if module is not None else ():
            environment.training.append((submodule, submodule.training))
            if isinstance(submodule, kinds):
                environment.metrics.append(submodule)
            slot = submodule._buffers
            # Of a module that knows which of its buffers no pass writes to.
            fixed = getattr(submodule, "fixed_buffers", ())
            for name, tensor in slot.items():
                if tensor is not None:
                    kept = name in fixed or id(tensor) in skip or _is_fixed(tensor)
                    value = None if kept else tensor.detach().clone()
                    environment.buffers.append(
                        _Buffer(slot, name, tensor, value, version_of(tensor))
                    )
        return environment

    def learn_unchanging(self, unchanging: set[int]) -> None:
        """Update the ids of the large buffers that a main pass leaves alone.

        Args:
            unchanging: Set to update in place, after the main pass.
        """
        for buffer in self.buffers:
            if not buffer.is_unchanged():
                unchanging.discard(id(buffer.tensor))
            elif buffer.tensor.numel() > LARGE_BUFFER:
                unchanging.add(id(buffer.tensor))


@contextmanager
def _buffers_of(environment: Environment) -> Iterator[None]:
    """Give the module the buffers of the main pass and afterwards its present ones."""
    present = [
        (buffer, live, None if live is None or _is_fixed(live) else live.detach().clone())
        for buffer in environment.buffers
        # A large buffer that nobody touched is left alone. Small ones are always copied: batch
        # normalization writes its statistics without counting a version.
        if not (buffer.value is None and buffer.is_unchanged())
        for live in [buffer.slot.get(buffer.name)]
    ]
    try:
        with torch.no_grad():
            for buffer, _, _ in present:
                buffer.slot[buffer.name] = buffer.tensor
                if buffer.value is not None:
                    buffer.tensor.copy_(buffer.value)
        yield
    finally:
        with torch.no_grad():
            for buffer, live, copy in present:
                buffer.slot[buffer.name] = live
                if live is not None and copy is not None:
                    live.copy_(copy)


@contextmanager
def _training_of(environment: Environment) -> Iterator[None]:
    """Give every submodule the training flag of the main pass."""
    changed = [(part, flag) for part, flag in environment.training if part.training != flag]
    try:
        for part, flag in changed:
            part.training = flag
        yield
    finally:
        for part, flag in changed:
            part.training = not flag


@contextmanager
def _metrics_of(environment: Environment) -> Iterator[None]:
    """Let metrics count on copies of their states."""
    saved = [(metric, dict(metric.__dict__)) for metric in environment.metrics]
    # Metrics of one collection may share a state: they go on sharing its copy.
    copies: dict[int, Any] = {}
    for metric, attributes in saved:
        for name in getattr(metric, "_defaults", {}):
            state = attributes.get(name)
            if isinstance(state, Tensor):
                metric.__dict__[name] = copies.setdefault(id(state), state.detach().clone())
            elif isinstance(state, list):
                metric.__dict__[name] = copies.setdefault(id(state), list(state))
    try:
        yield
    finally:
        for metric, attributes in saved:
            metric.__dict__.clear()
            metric.__dict__.update(attributes)


@contextmanager
def extra_pass(environment: Environment, contexts: Sequence[ContextFactory] = ()) -> Iterator[None]:
    """Recreate the environment of a main pass, then put everything back.

    Args:
        environment: Environment of the main pass.
        contexts: Makers of further contexts (a precision plugin's, one that silences logging).
    """
    enabled, dtype = environment.autocast
    with ExitStack() as stack:
        stack.enter_context(marked())
        for context in contexts:
            stack.enter_context(context())
        # A region of its own: a cached cast of the old weights would hide a perturbation.
        stack.enter_context(
            torch.autocast(environment.device.type, dtype, enabled, cache_enabled=False)
        )
        default_dtype = torch.get_default_dtype()
        stack.callback(torch.set_default_dtype, default_dtype)
        torch.set_default_dtype(environment.default_dtype)
        stack.callback(RandomState.now(environment.device).restore)
        stack.enter_context(_buffers_of(environment))
        stack.enter_context(_training_of(environment))
        stack.enter_context(_metrics_of(environment))
        environment.random_state.restore()
        yield
