"""Tests of callbacks/pruning_plot.py."""

import math

import pytest
import torch
from torch import nn

from lightning_curvature.callbacks.pruning_plot import layer_table, plot_pruning
from lightning_curvature.pruning import PrunableParameters, SaliencySummary, prunable_weights


def history_of(layers: list[str]) -> dict[str, list[float]]:
    history = {"step": [0.0, 10.0], "epoch": [0.0, 2.0], "sparsity": [0.5, 0.75]}
    history["predicted_loss_increase"] = [0.1, 0.3]
    return history | {
        f"sparsity/{layer}": [0.1, (i + 1) / len(layers)] for i, layer in enumerate(layers)
    }


def saliency_of(scores: torch.Tensor, pruned: torch.Tensor) -> dict[str, torch.Tensor]:
    summary = SaliencySummary.of(scores, pruned)
    return {"edges": summary.edges, "kept": summary.kept, "pruned": summary.pruned}


def test_layers_and_events() -> None:
    layers = ["embed.weight", "body.0.weight", "head.weight"]
    figure, (left, middle, right) = plot_pruning(history_of(layers))
    assert [bar.get_width() for bar in left.patches] == pytest.approx([1 / 3, 2 / 3, 1])
    assert [label.get_text() for label in left.get_yticklabels()] == layers
    assert left.get_ylim() == (2.5, -0.5)  # the first layer on top
    assert left.get_legend().get_texts()[0].get_text() == "all layers: 0.75"
    assert middle.lines[0].get_xydata().tolist() == [[0, 0.5], [2, 0.75]]
    (other,) = [ax for ax in figure.axes if ax not in (left, middle, right)]
    assert other.lines[0].get_ydata().tolist() == [0.1, 0.3]
    assert not right.axison
    figure.canvas.draw()


def test_saliency() -> None:
    scores = torch.logspace(-6, -1, 1000, dtype=torch.float64)
    pruned = scores < 1e-3
    figure, (_, _, ax) = plot_pruning(history_of(["a"]), saliency_of(scores, pruned))
    gone, kept = ax.containers
    assert sum(bar.get_height() for bar in gone) == int(pruned.sum())
    assert sum(bar.get_height() for bar in kept) == 1000 - int(pruned.sum())
    # One on top of the other, from the smallest to the largest.
    assert kept[-1].get_x() + kept[-1].get_width() == pytest.approx(0.1)
    assert gone[0].get_x() == pytest.approx(1e-6)
    both = [(g.get_height(), k.get_y()) for g, k in zip(gone, kept, strict=True)]
    assert all(height == bottom for height, bottom in both)
    assert ax.get_xscale() == "log"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["pruned", "kept"]
    figure.canvas.draw()


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_equal_saliencies(value: float) -> None:
    scores = torch.full((4,), value, dtype=torch.float64)
    summary = saliency_of(scores, torch.tensor([True, False, False, True]))
    figure, (_, _, ax) = plot_pruning(history_of(["a"]), summary)
    assert sum(bar.get_height() for container in ax.containers for bar in container) == 4
    assert all(bar.get_width() > 0 for container in ax.containers for bar in container)
    figure.canvas.draw()


def test_many_layers_and_long_names() -> None:
    layers = [f"model.encoder.layers.{i}.attention.output.weight" for i in range(300)]
    history = history_of(layers)
    history["predicted_loss_increase"] = [math.nan, math.nan]
    figure, axes = plot_pruning(history)
    labels = [label.get_text() for label in axes[0].get_yticklabels()]
    assert 20 <= len(labels) <= 70
    assert max(len(label) for label in labels) <= 28
    assert labels[0].endswith("layers.0.attention.output.weight"[-27:])
    assert figure.get_size_inches()[1] < 14
    assert len(figure.axes) == 3
    figure.canvas.draw()


@pytest.mark.parametrize(
    "history",
    [{}, {"epoch": [1], "sparsity": [0.5]}, {"epoch": [], "sparsity": [], "sparsity/a": []}],
)
def test_errors(history: dict[str, list[float]]) -> None:
    with pytest.raises(ValueError, match="must have the keys 'epoch', 'sparsity' and 'sparsity/<l"):
        plot_pruning(history)


def test_table() -> None:
    model = nn.Sequential(nn.Linear(30, 50), nn.ReLU(), nn.Linear(50, 2))
    parameters = PrunableParameters(prunable_weights(model), model=model)
    keep = torch.ones(1600, dtype=torch.bool)
    keep[:300] = False
    parameters.apply(parameters.weights(), keep)
    assert layer_table(parameters).splitlines() == [
        "parameter | weights |  left | sparsity",
        "0.weight  |   1,500 | 1,200 |   0.2000",
        "2.weight  |     100 |   100 |   0.0000",
        "all       |   1,600 | 1,300 |   0.1875",
    ]
