"""Tests of lightning_curvature/curvature/window_memory.py."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_curvature import MFAC, GradientWindow
from lightning_curvature.curvature import window_memory
from lightning_curvature.curvature.window_memory import (
    check_window_fits,
    free_memory,
    window_bytes,
)

CPU = torch.device("cpu")
MIB = 1 << 20


def give(monkeypatch: pytest.MonkeyPatch, free: int | None, elsewhere: int | None = None) -> None:
    """Say how much memory is free on the CPU, and on other devices."""
    found = lambda device: free if device.type == "cpu" else elsewhere  # noqa: E731
    monkeypatch.setattr(window_memory, "free_memory", found)


def refusal(*args: Any, **kwargs: Any) -> str:
    """Return the message with which a window is refused."""
    with pytest.raises(ValueError, match="Invalid num_grads=") as caught:
        check_window_fits(*args, **kwargs)
    return str(caught.value)


def largest(text: str) -> list[int]:
    """Return the numbers of gradients that a message says would fit."""
    return [int(number) for number in re.findall(r"num_grads<=(\d+)", text)]


def test_bytes_of_a_window() -> None:
    """The gradients, both squares of a step, and vectors beside them."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        found = window_bytes(10, 1000, dtype)
        rows = GradientWindow(10, 1000, dtype=torch.float64).nbytes // 8 * dtype.itemsize
        assert rows + 1000 * 4 < found < rows + 10 * 1000 * 8
    assert window_bytes(1024, 1, torch.float32) > 2 * 1024**2 * 8


@pytest.mark.parametrize("row_dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("free", [MIB, 77 * MIB + 5])
def test_the_largest_window_that_fits_is_named(
    row_dtype: torch.dtype, free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    give(monkeypatch, free)
    text = refusal(100_000, 5000, row_dtype, CPU)
    numbers = largest(text)
    dtypes = [row_dtype] if row_dtype == torch.bfloat16 else [row_dtype, torch.bfloat16]
    assert len(numbers) == len(dtypes)
    for m, dtype in zip(numbers, dtypes, strict=True):
        check_window_fits(m, 5000, dtype, CPU)
        assert largest(refusal(m + 1, 5000, dtype, CPU))[0] == m
    assert ("row_dtype='bfloat16'" in text) == (row_dtype != torch.bfloat16)
    assert "placement" not in text


def test_the_message(monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, 300 * MIB)
    text = refusal(1024, 1_000_000, torch.float32, CPU)
    assert text == (
        "Invalid num_grads=1024: gradients of 1,000,000 parameters take 3.8 GiB, but only "
        "300.0 MiB are free on cpu. Use num_grads<=75, or row_dtype='bfloat16' with "
        "num_grads<=151."
    )


def test_host_memory_is_named_where_the_device_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, free=100_000 * MIB, elsewhere=100 * MIB)
    device = torch.device("cuda", 0)
    text = refusal(1000, 1_000_000, torch.float32, device)
    assert "are free on cuda:0" in text
    assert text.endswith(", or placement='host'.")
    check_window_fits(1000, 1_000_000, torch.float32, device, placement="host")
    give(monkeypatch, free=10 * MIB, elsewhere=100_000 * MIB)
    check_window_fits(1000, 1_000_000, torch.float32, device)
    text = refusal(1000, 1_000_000, torch.float32, device, placement="host")
    assert "free on cpu" in text
    assert "placement" not in text


def test_ranks_share_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, 100 * MIB)
    alone = refusal(80, 1_000_000, torch.float32, CPU)
    assert "rank" not in alone
    check_window_fits(80, 1_000_000, torch.float32, CPU, num_ranks=4)
    text = refusal(1000, 1_000_000, torch.float32, CPU, num_ranks=4)
    assert "of 1,000,000 parameters, of which this rank keeps one part in 4 take" in text
    assert largest(text)[0] > 3 * largest(alone)[0]
    check_window_fits(largest(text)[0], 1_000_000, torch.float32, CPU, num_ranks=4)


def test_where_nobody_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, None)
    check_window_fits(10**9, 10**9, torch.float32, CPU)
    assert free_memory(torch.device("meta")) is None


# How much memory there is


def files(
    monkeypatch: pytest.MonkeyPatch, folder: Path, meminfo: str | None, limit: str, used: str
) -> None:
    """Write the files of the system."""
    paths = [folder / name for name in ("meminfo", "max", "current")]
    for path, text in zip(paths, (meminfo, limit, used), strict=True):
        if text is not None:
            path.write_text(text)
    monkeypatch.setattr(window_memory, "_MEMINFO", paths[0])
    monkeypatch.setattr(window_memory, "_CGROUP", tuple(paths[1:]))


INFO = "MemTotal:  9000 kB\nMemFree:  100 kB\nMemAvailable:    4000 kB\n"


@pytest.mark.parametrize(
    ("limit", "used", "expected"),
    [
        ("max\n", "5\n", 4000 << 10),
        ("1000000\n", "300000\n", 700_000),
        ("1000000000\n", "3\n", 4000 << 10),
        ("", "", 4000 << 10),
    ],
)
def test_limits_of_a_container(
    limit: str, used: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files(monkeypatch, tmp_path, INFO, limit, used)
    assert free_memory(CPU) == expected


@pytest.mark.parametrize("info", [None, "", "MemAvailable:\n", "MemAvailable: many kB\n"])
def test_systems_without_the_file(
    info: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files(monkeypatch, tmp_path, info, "max", "1")
    sizes = {"SC_AVPHYS_PAGES": 50, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)
    assert free_memory(CPU) == 50 * 4096

    def unknown(name: str) -> int:
        raise ValueError(name)

    monkeypatch.setattr(os, "sysconf", unknown)
    assert free_memory(CPU) is None


def test_this_machine() -> None:
    found = free_memory(CPU)
    assert found is None or found > MIB


# The optimizer


def test_an_optimizer_is_refused_when_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen parameters take nothing; those that come later are counted with the others."""
    give(monkeypatch, 3 * MIB)
    params = [torch.nn.Parameter(torch.zeros(10_000)) for _ in range(2)]
    params[1].requires_grad_(False)
    with pytest.raises(ValueError, match=r"Invalid num_grads=200: gradients of 10,000 param") as e:
        MFAC(params, num_grads=200)
    one, half = largest(str(e.value))
    for options in ({"num_grads": one}, {"num_grads": half, "row_dtype": "bfloat16"}):
        optimizer = MFAC(params, **options)
        assert 2.9 * MIB < optimizer.window_bytes <= 3 * MIB
    with pytest.raises(ValueError, match=f"Invalid num_grads={one + 1}: "):
        MFAC(params, num_grads=one + 1)
    optimizer = MFAC(params, num_grads=one)
    params[0].grad = torch.ones(10_000)
    optimizer.step()
    params[1].requires_grad_(True)
    params[1].grad = torch.ones(10_000)
    before = params[0].detach().clone()
    with pytest.raises(ValueError, match=rf"Invalid num_grads={one}: gradients of 20,000 param"):
        optimizer.step()
    assert torch.equal(params[0], before)


def test_where_not_even_one_gradient_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_memory, "free_memory", lambda _: 100)
    with pytest.raises(ValueError, match="Use another optimizer: not even one gradient fits"):
        check_window_fits(4, 1000, torch.float32, torch.device("cpu"))
