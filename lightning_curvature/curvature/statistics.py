"""LayerHooks: hands over what went into each layer together with the gradient that came back."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_curvature.oracle.extra_pass import in_extra_pass, version_of

__all__ = ["SUPPORTED_LAYERS", "LayerHooks", "Visit"]

SUPPORTED_LAYERS: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Embedding,
    _BatchNorm,
    nn.LayerNorm,
    nn.GroupNorm,
)

Visit = Callable[[str, nn.Module, Tensor, Tensor], None]


class _Hook:
    """A forward hook that copies and pickles of the model carry along without its effect."""

    def __init__(self, function: Callable[..., Any] | None = None) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return None if self.function is None else self.function(*args)

    def __reduce__(self) -> tuple[type["_Hook"], tuple[()]]:
        return type(self), ()


class LayerHooks:
    """Watches the layers of a model, and reports a call of one when its gradient arrives.

    A forward hook keeps the detached input of a call, and a hook on the output hands it to
    ``visit`` together with the gradient of that output. What never receives a gradient is never
    reported: evaluation, passes without gradients, the second forward of a checkpointed block. Not
    reported either are extra passes of an optimizer (see `during_extra_pass`), gradients of
    gradients (``create_graph=True``, as gradient penalties use it), and compiled regions, where
    hooks are unreliable. A layer used several times in a step is reported as often. The output may
    be changed in place afterwards.

    The gradient is the one that the backward computes: of the loss divided by the number of
    accumulated batches, and multiplied by the scale of a `GradScaler`, where there are such. In
    mixed precision it may have another dtype than the input.

    A model copied or pickled meanwhile carries hooks without effect.

    Args:
        module: The model.
        visit: Called as ``visit(name, layer, input, grad_output)``, without gradients. What it
            raises reaches the caller of the backward.
        kinds: Classes of the layers to watch, with their subclasses.
        select: Called once as ``select(name, layer)``: whether to watch this layer. None for all.
        enabled: Called at every forward of a layer: whether to watch this call. None for always.

    Attributes:
        layers: The watched layers by name, in the order of the model. A layer registered under
            several names has the first one.
    """

    def __init__(
        self,
        module: nn.Module,
        visit: Visit,
        *,
        kinds: tuple[type[nn.Module], ...] = SUPPORTED_LAYERS,
        select: Callable[[str, nn.Module], bool] | None = None,
        enabled: Callable[[], bool] | None = None,
    ) -> None:
        self.layers: dict[str, nn.Module] = {
            name: layer
            for name, layer in module.named_modules()
            if isinstance(layer, kinds) and (select is None or select(name, layer))
        }
        self._visit = visit
        self._enabled = enabled
        self._fired: set[str] = set()
        self._in_extra_pass = False
        # In front of all others: what they see and keep is what the layer finally returns.
        self._handles = [
            layer.register_forward_hook(
                _Hook(functools.partial(self._after_forward, name)), prepend=True, with_kwargs=True
            )
            for name, layer in self.layers.items()
        ]

    def silent(self) -> list[str]:
        """Name the layers no call of which was reported so far.

        A layer may be part of the model though its forward never runs, as the projection of
        `torch.nn.MultiheadAttention`, which uses its weight only.
        """
        return [name for name in self.layers if name not in self._fired]

    @contextmanager
    def during_extra_pass(self) -> Iterator[None]:
        """Watch the extra passes made inside, and nothing else; ``enabled`` is not asked."""
        self._in_extra_pass = True
        try:
            yield
        finally:
            self._in_extra_pass = False

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _watching(self) -> bool:
        if self._in_extra_pass:
            return in_extra_pass()
        return not in_extra_pass() and (self._enabled is None or self._enabled())

    def _after_forward(
        self, name: str, layer: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> Any:
        # The compiler may trace through here; its regions must not depend on what comes below.
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return None
        given = args[0] if args else kwargs.get("input")
        both = isinstance(output, Tensor) and isinstance(given, Tensor)
        if not both or not output.requires_grad or not self._watching():
            return None
        # An operation in place on a view puts the hook's place out of the graph.
        replaced = output.clone() if output._is_view() else output
        given = given.detach()
        version, extra = version_of(given), self._in_extra_pass

        def report(grad: Tensor) -> None:
            # With gradients on, this is the backward of a gradient penalty. An input that has been
            # changed in place since is not what the layer saw.
            if (
                torch.is_grad_enabled()
                or in_extra_pass() != extra
                or version_of(given) != version
                or not self._handles
            ):
                return
            self._fired.add(name)
            self._visit(name, layer, given, grad)

        replaced.register_hook(report)
        return None if replaced is output else replaced
