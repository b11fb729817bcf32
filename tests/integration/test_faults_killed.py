"""Fault drill: one of two ranks dies, fails or hangs in mid-step, and nobody waits for ever.

The processes end, so they are not those of the pool: see tests/helpers/doomed.py.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.families import LEADER, contract_of, every_family
from tests.helpers.optimizer_db import Contract

pytestmark = pytest.mark.ddp

SCRIPT = Path(__file__).parents[1] / "helpers" / "doomed.py"
# Of the process group, in seconds. A rank of Lightning's launcher joins after its imports.
TIMEOUT, TIMEOUT_WITH_IMPORTS = 3.0, 40.0
# What a rank may need besides to notice and to end.
MARGIN = 10.0
# Errors of torch's collectives.
LOST = ("RuntimeError", "DistBackendError", "DistNetworkError")
STATUS = {"kill": -signal.SIGKILL, "exit": 3, "raise": 1, "stall": 1, "interrupt": 1, "none": 1}
OWN_ERRORS = {"raise": "KeyError", "interrupt": "SystemExit", "none": "RuntimeError"}

EVERYONES = ["kill:directional:1", "kill:loss:0", "raise:loss:1", "none:main:1"]
NOTHING = "nothing:main:0"
STALL = "stall:directional:1"
MORE = [
    "kill:main:0",
    "kill:main:1",
    "kill:directional:0",
    "kill:between:0",
    "kill:between:1",
    "kill:loss:1",
    "exit:main:1",
    "exit:between:0",
    "exit:loss:1",
    "raise:main:0",
    "raise:directional:0",
    "raise:directional:1",
    "raise:loss:0",
    "interrupt:directional:0",
    "interrupt:loss:1",
    STALL,
    "stall:main:0",
    "stall:between:1",
    "stall:loss:0",
]


@dataclass
class Ended:
    """How a run of the script ended.

    Attributes:
        code: Its exit status.
        outcomes: What it wrote, by scenario.
        left: Processes of its session that were still there `MARGIN` seconds later.
        stderr: The end of what it said.
    """

    code: int
    outcomes: dict[str, dict[str, Any]] = field(default_factory=dict)
    left: list[int] = field(default_factory=list)
    stderr: str = ""


def alive(session: int) -> list[int]:
    """Return the processes of a session that are not zombies."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, own = entry.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # gone meanwhile
            continue
        if int(own) == session and state != "Z":
            found.append(int(entry.parent.name))
    return found


def run(folder: Path, timeout: float, *scenarios: str, patience: float = MARGIN) -> Ended:
    """Run the script in a session of its own, of which nothing is left afterwards."""
    root = str(SCRIPT.parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "PYTHONWARNINGS": "ignore"}
    errors = folder / "stderr"
    with errors.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), str(timeout), *scenarios],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stream,
            start_new_session=True,
        )
        try:
            process.wait(60 + 10 * timeout * len(scenarios))
            deadline = time.monotonic() + patience
            while (left := alive(process.pid)) and time.monotonic() < deadline:
                time.sleep(0.1)
        finally:
            for pid in alive(process.pid):
                os.kill(pid, signal.SIGKILL)
            process.wait()
    written = folder / "outcomes.jsonl"
    lines = written.read_text().splitlines() if written.exists() else []
    outcomes = {outcome["scenario"]: outcome for outcome in map(json.loads, lines)}
    return Ended(process.returncode, outcomes, left, errors.read_text()[-5000:])


Look = Callable[[str], dict[str, Any]]


def _ran(factory: pytest.TempPathFactory, scenarios: list[str]) -> Look:
    ended = run(factory.mktemp("doomed"), TIMEOUT, *scenarios)
    assert ended.left == []

    def look(scenario: str) -> dict[str, Any]:
        assert scenario in ended.outcomes, ended.stderr
        return ended.outcomes[scenario]

    return look


def _asked(request: pytest.FixtureRequest) -> list[str]:
    """List the scenarios of those tests of the session that use the fixture."""
    found = []
    for item in request.session.items:
        contract = contract_of(item)
        if contract is not None and request.fixturename in getattr(item, "fixturenames", ()):
            fate = item.callspec.params.get("fate", NOTHING)
            found.append(f"apart:{contract.info.name}:{fate}")
    return found


@pytest.fixture(scope="module")
def drill(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Look:
    """Run what every family goes through, in one process that forks."""
    more = [f"apart:{LEADER.info.name}:{STALL}", f"fork:{LEADER.info.name}:kill:loss:1"]
    return _ran(tmp_path_factory, [*_asked(request), *more])


@pytest.fixture(scope="module")
def long_drill(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Look:
    """Run the others."""
    return _ran(tmp_path_factory, _asked(request))


def assert_ended(outcome: dict[str, Any], fate: str) -> None:
    """Assert that both ranks ended in time, and with what."""
    how, _, rank = fate.split(":")
    doomed = outcome["ends"][int(rank)]
    other = outcome["ends"][1 - int(rank)]
    assert outcome["children"] == 0
    assert doomed["code"] == STATUS[how]
    if how in OWN_ERRORS:
        assert doomed["error"] == OWN_ERRORS[how]
    # The other one ends by itself, with an error, within the timeout of the group.
    assert other["code"] == 1
    assert other["error"] in LOST
    assert other["finite"]
    assert other["seconds"] < MARGIN + (TIMEOUT if how == "stall" else 0.0)
    if how == "stall":
        assert other["seconds"] > 0.9 * TIMEOUT
        assert "imed out" in other["message"]


@every_family
def test_without_a_fault(contract: Contract, drill: Look) -> None:
    """The script itself is sound."""
    outcome = drill(f"apart:{contract.info.name}:{NOTHING}")
    assert [end["code"] for end in outcome["ends"]] == [0, 0]


@every_family
@pytest.mark.parametrize("fate", EVERYONES)
@pytest.mark.feature("Faults", "A rank killed, failing or hanging in the middle of a step")
def test_one_rank_is_lost(contract: Contract, fate: str, drill: Look) -> None:
    """The other rank ends with an error, not a hang."""
    outcome = drill(f"apart:{contract.info.name}:{fate}")
    assert_ended(outcome, fate)
    if fate.startswith("none"):  # Lightning's own refusal
        assert "returning None in distributed training" in outcome["ends"][1]["message"]


def test_one_rank_hangs(drill: Look) -> None:
    """The other rank ends with a timeout, which does not depend on the optimizer."""
    assert_ended(drill(f"apart:{LEADER.info.name}:{STALL}"), STALL)


@pytest.mark.slow
@every_family
@pytest.mark.parametrize("fate", MORE)
def test_one_rank_is_lost_anywhere(contract: Contract, fate: str, long_drill: Look) -> None:
    """In the main pass, in the first extra pass, before its collective, in the second one."""
    assert_ended(long_drill(f"apart:{contract.info.name}:{fate}"), fate)


def test_launcher_that_forks(drill: Look) -> None:
    """Lightning's launcher ends with an error that says what happened."""
    scenario = f"fork:{LEADER.info.name}:kill:loss:1"
    outcome = drill(scenario)
    (end,) = outcome["ends"]
    assert outcome["children"] == 0
    assert end["error"] == "ProcessExitedException"
    assert "process 1 terminated with signal SIGKILL" in end["message"]
    assert outcome["seconds"] < MARGIN


def launched(folder: Path, fate: str) -> Ended:
    """Run a scenario under Lightning's usual launcher."""
    return run(folder, TIMEOUT_WITH_IMPORTS, f"popen:{LEADER.info.name}:{fate}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "fate", ["kill:directional:1", "exit:between:1", "raise:loss:1", "raise:directional:0"]
)
def test_launcher(fate: str, tmp_path: Path) -> None:
    """The script that the user started ends with an error status, and no rank is left."""
    ended = launched(tmp_path, fate)
    # Lightning kills the script when it sees the other rank end before the script itself did.
    assert ended.code in (1, -signal.SIGKILL)
    assert ended.left == []
    if ended.code == 1:
        (outcome,) = ended.outcomes.values()
        assert outcome["ends"][0]["error"] in (*LOST, "KeyError")
        assert outcome["seconds"] < MARGIN


@pytest.mark.slow
def test_killed_launcher(tmp_path: Path) -> None:
    """Rank 1 ends by itself when the script of rank 0 is gone."""
    ended = launched(tmp_path, "kill:loss:0")
    assert ended.code == -signal.SIGKILL
    assert ended.left == []
