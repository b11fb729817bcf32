"""docs/compatibility.md is what the tests show (tests/helpers/compatibility.py); runs last."""

import sys
from pathlib import Path

import pytest

from tests.helpers.compatibility import (
    COLUMNS,
    FAILED,
    UNCHECKED,
    WORKS,
    WRITE,
    CompatibilityPlugin,
    combined,
    differences,
    parse,
    render,
)

PAIR = ("AdamQLR", "SGDQLR")
ROWS = {
    ("Precision", "bf16-mixed"): {"AdamQLR": WORKS, "SGDQLR": "refused: no | such thing"},
    ("Models", "tied weights"): {"AdamQLR": UNCHECKED, "SGDQLR": WORKS},
}


def test_a_page_can_be_read_back() -> None:
    columns = dict.fromkeys(COLUMNS, UNCHECKED)
    assert parse(render(ROWS)) == {key: {**columns, **row} for key, row in ROWS.items()}


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        ([WORKS, WORKS], WORKS),
        ([WORKS, UNCHECKED], WORKS),
        ([UNCHECKED], UNCHECKED),
        ([WORKS, FAILED, "refused: a"], FAILED),
        (["refused: b", WORKS, "refused: a"], "works; refused: a; refused: b"),
    ],
)
def test_several_tests_of_a_feature(outcomes: list[str], expected: str) -> None:
    assert combined(outcomes) == expected


@pytest.mark.parametrize(
    ("key", "outcome", "number"),
    [
        (("Models", "tied weights", "SGDQLR"), WORKS, 0),
        (("Models", "tied weights", "SGDQLR"), UNCHECKED, 0),
        (("Models", "tied weights", "SGDQLR"), FAILED, 0),
        (("Models", "tied weights", "SGDQLR"), "refused: a", 1),
        (("Models", "tied weights", "AdamQLR"), WORKS, 1),
        (("Models", "something new", "AdamQLR"), WORKS, 1),
        (("Models", "something new", "AdamQLR"), UNCHECKED, 1),
    ],
)
def test_a_part_of_the_tests_is_compared_with_its_rows(
    key: tuple[str, str, str], outcome: str, number: int
) -> None:
    assert len(differences(ROWS, {key: outcome}, whole=False)) == number


def test_variants_that_were_left_out_may_show_more() -> None:
    page = {("Models", "tied weights"): {"SGDQLR": "works; refused: a", "AdamQLR": WORKS}}
    key = ("Models", "tied weights", "SGDQLR")
    for outcome, number in (("refused: a", 0), (WORKS, 0), ("refused: b", 1)):
        assert len(differences(page, {key: outcome}, whole=True, thinned=True)) == number
        assert len(differences(page, {key: outcome}, whole=True)) == 1


def test_all_tests_are_compared_with_all_rows() -> None:
    found = {("Models", "tied weights", "SGDQLR"): WORKS}
    assert differences(ROWS, found, whole=False) == []
    (line,) = differences(ROWS, found, whole=True)
    assert line == "Precision / bf16-mixed: on the page, but no test"


PROGRAM = """
import pytest
from tests.helpers.optimizer_db import every_optimizer


@every_optimizer
@pytest.mark.feature("Models", "first")
def test_first(contract): pass


@every_optimizer
@pytest.mark.feature("Models", "second")
def test_second(contract, refused): refused("not\\n  so")


@every_optimizer
@pytest.mark.feature("Models", "third")
def test_third(contract): pytest.skip("cannot")


@every_optimizer
@pytest.mark.feature("Faults", "fourth")
@pytest.mark.parametrize("bad", [False, True])
def test_fourth(contract, bad): assert not bad
"""
CONFTEST = """
import pytest
from tests.helpers.compatibility import make_refused


@pytest.fixture
def refused(request): return make_refused(request)
"""


class Session:
    """A session of its own in ``tmp_path``, with the same plugin."""

    def __init__(self, folder: Path, program: str = PROGRAM) -> None:
        self.folder = folder
        self.page = folder / "page.md"
        (folder / "test_program.py").write_text(program)
        (folder / "conftest.py").write_text(CONFTEST)
        (folder / "pytest.ini").write_text("[pytest]\nmarkers = feature\n")

    def pytest_configure(self, config: pytest.Config) -> None:
        self.plugin = CompatibilityPlugin(config, self.page, self.folder)
        config.pluginmanager.register(self.plugin)

    def run(self, *args: str) -> CompatibilityPlugin:
        quiet = ["-qq", "--import-mode=importlib", "-pno:cacheprovider", "-pno:faulthandler"]
        place = [str(self.folder), "-c", str(self.folder / "pytest.ini")]
        sys.modules.pop("test_program", None)  # another session's
        pytest.main([*quiet, *place, *args], plugins=[self])
        return self.plugin


def test_outcomes_of_a_session(tmp_path: Path) -> None:
    plugin = Session(tmp_path).run()
    expected = {
        ("Models", "first"): WORKS,
        ("Models", "second"): "refused: not so",
        ("Models", "third"): UNCHECKED,
        ("Faults", "fourth"): FAILED,
    }
    cells = plugin.outcomes.cells()
    assert {key[:2]: outcome for key, outcome in cells.items()} == expected
    assert {key[2] for key in cells} >= set(PAIR)
    assert plugin.is_whole
    assert "because of failures: Faults/fourth" in plugin.write()
    assert not plugin.page.exists()


def test_a_part_keeps_the_rest_of_the_page(tmp_path: Path) -> None:
    session = Session(tmp_path)
    session.page.write_text(render({("Models", "old"): dict.fromkeys(PAIR, WORKS)}))
    plugin = session.run("-k", "first or second")
    assert not plugin.is_whole
    assert "not all tests ran" in plugin.write()
    titles = [title for _, title in parse(session.page.read_text())]
    assert titles == ["first", "old", "second"]


@pytest.mark.parametrize("selection", ["-kfirst", "--deselect=test_program.py::test_first"])
def test_a_selection_is_not_the_whole(selection: str, tmp_path: Path) -> None:
    assert not Session(tmp_path).run(selection).is_whole


def test_a_file_left_out_is_not_the_whole(tmp_path: Path) -> None:
    (tmp_path / "test_other.py").write_text("def test_other(): pass")
    session = Session(tmp_path)
    assert session.run().is_whole
    assert not session.run("--ignore-glob=*other.py").is_whole


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (PROGRAM.replace('"Models", "first"', '"Model", "first"'), "must be a group"),
        (PROGRAM.replace("@every_optimizer\n", "", 1), "@every_optimizer"),
    ],
)
def test_wrong_use_of_the_marker(
    program: str, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Session(tmp_path, program).run()
    captured = capfd.readouterr()
    assert message in captured.out + captured.err


def test_the_page_is_what_the_tests_show(pytestconfig: pytest.Config) -> None:
    if pytestconfig.getoption(WRITE):
        pytest.skip("the page is about to be written")
    plugin = pytestconfig.pluginmanager.get_plugin("compatibility")
    assert isinstance(plugin, CompatibilityPlugin)
    text = plugin.disagreement()
    assert not text, text
