"""Tests of lightning_curvature/registry.py."""

import dataclasses
import re

import pytest
import torch

import lightning_curvature
from lightning_curvature import (
    AdamQLR,
    CurvatureOptimizer,
    OptimizerInfo,
    get_optimizer_info,
    list_optimizers,
)
from lightning_curvature.oracle import WindowOracle

# A direction in full, while the slope along it is computed.
WITHIN_A_STEP = {"forwardgradient": 1}


def concrete(cls: type) -> set[type]:
    """Return the classes of the package that derive from a class and can be used."""
    below = [s for s in cls.__subclasses__() if s.__module__.startswith("lightning_curvature.")]
    own = {cls} if not below or cls.__name__ in lightning_curvature.__all__ else set()
    return own.union(*map(concrete, below)) - {CurvatureOptimizer}


def test_every_optimizer_has_one_row() -> None:
    rows = list_optimizers()
    assert {row.cls for row in rows} == concrete(CurvatureOptimizer)
    assert len({row.name for row in rows}) == len(rows)
    assert [row.name for row in rows] == sorted(row.name for row in rows)


@pytest.mark.parametrize("row", list_optimizers(), ids=lambda row: row.name)
def test_row(row: OptimizerInfo) -> None:
    assert row.name == row.cls.__name__.lower()
    assert row.asks == row.cls.asks
    layer = torch.nn.Linear(2, 2)
    assert row.asks <= WindowOracle(list(layer.parameters()), layer).capabilities
    assert getattr(lightning_curvature, row.cls.__name__) is row.cls
    assert row.cls.__name__ in lightning_curvature.__all__
    assert re.fullmatch(r"\d{4}\.\d{5}", row.paper)
    assert row.passes
    assert row.summary.endswith(".")
    with pytest.raises(dataclasses.FrozenInstanceError):
        row.copies = 99  # type: ignore[misc]


@pytest.mark.parametrize("row", list_optimizers(), ids=lambda row: row.name)
def test_copies_of_the_parameters(row: OptimizerInfo) -> None:
    """The number in the table is what the state of a real step holds."""
    model = torch.nn.Linear(7, 3)
    optimizer = row.cls(model.parameters())
    criterion = optimizer.attach_model(model, torch.nn.MSELoss())
    criterion(model(torch.randn(4, 7)), torch.randn(4, 3)).backward()
    optimizer.step()
    tensors = [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.dim() > 0
    ]
    if row.name == "mfac":
        tensors.append(optimizer.state_dict()["curvature"]["window"]["rows"])
    size = sum(p.numel() for p in model.parameters())
    found = sum(t.numel() for t in tensors) + WITHIN_A_STEP.get(row.name, 0) * size
    if row.name == "hizool":  # a row and a column per matrix: less than a copy
        assert found == 7 + 3 + 3
        assert row.copies == 0
        return
    assert found == row.copies * size


@pytest.mark.parametrize("name", ["adamqlr", "AdamQLR", "ADAMQLR"])
def test_lookup_in_any_case(name: str) -> None:
    assert get_optimizer_info(name).cls is AdamQLR


def test_unknown_name() -> None:
    known = ", ".join(row.name for row in list_optimizers())
    with pytest.raises(KeyError, match=f"Unknown optimizer 'adam': known are {known}"):
        get_optimizer_info("adam")
