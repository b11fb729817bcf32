"""The picture of `CurvatureMonitor`: loss, learning rate, damping, reduction ratio."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["is_series", "plot_history", "require_matplotlib"]

# Between these two reduction ratios the Levenberg-Marquardt rule leaves the damping as it is.
_THRESHOLDS = (0.25, 0.75)
# A ratio outside this range says no more than that the quadratic model is useless there.
_RATIO_VIEW = (-1.0, 2.5)


def plot_history(
    history: Mapping[str, Sequence[float]], axes: "Sequence[Axes] | None" = None
) -> "tuple[Figure, list[Axes]]":
    """Draw loss, learning rate, damping and reduction ratio over the optimizer steps.

    Nothing of pyplot is used: no window opens, no global state changes.

    Args:
        history: Values by name, as in ``CurvatureMonitor.history``; ``"step"`` is required.
        axes: Four axes to draw into. ``None`` makes a new figure.

    Returns:
        The figure and its four axes.

    Raises:
        ModuleNotFoundError: If matplotlib is missing.
        ValueError: If ``history`` has no steps or ``axes`` are not four.

    Examples:
        >>> history = {"step": [1, 2], "loss": [2.0, 1.0], "damping": [1e-3, 5e-4]}
        >>> figure, axes = plot_history(history)
        >>> [ax.get_ylabel() for ax in axes]
        ['loss', 'learning rate', 'damping', 'reduction ratio']
    """
    require_matplotlib()
    if "step" not in history:
        raise ValueError(f"Invalid history: must have the key 'step', got {sorted(history)}.")
    if axes is None:
        from matplotlib.figure import Figure

        new_figure = Figure(figsize=(9.0, 6.0), layout="constrained")
        panels: list[Axes] = list(new_figure.subplots(2, 2, sharex=True).flat)
        bottom = panels[2:]
    else:
        panels = list(axes)
        bottom = panels
    if len(panels) != 4:  # noqa: PLR2004
        raise ValueError(f"Invalid axes: must be 4, got {len(panels)}.")
    loss, lr, damping, ratio = panels
    _draw(loss, history, "loss", "loss")
    _draw(loss, history, "new_loss", "loss", linestyle=":")
    _draw(lr, history, "lr", "learning rate")
    _draw(damping, history, "damping", "damping")
    _draw(ratio, history, "reduction_ratio", "reduction ratio", linestyle="", marker=".", alpha=0.6)
    for panel in (loss, damping):
        _use_log_scale(panel)
    for threshold in _THRESHOLDS:
        ratio.axhline(threshold, color="gray", linestyle="--", linewidth=0.8)
    low, high = ratio.get_ylim()
    ratio.set_ylim(max(low, _RATIO_VIEW[0]), min(high, _RATIO_VIEW[1]))
    for panel in bottom:
        panel.set_xlabel("optimizer step")
    for panel in panels:
        panel.grid(alpha=0.3)
        if len(panel.get_legend_handles_labels()[0]) > 1:
            panel.legend(fontsize="small")
    return loss.figure.figure, panels  # the second one in case of a subfigure


def _draw(
    panel: "Axes", history: Mapping[str, Sequence[float]], key: str, label: str, **style: Any
) -> None:
    """Draw every series of one name: one per optimizer."""
    panel.set_ylabel(label)
    for name, values in history.items():
        if is_series(name, key):
            finite = [value if math.isfinite(value) else math.nan for value in values]
            panel.plot(history["step"], finite, label=name, linewidth=1.2, **style)


def _use_log_scale(panel: "Axes") -> None:
    """Switch to a logarithmic axis unless something shown is not positive."""
    shown = [
        value
        for line in panel.get_lines()
        for value in np.asarray(line.get_ydata(), dtype=float)
        if not math.isnan(value)
    ]
    if shown and min(shown) > 0:
        panel.set_yscale("log")


def is_series(name: str, key: str) -> bool:
    """Whether ``name`` is ``key`` of the only optimizer or of one of several."""
    return name == key or name.startswith(f"{key}/opt")


def require_matplotlib() -> None:
    """Check that matplotlib is there.

    Raises:
        ModuleNotFoundError: If it is not.
    """
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Drawing curvature curves needs matplotlib. Install it with "
            '`pip install "lightning-curvature[demo]"`, or use CurvatureMonitor(plot=False).'
        ) from error
