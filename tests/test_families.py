"""Every optimizer is in the core suite, and every family in the wide one (helpers/families.py)."""

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_curvature import list_optimizers
from tests.helpers.families import (
    LEADER,
    REPRESENTATIVES,
    FamilyPlugin,
    contract_of,
    representatives,
)
from tests.helpers.optimizer_db import CONTRACTS, SPECIAL, Contract

# What every optimizer must show by default, and the test of it.
CORE = {
    "plain PyTorch": ("tests.optim.test_contract", "test_loss_falls_on_a_network"),
    "state": ("tests.optim.test_contract_state", "test_resume_is_bitwise"),
    "foreign states": (
        "tests.optim.test_contract_state",
        "test_foreign_and_truncated_states_are_refused",
    ),
    "leaks": ("tests.optim.test_contract_device", "test_no_leak"),
    "waiting for the device": (
        "tests.optim.test_contract_device",
        "test_a_step_does_not_wait_for_the_device",
    ),
    "other devices": ("tests.optim.test_load_device", "test_load_on_the_meta_device_and_step"),
    "a Trainer": ("tests.optim.test_contract_trainer", "test_trains_a_stock_module"),
    "resume in a Trainer": ("tests.integration.test_resume", "test_resume"),
    "accumulation": (
        "tests.integration.test_features_gradients",
        "test_accumulated_batches_are_one_large_batch",
    ),
    "two ranks": ("tests.integration.test_ddp", "test_every_route"),
    "accumulation on two ranks": (
        "tests.integration.test_ddp_windows",
        "test_one_batch_equals_four_micro_batches",
    ),
    "no trace": ("tests.integration.test_ddp_trainer", "test_no_trace"),
    "NaN": ("tests.integration.test_faults_ranks", "test_one_bad_batch"),
}

# What variants of another optimizer must show by default.
VARIANTS = {
    "their rule": ("tests.optim.test_contract", "test_loss_falls_on_a_network"),
    "plain state": ("tests.optim.test_contract_state", "test_state_dict_has_torchs_layout"),
    "resume": ("tests.optim.test_contract_state", "test_resume_is_bitwise"),
    "NaN": (
        "tests.optim.test_contract_forward_steps",
        "test_a_loss_that_is_not_finite_skips_the_step",
    ),
}

PROGRAM = """
import pytest
from tests.helpers.families import every_family, variants_too
from tests.helpers.optimizer_db import every_optimizer


@every_optimizer
@pytest.mark.parametrize("x", range(3))
def test_core(contract, x): pass


@variants_too
@every_optimizer
@pytest.mark.parametrize("x", range(2))
def test_chosen(contract, x): pass


@every_family
@pytest.mark.parametrize("x", range(30))
def test_variants(contract, x): pass


@every_family
@pytest.mark.parametrize("x", [pytest.param(i, marks=pytest.mark.feature("a", i)) for i in (0, 1)])
def test_features(contract, x): pass


def test_other(): pass
"""


# Of the core and of the wide tests, and the one without an optimizer.
ALL_ITEMS = len(CONTRACTS) * 5 + sum(contract.runs_wide for contract in CONTRACTS) * 32 + 1


class Session:
    """A session of its own, of which only the collection counts."""

    def __init__(self, folder: Path, *, every: bool) -> None:
        self.every = every
        self.found: list[tuple[str, Any, Any]] = []
        self.deselected = 0
        (folder / "test_some.py").write_text(PROGRAM)
        (folder / "pytest.ini").write_text("[pytest]\nmarkers = feature\n wide\n variants\n")
        sys.modules.pop("test_some", None)  # another session's
        options = ["-qq", "--import-mode=importlib", "-pno:cacheprovider", "-pno:faulthandler"]
        options += ["--collect-only", str(folder), "-c", str(folder / "pytest.ini")]
        assert pytest.main(options, plugins=[self, FamilyPlugin(every=every)]) == 0

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        self.deselected += len(items)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            contract = contract_of(item)
            name = None if contract is None else contract.info.name
            value = None if contract is None else item.callspec.params["x"]
            self.found.append((item.name.partition("[")[0], name, value))

    def values(self, test: str, name: str) -> list[Any]:
        return [value for t, n, value in self.found if (t, n) == (test, name)]


def test_every_optimizer_has_a_contract() -> None:
    names = [info.name for info in list_optimizers()]
    assert [contract.info.name for contract in CONTRACTS] == names
    assert SPECIAL.keys() <= set(names), "entries of optimizers that are not registered"


@pytest.mark.parametrize(("module", "name"), CORE.values(), ids=CORE)
def test_the_core_runs_with_every_optimizer(module: str, name: str) -> None:
    test = getattr(importlib.import_module(module), name)
    assert "wide" not in [mark.name for mark in test.pytestmark]
    contracts = [mark.args[1] for mark in test.pytestmark if mark.args[:1] == ("contract",)]
    assert contracts == [CONTRACTS]


@pytest.mark.parametrize(("module", "name"), VARIANTS.values(), ids=VARIANTS)
def test_variants_run_a_part_of_the_core(module: str, name: str) -> None:
    test = getattr(importlib.import_module(module), name)
    names = [mark.name for mark in test.pytestmark]
    assert "variants" in names
    assert "wide" not in names
    (contracts,) = [mark.args[1] for mark in test.pytestmark if mark.args[:1] == ("contract",)]
    assert [c for c in CONTRACTS if c.variant_of] == [c for c in contracts if c.variant_of]


def test_variants_are_of_others_that_run_the_core() -> None:
    by_name = {contract.info.name: contract for contract in CONTRACTS}
    variants = [contract for contract in CONTRACTS if contract.variant_of]
    assert {c.info.name for c in variants} == {
        *("forwardgradient", "hizool", "zoconservative", "zomomentum", "zosignsgd")
    }
    for contract in variants:
        base = by_name[contract.variant_of]
        assert base.variant_of == ""
        assert base.info.asks <= contract.info.asks
        assert contract not in REPRESENTATIVES


def test_every_family_is_represented() -> None:
    families = [contract.family for contract in REPRESENTATIVES]
    assert len(set(families)) == len(families)
    assert set(families) == {c.family for c in CONTRACTS if not c.variant_of}
    assert LEADER in REPRESENTATIVES


def test_the_first_represents_unless_another_one_says_so() -> None:
    one, *_ = (c for c in CONTRACTS if c.info.asks)
    first, second = (Contract(replace(one.info, name=name)) for name in ("first", "second"))
    assert representatives([first, second]) == [first]
    says_so = replace(second, represents=True)
    assert representatives([first, says_so]) == [says_so]
    with pytest.raises(ValueError, match="first and second both represent"):
        representatives([replace(first, represents=True), says_so])
    assert representatives([replace(first, variant_of="second"), second]) == [second]


def test_what_runs_by_default(tmp_path: Path) -> None:
    session = Session(tmp_path, every=False)
    chosen = [contract.info.name for contract in REPRESENTATIVES]
    for contract in CONTRACTS:
        name = contract.info.name
        assert session.values("test_core", name) == ([] if contract.variant_of else [0, 1, 2])
        assert session.values("test_chosen", name) == [0, 1]
        if contract is LEADER:
            assert len(session.values("test_variants", name)) == 30
        else:
            assert len(session.values("test_variants", name)) == (name in chosen)
        shown = [0, 1] if name in chosen else []
        assert session.values("test_features", name) == shown
    others = [n for n in chosen if n != LEADER.info.name]
    variants = [session.values("test_variants", name)[0] for name in others]
    assert len(set(variants)) == len(variants), "each has another variant"
    assert ("test_other", None, None) in session.found
    assert len(session.found) + session.deselected == ALL_ITEMS


def test_what_runs_with_the_option(tmp_path: Path) -> None:
    session = Session(tmp_path, every=True)
    assert len(session.found) == ALL_ITEMS
    assert session.deselected == 0
