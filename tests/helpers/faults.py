"""Modules that fail where they are told to, and a list of all that a failure could leave behind."""

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import _len_torch_function_stack
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from lightning_curvature import CurvatureOptimizer, in_extra_pass
from lightning_curvature.curvature.layer_tape import _Hook
from tests.helpers.modules import CLASSES, MakeOptimizer
from tests.helpers.optimizer_db import Contract, state_tensors

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
PLACES = ("step", "hook", "metric")


class Fault(Exception):
    """Something wrong in user code."""


class TripMetric(Metric):
    """Counts rows, and fails half-way when it is told to."""

    def __init__(self, trip: Callable[[str], None]) -> None:
        super().__init__()
        # A list, which is no attribute to be copied or moved.
        self.trips = [trip]
        self.add_state("rows", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, x: Tensor) -> None:
        """Count the rows of a batch."""
        self.rows += len(x)
        self.trips[0]("metric")

    def compute(self) -> Tensor:
        """Return the number of rows."""
        return self.rows


class Faulty(LightningModule):
    """Batch norm, dropout, metrics, logging and all random streams; fails in chosen extra passes.

    Args:
        make_optimizer: Called with the parameters.

    Attributes:
        extra: Number of extra passes seen so far.
        fail_at: Numbers of the extra passes that fail, from 0.
        place: Where in the pass: "step", in ``training_step`` after everything was touched; "hook",
            in a forward hook; "metric", in the update of a metric.
        error: What is raised.
        scenes: What `scene` said before each optimizer step.
    """

    def __init__(self, make_optimizer: MakeOptimizer) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Linear(5, 8),
            nn.BatchNorm1d(8),
            nn.Tanh(),
            nn.Dropout(0.2),
            nn.Linear(8, CLASSES),
        )
        self.norm = nn.BatchNorm1d(CLASSES)
        self.accuracy = MulticlassAccuracy(CLASSES)
        self.rows = TripMetric(self._trip)
        self.make_optimizer = make_optimizer
        self.extra = 0
        self.fail_at: set[int] = set()
        self.place = "step"
        self.error: BaseException = Fault("boom")
        self.scenes: list[dict[str, Any]] = []
        self.kept: list[Any] = []
        self.network[4].register_forward_hook(lambda *_: self._trip("hook"))

    def _trip(self, place: str) -> None:
        if in_extra_pass() and place == self.place and self.extra - 1 in self.fail_at:
            raise self.error

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.norm(self.network(x))

    def loss(self, batch: Any) -> Tensor:
        """Draw, classify, count and log."""
        self.extra += in_extra_pass()
        x, y = batch
        x = x + 0.01 * (random.random() + np.random.rand()) * torch.randn_like(x)  # noqa: NPY002
        logits = self(x)
        loss = F.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.rows.update(x)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log_dict({"loss": loss, "noise": torch.rand(())}, on_step=True, on_epoch=True)
        self._trip("step")
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        return self.loss(batch)

    def on_train_epoch_start(self) -> None:
        """Keep one layer in evaluation mode, as frozen batch norm is."""
        self.norm.eval()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Note what there is before the step."""
        self.scenes.append(scene(self))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make the optimizer, or give the one there is."""
        if not self.kept:
            self.kept.append(self.make_optimizer(self.parameters()))
        return self.kept[0]


class FaultyManual(Faulty):
    """The same under manual optimization."""

    def __init__(self, make_optimizer: MakeOptimizer) -> None:
        super().__init__(make_optimizer)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Step with a closure."""
        optimizer = self.optimizers()

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure=closure)


def exact_maker(contract: Contract) -> Callable[..., CurvatureOptimizer]:
    """Return what makes an optimizer whose failed steps leave the very bits they found.

    Parameters that are displaced in their own memory come back up to round-off.
    """
    making: Callable[..., CurvatureOptimizer] = contract.making(
        **contract.known({"restore": "snapshot"})
    )
    return making


def random_streams() -> dict[str, Any]:
    """Return the states of the three global random streams."""
    return {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": [str(part) for part in np.random.get_state(legacy=False).items()],  # noqa: NPY002
    }


def scene(module: nn.Module) -> dict[str, Any]:
    """Return copies of all that a failed extra pass must leave as it found it."""
    slots = {
        f"{path}.{name}": (id(tensor), tensor.data_ptr(), tensor.requires_grad)
        for path, part in module.named_modules(remove_duplicate=False)
        for name, tensor in [*part._parameters.items(), *part._buffers.items()]
        if tensor is not None
    }
    own = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    return {
        "parameters": {name: p.detach().clone() for name, p in module.named_parameters()},
        "buffers": {name: b.clone() for name, b in module.named_buffers()},
        "gradients": {
            name: None if p.grad is None else p.grad.clone()
            for name, p in module.named_parameters()
        },
        "slots": slots,
        "training": {name: part.training for name, part in module.named_modules()},
        "hooks": {
            # Layers are watched for as long as something is attached, which is a test of its own.
            f"{path}.{kind}": [
                hook for hook in getattr(part, kind).values() if not isinstance(hook, _Hook)
            ]
            for path, part in module.named_modules()
            for kind in HOOKS
        },
        "methods": sorted(name for name, value in own.items() if callable(value)),
        "metrics": {
            name: {
                **{key: value.clone() for key, value in metric.metric_state.items()},
                "count": metric.update_count,
                "called": metric.update_called,
            }
            for name, metric in module.named_modules()
            if isinstance(metric, Metric)
        },
        "logged": logged(module),
        "random": random_streams(),
        "in extra pass": in_extra_pass(),
        "function modes": _len_torch_function_stack(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "default dtype": torch.get_default_dtype(),
        "forward mode level": forward_ad._current_level,
        "backward": (torch.autograd.backward, Tensor.backward),
        "stance": str(getattr(torch._dynamo.eval_frame, "_stance", None)),
        "mkldnn": torch._C._get_mkldnn_enabled(),
        "attention": (
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
        ),
    }


def logged(module: nn.Module) -> dict[str, Any]:
    """Return the values that the Trainer has collected from ``log`` in this epoch."""
    trainer = getattr(module, "_trainer", None)
    if trainer is None:
        return {}
    results = trainer.fit_loop.epoch_loop._results
    return {
        key: (result.value.clone(), result.cumulated_batch_size.clone())
        for key, result in results.items()
        if result.is_tensor
    }


def assert_same_scene(after: dict[str, Any], before: dict[str, Any], *but: str) -> None:
    """Assert that two scenes are the same bit for bit, but for some entries."""
    assert after.keys() == before.keys()
    for key, value in before.items():
        if key not in but:
            assert alike(after[key], value), f"{key}: {after[key]}, was {value}"


def alike(one: Any, other: Any) -> bool:
    """Compare nested containers, tensors bit for bit."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype is other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(alike, one, other))
    return bool(one == other)


def assert_finite(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Assert that weights, buffers and the whole state of the optimizer are finite."""
    assert isinstance(optimizer, CurvatureOptimizer)
    tensors = {**state_tensors(optimizer), **dict(module.named_parameters())}
    tensors |= dict(module.named_buffers())
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    for group in optimizer.param_groups:
        for name, value in group.items():
            # A limit may be infinite by choice.
            if isinstance(value, float) and math.isnan(value):
                broken.append(name)
    assert broken == []
