"""A window of gradients in a checkpoint: put together from the ranks, dealt out again, checked.

"parameters"  numbers of the parameters that have columns, in the order of the columns
"sizes"       how many entries each has
"kept"        boolean vector over all entries: which have a column; None for all
"columns"     [start, stop) of the columns that "rows" holds
"num_columns" number of columns in all
"rows"        the gradients by slot, in host memory
"scales"      one per row
"gram"        inner products of the whole gradients
"inserted"    number of gradients ever inserted, which tells the slot of the next
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "check_finite_tensor",
    "check_saved_window",
    "gathered_window",
    "join_window_shards",
    "part_of_window",
]

_WINDOW = "window"
_KEYS = (
    *("parameters", "sizes", "kept", "columns", "num_columns", "rows", "scales", "gram"),
    "inserted",
)


def part_of_window(saved: Mapping[str, Any], start: int, width: int) -> dict[str, Any]:
    """Return the columns of one rank.

    Args:
        saved: A saved window that holds them.
        start: First column.
        width: Number of columns; those that do not exist are left out. Rows are no copy.

    Raises:
        ValueError: If the saved window does not hold them.
    """
    first, last = saved["columns"]
    stop = min(start + width, saved["num_columns"])
    if start < stop and not (first <= start and stop <= last):
        raise ValueError(
            f"The saved window holds columns {first} to {last} of {saved['num_columns']}, but this "
            f"rank needs {start} to {stop}. Put the states of all ranks together with "
            "join_window_shards, or save with gather_state=True."
        )
    part = slice(start - first, stop - first) if start < stop else slice(0, 0)
    return {**saved, "rows": saved["rows"][:, part]}


def gathered_window(
    saved: dict[str, Any], num_ranks: int, *, everywhere: bool = False
) -> dict[str, Any]:
    """Return the window with the columns of all ranks; all of them must call it.

    Args:
        saved: The window of this rank.
        num_ranks: Number of ranks.
        everywhere: Whether all ranks get it. Otherwise only rank 0 does, and the others get back
            what they had: ranks on one machine share its memory.
    """
    width = -(-saved["num_columns"] // num_ranks)
    device = saved["gram"].device
    takes = everywhere or torch.distributed.get_rank() == 0
    total = saved["num_columns"]
    whole = saved["rows"].new_empty((len(saved["rows"]), total if takes else 0))
    own = part_of_window(saved, saved["columns"][0], width)["rows"]
    # Row by row: the device needs room for one more gradient only.
    for number, row in enumerate(own):
        sent = torch.nn.functional.pad(row.to(device), (0, width - len(row)))
        parts = [torch.empty_like(sent) for _ in range(num_ranks)]
        torch.distributed.all_gather(parts, sent)
        if takes:
            whole[number] = torch.cat(parts)[:total].cpu()
    if not takes:
        return saved
    return {**saved, "columns": [0, total], "rows": whole}


def join_window_shards(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one optimizer state from those that several ranks saved with ``gather_state=False``.

    It can be loaded on any number of ranks.

    Args:
        states: What ``MFAC.state_dict`` returned on each rank, in any order.

    Raises:
        ValueError: If columns are missing, or the states are not those of one step.
    """
    if not states:
        raise ValueError("Invalid states=[]: must be the states of all ranks.")
    found = [state["curvature"][_WINDOW] for state in states]
    windows = [window for window in found if window is not None]
    if not windows:  # before the first step
        return dict(states[0])
    if len(windows) < len(found):
        raise ValueError(
            f"{len(found) - len(windows)} of {len(found)} states have no window. Join states of "
            "one step."
        )
    windows.sort(key=lambda window: window["columns"])
    first = windows[0]
    rows, end = [], 0
    for window in windows:
        if window["inserted"] != first["inserted"]:
            raise ValueError(
                f"The windows are of different steps: {int(first['inserted'])} and "
                f"{int(window['inserted'])} gradients were inserted. Join states of one step."
            )
        start, stop = window["columns"]
        if start != end:
            break
        rows.append(window["rows"])
        end = stop
    if end != first["num_columns"]:
        raise ValueError(
            f"The windows lack columns from {end} on, of {first['num_columns']}. Join the states "
            "of all ranks."
        )
    joined = {
        **first,
        "columns": [0, end],
        "rows": torch.cat(rows, 1),
    }
    (state, *_) = states
    return {**state, "curvature": {**state["curvature"], _WINDOW: joined}}


def check_saved_window(
    saved: Any, params: Sequence[Tensor], group: Mapping[str, Any], where: str
) -> None:
    """Check a window that is about to be loaded.

    Args:
        saved: It, None if no gradient was inserted yet.
        params: Parameters of the optimizer.
        group: The saved hyper-parameters.
        where: Beginning of the message if something is wrong.

    Raises:
        ValueError: If it is not whole and sound, or belongs to other parameters.
    """
    if saved is None:
        return
    if not isinstance(saved, dict):
        raise ValueError(f"{where}: '{_WINDOW}' must be a dict, got {_short(saved)}.")
    missing = [key for key in _KEYS if key not in saved]
    if missing:
        raise ValueError(f"{where}: '{_WINDOW}' has no {', '.join(missing)}.")
    for key in ("parameters", "sizes", "columns"):
        if not isinstance(saved[key], list) or not all(_is_count(x) for x in saved[key]):
            raise ValueError(
                f"{where}: '{key}' of the window must be a list of integers >= 0, got "
                f"{_short(saved[key])}."
            )
    numbers, sizes = saved["parameters"], saved["sizes"]
    fitting = len(set(numbers)) == len(sizes) and all(n < len(params) for n in numbers)
    if not fitting or [params[n].numel() for n in numbers] != sizes:
        raise ValueError(
            f"{where}: the window has columns for parameters of other sizes, {_short(sizes)}. The "
            "state is that of another model, or damaged."
        )
    if not _is_count(saved["num_columns"]):
        raise ValueError(
            f"{where}: 'num_columns' of the window must be an integer >= 0, got "
            f"{_short(saved['num_columns'])}."
        )
    inserted = saved["inserted"]
    integral = isinstance(inserted, Tensor) and inserted.dtype == torch.int64
    if not integral or inserted.ndim or inserted.is_meta or int(inserted) < 0:
        raise ValueError(
            f"{where}: 'inserted' of the window must be a 0-dim tensor with an integer >= 0, got "
            f"{_short(inserted)}."
        )
    _check_columns(saved, where)
    num_grads = int(group["num_grads"])
    span = saved["columns"][1] - saved["columns"][0]
    shapes = {"rows": (num_grads, span), "scales": (num_grads,), "gram": (num_grads, num_grads)}
    for key, shape in shapes.items():
        check_finite_tensor(f"{where}: '{key}' of the window", saved[key], shape)


def _check_columns(saved: Mapping[str, Any], where: str) -> None:
    total = saved["num_columns"]
    kept, entries = saved["kept"], sum(saved["sizes"])
    if kept is not None:
        sound = isinstance(kept, Tensor) and kept.dtype == torch.bool
        if not sound or tuple(kept.shape) != (entries,):
            raise ValueError(
                f"{where}: 'kept' of the window must be {entries} booleans, got {_short(kept)}."
            )
        entries = int(kept.sum())
    columns = saved["columns"]
    ordered = len(columns) == len(("start", "stop")) and columns[0] <= columns[1] <= total
    if total != entries or not ordered:
        raise ValueError(
            f"{where}: the window holds columns {columns} of {total}, its parameters have "
            f"{entries}. The state is damaged."
        )


def check_finite_tensor(where: str, value: Any, shape: tuple[int, ...]) -> None:
    """Check a tensor of a saved state.

    Args:
        where: Beginning of the message if something is wrong.
        value: It.
        shape: The shape it must have.

    Raises:
        ValueError: If it is not a tensor of finite real numbers of that shape.
    """
    sound = (
        isinstance(value, Tensor)
        and value.dtype.is_floating_point
        and value.layout == torch.strided
        and value.device.type != "meta"
        and tuple(value.shape) == shape
    )
    # Row by row, without a copy of all of it.
    rows = value.reshape(len(value), -1) if sound and value.ndim else ()
    sizes = [torch.linalg.vector_norm(row, float("inf")) for row in rows if row.numel()]
    if not sound or not all(bool(torch.isfinite(size)) for size in sizes):
        raise ValueError(
            f"{where} must be a tensor of finite real numbers of shape {list(shape)}, got "
            f"{_short(value)}."
        )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        return f"a {kind} tensor of shape {list(value.shape)} on {value.device}"
    text = repr(value)
    return text if len(text) <= 40 else f"a {type(value).__name__}"  # noqa: PLR2004
