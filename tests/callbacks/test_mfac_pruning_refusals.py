"""Tests of callbacks/pruning_choice.py and of the arguments of callbacks/mfac_pruning.py."""

import sys
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
)
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState

from lightning_curvature import MeZO, SensitiveParameterMask, TrajectoryLog
from lightning_curvature.callbacks import MFACPruning
from lightning_curvature.callbacks.pruning_choice import refuse_trainer
from lightning_curvature.pruning import CubicSparsity, ListSparsity
from tests.helpers.modules import StockModule, mlp_module
from tests.helpers.pruning import build, fit, pruning, zeros_of


def build_network(network: nn.Module) -> Any:
    return build(lambda make: StockModule(network, make))


# Arguments


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "Invalid sparsity=None and schedule=None: give one of them."),
        (
            {"sparsity": 0.5, "schedule": ListSparsity({0: 0.5})},
            ValueError,
            "Invalid sparsity=0.5 and schedule=ListSparsity({0: 0.5}): give one of them.",
        ),
        ({"sparsity": 0.0}, ValueError, "Invalid sparsity=0.0: must be in (0, 1)."),
        ({"sparsity": 1.0}, ValueError, "Invalid sparsity=1.0: must be in (0, 1)."),
        ({"sparsity": "half"}, TypeError, "Invalid sparsity='half': must be a number"),
        ({"schedule": 0.5}, TypeError, "Invalid schedule=0.5: must have a method sparsity(epoch)"),
        ({"prune_epoch": -1}, ValueError, "Invalid prune_epoch=-1: must be an integer >= 0."),
        ({"num_grads": 0}, ValueError, "Invalid num_grads=0"),
        ({"damping": 0.0}, ValueError, "Invalid damping=0.0: must be > 0."),
        ({"block_size": 0}, ValueError, "Invalid block_size=0"),
        ({"num_recomputations": 0}, ValueError, "Invalid num_recomputations=0"),
        ({"fisher_batch_size": 0}, ValueError, "Invalid fisher_batch_size=0"),
        ({"criterion": "grasp"}, ValueError, "Invalid criterion='grasp'"),
        ({"pattern": "half"}, ValueError, "Invalid pattern='half'"),
        ({"scope": "block"}, ValueError, "Invalid scope='block'"),
        ({"weight_update": "some"}, ValueError, "Invalid weight_update='some'"),
        ({"parameter_names": "weight"}, TypeError, "Invalid parameter_names='weight': must be a"),
        ({"parameters_to_prune": "net"}, TypeError, "Invalid parameters_to_prune='net'"),
        ({"parameters_to_prune": []}, ValueError, "Invalid parameters_to_prune=[]: must not be"),
        ({"parameter_names": []}, ValueError, "Invalid parameter_names=[]: must not be empty"),
        ({"filename": ""}, ValueError, "Invalid filename=''"),
        ({"verbose": 3}, ValueError, "Invalid verbose=3: must be 0, 1 or 2."),
        ({"seed": -1}, ValueError, "Invalid seed=-1: must be >= 0."),
        (
            {"sparsity": 0.9, "pattern": "2:4"},
            ValueError,
            "Invalid sparsity=0.9: pattern '2:4' ends at 0.5.",
        ),
    ],
)
def test_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    if arguments and not arguments.keys() & {"sparsity", "schedule"}:
        arguments = {"sparsity": 0.5, **arguments}
    state = torch.get_rng_state()
    with pytest.raises(error) as caught:
        MFACPruning(**arguments)
    assert message in str(caught.value)
    assert torch.equal(torch.get_rng_state(), state)


def test_schedule_beyond_the_pattern() -> None:
    schedule = CubicSparsity(0.9, start_epoch=0, end_epoch=2, interval=2)
    with pytest.raises(MisconfigurationException, match=r"sparsity 0.9 at epoch 2: .* '2:4' ends"):
        fit(build(), pruning(None, schedule=schedule, pattern="2:4"), max_epochs=3)


# Trainers


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (FSDPStrategy, "strategy 'fsdp' shards them. Use strategy='ddp'."),
        (ModelParallelStrategy, "strategy 'ModelParallelStrategy' shards them."),
        (DeepSpeedStrategy, "strategy 'deepspeed' runs backward and the optimizer itself."),
    ],
)
def test_strategies(kind: Any, message: str) -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    # Made without what it needs to run.
    trainer._accelerator_connector.strategy = kind.__new__(kind)
    with pytest.raises(MisconfigurationException) as caught:
        refuse_trainer(trainer)
    assert message in str(caught.value)


def test_model_averaging() -> None:
    state = PostLocalSGDState(process_group=None, subgroup=None, start_localSGD_iter=2)
    strategy = DDPStrategy(model_averaging_period=3, ddp_comm_state=state)
    trainer = Trainer(accelerator="cpu", strategy=strategy, devices=1, logger=False)
    with pytest.raises(MisconfigurationException, match="with model_averaging_period=3 each rank"):
        refuse_trainer(trainer)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            lambda: ModelPruning("l1_unstructured"),
            "MFACPruning and ModelPruning cannot be used together: both put masks on the layers.",
        ),
        (SensitiveParameterMask, "together: both decide which weights are trained."),
        (TrajectoryLog, "together: what is pruned cannot be replayed from its log."),
        (EMAWeightAveraging, "together: its averages remember weights that are pruned."),
        (
            lambda: StochasticWeightAveraging(swa_lrs=0.1),
            "together: its averages remember weights that are pruned.",
        ),
    ],
)
def test_other_callbacks(other: Any, message: str) -> None:
    module = build(optimizer=MeZO)
    with pytest.raises(MisconfigurationException) as caught:
        fit(module, pruning(), other())
    assert message in str(caught.value)


def test_picture_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"use MFACPruning\(plot=False\)"):
        fit(build(), pruning(plot=True))
    fit(build(), pruning())


# Modules


def test_manual_optimization() -> None:
    module = build()
    module.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="with manual optimization, whose training"):
        fit(module, pruning())


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
def test_iterator_of_training() -> None:
    class Own(StockModule):
        def training_step(self, dataloader_iter: Any) -> Any:
            batch, _, _ = next(dataloader_iter)
            return super().training_step(batch, 0)

    module = build(lambda make: Own(mlp_module(make).network, make))
    with pytest.raises(MisconfigurationException, match=r"with training_step\(dataloader_iter\)"):
        fit(module, pruning())


def test_nothing_to_prune() -> None:
    class Norms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(5)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x)[:, :4]

    with pytest.raises(MisconfigurationException) as caught:
        fit(build_network(Norms()), pruning())
    assert "found nothing to prune: no trained parameter named 'weight'" in str(caught.value)
    assert "Kinds of layers: LayerNorm." in str(caught.value)


def test_unknown_parameter_names() -> None:
    with pytest.raises(MisconfigurationException, match="no trained parameter named 'kernel'"):
        fit(build(), pruning(parameter_names=["kernel"]))
    with pytest.raises(MisconfigurationException) as caught:
        fit(build(), pruning(parameters_to_prune=["encoder.*"]))
    assert "no parameter has a name like 'encoder.*'. Names: network.0.weight, " in str(
        caught.value
    )
    module = build()
    with pytest.raises(
        MisconfigurationException, match=r"Cannot prune network.0.kernel: Linear has"
    ):
        fit(module, pruning(parameters_to_prune=[(module.network[0], "kernel")]))
    with pytest.raises(MisconfigurationException, match=r"has no such module: Linear\("):
        fit(build(), pruning(parameters_to_prune=[(module.network[0], "weight")]))


def test_frozen_weights() -> None:
    module = build()
    module.network[0].weight.requires_grad_(False)
    fit(module, pruning(0.5))
    zeros = zeros_of(module)
    assert not bool(zeros["network.0.weight"].any())
    assert int(zeros["network.2.weight"].sum()) == 16
    chosen = ["network.*.weight"]
    with pytest.raises(
        MisconfigurationException, match=r"frozen parameters, .*: network.0.weight\."
    ):
        fit(module, pruning(parameters_to_prune=chosen))
    module = build()
    module.network[0].weight.requires_grad_(False)
    fit(module, pruning(parameters_to_prune=chosen, criterion="magnitude"))
    assert bool(zeros_of(module)["network.0.weight"].any())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.second = nn.Linear(6, 6)
        self.third = nn.Linear(6, 6)
        self.third.weight = self.second.weight
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        return self.head(torch.tanh(self.third(torch.tanh(self.second(hidden)))))


def test_shared_weights_are_left_out() -> None:
    module = build_network(Tied())
    with pytest.warns(
        RuntimeWarning, match=r"share: network.second.weight = network.third.weight\. Name them"
    ):
        fit(module, pruning())
    zeros = zeros_of(module)
    assert bool(zeros["network.first.weight"].any())
    assert not bool(zeros["network.second.weight"].any())


def test_shared_weights_that_are_named() -> None:
    module = build_network(Tied())
    fit(module, pruning(parameters_to_prune=["network.second.weight"]))
    assert module.network.second.weight is module.network.third.weight
    assert int(zeros_of(module)["network.second.weight"].sum()) == 18
    with pytest.raises(MisconfigurationException, match=r"Cannot prune .* they are one"):
        fit(
            module,
            pruning(parameters_to_prune=["*second.weight", (module.network.third, "weight")]),
        )


def test_layer_used_twice_is_pruned() -> None:
    layer = nn.Linear(5, 5)
    module = build_network(nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(5, 4)))
    fit(module, pruning())
    assert int(zeros_of(module)["network.0.weight"].sum()) > 0


def test_made_by_a_parametrization() -> None:
    network = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(5, 8)), nn.Tanh(), nn.Linear(8, 4)
    )
    module = build_network(network)
    callback = pruning()
    fit(module, callback)
    assert [name for name in callback.history if "/" in name] == ["sparsity/network.2.weight"]
