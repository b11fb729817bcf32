"""Losses of half-precision models in float32."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_curvature.oracle.capture import SUPPORTED_LOSSES, declare_loss

__all__ = ["FullPrecisionLosses"]

_HALF = (torch.bfloat16, torch.float16)


class FullPrecisionLosses(TorchFunctionMode):
    """Context in which ``torch.nn.functional`` losses of half-precision tensors are float32.

    Slopes are differences of losses: next to 0.7 neighbors in float16 are 5e-4 apart, which is the
    difference itself, and in bfloat16 4e-3.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call the function; if it is a loss, with its tensors in float32."""
        kwargs = kwargs or {}
        if func in SUPPORTED_LOSSES and func is not declare_loss:
            args = tuple(_full(x) for x in args)
            kwargs = {name: _full(x) for name, x in kwargs.items()}
        return func(*args, **kwargs)


def _full(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.dtype in _HALF else x
