"""SensitiveParameterMask: trains the few entries that matter, and may quantize the rest."""

import inspect
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_curvature.callbacks.squared_gradients import squared_gradients
from lightning_curvature.checks import check_choice, check_count, check_in_range, check_interval
from lightning_curvature.curvature.quantized import (
    Bits,
    QuantizedWeight,
    dense_state,
    quantize_rest,
    restore_rest,
)
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
    or 4 bits while the fit lasts, and each forward pass makes the weight of a layer anew. So does a
    frozen weight. Checkpoints hold whole weights under their ordinary names, with the rounding that
    was trained with, and so does the module after the fit.

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
        update_interval: Optimizer steps after which entries are chosen anew; None for never.
            Entries that stay keep their state, new ones start with the mean of it.
        seed: Seed of random choices, of the batches that "fisher" looks at and of their dropout.
        quantize: How the other entries are stored: "none" as they are, "int8" with a scale per
            row, "int4" with a scale per 64 entries of a row.

    Attributes:
        num_entries: Number of entries that are trained; None before a fit.
        num_candidates: Number of entries that could be.
        captured_share: Share of all squared gradient in the chosen ones; None if not measured.

    Raises:
        MisconfigurationException: If the Trainer has no zeroth-order optimizer, or squared
            gradients cannot be measured (when fit starts).
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
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise TypeError(f"Invalid seed={seed!r}: must be an integer.")
        self.fraction = fraction
        self.criterion: Criterion = criterion
        self.num_batches = num_batches
        self.update_interval = update_interval
        self.seed = seed
        self.quantize = quantize
        self.num_entries: int | None = None
        self.num_candidates: int | None = None
        self.captured_share: float | None = None
        self._forget()

    def _forget(self) -> None:
        """Forget what belongs to one run."""
        # Step of the last choice of this process.
        self._chosen_at: int | None = None
        # Scales and values of a checkpoint, until they are used; those of the weights at present.
        self._loaded: dict[str, Any] | None = None
        self._quantized: dict[str, QuantizedWeight] = {}
        self._last_state: dict[str, Any] | None = None
        self._handles: list[RemovableHandle] = []

    # A fit

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the optimizer; earlier it does not exist."""
        self._last_state = None
        self._chosen_at = None
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if sum(isinstance(callback, SensitiveParameterMask) for callback in callbacks) > 1:
            raise MisconfigurationException("One SensitiveParameterMask per Trainer is supported.")
        if not _optimizers(trainer):
            names = ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers)
            raise MisconfigurationException(
                "SensitiveParameterMask needs a zeroth-order optimizer such as MeZO or HiZOO, got "
                f"{names or 'none'}. Use one, or remove the callback."
            )
        if self.criterion == "fisher" and not pl_module.automatic_optimization:
            raise MisconfigurationException(
                "Squared gradients cannot be measured with manual optimization, whose "
                "training_step takes steps. Use criterion='magnitude' or 'random'."
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the entries, unless the optimizer brought them along, and quantize the rest."""
        chosen = {p: mask for p, o in _candidates(trainer) if (mask := _mask_of(o, p)) is not None}
        if not chosen:
            self._choose(trainer)
        else:
            self.num_entries = sum(mask.numel() for mask in chosen.values())
            self.num_candidates = sum(p.numel() for p, _ in _candidates(trainer))
        if self.quantize != "none":
            self._quantize(trainer, pl_module)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Choose anew where it is time, before the first batch of a step."""
        step = _step(trainer)
        due = self.update_interval is not None and step % self.update_interval == 0
        if due and step != self._chosen_at:
            self._choose(trainer)

    # The choice

    def _choose(self, trainer: Trainer) -> None:
        step = self._chosen_at = _step(trainer)
        pairs = _candidates(trainer)
        params = [p for p, _ in pairs]
        if not params:
            raise MisconfigurationException(
                "SensitiveParameterMask found no parameter that is trained by loss values alone."
            )
        self.captured_share = None
        if self.criterion == "random":
            sizes = {i: p.numel() for i, p in enumerate(params)}
            chosen = random_entries(sizes, self.fraction, self.seed, step)
        else:
            scores = dict(enumerate(self._scores(trainer, params, step)))
            chosen = largest_entries(scores, self.fraction)
            if self.criterion == "fisher":
                self.captured_share = captured_share(scores, chosen)
        for i, (p, optimizer) in enumerate(pairs):
            _set_mask(optimizer, p, chosen[i])
        self.num_entries = sum(positions.numel() for positions in chosen.values())
        self.num_candidates = sum(p.numel() for p in params)
        self._tell(trainer)

    def _scores(self, trainer: Trainer, params: list[Tensor], step: int) -> list[Tensor]:
        if self.criterion == "magnitude":
            return params
        (optimizer, *_) = _optimizers(trainer)
        eval_mode = optimizer.param_groups[0].get("model_mode") == "eval"
        scores = squared_gradients(
            trainer, params, self.num_batches, self.seed, step, eval_mode=eval_mode
        )
        if not all(bool(torch.isfinite(score).all()) for score in scores):
            raise RuntimeError(
                f"Squared gradients of {self.num_batches} batches are not all finite, so no entries "
                "can be chosen by them. Check the loss, or use precision='bf16-mixed' or "
                "'32-true', or criterion='magnitude'."
            )
        return scores

    def _tell(self, trainer: Trainer) -> None:
        assert self.num_entries is not None and self.num_candidates is not None
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

    # The rest

    def _quantize(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Quantize all but the masked entries, as they were in the run that is resumed."""
        trained = {id(p): _mask_of(o, p) for p, o in _candidates(trainer)}
        nothing = torch.empty(0, dtype=torch.int64)
        masks = {
            name: nothing if mask is None else mask
            for name, p in pl_module.named_parameters()
            if (mask := trained.get(id(p))) is not None or not p.requires_grad
        }
        bits = _BITS[self.quantize]
        loaded, self._loaded = self._loaded, None
        if loaded is None or loaded["bits"] != bits:
            loaded = {"scales": {}, "values": {}}
        self._quantized = quantize_rest(pl_module, masks, bits, scales=loaded["scales"])
        optimizers = {id(p): o for p, o in _candidates(trainer)}
        for name, p in pl_module.named_parameters(remove_duplicate=False):
            ...


def _optimizers(trainer: Trainer) -> list[ZerothOrderOptimizer]:
    return [o for o in trainer.optimizers if isinstance(o, ZerothOrderOptimizer)]
