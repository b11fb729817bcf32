"""The four projections of `torch.nn.MultiheadAttention`, seen as linear layers.

That layer hands its weights to one function, inside of which nothing can be hooked. Here the
projections are computed before and after that function, which gets identity matrices instead: the
product with them changes no number, so the layer returns what it always does, while the inputs and
outputs of its projections lie open. It costs four more products, on the steps that record.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["PROJECTIONS", "AttentionCalls"]

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")

_SIGNATURE = inspect.signature(F.multi_head_attention_forward)

Record = Callable[[str, Tensor, Tensor, int], Tensor]


class AttentionCalls(TorchFunctionMode):
    """While this mode is active the projections of an attention layer are recorded.

    Args:
        name: Name of the layer.
        record: Called as ``record(name, input, output, batch_axis)`` for each projection; returns
            what takes the place of the output.
    """

    def __init__(self, name: str, record: Record) -> None:
        super().__init__()
        self._name = name
        self._record = record

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Open the one function that computes the layer."""
        kwargs = kwargs or {}
        if func is not F.multi_head_attention_forward:
            return func(*args, **kwargs)
        bound = _SIGNATURE.bind(*args, **kwargs)
        bound.apply_defaults()
        return self._opened(bound.arguments)

    def _opened(self, a: dict[str, Any]) -> Any:
        size = a["embed_dim_to_check"]
        batch_axis = a["query"].dim() - 2
        if a["use_separate_proj_weight"]:
            weights = [a["q_proj_weight"], a["k_proj_weight"], a["v_proj_weight"]]
        else:
            weights = list(a["in_proj_weight"].chunk(3))
        biases = [None] * 3 if a["in_proj_bias"] is None else list(a["in_proj_bias"].chunk(3))
        projected = [
            self._project(role, given, weight, bias, batch_axis)
            for role, given, weight, bias in zip(
                PROJECTIONS[:3], (a["query"], a["key"], a["value"]), weights, biases, strict=True
            )
        ]
        out_weight, out_bias = a["out_proj_weight"], a["out_proj_bias"]
        identity = torch.eye(size, dtype=out_weight.dtype, device=out_weight.device)
        inner = {
            **a,
            **dict(zip(("query", "key", "value"), projected, strict=True)),
            "in_proj_weight": None,
            "in_proj_bias": None,
            "use_separate_proj_weight": True,
            "q_proj_weight": identity,
            "k_proj_weight": identity,
            "v_proj_weight": identity,
            "out_proj_weight": identity,
            "out_proj_bias": None,
        }
        attended, attention_weights = F.multi_head_attention_forward(**inner)
        output = self._project(PROJECTIONS[3], attended, out_weight, out_bias, batch_axis)
        return output, attention_weights

    def _project(
        self, role: str, given: Tensor, weight: Tensor, bias: Tensor | None, batch_axis: int
    ) -> Tensor:
        output = F.linear(given, weight, bias)
        return self._record(f"{self._name}.{role}", given, output, batch_axis)
