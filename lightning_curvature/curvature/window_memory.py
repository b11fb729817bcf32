"""How much memory a window of gradients takes, and how much there is, before any is allocated."""

import os
from pathlib import Path
from typing import Literal

import torch

__all__ = ["check_window_fits", "free_memory", "window_bytes"]

_MEMINFO = Path("/proc/meminfo")
# Limit and use of the control group that the process is in, as containers see them.
_CGROUP = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current"))
_CGROUP_STAT = Path("/sys/fs/cgroup/memory.stat")
_UNITS = (("GiB", 1 << 30), ("MiB", 1 << 20))
# Vectors of d numbers beside the window: the gradient, the direction and their parts.
_VECTORS = 3


def window_bytes(num_grads: int, num_columns: int, row_dtype: torch.dtype) -> int:
    """Return the bytes that a window takes with its Gram matrix and working memory.

    Args:
        num_grads: Number of gradients.
        num_columns: Numbers of each on this rank.
        row_dtype: In which they are kept.

    Examples:
        >>> window_bytes(64, 1_000_000, torch.float32)
        268065536
    """
    working = _VECTORS * num_columns * max(row_dtype.itemsize, 4) + 2 * num_grads**2 * 8
    return num_grads * num_columns * row_dtype.itemsize + working


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that can still be allocated on a device, None if nobody tells."""
    if device.type == "cuda":
        # What torch's allocator holds but does not use can be used.
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + held
    if device.type != "cpu":
        return None
    found = [size for size in (_system_memory(), _group_memory()) if size is not None]
    return min(found, default=None)


def _system_memory() -> int | None:
    try:
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except (OSError, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on this system
        return None


def _group_memory() -> int | None:
    try:
        limit, used = (int(path.read_text()) for path in _CGROUP)
    except (OSError, ValueError):  # no such file, or no limit ("max")
        return None
    return limit - used + min(_cached_files(), used)


def _cached_files() -> int:
    """Return what counts as used but is given up when it is needed: copies of files."""
    try:
        lines = _CGROUP_STAT.read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
    except (OSError, ValueError, IndexError):
        return 0


def check_window_fits(
    num_grads: int,
    num_columns: int,
    row_dtype: torch.dtype,
    device: torch.device,
    *,
    placement: Literal["device", "host"] = "device",
    num_ranks: int = 1,
) -> None:
    """Refuse a window that is larger than the free memory.

    Args:
        num_grads: Number of gradients.
        num_columns: Numbers of each, on all ranks together.
        row_dtype: In which they are kept.
        device: Where the parameters are.
        placement: Where the window goes.
        num_ranks: Number of ranks that the columns are dealt out over.

    Raises:
        ValueError: If it does not fit; the message has the largest number that would.
    """
    where = torch.device("cpu") if placement == "host" else device
    free = free_memory(where)
    share = -(-num_columns // num_ranks)
    needed = window_bytes(num_grads, share, row_dtype)
    if free is None or needed <= free:
        return
    most, half = (_largest(free, share, dtype) for dtype in (row_dtype, torch.bfloat16))
    advice = [f"num_grads<={most}"] if most > 0 else []
    if row_dtype.itemsize > torch.bfloat16.itemsize and half > 0:
        advice.append(f"row_dtype='bfloat16' with num_grads<={half}")
    if where.type != "cpu":
        advice.append("placement='host'")
    if not advice:
        advice.append("another optimizer: not even one gradient fits")
    parts = f", of which this rank keeps one part in {num_ranks}" if num_ranks > 1 else ""
    raise ValueError(
        f"Invalid num_grads={num_grads}: gradients of {num_columns:,} parameters{parts} take "
        f"{_text(needed)}, but only {_text(free)} are free on {where}. Use "
        f"{', or '.join(advice)}."
    )


def _largest(free: int, num_columns: int, row_dtype: torch.dtype) -> int:
    """Return the largest number of gradients that fits."""
    low, high = 0, free // max(num_columns * row_dtype.itemsize, 1) + 1
    while high - low > 1:
        middle = (low + high) // 2
        if window_bytes(middle, num_columns, row_dtype) <= free:
            low = middle
        else:
            high = middle
    return low


def _text(size: int) -> str:
    for unit, factor in _UNITS:
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size / 1024:.1f} KiB"
