"""Programs in the copies of a process that has done the imports (helpers/warm_python.py)."""

import os
from pathlib import Path

import pytest

from tests.helpers.warm_python import WarmPython

PROGRAM = """
import os, sys, warnings
print(sys.argv[1:], os.environ.get("MINE"), os.getcwd(), __name__, sys.stdin.read())
print("lightning.pytorch" in sys.modules, [name for name in sys.modules if "curvature" in name])
print("complaint", file=sys.stderr)
import beside
warnings.warn("loud", RuntimeWarning)
sys.exit(3)
"""


@pytest.mark.parametrize("as_module", [False, True])
def test_a_program(as_module: bool, warm_python: WarmPython, tmp_path: Path) -> None:
    """Its own arguments, environment, directory and streams, and nothing of this package."""
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "beside.py").write_text("print('beside')")
    args = ["-m", "program"] if as_module else [tmp_path / "program.py"]
    done = warm_python.run([*args, "x"], cwd=tmp_path, env={**os.environ, "MINE": "1"}, timeout=120)
    assert done.returncode == 3
    where = os.path.realpath(tmp_path)
    assert done.stdout == f"['x'] 1 {where} __main__ \nTrue []\nbeside\n"
    assert done.stderr.startswith("complaint\n")
    assert "RuntimeWarning: loud" in done.stderr


def test_an_error(warm_python: WarmPython, tmp_path: Path) -> None:
    """Warnings can be errors, and an error ends a program with status 1."""
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "beside.py").write_text("")
    args = ["-W", "error::RuntimeWarning", "program.py"]
    done = warm_python.run(args, cwd=tmp_path, env=dict(os.environ), timeout=120)
    assert done.returncode == 1
    assert "RuntimeWarning: loud" in done.stderr.splitlines()[-1]
