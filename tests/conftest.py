"""Fixtures for tests only; the isolation shared with the doctests is in the root conftest."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.compatibility import WRITE, CompatibilityPlugin, make_refused
from tests.helpers.families import FamilyPlugin
from tests.helpers.ranks import RankPool
from tests.helpers.warm_python import WarmPython

ROOT = Path(__file__).resolve().parents[1]
EVERY = "--every-optimizer"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options that run all tests with all optimizers, and write what they show."""
    parser.addoption(EVERY, action="store_true", help="run wide tests with every optimizer")
    parser.addoption(WRITE, action="store_true", help=f"{EVERY}, and write docs/compatibility.md")


def pytest_configure(config: pytest.Config) -> None:
    """Choose the optimizers, and collect what the tests show of features and optimizers."""
    every = config.getoption(EVERY) or config.getoption(WRITE)
    config.pluginmanager.register(FamilyPlugin(every=every), "families")
    plugin = CompatibilityPlugin(config, ROOT / "docs" / "compatibility.md", ROOT / "tests")
    config.pluginmanager.register(plugin, "compatibility")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let workers of pytest-xdist start with slow files, so that none is left alone with one."""
    if hasattr(config, "workerinput"):
        slow = {item.path for item in items if item.get_closest_marker("slow") is not None}
        items.sort(key=lambda item: item.path not in slow)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Write docs/compatibility.md if asked to."""
    plugin = config.pluginmanager.get_plugin("compatibility")
    if config.getoption(WRITE) and isinstance(plugin, CompatibilityPlugin):
        terminalreporter.write_line(plugin.write())


@pytest.fixture
def refused(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Call it with the message where a test marked ``feature`` shows a refusal."""
    return make_refused(request)


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


@pytest.fixture(scope="session")
def warm_python() -> Iterator[WarmPython]:
    """Run programs in processes that need not import torch and Lightning first."""
    warm = WarmPython()
    yield warm
    warm.close()


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Two processes that run functions for the tests; they start when first needed."""
    pool = RankPool()
    yield pool
    pool.close()
