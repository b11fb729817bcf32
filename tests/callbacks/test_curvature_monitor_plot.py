"""Tests of lightning_curvature/callbacks/curvature_plot.py."""

import math

import pytest

from lightning_curvature.callbacks.curvature_monitor import plot_history

PANELS = ["loss", "learning rate", "damping", "reduction ratio"]


def test_plot_history_panels() -> None:
    history = {
        "step": [1, 2, 3],
        "loss": [2.0, math.inf, 0.5],
        "new_loss": [1.5, 1.0, math.nan],
        "lr": [0.1, 0.1, 0.05],
        "damping": [1e-3, 2e-3, 1e-3],
        "reduction_ratio": [-1e6, 0.5, 0.9],
        "slope": [1.0, 1.0, 1.0],
    }
    figure, axes = plot_history(history)
    assert [panel.get_ylabel() for panel in axes] == PANELS
    assert [panel.get_yscale() for panel in axes] == ["log", "linear", "log", "linear"]
    assert [line.get_label() for line in axes[0].get_lines()] == ["loss", "new_loss"]
    thresholds = {line.get_ydata()[0] for line in axes[3].get_lines()[1:]}
    assert thresholds == {0.25, 0.75}
    low, high = axes[3].get_ylim()
    assert -1 <= low < 0.25
    assert high > 0.75
    figure.canvas.draw()


def test_plot_history_keeps_linear_axis_for_a_negative_loss() -> None:
    _, axes = plot_history({"step": [1, 2], "loss": [1.0, -1.0]})
    assert axes[0].get_yscale() == "linear"


def test_plot_history_draws_into_given_axes() -> None:
    figure, axes = plot_history({"step": [1, 2], "loss": [2.0, 1.0]})
    again, panels = plot_history({"step": [1, 2], "loss": [3.0, 2.0]}, axes)
    assert again is figure
    assert len(panels[0].get_lines()) == 2


def test_plot_history_errors() -> None:
    _, axes = plot_history({"step": [1]})
    assert [panel.get_ylabel() for panel in axes] == ["loss"]
    with pytest.raises(ValueError, match=r"Invalid history: must have the key 'step', got \['a'\]"):
        plot_history({"a": [1.0]})
    with pytest.raises(
        ValueError, match=r"Invalid axes: must be 2, for 'loss', 'damping', got 1\."
    ):
        plot_history({"step": [1], "loss": [1.0], "damping": [1.0]}, axes)


def test_every_kind_of_value_has_its_panel() -> None:
    history = {
        "step": [1, 2],
        "cost_percent": [math.nan, 30.0],
        "curvature_drift": [0.0, 0.3],
        "win_rate": [0.1, 0.9],
        "grad_norm": [1.0, 2.0],
        "hess_diag_norm/opt0": [1.0, 2.0],
        "hess_diag_norm/layer": [1.0, 2.0],
        "damping": [math.nan, math.nan],
        "skipped_steps": [0.0, 0.0],
    }
    figure, axes = plot_history(history)
    assert [panel.get_ylabel() for panel in axes] == [
        "win rate",
        "norms",
        "curvature drift",
        "cost (% of a step)",
    ]
    assert [line.get_label() for line in axes[1].get_lines()] == [
        "grad_norm",
        "hess_diag_norm/opt0",
    ]
    assert [panel.get_yscale() for panel in axes] == ["linear", "log", "log", "linear"]
    assert list(axes[2].get_lines()[0].get_xdata()) == [2]  # a zero has no logarithm
    figure.canvas.draw()


def test_labels_of_the_steps_are_below_every_column() -> None:
    names = ("loss", "lr", "damping", "reduction_ratio", "win_rate")
    _, axes = plot_history({"step": [1, 2], **{name: [0.5, 0.4] for name in names}})
    labels = [panel.get_xlabel() for panel in axes]
    assert labels == ["", "", "optimizer step", "optimizer step", "optimizer step"]


def test_long_runs_get_a_running_median() -> None:
    steps = list(range(1, 401))
    noise = [1.0 if step % 2 else 3.0 for step in steps]
    noise[200] = 1e6
    _, (panel,) = plot_history({"step": steps, "loss": noise})
    raw, smooth = panel.get_lines()
    assert list(raw.get_ydata()) == noise
    assert len(smooth.get_ydata()) == 400
    assert smooth.get_ydata().max() <= 3.0
    assert smooth.get_label() == "loss"


def test_a_narrow_scale_has_plain_numbers() -> None:
    figure, (panel,) = plot_history({"step": [1, 2], "loss": [4.1, 1.9]})
    figure.canvas.draw()
    labels = [label.get_text() for label in panel.get_yticklabels()]
    assert "2" in labels
    assert not any("10" in label and "^" in label for label in labels)
