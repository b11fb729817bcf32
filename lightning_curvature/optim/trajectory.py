"""Trajectory: a log of a zeroth-order run, a few bytes per step, that stands for its checkpoints.

A zeroth-order step is a function of a few numbers, the slopes along directions that can be drawn
again. Malladi et al., 2023, arXiv:2305.17333 (section 2.1), keep them in the place of checkpoints.
Here they are float64, and a replay repeats the displacements of the run as well as its updates, so
that it ends at the same bits.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_curvature.optim.trajectory_changes import Changes, checksum
from lightning_curvature.optim.trajectory_recorder import (
    Recorder,
    TakenStep,
    checksums,
    describe,
    refuse_unloggable,
)
from lightning_curvature.optim.zeroth_order import ZerothOrderOptimizer

__all__ = ["LoggedStep", "Trajectory", "write_whole", "zeroth_order"]

_FORMAT = "lightning_curvature.trajectory"
_VERSION = 1
# Answers that wait on the device before they are read.
_WAITING = 1024
_HEADER = {
    "first_step": int,
    "base": list,
    "answer_dtype": str,
    "optimizer": str,
    "groups": list,
    "shapes": list,
    "dtypes": list,
    "streams": list,
    "stream_version": int,
    "noise_source": bool,
    "device": str,
    "device_name": str,
    "torch": str,
}


class LoggedStep(NamedTuple):
    """One step of a trajectory.

    Attributes:
        answers: What the step concluded from losses, in order.
        scalars: What else it measured, by name.
        groups: Hyper-parameters of each parameter group.
        frozen: Positions of the parameters that did not require a gradient.
        masks: Masks by the position of their parameter, None for parameters without one.
        moves: How main passes moved the parameters, see `ZerothOrderOptimizer.main_moves`.
    """

    answers: list[Tensor]
    scalars: dict[str, Tensor]
    groups: list[dict[str, Any]]
    frozen: tuple[int, ...]
    masks: dict[int, Tensor | None]
    moves: tuple[int, bool]


class Trajectory:
    """The steps of a zeroth-order optimizer: with the first weights, all there is to the last ones.

    Per step it holds the answers (8 bytes for MeZO), and hyper-parameters where they change (12
    bytes more per step and parameter group for a learning rate that always does).

    It follows the parameters of the optimizer. What else training changes is not in it: running
    statistics of batch normalization, and weights that somebody else writes.

    Attributes:
        header: What run this was: optimizer, shapes, streams, device, versions; empty before the
            first step.

    Examples:
        >>> import torch
        >>> from lightning_curvature import MeZO, Trajectory, replay_trajectory
        >>> model = torch.nn.Linear(3, 2)
        >>> base = {name: p.clone() for name, p in model.state_dict().items()}
        >>> optimizer = MeZO(model.parameters(), lr=1e-2)
        >>> criterion = optimizer.attach_model(model, torch.nn.functional.cross_entropy)
        >>> trajectory = Trajectory()
        >>> trajectory.record(optimizer)
        >>> x, y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
        >>> for _ in range(5):
        ...     loss = optimizer.step(lambda: criterion(model(x), y))
        >>> other = torch.nn.Linear(3, 2)
        >>> other.load_state_dict(base)
        <All keys matched successfully>
        >>> replay_trajectory(other, MeZO(other.parameters()), trajectory)
        >>> torch.equal(other.weight, model.weight)
        True
    """

    def __init__(self) -> None:
        self.header: dict[str, Any] = {}
        self._changes = Changes()
        self._length = 0
        self._read: list[Tensor] = []
        self._waiting: list[Tensor] = []
        # Step and checksums where the weights were last looked at.
        self._end: tuple[int, list[int]] | None = None
        # Of a file: ways of main passes since its last step, which its weights have gone.
        self._trips = 0
        self._recorder: Recorder | None = None

    def __len__(self) -> int:
        """Return the number of steps."""
        self._settle()
        return self._length

    def __repr__(self) -> str:
        if not self.header:
            return "Trajectory(no steps)"
        first, name = self.first_step, self.header["optimizer"]
        return f"Trajectory(steps {first} to {first + len(self)} of {name})"

    @property
    def first_step(self) -> int:
        """Optimizer steps taken before the first one here."""
        return int(self.header.get("first_step", 0))

    @property
    def end(self) -> tuple[int, list[int]] | None:
        """Step at which the weights were last looked at, and their checksums; None if never."""
        return self._end

    # Recording

    def record(self, optimizer: torch.optim.Optimizer) -> None:
        """Note every step of an optimizer from now on; an ``on_answer`` it has goes on working.

        A trajectory with steps is continued: where the optimizer has taken fewer steps than are
        here, as after loading a checkpoint, the later ones are dropped with the next step.

        Args:
            optimizer: The optimizer, with the weights where the trajectory ends.

        Raises:
            ValueError: If the optimizer is not of the zeroth-order family, has groups with
                gradients, or is not the one of the steps here, on its device.
            RuntimeError: If this trajectory is recording already.
        """
        if self._recorder is not None:
            raise RuntimeError("This trajectory is recording already. Call stop() first.")
        real = zeroth_order(optimizer)
        refuse_unloggable(real)
        if self.header:
            self.check(real)
            if not self.is_of_device(real):
                raise ValueError(
                    f"The trajectory is of a run on {self.header['device']} "
                    f"{self.header['device_name']}: begin a new one on this device."
                )
            if real._steps_done == self.first_step + self._length:
                real._trips = max(real._trips, self._trips)
        self._recorder = Recorder(real, self._begin_step, self._append)

    def stop(self) -> None:
        """Note no further steps."""
        if self._recorder is not None:
            self._note_end()
            self._trips = self._recorder.trips
            self._recorder.close()
            self._recorder = None

    def check(self, optimizer: ZerothOrderOptimizer) -> None:
        """Check that this is the log of such an optimizer over such parameters.

        Args:
            optimizer: The optimizer.

        Raises:
            ValueError: If it is not.
        """
        here = describe(optimizer)
        words = {"optimizer": "an optimizer", "groups": "parameter groups of the sizes"}
        for key in ("optimizer", "groups"):
            if here[key] != self.header[key]:
                raise ValueError(
                    f"The trajectory is that of {words[key]} {self.header[key]}, got {here[key]}."
                )
        for key, word in (("shapes", "shape"), ("dtypes", "dtype")):
            pairs = zip(self.header[key], here[key], strict=True)
            for position, (logged, found) in enumerate(pairs):
                if logged != found:
                    raise ValueError(
                        f"Parameter {position} has the {word} {logged} in the trajectory, but "
                        f"{found} here. Build the model as in the run."
                    )

    def is_of_device(self, optimizer: ZerothOrderOptimizer) -> bool:
        """Tell whether directions on the device of an optimizer are those of the steps here.

        Args:
            optimizer: The optimizer.
        """
        here = describe(optimizer)
        return all(here[key] == self.header[key] for key in ("device", "device_name"))

    def _begin_step(self, number: int) -> None:
        """Make room for a step: the first one writes the header."""
        recorder = self._recorder
        assert recorder is not None
        if not self.header:
            self.header = {
                "first_step": number,
                "base": recorder.base,
                "answer_dtype": "",
                **describe(recorder.optimizer),
            }
            return
        self.truncate(number)
        if number != self.first_step + self._length:
            raise RuntimeError(
                f"The trajectory covers steps {self.first_step} to "
                f"{self.first_step + self._length}, but the optimizer is at step {number}. Start a "
                "new one from a checkpoint of this step."
            )
        groups = recorder.optimizer.param_groups
        if [len(group["params"]) for group in groups] != self.header["groups"]:
            raise RuntimeError("A trajectory cannot go on after add_param_group. Start a new one.")
        if recorder.optimizer.stream_indices != self.header["streams"]:
            raise RuntimeError(
                "The random streams are not those of the trajectory. Load the state of the "
                "optimizer along with the weights."
            )

    def _append(self, step: TakenStep) -> None:
        values = [*step.answers, *step.scalars.values()]
        self.header["answer_dtype"] = str(step.answers[0].dtype).removeprefix("torch.")
        layout = (tuple(tuple(x.shape) for x in step.answers), tuple(step.scalars))
        masks = dict.fromkeys(name for name in self._changes.names if name.startswith("mask/"))
        self._changes.set(self._length, {"layout": layout, **masks, **step.settings})
        self._waiting.extend(x.reshape(-1) for x in values)
        self._length += 1
        if len(self._waiting) >= _WAITING:
            self._flush()

    def _flush(self) -> None:
        """Read the answers that wait, all at once."""
        if self._waiting:
            self._read.append(torch.cat(self._waiting).cpu().double())
            self._waiting = []

    def _settle(self) -> None:
        if self._recorder is not None:
            self._recorder.settle()

    def _note_end(self) -> None:
        """Look at the weights, if they are those after the last step."""
        recorder = self._recorder
        if recorder is None or not len(self):
            return
        optimizer = recorder.optimizer
        # Round-off of main passes that belong to a coming step would be in them.
        if optimizer._steps_done == self.first_step + self._length and not optimizer.main_moves[0]:
            self._end = (optimizer._steps_done, checksums(optimizer))

    # Steps

    def truncate(self, step: int) -> None:
        """Drop later steps.

        Args:
            step: Number of optimizer steps after which to stop, counted as the optimizer does.

        Raises:
            ValueError: If the trajectory begins later.
        """
        self._settle()
        kept = step - self.first_step
        if kept < 0:
            raise ValueError(
                f"The trajectory begins at step {self.first_step}, after step {step}. Start a new "
                "one."
            )
        if kept >= self._length:
            return
        values = self._values()[: self._offset(kept)].clone()
        self._read, self._waiting, self._length = [values], [], kept
        self._changes.truncate(kept)
        if self._end is not None and self._end[0] > step:
            self._end = None

    def steps(self, start: int = 0, stop: int | None = None) -> Iterator[LoggedStep]:
        """Go through the steps.

        Args:
            start: Index of the first one.
            stop: Index after the last one, None for all.
        """
        end = len(self) if stop is None else stop
        values, offset = self._values(), self._offset(start)
        dtype = getattr(torch, self.header["answer_dtype"] or "float64")
        for number in range(start, end):
            found = self._changes.at(number)
            shapes, names = found["layout"]
            answers = []
            for shape in shapes:
                size = torch.Size(shape).numel()
                answers.append(values[offset : offset + size].view(shape).to(dtype, copy=True))
                offset += size
            scalars = values[offset : offset + len(names)].to(dtype, copy=True).unbind()
            offset += len(names)
            yield LoggedStep(
                answers,
                dict(zip(names, scalars, strict=True)),
                _groups(found, len(self.header["groups"])),
                tuple(found["frozen"]),
                {
                    int(name.removeprefix("mask/")): value
                    for name, value in found.items()
                    if name.startswith("mask/")
                },
                (int(found["moves"][0]), bool(found["moves"][1])),
            )

    def _values(self) -> Tensor:
        self._flush()
        if len(self._read) != 1:
            self._read = [torch.cat([torch.empty(0, dtype=torch.float64), *self._read])]
        return self._read[0]

    def _offset(self, end: int) -> int:
        """Return the number of values in the first steps."""
        total = 0
        for length, (shapes, names) in self._changes.runs("layout", self._length):
            taken = min(length, end)
            total += taken * (sum(torch.Size(shape).numel() for shape in shapes) + len(names))
            end -= taken
        return total

    # Files

    def state_dict(self) -> dict[str, Any]:
        """Return everything as tensors, numbers, strings and containers of these."""
        self._note_end()
        self._settle()
        values = self._values()
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "header": dict(self.header),
            "length": self._length,
            "values": values,
            "checksum": int(checksum(values)),
            "changes": self._changes.state_dict(),
            "end": self._end,
            "trips": self._trips if self._recorder is None else self._recorder.trips,
        }

    @classmethod
    def from_state_dict(cls, state: Any) -> "Trajectory":
        """Make a trajectory of what `state_dict` returned.

        Args:
            state: Its result.

        Raises:
            ValueError: If it is something else, damaged, or of a newer version.
        """
        if not isinstance(state, dict) or state.get("format") != _FORMAT:
            raise ValueError("it is no trajectory")
        if state.get("version") != _VERSION:
            raise ValueError(
                f"it has version {state.get('version')!r} and this release knows {_VERSION}; "
                "update lightning-curvature"
            )
        trajectory = cls()
        try:
            header, values, length = dict(state["header"]), state["values"], int(state["length"])
            wrong = [k for k, kind in _HEADER.items() if header and type(header.get(k)) is not kind]
            if wrong or int(checksum(values)) != state["checksum"] or values.ndim != 1:
                raise ValueError(f"{wrong or 'its numbers'} changed after it was written")
            trajectory.header, trajectory._length, trajectory._read = header, length, [values]
            trajectory._changes = Changes.from_state_dict(state["changes"], length)
            if trajectory._offset(length) != len(values):
                raise ValueError("it holds another number of answers than of steps")
            trajectory._end, trajectory._trips = state["end"], int(state["trips"])
            if length:
                next(trajectory.steps(length - 1))
        except Exception as error:  # whatever it is, the file is to blame
            raise ValueError(f"it is damaged: {error}") from error
        return trajectory

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file, in one go: a crash leaves the file that was there before.

        Args:
            path: The file. Its folder is made if it is not there.
        """
        write_whole(self.state_dict(), path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Trajectory":
        """Read a file that `save` wrote; no code of it is run.

        Args:
            path: The file.

        Raises:
            ValueError: If it is no trajectory, damaged, or of a newer version.
        """
        with open(path, "rb") as file:
            try:
                state = torch.load(file, map_location="cpu", weights_only=True)
            except Exception as error:  # torch raises what its parts do
                raise ValueError(
                    f"Cannot read the trajectory {os.fspath(path)!r}: it is damaged, or another "
                    "kind of file."
                ) from error
        try:
            return cls.from_state_dict(state)
        except ValueError as error:
            raise ValueError(f"Cannot read the trajectory {os.fspath(path)!r}: {error}.") from error

    def __getstate__(self) -> dict[str, Any]:
        """Leave the optimizer out of pickles and copies."""
        self._settle()
        self._flush()
        return {**self.__dict__, "_recorder": None}


def write_whole(content: Any, path: str | os.PathLike[str]) -> None:
    """Write a file of tensors; there is never a part of it.

    Args:
        content: What `torch.save` takes.
        path: The file. Its folder is made if it is not there.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        torch.save(content, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def zeroth_order(optimizer: torch.optim.Optimizer) -> ZerothOrderOptimizer:
    """Return a zeroth-order optimizer without the wrapper that Lightning puts around it.

    Args:
        optimizer: The optimizer.

    Raises:
        ValueError: If it is not of the family.
    """
    real: Any = getattr(optimizer, "_optimizer", optimizer)
    if not isinstance(real, ZerothOrderOptimizer):
        raise ValueError(
            f"Only zeroth-order optimizers such as MeZO have a trajectory, got "
            f"{type(real).__name__}."
        )
    return real


def _groups(found: dict[str, Any], count: int) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = [{} for _ in range(count)]
    for key, value in found.items():
        if key.startswith("group/"):
            _, number, name = key.split("/", 2)
            groups[int(number)][name] = value
    return groups
