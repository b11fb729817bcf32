"""The free self-check on every route and window (strategies/recorder.py, oracle/window.py).

The slope measured by an extra pass equals <grad, d> to machine precision only if the extra pass
sees the data, weights, dropout masks, batch statistics and accumulation weights of the gradient.
"""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor

from lightning_curvature import AdamQLR, CurvatureCallback, SingleDeviceCurvatureStrategy
from tests.helpers.dense import DenseModel, Head, flatten, quadratic
from tests.helpers.modules import (
    MakeOptimizer,
    loader,
    mlp_module,
    norm_dropout_module,
    sequences,
    transformer_module,
    vectors,
)
from tests.helpers.probing import (
    ROUTES,
    Probe,
    assert_bitwise,
    make_trainer,
    parameters_and_buffers,
)

EXACT = 1e-12
BATCHES = 5  # 20 examples in batches of 4: windows of 2 and 3 end with a short one
EPOCHS = 2


@pytest.fixture
def forward_mode() -> Iterator[None]:
    """Make `auto` choose forward mode, as it does when float32 products are not exact."""
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


def fit(
    route: str,
    make_optimizer: MakeOptimizer,
    make_module: Any = norm_dropout_module,
    data: Any = None,
    directional: str = "auto",
    **kwargs: Any,
) -> tuple[LightningModule, Trainer]:
    """Seed, build and fit."""
    seed_everything(3)
    module = make_module(make_optimizer)
    settings = {"precision": "64-true", "max_epochs": EPOCHS, **kwargs}
    trainer = make_trainer(route, directional=directional, **settings)
    trainer.fit(module, loader(vectors() if data is None else data, shuffle=True))
    return module, trainer


@pytest.mark.usefixtures("forward_mode")
@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("route", ROUTES)
def test_self_check_in_the_trainer(route: str, accumulate: int) -> None:
    """Strategy, callback and auto-attach; every step, also those of a short last window."""
    _, trainer = fit(route, Probe, accumulate_grad_batches=accumulate)
    probe = trainer.optimizers[0]
    assert len(probe.deviations) == EPOCHS * math.ceil(BATCHES / accumulate)
    assert max(probe.deviations) <= EXACT


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_self_check_in_a_plain_loop(accumulate: int) -> None:
    """The same with `attach_model`; the weight 1/k is read off the backward."""
    seed_everything(3)
    module = norm_dropout_module(Probe)
    model = module.network.double()
    probe = Probe(model.parameters(), passes=["directional", "loss"])
    criterion = probe.attach_model(model, F.cross_entropy, directional="jvp")
    batches = [(x.double(), y) for x, y in loader(vectors())]
    for _ in range(EPOCHS):
        for start in range(0, BATCHES, accumulate):
            probe.zero_grad()
            for x, y in batches[start : start + accumulate]:
                (criterion(model(x), y) / accumulate).backward()
            probe.step()
    assert len(probe.deviations) == EPOCHS * math.ceil(BATCHES / accumulate)
    assert max(probe.deviations) <= EXACT
    assert all(torch.equal(base, again) for base, again in probe.losses)


def test_self_check_in_a_plain_loop_with_closure() -> None:
    """`step(closure)` with an attached model."""
    seed_everything(3)
    model = norm_dropout_module(Probe).network.double()
    probe = Probe(model.parameters(), passes=["directional", "loss"])
    criterion = probe.attach_model(model, F.cross_entropy, directional="jvp")
    calls = []
    for x, y in loader(vectors()):

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            calls.append(1)
            probe.zero_grad()
            loss = criterion(model(x.double()), y)
            loss.backward()
            return loss

        loss = probe.step(closure)
        assert torch.equal(loss.detach(), probe.losses[-1][0])
    assert len(probe.deviations) == BATCHES
    assert max(probe.deviations) <= EXACT
    assert all(torch.equal(base, again) for base, again in probe.losses)


def test_self_check_when_the_loss_is_divided_in_place() -> None:
    """`loss /= k` on what the criterion returned."""
    seed_everything(3)
    model = mlp_module(Probe).network.double()
    probe = Probe(model.parameters(), passes=["loss", "directional"])
    criterion = probe.attach_model(model, F.cross_entropy, directional="jvp")
    expected = []
    for x, y in loader(vectors()):
        probe.zero_grad()
        loss = criterion(model(x.double()), y)
        expected.append(loss.item() / 2)
        loss /= 2
        loss.backward()
        probe.step()
    assert max(probe.deviations) <= EXACT
    assert [base.item() for base, _ in probe.losses] == pytest.approx(expected, rel=1e-14)
    assert all(torch.equal(base, again) for base, again in probe.losses)


@pytest.mark.parametrize("route", ["strategy", "callback"])
@pytest.mark.parametrize(("directional", "tolerance"), [("jvp", EXACT), ("fd", 1e-4)])
def test_self_check_of_a_transformer(route: str, directional: str, tolerance: float) -> None:
    """Attention with dropout, both methods selected by name."""
    _, trainer = fit(
        route, Probe, transformer_module, sequences(), directional, accumulate_grad_batches=2
    )
    probe = trainer.optimizers[0]
    assert len(probe.deviations) == EPOCHS * 2
    assert max(probe.deviations) <= tolerance


@pytest.mark.parametrize("route", ROUTES)
def test_self_check_in_mixed_precision(route: str) -> None:
    """Under bf16 autocast `auto` takes forward mode, whose slope is as good as the gradient."""
    _, trainer = fit(
        route, lambda p: Probe(p, passes=["directional", "loss"]), precision="bf16-mixed"
    )
    probe = trainer.optimizers[0]
    squares = [((one - two) ** 2, two**2) for one, two in probe.slopes]
    errors, sizes = (torch.stack(part).sum().item() for part in zip(*squares, strict=True))
    assert math.sqrt(errors / sizes) < 0.02
    assert all(torch.equal(base, again) for base, again in probe.losses)


@pytest.mark.parametrize("route", ["strategy", "callback"])
def test_window_equals_one_large_batch(route: str) -> None:
    """Two micro-batches of 4 give the curvature and the loss of one batch of 8."""

    def run(batch_size: int, accumulate: int) -> Probe:
        seed_everything(3)
        module = mlp_module(lambda params: Probe(params, passes=["directional", "loss"]))
        trainer = make_trainer(
            route, directional="jvp", precision="64-true", accumulate_grad_batches=accumulate
        )
        trainer.fit(module, loader(vectors(16), batch_size))
        return trainer.optimizers[0]

    whole, parts = run(8, 1), run(4, 2)
    assert len(parts.curvatures) == len(whole.curvatures) == 2
    torch.testing.assert_close(
        torch.stack(parts.curvatures), torch.stack(whole.curvatures), rtol=1e-9, atol=0
    )
    for one, two in zip(parts.losses, whole.losses, strict=True):
        assert one[0].item() == pytest.approx(two[0].item(), rel=1e-12)
        assert torch.equal(one[0], one[1])


class FirstWindow(Probe):
    """Compares the first step's curvature with a dense matrix of its micro-batches."""

    expected: float | None = None

    def _update(self, params: list[Tensor], oracle: Any) -> None:
        if self.expected is None:
            network, batches, accumulate = self.reference
            direction = flatten(self.direction(params))
            total = 0.0
            for x, y in batches:
                heads = [Head(lambda z: z, lambda z, y=y: F.cross_entropy(z, y))]
                total += quadratic(DenseModel(network).ggn((x,), heads), direction).item()
            self.expected = total / accumulate
        super()._update(params, oracle)


@pytest.mark.parametrize(("batches", "accumulate"), [(2, 2), (3, 3), (1, 2), (2, 3)])
def test_window_against_dense_matrix(batches: int, accumulate: int) -> None:
    """Full and short windows: every micro-batch weighs 1/k, as Lightning weighs its gradient."""
    data = vectors(4 * batches)
    pairs = [(x.double(), y) for x, y in loader(data)]

    def make(params: Any) -> FirstWindow:
        probe = FirstWindow(params)
        probe.reference = (module.network, pairs, accumulate)
        return probe

    seed_everything(3)
    module = mlp_module(make)
    trainer = make_trainer(
        "strategy", directional="jvp", precision="64-true", accumulate_grad_batches=accumulate
    )
    trainer.fit(module, loader(data))
    probe = trainer.optimizers[0]
    assert probe.curvatures[0].item() == pytest.approx(probe.expected, rel=1e-10)
    assert probe.deviations[0] <= EXACT


@pytest.mark.usefixtures("forward_mode")
def test_accumulation_that_changes_between_epochs() -> None:
    """`GradientAccumulationScheduler`."""
    scheduler = GradientAccumulationScheduler({0: 1, 1: 2, 2: 3})
    for route in ROUTES:
        _, trainer = fit(route, Probe, callbacks=[scheduler], max_epochs=3)
        probe = trainer.optimizers[0]
        assert len(probe.deviations) == 5 + 3 + 2
        assert max(probe.deviations) <= EXACT


@pytest.mark.parametrize(
    ("route", "make"),
    [
        ("strategy", lambda: {"strategy": SingleDeviceCurvatureStrategy(window="last")}),
        ("callback", lambda: {"callbacks": [CurvatureCallback(window="last")]}),
    ],
)
def test_window_last_asks_one_micro_batch(route: str, make: Any) -> None:
    """`window="last"` runs one forward per question and does not take that for an error."""
    forwards: list[int] = []

    def count(params: Any) -> Probe:
        module.network.register_forward_hook(lambda *_: forwards.append(1))
        return Probe(params, passes=["directional"])

    seed_everything(3)
    module = mlp_module(count)
    trainer = make_trainer("none", accumulate_grad_batches=2, **make())
    trainer.fit(module, loader(vectors(16)))
    assert len(forwards) == 4 + 2


@pytest.mark.parametrize(
    "kwargs",
    [{"gradient_clip_val": 1e-3}, {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}],
    ids=["norm", "value"],
)
@pytest.mark.parametrize("route", ["strategy", "callback"])
def test_slope_is_that_of_the_loss_under_clipping(route: str, kwargs: dict[str, Any]) -> None:
    """Clipping shrinks the gradient the optimizer sees, not the slope the oracle measures."""

    class Ones(Probe):
        def direction(self, params: Any) -> list[Tensor]:
            return [torch.ones_like(p) for p in params]

    _, free = fit(route, Ones, mlp_module, directional="jvp")
    _, clipped = fit(route, Ones, mlp_module, directional="jvp", **kwargs)
    measured, seen = clipped.optimizers[0].slopes[0]
    assert measured.item() == free.optimizers[0].slopes[0][0].item()
    assert abs(seen.item()) < 0.1 * abs(measured.item())


def _adamqlr(params: Any) -> AdamQLR:
    return AdamQLR(params, max_lr=0.1)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("directional", ["fd", "jvp"])
@pytest.mark.parametrize("make", [lambda p: Probe(p, follow_slope=True), _adamqlr])
def test_strategy_and_callback_are_bit_identical(
    make: MakeOptimizer, directional: str, accumulate: int
) -> None:
    """The same answers, to the last bit, whichever route attached the oracle."""
    results = [
        parameters_and_buffers(
            fit(
                route,
                make,
                directional=directional,
                precision="32-true",
                accumulate_grad_batches=accumulate,
            )[0]
        )
        for route in ("strategy", "callback")
    ]
    assert_bitwise(results[0], results[1])


def test_auto_attach_is_bit_identical_too() -> None:
    """With the method left to `auto` all three routes agree."""
    results = [
        parameters_and_buffers(fit(route, _adamqlr, precision="32-true")[0]) for route in ROUTES
    ]
    assert_bitwise(results[1], results[0])
    assert_bitwise(results[2], results[0])


def test_routes_do_not_add_up() -> None:
    """Strategy and callback together, beside the entry point: each question is answered once."""
    forwards: list[int] = []

    def count(params: Any) -> Probe:
        module.network.register_forward_hook(lambda *_: forwards.append(1))
        return Probe(params, passes=["directional", "loss"])

    seed_everything(3)
    module = mlp_module(count)
    trainer = make_trainer("strategy", callbacks=[CurvatureCallback()])
    trainer.fit(module, loader(vectors(8)))
    assert len(forwards) == 2 * (1 + 2)
