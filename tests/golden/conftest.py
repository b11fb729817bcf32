"""Where the recorded trajectories are.

The folder is named by LIGHTNING_CURVATURE_GOLDEN (default: ../shared/golden beside the checkout).
Tests take sizes and hyper-parameters from the files found there.
"""

import os
from pathlib import Path

import pytest

VARIABLE = "LIGHTNING_CURVATURE_GOLDEN"
DEFAULT = Path(__file__).resolve().parents[3] / "shared" / "golden"


def golden_files(family: str) -> list[Path]:
    """List the files of one family; an empty list means the folder is absent."""
    named = os.environ.get(VARIABLE)
    folder = (Path(named) if named else DEFAULT) / family
    files = sorted(folder.glob("*.npz"))
    if named and not files:
        raise pytest.UsageError(f"{VARIABLE}={named!r}: no .npz file in {folder}")
    return files


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test with a ``golden_file`` argument on every file of its module's family."""
    if "golden_file" not in metafunc.fixturenames:
        return
    family = metafunc.module.FAMILY
    files = golden_files(family)
    if files:
        metafunc.parametrize("golden_file", files, ids=[f.stem for f in files])
    else:
        reason = f"no recorded trajectories of '{family}'; name a folder with {VARIABLE}"
        metafunc.parametrize(
            "golden_file", [pytest.param(None, marks=pytest.mark.skip(reason=reason))]
        )
