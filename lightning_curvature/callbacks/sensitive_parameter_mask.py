"""SensitiveParameterMask: trains the few entries that matter, and may quantize the rest."""

import inspect
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lightning_curvature.callbacks.quantized_rest import QuantizedRest
from lightning_curvature.callbacks.squared_gradients import squared_gradients
from lightning_curvature.callbacks.trajectory_log import TrajectoryLog
from lightning_curvature.checks import (
    check_choice,
    check_count,
    check_in_range,
    check_interval,
    check_positive,
)
from lightning_curvature.curvature.quantized import Bits
from lightning_curvature.curvature.sensitive import (
    Criterion,
    captured_share,
    largest_entries,
    random_entries,
)
from lightning_curvature.optim.zeroth_order import ZerothOrderOptimizer

__all__ = ["SensitiveParameterMask"]

_BITS: dict[str, Bits] = {"int8": 8, "int4": 4}


class SensitiveParameterMask(Callback):
    """Let a zeroth-order optimizer train only the entries that the loss is most sensitive to.

    A random direction has as many entries as are trained, and its slope tells the less of each the
    more there are. When training starts, the entries with the largest squared gradients are chosen
    from all trained parameters together, and ``optimizer.set_mask`` is called; parameters without
    any are left alone. The whole fit then trains these, with state for these alone, and a
    checkpoint holds them with the optimizer: a resumed run goes on with the same ones. Groups with
    ``first_order=True`` are trained as always.

    With ``quantize`` all other entries of linear, embedding and convolution weights are stored in 8
    or 4 bits while the fit lasts, and each forward pass makes the weight of a layer anew. Weights
    that are frozen are stored so, too, and must stay frozen. Checkpoints hold whole weights under
    their ordinary names, with the rounding that was trained with, and so does the module after the
    fit.

    | key | meaning | unit |
    | --- | --- | --- |
    | `curvature/trained_entries` | entries that are trained | 1 |
    | `curvature/trained_fraction` | share of all that could be | 0 to 1 |
    | `curvature/captured_share` | their share of all squared gradient, if measured | 0 to 1 |

    Choosing by squared gradients costs ``num_batches`` forward and backward passes, and for that
    time the memory of a backward and two copies of the parameters. They run through your own
    ``training_step`` with batches of their own and leave no trace in training, except for what
    `in_extra_pass` is for.

    Args:
        fraction: Share of the entries to train, in (0, 1]; at least one is trained.
        criterion: What is compared: "fisher" for squared gradients of the training loss,
            "magnitude" for the weights themselves, "random" for nothing.
        num_batches: Batches per rank whose squared gradients are averaged, for "fisher".
        update_interval: Optimizer steps after which entries are chosen anew; None for never. One of
            the batches is then that at hand. Entries that stay keep their state, new ones start
            with the mean of it.
        seed: Seed of random choices, of the batches that "fisher" looks at and of their dropout.
        quantize: How the other entries are stored: "none" as they are, "int8" with a scale per
            row, "int4" with a scale per 64 entries of a row.

    Attributes:
        num_entries: Number of entries that are trained; None before a fit.
        num_candidates: Number of entries that could be.
        captured_share: Share of all squared gradient in the chosen ones; None if not measured.

    Raises:
        MisconfigurationException: If the Trainer has no zeroth-order optimizer, squared gradients
            cannot be measured, or a `TrajectoryLog` would log quantized weights (when fit starts).
        ValueError: If an argument is out of range.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> mask = SensitiveParameterMask(0.001, quantize="int8")
        >>> trainer = Trainer(callbacks=[mask], accelerator="cpu", logger=False)

    References:
        Guo et al., 2024, arXiv:2406.02913.
    """

    def __init__(
        self,
        fraction: float = 0.001,
        criterion: Criterion = "fisher",
        num_batches: int = 8,
        update_interval: int | None = None,
        seed: int = 0,
        quantize: Literal["none", "int8", "int4"] = "none",
    ) -> None:
        super().__init__()
        check_in_range("fraction", fraction, 0, 1, include_low=False, include_high=True)
        check_choice("criterion", criterion, ("fisher", "magnitude", "random"))
        check_count("num_batches", num_batches)
        check_choice("quantize", quantize, ("none", "int8", "int4"))
        if update_interval is not None:
            check_interval("update_interval", update_interval)
            if quantize != "none":
                raise ValueError(
                    f"Invalid update_interval={update_interval!r}: with quantize={quantize!r} the "
                    "entries stay the same, those that leave would lose what they have learned."
                )
        check_positive("seed", seed, zero=True)
        self.fraction = fraction
        self.criterion: Criterion = criterion
        self.num_batches = num_batches
        self.update_interval = update_interval
        self.seed = seed
        self.quantize = quantize
        self.num_entries: int | None = None
        self.num_candidates: int | None = None
        self.captured_share: float | None = None
        # Step of the last choice of this run.
        self._chosen_at: int | None = None
        self._rest: QuantizedRest | None = None
        # How the rest is quantized: in a checkpoint, until it is used; in the run that has ended.
        self._loaded: dict[str, Any] | None = None
        self._last: dict[str, Any] | None = None

    # A fit

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the optimizer; earlier it does not exist."""
        self._release()
        self._last = self._chosen_at = None
        if not _optimizers(trainer):
            names = ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers)
            raise MisconfigurationException(
                "SensitiveParameterMask needs a zeroth-order optimizer such as MeZO or HiZOO, got "
                f"{names or 'none'}. Use one, or remove the callback."
            )
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if self.quantize != "none" and any(isinstance(c, TrajectoryLog) for c in callbacks):
            raise MisconfigurationException(
                "TrajectoryLog cannot log a run with quantized weights, which do not start where "
                "the logged weights do. Use quantize='none', or remove it."
            )
        if self.criterion == "fisher" and not pl_module.automatic_optimization:
            raise MisconfigurationException(
                "Squared gradients cannot be measured with manual optimization, whose "
                "training_step takes steps. Use criterion='magnitude' or 'random'."
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the entries, unless the optimizer brought them along, and quantize the rest."""
        owners = _owners(trainer)
        masks = [o.state[p]["mask"] for p, o in owners.items() if "mask" in o.state.get(p, {})]
        if masks:
            self.num_entries = sum(mask.numel() for mask in masks)
            self.num_candidates = sum(p.numel() for p in owners)
        else:
            self._choose(trainer)
        if self.quantize != "none":
            loaded, self._loaded = self._loaded, None
            self._rest = QuantizedRest(pl_module, owners, _BITS[self.quantize], loaded)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Choose anew where it is time, before the first batch of a step."""
        step = _step(trainer)
        due = self.update_interval is not None and step % self.update_interval == 0
        if due and step != self._chosen_at:
            self._choose(trainer, batch)

    # The choice

    def _choose(self, trainer: Trainer, batch: Any = None) -> None:
        step = self._chosen_at = _step(trainer)
        owners = _owners(trainer)
        params = list(owners)
        if not params:
            raise MisconfigurationException(
                "SensitiveParameterMask found no parameter that is trained by loss values alone."
            )
        self.captured_share = None
        if self.criterion == "random":
            sizes = {i: p.numel() for i, p in enumerate(params)}
            chosen = random_entries(sizes, self.fraction, self.seed, step)
        else:
            scores = dict(enumerate(self._scores(trainer, params, step, batch)))
            chosen = largest_entries(scores, self.fraction)
            if self.criterion == "fisher":
                self.captured_share = captured_share(scores, chosen)
        for i, (p, optimizer) in enumerate(owners.items()):
            optimizer.set_mask(p, chosen[i])
        self.num_entries = sum(positions.numel() for positions in chosen.values())
        self.num_candidates = sum(p.numel() for p in params)
        self._tell(trainer)

    def _scores(
        self, trainer: Trainer, params: list[Tensor], step: int, batch: Any
    ) -> list[Tensor]:
        if self.criterion == "magnitude":
            return params
        (optimizer, *_) = _optimizers(trainer)
        eval_mode = optimizer.param_groups[0].get("model_mode") == "eval"
        scores = squared_gradients(
            trainer,
            params,
            self.num_batches,
            self.seed,
            step,
            batch=batch,
            eval_mode=eval_mode,
        )
        if not all(bool(torch.isfinite(score).all()) for score in scores):
            raise RuntimeError(
                f"Squared gradients of {self.num_batches} batches are not all finite: no entries "
                "can be chosen by them. Check the loss, or use precision='bf16-mixed' or "
                "'32-true', or criterion='magnitude'."
            )
        return scores

    def _tell(self, trainer: Trainer) -> None:
        assert self.num_entries is not None
        assert self.num_candidates is not None
        fraction = self.num_entries / self.num_candidates
        metrics = {"trained_entries": float(self.num_entries), "trained_fraction": fraction}
        text = (
            f"SensitiveParameterMask trains {self.num_entries:,} of {self.num_candidates:,} "
            f"entries ({100 * fraction:.3g} %)"
        )
        if self.captured_share is not None:
            metrics["captured_share"] = self.captured_share
            text += f", which carry {100 * self.captured_share:.3g} % of the squared gradient"
        rank_zero_info(f"{text}.")
        for logger in trainer.loggers:
            logger.log_metrics(
                {f"curvature/{name}": value for name, value in metrics.items()},
                step=trainer.global_step,
            )

    # The end

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Give whole weights back: Lightning does not call ``teardown`` after an exception."""
        self._release()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give whole weights back."""
        self._release()

    def _release(self) -> None:
        if self._rest is not None:
            # A checkpoint may be written after an exception.
            self._last = self._rest.state()
            self._rest.undo()
            self._rest = None

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return what is not in the optimizer's state, where the entries are."""
        quantized = self._last if self._rest is None else self._rest.state()
        return {"captured_share": self.captured_share, "quantized": quantized}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what a checkpoint holds."""
        self.captured_share = state_dict["captured_share"]
        self._loaded = state_dict["quantized"]

    def __getstate__(self) -> dict[str, Any]:
        """Leave what belongs to one run out of pickles."""
        return {**self.__dict__, "_rest": None, "_loaded": None, "_last": None}

    def __repr__(self) -> str:
        arguments = inspect.signature(SensitiveParameterMask).parameters
        shown = [
            f"{name}={getattr(self, name)!r}"
            for name, argument in arguments.items()
            if getattr(self, name) != argument.default
        ]
        return f"SensitiveParameterMask({', '.join(shown)})"


def _optimizers(trainer: Trainer) -> list[ZerothOrderOptimizer]:
    return [o for o in trainer.optimizers if isinstance(o, ZerothOrderOptimizer)]


def _step(trainer: Trainer) -> int:
    """Return the number of optimizer steps done; it is saved with the optimizer."""
    return _optimizers(trainer)[0]._steps_done


def _owners(trainer: Trainer) -> dict[Tensor, ZerothOrderOptimizer]:
    """Return the parameters that are trained by loss values, and their optimizers."""
    return {
        p: optimizer
        for optimizer in _optimizers(trainer)
        for group in optimizer.param_groups
        if not group["first_order"]
        for p in group["params"]
        if p.requires_grad
    }
