"""Tests of lightning_curvature/callbacks/layer_statistics.py: when, which layers, what is left."""

import copy
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_curvature import AdamQLR, LayerStatistics
from lightning_curvature.callbacks import layer_statistics
from tests.helpers.layer_watching import (
    ADAMW,
    SGD,
    AsDouble,
    double_loss,
    double_mlp,
    fit_double,
    watch,
)
from tests.helpers.modules import (
    CLASSES,
    Everything,
    StockModule,
    images,
    loader,
    mlp_module,
    vectors,
)
from tests.helpers.monitoring import PNG_SIGNATURE, TwoOptimizers
from tests.helpers.monitoring import fit as fit_boring
from tests.helpers.probing import assert_bitwise, make_trainer, parameters_and_buffers

# When


@pytest.mark.parametrize(
    ("every", "accumulate", "expected"), [(1, 4, [1, 2]), (2, 1, [2, 4, 6]), (4, 1, [4])]
)
def test_steps(every: int, accumulate: int, expected: list[int]) -> None:
    statistics = watch(every_n_steps=every)
    fit_double(statistics, double_mlp(), accumulate_grad_batches=accumulate)
    assert statistics.history["step"] == expected


def test_several_optimizers(tmp_path: Path) -> None:
    """``global_step`` is 2, 4, ...: the first step at or after a multiple of 3 is taken."""
    statistics = watch(every_n_steps=3)
    fit_boring(tmp_path, statistics, TwoOptimizers())
    assert statistics.history["step"] == [4, 8, 10, 14, 16]


def test_resume_goes_on_at_the_same_steps(tmp_path: Path) -> None:
    path = tmp_path / "part.ckpt"
    trainer = fit_double(watch(), double_mlp(ADAMW), max_steps=3)
    trainer.save_checkpoint(path)
    statistics = watch(every_n_steps=2)
    callbacks = [AsDouble(), statistics]
    trainer = make_trainer("none", callbacks=callbacks, max_epochs=2)
    trainer.fit(double_mlp(ADAMW), loader(vectors(24)), ckpt_path=path, weights_only=False)
    assert statistics.history["step"] == [4, 6, 8]  # the second epoch follows


def test_second_run_starts_a_new_history() -> None:
    statistics = watch()
    fit_double(statistics, double_mlp())
    fit_double(statistics, double_mlp(), max_steps=2)
    assert statistics.history["step"] == [1, 2]


def test_fast_dev_run_looks_at_every_step_and_leaves_no_file(tmp_path: Path) -> None:
    statistics = LayerStatistics()
    fit_double(statistics, double_mlp(), fast_dev_run=2, default_root_dir=tmp_path)
    assert statistics.history["step"] == [1, 2]
    assert not list(tmp_path.iterdir())


def test_barebones_trainer(tmp_path: Path) -> None:
    statistics = LayerStatistics(1)
    trainer = Trainer(
        barebones=True, accelerator="cpu", max_steps=2, callbacks=[statistics],
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(mlp_module(SGD), loader(vectors()))
    assert statistics.history == {"step": []}


class ReturnsNothing(StockModule):
    """Skips every step before the third."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx < 2 else super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")
def test_a_step_without_a_loss_is_not_taken_for_silence() -> None:
    module = ReturnsNothing(double_mlp().network, SGD, loss=double_loss)
    statistics = watch(every_n_steps=4)
    fit_double(statistics, module)
    assert statistics.history["step"] == [4]
    statistics = watch(every_n_steps=2)
    fit_double(statistics, module)
    # Step 2 had no loss; the next one takes its place.
    assert statistics.history["step"] == [3, 4, 6]


# Layers


class Attention(nn.Module):
    """Attention whose output projection is used by its weight only."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x[:, :1].unsqueeze(-1).expand(-1, 3, 8)
        return self.head(self.attention(hidden, hidden, hidden)[0].mean(1))


SILENT = r"saw no gradient of 'network\.attention\.out_proj' in the first step it looked at"


def test_silent_layers_are_named_once() -> None:
    statistics = watch()
    trainer = make_trainer("none", callbacks=[statistics], max_steps=4)
    with pytest.warns(UserWarning, match=SILENT) as caught:
        trainer.fit(StockModule(Attention(), ADAMW), loader(vectors()))
    assert len([w for w in caught if "saw no gradient" in str(w.message)]) == 1
    assert "activation_mean/network.head" in statistics.history
    assert not any("out_proj" in name for name in statistics.history)


def test_layers_left_out_are_not_silent() -> None:
    statistics = watch(layers=["*.head"])
    trainer = make_trainer("none", callbacks=[statistics], max_steps=1)
    trainer.fit(StockModule(Attention(), ADAMW), loader(vectors()))
    layers = {name.partition("/")[2] for name in statistics.history if "/" in name}
    assert layers == {"network.head"}


def test_layers_before_all_trained_ones_are_named() -> None:
    module = double_mlp()
    module.network[0].requires_grad_(False)
    with pytest.warns(UserWarning, match=r"saw no gradient of 'network\.0' in"):
        fit_double(watch(), module, max_steps=1)


def test_compiled_layers_are_named() -> None:
    module = double_mlp()
    module.network = nn.Sequential(
        torch.compile(module.network[:2], backend="eager"), module.network[2]
    )
    with pytest.warns(UserWarning, match=r"saw no gradient of 'network\.0\.0' .* compiled"):
        fit_double(watch(every_n_steps=2), module, max_steps=2)


def test_nothing_to_watch() -> None:
    class Bare(StockModule):
        def __init__(self) -> None:
            super().__init__(nn.Bilinear(2, 2, 2), SGD)

    with pytest.raises(MisconfigurationException, match=r"Supported layers of the model: none\."):
        fit_double(watch(), Bare())
    message = r"whose name matches one of \['encoder\.\*'\] .* 'network\.0', 'network\.2'\."
    with pytest.raises(MisconfigurationException, match=message):
        fit_double(watch(layers=["encoder.*"]), double_mlp())


# No trace


def hooks_of(module: nn.Module) -> int:
    """Count all hooks of a model."""
    return sum(
        len(part._forward_hooks) + len(part._forward_pre_hooks) + len(part._backward_hooks)
        for part in module.modules()
    )


class CountHooks(Callback):
    """Notes how many hooks the module has before and after every step, and in validation."""

    def __init__(self) -> None:
        self.during: list[int] = []
        self.after: list[int] = []
        self.validation: list[int] = []

    def on_before_backward(self, trainer: Any, module: Any, loss: Any) -> None:
        self.during.append(hooks_of(module))

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        self.after.append(hooks_of(module))

    def on_validation_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        self.validation.append(hooks_of(module))


def test_hooks_are_there_in_due_steps_only() -> None:
    count = CountHooks()
    module = double_mlp()
    fit_double(watch(every_n_steps=3), module, callbacks=[count])
    assert count.during == [0, 0, 2, 0, 0, 2]
    assert count.after == [0] * 6
    assert hooks_of(module) == 0


def test_a_window_that_never_ends_leaves_no_hooks() -> None:
    class Stops(StockModule):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
            return -1 if batch_idx == 1 else None

    module = Stops(double_mlp().network, SGD, loss=double_loss)
    statistics = watch()
    fit_double(statistics, module, accumulate_grad_batches=4)
    assert hooks_of(module) == 0
    assert statistics.history == {"step": []}


def test_a_window_that_never_ends_is_not_mixed_with_the_next() -> None:
    class StopsFirst(StockModule):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
            return -1 if batch_idx == 1 and self.current_epoch == 0 else None

    histories = []
    for kind in (StockModule, StopsFirst):
        statistics = watch()
        module = kind(double_mlp().network, SGD, loss=double_loss)
        fit_double(statistics, module, accumulate_grad_batches=4, max_epochs=2)
        histories.append({name: values[-2:] for name, values in statistics.history.items()})
    assert histories[0].pop("step") == [3, 4]
    assert histories[1].pop("step") == [1, 2]
    assert histories[0] == histories[1]


def test_gradients_of_validation_do_not_count() -> None:
    class Differentiates(StockModule):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            with torch.enable_grad():
                loss = self.training_step([100.0 * batch[0].double(), batch[1]], batch_idx)
                torch.autograd.grad(loss, list(self.parameters()))

    histories = []
    for batches in (0, 1):
        statistics = watch()
        module = Differentiates(double_mlp().network, SGD, loss=double_loss)
        trainer = make_trainer(
            "none",
            callbacks=[AsDouble(), statistics],
            max_steps=1,
            accumulate_grad_batches=2,
            val_check_interval=1,
            limit_val_batches=batches,
            inference_mode=False,
        )
        trainer.fit(module, loader(vectors()), loader(vectors()))
        histories.append(statistics.history)
    assert histories[0] == histories[1]


def test_an_exception_leaves_no_hooks_and_a_picture(tmp_path: Path) -> None:
    class Fails(StockModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            if batch_idx == 2:
                raise RuntimeError("the third batch is broken")
            return loss

    module = Fails(double_mlp().network, SGD, loss=double_loss)
    with pytest.raises(RuntimeError, match="the third batch is broken"):
        fit_double(LayerStatistics(1), module, default_root_dir=tmp_path)
    assert hooks_of(module) == 0
    assert (tmp_path / "layers.png").exists()


def test_exception_is_not_hidden_by_a_failing_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fails(StockModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 1:
                raise RuntimeError("the second batch is broken")
            return super().training_step(batch, batch_idx)

    module = Fails(double_mlp().network, SGD, loss=double_loss)
    with (
        pytest.warns(UserWarning, match="LayerStatistics could not write layers.nonsense"),
        pytest.raises(RuntimeError, match="the second batch is broken"),
    ):
        fit_double(
            LayerStatistics(1, filename="layers.nonsense"), module, default_root_dir=tmp_path
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("make", [ADAMW, AdamQLR], ids=["AdamW", "AdamQLR"])
def test_training_is_the_same_to_the_bit(make: Any) -> None:
    """Weights, buffers and all random streams, with validation between the batches."""
    results = []
    for callbacks in ([], [watch(every_n_steps=2, max_rows=7)]):
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002 - what the module's augmentation draws from
        torch.manual_seed(1)
        module = Everything(make)
        trainer = make_trainer("strategy", callbacks=callbacks, max_epochs=2, val_check_interval=2)
        trainer.fit(module, loader(images()), loader(images()))
        drawn = (random.random(), np.random.rand(), torch.rand(3))  # noqa: NPY002 - likewise
        results.append((parameters_and_buffers(module), drawn))
    (plain, drawn), (watched, again) = results
    assert_bitwise(watched, plain)
    assert drawn[:2] == again[:2]
    assert torch.equal(drawn[2], again[2])


def test_copies_in_training_are_possible() -> None:
    class Copies(Callback):
        def on_before_backward(self, trainer: Any, module: Any, loss: Any) -> None:
            copies.append(copy.deepcopy(statistics))

    copies: list[LayerStatistics] = []
    statistics = watch()
    fit_double(statistics, double_mlp(), callbacks=[Copies(), Timer()], max_steps=1)
    assert copies[0].every_n_steps == 1


# The picture


def test_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    histories: list[Any] = []
    original = layer_statistics.plot_layers

    def note(history: Any) -> Any:
        histories.append(history)
        return original(history)

    monkeypatch.setattr(layer_statistics, "plot_layers", note)
    statistics = LayerStatistics(2, max_points=2)
    fit_double(statistics, double_mlp(), default_root_dir=tmp_path)
    assert (tmp_path / "layers.png").read_bytes().startswith(PNG_SIGNATURE)
    assert histories[0]["step"] == [2, 6]  # thinned out


def test_nothing_is_drawn_without_a_step(tmp_path: Path) -> None:
    fit_double(LayerStatistics(100), double_mlp(), default_root_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_matplotlib_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"or use LayerStatistics\(plot=False\)"):
        fit_double(LayerStatistics(), double_mlp())


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"every_n_steps": 0}, ValueError, r"Invalid every_n_steps=0: must be an integer >= 1"),
        ({"layers": "a"}, TypeError, r"Invalid layers='a': must be a list of patterns, got str\."),
        ({"max_rows": 0}, ValueError, r"Invalid max_rows=0: must be in \[1, inf\)\."),
        ({"filename": ""}, ValueError, r"Invalid filename='': must not be empty\."),
        ({"max_points": 1}, ValueError, r"Invalid max_points=1: must be in \[2, inf\)\."),
    ],
)
def test_argument_errors(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LayerStatistics(**kwargs)
