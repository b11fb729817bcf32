"""Situations that a careful user gets into; each once went wrong."""

import io
import pickle
import warnings
from collections import UserDict
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_curvature import AdamQLR, CurvatureCallback
from lightning_curvature.oracle import WindowOracle

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def batches(count: int = 4, rows: int = 32) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (
            torch.randn(rows, 5, generator=generator),
            torch.randint(3, (rows,), generator=generator),
        )
        for _ in range(count)
    ]


class Stock(L.LightningModule):
    """A module with batch normalization."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options
        self.net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Any:
        return AdamQLR(self.parameters(), **self.options)


def fit(module: L.LightningModule, data: Any = None, **options: Any) -> L.Trainer:
    trainer = L.Trainer(**{**QUIET, "max_epochs": 1, **options})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        trainer.fit(module, DataLoader(data or batches(), batch_size=None))
    return trainer


def attached(**options: Any) -> tuple[nn.Module, AdamQLR, Any]:
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = AdamQLR(model.parameters(), **options)
    return model, optimizer, optimizer.attach_model(model, nn.CrossEntropyLoss())


def test_one_cycle_leaves_the_cap_alone() -> None:
    class OneCycle(Stock):
        def configure_optimizers(self) -> Any:
            optimizer = AdamQLR(self.parameters(), max_lr=0.02)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=4)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    (optimizer,) = fit(OneCycle()).optimizers
    assert optimizer.param_groups[0]["max_step_length"] == 0.02
    assert abs(float(optimizer.stats["step_length"])) <= 0.02 * (1 + 1e-6)


@pytest.mark.parametrize("owner", ["optimizer", "model"])
def test_a_skipped_step_is_forgotten(owner: str) -> None:
    """A scaler, or the user, leaves out a step: its batch must not enter the next one."""
    model, optimizer, criterion = attached()
    (x1, y1), (x2, y2), *_ = batches()
    criterion(model(x1), y1).backward()
    {"optimizer": optimizer, "model": model}[owner].zero_grad()
    criterion(model(x2), y2).backward()
    expected = F.cross_entropy(model(x2), y2)
    optimizer.step()
    torch.testing.assert_close(optimizer.stats["loss"], expected.detach())


@pytest.mark.parametrize("kind", ["expanded", "inference"])
def test_buffers_that_cannot_be_written(kind: str) -> None:
    class WithBuffer(Stock):
        def __init__(self) -> None:
            super().__init__()
            if kind == "expanded":
                buffer = torch.ones(1).expand(5)
            else:
                with torch.inference_mode():
                    buffer = torch.ones(5)
            self.register_buffer("scale", buffer, persistent=False)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            self.scale = self.scale.clone() if kind == "inference" else self.scale
            return F.cross_entropy(self.net(x * self.scale), y)

    trainer = fit(WithBuffer())
    assert trainer.global_step == 4
    assert float(trainer.optimizers[0].stats["skipped_steps"]) == 0


def test_two_losses_in_one_backward() -> None:
    """Both belong to the step, though neither has left a gradient when the second is reached."""
    model, optimizer, criterion = attached()
    (x1, y1), (x2, y2), *_ = batches()
    expected = F.cross_entropy(model(x1), y1) + 2 * F.cross_entropy(model(x2), y2)
    optimizer.zero_grad()
    (criterion(model(x1), y1) + 2 * criterion(model(x2), y2)).backward()
    optimizer.step()
    torch.testing.assert_close(optimizer.stats["loss"], expected.detach())
    assert isinstance(optimizer.oracle, WindowOracle)
    assert optimizer.oracle.self_check.history[0].deviation < 0.01


def test_a_sparse_buffer() -> None:
    class Graph(Stock):
        def __init__(self) -> None:
            super().__init__()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.register_buffer("adjacency", torch.eye(5).to_sparse_csr(), persistent=False)

    assert fit(Graph()).global_step == 4


@pytest.mark.filterwarnings("ignore:Self-check:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:Forward-mode:RuntimeWarning")
def test_half_precision_without_a_forward_rule() -> None:
    class NoForwardRule(Stock):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            z = self.net(x)
            return F.cross_entropy(torch.cdist(z.float(), torch.eye(3, dtype=torch.float32)), y)

    trainer = fit(NoForwardRule(), precision="bf16-true")
    assert trainer.global_step == 4
    oracle = trainer.optimizers[0]
    assert all(torch.isfinite(p).all() for p in oracle.param_groups[0]["params"])


def test_a_batch_that_is_an_object() -> None:
    """As tokenizers return them: a mapping that torch does not look into, taken apart."""

    class TakesApart(Stock):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            y = batch.pop("y")
            return F.cross_entropy(self.net(batch["x"]), y)

    data = [UserDict(x=x, y=y) for x, y in batches()]
    assert fit(TakesApart(), data).global_step == 4


def test_an_object_changed_in_place_is_noticed() -> None:
    class Shifts(Stock):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            batch["x"] -= 1.0
            return F.cross_entropy(self.net(batch["x"]), batch["y"])

    data = [UserDict(x=x, y=y) for x, y in batches()]
    with pytest.raises(RuntimeError, match="changed its batch in place"):
        fit(Shifts(), data)


def test_the_users_own_callback_wins() -> None:
    methods: list[Any] = []

    class Configures(Stock):
        def configure_callbacks(self) -> Any:
            return [CurvatureCallback(directional="jvp")]

        def on_train_end(self) -> None:
            oracle = self.trainer.optimizers[0].oracle
            assert isinstance(oracle, WindowOracle)
            methods.append(oracle.method)

    fit(Configures())
    assert methods == ["jvp"]


@pytest.mark.filterwarnings("ignore:Self-check:RuntimeWarning")
def test_gradients_clipped_by_torch_keep_their_slope() -> None:
    """The step length belongs to the true loss; the cheap method stays."""
    (x, y), *_ = batches()
    lengths = []
    for clip in (False, True):
        torch.manual_seed(0)
        model, optimizer, criterion = attached(max_lr=None, damping=0.1)
        criterion(model(x), y).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
        lengths.append(float(optimizer.stats["step_length"]))
        assert isinstance(optimizer.oracle, WindowOracle)
        assert optimizer.oracle.method == "fd"
    # Adam's direction does not depend on the scale of the gradient, up to eps.
    assert lengths[1] == pytest.approx(lengths[0], rel=0.05)


def test_clipped_gradients_are_announced() -> None:
    (x, y), *_ = batches()
    model, optimizer, criterion = attached()
    criterion(model(x), y).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    with pytest.warns(RuntimeWarning) as caught:
        optimizer.step()
    assert any("clip_grad_norm_" in str(w.message) for w in caught)


def test_damping_of_the_first_group_counts() -> None:
    layer = nn.Linear(2, 2)
    assert AdamQLR([{"params": layer.parameters(), "damping": 0.5}]).damping == 0.5


def test_an_attached_model_can_be_saved() -> None:
    model, _, _ = attached()
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(torch.ones(1, 5)), model(torch.ones(1, 5)))
    torch.save(model, io.BytesIO())


def test_two_groups_resume_and_grow() -> None:
    def make() -> tuple[nn.Module, AdamQLR]:
        model = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3))
        return model, AdamQLR(
            [{"params": model[0].parameters(), "lr": 0.5}, {"params": model[1].parameters()}]
        )

    _, first = make()
    _, second = make()
    second.load_state_dict(first.state_dict())
    second.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert len({id(group["damping"]) for group in second.param_groups}) == 1


def test_weight_averaging_refreshes_batch_norm_without_a_step(tmp_path: Path) -> None:
    """Its last epoch runs without a backward; nothing may be recorded or stepped on."""
    recorded: list[int] = []

    class Counts(StochasticWeightAveraging):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            oracle = trainer.optimizers[0].oracle
            if trainer.fit_loop._skip_backward and isinstance(oracle, WindowOracle):
                recorded.append(len(oracle.records))

    module = Stock()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = fit(
            module,
            max_epochs=3,
            callbacks=[Counts(swa_lrs=1.0, swa_epoch_start=1)],
            default_root_dir=tmp_path,
        )
    assert recorded
    assert set(recorded) == {0}
    assert trainer.optimizers[0]._steps_done == 3 * 4


def test_a_double_parameter_among_floats() -> None:
    model, _, _ = attached()
    model.append(nn.Linear(3, 3))
    model[3].scale = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = AdamQLR(model.parameters())
    criterion = optimizer.attach_model(
        model, lambda z, y: F.cross_entropy(z * model[3].scale.float(), y), directional="fd"
    )
    (x, y), *_ = batches()
    criterion(model(x), y).backward()
    optimizer.step()
    assert isinstance(optimizer.oracle, WindowOracle)
    assert optimizer.oracle.self_check.history[0].deviation < 0.01


def test_finite_differences_know_their_bias() -> None:
    """Close to a minimum the slope vanishes and the curvature of the probe shows."""
    layer = nn.Linear(4, 1, bias=False)
    x = torch.randn(64, 4)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5], [3.0]])
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -2.0, 0.5, 3.0]]) + 2e-4)
    optimizer = AdamQLR(layer.parameters())
    criterion = optimizer.attach_model(layer, nn.MSELoss(), directional="fd")
    criterion(layer(x), y).backward()
    assert layer.weight.grad is not None
    direction = [torch.ones_like(layer.weight)]
    expected = float(layer.weight.grad.sum())
    assert optimizer.oracle is not None
    measured = float(optimizer.oracle.directional(direction).slope)
    assert measured == pytest.approx(expected, rel=0.02)
