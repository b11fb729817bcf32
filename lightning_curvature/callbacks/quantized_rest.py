"""Quantizes what a zeroth-order optimizer does not train, for the time of a fit."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_curvature.curvature.quantized import Bits, dense_state, quantize_rest, restore_rest
from lightning_curvature.optim.zeroth_order import ZerothOrderOptimizer

__all__ = ["QuantizedRest"]


class QuantizedRest:
    """Quantizes all entries of a module's weights that masks leave out, until `undo`.

    Parameters become vectors of their masked entries, and stay in their optimizer, where the mask
    goes. From outside all looks as without it: state dicts of the module hold whole weights, those
    of the optimizer hold the masks.

    Args:
        module: The module.
        owners: Optimizer of every parameter that is trained by loss values, with a mask. Of others,
            those that are frozen are quantized.
        bits: Bits per entry.
        state: What `state` returned in the run that is resumed.
    """

    def __init__(
        self,
        module: nn.Module,
        owners: Mapping[Tensor, ZerothOrderOptimizer],
        bits: Bits,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        if state is None or state["bits"] != bits:
            state = {"scales": {}, "values": {}}
        self.module = module
        self.bits = bits
        params = dict(module.named_parameters())
        masks = {}
        for name, p in params.items():
            if p in owners and "mask" in owners[p].state[p]:
                masks[name] = owners[p].state[p]["mask"]
            elif not p.requires_grad:
                masks[name] = torch.empty(0, dtype=torch.int64, device=p.device)
        self._weights = quantize_rest(module, masks, bits, scales=state["scales"])
        self._params = {name: params[name] for name in self._weights}
        self._owners: dict[str, ZerothOrderOptimizer] = {}
        for name, p in self._params.items():
            if name in state["values"]:
                p.data.copy_(state["values"][name])
            if (
                p in owners and len(masks[name]) > 0
            ):  # the mask of none stays: it says to do nothing
                self._owners[name] = owners[p]
                for key in ("mask", "master"):  # values are float32 themselves
                    owners[p].state[p].pop(key, None)
        register: Any = module.register_state_dict_post_hook
        self._handles = [register(_give_whole_weights)]
        for optimizer in {id(owner): owner for owner in self._owners.values()}.values():
            self._handles.append(optimizer.register_state_dict_post_hook(self._give_masks))

    def state(self) -> dict[str, Any]:
        """Return what makes another run quantize the same way."""
        return {
            "bits": self.bits,
            "scales": {name: weight.scale for name, weight in self._weights.items()},
            "values": {name: p.detach() for name, p in self._params.items()},
        }

    def undo(self) -> None:
        """Give the parameters whole weights, and the optimizers their masks."""
        for handle in self._handles:
            handle.remove()
        restore_rest(self.module)
        for name, optimizer in self._owners.items():
            optimizer.state[self._params[name]]["mask"] = self._weights[name].positions

    def _give_masks(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        number = {id(p): i for i, p in enumerate(params)}
        for name, owner in self._owners.items():
            i = number.get(id(self._params[name]))
            if owner is optimizer and i is not None:
                # A new one: the optimizer's own is in there.
                of_parameter = state["state"].get(i, {})
                state["state"][i] = {**of_parameter, "mask": self._weights[name].positions}


def _give_whole_weights(
    module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
) -> None:
    dense_state(module, state, prefix)
