"""Tests of lightning_curvature/pruning/optimizer_state.py."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, Optimizer

from lightning_curvature.pruning.optimizer_state import zero_pruned_state
from lightning_curvature.pruning.parameters import PrunableParameters
from tests.pruning.dense import flags, parameters_of


def trained(make: Callable[[Any], Optimizer]) -> tuple[nn.Module, PrunableParameters, Optimizer]:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    optimizer = make(model.parameters())
    model(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    return model, parameters_of(model), optimizer


@pytest.mark.parametrize(
    "make",
    [
        lambda params: SGD(params, lr=0.1, momentum=0.9),
        lambda params: Adam(params, amsgrad=True),
        lambda params: Adagrad(params, initial_accumulator_value=0.1),
    ],
)
def test_state_of_pruned_weights_is_zero(make: Callable[[Any], Optimizer]) -> None:
    _, parameters, optimizer = trained(make)
    before = {
        p: {key: x.clone() for key, x in state.items() if isinstance(x, Tensor)}
        for p, state in optimizer.state.items()
    }
    parameters.apply(parameters.weights(), ~flags(10, 0, 4, 7))
    zero_pruned_state(optimizer, parameters)
    shaped = 0
    masks = dict(zip(parameters.tensors(), parameters.masks().values(), strict=True))
    for p, state in before.items():
        for key, old in state.items():
            new = optimizer.state[p][key]
            if p in masks and old.shape == p.shape:
                shaped += 1
                assert bool((old[~masks[p]] != 0).all()), "else the test shows nothing"
                assert torch.equal(new, old.where(masks[p], 0))
            else:
                assert torch.equal(new, old)
    assert shaped >= 2


def test_momentum_would_move_them() -> None:
    """What the state is set to zero for: the next step leaves a pruned weight where it is."""
    model, parameters, optimizer = trained(lambda params: SGD(params, lr=0.1, momentum=0.9))
    parameters.apply(parameters.weights(), ~flags(10, 0, 4))
    zero_pruned_state(optimizer, parameters)
    optimizer.zero_grad()
    model(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    values = torch.cat([p.detach().flatten() for p in parameters.tensors()])
    assert values[[0, 4]].tolist() == [0, 0]


def test_nested_state_and_strangers() -> None:
    model, parameters, _ = trained(lambda params: SGD(params, lr=0.1))
    optimizer = SGD([model[0].weight], lr=0.1)
    weight = model[0].weight
    old = {"list": [torch.ones(2, 3)], "dict": {"x": (torch.ones(2, 3), torch.ones(3), "text")}}
    optimizer.state[weight].update(old)
    parameters.apply(parameters.weights(), ~flags(10, 0, 4, 7))
    zero_pruned_state(optimizer, parameters)
    expected = [0, 1, 1, 1, 0, 1]
    assert old["list"][0].flatten().tolist() == expected
    assert old["dict"]["x"][0].flatten().tolist() == expected
    assert old["dict"]["x"][1].tolist() == [1, 1, 1]
    assert list(optimizer.state) == [weight], "none is made for parameters it does not know"
