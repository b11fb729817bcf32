"""Keeps pruned weights at 0 while a fit lasts, and its checkpoints ordinary ones."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.fabric.utilities import rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_curvature.callbacks.layer_norms import plain_name
from lightning_curvature.callbacks.packed_masks import pack_mask, unpack_mask
from lightning_curvature.callbacks.plain_pruned_names import with_plain_names
from lightning_curvature.pruning.optimizer_state import zero_pruned_state
from lightning_curvature.pruning.parameters import PrunableParameters

__all__ = ["KeptMasks"]


class KeptMasks:
    """Masks of parameters, from the start of training to its end.

    Args:
        parameters: The parameters.
        optimizers: All optimizers of the fit.
        masks: Packed masks to begin with, by the ordinary name of each parameter; empty for those
            that are there.
        permanent: Whether to take them off afterwards.

    Raises:
        MisconfigurationException: If the masks are of other parameters.
    """

    def __init__(
        self,
        parameters: PrunableParameters,
        optimizers: Sequence[Optimizer],
        masks: Mapping[str, Tensor],
        permanent: bool,
    ) -> None:
        self._parameters = parameters
        self._optimizers: list[Optimizer] = []
        self._permanent = permanent
        if masks:
            self._load(masks)
        saving, loading = with_plain_names(layer for layer, _ in parameters.owners())
        # Where masks stay, the checkpoints of this fit can be loaded after it, too.
        self._handles: list[RemovableHandle] = [*saving, *(loading if permanent else [])]
        self.follow(optimizers)

    def follow(self, optimizers: Sequence[Optimizer]) -> None:
        """Keep the masks after steps of optimizers that were made since.

        Args:
            optimizers: All optimizers of the fit.
        """
        for optimizer in optimizers:
            if not any(optimizer is known for known in self._optimizers):
                self._optimizers.append(optimizer)
                self._handles.append(optimizer.register_step_post_hook(self._after_step))

    def _load(self, masks: Mapping[str, Tensor]) -> None:
        tensors = zip(self._parameters.names, self._parameters.tensors(), strict=True)
        there = {plain_name(name): (name, p.shape) for name, p in tensors}
        if masks.keys() != there.keys():
            raise MisconfigurationException(
                "The masks of the checkpoint are of other parameters than MFACPruning is to prune: "
                f"missing {sorted(there.keys() - masks.keys())}, unexpected "
                f"{sorted(masks.keys() - there.keys())}."
            )
        loaded = {name: unpack_mask(masks[key], shape) for key, (name, shape) in there.items()}
        changed = [
            name
            for name, p in zip(self._parameters.names, self._parameters.tensors(), strict=True)
            if bool(p.detach()[~loaded[name].to(p.device)].any())
        ]
        if changed:
            rank_zero_warn(
                "Weights that were pruned are not 0 any more, and are set to 0 without making up "
                f"for it: {', '.join(changed)}. Was a checkpoint of before loaded? To prune them "
                "anew use a new MFACPruning.",
                category=RuntimeWarning,
            )
        self._parameters.load_masks(loaded)

    def _after_step(self, *_: Any) -> None:
        """Set to zero what weight decay, noise or a preconditioner has moved."""
        self._parameters.zero_pruned()

    def forget_pruned(self) -> None:
        """Let the optimizers forget what has been pruned just now."""
        for optimizer in self._optimizers:
            zero_pruned_state(optimizer, self._parameters)

    def packed(self) -> dict[str, Tensor]:
        """Return the masks, one bit per weight, by the ordinary name of each parameter."""
        masks = self._parameters.masks()
        if all(bool(mask.all()) for mask in masks.values()):
            return {}
        return {plain_name(name): pack_mask(mask) for name, mask in masks.items()}

    def release(self) -> None:
        """Take everything off the module, but for the zeros or, where they stay, the masks."""
        for handle in self._handles:
            handle.remove()
        if self._permanent:
            self._parameters.make_permanent()
        else:
            self._parameters.refresh()
