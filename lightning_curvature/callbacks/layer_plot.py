"""The picture of `LayerStatistics`: heat maps over layers and steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lightning_curvature.callbacks.layer_moments import SIDES
from lightning_curvature.callbacks.pictures import require_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_layers"]

_TITLES = {"activation": "activation", "output_grad": "output gradient"}
# Longer names of layers lose their beginning.
_NAME_LENGTH = 28
# Inches: what a layer takes, within limits, and what goes around a map.
_ROW, _LEAST, _MOST, _AROUND = 0.18, 1.5, 9.0, 0.7


# Largest over smallest value, up to which a scale has plain numbers.
_NARROW = 100


@dataclass(frozen=True)
class _Map:
    """One column of heat maps: a statistic of activations, and the same of output gradients."""

    statistic: str
    label: str
    scale: Literal["log", "share"]


_MAPS = (
    _Map("norm", "norm", "log"),
    _Map("dead_fraction", "dead fraction", "share"),
    _Map("effective_rank", "effective rank", "log"),
)


def plot_layers(history: Mapping[str, Sequence[float]]) -> "tuple[Figure, list[Axes]]":
    """Draw heat maps over layers and optimizer steps: norm, dead fraction, effective rank.

    The upper ones are of activations, the lower ones of output gradients. Gray is where nothing was
    measured, or a zero on a logarithmic scale.

    Args:
        history: Values by name, as in ``LayerStatistics.history``; ``"step"`` is required.

    Returns:
        The figure and its six axes, row by row.

    Raises:
        ModuleNotFoundError: If matplotlib is missing.
        ValueError: If ``history`` has no steps or no layers.

    Examples:
        >>> history = {"step": [1, 2], "activation_norm/head": [2.0, 3.0]}
        >>> figure, axes = plot_layers(history)
        >>> axes[0].get_title()
        'activation: norm'
    """
    require_matplotlib("LayerStatistics")
    from matplotlib.figure import Figure

    # In the order of the model: every layer has an output gradient, not every one an activation.
    names = sorted((name for name in history if "/" in name), key=lambda n: n.startswith(SIDES[0]))
    layers = list(dict.fromkeys(name.partition("/")[2] for name in names))
    if "step" not in history or not layers:
        raise ValueError(
            f"Invalid history: must have the key 'step' and layers, got {sorted(history)}."
        )
    height = min(max(_ROW * len(layers), _LEAST), _MOST)
    figure = Figure(figsize=(15.0, len(SIDES) * (height + _AROUND)), layout="constrained")
    grid = figure.subplots(len(SIDES), len(_MAPS), sharex=True, sharey=True, squeeze=False)
    for row, side in zip(grid, SIDES, strict=True):
        for ax, what in zip(row, _MAPS, strict=True):
            _draw(ax, history, layers, f"{side}_{what.statistic}", what)
            ax.set_title(f"{_TITLES[side]}: {what.label}", fontsize="medium")
    for ax in grid[-1]:
        ax.set_xlabel("optimizer step")
    # Labels of many layers would lie on top of each other.
    stride = -(-len(layers) * _ROW // _MOST)
    shown = range(0, len(layers), max(int(stride), 1))
    grid[0, 0].set_yticks([i + 0.5 for i in shown], [_short(layers[i]) for i in shown])
    grid[0, 0].set_ylim(len(layers), 0)
    for ax in grid.flat:
        ax.tick_params(axis="y", labelsize="x-small")
    return figure, list(grid.flat)


def _draw(
    ax: "Axes", history: Mapping[str, Sequence[float]], layers: Sequence[str], key: str, what: _Map
) -> None:
    from matplotlib.colors import LogNorm, Normalize

    steps = np.asarray(history["step"], dtype=float)
    nothing = [np.nan] * len(steps)
    values = np.array([history.get(f"{key}/{layer}", nothing) for layer in layers], dtype=float)
    values[~np.isfinite(values)] = np.nan
    norm: Any = Normalize(0.0, 1.0)
    if what.scale == "log":
        values[values <= 0] = np.nan
        known = values[~np.isnan(values)]
        norm = (
            LogNorm(known.min(), known.max()) if known.size and known.min() < known.max() else None
        )
    ax.set_facecolor("lightgray")
    mesh = ax.pcolormesh(
        _edges(steps),
        np.arange(len(layers) + 1),
        np.ma.masked_invalid(values),
        norm=norm,
        cmap="Reds" if what.scale == "share" else "viridis",
        rasterized=True,
    )
    bar = ax.figure.colorbar(mesh, ax=ax, fraction=0.05, pad=0.01, aspect=6 + 1.2 * len(layers))
    if what.scale == "log" and norm is not None and norm.vmax < _NARROW * norm.vmin:
        # Within two decades powers of ten say less than plain numbers.
        ticks = [digit * 10.0**power for power in range(-40, 40) for digit in (1, 2, 5)]
        ticks = [tick for tick in ticks if norm.vmin <= tick <= norm.vmax]
        ticks = ticks if len(ticks) > 1 else [norm.vmin, norm.vmax]
        bar.set_ticks(ticks, labels=[f"{tick:.3g}" for tick in ticks])
        bar.minorticks_off()
    bar.ax.tick_params(which="both", labelsize="x-small")


def _edges(steps: "np.ndarray") -> "np.ndarray":
    """Return where the columns begin and end: halfway between the steps."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middles = (steps[1:] + steps[:-1]) / 2
    return np.array([2 * steps[0] - middles[0], *middles, 2 * steps[-1] - middles[-1]])


def _short(name: str) -> str:
    return name if len(name) <= _NAME_LENGTH else "…" + name[1 - _NAME_LENGTH :]
