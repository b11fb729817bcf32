"""Tests of lightning_curvature/optim/saved_blocks.py, and of what K-FAC does with its states."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_curvature import EKFAC, KFAC
from tests.helpers.optimizer_db import identical
from tests.helpers.plain_loop import Loop, classification, network

DAMPED: dict[str, Any] = {"lr": 0.3, "factor_warmup": 1, "inverse_update_interval": 2}

KINDS: dict[str, Any] = {
    "inverses": lambda params: KFAC(params, **DAMPED),
    "Cholesky": lambda params: KFAC(params, **{**DAMPED, "inverse_update_interval": 1}),
    "eigenbases": lambda params: KFAC(params, **DAMPED, damping_method="exact"),
    "corrected": lambda params: EKFAC(params, **DAMPED),
    "cut": lambda params: EKFAC(params, **DAMPED, max_factor_dim=3),
    "diagonal": lambda params: KFAC(params, **DAMPED, max_factor_dim=1),
}
every_kind = pytest.mark.parametrize("kind", list(KINDS))


class WithScale(nn.Module):
    """A network and a parameter that is in no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4, dtype=torch.float64))
        self.body = network()

    def forward(self, x: Tensor) -> Tensor:
        """Return the scaled outputs."""
        return self.scale * self.body(x)


def trained(kind: str, steps: int = 3, seed: int = 5) -> Loop:
    """Train for some steps."""
    loop = Loop(WithScale(), KINDS[kind])
    loop.train(classification(steps, seed=seed))
    return loop


def refuses(loop: Loop, state: dict[str, Any], text: str) -> None:
    """Check that a state is refused, attached or not, and that nothing changes."""
    before = copy.deepcopy(loop.optimizer.state_dict())
    with pytest.raises(ValueError, match=text):
        loop.optimizer.load_state_dict(state)
    assert identical(loop.optimizer.state_dict(), before)


@every_kind
def test_a_sound_state_goes_on(kind: str) -> None:
    """Into an optimizer that is attached, into one that will be, and through both."""
    whole = trained(kind)
    saved = copy.deepcopy(whole.optimizer.state_dict())
    assert list(saved["curvature"]["blocks"]) == ["body.0", "body.2"]
    assert list(saved["curvature"]["diagonals"]) == ["0"]
    others = [trained(kind, steps=2, seed=9) for _ in range(2)]
    others[1].optimizer.detach()
    for other in others:
        other.model.load_state_dict(whole.model.state_dict())
        other.optimizer.load_state_dict(saved)
        assert identical(other.optimizer.state_dict(), saved)
    others[1].criterion = others[1].optimizer.attach_model(
        others[1].model, nn.functional.cross_entropy, directional="jvp"
    )
    for loop in (whole, *others):
        loop.train(classification(4, seed=8))
    for other in others:
        assert torch.equal(other.theta(), whole.theta())
        assert identical(other.optimizer.state_dict(), whole.optimizer.state_dict())


@every_kind
def test_a_detached_optimizer_keeps_its_state(kind: str) -> None:
    """As after a fit, whose checkpoint may be written when the model is watched no longer."""
    loop = trained(kind)
    before = copy.deepcopy(loop.optimizer.state_dict())
    loop.optimizer.detach()
    assert identical(loop.optimizer.state_dict(), before)


@every_kind
def test_every_tensor_is_looked_at(kind: str) -> None:
    """Wrong numbers, wrong shapes, and cut out ones that others are of no use without."""
    loop = trained(kind)
    good = loop.optimizer.state_dict()
    for name, entry in good["curvature"]["blocks"].items():
        for key in set(entry) - {"parameters"}:
            for value in (
                torch.full_like(entry[key], torch.nan),
                entry[key].to("meta"),
                entry[key].long(),
                "x",
                None,
            ):
                state = copy.deepcopy(good)
                state["curvature"]["blocks"][name][key] = value
                refuses(loop, state, f"block '{name}': '{key}' must be a tensor of finite real")
            state = copy.deepcopy(good)
            state["curvature"]["blocks"][name][key] = entry[key][None]
            refuses(loop, state, f"'{key}' of block '{name}' must have the shape")
            state = copy.deepcopy(good)
            del state["curvature"]["blocks"][name][key]
            refuses(loop, state, f"block '{name}' has no .*")
    loop.train(classification(2))


@pytest.mark.parametrize(
    ("path", "value", "text"),
    [
        (("blocks",), None, "'blocks' must be a dict, got None"),
        (("blocks",), [1], "'blocks' must be a dict, got"),
        (("diagonals",), 3, "'diagonals' must be a dict, got 3"),
        (("bypassed",), {}, "'bypassed' must be a list, got {}"),
        (("bypassed",), [7], "'bypassed' must hold numbers of 5 parameters, got 7"),
        (("bypassed",), [True], "'bypassed' must hold numbers of 5 parameters, got True"),
        (("blocks", "body.0"), "x", "block 'body.0' must be a dict, got 'x'"),
        (("blocks", "body.0", "novel"), torch.ones(1), "block 'body.0' has unknown keys: novel"),
        (("blocks", "body.0", "parameters"), [], "must list one or two"),
        (("blocks", "body.0", "parameters"), [[9, None, None]], "must list one or two"),
        (("blocks", "body.0", "parameters"), [[1, 2, 1]], "must list one or two"),
        (("blocks", "body.0", "parameters"), [[1, None, 3]], "must list one or two"),
        (("blocks", "body.0", "parameters"), [[1, None, None]], "belong to no layer"),
        (("blocks", "body.0", "mass"), torch.tensor(-1.0), "finite real numbers >= 0"),
        (("blocks", "body.0", "positions"), torch.tensor(-1.0), "finite real numbers >= 0"),
        (("diagonals", "x"), {}, "'diagonals' must have numbers of 5 parameters as keys"),
        (("diagonals", "5"), {}, "'diagonals' must have numbers of 5 parameters as keys"),
        (("diagonals", "0"), {}, "the diagonal of parameter 0 has no diagonal, mass"),
        (("diagonals", "0", "diagonal"), torch.ones(3), r"must have the shape \[4\], got \[3\]"),
        (("diagonals", "0", "mass"), torch.ones(1), r"must have the shape \[\], got \[1\]"),
        (("diagonals", "0", "diagonal"), -torch.ones(4), "finite real numbers >= 0"),
    ],
)
def test_damage_is_named(path: tuple[str, ...], value: Any, text: str) -> None:
    loop = trained("corrected")
    state = copy.deepcopy(loop.optimizer.state_dict())
    place: Any = state["curvature"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    refuses(loop, state, f"^Cannot load the state into EKFAC: .*{text}")


def test_the_state_of_a_frozen_layer_is_left_out() -> None:
    """Where it is trained again later it begins anew, as any layer that comes later."""
    saved = copy.deepcopy(trained("inverses").optimizer.state_dict())
    model = WithScale()
    model.body[0].requires_grad_(False)
    loop = Loop(model, KINDS["inverses"])
    loop.optimizer.load_state_dict(saved)
    loop.train(classification(2))
    assert set(blocks(loop)) == {"body.2"}
    model.body[0].requires_grad_(True)
    before = model.body[0].weight.detach().clone()
    loop.train(classification(3))
    assert not torch.equal(model.body[0].weight, before)
    assert set(blocks(loop)) == {"body.0", "body.2"}


def test_a_bias_that_comes_later() -> None:
    """Its layer has other factors then, and begins anew; the other layer goes on."""
    loop = Loop(network(), KINDS["inverses"], groups=lambda m: [m[0].weight, *m[2].parameters()])
    loop.train(classification(3))
    mass = {n: b["mass"].item() for n, b in blocks(loop).items()}
    loop.optimizer.add_param_group({"params": [loop.model[0].bias]})
    before = loop.theta()
    loop.train(classification(1))
    assert blocks(loop)["2"]["mass"] > mass["2"]
    assert blocks(loop)["0"]["mass"] == 1 != mass["0"]
    assert blocks(loop)["0"]["a_factor"].shape[-1] == loop.model[0].in_features + 1
    assert (loop.theta() != before).all()


def blocks(loop: Loop) -> dict[str, Any]:
    """Return the blocks of the state."""
    return loop.optimizer.state_dict()["curvature"]["blocks"]


def test_an_old_inverse_of_another_kind_goes() -> None:
    """When inverses begin to serve for more than one step, a Cholesky factor must not stay."""
    loop = trained("Cholesky")
    assert {"a_cholesky", "g_cholesky"} < set(blocks(loop)["body.0"])
    loop.optimizer.param_groups[0]["inverse_update_interval"] = 2
    loop.train(classification(2))
    assert {"a_inverse", "g_inverse"} < set(blocks(loop)["body.0"])
    assert not any(key.endswith("_cholesky") for key in blocks(loop)["body.0"])
