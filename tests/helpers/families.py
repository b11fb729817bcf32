"""Which tests run with which optimizers: the core with all, wide tests with one of each family.

A family are the optimizers that ask their oracle the same, and can do with a part of the parameters
or not. A test with `every_optimizer` belongs to
the core. A test with `every_family` is wide: by default it runs with one representative per family,
with ``pytest --every-optimizer`` it runs with all, see `Contract.runs_wide`.

Variants of another optimizer (`Contract.variant_of`) represent no family, and by default run only
those tests of the core that are marked with `variants_too`: their rule, their state, a bad batch.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import pytest

from tests.helpers.optimizer_db import CONTRACTS, Contract, every_wide

Test = TypeVar("Test", bound=Callable[..., Any])

# Marks a test of the core that by default runs with variants, too.
variants_too = pytest.mark.variants

# Items that the rule leaves out, so that whoever counts them can tell them from those of ``-k``.
LEFT_OUT = pytest.StashKey[bool]()


def representatives(contracts: Sequence[Contract]) -> list[Contract]:
    """Choose one contract per family: the one that says so, otherwise the first; no variants."""
    chosen: dict[tuple[frozenset[str], bool], Contract] = {}
    for contract in contracts:
        if contract.variant_of:
            continue
        first = chosen.setdefault(contract.family, contract)
        if contract.represents and first is not contract:
            if first.represents:
                names = f"{first.info.name} and {contract.info.name}"
                raise ValueError(f"{names} both represent {sorted(contract.info.asks)}.")
            chosen[contract.family] = contract
    return list(chosen.values())


REPRESENTATIVES = representatives(CONTRACTS)
# It asks the most, so it meets the most of what can go wrong.
LEADER = max(REPRESENTATIVES, key=lambda contract: len(contract.info.asks))


def every_family(test: Test) -> Test:
    """Run a test with the representatives only, unless all that can are asked for."""
    return pytest.mark.wide(every_wide(test))


def left_out(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """List the items that a run without ``--every-optimizer`` leaves out.

    Wide tests run with `LEADER` in all cases. Of the cases of a test that show the same feature
    the other representatives run one, each another one if there are enough.
    """
    names = [contract.info.name for contract in REPRESENTATIVES if contract is not LEADER]
    found: list[pytest.Item] = []
    cases: dict[tuple[Any, ...], list[pytest.Item]] = {}
    for item in items:
        contract = contract_of(item)
        if contract is None or contract is LEADER:
            continue
        if item.get_closest_marker("wide") is None:
            if contract.variant_of and item.get_closest_marker("variants") is None:
                found.append(item)
            continue
        name = contract.info.name
        if name in names:
            features = [mark.args for mark in item.iter_markers("feature")]
            test = item.nodeid.partition("[")[0]
            cases.setdefault((name, test, *features), []).append(item)
        else:
            found.append(item)
    for (name, *_), same in cases.items():
        kept = names.index(name) % len(same)
        found += same[:kept] + same[kept + 1 :]
    return found


def contract_of(item: pytest.Item) -> Contract | None:
    """Return the contract that a test is called with, None if it is not."""
    callspec = getattr(item, "callspec", None)
    return None if callspec is None else callspec.params.get("contract")


class FamilyPlugin:
    """Leaves out of a session what `left_out` says.

    Args:
        every: Whether to leave out nothing.
    """

    def __init__(self, *, every: bool) -> None:
        self.every = every

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        """Leave out."""
        gone = [] if self.every else left_out(items)
        for item in gone:
            item.stash[LEFT_OUT] = True
        if gone:
            items[:] = [item for item in items if not item.stash.get(LEFT_OUT, False)]
            config.hook.pytest_deselected(items=gone)
