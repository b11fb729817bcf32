"""Takes the steps of a logged zeroth-order run again, without data and without a loss."""

import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from lightning_curvature.curvature.perturbation import (
    STREAM_VERSION,
    Directions,
    NoiseSource,
    put_entries,
)
from lightning_curvature.optim.trajectory import LoggedStep, Trajectory, zeroth_order
from lightning_curvature.optim.trajectory_recorder import checksums, describe, mask_of
from lightning_curvature.optim.zeroth_order import ZerothOrderOptimizer

__all__ = ["replay_trajectory"]


def replay_trajectory(
    module_or_params: nn.Module | Iterable[Tensor],
    optimizer: torch.optim.Optimizer,
    trajectory: Trajectory,
    *,
    steps: int | None = None,
    other_device: bool = False,
) -> None:
    """Take the steps of a run again: from its first weights to its last ones.

    On the kind of device of the run, with the same version of torch, weights and state of the
    optimizer end at the same bits. Costs the draws and updates of the run, no forward passes. If
    the optimizer stands in the middle of the trajectory, as after loading a checkpoint or an
    earlier replay, it goes on from there. The hyper-parameters of the optimizer become those of
    the run.

    Args:
        module_or_params: The model, or its parameters, as the run found them.
        optimizer: An optimizer over these parameters, with the class and the groups of that of the
            run.
        trajectory: The log.
        steps: Number of steps to take, None for all that are left.
        other_device: Whether to replay a run of a CPU elsewhere: with its directions, drawn on the
            CPU, and the round-off of this device, so that every step is off by some units in the
            last place; in half precision random rounding differs, too. Runs of other devices cannot
            be replayed on a CPU, or on another GPU model, where directions differ, unless the run
            had a ``noise_source`` that is the same there.

    Raises:
        ValueError: If the trajectory is not one of this optimizer over such parameters and on such
            a device, or the weights are not those that it begins with.
    """
    real = zeroth_order(optimizer)
    given = module_or_params
    params = given.parameters() if isinstance(given, nn.Module) else given
    if not {id(p) for p in real._all_params()} <= {id(p) for p in params}:
        raise ValueError("The optimizer trains parameters that are not among those given.")
    if not len(trajectory):
        return
    trajectory.check(real)
    start = real._steps_done - trajectory.first_step
    left = len(trajectory) - start
    if not 0 <= start <= len(trajectory):
        raise ValueError(
            f"The optimizer has taken {real._steps_done} steps, but the trajectory covers "
            f"{trajectory.first_step} to {trajectory.first_step + len(trajectory)}. Load a "
            "checkpoint in this range."
        )
    if steps is not None and not 0 <= steps <= left:
        raise ValueError(f"Invalid steps={steps!r}: must be in [0, {left}], what is left.")
    if start == 0 and checksums(real) != trajectory.header["base"]:
        raise ValueError(
            "The weights are not those that the trajectory begins with. Load the model that the "
            "run started from."
        )
    noise_source = real.noise_source
    real.stream_indices = trajectory.header["streams"]
    real.noise_source = _source(real, trajectory, other_device=other_device)
    wanted = [p.requires_grad for p in real._all_params()]
    stop = len(trajectory) if steps is None else start + steps
    try:
        for number, step in enumerate(trajectory.steps(start, stop), start=start):
            _apply(real, step, is_first=number == start)
            real.replay_step(step.answers, step.moves)
            device = real._all_params()[0].device
            real._scalars.update({name: x.to(device) for name, x in step.scalars.items()})
    finally:
        real.noise_source = noise_source
        for p, wants in zip(real._all_params(), wanted, strict=True):
            p.requires_grad_(wants)
    if trajectory.end is not None and other_device is False:
        _compare_end(real, *trajectory.end)


def _source(
    optimizer: ZerothOrderOptimizer, trajectory: Trajectory, *, other_device: bool
) -> NoiseSource | None:
    """Return what gives the directions of the run, None for the generators of this device."""
    header, here = trajectory.header, describe(optimizer)
    if header["noise_source"] != here["noise_source"]:
        which = "one" if header["noise_source"] else "none"
        raise ValueError(
            f"The run had {which} in optimizer.noise_source, this optimizer differs. Set it as in "
            "the run."
        )
    if header["stream_version"] != STREAM_VERSION and not header["noise_source"]:
        raise ValueError(
            f"The directions of the run were version {header['stream_version']}, this release "
            f"draws version {STREAM_VERSION}. Use the release of the run."
        )
    if header["torch"] != here["torch"]:
        warnings.warn(
            f"The run used torch {header['torch']}, this is {here['torch']}: weights may differ in "
            "their last digits.",
            RuntimeWarning,
            stacklevel=3,
        )
    places = [f"{x['device']} {x['device_name']}".strip() for x in (header, here)]
    if places[0] == places[1]:
        return optimizer.noise_source
    can = header["noise_source"] or header["device"] == "cpu"
    if not (other_device and can):
        advice = (
            "Move the model there, or set other_device=True for a replay up to round-off."
            if can
            else "Directions differ between devices: move the model there."
        )
        raise ValueError(f"The run was on {places[0]}, the model is on {places[1]}. {advice}")
    return optimizer.noise_source or _CpuNoise(optimizer)


def _apply(optimizer: ZerothOrderOptimizer, step: LoggedStep, *, is_first: bool) -> None:
    """Bring the optimizer into the condition of a step."""
    for group, logged in zip(optimizer.param_groups, step.groups, strict=True):
        unknown = logged.keys() - group.keys()
        if unknown:
            raise ValueError(
                f"The trajectory has hyper-parameters that {type(optimizer).__name__} does not: "
                f"{sorted(unknown)}. Use the release of the run."
            )
        group.update(logged)
    if is_first:
        # Its limit is a hyper-parameter.
        optimizer._failures = optimizer._new_failure_counter(resumed=True)
    frozen = set(step.frozen)
    for position, p in enumerate(optimizer._all_params()):
        if p.requires_grad == (position in frozen):
            p.requires_grad_(position not in frozen)
        mask, known = step.masks.get(position), mask_of(optimizer, p)
        if mask is None or known is None:
            differs = mask is not known
        else:
            differs = not torch.equal(mask.cpu(), known.cpu())
        if differs:
            optimizer.set_mask(p, mask)


def _compare_end(optimizer: ZerothOrderOptimizer, step: int, expected: Sequence[int]) -> None:
    if optimizer._steps_done == step and checksums(optimizer) != list(expected):
        warnings.warn(
            "The replay ended at other weights than the run. Something else has changed them "
            "during the run: weights that were loaded or averaged in, or clipped, say.",
            RuntimeWarning,
            stacklevel=3,
        )


class _CpuNoise:
    """Draws the directions that a CPU would, for parameters elsewhere.

    Args:
        optimizer: The optimizer.
    """

    def __init__(self, optimizer: ZerothOrderOptimizer) -> None:
        self._optimizer = optimizer

    def __call__(self, step: int, sample: int, index: int, param: Tensor) -> Tensor:
        """Return the noise of a whole parameter; see `NoiseSource`."""
        group = self._optimizer.param_groups[0]
        mask = mask_of(self._optimizer, param)
        like = torch.empty_like(param, device="cpu", requires_grad=False)
        random_signs = group["distribution"] == "rademacher"
        directions = Directions(
            [like],
            [index],
            seed=int(group["seed"]),
            # The factor of "sphere" is that of all parameters together.
            distribution="rademacher" if random_signs else "normal",
            masks={} if mask is None else {0: mask.cpu()},
        )
        dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
        whole = torch.zeros_like(like, dtype=dtype)
        for piece in directions.sweep(step, sample, write=False):
            if mask is None:
                piece.of([whole])[0].copy_(piece.noise[0])
            else:
                put_entries(whole, mask.cpu(), piece.noise[0])
        return whole.to(param.device)
