"""Tests of lightning_curvature/optim/kfac.py and ekfac.py: arguments, intervals, memory, rules."""

import logging
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature import EKFAC, KFAC
from tests.helpers.plain_loop import FEATURES, Loop, classification, network

# Everything is refreshed on every step, nothing limits it.
PLAIN: dict[str, Any] = {
    "factor_warmup": 0,
    "inverse_update_interval": 1,
    "damping_update_interval": 1,
    "max_momentum": None,
    "max_relative_update": None,
}
FIXED = {
    **PLAIN,
    "adaptive_lr": False,
    "adaptive_momentum": False,
    "damping_algorithm": "fixed",
    "lr": 0.1,
}

ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"lr": -1.0}, ValueError, "Invalid lr=-1.0: must be >= 0."),
    ({"momentum": 1.0}, ValueError, "Invalid momentum=1.0: must be in [0, 1)."),
    ({"damping": 0.0}, ValueError, "Invalid damping=0.0: must be > 0."),
    ({"damping": float("nan")}, ValueError, "Invalid damping=nan: must be > 0."),
    ({"weight_decay": -1}, ValueError, "Invalid weight_decay=-1: must be >= 0."),
    ({"l2_reg": "no"}, TypeError, "Invalid l2_reg='no': must be a number, got str."),
    ({"adaptive_lr": 1}, TypeError, "Invalid adaptive_lr=1: must be True or False."),
    ({"step_rejection": None}, TypeError, "Invalid step_rejection=None: must be True or False."),
    ({"max_momentum": 0}, ValueError, "Invalid max_momentum=0: must be > 0."),
    ({"max_relative_update": -0.1}, ValueError, "Invalid max_relative_update=-0.1: must be > 0."),
    (
        {"norm_constraint": 1e-3},
        ValueError,
        "Invalid norm_constraint=0.001: an adaptive learning rate has no need of it. Set it to "
        "None, or adaptive_lr to False.",
    ),
    (
        {"norm_constraint": 0.0, "adaptive_lr": False},
        ValueError,
        "Invalid norm_constraint=0.0: must be > 0.",
    ),
    (
        {"damping_algorithm": "none"},
        ValueError,
        "Invalid damping_algorithm='none': must be one of 'levenberg-marquardt', 'fixed'.",
    ),
    (
        {"damping_increase_factor": 0.9},
        ValueError,
        "Invalid damping_increase_factor=0.9: must be in [1, inf).",
    ),
    (
        {"damping_decrease_factor": 0},
        ValueError,
        "Invalid damping_decrease_factor=0: must be in (0, 1].",
    ),
    (
        {"rejection_increase_factor": 0.5},
        ValueError,
        "Invalid rejection_increase_factor=0.5: must be in [1, inf).",
    ),
    (
        {"min_damping": 1.0, "max_damping": 0.5},
        ValueError,
        "Invalid max_damping=0.5: must be in [1.0, inf].",
    ),
    ({"quad_model": "x"}, ValueError, "Invalid quad_model='x': must be one of 'exact', 'factors'."),
    ({"factor_decay": 1.0}, ValueError, "Invalid factor_decay=1.0: must be in [0, 1)."),
    (
        {"fisher_type": "x"},
        ValueError,
        "Invalid fisher_type='x': must be one of 'mc', 'curvature-propagation', 'type-2', "
        "'empirical'.",
    ),
    ({"mc_samples": 0}, ValueError, "Invalid mc_samples=0: must be an integer >= 1."),
    ({"kfac_approx": "x"}, ValueError, "Invalid kfac_approx='x': must be one of 'expand'"),
    (
        {"inverse_update_interval": 0},
        ValueError,
        "Invalid inverse_update_interval=0: must be an integer >= 1, in optimizer steps.",
    ),
    ({"factor_update_interval": 1.5}, TypeError, "Invalid factor_update_interval=1.5: must be an"),
    ({"factor_warmup": -1}, ValueError, "Invalid factor_warmup=-1: must be in [0, inf)."),
    ({"max_factor_dim": 0}, ValueError, "Invalid max_factor_dim=0: must be an integer >= 1."),
    (
        {"inverse_dtype": "float16"},
        ValueError,
        "Invalid inverse_dtype='float16': must be one of 'float32', 'bfloat16'.",
    ),
    ({"seed": -1}, ValueError, "Invalid seed=-1: must be in [0, inf)."),
    ({"max_failures": 0}, ValueError, "Invalid max_failures=0: must be an integer >= 1, in"),
]


@pytest.mark.parametrize("make", [KFAC, EKFAC])
@pytest.mark.parametrize(("given", "error", "text"), ERRORS, ids=lambda x: str(x)[:30])
def test_arguments_out_of_range(
    given: dict[str, Any], error: type[Exception], text: str, make: Callable[..., Any]
) -> None:
    with pytest.raises(error) as raised:
        make(network().parameters(), **given)
    assert str(raised.value).startswith(text)


def test_arguments_of_one_of_both() -> None:
    params = list(network().parameters())
    with pytest.raises(
        ValueError, match=r"^Invalid damping_method='x': must be one of 'factored',"
    ):
        KFAC(params, damping_method="x")
    with pytest.raises(ValueError, match=r"^Invalid inverse_sharding='memory': must be one of"):
        EKFAC(params, inverse_sharding="memory")
    with pytest.raises(ValueError, match=r"^Invalid inverse_sharding='x': must be one of 'none', "):
        KFAC(params, inverse_sharding="x")
    with pytest.raises(ValueError, match="one value for all groups, here True"):
        KFAC([{"params": params[:2]}, {"params": params[2:], "adaptive_lr": False}])


class Mixed(nn.Module):
    """A normalization layer and a bare parameter between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 6)
        self.norm = nn.LayerNorm(6)
        self.scale = nn.Parameter(torch.ones(6))
        self.last = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.last(torch.tanh(self.norm(self.first(x)) * self.scale))


def test_what_has_no_block(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "lightning_curvature"):
        model = Mixed().double()
        loop = Loop(model, partial(KFAC, max_factor_dim=5))
    names = loop.optimizer.fallback_parameters
    # A normalization layer has a diagonal of its own kind.
    assert names == ["scale"]
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == f"KFAC: {loop.optimizer.memory_estimate()}"
    assert "Largest blocks: " in lines[0]
    (told,) = [line for line in lines if "a diagonal instead" in line]
    assert told == "KFAC: no layer block, a diagonal instead, for scale (Mixed)."
    cut = [line for line in lines if "more than max_factor_dim" in line]
    assert cut == [
        "KFAC: the input factor of first has 6 rows, more than max_factor_dim; 2 blocks of it are "
        "kept.",
        "KFAC: the output factor of first has 6 rows, more than max_factor_dim; 2 blocks of it are "
        "kept.",
        "KFAC: the input factor of last has 7 rows, more than max_factor_dim; 2 blocks of it are "
        "kept.",
    ]
    loop.optimizer.detach()
    assert loop.optimizer.fallback_parameters == []
    with pytest.raises(RuntimeError, match="attach a model first"):
        loop.optimizer.memory_estimate()


def storage(tensors: list[Tensor]) -> int:
    """Return the bytes that tensors keep alive."""
    stores = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(stores.values())


@pytest.mark.parametrize(
    "make",
    [
        KFAC,
        partial(KFAC, damping_method="exact"),
        EKFAC,
        partial(KFAC, factor_dtype="bfloat16", inverse_dtype="bfloat16"),
        partial(EKFAC, factor_dtype="bfloat16", inverse_dtype="bfloat16"),
        partial(KFAC, max_factor_dim=5),
        partial(EKFAC, max_factor_dim=5),
        partial(KFAC, max_factor_dim=1, damping_method="exact"),
        partial(KFAC, inverse_update_interval=1),
    ],
)
def test_memory_estimate(make: Callable[..., Any]) -> None:
    """It is what is there after a step."""
    loop = Loop(Mixed(), make, directional="fd")
    optimizer = loop.optimizer
    estimate = optimizer.memory_estimate()
    loop.train(classification(2, dtype=torch.float32))
    factors = ("a_factor", "g_factor")
    scalars = ("positions", "mass", "correction_mass")
    states = optimizer._states.values()
    assert estimate.factors == storage([state[key] for state in states for key in factors])
    others = [x for state in states for key, x in state.items() if key not in (*factors, *scalars)]
    slack = sum("correction_mass" in state for state in states) * 4
    assert estimate.inverses == storage(others) + slack
    diagonals = [state["diagonal"] for state in optimizer._diagonals.values()]
    assert estimate.diagonals == storage(diagonals)
    velocity = [state["velocity"] for state in optimizer.state.values()]
    assert estimate.momentum == storage(velocity)
    assert estimate.total == sum(estimate[:4])


def watched(loop: Loop) -> dict[str, list[int]]:
    """Return at which steps an optimizer asks what; filled while it trains."""
    optimizer, oracle = loop.optimizer, loop.optimizer.oracle
    calls: dict[str, list[int]] = {
        name: [] for name in ("layers", "inverses", "model", "slope", "loss", "backward", "forward")
    }

    def note(owner: Any, name: str, label: Callable[..., str]) -> None:
        inner = getattr(owner, name)

        def outer(*args: Any, **kwargs: Any) -> Any:
            calls[label(*args)].append(optimizer._steps_done)
            return inner(*args, **kwargs)

        setattr(owner, name, outer)

    note(oracle, "see_layers", lambda: "layers")
    note(oracle, "loss", lambda: "loss")
    note(oracle, "quadratic", lambda found: "model" if len(found) == 2 else "slope")
    note(optimizer, "_refresh_inverses", lambda *_: "inverses")

    def on_forward(module: nn.Module, args: Any, output: Tensor) -> None:
        calls["forward"].append(optimizer._steps_done)
        if output.requires_grad:
            output.register_hook(lambda _: calls["backward"].append(optimizer._steps_done))

    loop.model.get_submodule("1").register_forward_hook(on_forward)
    return calls


@pytest.mark.parametrize("make", [KFAC, EKFAC])
def test_intervals(make: Callable[..., Any]) -> None:
    intervals = {
        "factor_update_interval": 2,
        "inverse_update_interval": 3,
        "curvature_update_interval": 4,
        "damping_update_interval": 5,
        "mc_samples": 2,
    }
    loop = Loop(network(), partial(make, factor_warmup=0, **intervals), directional="fd")
    calls = watched(loop)
    loop.train(classification(11))
    assert calls["layers"] == [0, 2, 4, 6, 8, 10]
    assert calls["inverses"] == [0, 3, 6, 9]
    assert calls["model"] == [0, 4, 8]
    assert calls["loss"] == [4, 9]
    # Where the model was not measured, the reduction ratio needs it along the update.
    assert calls["slope"] == [9]
    backwards, forwards = Counter(calls["backward"]), Counter(calls["forward"])
    # The gradient, and two draws.
    assert [backwards[step] for step in range(11)] == [3, 1] * 5 + [3]
    # The main pass; one per direction; the new loss. At first there is one direction only.
    assert [forwards[step] for step in (1, 2, 3, 5, 6, 7, 10)] == [1] * 7
    assert forwards[4] == forwards[8] + 1


def test_nothing_adaptive_costs_no_pass() -> None:
    loop = Loop(network(), partial(KFAC, **{**FIXED, "factor_update_interval": 4}))
    calls = watched(loop)
    loop.train(classification(6))
    assert calls["forward"] == list(range(6))
    assert calls["backward"] == [0, 0, 1, 2, 3, 4, 4, 5]
    assert not calls["model"] + calls["slope"] + calls["loss"]
    assert {"new_loss", "reduction_ratio", "curvature"}.isdisjoint(loop.optimizer.stats)


@pytest.mark.parametrize("method", ["factored", "exact"])
def test_warmup(method: str) -> None:
    """Everything is refreshed on every step, and averages are plain means."""
    late = {"factor_update_interval": 7, "inverse_update_interval": 7, "factor_decay": 0.5}
    loop = Loop(network(), partial(KFAC, factor_warmup=3, damping_method=method, **late))
    calls = watched(loop)
    batches = classification(9)
    loop.train(batches[:3])
    state = loop.optimizer._states["0"]
    rows = torch.cat([F.pad(x, (0, 1), value=1.0) for x, _ in batches[:3]])
    expected = rows.T @ rows / len(rows)
    torch.testing.assert_close(state["a_factor"][0, 0] / state["positions"], expected)
    assert state["mass"] == 3
    loop.train(batches[3:])
    assert calls["layers"] == calls["inverses"] == [0, 1, 2, 7]
    assert loop.optimizer._states["0"]["mass"] == 0.5 * 3 + 1


def test_carried_coefficients() -> None:
    """Between measurements the rate and the momentum stay, and the envelope goes on."""
    loop = Loop(
        network(), partial(KFAC, curvature_update_interval=3, **PLAIN, damping_algorithm="fixed")
    )
    found = []
    for step, (x, y) in enumerate(classification(7)):
        lr = 1.0 if step % 2 == 0 else 0.5
        loop.optimizer.param_groups[0]["lr"] = lr
        loop.step(x, y)
        found.append((loop.stat("lr") / lr, loop.stat("momentum") / lr))
    for start in (0, 3):
        for later in (start + 1, start + 2):
            assert found[later] == pytest.approx(found[start], rel=1e-12)
    assert len({round(lr, 9) for lr, _ in found}) == 3


def test_no_step_says_nothing_about_the_damping() -> None:
    """With a learning rate of 0 it stays; see also a step that is too short to judge."""
    loop = Loop(network(), partial(KFAC, **PLAIN, lr=0.0))
    loop.train(classification(3))
    assert loop.optimizer.damping == 1.0
