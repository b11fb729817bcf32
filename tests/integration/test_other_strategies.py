"""Strategies that shard or own the step, and strategies of users.

Files under test: strategies/refusals.py, strategies/recorder.py, strategies/mixin.py,
optim/base.py.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    XLAStrategy,
)
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
from torch import Tensor

from lightning_curvature import CurvatureCallback, SingleDeviceCurvatureStrategy, list_optimizers
from lightning_curvature.strategies import refusals
from lightning_curvature.strategies.mixin import CurvatureMixin
from tests.helpers.elementwise import (
    ELEMENTWISE,
    Momentum,
    ShardedModule,
    small_network,
    whole,
)
from tests.helpers.families import every_family
from tests.helpers.modules import StockModule, loader, mlp_module, vectors
from tests.helpers.optimizer_db import Contract
from tests.helpers.probing import make_trainer
from tests.helpers.ranks import RankPool, world
from tests.helpers.two_ranks import shared_loader

REASONS = {
    FSDPStrategy: r"strategy 'fsdp' shards them",
    ModelParallelStrategy: r"strategy 'ModelParallelStrategy' shards them",
    DeepSpeedStrategy: r"strategy 'deepspeed' runs backward and the optimizer itself",
    XLAStrategy: r"strategy 'xla' compiles the whole step",
    # Its attribute `strategy_name` is that of its base class.
    SingleDeviceXLAStrategy: (
        r"strategy '(single_xla|SingleDeviceXLAStrategy)' compiles the whole step"
    ),
}
TITLES = {
    FSDPStrategy: "FSDPStrategy",
    ModelParallelStrategy: "ModelParallelStrategy (FSDP2)",
    DeepSpeedStrategy: "DeepSpeedStrategy",
    XLAStrategy: "XLAStrategy",
    SingleDeviceXLAStrategy: "SingleDeviceXLAStrategy",
}
SHORT = "needs whole parameters on every rank"
every_elementwise = pytest.mark.parametrize(
    "elementwise", ELEMENTWISE, ids=[contract.info.name for contract in ELEMENTWISE]
)
every_sharded = pytest.mark.parametrize(
    "sharded",
    [
        pytest.param(kind, id=kind.__name__, marks=pytest.mark.feature("Other strategies", title))
        for kind, title in TITLES.items()
    ],
)


class Ran(AssertionError):
    """A batch was reached."""


class NeverStarts(StockModule):
    """Module whose first batch must never come."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise Ran


def network() -> torch.nn.Module:
    """Build the network of `mlp_module`."""
    return mlp_module(torch.optim.SGD).network


def pretend(trainer: Trainer, sharded: type) -> None:
    """Let the single-device strategy pass for an instance of a sharded class, as mocks do."""

    class Pretender(type(trainer.strategy)):
        distributed_sampler_kwargs: ClassVar = {"num_replicas": 1, "rank": 0}
        parallel_devices: ClassVar = [torch.device("cpu")]
        strategy_name = getattr(sharded, "strategy_name", None)

        @property
        def __class__(self) -> type:
            return sharded

    trainer.strategy.__class__ = Pretender
    assert isinstance(trainer.strategy, sharded)


def refusal_of(make: Any, trainer: Trainer) -> str:
    """Fit and return the refusal, which comes before the first batch."""
    with pytest.raises(MisconfigurationException) as refusal:
        trainer.fit(NeverStarts(network(), make), loader(vectors()))
    return str(refusal.value)


# Refusals


@every_family
@every_sharded
@pytest.mark.parametrize("route", ["callback", "auto"])
def test_sharded_strategies(
    contract: Contract, sharded: type, route: str, refused: Callable[[str], None]
) -> None:
    """Refused before the first batch but for those that change every entry by itself."""
    trainer = make_trainer(route)
    pretend(trainer, sharded)
    if contract.elementwise:
        with pytest.raises(Ran):
            trainer.fit(NeverStarts(network(), contract.make), loader(vectors()))
        return
    name = contract.info.cls.__name__
    text = refusal_of(contract.make, trainer)
    advice = re.escape("Use strategy='ddp_curvature' (or 'ddp')")
    assert re.match(rf"{name} {SHORT}; {REASONS[sharded]}\. {advice}", text)
    assert "_curvature_recorder" not in vars(trainer.strategy)
    refused(SHORT)


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_the_refusal_names_what_would_work(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All elementwise optimizers of the registry."""
    asking = [info for info in list_optimizers() if info.asks]
    others = [replace(ELEMENTWISE[i].info, name=f"x{i}") for i in range(rows)]
    monkeypatch.setattr(refusals, "list_optimizers", lambda: [*asking, *others])
    trainer = make_trainer("callback")
    pretend(trainer, FSDPStrategy)
    text = refusal_of(asking[0].cls, trainer)
    names = ", ".join(info.cls.__name__ for info in others)
    end = f", or one of the elementwise optimizers that need no extra passes: {names}."
    assert text.endswith(end if rows else "Use strategy='ddp_curvature' (or 'ddp').")


@pytest.mark.parametrize("sharded", TITLES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("make", [torch.optim.AdamW, Momentum])
def test_other_optimizers_do_not_notice(sharded: type, make: Any) -> None:
    """The entry point is in every environment."""
    trainer = make_trainer("auto")
    pretend(trainer, sharded)
    with pytest.raises(Ran):
        trainer.fit(NeverStarts(network(), make), loader(vectors()))


def asked_under_fsdp2(contract: Contract, callback: bool) -> str:
    """Fit on this rank under a real sharding strategy, and return the refusal."""

    class NeverTrains(ShardedModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise Ran

    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    callbacks = [CurvatureCallback()] if callback else []
    trainer = make_trainer("none", strategy=strategy, devices=2, callbacks=callbacks)
    with pytest.raises(MisconfigurationException) as refusal:
        trainer.fit(NeverTrains(small_network(), contract.make), loader(vectors()))
    return str(refusal.value)


@pytest.mark.ddp
@every_family
@pytest.mark.parametrize("callback", [False, True], ids=["auto", "callback"])
@pytest.mark.feature("Other strategies", TITLES[ModelParallelStrategy])
def test_asking_under_fsdp2(
    contract: Contract, callback: bool, ranks: RankPool, refused: Callable[[str], None]
) -> None:
    """The real strategy on two ranks."""
    if contract.elementwise:
        return
    for text in ranks.run(asked_under_fsdp2, contract, callback):
        assert text.startswith(f"{contract.info.cls.__name__} {SHORT}; ")
    refused(SHORT)


# Optimizers that ask nothing


def sharded_strategy(**kwargs: Any) -> Any:
    """Make the strategy for this number of ranks."""
    if world()[1] == 1:
        return "auto"
    return ModelParallelStrategy(
        data_parallel_size=world()[1],
        tensor_parallel_size=1,
        process_group_backend="gloo",
        **kwargs,
    )


def train_sharded(
    contract: Contract, epochs: int = 3, ckpt_path: Any = None, save_to: Any = None, **kwargs: Any
) -> dict[str, Any]:
    """Fit on this rank under FSDP2, or unsharded in one process; return all that is left, whole."""
    seed_everything(3)
    module = ShardedModule(small_network(3 if ckpt_path is None else 4), contract.make)
    trainer = make_trainer(
        "auto",
        strategy=sharded_strategy(**kwargs),
        devices=world()[1],
        max_epochs=epochs,
        use_distributed_sampler=False,
    )
    trainer.fit(module, shared_loader(vectors(24), 8), ckpt_path=ckpt_path)
    if save_to is not None:
        trainer.save_checkpoint(save_to)
    optimizer = trainer.optimizers[0]
    weights = {name: whole(p) for name, p in module.named_parameters()}
    with torch.no_grad():
        final = small_network()
        final.load_state_dict({name.removeprefix("network."): w for name, w in weights.items()})
        x, y = vectors(24).tensors
        loss = F.cross_entropy(final(x.double()), y).item()
    return {
        "weights": weights,
        "state": [whole(dict(optimizer.state[p])) for p in module.parameters()],
        "steps": optimizer._steps_done,
        "global_step": trainer.global_step,
        "loss": loss,
        "sharded": all(type(p.data).__name__ == "DTensor" for p in module.parameters()),
    }


def assert_alike(one: Any, other: Any) -> None:
    """Compare nested containers of tensors, up to round-off."""
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


@pytest.mark.ddp
@every_elementwise
def test_elementwise_under_fsdp2(elementwise: Contract, ranks: RankPool) -> None:
    """Two ranks with a shard each take the steps of one process with all of it."""
    first, second = ranks.run(train_sharded, elementwise)
    single = train_sharded(elementwise)
    assert first["sharded"]
    assert not single["sharded"]
    for result in (first, second):
        assert result["steps"] == result["global_step"] == single["steps"] == 9
        assert_alike(result["weights"], single["weights"])
        assert_alike(result["state"], single["state"])
    x, y = vectors(24).tensors
    assert single["loss"] < F.cross_entropy(small_network()(x.double()), y).item()


@pytest.mark.ddp
@every_elementwise
@pytest.mark.parametrize("distributed", [False, True], ids=["one file", "file per rank"])
# Lightning's notes on reading its own files.
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_resume_under_fsdp2(
    elementwise: Contract, distributed: bool, ranks: RankPool, tmp_path: Path
) -> None:
    """A checkpoint of a sharded run goes on as if there had been no interruption."""
    path = tmp_path / "sharded.ckpt"
    kwargs = {"save_distributed_checkpoint": distributed}
    full = ranks.run(train_sharded, elementwise, 4)
    ranks.run(train_sharded, elementwise, 2, save_to=path, **kwargs)
    resumed = ranks.run(train_sharded, elementwise, 4, ckpt_path=path, **kwargs)
    for one, other in zip(resumed, full, strict=True):
        assert one["steps"] == other["steps"] == 12
        assert_alike(one["weights"], other["weights"])
        assert_alike(one["state"], other["state"])


def loop_sharded(contract: Contract) -> dict[str, Any]:
    """Train in an ordinary loop with `fully_shard`."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = small_network()
    if world()[1] > 1:
        mesh = init_device_mesh("cpu", (world()[1],))
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=mesh)
    optimizer = contract.make(model.parameters())
    for x, y in shared_loader(vectors(24), 8):
        optimizer.zero_grad()
        F.cross_entropy(model(x.double()), y).backward()
        optimizer.step()
    state = optimizer.state_dict()
    again = contract.make(model.parameters())
    again.load_state_dict(state)
    return {
        "weights": {name: whole(p) for name, p in model.named_parameters()},
        "state": whole(again.state_dict()["state"]),
        "steps": again._steps_done,
    }


@pytest.mark.ddp
@every_elementwise
def test_elementwise_in_a_loop_with_fully_shard(elementwise: Contract, ranks: RankPool) -> None:
    """Plain PyTorch; the state dict is loaded into another optimizer."""
    results = ranks.run(loop_sharded, elementwise)
    single = loop_sharded(elementwise)
    for result in results:
        assert result["steps"] == single["steps"] == 3
        assert_alike(result["weights"], single["weights"])
        assert_alike(result["state"], single["state"])


# Strategies that are fine


class UsersSingle(SingleDeviceStrategy):
    """A strategy of a user."""


class UsersCurvature(SingleDeviceCurvatureStrategy):
    """A user's strategy on top of ours."""


class UsersMixed(CurvatureMixin, SingleDeviceStrategy):
    """A user's strategy with our mixin."""


def weights_under(contract: Contract, strategy: Any) -> Tensor:
    """Fit and return the weights."""
    seed_everything(3)
    module = mlp_module(contract.make)
    trainer = make_trainer("auto", strategy=strategy, max_epochs=2)
    trainer.fit(module, loader(vectors()))
    assert "_curvature_recorder" not in vars(trainer.strategy)
    assert "training_step" not in vars(trainer.strategy)
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@every_family
@pytest.mark.parametrize(
    "strategy", [SingleDeviceStrategy, UsersSingle, UsersCurvature, UsersMixed]
)
@pytest.mark.feature("Other strategies", "Strategies of users on one device")
def test_users_strategy(contract: Contract, strategy: type) -> None:
    """The same steps as under "auto"."""
    assert torch.equal(
        weights_under(contract, strategy(device="cpu")), weights_under(contract, "auto")
    )


class UsersDDP(DDPStrategy):
    """A strategy of a user."""


class UsersMixedDDP(CurvatureMixin, DDPStrategy):
    """A user's strategy with our mixin."""


STRATEGIES: dict[str, Callable[[], Any]] = {
    "stock": lambda: "ddp",
    "subclass": UsersDDP,
    "mixin": UsersMixedDDP,
}


def weights_on_ranks(contract: Contract, strategy: str) -> Tensor:
    """Fit on this rank and return the weights."""
    seed_everything(3)
    module = mlp_module(contract.make)
    trainer = make_trainer(
        "auto",
        strategy=STRATEGIES[strategy](),
        devices=2,
        use_distributed_sampler=False,
        max_epochs=2,
    )
    trainer.fit(module, shared_loader(vectors(), 4))
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.ddp
@every_family
@pytest.mark.parametrize("strategy", ["subclass", "mixin"])
@pytest.mark.feature("Other strategies", "Subclasses of DDPStrategy")
def test_users_ddp(contract: Contract, strategy: str, ranks: RankPool) -> None:
    """The same steps as under stock ``ddp``, on both ranks."""
    stock = ranks.run(weights_on_ranks, contract, "stock")
    users = ranks.run(weights_on_ranks, contract, strategy)
    for weights in (*users, stock[1]):
        assert torch.equal(weights, stock[0])


@every_family
@pytest.mark.feature("Other strategies", "FSDPStrategy")
def test_lightning_itself_refuses_fsdp_without_a_gpu(
    contract: Contract, refused: Callable[[str], None]
) -> None:
    """Why there is no real run of it here: the text is Lightning's."""
    if contract.elementwise:
        return
    with pytest.raises(ValueError, match=re.escape("requires a GPU accelerator")):
        make_trainer("auto", strategy=FSDPStrategy())
    refused(SHORT)
