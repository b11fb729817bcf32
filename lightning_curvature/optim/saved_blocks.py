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

__all__ = ["check_saved_blocks", "entries_of", "states_of"]

_PARAMETERS = "parameters"
_DIAGONAL = {"diagonal", "mass"}
_KEYS = {
    *FACTORS,
    *(f"{side}_{kind}" for side in "ag" for kind in ("inverse", "cholesky", "values", "vectors")),
    "eigenvalue_correction",
    "correction_mass",
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
            foreign.append(old)
            continue
        block = parts.blocks[name]
        for key, side in (("a_factor", block.input), ("g_factor", block.output)):
            shape = [block.groups, side.cuts, side.width, side.width]
            if list(entry[key].shape) != shape:
                raise ValueError(
                    f"{where}: '{key}' of block '{old}' must have the shape {shape}, got "
                    f"{list(entry[key].shape)}. Use the max_factor_dim it was saved with."
                )
        device = params[block.weight.number].device
        states[name] = {key: x.to(device) for key, x in entry.items() if key != _PARAMETERS}
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
        if entry["diagonal"].shape != params[number].shape:
            raise ValueError(
                f"{where}: the diagonal of parameter {number} must have the shape "
                f"{list(params[number].shape)}, got {list(entry['diagonal'].shape)}."
            )
    return states, diagonals


def check_saved_blocks(saved: Mapping[str, Any], count: int, *, where: str) -> None:
    """Check blocks that are about to be loaded, without knowing the layers.

    Args:
        saved: State of the curvature.
        count: Number of parameters of the optimizer.
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
        if not isinstance(number, int) or not 0 <= number < count:
            raise ValueError(
                f"{where}: 'bypassed' must hold numbers of {count} parameters, got "
                f"{_short(number)}."
            )
    for name, entry in saved["blocks"].items():
        place = f"{where}: block {name!r}"
        _check_tensors(entry, {_PARAMETERS, *FACTORS}, {_PARAMETERS, *_KEYS}, place)
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
        if key != _PARAMETERS and not _is_sound(value):
            raise ValueError(
                f"{place}: '{key}' must be a tensor of finite real numbers, got {_short(value)}."
            )


def _are_pieces(found: Any, count: int) -> bool:
    if not isinstance(found, list) or len(found) not in (1, 2):
        return False
    for piece in found:
        if not isinstance(piece, list) or len(piece) != len(("number", "start", "stop")):
            return False
        if not all(x is None or (isinstance(x, int) and not isinstance(x, bool)) for x in piece):
            return False
        if piece[0] is None or not 0 <= piece[0] < count:
            return False
    return True


def _is_sound(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.dtype.is_floating_point
        and value.layout == torch.strided
        and value.device.type != "meta"
        and bool(torch.isfinite(value).all())
    )


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        return f"a {kind} tensor of shape {list(value.shape)} on {value.device}"
    text = repr(value)
    return text if len(text) <= 40 else f"a {type(value).__name__}"  # noqa: PLR2004
