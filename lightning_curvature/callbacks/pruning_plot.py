"""The picture and the table of `MFACPruning`: sparsity of layers, saliency of weights."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lightning_curvature.callbacks.layer_norms import plain_name
from lightning_curvature.callbacks.pictures import require_matplotlib
from lightning_curvature.pruning.parameters import PrunableParameters

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

__all__ = ["layer_table", "plot_pruning"]

_LAYER = "sparsity/"
# Longer names of layers lose their beginning.
_NAME_LENGTH = 28
# Inches: what a layer takes, within limits.
_ROW, _LEAST, _MOST = 0.18, 3.0, 12.0
# Largest over smallest saliency, up to which the scale has digits between powers of ten.
_NARROW = 100


def plot_pruning(
    history: Mapping[str, Sequence[float]], saliency: "Mapping[str, Tensor] | None" = None
) -> "tuple[Figure, list[Axes]]":
    """Draw the sparsity of layers, that of all after every event, and histograms of saliency.

    Args:
        history: Values by name, as in ``MFACPruning.history``; ``"epoch"``, ``"sparsity"`` and at
            least one layer are required.
        saliency: Edges of bins, ascending and positive, and how many weights (or groups of them)
            were ``kept`` and ``pruned`` in each.

    Returns:
        The figure and its three axes.

    Raises:
        ModuleNotFoundError: If matplotlib is missing.
        ValueError: If ``history`` has no events or no layers.

    Examples:
        >>> history = {"epoch": [0], "sparsity": [0.5], "sparsity/0.weight": [0.5]}
        >>> figure, axes = plot_pruning(history)
        >>> axes[0].get_title()
        'sparsity of layers'
    """
    require_matplotlib("MFACPruning")
    from matplotlib.figure import Figure

    layers = [name for name in history if name.startswith(_LAYER)]
    if not layers or not len(history.get("epoch", ())) or "sparsity" not in history:
        raise ValueError(
            "Invalid history: must have the keys 'epoch', 'sparsity' and 'sparsity/<layer>', got "
            f"{sorted(history)}."
        )
    height = min(max(_ROW * len(layers), _LEAST), _MOST)
    figure = Figure(figsize=(15.0, height + 0.8), layout="constrained")
    axes = list(figure.subplots(1, 3))
    _draw_layers(axes[0], [name.removeprefix(_LAYER) for name in layers], history)
    _draw_events(axes[1], history)
    _draw_saliency(axes[2], saliency)
    return figure, axes


def _draw_layers(ax: "Axes", layers: Sequence[str], history: Mapping[str, Sequence[float]]) -> None:
    values = [history[_LAYER + layer][-1] for layer in layers]
    ax.barh(range(len(layers)), values, color="tab:blue")
    overall = history["sparsity"][-1]
    ax.axvline(overall, color="black", linestyle="--", label=f"all layers: {overall:.4g}")
    # Labels of many layers would lie on top of each other.
    stride = max(int(-(-len(layers) * _ROW // _MOST)), 1)
    shown = range(0, len(layers), stride)
    ax.set_yticks(list(shown), [_short(layers[i]) for i in shown])
    ax.tick_params(axis="y", labelsize="x-small")
    ax.set_ylim(len(layers) - 0.5, -0.5)
    ax.set_xlim(0, 1)
    ax.set_title("sparsity of layers", fontsize="medium")
    ax.legend(fontsize="small", loc="lower left")


def _draw_events(ax: "Axes", history: Mapping[str, Sequence[float]]) -> None:
    from matplotlib.ticker import MaxNLocator

    epochs = history["epoch"]
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.step(epochs, history["sparsity"], "o-", where="post", color="tab:blue")
    ax.set_ylim(0, 1)
    ax.set_xlabel("epoch")
    ax.set_title("sparsity after each event", fontsize="medium")
    costs = np.asarray(history.get("predicted_loss_increase", ()), dtype=float)
    if np.isfinite(costs).any():
        other = ax.twinx()
        other.plot(epochs, costs, "x:", color="tab:red")
        other.set_ylabel("predicted increase of the loss", color="tab:red")
        other.set_ylim(bottom=0)


def _draw_saliency(ax: "Axes", saliency: "Mapping[str, Tensor] | None") -> None:
    from matplotlib.ticker import LogFormatterSciNotation, LogLocator, NullFormatter

    ax.set_title("saliency at the last event", fontsize="medium")
    if saliency is None:
        ax.set_axis_off()
        return
    edges, kept, pruned = (
        np.asarray(saliency[name].tolist(), dtype=float) for name in ("edges", "kept", "pruned")
    )
    # A single value has no width on a logarithmic scale.
    if edges[0] == edges[-1]:
        edges = np.geomspace(edges[0] / 2, edges[0] * 2, len(edges))
    widths = np.diff(edges)
    ax.bar(edges[:-1], pruned, widths, align="edge", color="tab:red", label="pruned")
    ax.bar(edges[:-1], kept, widths, pruned, align="edge", color="tab:blue", label="kept")
    ax.set_xscale("log")
    # Within a decade there would be a label at every digit, one on top of the other.
    narrow = edges[-1] < _NARROW * edges[0]
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if narrow else (1.0,)))
    ax.xaxis.set_major_formatter(LogFormatterSciNotation(minor_thresholds=(math.inf, math.inf)))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("saliency")
    ax.set_ylabel("count")
    ax.legend(fontsize="small")


def layer_table(parameters: PrunableParameters) -> str:
    """Return a table of what is left of each parameter.

    Args:
        parameters: The parameters.

    Examples:
        >>> from torch import nn
        >>> print(layer_table(PrunableParameters([(nn.Linear(3, 2), "weight")])))
        parameter        | weights | left | sparsity
        Linear[0].weight |       6 |    6 |   0.0000
        all              |       6 |    6 |   0.0000
    """
    masks = {plain_name(name): mask for name, mask in parameters.masks().items()}
    counts = [(name, mask.numel(), int(mask.sum())) for name, mask in masks.items()]
    counts.append(("all", sum(n for _, n, _ in counts), sum(left for _, _, left in counts)))
    rows = [("parameter", "weights", "left", "sparsity")]
    rows += [
        (name, f"{total:,}", f"{left:,}", f"{1 - left / max(total, 1):.4f}")
        for name, total, left in counts
    ]
    first, *others = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        " | ".join([name.ljust(first), *(x.rjust(w) for x, w in zip(rest, others, strict=True))])
        for name, *rest in rows
    )


def _short(name: str) -> str:
    return name if len(name) <= _NAME_LENGTH else "…" + name[1 - _NAME_LENGTH :]
