"""Blocks in a checkpoint: what they look like, whether they are sound, whose they are.

    "blocks"     name of the block -> {"parameters": [[number, start, stop], ...], tensors by key}
    "diagonals"  number of the parameter, as text -> {"diagonal", "mass"}
    "bypassed"   numbers of weights whose layers have no block though they could

Numbers are those of parameters in the order of the optimizer; start and stop are rows of it, None
for all. By them a block finds its tensors again when the model is attached under another name: as
``net.0`` in a LightningModule and as ``0`` in a plain loop. Keys are those of
`curvature/kronecker.py`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_curvature.curvature.kronecker import FACTORS, State
from lightning_curvature.curvature.kronecker_blocks import BlockInfo, Blocks

__all__ = ["check_saved_blocks", "entries_of", "moved", "states_of"]

_PARAMETERS = "parameters"
_DIAGONAL = {"diagonal", "mass"}
_CORRECTION = ("eigenvalue_correction", "correction_mass")
_MASSES = ("positions", "mass", "correction_mass", "diagonal")
_KEYS = {
    *FACTORS,
    *(f"{side}_{kind}" for side in "ag" for kind in ("inverse", "cholesky", "values", "vectors")),
    *_CORRECTION,
}


def entries_of(
    parts: Blocks,
    states: Mapping[str, State],
    diagonals: Mapping[int, State],
    bypassed: Iterable[int],
) -> dict[str, Any]:
    """Return what goes into a checkpoint.

    Args:
        parts: Blocks and the rest.
        states: States of blocks by name.
        diagonals: Diagonals by number of the parameter.
        bypassed: Numbers of weights whose layers have no block after all.
    """
    return {
        "blocks": {
            name: {_PARAMETERS: _pieces(parts.blocks[name]), **state}
            for name, state in states.items()
        },
        "diagonals": {str(number): dict(state) for number, state in diagonals.items()},
        "bypassed": sorted(bypassed),
    }


def _pieces(block: BlockInfo) -> list[list[int | None]]:
    return [[piece.number, piece.start, piece.stop] for piece in block.pieces]


def moved(saved: Mapping[str, Any], params: Sequence[Tensor]) -> dict[str, Any]:
    """Return what was saved, with every tensor where its parameter is.

    Args:
        saved: A state of the curvature, sound by itself; other keys are left out.
        params: Parameters of the optimizer.
    """
    return {
        "blocks": {
            name: _on(params[entry[_PARAMETERS][0][0]].device, entry)
            for name, entry in saved["blocks"].items()
        },
        "diagonals": {
            number: _on(params[int(number)].device, entry)
            for number, entry in saved["diagonals"].items()
        },
        "bypassed": list(saved["bypassed"]),
    }


def _on(device: torch.device, entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: x.to(device) if isinstance(x, Tensor) else x for key, x in entry.items()}


def states_of(
    parts: Blocks, saved: Mapping[str, Any], params: Sequence[Tensor], *, where: str
) -> tuple[dict[str, State], dict[int, State]]:
    """Return the states of blocks and diagonals, on the devices of their parameters.

    Args:
        parts: Blocks and the rest.
        saved: What was saved, sound by itself.
        params: Parameters of the optimizer.
        where: Beginning of the message if something does not fit.

    Raises:
        ValueError: If what was saved does not belong to these blocks.
    """
    names = {repr(_pieces(block)): name for name, block in parts.blocks.items()}
    states: dict[str, State] = {}
    foreign = []
    for old, entry in saved["blocks"].items():
        name = names.get(repr(entry[_PARAMETERS]))
        if name is None:
            # Of a layer that is frozen by now: it may be trained again, but not as it was.
            if any(params[number].requires_grad for number, _, _ in entry[_PARAMETERS]):
                foreign.append(old)
            continue
        shapes = _shapes(parts.blocks[name])
        state = {key: x for key, x in entry.items() if key != _PARAMETERS}
        for key, value in state.items():
            if list(value.shape) != shapes[key]:
                raise ValueError(
                    f"{where}: '{key}' of block '{old}' must have the shape {shapes[key]}, got "
                    f"{list(value.shape)}. The state is that of another model, or damaged."
                )
        missing = _missing(parts.blocks[name], state)
        if missing:
            raise ValueError(
                f"{where}: block '{old}' has no {', '.join(missing)}. The state is cut off."
            )
        device = params[parts.blocks[name].weight.number].device
        states[name] = {key: x.to(device) for key, x in state.items()}
    if foreign:
        raise ValueError(
            f"{where}: {sorted(foreign)} in 'blocks' belong to no layer. The state is that of "
            "another model, or of other trained parameters."
        )
    diagonals = {
        int(number): {key: x.to(params[int(number)].device) for key, x in entry.items()}
        for number, entry in saved["diagonals"].items()
    }
    for number, entry in diagonals.items():
        for key, shape in (("diagonal", list(params[number].shape)), ("mass", [])):
            if list(entry[key].shape) != shape:
                raise ValueError(
                    f"{where}: '{key}' of the diagonal of parameter {number} must have the shape "
                    f"{shape}, got {list(entry[key].shape)}."
                )
    return states, diagonals


def _shapes(block: BlockInfo) -> dict[str, list[int]]:
    """Return the shapes of all tensors that a block may have, by key."""
    found: dict[str, list[int]] = {"positions": [], "mass": [], "correction_mass": []}
    for key, side in (("a", block.input), ("g", block.output)):
        values = [block.groups, side.cuts, side.width]
        found[f"{key}_values"] = values
        for kind in ("factor", "inverse", "cholesky", "vectors"):
            found[f"{key}_{kind}"] = [*values, side.width]
    found["eigenvalue_correction"] = [block.groups, block.output.filled, block.input.filled]
    return found


def _missing(block: BlockInfo, state: State) -> list[str]:
    """Return the keys without which the others are of no use."""
    inverted = [s for s in "ag" if f"{s}_inverse" in state or f"{s}_cholesky" in state]
    needed: list[str] = []
    if len(inverted) == 1:
        needed += [f"{s}_inverse" for s in "ag" if s not in inverted]
    if any(key.endswith(("_values", "_vectors")) or key in _CORRECTION for key in state):
        needed += ["a_values", "g_values"]
        sides = (("a", block.input), ("g", block.output))
        needed += [f"{key}_vectors" for key, side in sides if side.kind != "diagonal"]
    return [key for key in needed if key not in state]


def check_saved_blocks(
    saved: Mapping[str, Any], count: int, *, corrected: bool, where: str
) -> None:
    """Check blocks that are about to be loaded, without knowing the layers.

    Args:
        saved: State of the curvature.
        count: Number of parameters of the optimizer.
        corrected: Whether eigenvalues are corrected.
        where: Beginning of the message if something is wrong.

    Raises:
        ValueError: If they are not whole and sound.
    """
    for key, kind in (("blocks", dict), ("diagonals", dict), ("bypassed", list)):
        if not isinstance(saved.get(key), kind):
            raise ValueError(
                f"{where}: '{key}' must be a {kind.__name__}, got {_short(saved.get(key))}."
            )
    for number in saved["bypassed"]:
        if not _is_number(number, count):
            raise ValueError(
                f"{where}: 'bypassed' must hold numbers of {count} parameters, got "
                f"{_short(number)}."
            )
    for name, entry in saved["blocks"].items():
        place = f"{where}: block {name!r}"
        needed = {_PARAMETERS, *FACTORS}
        if corrected and isinstance(entry, dict) and "a_values" in entry:
            needed.update(_CORRECTION)
        _check_tensors(entry, needed, {_PARAMETERS, *_KEYS}, place)
        if not _are_pieces(entry[_PARAMETERS], count):
            raise ValueError(
                f"{place}: '{_PARAMETERS}' must list one or two [number, start, stop] of {count} "
                f"parameters, got {_short(entry[_PARAMETERS])}."
            )
    for number, entry in saved["diagonals"].items():
        if not (isinstance(number, str) and number.isdecimal() and int(number) < count):
            raise ValueError(
                f"{where}: 'diagonals' must have numbers of {count} parameters as keys, got "
                f"{_short(number)}."
            )
        _check_tensors(entry, _DIAGONAL, _DIAGONAL, f"{where}: the diagonal of parameter {number}")


def _check_tensors(entry: Any, needed: set[str], known: set[str], place: str) -> None:
    if not isinstance(entry, dict):
        raise ValueError(f"{place} must be a dict, got {_short(entry)}.")
    missing, unknown = sorted(needed - set(entry)), sorted(set(map(str, entry)) - known)
    if missing:
        raise ValueError(f"{place} has no {', '.join(missing)}.")
    if unknown:
        raise ValueError(f"{place} has unknown keys: {', '.join(unknown)}.")
    for key, value in entry.items():
        if key != _PARAMETERS and not _is_sound(key, value):
            least = " >= 0" if key in _MASSES else ""
            raise ValueError(
                f"{place}: '{key}' must be a tensor of finite real numbers{least}, got "
                f"{_short(value)}."
            )


def _are_pieces(found: Any, count: int) -> bool:
    if not isinstance(found, list) or len(found) not in (1, 2):
        return False
    for piece in found:
        if not isinstance(piece, list) or len(piece) != len(("number", "start", "stop")):
            return False
        number, *rows = piece
        if not _is_number(number, count) or not (rows == [None, None] or _are_rows(*rows)):
            return False
    return True


def _is_number(found: Any, count: int) -> bool:
    return isinstance(found, int) and not isinstance(found, bool) and 0 <= found < count


def _are_rows(start: Any, stop: Any) -> bool:
    whole = all(isinstance(x, int) and not isinstance(x, bool) for x in (start, stop))
    return whole and 0 <= start < stop


def _is_sound(key: str, value: Any) -> bool:
    sound = (
        isinstance(value, Tensor)
        and value.dtype.is_floating_point
        and value.layout == torch.strided
        and value.device.type != "meta"
        and bool(torch.isfinite(value).all())
    )
    return sound and not (key in _MASSES and bool((value < 0).any()))


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        return f"a {kind} tensor of shape {list(value.shape)} on {value.device}"
    text = repr(value)
    return text if len(text) <= 40 else f"a {type(value).__name__}"  # noqa: PLR2004
