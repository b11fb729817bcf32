"""Watches a zeroth-order optimizer and hands over what its steps depend on."""

from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_curvature.curvature.perturbation import STREAM_VERSION
from lightning_curvature.optim.trajectory_changes import checksum
from lightning_curvature.optim.zeroth_order import ZerothOrderOptimizer

__all__ = ["Recorder", "TakenStep", "checksums", "describe", "mask_of", "refuse_unloggable"]

# Numbers of the optimizer that come from losses alone, which a replay does not know.
_MEASURED = ("previous_loss",)


class TakenStep(NamedTuple):
    """What a step depended on.

    Attributes:
        number: Optimizer steps taken before it.
        answers: What the step concluded from losses.
        scalars: What else it measured, by name.
        settings: Hyper-parameters and such by name, plain values; "mask/3" is a tensor, which
            parameters without a mask do not have.
    """

    number: int
    answers: list[Tensor]
    scalars: dict[str, Tensor]
    settings: dict[str, Any]


class Recorder:
    """Notes every step of an optimizer.

    Attributes:
        base: Checksums of the weights before the first step.

    Args:
        optimizer: The optimizer.
        begins: Called with the number of a step when its first answer comes.
        taken: Called with every step that was taken to its end.
    """

    def __init__(
        self,
        optimizer: ZerothOrderOptimizer,
        begins: Callable[[int], None],
        taken: Callable[[TakenStep], None],
    ) -> None:
        self.optimizer = optimizer
        self._begins = begins
        self._taken = taken
        self._open: TakenStep | None = None
        self._before = optimizer.on_answer
        self._own = self._note
        optimizer.on_answer = self._own
        self._hook = optimizer.register_step_pre_hook(lambda *_: self._step_begins())
        self._active = True
        # Weights may be loaded after recording was turned on.
        self._has_begun = False
        self.base = checksums(optimizer)

    def _step_begins(self) -> None:
        self.settle()
        # One that is still open was broken off, by an interrupt, say.
        self._open = None
        if not self._has_begun and not self.optimizer.main_moves[0]:
            self.base = checksums(self.optimizer)

    def _note(self, answer: Tensor) -> None:
        if self._before is not None:
            self._before(answer)
        if not self._active:
            return
        number, self._has_begun = self.optimizer._steps_done, True
        if self._open is None or self._open.number != number:
            self.settle()
            refuse_unloggable(self.optimizer)
            self._begins(number)
            self._open = TakenStep(number, [], {}, self._settings())
        # A clone: the optimizer replaces what is not finite in place.
        self._open.answers.append(answer.detach().clone())
        for name in _MEASURED:
            if name in self.optimizer._scalars:
                self._open.scalars[name] = self.optimizer._scalars[name].detach().clone()

    def _settings(self) -> dict[str, Any]:
        optimizer = self.optimizer
        settings: dict[str, Any] = {"moves": tuple(optimizer.main_moves)}
        # torch adds "differentiable" to the defaults of some optimizers when a state is loaded.
        names = [name for name in optimizer.defaults if name != "differentiable"]
        for number, group in enumerate(optimizer.param_groups):
            settings.update({f"group/{number}/{name}": _plain(group[name]) for name in names})
        params = optimizer._all_params()
        settings["frozen"] = tuple(i for i, p in enumerate(params) if not p.requires_grad)
        masks = {i: mask_of(optimizer, p) for i, p in enumerate(params) if p in optimizer.state}
        settings.update({f"mask/{i}": mask for i, mask in masks.items() if mask is not None})
        return settings

    @property
    def trips(self) -> int:
        """How often main passes moved the parameters since the last step."""
        return self.optimizer.main_moves[0]

    def settle(self) -> None:
        """Hand over the last step if it was taken to its end."""
        if self._open is None or self._open.number == self.optimizer._steps_done:
            return
        if self._open.number < self.optimizer._steps_done:
            self._taken(self._open)
        self._open = None

    def close(self) -> None:
        """Watch no longer."""
        self.settle()
        self._active = False
        self._hook.remove()
        if self.optimizer.on_answer is self._own:
            self.optimizer.on_answer = self._before


def refuse_unloggable(optimizer: ZerothOrderOptimizer) -> None:
    """Refuse an optimizer whose steps depend on more than a log holds.

    Args:
        optimizer: The optimizer.

    Raises:
        ValueError: If it is such.
    """
    name = type(optimizer).__name__
    if any(group["first_order"] for group in optimizer.param_groups):
        raise ValueError(
            f"A trajectory cannot hold {name} with first_order=True groups: their gradients are as "
            "large as the parameters. Use checkpoints, or first_order=False."
        )
    if optimizer._schedules:
        raise ValueError(
            f"A trajectory cannot hold {name} while a schedule owns "
            f"{', '.join(optimizer._schedules)}: its decisions are not logged. Set the interval in "
            "the optimizer."
        )


def describe(optimizer: ZerothOrderOptimizer) -> dict[str, Any]:
    """Return what a replay must have in common with a run, as plain values.

    Args:
        optimizer: The optimizer of the run.
    """
    params = optimizer._all_params()
    device = params[0].device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return {
        "optimizer": type(optimizer).__name__,
        "groups": [len(group["params"]) for group in optimizer.param_groups],
        "shapes": [list(p.shape) for p in params],
        "dtypes": [str(p.dtype).removeprefix("torch.") for p in params],
        "streams": list(optimizer.stream_indices),
        "stream_version": STREAM_VERSION,
        "noise_source": optimizer.noise_source is not None,
        "device": device.type,
        "device_name": name,
        "torch": str(torch.__version__),
    }


def checksums(optimizer: ZerothOrderOptimizer) -> list[int]:
    """Return one number per parameter that tells other values apart; waits for the device.

    Args:
        optimizer: Holds the parameters.
    """
    sums = [checksum(p) for p in optimizer._all_params()]
    return [int(x) for x in torch.stack([x.cpu() for x in sums]).tolist()]


def mask_of(optimizer: ZerothOrderOptimizer, p: Tensor) -> Tensor | None:
    """Return the positions that a parameter is restricted to, None if it is whole.

    Args:
        optimizer: The optimizer.
        p: One of its parameters.
    """
    mask = optimizer.state.get(p, {}).get("mask")
    return mask if isinstance(mask, Tensor) else None


def _plain(value: Any) -> Any:
    """Return a value without types of numpy, say, which strict loading refuses."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, (tuple, list)):
        return tuple(_plain(part) for part in value)
    raise TypeError(f"A trajectory cannot hold a hyper-parameter of the kind {type(value)}.")
