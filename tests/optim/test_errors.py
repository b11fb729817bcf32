"""Every error of the optimizers, with its text."""

import inspect
import math
import re
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature import SGDQLR, AdamQLR
from lightning_curvature.oracle import MissingCapabilityError, WindowOracle
from tests.helpers.optimizer_db import PERIOD, Contract, every_optimizer
from tests.helpers.plain_loop import Loop, classification, network

# Arguments


def not_above(name: str, value: Any, bound: str = "> 0") -> tuple[dict[str, Any], str]:
    return {name: value}, f"Invalid {name}={value!r}: must be {bound}."


def not_in(name: str, value: Any, interval: str) -> tuple[dict[str, Any], str]:
    return {name: value}, f"Invalid {name}={value!r}: must be in {interval}."


def not_steps(name: str, value: Any) -> tuple[dict[str, Any], str]:
    return {name: value}, f"Invalid {name}={value!r}: must be an integer >= 1, in optimizer steps."


def not_one_of(name: str, value: Any, *words: str) -> tuple[dict[str, Any], str]:
    listed = ", ".join(repr(word) for word in words)
    return {name: value}, f"Invalid {name}={value!r}: must be one of {listed}."


SHARED = [
    not_above("lr", -1.0, ">= 0"),
    not_above("lr", math.nan, ">= 0"),
    not_above("damping", -1e-3, ">= 0"),
    not_in("damping_increase_factor", 0.5, "[1, inf)"),
    not_in("damping_increase_factor", math.inf, "[1, inf)"),
    not_in("damping_decrease_factor", 0.0, "(0, 1]"),
    not_in("damping_decrease_factor", 1.5, "(0, 1]"),
    not_above("min_damping", -1.0, ">= 0"),
    not_in("max_damping", 1e-9, "[1e-08, inf]"),
    ({"min_damping": 2.0, "max_damping": 1.0}, "Invalid max_damping=1.0: must be in [2.0, inf]."),
    not_one_of("damping_algorithm", "kfac", "levenberg-marquardt", "decreasing-loss", "fixed"),
    not_steps("damping_update_interval", 0),
    not_one_of("curvature", "ggn", "fisher", "hessian"),
    not_steps("curvature_update_interval", -1),
    not_above("max_lr", 0.0),
    not_above("amplification", 0),
    not_in("lr_ema", 1.0, "[0, 1)"),
    not_in("curvature_ema", -0.1, "[0, 1)"),
    not_above("curvature_ema_init", 0.0),
    not_above("grad_clip_norm", 0.0),
    not_above("direction_clip", -1.0),
    not_above("update_clip_norm", 0.0),
    not_above("weight_decay", -0.1, ">= 0"),
    not_steps("max_failures", 0),
]
ADAM = [
    ({"betas": 0.9}, "Invalid betas=0.9: must be two numbers in [0, 1)."),
    ({"betas": (0.9,)}, "Invalid betas=(0.9,): must be two numbers in [0, 1)."),
    ({"betas": (1.0, 0.9)}, "Invalid betas[0]=1.0: must be in [0, 1)."),
    ({"betas": (0.9, -0.1)}, "Invalid betas[1]=-0.1: must be in [0, 1)."),
    not_above("eps", 0.0),
    not_one_of("quad_model", "true", "taken", "derived", "adam", "adam-sqrt"),
]
SGD = [not_one_of("quad_model", "adam", "taken", "derived")]
VALUES = [(AdamQLR, *case) for case in SHARED + ADAM] + [(SGDQLR, *case) for case in SHARED + SGD]


@pytest.mark.parametrize(("cls", "arguments", "text"), VALUES)
def test_wrong_value(cls: type, arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        cls([nn.Parameter(torch.ones(2))], **arguments)


NUMBERS = [
    "lr",
    "damping",
    "damping_increase_factor",
    "damping_decrease_factor",
    "min_damping",
    "max_damping",
    "max_lr",
    "amplification",
    "lr_ema",
    "curvature_ema",
    "curvature_ema_init",
    "grad_clip_norm",
    "direction_clip",
    "update_clip_norm",
    "weight_decay",
]
INTEGERS = ["damping_update_interval", "curvature_update_interval", "max_failures"]


@pytest.mark.parametrize("cls", [AdamQLR, SGDQLR])
@pytest.mark.parametrize("name", NUMBERS)
def test_not_a_number(cls: type, name: str) -> None:
    text = f"Invalid {name}='0.1': must be a number, got str."
    with pytest.raises(TypeError, match=f"^{re.escape(text)}$"):
        cls([nn.Parameter(torch.ones(2))], **{name: "0.1"})


@pytest.mark.parametrize("cls", [AdamQLR, SGDQLR])
@pytest.mark.parametrize("name", INTEGERS)
def test_not_an_integer(cls: type, name: str) -> None:
    text = f"Invalid {name}=2.0: must be an integer >= 1, in optimizer steps, got float."
    with pytest.raises(TypeError, match=f"^{re.escape(text)}$"):
        cls([nn.Parameter(torch.ones(2))], **{name: 2.0})


@pytest.mark.parametrize("cls", [AdamQLR, SGDQLR])
def test_every_argument_is_checked(cls: type) -> None:
    """Except those that are true or false."""
    tested = {name for other, case, _ in VALUES if other is cls for name in case}
    for name, parameter in inspect.signature(cls).parameters.items():
        is_switch = isinstance(parameter.default, bool) or name == "foreach"
        assert (name in tested) != (is_switch or name == "params"), name


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
@pytest.mark.parametrize("cls", [AdamQLR, SGDQLR])
def test_arguments_of_a_group_are_checked_too(cls: type, name: str) -> None:
    text = f"^Invalid {name}=-1.0: must be >= 0.$"
    optimizer = cls([nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match=text):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], name: -1.0})
    assert len(optimizer.param_groups) == 1


@every_optimizer
def test_no_parameters(contract: Contract) -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        contract.make([])


# Attaching


@every_optimizer
def test_no_oracle(contract: Contract) -> None:
    if not contract.info.asks:
        pytest.skip("asks nothing")
    model = network()
    optimizer = contract.make(model.parameters())
    F.cross_entropy(model(classification(1)[0][0]), classification(1)[0][1]).backward()
    before = [p.detach().clone() for p in model.parameters()]
    text = (
        f"{contract.info.cls.__name__} has no curvature oracle. Use strategy='ddp_curvature' / "
        "'single_device_curvature', or add CurvatureCallback() to Trainer(callbacks=...), or call "
        "optimizer.attach_model(model, loss_fn) in a plain loop. (Learning-rate finder runs drop "
        "callbacks: use the strategy.)"
    )
    with pytest.raises(MissingCapabilityError, match=f"^{re.escape(text)}$"):
        optimizer.step()
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, old)


@every_optimizer
def test_a_closure_once_and_never_again(contract: Contract) -> None:
    """What a bare closure attached needs one in every step that asks."""
    if not contract.records or contract.needs_module:
        pytest.skip("does not ask the closure")
    model = network()
    optimizer = contract.make(model.parameters())
    (x, y), *_ = classification(1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    with pytest.warns(RuntimeWarning, match="has only a closure to ask"):
        optimizer.step(closure)
    for _ in range(PERIOD - 1 if contract.intervals else 0):
        if not optimizer.wants_record():
            optimizer.step()
    with pytest.raises(MissingCapabilityError, match="evaluates the loss again, which a loop"):
        optimizer.step()


class DeafOracle(WindowOracle):
    """Answers nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.capabilities = frozenset()


@every_optimizer
def test_an_oracle_that_cannot_answer(contract: Contract) -> None:
    missing = contract.info.asks
    if not missing:
        pytest.skip("asks nothing")
    loop = Loop(network(), contract.make)
    present = loop.optimizer.oracle
    text = (
        f"{contract.info.cls.__name__} asks for {sorted(missing)}, which DeafOracle cannot answer; "
        "it offers []."
    )
    with pytest.raises(MissingCapabilityError, match=f"^{re.escape(text)}$"):
        loop.optimizer.attach(DeafOracle(list(loop.model.parameters()), loop.model))
    assert loop.optimizer.oracle is present
    loop.train(classification(1))


@every_optimizer
def test_attaching_a_model_that_lacks_parameters(contract: Contract) -> None:
    if not contract.info.asks:
        pytest.skip("asks nothing")
    model, stranger = network(), nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = contract.make([*model.parameters(), stranger])
    text = (
        "1 of 5 optimized parameters are not in the attached Sequential: its loss cannot be "
        "evaluated along them. Attach the module that holds all parameters of the optimizer."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        optimizer.attach_model(model, F.cross_entropy)
    assert optimizer.oracle is None
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


@every_optimizer
def test_attaching_again_replaces(contract: Contract) -> None:
    if not contract.info.asks:
        pytest.skip("asks nothing")
    batches = classification(4)
    plain = Loop(network(), contract.make)
    plain.train(batches)
    loop = Loop(network(), contract.make)
    loop.train(batches[:2])
    loop.criterion = loop.optimizer.attach_model(loop.model, F.cross_entropy, directional="jvp")
    assert len(loop.model._forward_pre_hooks) == len(loop.model._forward_hooks) == 1
    loop.train(batches[2:])
    assert torch.equal(loop.theta(), plain.theta())
    loop.optimizer.detach()
    assert not loop.model._forward_pre_hooks
    assert not loop.model._forward_hooks
    with pytest.raises(MissingCapabilityError, match="has no curvature oracle"):
        loop.step(*batches[0])


@every_optimizer
def test_unknown_method(contract: Contract) -> None:
    model = network()
    text = "Invalid directional='exact': must be one of 'auto', 'fd', 'jvp'."
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        contract.make(model.parameters()).attach_model(model, F.cross_entropy, directional="exact")


@every_optimizer
def test_another_output_than_the_models_last(contract: Contract) -> None:
    if not contract.records:
        pytest.skip("records nothing")
    loop = Loop(network(), contract.make)
    x, y = classification(1)[0]
    text = (
        "The attached loss must be called with the very output of the attached model's last "
        "forward pass, so that both can be evaluated again. For anything else put the whole "
        "computation into a closure and call optimizer.step(closure)."
    )
    with pytest.raises(RuntimeError, match=f"^{re.escape(text)}$"):
        loop.criterion(2 * loop.model(x), y)


@every_optimizer
def test_a_changed_batch(contract: Contract) -> None:
    if not contract.records:
        pytest.skip("records nothing")
    loop = Loop(network(), contract.make)
    x, y = classification(1)[0]
    output = loop.model(x)
    x.mul_(2.0)
    with pytest.raises(
        RuntimeError, match=r"changed its batch in place \(tensors of shape \[8, 5\]"
    ):
        loop.criterion(output, y)


def test_a_loss_of_unknown_curvature() -> None:
    model = network()
    loop = Loop(model, partial(AdamQLR), lambda output, target: output.square().mean())
    with pytest.raises(RuntimeError, match=r"^The curvature of the loss is unknown: no supported"):
        loop.step(*classification(1)[0])
    # Nothing is left half done: a known loss trains on.
    loop.criterion = loop.optimizer.attach_model(model, F.cross_entropy)
    loop.step(*classification(1)[0])
    assert loop.stat("skipped_steps") == 0
