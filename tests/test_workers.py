"""The tests in several processes: when, and what the comparison of the page sees then.

Files under test: conftest.py, tests/helpers/compatibility.py.
"""

import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.helpers.compatibility import WORKS, render
from tests.helpers.optimizer_db import CONTRACTS

THIS = "tests/test_workers.py"


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([THIS], 0),
        ([f"{THIS}::test_workers", f"{THIS}::test[a/b::c]"], 0),
        ([THIS, "tests/optim"], 3),
        (["tests"], 3),
        (["no/such/file.py"], 3),
    ],
)
def test_named_files_run_in_this_process(
    args: list[str],
    expected: int,
    pytestconfig: pytest.Config,
    repo_root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not pytestconfig.pluginmanager.has_plugin("xdist"):
        pytest.skip("without pytest-xdist")
    monkeypatch.setenv("PYTEST_XDIST_AUTO_NUM_WORKERS", "3")
    config = SimpleNamespace(args=args, invocation_params=SimpleNamespace(dir=repo_root))
    assert pytestconfig.hook.pytest_xdist_auto_num_workers(config=config) == expected


CONFTEST = """
from pathlib import Path
import pytest
from tests.helpers.compatibility import CompatibilityPlugin, make_refused

HERE = Path(__file__).parent


def pytest_configure(config):
    plugin = CompatibilityPlugin(config, HERE / "page.md", HERE)
    config.pluginmanager.register(plugin, "compatibility")


@pytest.fixture
def refused(request): return make_refused(request)
"""
PROGRAM = """
import pytest
from tests.helpers.optimizer_db import CONTRACTS


@pytest.mark.parametrize("contract", CONTRACTS[:1])
@pytest.mark.feature("Models", "{title}")
def test_feature(contract, refused): {body}
"""
COMPARISON = """
def test_reading(): pass


def test_the_page_is_what_the_tests_show(): assert 0, "the controller makes the comparison"
"""


@pytest.mark.slow
def test_the_comparison_hears_of_all_workers(
    tmp_path: Path, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    pytest.importorskip("xdist")
    name = CONTRACTS[0].info.cls.__name__
    page = {"right": WORKS, "wrong": WORKS, "alike": "refused: no", "gone": WORKS}
    rows = {("Models", title): {name: outcome} for title, outcome in page.items()}
    (tmp_path / "page.md").write_text(render(rows))
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = feature\n")
    (tmp_path / "test_compatibility.py").write_text(COMPARISON)
    bodies = {"right": "pass", "wrong": "refused('no')", "alike": "refused('no')"}
    for title, body in bodies.items():
        program = PROGRAM.format(title=title, body=body)
        (tmp_path / f"test_{title}.py").write_text(program)
    options = ["--import-mode=importlib", "-n2", "--dist=loadfile", "-c", tmp_path / "pytest.ini"]
    done = run_python(["-m", "pytest", *options, tmp_path])
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 4 passed" in done.stdout
    assert "FAILED test_compatibility.py::test_the_page_is_what_the_tests_show" in done.stdout
    different = [line for line in done.stdout.splitlines() if line.startswith("Models / ")]
    # Where CI is set the summary repeats them.
    assert list(dict.fromkeys(different)) == [
        f"Models / wrong / {name}: page 'works', tests 'refused: no'",
        "Models / gone: on the page, but no test",  # known only to whom has heard of all
    ]
