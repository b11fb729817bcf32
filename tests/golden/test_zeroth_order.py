"""Zeroth-order optimizers against recorded numbers of others' code.

arXiv:2305.17333, 2402.15173, 2402.11592 and 2406.18060. Directions are those of the recordings.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_curvature.curvature.noise import SingleStreamNoise
from lightning_curvature.optim.forward_gradient import ForwardGradient
from lightning_curvature.optim.hizoo import HiZOO
from lightning_curvature.optim.mezo import MeZO
from lightning_curvature.optim.zo_adam import ZOAdam
from lightning_curvature.optim.zo_conservative import ZOConservative
from lightning_curvature.optim.zo_momentum import ZOMomentum
from lightning_curvature.optim.zo_sign_sgd import ZOSignSGD
from tests.golden.zeroth_files import Recording

FAMILY = "zeroth_order"
# Largest differences of parameters after all steps, and relative ones of the curvature.
REAL = {torch.float64: 1e-10, torch.float32: 1e-4}
REAL_HIZOO_QUADRATIC = 1e-8
REAL_CURVATURE = 1e-8
SCRIPTED = {torch.float64: 1e-12, torch.float32: 5e-6}
SCRIPTED_CURVATURE = {torch.float64: 1e-12, torch.float32: 1e-5}
# Superseded rule, kept by the recordings for documentation.
NOT_OURS = ("hizoo2024",)
STATES = ("momentum_buffer", "exp_avg", "exp_avg_sq")

# A scripted closure is a bare one.
pytestmark = pytest.mark.filterwarnings("ignore:.*has only a closure to ask:RuntimeWarning")


class RoundingHiZOO(HiZOO):
    """Forms the second difference as the recordings did, in the dtype of the model."""

    def _second_difference(self, loss: Tensor, above: Tensor, below: Tensor) -> Tensor:
        dtype = self.param_groups[0]["params"][0].dtype
        loss, above, below = (x.to(dtype) for x in (loss, above, below))
        return ((above + below) - 2 * loss).double()


def choose(recording: Recording) -> tuple[Any, dict[str, Any]]:
    """Return our optimizer for a recording, and arguments of its own."""
    h, method = recording.hyper, recording.method
    by_method: dict[str, tuple[Any, dict[str, Any]]] = {
        "hizoo": (HiZOO, {"hessian_smoothing": h.get("alpha")}),
        "zob_cons": (ZOConservative, {}),
        "zob_fwd": (ForwardGradient, {}),
        "zob_block_coord": (MeZO, {"blockwise": "coordinate"}),
        "zob_block_joint": (MeZO, {"blockwise": "joint"}),
        "nspsa": (MeZO, {"num_samples": h.get("n")}),
        "zob_q": (MeZO, {"num_samples": h.get("n")}),
        "mezo": (MeZO, {}),
    }
    if method != "zob_step":
        return by_method[method]
    # One step function, several optimizers.
    if h.get("trainer") == "zo_adam":
        return ZOAdam, {"betas": (0.9, 0.999), "eps": 1e-8}
    if h.get("trainer") == "zo_sign_opt":
        return ZOSignSGD, {"sign": "scalar"}
    if h.get("mode") == "one_side":
        return MeZO, {"estimator": "one_sided"}
    return ZOMomentum, {"momentum": h["momentum"]}


def make(recording: Recording, model: nn.Module, hizoo: type[HiZOO] = HiZOO) -> Any:
    """Build our optimizer for a recording, with the recorded directions."""
    kind, options = choose(recording)
    kind = hizoo if kind is HiZOO else kind
    if recording.method != "zob_fwd":
        options["perturbation_scale"] = recording.hyper["eps"]
    optimizer = kind(recording.groups(model), lr=recording.hyper["lr"], **options)
    optimizer.noise_source = recording.noise(model)
    return optimizer


def order(recording: Recording) -> tuple[str, ...]:
    """Return the recorded losses in the order in which ours asks for them."""
    if recording.hyper.get("mode") == "one_side":
        return ("loss_zero", "loss_plus")
    if recording.method == "hizoo":
        return ("loss_zero", "loss_plus", "loss_minus")
    if recording.method == "zob_cons":
        return ("loss_zero", "loss_plus", "loss_minus", "loss_try_descent", "loss_try_ascent")
    return ("loss_plus", "loss_minus")


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def compare(
    recording: Recording,
    step: int,
    model: nn.Module,
    optimizer: Any,
    atol: float,
    curvature_rtol: float | None,
) -> int:
    """Compare what was kept after a number of steps, and count it."""
    kept = dict(recording.checkpoints())
    if step not in kept:
        return 0
    torch.testing.assert_close(
        flat(model), kept[step], rtol=0, atol=atol, msg=lambda m: f"{step}: {m}"
    )
    hessian = dict(recording.checkpoints("hess"))
    if step in hessian and curvature_rtol is not None:
        found = flat_state(optimizer, model, "hess_diag")
        torch.testing.assert_close(found, hessian[step].to(found), rtol=curvature_rtol, atol=0)
    for name in STATES:
        if f"opt_{name}_{step}" in recording.arrays:
            found = flat_state(optimizer, model, name)
            expected = recording.vector(f"opt_{name}_{step}").to(found)
            torch.testing.assert_close(found, expected, rtol=0, atol=10 * atol)
    return 1


def flat_state(optimizer: Any, model: nn.Module, name: str) -> Tensor:
    return torch.cat([optimizer.state[p][name].reshape(-1) for p in model.parameters()])


def follow(
    recording: Recording,
    model: nn.Module,
    optimizer: Any,
    take: Callable[[int], None],
    atol: float,
    curvature_rtol: float | None,
) -> None:
    answers: list[Tensor] = []
    optimizer.on_answer = answers.append
    compared = 0
    for step in range(recording.steps):
        take(step)
        compared += compare(recording, step + 1, model, optimizer, atol, curvature_rtol)
    assert compared > 1
    if not answers:
        return
    if recording.method == "zob_cons":
        answers, signed = answers[::2], answers[1::2]
        choices = torch.cat([x[:, 0] / y[:, 0] for x, y in zip(signed, answers, strict=True)])
        assert choices.round(decimals=9).tolist() == recording.arrays["choice"].tolist()
    # Joint blocks come in one answer.
    slopes = torch.cat([answer[:, 0] for answer in answers]).double()
    expected = recording.vector("projected_grad").reshape(-1).double()
    tolerance = 1e-7 if recording.dtype == torch.float64 else 1e-2
    torch.testing.assert_close(slopes, expected, rtol=tolerance, atol=tolerance)


def skip_others(recording: Recording) -> None:
    if recording.method in NOT_OURS:
        pytest.skip("a superseded rule, recorded for documentation")
    if "z" not in recording.arrays:
        pytest.skip("long runs, compared statistically in test_real_model")


def long_run(recording: Recording, name: str, seed: int, steps: int) -> tuple[float, Tensor]:
    """Train on the quadratic with directions of our own; return the loss and H, if there is one."""
    settings, h = recording.meta[name], recording.vector("h_diag")
    w = nn.Parameter(recording.vector("params_0"))
    options = {"lr": settings["lr"], "perturbation_scale": settings["eps"], "seed": seed}
    optimizer = (
        HiZOO([w], hessian_smoothing=settings["alpha"], **options)
        if name == "hizoo"
        else MeZO([w], **options)
    )

    def closure() -> Tensor:
        return 0.5 * (h * w.square()).sum()

    for _ in range(steps):
        optimizer.step(closure)
    return float(closure().detach()), optimizer.state[w].get("hess_diag", h)


def check_long_run(recording: Recording, steps: int, num_seeds: int) -> dict[str, float]:
    """Compare medians over seeds with the recorded ones, in logarithms; return them."""
    medians = {}
    for name in ("mezo", "hizoo"):
        kept = recording.arrays[f"steps_{name}"].tolist()
        last = max(step for step in kept if step <= min(steps, recording.meta[name]["steps"]))
        runs = [long_run(recording, name, seed, last) for seed in range(num_seeds)]
        logs = np.log10([loss for loss, _ in runs])
        recorded = np.log10(recording.arrays[f"loss_{name}"][:, kept.index(last)])
        spread = np.ptp(recorded) + 0.1
        assert abs(np.median(logs) - np.median(recorded)) < spread
        medians[name] = float(10 ** np.median(logs))
        if last == recording.meta[name]["steps"] and name == "hizoo":
            # The fixed point on a quadratic is (d + 2) / 2 times the diagonal, on average.
            ratios = torch.stack([hess for _, hess in runs]) / recording.vector("h_diag")
            expected = np.median(recording.arrays["hess_final"] / recording.arrays["h_diag"])
            assert float(ratios.median()) == pytest.approx(float(expected), rel=0.3)
    return medians


@pytest.mark.slow
def test_long_run(golden_file: Path) -> None:
    """After 12 000 passes HiZOO is far ahead of MeZO on the ill-conditioned quadratic."""
    recording = Recording(golden_file)
    if "z" in recording.arrays:
        pytest.skip("a short run")
    settings = recording.meta
    assert 2 * settings["mezo"]["steps"] == 3 * settings["hizoo"]["steps"]
    medians = check_long_run(recording, 10**9, num_seeds=len(recording.meta["seeds"]))
    assert medians["hizoo"] <= 1e-4 * medians["mezo"]


def test_real_model(golden_file: Path) -> None:
    """Recorded directions, losses of the model itself."""
    recording = Recording(golden_file)
    if "z" not in recording.arrays:
        check_long_run(recording, steps=400, num_seeds=3)
        return
    skip_others(recording)
    if recording.method == "hizoo" and recording.dtype == torch.float32:
        pytest.skip("second differences of float32 losses are round-off")
    model = recording.model()
    optimizer = make(recording, model)
    criterion = optimizer.attach_model(model, recording.loss_fn())

    def take(step: int) -> None:
        inputs, targets = recording.batch(step)
        optimizer.step(lambda: criterion(model(*inputs), *targets))

    atol = REAL[recording.dtype]
    if recording.method == "hizoo" and recording.meta["problem"] == "quad":
        atol = REAL_HIZOO_QUADRATIC
    follow(recording, model, optimizer, take, atol, REAL_CURVATURE)


def test_scripted_losses(golden_file: Path) -> None:
    """Recorded directions and losses."""
    recording = Recording(golden_file)
    skip_others(recording)
    if recording.method == "zob_fwd":
        pytest.skip("looks at a derivative instead of losses; see test_recorded_slopes")
    model = recording.model()
    optimizer = make(recording, model, RoundingHiZOO)

    def take(step: int) -> None:
        losses = iter(recording.losses(step, order(recording)))
        optimizer.step(lambda: torch.tensor(next(losses), dtype=torch.float64))
        assert next(losses, None) is None, "looks at the loss less often than the recording"

    dtype = recording.dtype
    follow(recording, model, optimizer, take, SCRIPTED[dtype], SCRIPTED_CURVATURE[dtype])


def test_recorded_slopes(golden_file: Path) -> None:
    """Recorded directions and slopes, by the replay of a log."""
    recording = Recording(golden_file)
    skip_others(recording)
    if recording.method in ("hizoo", "zob_cons"):
        pytest.skip("the update depends on more than the slope")
    model = recording.model()
    optimizer = make(recording, model)

    def take(step: int) -> None:
        slopes = recording.vector("projected_grad").double()[step].reshape(-1, 1)
        optimizer.replay_step(
            slopes.split(1) if recording.method == "zob_block_coord" else [slopes]
        )

    follow(recording, model, optimizer, take, SCRIPTED[recording.dtype], None)


def test_single_stream(golden_file: Path) -> None:
    """Our own generator in the order of the official codes draws the recorded directions."""
    recording = Recording(golden_file)
    if "z" not in recording.arrays:
        pytest.skip("without directions")
    model = recording.model()
    params = list(model.parameters())
    sizes = [len(block) for block in recording.blocks] if recording.is_blockwise else None
    seeds = recording.arrays["seeds"].tolist()
    source = SingleStreamNoise(seeds, params, block_sizes=sizes)
    expected = recording.vector("z").view(recording.steps, recording.num_samples, -1)
    before = torch.get_rng_state()
    for step in range(recording.steps):
        for sample in range(recording.num_samples):
            drawn = [source(step, sample, index, p) for index, p in enumerate(params)]
            found = torch.cat([x.reshape(-1) for x in drawn])
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected[step, sample])
            # Out of order, too.
            for index in reversed(range(len(params))):
                assert torch.equal(source(step, sample, index, params[index]), drawn[index])
    assert torch.equal(torch.get_rng_state(), before)
