"""What `MFACPruning` tells of its events: to loggers, in words, as a table and a picture."""

import math
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_curvature.callbacks.layer_norms import plain_name
from lightning_curvature.callbacks.pruning_plot import layer_table, plot_pruning
from lightning_curvature.pruning.parameters import PrunableParameters
from lightning_curvature.pruning.report import PruningReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PruningLog"]

# As in ModelPruning of Lightning: lines, and what the layers have left.
_LINES, _TABLES = 1, 2


class PruningLog:
    """Events of a run, in plain values that a checkpoint can hold.

    Args:
        per_layer: Whether loggers get the sparsity of every parameter.
        verbose: 0 for nothing in words, 1 for a line per event and a table at the end, 2 for a
            table after every event.

    Attributes:
        events: One dictionary per event.
    """

    def __init__(self, per_layer: bool, verbose: int) -> None:
        self._per_layer = per_layer
        self._verbose = verbose
        self.events: list[dict[str, Any]] = []

    @property
    def history(self) -> dict[str, list[float]]:
        """Columns of values by name, with step and epoch of the events."""
        names = dict.fromkeys(name for event in self.events for name in event["values"])
        places = {key: [float(event[key]) for event in self.events] for key in ("step", "epoch")}
        columns = {
            name: [event["values"].get(name, math.nan) for event in self.events] for name in names
        }
        return {**places, **columns}

    def add(
        self,
        trainer: Trainer,
        parameters: PrunableParameters,
        before: float,
        reports: list[PruningReport],
    ) -> None:
        """Tell of an event.

        Args:
            trainer: The Trainer.
            parameters: The parameters.
            before: Sparsity before it.
            reports: What each of its steps did.
        """
        last = reports[-1]
        values = {"sparsity": last.sparsity}
        changes = [r.quad_model_change for r in reports if r.quad_model_change is not None]
        if changes:
            values["predicted_loss_increase"] = sum(changes)
        layers = {
            f"sparsity/{plain_name(name)}": value for name, value in last.layer_sparsities.items()
        }
        scores = next((r.saliency for r in reversed(reports) if r.saliency is not None), None)
        self.events.append(
            {
                "epoch": trainer.current_epoch,
                "step": trainer.global_step,
                "values": {**values, **layers},
                "saliency": None
                if scores is None
                else {"edges": scores.edges, "kept": scores.kept, "pruned": scores.pruned},
            }
        )
        logged = {**values, **(layers if self._per_layer else {})}
        for logger in trainer.loggers:
            logger.log_metrics(
                {f"pruning/{name}": value for name, value in logged.items()},
                step=trainer.global_step,
            )
        if self._verbose >= _LINES:
            count = sum(report.num_pruned for report in reports)
            cost = f"; predicted increase of the loss {sum(changes):.3g}" if changes else ""
            rank_zero_info(
                f"MFACPruning pruned {count:,} of {parameters.total:,} weights before epoch "
                f"{trainer.current_epoch}: sparsity {before:.4g} -> {last.sparsity:.4g}{cost}."
            )
        if self._verbose >= _TABLES:
            rank_zero_info(layer_table(parameters))

    def end(self, parameters: PrunableParameters) -> None:
        """Show the table at the end of a fit.

        Args:
            parameters: The parameters.
        """
        if self.events and self._verbose == _LINES:
            rank_zero_info(layer_table(parameters))

    def picture(self) -> "Figure":
        """Draw the picture; there must be an event."""
        figure, _ = plot_pruning(self.history, self.events[-1]["saliency"])
        return figure
