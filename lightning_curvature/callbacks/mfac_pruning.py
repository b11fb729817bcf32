"""MFACPruning: prunes the weights that the loss needs least during a fit, and keeps them pruned."""

import inspect
import math
import weakref
from collections.abc import Sequence
from typing import Any, Literal

from lightning.fabric.utilities import rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from typing_extensions import override

from lightning_curvature.callbacks.collection_progress import collection_progress
from lightning_curvature.callbacks.gradient_rows import gradient_rows
from lightning_curvature.callbacks.kept_masks import KeptMasks
from lightning_curvature.callbacks.pictures import require_matplotlib, write_picture
from lightning_curvature.callbacks.pruning_choice import (
    Choice,
    choose_parameters,
    refuse_manual_steps,
    refuse_trainer,
)
from lightning_curvature.callbacks.pruning_log import PruningLog
from lightning_curvature.checks import check_count, check_in_range, check_positive
from lightning_curvature.curvature.sensitive import Criterion
from lightning_curvature.oracle.ranks import world_size
from lightning_curvature.pruning.event import WeightUpdate
from lightning_curvature.pruning.fisher_pruner import FisherPruner
from lightning_curvature.pruning.parameters import PrunableParameters
from lightning_curvature.pruning.report import PruningReport
from lightning_curvature.pruning.schedule import (
    CubicSparsity,
    ListSparsity,
    SparsitySchedule,
    recomputation_targets,
)
from lightning_curvature.pruning.selection import Scope

__all__ = ["MFACPruning"]

_VERSION = 1


class MFACPruning(Callback):
    """Prune the weights that the loss needs least, and let the others make up for them.

    What a weight costs is predicted with the inverse of a damped Fisher matrix, made of
    ``num_grads`` gradients, each of the mean loss of one batch (`FisherPruner` has the formulas).
    Gradients come from your own ``training_step`` in eval mode, with batches of their own, before
    the first batch of the epoch at which weights are pruned; they leave no trace in training,
    except for what `in_extra_pass` is for. Then training goes on as before, under any optimizer:
    weights that are pruned stay exactly 0, and what the optimizer remembers of them is set to 0.

    Until the fit is over the layers have masks of `torch.nn.utils.prune`. Checkpoints hold weights
    under their ordinary names, so that they can be loaded without the callback, and the masks among
    what callbacks save: a resumed run goes on bit for bit. A second fit of the same module with the
    same callback keeps the masks.

    | key | meaning | unit |
    | --- | --- | --- |
    | `pruning/sparsity` | fraction of the prunable weights that is gone | 0 to 1 |
    | `pruning/predicted_loss_increase` | what the event costs; of gradients only | loss |
    | `pruning/sparsity/<layer>` | the same of each parameter, with ``per_layer`` | 0 to 1 |

    The picture shows the sparsity of the layers, that of all after every event, and histograms of
    the saliency of the last event. It is written by rank zero when fit ends, also when it ends with
    an exception.

    An event costs ``num_recomputations * num_grads`` forward and backward passes, for that time
    ``num_grads`` copies of the prunable weights in host memory, in float32 (divided by the number
    of ranks, each of which brings its share), and what `FisherPruner` costs.

    Args:
        sparsity: Fraction of the weights to prune at once, in (0, 1), unless there is a
            ``schedule``.
        schedule: When to prune and how much, such as `CubicSparsity` or `ListSparsity`, instead of
            ``sparsity``; an epoch it names is the first of training what is left.
        prune_epoch: Epoch before whose first batch ``sparsity`` is reached.
        num_grads: Number of gradients of all ranks together; better no fewer than ``block_size``,
            see `FisherPruner`.
        damping: Added to the diagonal of the Fisher matrix, > 0. It belongs to a batch size:
            gradients of larger batches have less noise.
        block_size: Neighboring coordinates whose interactions are looked at; None for all of them.
        num_recomputations: In how many steps an event prunes, each with new gradients. One-shot
            pruning to high sparsities needs many, events that prune little need one.
        fisher_batch_size: Examples per gradient and rank; 1 for gradients of single examples. None
            takes the batches of training. Otherwise the train loader must be a ``DataLoader`` that
            can be made again with another batch size.
        criterion: What is compared: "fisher" for the costs above, "magnitude" for the weights
            themselves, "random" for nothing. The last two need no gradients and change no others.
        pattern: "unstructured", "N:M" such as "2:4", or blocks "RxC" such as "4x1".
        scope: Whether the sparsity is that of all layers together ("global") or of each ("layer").
        weight_update: How the weights that stay are changed, see `FisherPruner`.
        parameters_to_prune: Layers with names of parameters, as for Lightning's ``ModelPruning``,
            or patterns of whole names such as ``"encoder.*.weight"``. None takes all linear and
            convolution layers.
        parameter_names: Which parameters of such layers.
        make_pruning_permanent: Whether to take the masks off after the fit. The zeros stay.
        plot: Draw the picture when fit ends. Needs matplotlib (the extra ``demo``).
        filename: Name of the picture inside ``trainer.log_dir``. Its ending picks the format.
        per_layer: Whether to log the sparsity of every parameter.
        verbose: 0 to say nothing, 1 for a line per event and a table when fit ends, 2 for a table
            after every event.
        seed: Seed of random choices, and of the batches that gradients are taken of.

    Attributes:
        parameters: The parameters and their masks, during a fit; None outside.
        skipped_batches: Batches of the last event left out, as they had no finite gradient.

    Raises:
        MisconfigurationException: If nothing can be pruned, or not with this Trainer (in ``setup``
            and when fit starts).
        ModuleNotFoundError: If ``plot`` is set and matplotlib is missing (in ``setup``).
        ValueError: If an argument is out of range.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_curvature.pruning import CubicSparsity
        >>> gradual = MFACPruning(schedule=CubicSparsity(0.9, start_epoch=1, end_epoch=9))
        >>> trainer = Trainer(callbacks=[gradual], max_epochs=12, accelerator="cpu", logger=False)

    References:
        Frantar et al., 2021, arXiv:2107.03356.
    """

    def __init__(
        self,
        sparsity: float | None = None,
        schedule: SparsitySchedule | None = None,
        prune_epoch: int = 0,
        num_grads: int = 256,
        damping: float = 1e-4,
        block_size: int | None = 128,
        num_recomputations: int = 16,
        fisher_batch_size: int | None = None,
        criterion: Criterion = "fisher",
        pattern: str = "unstructured",
        scope: Scope = "global",
        weight_update: WeightUpdate = "joint",
        parameters_to_prune: Choice | None = None,
        parameter_names: Sequence[str] = ("weight",),
        make_pruning_permanent: bool = True,
        plot: bool = True,
        filename: str = "pruning.png",
        per_layer: bool = False,
        verbose: Literal[0, 1, 2] = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._schedule = _schedule_of(sparsity, schedule, prune_epoch)
        check_count("num_recomputations", num_recomputations)
        if fisher_batch_size is not None:
            check_count("fisher_batch_size", fisher_batch_size)
        _check_list("parameters_to_prune", parameters_to_prune)
        _check_list("parameter_names", parameter_names)
        if not filename:
            raise ValueError(f"Invalid filename={filename!r}: must not be empty.")
        if verbose not in (0, 1, 2):
            raise ValueError(f"Invalid verbose={verbose!r}: must be 0, 1 or 2.")
        check_positive("seed", seed, zero=True)
        self.sparsity = sparsity
        self.schedule = schedule
        self.prune_epoch = prune_epoch
        self.num_grads = num_grads
        self.damping = damping
        self.block_size = block_size
        self.num_recomputations = num_recomputations
        self.fisher_batch_size = fisher_batch_size
        self.criterion: Criterion = criterion
        self.pattern = pattern
        self.scope: Scope = scope
        self.weight_update: WeightUpdate = weight_update
        self.parameters_to_prune = parameters_to_prune
        self.parameter_names = parameter_names
        self.make_pruning_permanent = make_pruning_permanent
        self.plot = plot
        self.filename = filename
        self.per_layer = per_layer
        self.verbose = verbose
        self.seed = seed
        self.parameters: PrunableParameters | None = None
        self.skipped_batches = 0
        self._log = PruningLog(per_layer, verbose)
        self._kept: KeptMasks | None = None
        # Packed, while they are not on the module, and whose they are.
        self._masks: dict[str, Tensor] = {}
        self._module: weakref.ref[LightningModule] | None = None
        self._loaded: dict[str, Any] | None = None
        # The last epoch that the schedule was asked about.
        self._epoch = -1
        self._log_dir: str | None = None
        # Checkpoints that were the best ones at the last event.
        self._best: set[tuple[str, float]] = set()
        # What `FisherPruner` checks should be known now.
        end = self._make_pruner(_placeholder()).pattern.max_sparsity
        if sparsity is not None and sparsity > end:
            raise ValueError(f"Invalid sparsity={sparsity!r}: pattern {pattern!r} ends at {end}.")

    @property
    def history(self) -> dict[str, list[float]]:
        """What was logged, by name without "pruning/", with ``"step"`` and ``"epoch"``; a copy."""
        return self._log.history

    # A fit

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the Trainer, and note where the picture goes, on every rank."""
        if stage != "fit":
            return
        self._loaded = None
        refuse_trainer(trainer)
        if self.plot:
            require_matplotlib("MFACPruning")
            # Asked for here because `log_dir` is a collective call.
            self._log_dir = trainer.log_dir or trainer.default_root_dir

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the parameters; the module may have made them just now."""
        self._release()
        self._best = set()
        needs_gradients = self.criterion == "fisher"
        if needs_gradients:
            refuse_manual_steps(pl_module)
        self.parameters = choose_parameters(
            pl_module, self.parameters_to_prune, self.parameter_names, needs_gradients
        )
        self._check_schedule(trainer.max_epochs or 0)
        loaded, self._loaded = self._loaded, None
        same = self._module is not None and self._module() is pl_module
        self._module, self._epoch = weakref.ref(pl_module), -1
        if loaded is not None:
            self._masks, self._epoch = loaded["masks"], loaded["epoch"]
            self._log.events = list(loaded["events"])
        elif not same:
            self._masks, self._log.events = {}, []

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put on the masks of a run that goes on, and keep what will be pruned."""
        # Later than `on_fit_start`, in which layers are looked for by others: they look as ever.
        assert self.parameters is not None
        self._kept = KeptMasks(
            self.parameters, trainer.optimizers, self._masks, self.make_pruning_permanent
        )

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune if the schedule says so."""
        self._prune_if_due(trainer)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Prune if the start of the epoch was left out."""
        assert self._kept is not None
        self._kept.follow(trainer.optimizers)
        # As Lightning does in a run resumed from a checkpoint of an epoch's last batch.
        self._prune_if_due(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what is left, and make it permanent before the last checkpoint."""
        assert self.parameters is not None
        self._log.end(self.parameters)
        self._release()
        self._warn_at_end(trainer)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the picture."""
        self._write_plot(trainer)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave a usable module, and draw what there is; failure must not hide the exception."""
        self._release()
        try:
            self._write_plot(trainer)
        except Exception as error:  # whatever drawing raises, the training error is the news
            rank_zero_warn(f"MFACPruning could not write {self.filename}: {error}")

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take everything off the module."""
        self._release()

    # An event

    def _prune_if_due(self, trainer: Trainer) -> None:
        if trainer.current_epoch == self._epoch:
            return
        epoch = trainer.current_epoch
        sparsity = self._schedule.sparsity(epoch)
        assert self.parameters is not None
        assert self._kept is not None
        before = self.parameters.sparsity()
        pruner = self._make_pruner(self.parameters)
        # In whole weights and groups: a second fit must not collect gradients to prune nothing.
        if sparsity is None or sparsity <= before or pruner.has_reached(sparsity):
            self._epoch = epoch
            return
        self._kept.follow(trainer.optimizers)
        reports = self._prune(trainer, self.parameters, before, sparsity)
        # Not before: a run resumed after an exception in the middle of an event goes on with it.
        self._epoch = epoch
        self._kept.forget_pruned()
        self._best = _best_checkpoints(trainer)
        self._log.add(trainer, self.parameters, before, reports)
        if self.skipped_batches:
            rank_zero_warn(
                f"MFACPruning left out {self.skipped_batches} batches without a finite gradient.",
                category=RuntimeWarning,
            )

    def _prune(
        self, trainer: Trainer, parameters: PrunableParameters, before: float, sparsity: float
    ) -> list[PruningReport]:
        pruner = self._make_pruner(parameters)
        # Without gradients all steps would prune the same; a trial run should not take long.
        in_one = not pruner.needs_gradients or _is_dev_run(trainer)
        targets = recomputation_targets(before, sparsity, 1 if in_one else self.num_recomputations)
        self.skipped_batches = 0
        if not pruner.needs_gradients:
            return [pruner.prune(target) for target in targets]
        frozen = [
            name
            for name, p in zip(parameters.names, parameters.tensors(), strict=True)
            if not p.requires_grad
        ]
        if frozen:
            raise MisconfigurationException(
                "MFACPruning cannot prune parameters that were frozen since the fit started: "
                f"{', '.join(frozen)}. Leave them out, or use criterion='magnitude'."
            )
        reports = []
        rounds = len(targets) * -(-self.num_grads // world_size())
        with collection_progress(trainer, "Pruning", rounds) as advance:
            for number, target in enumerate(targets):
                found = gradient_rows(
                    trainer,
                    parameters.tensors(),
                    self.num_grads,
                    *(self.seed, trainer.current_epoch, number),
                    positions=parameters.survivors(),
                    batch_size=self.fisher_batch_size,
                    advance=advance,
                )
                self.skipped_batches += found.skipped
                reports.append(pruner.prune(target, found.rows))
                # The next ones would lie beside them.
                del found
        return reports

    def _make_pruner(self, parameters: PrunableParameters) -> FisherPruner:
        return FisherPruner(
            parameters,
            num_grads=self.num_grads,
            damping=self.damping,
            block_size=self.block_size,
            criterion=self.criterion,
            pattern=self.pattern,
            scope=self.scope,
            weight_update=self.weight_update,
            seed=self.seed,
        )

    def _check_schedule(self, num_epochs: int) -> None:
        if num_epochs <= 0:
            return
        end, empty = self._make_pruner(_placeholder()).pattern.max_sparsity, True
        for epoch in range(num_epochs):
            sparsity = self._schedule.sparsity(epoch)
            empty = empty and sparsity is None
            if sparsity is not None and sparsity > end:
                raise MisconfigurationException(
                    f"{self._schedule!r} asks for sparsity {sparsity:.4g} at epoch {epoch}: "
                    f"pattern {self.pattern!r} ends at {end:.4g}."
                )
        if empty:
            rank_zero_warn(
                f"MFACPruning prunes nothing in the {num_epochs} epochs of this fit: its schedule "
                f"is {self._schedule!r}.",
                category=RuntimeWarning,
            )
        elif (late := _next_event(self._schedule, num_epochs)) is not None:
            rank_zero_warn(
                f"MFACPruning does not finish its schedule {self._schedule!r} in the {num_epochs} "
                f"epochs of this fit: epoch {late} is to prune more.",
                category=RuntimeWarning,
            )

    def _warn_at_end(self, trainer: Trainer) -> None:
        limit = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else math.inf
        due = _next_event(self._schedule, self._epoch + 1)
        if due is not None and due < limit:
            rank_zero_warn(
                f"The fit ended in epoch {self._epoch}, before MFACPruning had finished its "
                f"schedule {self._schedule!r}: epoch {due} was to prune more.",
                category=RuntimeWarning,
            )
        before = self._best & _best_checkpoints(trainer)
        if before:
            rank_zero_warn(
                "The best checkpoint was written before the last weights were pruned: "
                f"{', '.join(sorted(path for path, _ in before))}. It holds weights that are "
                "pruned by now, and so does ckpt_path='best'. Use a ModelCheckpoint that saves "
                "the last one, or prune in a fit of its own.",
                category=RuntimeWarning,
            )

    # What is left

    def _write_plot(self, trainer: Trainer) -> None:
        if self._log_dir is None or not trainer.is_global_zero or _is_dev_run(trainer):
            return
        if self._log.events:
            write_picture(self._log.picture(), self._log_dir, self.filename)

    def _release(self) -> None:
        kept, self._kept, self.parameters = self._kept, None, None
        if kept is not None:
            self._masks = kept.packed()  # a checkpoint may be written later
            kept.release()

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the masks, one bit per weight, and what was logged."""
        return {
            "version": _VERSION,
            "masks": self._masks if self._kept is None else self._kept.packed(),
            "epoch": self._epoch,
            "events": self._log.events,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what a checkpoint holds; it is used if a fit starts from it."""
        self._loaded = state_dict

    def __getstate__(self) -> dict[str, Any]:
        """Leave what belongs to one run out of pickles."""
        of_run = ("parameters", "_kept", "_module", "_loaded")
        return {**self.__dict__, **dict.fromkeys(of_run), "_masks": {}}

    def __repr__(self) -> str:
        arguments = inspect.signature(MFACPruning).parameters
        shown = [
            f"{name}={getattr(self, name)!r}"
            for name, argument in arguments.items()
            if getattr(self, name) != argument.default
        ]
        return f"MFACPruning({', '.join(shown)})"


def _schedule_of(sparsity: Any, schedule: Any, prune_epoch: Any) -> SparsitySchedule:
    """Check what says when and how much to prune."""
    if (sparsity is None) == (schedule is None):
        raise ValueError(
            f"Invalid sparsity={sparsity!r} and schedule={schedule!r}: give one of them."
        )
    if sparsity is None:
        if not isinstance(schedule, SparsitySchedule):
            raise TypeError(
                f"Invalid schedule={schedule!r}: must have a method sparsity(epoch), as "
                f"CubicSparsity has, got {type(schedule).__name__}."
            )
        return schedule
    check_in_range("sparsity", sparsity, 0, 1, include_low=False)
    if not isinstance(prune_epoch, int) or prune_epoch < 0:
        raise ValueError(f"Invalid prune_epoch={prune_epoch!r}: must be an integer >= 0.")
    return ListSparsity({prune_epoch: sparsity})


def _check_list(name: str, value: Any) -> None:
    if isinstance(value, str):
        raise TypeError(f"Invalid {name}={value!r}: must be a list, got str.")
    if value is not None and len(value) == 0:
        raise ValueError(f"Invalid {name}={value!r}: must not be empty.")


def _placeholder() -> PrunableParameters:
    """Return parameters without values, to make a pruner that checks its arguments."""
    return PrunableParameters([(nn.Linear(1, 1, device="meta"), "weight")])


def _next_event(schedule: SparsitySchedule, epoch: int) -> int | None:
    """Return the first epoch from this one on at which weights are pruned, if that is known."""
    # Schedules of users may not know of epochs beyond those they are made for.
    if isinstance(schedule, CubicSparsity):
        last = schedule.end_epoch
    elif isinstance(schedule, ListSparsity):
        last = max(schedule.sparsities)
    else:
        return None
    epochs = range(epoch, last + 1)
    return next((one for one in epochs if schedule.sparsity(one) is not None), None)


def _best_checkpoints(trainer: Trainer) -> set[tuple[str, float]]:
    """Return path and score of the best checkpoint of each callback that compares them."""
    callbacks = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    return {
        (c.best_model_path, float(c.best_model_score))
        for c in callbacks
        if c.monitor is not None and c.best_model_path and c.best_model_score is not None
    }


def _is_dev_run(trainer: Trainer) -> bool:
    """Tell whether this is a trial run, which leaves no files."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
