"""LossCapture: notices the loss functions called inside a forward pass.

A `TorchFunctionMode` sees every ``torch.nn.functional`` loss, also when it is called through its
module, imported under another name, or run under autocast or another mode. Only the raw arguments
are kept; they are interpreted later (`record.py`), because anything cleverer inside
``__torch_function__`` breaks the graph of a compiled module.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function_variadic

from lightning_curvature.oracle.extra_pass import version_of

__all__ = ["SUPPORTED_LOSSES", "LossCapture", "RawCall", "declare_loss"]

DeclaredKind = Literal["cross_entropy", "mse", "bce_with_logits"] | Callable[[Tensor, Any], Tensor]

DECLARED: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": F.cross_entropy,
    "mse": F.mse_loss,
    "bce_with_logits": F.binary_cross_entropy_with_logits,
}


def declare_loss(
    loss: Tensor, logits: Tensor, targets: Any, *, kind: DeclaredKind, reduction: str = "mean"
) -> Tensor:
    """Declare what a hand-written loss is, so that its curvature becomes known.

    Call it in ``training_step`` on the loss you computed and go on with what it returns, which is
    the same tensor. Without a curvature optimizer it does nothing.

    Args:
        loss: The hand-written loss, a scalar that depends on ``logits``.
        logits: Model output that the loss is a function of.
        targets: Targets, as the function named by ``kind`` takes them.
        kind: "cross_entropy", "mse" (mean of squared errors), "bce_with_logits", or a function
            ``kind(logits, targets)`` that equals the loss and is twice differentiable.
        reduction: "mean" or "sum"; only for the named kinds.

    Returns:
        ``loss``, unchanged.

    Raises:
        ValueError: If ``kind`` is an unknown word.

    Examples:
        >>> logits, targets = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 2, 1, 1])
        >>> onehot = torch.nn.functional.one_hot(targets, 3)
        >>> loss = -(logits.log_softmax(-1) * onehot).sum() / 4
        >>> declare_loss(loss, logits, targets, kind="cross_entropy") is loss
        True
    """
    if not callable(kind) and kind not in DECLARED:
        words = ", ".join(repr(word) for word in DECLARED)
        raise ValueError(f"Invalid kind={kind!r}: must be one of {words}, or a function.")
    if has_torch_function_variadic(loss, logits):
        handle_torch_function(
            declare_loss, (loss, logits), loss, logits, targets, kind=kind, reduction=reduction
        )
    return loss


SUPPORTED_LOSSES: dict[Callable[..., Any], str] = {
    F.cross_entropy: "cross_entropy",
    F.nll_loss: "nll_loss",
    F.mse_loss: "mse_loss",
    F.binary_cross_entropy: "binary_cross_entropy",
    F.binary_cross_entropy_with_logits: "binary_cross_entropy_with_logits",
    F.kl_div: "kl_div",
    F.l1_loss: "l1_loss",
    F.smooth_l1_loss: "smooth_l1_loss",
    F.huber_loss: "huber_loss",
    F.gaussian_nll_loss: "gaussian_nll_loss",
    F.poisson_nll_loss: "poisson_nll_loss",
    F.soft_margin_loss: "soft_margin_loss",
    declare_loss: "declare_loss",
}


class RawCall(NamedTuple):
    """One loss call as it was seen.

    Attributes:
        function: The ``torch.nn.functional`` function, or `declare_loss`.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        output: What it returned.
        versions: Version counter of each tensor argument after the call; None in a compiled region.
        edge: The output's place in the autograd graph at that moment (``loss *= 2`` moves the
            tensor elsewhere), None without a graph or inside a compiled region.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor
    versions: tuple[tuple[Tensor, int], ...] | None
    edge: GradientEdge | None


class LossCapture(TorchFunctionMode):
    """Context that lists the loss calls made inside it.

    Attributes:
        calls: The calls in order, also those under ``no_grad``: extra passes run without a graph
            and must find the same calls by their index.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[RawCall] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call the function and, if it is a loss, remember the call."""
        kwargs = kwargs or {}
        # A declaration stands for a loss computed before it.
        output = args[0] if func is declare_loss else func(*args, **kwargs)
        if func in SUPPORTED_LOSSES:
            edge, versions = None, None
            if not torch.compiler.is_compiling():
                edge = get_gradient_edge(output) if output.requires_grad else None
                tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
                versions = tuple((x, version_of(x)) for x in tensors)
            self.calls.append(RawCall(func, args, kwargs, output, versions, edge))
        return output
