"""Tests of lightning_curvature/callbacks/damping_schedule.py and curvature/damping_shapes.py."""

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_curvature import AdamQLR, DampingSchedule, HessianSchedule
from lightning_curvature.curvature.damping_shapes import DAMPING_SHAPES, shaped_damping
from tests.helpers.modules import loader, mlp_module, vectors
from tests.helpers.optimizer_db import CONTRACTS, Contract, identical
from tests.helpers.probing import ROUTES, make_trainer
from tests.helpers.ranks import RankPool
from tests.helpers.resuming import Save, run
from tests.helpers.scheduled import Refreshes, Sparse, fit_sparse
from tests.helpers.two_ranks import assert_same_on_all, fit

pytestmark = pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`, callbacks used to create:UserWarning"
)

DAMPED = [contract for contract in CONTRACTS if contract.takes("damping")]
ADAPTING = [contract for contract in DAMPED if contract.takes("damping_algorithm")]
every_damped = pytest.mark.parametrize("contract", DAMPED, ids=lambda c: c.info.name)
every_adapting = pytest.mark.parametrize("contract", ADAPTING, ids=lambda c: c.info.name)
LM: Any = "levenberg-marquardt"
# Another rule than the default one in every respect.
SLOW: dict[str, Any] = {
    "damping_increase_factor": 1.5,
    "damping_decrease_factor": 0.9,
    "damping_update_interval": 2,
    "min_damping": 1e-4,
    "max_damping": 10.0,
}


class Dampings(Callback):
    """Notes the damping after every batch, and whether a reduction ratio was measured."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.measured = False

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Note them."""
        (optimizer,) = trainer.optimizers
        self.values.append(float(optimizer.param_groups[-1]["damping"]))
        self.measured = "reduction_ratio" in optimizer.stats


# Shapes


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("constant", [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [1.0, 0.7525, 0.505, 0.2575, 0.01, 0.01]),
        ("exponential", [1.0, 10**-0.5, 0.1, 10**-1.5, 0.01, 0.01]),
        ("cosine", [1.0, 0.8550178566873455, 0.505, 0.15498214331265446, 0.01, 0.01]),
    ],
)
def test_shapes(shape: Any, expected: list[float]) -> None:
    values = [shaped_damping(shape, step, 1.0, 0.01, 4) for step in range(6)]
    assert values == pytest.approx(expected, rel=1e-12)
    assert values[4] == expected[4], "the end is exact"


def test_shapes_may_rise_and_end_at_zero() -> None:
    assert shaped_damping("linear", 1, 0.0, 1.0, 4) == 0.25
    assert shaped_damping("cosine", 9, 1.0, 0.0, 4) == 0.0


# Values


@every_damped
@pytest.mark.parametrize("route", ROUTES)
def test_values_of_every_step(contract: Contract, route: str) -> None:
    noted = Dampings()
    schedule = DampingSchedule("linear", start=1.0, end=0.2, steps=4)
    run(contract, {}, route=route, callbacks=[schedule, noted], epochs=1)
    assert noted.values == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2], rel=1e-6)
    assert not noted.measured


@every_adapting
def test_constant_is_the_fixed_algorithm(contract: Contract) -> None:
    ours = run(contract, {}, callbacks=[DampingSchedule("constant", start=0.5)])
    theirs = run(contract, {"damping": 0.5, "damping_algorithm": "fixed"})
    assert identical(ours.weights, theirs.weights)
    assert identical(ours.stats, theirs.stats)


def test_optimizer_without_an_algorithm() -> None:
    optimizer = fit_sparse(DampingSchedule(lambda step: 1 / (1 + step)), 4)
    assert optimizer.dampings == [1.0, 1 / 2, 1 / 3, 1 / 4]
    assert optimizer.param_groups[0]["damping"] == 1 / 4, "where the schedule ended"


def test_all_groups_get_the_damping() -> None:
    def make(params: Any) -> Sparse:
        weight, *others = params
        return Sparse([{"params": [weight], "damping": 3.0}, {"params": others}])

    trainer = make_trainer("none", callbacks=[DampingSchedule("constant", start=0.25)])
    trainer.fit(mlp_module(make), loader(vectors()))
    assert [group["damping"] for group in trainer.optimizers[0].param_groups] == [0.25, 0.25]


def test_steps_are_optimizer_steps() -> None:
    schedule = DampingSchedule(float)
    optimizer = fit_sparse(schedule, 7, accumulate_grad_batches=3)
    assert optimizer.dampings == [0.0, 1.0, 2.0]


def test_steps_of_the_whole_fit() -> None:
    optimizer = fit_sparse(DampingSchedule("linear", start=1.0, end=0.0), 5, max_epochs=2)
    assert optimizer.dampings == pytest.approx([1 - step / 10 for step in range(10)])


def test_function_may_return_a_tensor() -> None:
    optimizer = fit_sparse(DampingSchedule(lambda step: torch.tensor(0.5)), 2)
    assert optimizer.dampings == [0.5, 0.5]


def test_with_an_interval_schedule() -> None:
    schedule = DampingSchedule("linear", start=1.0, end=0.0, steps=2)
    optimizer = fit_sparse(schedule, 5, callbacks=[HessianSchedule(2)])
    assert optimizer.dampings == [1.0, 0.5, 0.0, 0.0, 0.0]
    assert optimizer.estimates == [0, 2, 4]


# Levenberg-Marquardt


@every_adapting
@pytest.mark.parametrize("own", ["fixed", "decreasing-loss"])
def test_levenberg_marquardt_is_that_of_the_optimizer(contract: Contract, own: str) -> None:
    layers = "layers" in contract.info.asks
    if layers and own == "decreasing-loss":
        pytest.skip("K-FAC has no such rule")
    noted, refreshes = Dampings(), Refreshes()
    callbacks = [DampingSchedule(LM, **SLOW), noted, refreshes]
    ours = run(contract, {"damping_algorithm": own}, callbacks=callbacks)
    theirs = run(contract, {"damping_algorithm": LM, **SLOW})
    assert identical(ours.weights, theirs.weights)
    assert identical(ours.stats, theirs.stats)
    # K-FAC adapts it at the end of an interval, before the inverses of the next one.
    first = 1 if layers else 0
    assert refreshes.steps["damping_update_interval"] == list(range(first, 9 + first, 2))
    assert len(set(noted.values)) > 2
    assert noted.measured


@every_adapting
def test_settings_left_out_are_the_optimizers(contract: Contract) -> None:
    options = {**SLOW, "damping_update_interval": 3}
    ours = run(contract, options, callbacks=[DampingSchedule(LM, damping_decrease_factor=0.5)])
    theirs = run(contract, {**options, "damping_decrease_factor": 0.5})
    assert identical(ours.weights, theirs.weights)


def test_levenberg_marquardt_without_a_reduction_ratio() -> None:
    with pytest.raises(
        MisconfigurationException,
        match=r"Sparse measures no reduction ratio, which DampingSchedule\('levenberg-marquardt'\) "
        r"goes by\. Use a schedule of values such as 'exponential', or",
    ):
        fit_sparse(DampingSchedule(LM))


def test_limits_that_contradict_those_of_the_optimizer() -> None:
    trainer = make_trainer("strategy", callbacks=[DampingSchedule(LM, min_damping=2.0)])
    module = mlp_module(lambda params: AdamQLR(params, max_damping=1.0))
    with pytest.raises(ValueError, match=r"Invalid max_damping=1\.0: must be in \[2\.0, inf\]\."):
        trainer.fit(module, loader(vectors()))
    assert trainer.optimizers[0]._damping_settings is None


# Resume


@every_damped
@pytest.mark.parametrize("kind", ["linear", LM])
def test_resume(contract: Contract, kind: str, tmp_path: Path) -> None:
    if kind == LM and contract not in ADAPTING:
        kind = "exponential"
    path = tmp_path / "part.ckpt"

    def schedule() -> DampingSchedule:
        if kind == LM:
            return DampingSchedule(LM, **SLOW)
        return DampingSchedule(kind, start=1.0, end=1e-3, steps=8)  # type: ignore[arg-type]

    whole = run(contract, {}, callbacks=[schedule()])
    run(contract, {}, stop_before=3, callbacks=[schedule(), Save(path, 3)])
    saved = torch.load(path, weights_only=True)
    assert not any("Schedule" in name for name in saved["callbacks"])
    resumed = run(contract, {}, seed=99, ckpt_path=path, weights_only=True, callbacks=[schedule()])
    for what in ("weights", "state", "stats", "steps"):
        assert identical(getattr(resumed, what), getattr(whole, what)), what


@every_adapting
def test_checkpoint_without_the_callback(contract: Contract, tmp_path: Path) -> None:
    """The optimizer's own algorithm goes on from the damping of the schedule."""
    path = tmp_path / "part.ckpt"
    schedule = DampingSchedule("constant", start=0.125)
    run(contract, {}, stop_before=3, callbacks=[schedule, Save(path, 3)])
    noted = Dampings()
    resumed = run(contract, {}, ckpt_path=path, callbacks=[noted])
    assert noted.measured
    decrease = resumed.state["param_groups"][0]["damping_decrease_factor"]
    assert any(noted.values[0] == pytest.approx(0.125 * x) for x in (decrease, 1.0, 2.0))
    group = resumed.state["param_groups"][0]
    assert group["damping_algorithm"] == "levenberg-marquardt"


@pytest.mark.ddp
@every_damped
def test_two_ranks(contract: Contract, ranks: RankPool) -> None:
    schedules = [DampingSchedule("exponential", start=1.0, end=0.1, steps=3)]
    if contract in ADAPTING:
        schedules.append(DampingSchedule(LM, **SLOW))
    for schedule in schedules:
        assert_same_on_all(ranks.run(fit, contract, callbacks=[schedule]))


# Owners


def test_two_owners() -> None:
    with pytest.raises(
        MisconfigurationException,
        match=r"The damping has two owners: DampingSchedule\('constant', start=1\.0\) and "
        r"DampingSchedule\('levenberg-marquardt', min_damping=0\.1\)\. Remove one of them\.",
    ):
        fit_sparse(
            DampingSchedule("constant", start=1.0), callbacks=[DampingSchedule(LM, min_damping=0.1)]
        )


def test_owner_outside_of_the_trainer() -> None:
    def make(params: Any) -> AdamQLR:
        optimizer = AdamQLR(params)
        optimizer.own_damping("fixed")
        return optimizer

    trainer = make_trainer("strategy", callbacks=[DampingSchedule("constant", start=1.0)])
    with pytest.raises(RuntimeError, match=r"The damping of AdamQLR has an owner already\."):
        trainer.fit(mlp_module(make), loader(vectors()))
    assert trainer.optimizers[0]._damping_settings == {"damping_algorithm": "fixed"}


def test_interval_that_is_owned() -> None:
    callbacks = [
        HessianSchedule(3, interval_name="damping_update_interval"),
        DampingSchedule(LM, damping_update_interval=2),
    ]
    trainer = make_trainer("strategy", callbacks=callbacks)
    with pytest.raises(
        MisconfigurationException,
        match=r"damping_update_interval of AdamQLR has an owner already, a FixedInterval\. .* "
        r"Leave damping_update_interval of DampingSchedule\('levenberg-marquardt', .*\) away\.",
    ):
        trainer.fit(mlp_module(AdamQLR), loader(vectors()))
    assert trainer.optimizers[0]._damping_settings is None


def test_optimizer_without_damping() -> None:
    def make(params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.1)

    trainer = make_trainer("none", callbacks=[DampingSchedule("constant", start=1.0)])
    with pytest.raises(
        MisconfigurationException,
        match=r"DampingSchedule found no optimizer with a damping\. Got: SGD\. Use one such as",
    ):
        trainer.fit(mlp_module(make), loader(vectors()))


class Fails(Callback):
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 3:
            raise RuntimeError("the fourth batch is broken")


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda: DampingSchedule("linear", start=1.0, end=0.5, steps=3),
        lambda: DampingSchedule(LM, **SLOW),
    ],
    ids=["linear", "levenberg-marquardt"],
)
def test_no_trace(make: Callable[[], DampingSchedule], fails: bool) -> None:
    schedule = make()
    trainer = make_trainer("strategy", callbacks=[schedule, *([Fails()] if fails else [])])
    module = mlp_module(AdamQLR)
    if fails:
        with pytest.raises(RuntimeError, match="the fourth batch is broken"):
            trainer.fit(module, loader(vectors()))
    else:
        trainer.fit(module, loader(vectors()))
    (optimizer,) = trainer.optimizers
    assert optimizer._damping_settings is None
    assert optimizer._schedules == {}
    assert not optimizer._optimizer_step_pre_hooks
    assert schedule.state_dict() == {}
    fresh = AdamQLR(mlp_module(AdamQLR).parameters()).param_groups[0]
    group = optimizer.param_groups[0]
    assert all(group[key] == fresh[key] for key in fresh if key not in ("params", "damping"))
    if schedule.schedule != LM:
        assert group["damping"] == 0.5


def test_second_fit_with_the_same_callback() -> None:
    schedule = DampingSchedule("linear", start=1.0, end=0.0, steps=2)
    for _ in range(2):
        assert fit_sparse(schedule, 3).dampings == [1.0, 0.5, 0.0]


def test_pickle() -> None:
    copied = pickle.loads(pickle.dumps(DampingSchedule("cosine", start=1.0, end=0.5)))
    assert repr(copied) == "DampingSchedule('cosine', start=1.0, end=0.5)"


# Errors


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (
            lambda step: -1.0,
            ValueError,
            r"schedule\(0\) of DampingSchedule returned -1\.0: must be f",
        ),
        (lambda step: math.nan, ValueError, r"returned nan: must be finite and >= 0\."),
        (lambda step: math.inf, ValueError, r"returned inf: must be finite and >= 0\."),
        (lambda step: "1e-3", TypeError, r"returned '1e-3': must be a number\."),
        (lambda step: torch.ones(2), TypeError, r"must be a number\."),
        (
            lambda step: 1.0 - step,
            ValueError,
            r"schedule\(2\) of DampingSchedule returned -1\.0: must be finite and >= 0\.",
        ),
    ],
)
def test_values_of_a_function(function: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fit_sparse(DampingSchedule(function), 3)


def test_endless_fit() -> None:
    class Endless(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter([])

    schedule = DampingSchedule("linear", start=1.0, end=0.0)
    trainer = make_trainer("none", callbacks=[schedule], max_epochs=1)
    with pytest.raises(
        MisconfigurationException, match=r"DampingSchedule\(.*\) needs steps: the T"
    ):
        trainer.fit(mlp_module(Sparse), torch.utils.data.DataLoader(Endless()))


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"schedule": "quadratic"}, ValueError, r"Invalid schedule='quadratic': must be one of 'c"),
        (
            {"schedule": "linear", "end": 1.0},
            ValueError,
            r"Invalid start=None: schedule='linear' n",
        ),
        (
            {"schedule": "linear", "start": 1.0},
            ValueError,
            r"Invalid end=None: schedule='linear' n",
        ),
        (
            {"schedule": "constant", "start": 1.0, "end": 1.0},
            ValueError,
            r"Invalid end=1\.0: it has no meaning with schedule='constant'\.",
        ),
        (
            {"schedule": LM, "steps": 3},
            ValueError,
            r"Invalid steps=3: it has no meaning with schedule='levenberg-marquardt'\.",
        ),
        (
            {"schedule": "constant", "start": 1.0, "min_damping": 1.0},
            ValueError,
            r"Invalid min_damping=1\.0: it has no meaning with schedule='constant'\.",
        ),
        ({"schedule": "constant", "start": -1.0}, ValueError, r"Invalid start=-1\.0: must be >= 0"),
        ({"schedule": "constant", "start": math.inf}, ValueError, r"Invalid start=inf: must be in"),
        ({"schedule": "constant", "start": math.nan}, ValueError, r"Invalid start=nan: must be >="),
        (
            {"schedule": "exponential", "start": 1.0, "end": 0.0},
            ValueError,
            r"Invalid end=0\.0: must be > 0\.",
        ),
        (
            {"schedule": "linear", "start": 1.0, "end": 0.0, "steps": 0},
            ValueError,
            r"Invalid steps=0: must be an integer >= 1",
        ),
        (
            {"schedule": LM, "damping_increase_factor": 0.5},
            ValueError,
            r"Invalid damping_increase_factor=0\.5: must be in \[1, inf\)\.",
        ),
        (
            {"schedule": LM, "damping_decrease_factor": 1.5},
            ValueError,
            r"Invalid damping_decrease_factor=1\.5: must be in \(0, 1\]\.",
        ),
        (
            {"schedule": LM, "damping_update_interval": 0},
            ValueError,
            r"Invalid damping_update_interval=0: must be an integer >= 1",
        ),
        (
            {"schedule": LM, "min_damping": 1.0, "max_damping": 0.5},
            ValueError,
            r"Invalid max_damping=0\.5: must be in \[1\.0, inf\]\.",
        ),
        ({"schedule": LM, "min_damping": -1.0}, ValueError, r"Invalid min_damping=-1\.0: must be"),
    ],
)
def test_argument_errors(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DampingSchedule(**kwargs)


def test_every_shape_is_offered() -> None:
    for shape in DAMPING_SHAPES:
        end = None if shape == "constant" else 0.5
        DampingSchedule(shape, start=1.0, end=end)  # type: ignore[arg-type]
