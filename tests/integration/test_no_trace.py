"""Extra passes leave no trace in a real Trainer (oracle/extra_pass.py, strategies/recorder.py).

A run whose optimizer asks several questions per step is compared, bit for bit, with the same run
that asks nothing and with torch's own AdamW.
"""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torchmetrics import Metric

from lightning_curvature import AdamQLR
from tests.helpers.modules import Everything, images, loader
from tests.helpers.probing import (
    ROUTES,
    Probe,
    assert_bitwise,
    make_trainer,
    parameters_and_buffers,
)

LEARNING_RATE = 1e-2
QUESTIONS = ("directional", "loss", "directional", "loss")
COUNTED = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_train_epoch_end",
    "on_validation_batch_end",
)


def _plain(value: Any) -> Any:
    """Turn tensors inside containers into something that compares by bits."""
    if isinstance(value, Tensor):
        return (str(value.dtype), value.detach().double().reshape(-1).tolist())
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value


def _metric_states(module: LightningModule) -> dict[str, Any]:
    return {
        name: _plain(
            {**metric.metric_state, "count": metric.update_count, "called": metric.update_called}
        )
        for name, metric in module.named_modules()
        if isinstance(metric, Metric)
    }


def random_streams() -> dict[str, Any]:
    """Return the states of the three global random streams."""
    return {
        "torch": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "numpy": [str(part) for part in np.random.get_state(legacy=False).items()],  # noqa: NPY002
    }


class Watch(Callback):
    """Write down, after every batch, all that could have changed."""

    def __init__(self) -> None:
        self.batches: list[dict[str, Any]] = []
        self.epochs: list[dict[str, Any]] = []
        self.counts = dict.fromkeys(COUNTED, 0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any
    ) -> None:
        """Note outputs, metrics and random streams."""
        self.counts["on_train_batch_end"] += 1
        self.batches.append(
            {
                "outputs": _plain(outputs),
                "logged": _plain(dict(trainer.logged_metrics)),
                "progress": _plain(dict(trainer.progress_bar_metrics)),
                "metrics": _metric_states(pl_module),
                "random": random_streams(),
                "buffers": _plain(dict(pl_module.named_buffers())),
            }
        )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what the epoch logged."""
        self.counts["on_train_epoch_end"] += 1
        self.epochs.append(_plain(dict(trainer.callback_metrics)))


def _counting(name: str) -> Callable[..., None]:
    def hook(self: Watch, *args: Any) -> None:
        self.counts[name] += 1

    return hook


for _name in COUNTED:
    if _name not in vars(Watch):
        setattr(Watch, _name, _counting(_name))


def run(
    route: str,
    make_optimizer: Callable[[Any], torch.optim.Optimizer],
    directory: Path,
    *,
    spectral: bool = True,
    directional: str = "auto",
    **kwargs: Any,
) -> dict[str, Any]:
    """Train two shuffled epochs and return everything there is to compare."""
    seed_everything(17)
    module = Everything(make_optimizer, spectral)
    watch = Watch()
    logger = CSVLogger(directory, name="log", version=0)
    trainer = make_trainer(
        route,
        directional=directional,
        callbacks=[watch],
        logger=logger,
        max_epochs=2,
        **kwargs,
    )
    attributes = set(vars(module))
    strategy_attributes = set(vars(trainer.strategy))
    trainer.fit(module, loader(images(20), shuffle=True), loader(images(8, seed=77)))
    # The Trainer itself leaves a few attributes; a patched method would be callable.
    patched = [
        f"{type(owner).__name__}.{name}"
        for owner, before in ((module, attributes), (trainer.strategy, strategy_attributes))
        for name, value in vars(owner).items()
        if name not in before and callable(value) and not isinstance(value, torch.nn.Module)
    ]
    (log,) = directory.rglob("metrics.csv")
    return {
        "tensors": parameters_and_buffers(module),
        "batches": watch.batches,
        "epochs": watch.epochs,
        "counts": watch.counts,
        "csv": log.read_text(),
        "random": random_streams(),
        "module attributes": sorted(vars(module)),
        "patched": patched,
        "optimizer": trainer.optimizers[0],
    }


def assert_same(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """Assert that two runs cannot be told apart."""
    for one, two in zip(actual["batches"], expected["batches"], strict=True):
        for key, value in two.items():
            assert one[key] == value, key
    for key in ("epochs", "counts", "csv", "random", "module attributes"):
        assert actual[key] == expected[key], key
    assert_bitwise(actual["tensors"], expected["tensors"])
    assert actual["patched"] == []


def adamw(params: Any) -> torch.optim.AdamW:
    """Make the reference optimizer."""
    return torch.optim.AdamW(params, lr=LEARNING_RATE)


def probe(questions: Sequence[str]) -> Callable[[Any], Probe]:
    """Make optimizers that ask these questions in every step."""
    return lambda params: Probe(params, lr=LEARNING_RATE, passes=questions)


WINDOWS = {
    "plain": {},
    "accumulation": {"accumulate_grad_batches": 2},
    "clipping": {"gradient_clip_val": 0.5},
}
_references: dict[tuple[str, bool], dict[str, Any]] = {}


def reference(window: str, spectral: bool, directory: Path) -> dict[str, Any]:
    """Return torch's own AdamW under the same Trainer settings, computed once."""
    key = (window, spectral)
    if key not in _references:
        _references[key] = run(
            "none", adamw, directory / "reference", spectral=spectral, **WINDOWS[window]
        )
    return _references[key]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("route", ROUTES)
def test_finite_differences_leave_no_trace(route: str, window: str, tmp_path: Path) -> None:
    """Four questions per step on the module with everything, spectral norm included."""
    asked = run(route, probe(QUESTIONS), tmp_path / "asked", **WINDOWS[window])
    assert_same(asked, reference(window, True, tmp_path))
    optimizer = asked["optimizer"]
    assert len(optimizer.losses) == 2 * len(optimizer.deviations) // 2 > 0
    assert all(torch.equal(base, again) for base, again in optimizer.losses)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("route", ["strategy", "callback"])
def test_forward_mode_leaves_no_trace(route: str, window: str, tmp_path: Path) -> None:
    """The same in forward mode and with Hessian products; spectral norm has no forward rule."""
    asked = run(
        route,
        probe([*QUESTIONS, "hvp"]),
        tmp_path / "asked",
        spectral=False,
        directional="jvp",
        **WINDOWS[window],
    )
    assert_same(asked, reference(window, False, tmp_path))
    optimizer = asked["optimizer"]
    assert all(torch.equal(base, again) for base, again in optimizer.losses)
    if window != "clipping":
        assert max(optimizer.deviations) < 1e-4


@pytest.mark.parametrize("route", ROUTES)
def test_an_attached_oracle_that_is_not_asked_leaves_no_trace(route: str, tmp_path: Path) -> None:
    """The same optimizer with its questions switched off."""
    silent = run(route, probe(()), tmp_path / "silent")
    assert_same(silent, reference("plain", True, tmp_path))


@pytest.mark.parametrize("route", ROUTES)
def test_adamqlr_asks_without_a_trace(route: str, tmp_path: Path) -> None:
    """With a step length of zero AdamQLR asks everything and moves nothing."""

    def still(params: Any) -> AdamQLR:
        return AdamQLR(params, lr=0.0)

    def sgd(params: Any) -> torch.optim.SGD:
        return torch.optim.SGD(params, lr=0.0)

    asked = run(route, still, tmp_path / "asked")
    assert_same(asked, run("none", sgd, tmp_path / "still"))
    assert "curvature" in asked["optimizer"].stats


def test_spectral_norm_needs_the_buffers_of_the_main_pass(tmp_path: Path) -> None:
    """The power iteration's vectors are those the main pass started from: the slope is right."""
    asked = run("strategy", probe(["directional"]), tmp_path / "asked", directional="fd")
    assert max(asked["optimizer"].deviations) < 0.05
