"""The dashboard of `CurvatureMonitor`: one panel per kind of value."""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lightning_curvature.callbacks.pictures import require_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["is_series", "plot_history"]

History = Mapping[str, Sequence[float]]

# Between these two reduction ratios the Levenberg-Marquardt rule leaves the damping as it is.
_THRESHOLDS = (0.25, 0.75)
# A ratio outside this range says no more than that the quadratic model is useless there.
_RATIO_VIEW = (-1.0, 2.5)
# From this many points on, single steps are drawn pale under their running median.
_MANY = 100
# Largest over smallest value, up to which a logarithmic scale has plain numbers.
_NARROW = 100
# The running median is over this share of the run.
_MEDIAN_SHARE = 1 / 20


@dataclass(frozen=True)
class _Panel:
    """One panel of the dashboard.

    Attributes:
        label: What is drawn, for the axis.
        keys: Names of the values; one that starts with "*" stands for all with this ending.
        scale: "log" where all values are positive, "positive" for a logarithmic scale without those
            that are not, "linear".
        view: Lowest and highest value shown, None for all.
        dots: Whether single steps are dots instead of a line.
        lines: Values at which a line is drawn.
    """

    label: str
    keys: tuple[str, ...]
    scale: Literal["log", "positive", "linear"] = "linear"
    view: tuple[float, float] | None = None
    dots: bool = False
    lines: tuple[float, ...] = ()


_PANELS = (
    _Panel("loss", ("loss", "new_loss"), "log"),
    _Panel("learning rate", ("lr",)),
    _Panel("damping", ("damping",), "positive"),
    _Panel("reduction ratio", ("reduction_ratio",), view=_RATIO_VIEW, dots=True, lines=_THRESHOLDS),
    _Panel("win rate", ("win_rate",), view=(-0.03, 1.03)),
    _Panel("norms", ("*_norm",), "positive"),
    _Panel("curvature drift", ("curvature_drift",), "positive", dots=True),
    _Panel("cost (% of a step)", ("cost_percent",)),
)


def plot_history(
    history: History, axes: "Sequence[Axes] | None" = None
) -> "tuple[Figure, list[Axes]]":
    """Draw loss, learning rate, damping, ratios, norms and cost over the optimizer steps.

    There is one panel for each of these that has values. Nothing of pyplot is used: no window
    opens, no global state changes.

    Args:
        history: Values by name, as in ``CurvatureMonitor.history``; ``"step"`` is required.
        axes: One pair of axes per panel to draw into. ``None`` makes a new figure.

    Returns:
        The figure and its axes.

    Raises:
        ModuleNotFoundError: If matplotlib is missing.
        ValueError: If ``history`` has no steps or ``axes`` are not as many as panels.

    Examples:
        >>> history = {"step": [1, 2], "loss": [2.0, 1.0], "damping": [1e-3, 5e-4]}
        >>> figure, axes = plot_history(history)
        >>> [ax.get_ylabel() for ax in axes]
        ['loss', 'damping']
    """
    require_matplotlib("CurvatureMonitor")
    if "step" not in history:
        raise ValueError(f"Invalid history: must have the key 'step', got {sorted(history)}.")
    panels = [panel for panel in _PANELS if _series(history, panel)] or list(_PANELS[:1])
    if axes is None:
        axes = _new_axes(len(panels))
    if len(axes) != len(panels):
        labels = ", ".join(repr(panel.label) for panel in panels)
        raise ValueError(f"Invalid axes: must be {len(panels)}, for {labels}, got {len(axes)}.")
    for panel, ax in zip(panels, axes, strict=True):
        _draw(ax, history, panel)
    return axes[0].figure.figure, list(axes)  # the second one in case of a subfigure


def _new_axes(count: int) -> "list[Axes]":
    from matplotlib.figure import Figure

    columns = 1 if count == 1 else 2 if count <= 4 else 3  # noqa: PLR2004 - what fits a screen
    rows = -(-count // columns)
    size = (max(4.2 * columns, 6.0), max(2.5 * rows, 3.6))
    figure = Figure(figsize=size, layout="constrained")
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(count)]
    for i, ax in enumerate(axes):
        ax.sharex(axes[0])
        if i + columns < count:  # another one is below
            ax.tick_params(labelbottom=False)
        else:
            ax.set_xlabel("optimizer step")
    return axes


def _series(history: History, panel: _Panel) -> dict[str, list[float]]:
    """Return the values that a panel shows: one series per name and optimizer."""
    least = sys.float_info.min if panel.scale == "positive" else -math.inf
    found = {
        name: [value if math.isfinite(value) and value >= least else math.nan for value in values]
        for key in panel.keys
        for name, values in history.items()
        if is_series(name, key)
    }
    return {
        name: values
        for name, values in found.items()
        if not all(math.isnan(value) for value in values)
    }


def _draw(ax: "Axes", history: History, panel: _Panel) -> None:
    steps = np.asarray(history["step"], dtype=float)
    series = _series(history, panel)
    for name, values in series.items():
        _draw_series(ax, steps, np.asarray(values), name, panel)
    for value in panel.lines:
        ax.axhline(value, color="gray", linestyle="--", linewidth=0.8)
    ax.set_ylabel(panel.label)
    ax.grid(alpha=0.3)
    shown = [value for values in series.values() for value in values if not math.isnan(value)]
    if panel.scale != "linear" and shown and min(shown) > 0:
        ax.set_yscale("log")
        if max(shown) < _NARROW * min(shown):
            _number_plainly(ax)
    if shown and panel.view is not None:
        low, high = panel.view
        bottom, top = ax.get_ylim()
        ax.set_ylim(max(bottom, low), min(top, high))
    if len(series) > 1:
        ax.legend(fontsize="x-small", loc="best")


def _number_plainly(ax: "Axes") -> None:
    """Label a logarithmic axis with 1, 2, 5, ...: powers of ten are too few for it."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _draw_series(
    ax: "Axes", steps: "np.ndarray", values: "np.ndarray", name: str, panel: _Panel
) -> None:
    """Draw one series; a long one pale, with its running median on top."""
    style: dict[str, Any] = {"linewidth": 1.2}
    if panel.dots:
        style = {"linestyle": "", "marker": ".", "markersize": 4}
    known = ~np.isnan(values)
    # A value that is not measured at every step is a line between those where it was.
    steps, values = steps[known], values[known]
    if len(values) < _MANY:
        ax.plot(steps, values, label=name, alpha=0.7 if panel.dots else 1.0, **style)
        return
    (line,) = ax.plot(steps, values, alpha=0.3, **{**style, "linewidth": 0.8})
    smooth = _running_median(values, max(5, int(len(values) * _MEDIAN_SHARE)))
    ax.plot(steps, smooth, label=name, color=line.get_color(), linewidth=1.4)


def _running_median(values: "np.ndarray", width: int) -> "np.ndarray":
    """Return the median around every value; at the ends over fewer values."""
    half = width // 2
    padded = np.pad(values, half, constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1)
    result: np.ndarray = np.nanmedian(windows, axis=1)
    return result


def is_series(name: str, key: str) -> bool:
    """Tell whether ``name`` is ``key`` of the only optimizer or of one of several.

    Args:
        name: Name in the history.
        key: Name of a value; "*_norm" stands for every one with this ending.
    """
    plain, _, suffix = name.partition("/")
    if suffix and not suffix.startswith("opt"):
        return False
    return plain.endswith(key[1:]) if key.startswith("*") else plain == key
