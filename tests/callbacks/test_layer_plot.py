"""Tests of lightning_curvature/callbacks/layer_plot.py."""

import math

import pytest
from matplotlib.colors import LogNorm

from lightning_curvature.callbacks.layer_statistics import plot_layers

STEPS = [10, 20, 40]


def history_of(layers: list[str]) -> dict[str, list[float]]:
    names = ("norm", "dead_fraction", "effective_rank", "mean")
    history: dict[str, list[float]] = {"step": [float(step) for step in STEPS]}
    for i, layer in enumerate(layers):
        for side in ("activation", "output_grad"):
            for name in names:
                history[f"{side}_{name}/{layer}"] = [0.1 * (i + 1), 0.2, 0.3]
    return history


def test_axes_are_layers_and_steps() -> None:
    layers = ["embed", "body.0", "head"]
    figure, axes = plot_layers(history_of(layers))
    assert [ax.get_title() for ax in axes] == [
        "activation: norm",
        "activation: dead fraction",
        "activation: effective rank",
        "output gradient: norm",
        "output gradient: dead fraction",
        "output gradient: effective rank",
    ]
    for ax in axes:
        assert ax.get_xlim() == (5.0, 50.0)
        assert ax.get_ylim() == (3.0, 0.0)  # the first layer on top
        assert [label.get_text() for label in ax.get_yticklabels()] in (layers, [])
        (mesh,) = ax.collections
        assert mesh.get_array().shape == (3, 3)
    assert [label.get_text() for label in axes[0].get_yticklabels()] == layers
    assert list(axes[0].get_yticks()) == [0.5, 1.5, 2.5]
    assert [ax.get_xlabel() for ax in axes] == [""] * 3 + ["optimizer step"] * 3
    assert axes[0].collections[0].get_array()[2].tolist() == pytest.approx([0.3, 0.2, 0.3])
    figure.canvas.draw()


def test_layers_stand_in_the_order_of_the_model() -> None:
    """As they are logged: statistic by statistic, an embedding without an activation first."""
    history = {"step": [1], "activation_norm/head": [1.0]}
    history |= {f"output_grad_norm/{layer}": [1.0] for layer in ("embed", "head")}
    _, axes = plot_layers(history)
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["embed", "head"]


def test_scales() -> None:
    history = history_of(["a", "b"])
    history["output_grad_norm/b"] = [1e-9, 0.0, math.inf]
    _, axes = plot_layers(history)
    assert isinstance(axes[3].collections[0].norm, LogNorm)
    assert axes[3].collections[0].get_array().mask[1].tolist() == [False, True, True]
    share = axes[1].collections[0].norm
    assert (share.vmin, share.vmax) == (0.0, 1.0)


@pytest.mark.parametrize("values", [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.2, 1.3, 1.9]])
def test_values_that_hardly_differ(values: list[float]) -> None:
    figure, _ = plot_layers({"step": STEPS, "activation_norm/a": values})
    figure.canvas.draw()


def test_layers_without_a_value_are_gray() -> None:
    history = history_of(["embed", "head"])
    for name in [name for name in history if name.startswith("activation_") and "embed" in name]:
        del history[name]
    figure, axes = plot_layers(history)
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["embed", "head"]
    assert axes[0].collections[0].get_array().mask[0].all()
    figure.canvas.draw()


def test_one_step() -> None:
    _, axes = plot_layers({"step": [7], "activation_norm/a": [1.0]})
    assert axes[0].get_xlim() == (6.5, 7.5)


def test_many_layers_and_long_names() -> None:
    layers = [f"model.encoder.layers.{i}.attention.output" for i in range(300)]
    figure, axes = plot_layers(history_of(layers))
    labels = [label.get_text() for label in axes[0].get_yticklabels()]
    assert 20 <= len(labels) <= 50
    assert max(len(label) for label in labels) <= 28
    assert labels[0].endswith("layers.0.attention.output")
    assert figure.get_size_inches()[1] < 21


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"must have the key 'step' and layers, got \['step'\]"):
        plot_layers({"step": [1]})
