"""The weights that are pruned, as one vector, and their masks.

Masks are those of `torch.nn.utils.prune`: the parameter is called ``weight_orig`` while it is
pruned, its mask ``weight_mask``, and a hook before each forward pass makes ``weight`` of the two.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

__all__ = ["PrunableParameters", "prunable_weights"]

_LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


def prunable_weights(
    model: nn.Module, names: Sequence[str] = ("weight",)
) -> list[tuple[nn.Module, str]]:
    """Return the trained weights of linear and convolution layers, in the order of the modules.

    Left out are biases, normalization and embeddings, frozen weights, weights made by a
    parametrization, and the output projection of `torch.nn.MultiheadAttention`, which never calls
    that layer, so that a mask on it would be applied only once. A weight that two layers share
    appears once.

    Args:
        model: Model to look through.
        names: Names of the parameters to take from each layer.

    Returns:
        Pairs of a layer and the name of its parameter.

    Examples:
        >>> prunable_weights(nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.LayerNorm(2)))
        [(Linear(in_features=3, out_features=2, bias=True), 'weight')]
    """
    never_called = {
        id(module.out_proj)
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention)
    }
    found: list[tuple[nn.Module, str]] = []
    seen: set[int] = set()
    for module in model.modules():
        if not isinstance(module, _LAYERS) or id(module) in never_called:
            continue
        for name in names:
            parameter = _parameter(module, name)
            if parameter is None or not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            found.append((module, name))
    return found


class PrunableParameters:
    """Parameters that are pruned together, seen as one vector in the order they are given in.

    Positions in this vector never change; pruned weights keep theirs. Masks that
    `torch.nn.utils.prune` has put on the layers before are respected.

    Args:
        modules_and_names: Layers and names of their parameters, as in ``ModelPruning`` of
            Lightning; `prunable_weights` chooses them.
        model: Model that the layers belong to, for their names in reports and warnings.

    Attributes:
        names: Name of each parameter, such as ``"net.0.weight"``.
        total: Number of weights, pruned or not.

    Raises:
        ValueError: If there is no parameter, one is none, or one appears twice.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        >>> parameters = PrunableParameters(prunable_weights(model), model=model)
        >>> keep = torch.tensor([True, False, True, True, True, False])
        >>> parameters.apply(parameters.weights(), keep)
        >>> parameters.layer_sparsities()
        {'0.weight': 0.25, '1.weight': 0.5}
    """

    def __init__(
        self,
        modules_and_names: Sequence[tuple[nn.Module, str]],
        *,
        model: nn.Module | None = None,
    ) -> None:
        self._owners = list(modules_and_names)
        if not self._owners:
            raise ValueError(
                "Nothing to prune: no trained weight of a linear or convolution layer was found or "
                "named."
            )
        paths = {} if model is None else {id(m): path for path, m in model.named_modules()}
        self.names: list[str] = []
        seen: dict[int, str] = {}
        for number, (module, name) in enumerate(self._owners):
            path = paths.get(id(module), f"{type(module).__name__}[{number}]")
            full = f"{path}.{name}" if path else name
            parameter = _parameter(module, name)
            if parameter is None:
                raise ValueError(
                    f"Cannot prune {full}: {type(module).__name__} has no parameter of that name. "
                    "One made by a parametrization or a weight norm must be made permanent first."
                )
            if isinstance(parameter, nn.UninitializedParameter):
                raise ValueError(f"Cannot prune {full}: it gets its shape in a first forward pass.")
            if id(parameter) in seen:
                raise ValueError(f"Cannot prune {full} and {seen[id(parameter)]}: they are one.")
            seen[id(parameter)] = full
            self.names.append(full)
        # `prune.remove` would leave the parameters of a layer in another order.
        self._order = {
            id(module): [key.removesuffix("_orig") for key in module._parameters]
            for module, _ in self._owners
        }
        self._sizes = [parameter.numel() for parameter in self.tensors()]
        self.total = sum(self._sizes)

    def __len__(self) -> int:
        return len(self._owners)

    def owners(self) -> list[tuple[nn.Module, str]]:
        """Return layers and names, in order."""
        return list(self._owners)

    def tensors(self) -> list[nn.Parameter]:
        """Return the parameters themselves, which gradients are taken of."""
        found = [_parameter(module, name) for module, name in self._owners]
        return [parameter for parameter in found if parameter is not None]

    def sizes(self) -> list[int]:
        """Return the number of weights of each parameter, pruned or not."""
        return list(self._sizes)

    def offsets(self) -> list[int]:
        """Return where each parameter starts in the vector, and where the last one ends."""
        edges = [0]
        for size in self._sizes:
            edges.append(edges[-1] + size)
        return edges

    @property
    def device(self) -> torch.device:
        """Device of the first parameter, where the vectors are."""
        return self.tensors()[0].device

    # As one vector

    @torch.no_grad()
    def weights(self) -> Tensor:
        """Return all weights, 0 where they are pruned, ``[total]``, in the widest of the dtypes."""
        flat = self._flat(self.tensors())
        return flat.masked_fill_(~self.keep(), 0)

    def keep(self) -> Tensor:
        """Return which weights are not pruned, bool ``[total]``."""
        return self._flat([mask != 0 for mask in self._masks()])

    def survivors(self) -> Tensor:
        """Return the positions of the weights that are not pruned, int64, ascending."""
        return self.keep().nonzero().view(-1)

    def gather(self, gradients: Sequence[Tensor | None], survivors: Tensor | None = None) -> Tensor:
        """Return gradients of the parameters as one vector over the survivors.

        Args:
            gradients: Gradient of each parameter; None for zeros.
            survivors: What `survivors` returned, if it is at hand.
        """
        if len(gradients) != len(self):
            raise ValueError(f"Got {len(gradients)} gradients of {len(self)} parameters.")
        dense = [
            torch.zeros_like(parameter) if gradient is None else gradient.detach()
            for gradient, parameter in zip(gradients, self.tensors(), strict=True)
        ]
        flat = self._flat(dense)
        return flat[self.survivors() if survivors is None else survivors]

    @torch.no_grad()
    def apply(self, weights: Tensor, keep: Tensor) -> None:
        """Set all weights and prune some of them; what is pruned stays so and is exactly 0.

        Args:
            weights: New weights ``[total]``; what they are where ``keep`` is False is ignored.
            keep: Which weights are not pruned, bool ``[total]``.

        Raises:
            ValueError: If a shape is wrong, or a pruned weight would come back.
        """
        if weights.shape != (self.total,) or keep.shape != (self.total,):
            raise ValueError(
                f"Shape mismatch: expected weights and keep of shape ({self.total},), got "
                f"{tuple(weights.shape)} and {tuple(keep.shape)}."
            )
        keep = keep.to(self.device)
        if bool((keep & ~self.keep()).any()):
            raise ValueError("Weights that are pruned stay so; keep must be False where they are.")
        parts = zip(torch.split(weights, self._sizes), torch.split(keep, self._sizes), strict=True)
        for (module, name), (values, kept) in zip(self._owners, parts, strict=True):
            parameter = _parameter(module, name)
            assert parameter is not None
            shaped = values.view_as(parameter).to(parameter.device, parameter.dtype)
            mask = kept.view_as(parameter).to(parameter.device)
            parameter.copy_(shaped.masked_fill(~mask, 0))
            self._mask(module, name, mask.to(parameter.dtype))
            self._sort(module)

    @staticmethod
    def _mask(module: nn.Module, name: str, mask: Tensor) -> None:
        present = module._buffers.get(f"{name}_mask")
        if present is None:
            prune.custom_from_mask(module, name, mask)  # type: ignore[no-untyped-call]
            return
        # In place: a container of `prune` would hold one more mask per event.
        present.copy_(mask)
        setattr(module, name, getattr(module, f"{name}_orig") * present)

    # Masks

    def masks(self) -> dict[str, Tensor]:
        """Return which weights are kept, bool in the shape of each parameter, by its name."""
        return {name: mask != 0 for name, mask in zip(self.names, self._masks(), strict=True)}

    def load_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Prune what was pruned when `masks` was called.

        Args:
            masks: What `masks` returned.

        Raises:
            ValueError: If names or shapes differ from those of the parameters.
        """
        if set(masks) != set(self.names):
            missing, unexpected = set(self.names) - set(masks), set(masks) - set(self.names)
            raise ValueError(
                f"Masks are of other parameters: missing {sorted(missing)}, unexpected "
                f"{sorted(unexpected)}."
            )
        for name, parameter in zip(self.names, self.tensors(), strict=True):
            if masks[name].shape != parameter.shape:
                raise ValueError(
                    f"Shape mismatch: expected a mask of shape {tuple(parameter.shape)} for "
                    f"{name}, got {tuple(masks[name].shape)}."
                )
        self.apply(self.weights(), self._flat([masks[name] != 0 for name in self.names]))

    @torch.no_grad()
    def zero_pruned(self) -> None:
        """Set pruned weights to exactly 0, where momentum or weight decay have moved them."""
        for (module, name), mask in zip(self._owners, self._masks(), strict=True):
            if f"{name}_orig" in module._parameters:
                # Not a product: what is not finite would stay.
                getattr(module, f"{name}_orig").masked_fill_(mask == 0, 0)

    @torch.no_grad()
    def refresh(self) -> None:
        """Make ``weight`` anew of the present ``weight_orig``, not part of any graph.

        Otherwise it is that of the last forward pass, which is older than the last optimizer step
        and keeps the module from being copied.
        """
        for module, name in self._owners:
            mask = module._buffers.get(f"{name}_mask")
            if mask is not None:
                setattr(module, name, getattr(module, f"{name}_orig") * mask)

    @torch.no_grad()
    def make_permanent(self) -> None:
        """Take the masks off the layers; the zeros stay where they are."""
        self.zero_pruned()
        for module, name in self._owners:
            if f"{name}_orig" in module._parameters:
                prune.remove(module, name)  # type: ignore[no-untyped-call]
                self._sort(module)

    def _sort(self, module: nn.Module) -> None:
        """Put the parameters of a layer back in order; `prune` puts what it renames at the end."""
        order = self._order[id(module)]
        names = {key: order.index(key.removesuffix("_orig")) for key in module._parameters}
        for key in sorted(names, key=names.__getitem__):
            module._parameters[key] = module._parameters.pop(key)

    # Sparsity

    def sparsity(self) -> float:
        """Return the fraction of all weights that is pruned."""
        return 1 - int(self.keep().sum()) / self.total

    def layer_sparsities(self) -> dict[str, float]:
        """Return the fraction that is pruned of each parameter, by its name."""
        return {
            name: int((mask == 0).sum()) / max(mask.numel(), 1)
            for name, mask in zip(self.names, self._masks(), strict=True)
        }

    # Parts

    def _masks(self) -> Iterator[Tensor]:
        for module, name in self._owners:
            mask = module._buffers.get(f"{name}_mask")
            parameter = _parameter(module, name)
            assert parameter is not None
            yield torch.ones_like(parameter, dtype=torch.bool) if mask is None else mask

    def _flat(self, tensors: Sequence[Tensor]) -> Tensor:
        device = self.device
        return torch.cat([tensor.detach().reshape(-1).to(device) for tensor in tensors])


def _parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    """Return a parameter by its ordinary name, whether it is pruned or not; None without one."""
    plain = module._parameters.get(name)
    # Without a mask it is the parameter of a spectral norm, which has the same name.
    masked = plain is None and f"{name}_mask" in module._buffers
    return module._parameters.get(f"{name}_orig") if masked else plain
