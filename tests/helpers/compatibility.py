"""The compatibility table: tests marked ``feature`` show what works, docs/compatibility.md says so.

A row of the table is a feature, a column an optimizer, and a cell what the tests of that feature
showed for that optimizer. ``pytest tests --write-compatibility`` writes the page.
"""

from collections.abc import Callable, Generator, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.families import LEFT_OUT, contract_of
from tests.helpers.optimizer_db import CONTRACTS

WRITE = "--write-compatibility"
GROUPS = (
    "Distributed",
    "Accumulation and clipping",
    "Precision",
    "Resume",
    "Trainer features",
    "Callbacks",
    "Models",
    "Faults",
    "Other strategies",
)
WORKS, UNCHECKED, FAILED = "works", "unchecked", "fails"
SEPARATOR = "; "
# The comparison of the page with the session.
TEST, COMPARISON = "test_compatibility.py", "test_the_page_is_what_the_tests_show"
# Under which name a worker of pytest-xdist hands over what it found.
FINDINGS = "compatibility"

HEADER = """\
# Compatibility

What each optimizer does with each feature of Lightning and torch, as the test suite shows it.
`pytest tests --write-compatibility` generates this page; a test compares it with every run. By
default some tests run with one optimizer per family only; `pytest --every-optimizer` runs them all.

- **works**: a test uses the feature, and training goes on as it must.
- **refused**: the optimizer stops before it can do harm; the message is given.
- **unchecked**: there is a test, but not on the machine that generated this page.

{without} run no backward either, and share with HiZOO all but their rule: its column stands for
theirs.
"""
# Optimizers that have a column, and those that another one stands for.
COLUMNS = [contract.info.cls.__name__ for contract in CONTRACTS if contract.runs_wide]
WITHOUT = [contract.info.cls.__name__ for contract in CONTRACTS if not contract.runs_wide]

# (group, title, optimizer), and (group, title) -> optimizer -> outcome.
Key = tuple[str, str, str]
Rows = dict[tuple[str, str], dict[str, str]]


class Outcomes:
    """Outcomes of the tests of one session, by feature and optimizer."""

    def __init__(self) -> None:
        self._seen: dict[Key, list[str]] = {}

    def add(self, key: Key, *outcomes: str) -> None:
        """Note what one test showed, or several."""
        self._seen.setdefault(key, []).extend(outcomes)

    def items(self) -> list[tuple[Key, list[str]]]:
        """List what was noted."""
        return list(self._seen.items())

    def cells(self) -> dict[Key, str]:
        """Return one outcome per feature and optimizer."""
        return {key: combined(outcomes) for key, outcomes in self._seen.items()}


def combined(outcomes: Iterable[str]) -> str:
    """Join what several tests of a feature showed: one failure spoils it, a skip does not."""
    different = sorted(set(outcomes) - {UNCHECKED})
    if FAILED in different:
        return FAILED
    if WORKS in different:  # first what works, then what is refused
        different = [WORKS, *(outcome for outcome in different if outcome != WORKS)]
    return SEPARATOR.join(different) or UNCHECKED


def rows_of(cells: Mapping[Key, str]) -> Rows:
    """Arrange outcomes in rows."""
    rows: Rows = {}
    for (group, title, optimizer), outcome in cells.items():
        rows.setdefault((group, title), {})[optimizer] = outcome
    return rows


def render(rows: Rows) -> str:
    """Write the page."""
    text = [HEADER.format(without=", ".join(WITHOUT[:-1]) + f" and {WITHOUT[-1]}")]
    for group in GROUPS:
        titles = sorted((title for g, title in rows if g == group), key=str.lower)
        if not titles:
            continue
        text += [f"## {group}\n", _line("Feature", *COLUMNS)]
        text.append(_line(*["---"] * (1 + len(COLUMNS))))
        for title in titles:
            row = rows[group, title]
            text.append(_line(title, *(row.get(optimizer, UNCHECKED) for optimizer in COLUMNS)))
        text.append("")
    return "\n".join(text).rstrip() + "\n"


def parse(text: str) -> Rows:
    """Read what `render` wrote."""
    rows: Rows = {}
    group, optimizers = "", [""]
    for line in text.splitlines():
        if line.startswith("## "):
            group = line.removeprefix("## ")
        elif line.startswith("| ---"):
            continue
        elif line.startswith("| "):
            first, *cells = _cells(line)
            if first == "Feature":
                optimizers = cells
            else:
                rows[group, first] = dict(zip(optimizers, cells, strict=True))
    return rows


def _line(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _cells(line: str) -> list[str]:
    inside = line.strip().removeprefix("| ").removesuffix(" |")
    return [cell.replace("\\|", "|") for cell in inside.split(" | ")]


def differences(
    page: Rows, found: Mapping[Key, str], *, whole: bool, thinned: bool = False
) -> list[str]:
    """List where a page is not what a session showed.

    Args:
        page: Rows of the page.
        found: Outcomes of the session. What it could not check contradicts nothing.
        whole: Whether every row had a test: rows of the page that no test shows are then out of
            date.
        thinned: Whether variants of tests were left out: they may show more than was found.
    """
    lines = []
    for (group, title, optimizer), outcome in sorted(found.items()):
        if outcome == FAILED:  # that test says so itself
            continue
        written = page.get((group, title), {}).get(optimizer, "no row")
        same = outcome == written or (thinned and set(_parts(outcome)) <= set(_parts(written)))
        if not same and (outcome != UNCHECKED or written == "no row"):
            lines.append(f"{group} / {title} / {optimizer}: page {written!r}, tests {outcome!r}")
    if whole:
        gone = page.keys() - {key[:2] for key in found}
        lines += [f"{group} / {title}: on the page, but no test" for group, title in sorted(gone)]
    return lines


def _parts(outcome: str) -> list[str]:
    return outcome.split(SEPARATOR)


class CompatibilityPlugin:
    """Collects the outcomes of a pytest session, and writes the page if asked to.

    With pytest-xdist the workers collect them, each those of its own tests. They leave out the
    comparison with the page; the controller, which hears of all, makes it in the end.

    Args:
        config: The session's.
        page: Path of the page.
        tests: Folder of the tests.

    Attributes:
        thinned: Whether wide tests were left out, see tests/helpers/families.py.
    """

    def __init__(self, config: pytest.Config, page: Path, tests: Path) -> None:
        self.page = page
        self.tests = tests
        self.outcomes = Outcomes()
        self._config = config
        self._keys: dict[str, list[Key]] = {}
        self._showing: set[str] = set()
        self._reported: set[str] = set()
        self._complete = not any("::" in arg for arg in config.args)
        # Of the comparison that the workers leave out: its node id and location.
        self._comparison: tuple[str, Any] | None = None
        self.thinned = False

    @property
    def is_whole(self) -> bool:
        """Whether every test marked ``feature`` was collected and has run, wide ones thinned."""
        return self._complete and bool(self._showing) and self._showing <= self._reported

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Let the comparison run last, or leave it out."""
        items.sort(key=lambda item: item.path.name == TEST)
        if hasattr(self._config, "workerinput") and not self._config.getoption(WRITE, False):
            for item in items:
                if item.path.name == TEST and item.name == COMPARISON:
                    self._comparison = item.nodeid, item.location
                    items.remove(item)
                    return

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        """Note that not everything runs."""
        thinned = [item.stash.get(LEFT_OUT, False) for item in items]
        self.thinned |= any(thinned)
        self._complete &= all(thinned)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Learn which test shows what."""
        self._keys = {item.nodeid: keys for item in session.items if (keys := _keys_of(item))}
        self._showing = set(self._keys)
        collected = {item.path for item in session.items}
        if not set(self.tests.rglob("test_*.py")) <= collected:
            self._complete = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note an outcome."""
        keys = self._keys.get(report.nodeid)
        if keys is None or (report.when != "call" and report.passed):
            return
        self._reported.add(report.nodeid)
        refusals = [value for name, value in report.user_properties if name == "refused"]
        if report.passed:
            outcomes = [f"refused: {message}" for message in refusals] or [WORKS]
        else:
            outcomes = [FAILED if report.failed else UNCHECKED]
        for key in keys:
            self.outcomes.add(key, *outcomes)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Hand over what a worker found."""
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput[FINDINGS] = {
                "outcomes": self.outcomes.items(),
                "showing": sorted(self._showing),
                "reported": sorted(self._reported),
                "complete": self._complete,
                "thinned": self.thinned,
                "comparison": self._comparison,
            }

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        """Take over what a worker found; one that crashed says nothing."""
        found = getattr(node, "workeroutput", {}).get(FINDINGS)
        if error is not None or found is None:
            self._complete = False
            return
        for key, outcomes in found["outcomes"]:
            self.outcomes.add(key, *outcomes)
        self._showing.update(found["showing"])
        self._reported.update(found["reported"])
        self._complete &= found["complete"]
        self.thinned |= found["thinned"]
        self._comparison = found["comparison"]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self) -> Generator[None, object, object]:
        """Make the comparison that the workers have left out."""
        result = yield
        if self._comparison is not None and not hasattr(self._config, "workerinput"):
            nodeid, location = self._comparison
            text = self.disagreement()
            report = pytest.TestReport(
                nodeid, location, {}, "failed" if text else "passed", text or None, "call"
            )
            self._config.hook.pytest_runtest_logreport(report=report)
        return result

    def disagreement(self) -> str:
        """Say where the page is not what the session showed; nothing if it is."""
        page = parse(self.page.read_text(encoding="utf-8"))
        found = self.outcomes.cells()
        lines = differences(page, found, whole=self.is_whole, thinned=self.thinned)
        return "\n".join([f"Run `pytest tests {WRITE}`.", *lines]) if lines else ""

    def write(self) -> str:
        """Write the page and return what was done; outcomes of a part go into the page there is."""
        cells = self.outcomes.cells()
        failed = sorted("/".join(key) for key, outcome in cells.items() if outcome == FAILED)
        if failed:
            return f"{self.page.name} not written, because of failures: {', '.join(failed)}"
        rows = rows_of(cells)
        whole = self.is_whole and not self.thinned
        if not whole and self.page.exists():
            before = parse(self.page.read_text(encoding="utf-8"))
            rows = {key: before.get(key, {}) | rows.get(key, {}) for key in before | rows}
        self.page.write_text(render(rows), encoding="utf-8")
        return f"{self.page.name} written: {len(rows)} features" + (
            "" if whole else " (some of them as they were: not all tests ran)"
        )


def _keys_of(item: pytest.Item) -> list[Key]:
    marks = list(item.iter_markers("feature"))
    if not marks:
        return []
    contract = contract_of(item)
    if contract is None:
        raise pytest.UsageError(
            f"{item.nodeid}: a feature is shown with @every_optimizer or @every_family."
        )
    for mark in marks:
        if len(mark.args) != 2 or mark.args[0] not in GROUPS:
            raise pytest.UsageError(
                f"{item.nodeid}: invalid feature{mark.args}: must be a group, one of {GROUPS}, "
                "and a title."
            )
    if not contract.runs_wide:
        return []
    return [(*mark.args, contract.info.cls.__name__) for mark in marks]


def make_refused(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Return the function that turns the outcome of a test into "refused"."""

    def refused(message: str) -> None:
        request.node.user_properties.append(("refused", " ".join(message.split())))

    return refused
