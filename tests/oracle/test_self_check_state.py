"""What the self-check has learned goes into the checkpoint, so that a resumed run goes on alike."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_curvature import AdamQLR
from lightning_curvature.oracle.window import WindowOracle
from tests.helpers.optimizer_db import identical
from tests.helpers.plain_loop import Loop, classification, network


class Rounding(nn.Module):
    """Rounds its input while ``rough``, with the gradient of the identity.

    Finite differences see a step function; forward mode follows the gradient.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()
        self.rough = True

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner[1](self.inner[0](x))
        if self.rough:
            hidden = hidden + ((8 * hidden).round() / 8 - hidden).detach()
        return self.inner[2](hidden)


def _loop() -> Loop:
    return Loop(Rounding(), AdamQLR, directional="auto")


def _learned() -> Loop:
    """Return a loop that has changed to forward mode, though its model is smooth by now."""
    loop = _loop()
    with pytest.warns(RuntimeWarning, match="going on with 'jvp'"):
        loop.train(classification(1))
    loop.model.rough = False
    return loop


def _method(loop: Loop) -> Any:
    assert isinstance(loop.optimizer.oracle, WindowOracle)
    return loop.optimizer.oracle.method


@pytest.mark.parametrize("first", ["attach", "load"])
def test_a_resumed_run_keeps_the_method(first: str) -> None:
    """... and so ends bit for bit where the whole run does."""
    whole = _learned()
    batches = classification(60, seed=7)
    whole.train(batches[:5])
    saved = copy.deepcopy([whole.model.state_dict(), whole.optimizer.state_dict()])
    whole.train(batches[5:])  # over a reading of the self-check

    resumed = _loop()
    resumed.model.rough = False
    resumed.model.load_state_dict(saved[0])
    resumed.optimizer.load_state_dict(saved[1])
    if first == "load":
        resumed.criterion = resumed.optimizer.attach_model(
            resumed.model, nn.functional.cross_entropy
        )
    resumed.train(batches[5:])
    assert _method(resumed) == _method(whole) == "jvp"
    assert torch.equal(resumed.theta(), whole.theta())
    assert identical(resumed.optimizer.state_dict(), whole.optimizer.state_dict())


def test_detaching_does_not_forget() -> None:
    """A fit that goes on later, and a copy, keep the method too."""
    loop = _learned()
    state = loop.optimizer.state_dict()
    loop.optimizer.detach()
    assert identical(loop.optimizer.state_dict(), state)
    loop.criterion = loop.optimizer.attach_model(loop.model, nn.functional.cross_entropy)
    loop.train(classification(1))
    assert _method(loop) == "jvp"


def test_another_precision_starts_anew() -> None:
    """What was learned in full precision says nothing where forward mode is natural anyway."""
    loop = _loop()
    loop.model.rough = False
    loop.train(classification(3))
    assert _method(loop) == "fd"
    state = loop.optimizer.state_dict()
    half = Loop(Rounding().to(torch.bfloat16), AdamQLR, directional="auto")
    half.model.rough = False
    half.optimizer.load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        half.train(classification(1, dtype=torch.bfloat16))
    assert _method(half) == "jvp"
    assert half.optimizer.state_dict()["curvature"]["oracle"]["asks"] == 1


def test_a_chosen_method_wins() -> None:
    """The user's word stands over the checkpoint's."""
    state = _learned().optimizer.state_dict()
    loop = Loop(Rounding(), AdamQLR, directional="fd")
    loop.model.rough = False
    loop.optimizer.load_state_dict(state)
    loop.train(classification(1))
    assert _method(loop) == "fd"


def test_an_interrupted_second_opinion_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The method goes into checkpoints, also into one that is written on the exception."""
    loop = _loop()

    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("lightning_curvature.oracle.window.forward_mode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            loop.train(classification(1))
    assert _method(loop) == "fd"
