"""Fixtures for tests only; the isolation shared with the doctests is in the root conftest."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """Folder that holds ``pyproject.toml``, ``README.md`` and ``configs``."""
    return ROOT


@pytest.fixture
def run_python(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run ``python`` with the given arguments in ``tmp_path`` and return the finished process.

    The package of the checkout comes first on the path where there is one, as it does in process.
    The exit status is not checked: tests of error messages need the failing ones.
    """

    def run(
        args: Sequence[str | os.PathLike[str]],
        *,
        env: Mapping[str, str] | None = None,
        timeout: float = 240.0,
    ) -> subprocess.CompletedProcess[str]:
        path = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        return subprocess.run(
            [sys.executable, *args],
            cwd=tmp_path,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(part for part in path if part),
                **(env or {}),
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run
