"""Tests of MeZO in plain loops: traces, failures, state and replays."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.plain_loop import Loop, classification, network
from tests.helpers.scripted import saved_and_loaded
from tests.helpers.zeroth_order import (
    ONE_OF_EACH,
    RESTORES,
    STEPS,
    assert_equal,
    by_layer,
    clones,
    closure_of,
    ids,
    mezo,
)

# Some tests have a bare closure.
pytestmark = pytest.mark.filterwarnings("ignore:.*has only a closure to ask:RuntimeWarning")


# No traces


@pytest.mark.parametrize("options", ONE_OF_EACH, ids=ids)
def test_no_gradients_and_no_graph(options: dict[str, Any]) -> None:
    loop = Loop(network(), mezo(**options), groups=by_layer)
    graphs = []
    ((x, y),) = classification(1)

    def closure() -> Tensor:
        loss = loop.criterion(loop.model(x), y)
        graphs.append(loss.grad_fn)
        assert loop.model(x).grad_fn is None
        return loss

    loop.optimizer.step(closure)
    assert graphs
    assert all(graph is None for graph in graphs)
    output = loop.model(x)
    assert output.grad_fn is None
    loss = loop.criterion(output, y)
    loss.backward()
    loop.optimizer.step()
    assert all(p.grad is None for p in loop.model.parameters())
    assert all(p.requires_grad for p in loop.model.parameters())
    assert not any(loop.optimizer.state.values())


def test_backward_is_not_needed() -> None:
    loop, other = Loop(network(), mezo()), Loop(network(), mezo())
    for x, y in classification(2):
        loop.step(x, y)
        other.criterion(other.model(x), y)
        other.optimizer.step()
    assert_equal(list(other.model.parameters()), clones(loop.model))


def noisy() -> nn.Module:
    """A network with dropout and batch normalization."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layers = [nn.Linear(5, 30), nn.BatchNorm1d(30), nn.Dropout(0.5), nn.Linear(30, 4)]
        return nn.Sequential(*layers).double()


@pytest.mark.parametrize("options", ONE_OF_EACH[:4], ids=ids)
def test_dropout_has_one_mask_per_step(options: dict[str, Any]) -> None:
    """With masks of its own for every pass the slope would be 1 / eps."""
    if options.get("estimator") == "residual":
        pytest.skip("compares different steps")
    ((x, y),) = classification(1)
    for way in ("closure", "loop"):
        loop = Loop(noisy(), mezo(perturbation_scale=1e-7, **options))
        answers: list[Tensor] = []
        loop.optimizer.on_answer = answers.append
        for _ in range(5):
            if way == "closure":
                loop.optimizer.step(closure_of(loop, x, y))
            else:
                loop.step(x, y)
        assert float(torch.cat(answers).abs().max()) < 100


def test_a_step_looks_like_one_forward_pass() -> None:
    """To the global generator and the statistics of batch normalization."""
    ((x, y),) = classification(1)
    plain, loop = noisy(), Loop(noisy(), mezo(num_samples=3, lr=0.0, restore="snapshot"))
    torch.manual_seed(4)
    loop.optimizer.step(closure_of(loop, x, y))
    state = torch.get_rng_state()
    torch.manual_seed(4)
    plain(x)
    assert torch.equal(torch.get_rng_state(), state)
    found, expected = dict(loop.model.named_buffers()), dict(plain.named_buffers())
    assert int(found["1.num_batches_tracked"]) == 1
    for name, value in expected.items():
        # Those of the first evaluation, which is displaced.
        torch.testing.assert_close(found[name], value, rtol=0.1, atol=1e-2)


def test_eval_mode() -> None:
    """All passes in eval mode; flags come back."""
    ((x, y),) = classification(1)
    for way in ("closure", "loop"):
        loop = Loop(noisy(), mezo(model_mode="eval"))
        loop.model[1].eval()
        modes = []
        loop.model[2].register_forward_hook(lambda m, *_, modes=modes: modes.append(m.training))
        before = {name: b.clone() for name, b in loop.model.named_buffers()}
        state = torch.get_rng_state()
        if way == "closure":
            loop.optimizer.step(closure_of(loop, x, y))
        else:
            loop.step(x, y)
        assert modes
        assert not any(modes)
        assert [m.training for m in loop.model] == [True, False, True, True]
        assert torch.equal(torch.get_rng_state(), state)
        for name, value in loop.model.named_buffers():
            assert torch.equal(value, before[name])


# Failures


@pytest.mark.parametrize("restore", RESTORES)
@pytest.mark.parametrize("options", [*ONE_OF_EACH, {"layer_scale": "gradient_norm"}], ids=ids)
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_evaluation(
    error: type[BaseException], options: dict[str, Any], restore: str
) -> None:
    """The parameters of the time before come back, whichever evaluation it was."""
    ((x, y),) = classification(1)
    for call in itertools.count(1):
        model = network()
        loop = Loop(
            model, mezo(lr=0.0, restore=restore, **options), groups=lambda m: m.parameters()
        )
        before, calls = clones(model), []

        def closure(loop: Loop = loop, calls: Any = calls, call: int = call) -> Tensor:
            calls.append(1)
            if len(calls) == call:
                raise error
            return loop.criterion(loop.model(x), y)

        try:
            loop.optimizer.step(closure)
        except error:
            pass
        else:
            assert len(calls) < call
            break
        assert_equal(list(model.parameters()), before, atol=0 if restore == "snapshot" else 1e-14)
        # And the next step is an ordinary one.
        loop.optimizer.step(closure_of(loop, x, y))
        assert_equal(list(model.parameters()), before, atol=0 if restore == "snapshot" else 1e-14)
    assert call > 1


@pytest.mark.parametrize("restore", RESTORES)
@pytest.mark.parametrize("options", ONE_OF_EACH, ids=ids)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_loss_that_is_not_finite(bad: float, options: dict[str, Any], restore: str) -> None:
    """The step is left out and counted; later ones are as if it had not been, but for the seed."""
    model = network()
    optimizer = mezo(restore=restore, **options)(model.parameters())
    (x, y), (x2, y2) = classification(2)
    optimizer.step(lambda: F.cross_entropy(model(x), y))
    before = clones(model)
    calls = []

    def closure() -> Tensor:
        calls.append(1)
        factor = bad if len(calls) == 1 else 1.0
        return F.cross_entropy(model(x), y) * factor

    optimizer.step(closure)
    assert_equal(list(model.parameters()), before, atol=0 if restore == "snapshot" else 1e-14)
    assert float(optimizer.stats["skipped_steps"]) == 1
    optimizer.step(lambda: F.cross_entropy(model(x2), y2))
    assert float(optimizer.stats["skipped_steps"]) == 1
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    moved = [
        float((p.detach() - b).norm()) for p, b in zip(model.parameters(), before, strict=True)
    ]
    assert min(moved) > 1e-6


def test_too_many_failures() -> None:
    model = network()
    optimizer = mezo(max_failures=3)(model.parameters())
    ((x, _),) = classification(1)
    before = clones(model)
    for _ in range(2):
        optimizer.step(lambda: model(x).sum() * math.nan)
    with pytest.raises(RuntimeError, match="MeZO found no usable step 3 times in a row"):
        optimizer.step(lambda: model(x).sum() * math.nan)
    assert_equal(list(model.parameters()), before, atol=1e-14)


# State


@pytest.mark.parametrize("restore", RESTORES)
@pytest.mark.parametrize(
    "options",
    [*ONE_OF_EACH, {"layer_scale": "gradient_norm", "layer_scale_update_interval": 3}],
    ids=ids,
)
def test_resume(options: dict[str, Any], restore: str, tmp_path: Path) -> None:
    """Bit for bit, from a file without pickled classes."""
    batches = classification(6)

    def start() -> Loop:
        return Loop(network(), mezo(restore=restore, **options), groups=by_layer)

    def train(loop: Loop, some: Any) -> None:
        for x, y in some:
            loop.optimizer.step(closure_of(loop, x, y))

    whole, first, second = start(), start(), start()
    train(whole, batches)
    train(first, batches[:2])
    saved = {"model": first.model.state_dict(), "optimizer": first.optimizer.state_dict()}
    loaded = saved_and_loaded(saved, tmp_path / "saved.ckpt")
    second.model.load_state_dict(loaded["model"])
    second.optimizer.load_state_dict(loaded["optimizer"])
    train(second, batches[2:])
    assert_equal(list(second.model.parameters()), clones(whole.model))
    assert {k: float(v) for k, v in second.optimizer.stats.items()} == {
        k: float(v) for k, v in whole.optimizer.stats.items()
    }


def test_mask_is_saved(tmp_path: Path) -> None:
    def start() -> Loop:
        return Loop(network(), mezo())

    first, second = start(), start()
    weight = next(iter(first.model.parameters()))
    first.optimizer.set_mask(weight, torch.tensor([4, 1]))
    (x, y), (x2, y2) = classification(2)
    first.optimizer.step(closure_of(first, x, y))
    saved = saved_and_loaded(first.optimizer.state_dict(), tmp_path / "saved.ckpt")
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(saved)
    for loop in (first, second):
        loop.optimizer.step(closure_of(loop, x2, y2))
    assert_equal(list(second.model.parameters()), clones(first.model))


@pytest.mark.parametrize("restore", RESTORES)
@pytest.mark.parametrize("options", ONE_OF_EACH, ids=ids)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replay(dtype: torch.dtype, options: dict[str, Any], restore: str) -> None:
    """The answers of a run take the same steps without the loss, bit for bit."""
    loop = Loop(network(dtype=dtype), mezo(restore=restore, **options), groups=by_layer)
    log: list[list[Tensor]] = []
    optimizer: Any = loop.optimizer
    optimizer.on_answer = lambda answer: log[-1].append(answer.clone())
    moves = []
    for x, y in classification(STEPS, dtype=dtype):
        log.append([])
        optimizer.step(closure_of(loop, x, y))
        moves.append(getattr(optimizer, "main_moves", None))
    again = network(dtype=dtype)
    replaying: Any = mezo(restore=restore, **options)(by_layer(again))
    replaying.stream_indices = optimizer.stream_indices
    for answers in log:
        replaying.replay_step(answers)
    assert_equal(list(again.parameters()), clones(loop.model))
    with pytest.raises(ValueError, match="fewer answers"):
        replaying.replay_step([])
