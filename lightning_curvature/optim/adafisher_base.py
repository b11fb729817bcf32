"""What AdaFisher and AdaFisherW share: momentum divided by a Fisher diagonal made of layer factors.

Gomes, Zhang, Belilovsky, Wolf and Hosseini, "AdaFisher: Adaptive Second Order Optimization via
Fisher Information", ICLR 2025, arXiv:2405.16397. Written from the equations,

    F = S H^T + damping,    m <- beta m + (1 - beta) g,    theta <- theta - lr m / (1 - beta^t) / F

with the diagonals H and S of `curvature/layers.py`. ``mode="reference"`` is what the authors' code
does with them. ``mode="corrected"`` differs where that code loses the curvature:

- the weights of the running averages sum to 1, not to 0.088, so that F does not vanish beside the
  damping;
- factors are divided by their mean, instead of by their range plus 1e-6, which swallows them when
  the loss is a mean over many examples, or small;
- the damping is relative to the mean of F, and the step is multiplied by 1 + damping: a coordinate
  of average curvature takes the step lr m, whatever the damping;
- parameters find their layers by identity, not by walking two lists in parallel;
- all micro-batches and ranks of a step count alike; evaluation and recomputation do not count;
- parameters without a layer are scaled by the average of their squared gradients, not by 1, which
  is a thousandth of the step of all others.
"""

import logging
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_curvature import vectors
from lightning_curvature.checks import (
    check_choice,
    check_in_range,
    check_interval,
    check_positive,
)
from lightning_curvature.curvature.layer_diagonals import (
    Diagonal,
    damping_stats,
    paired_by_identity,
    paired_in_parallel,
    parameter_diagonals,
)
from lightning_curvature.curvature.layer_windows import (
    CorrectedWindow,
    LayerWindow,
    ReferenceWindow,
)
from lightning_curvature.optim.denominators import Denominator, denominated
from lightning_curvature.optim.diagonal import DiagonalOptimizer
from lightning_curvature.optim.per_tensor import advance_
from lightning_curvature.optim.saved_factors import (
    Entry,
    as_averages,
    as_entries,
    check_saved_factors,
    entries_of,
    moved,
    renumbered,
)
from lightning_curvature.optim.saved_state import STATE_KEY
from lightning_curvature.oracle.protocol import Oracle
from lightning_curvature.oracle.replay import is_compiled

__all__ = ["AdaFisherOptimizer", "Mode"]

Mode = Literal["corrected", "reference"]

_INTERVAL = "factor_update_interval"
# Defaults of lr and damping.
_DEFAULTS: dict[str, tuple[float, float]] = {"corrected": (0.3, 0.3), "reference": (1e-3, 1e-3)}
# Of the squared gradients of parameters without a layer, as in Adam.
_SQUARES, _SQUARES_DECAY = "exp_avg_sq", 0.999

_log = logging.getLogger(__name__)


class AdaFisherOptimizer(DiagonalOptimizer):
    """Base of AdaFisher and AdaFisherW, which differ in their weight decay.

    Args:
        params: Parameters or parameter groups.
        defaults: Hyper-parameters, as in `AdaFisher`.
    """

    asks = frozenset({"layers"})
    state_names = ("step", "exp_avg")
    shared_names: ClassVar[tuple[str, ...]] = (
        _INTERVAL,
        "factor_decay",
        "mode",
        "normalization",
        "max_failures",
        "foreach",
    )
    watched: ClassVar[dict[str, tuple[int, str]]] = {
        "skipped_refreshes": (
            1,
            "AdaFisher kept old factors {count} times: activations or output gradients of a layer "
            "were not finite. stats['skipped_refreshes'] goes on counting.",
        ),
    }
    # Whether weight decay is added to the step instead of to the gradient.
    decoupled: ClassVar[bool]

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self._forget_layers()
        self._factors: dict[str, Entry] = {}
        mode = defaults["mode"]
        check_choice("mode", mode, _DEFAULTS)
        for name, default in zip(("lr", "damping"), _DEFAULTS[mode], strict=True):
            if defaults[name] is None:
                defaults[name] = default
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickle or deep copy; it has to be attached anew."""
        if "_window" not in self.__dict__:
            self._forget_layers()
            self._factors = {}
        super().__setstate__(state)

    def _check_group(self, group: dict[str, Any]) -> None:
        check_positive("lr", group["lr"], zero=True)
        check_in_range("beta", group["beta"], 0, 1)
        check_positive("damping", group["damping"])
        check_interval(_INTERVAL, group[_INTERVAL])
        check_in_range("factor_decay", group["factor_decay"], 0, 1)
        check_positive("weight_decay", group["weight_decay"], zero=True)
        check_choice("mode", group["mode"], _DEFAULTS)
        check_choice("normalization", group["normalization"], ("mean", "min-max"))
        check_interval("max_failures", group["max_failures"])

    # Layers

    def detach(self) -> None:
        """Remove the oracle and the hooks on the layers."""
        super().detach()
        if self._unwrapped() is self:
            self._forget_layers()

    @property
    def fallback_parameters(self) -> list[str]:
        """Names of the parameters that no layer is known for; empty while nothing is attached."""
        real = self._unwrapped()
        assert isinstance(real, AdaFisherOptimizer)
        if real.oracle is None or real.oracle.module is None:
            return []
        own = {id(p): number for number, p in enumerate(real._all_params())}
        return [
            name
            for name, p in real.oracle.module.named_parameters()
            if id(p) in own and own[id(p)] not in real._pairs
        ]

    @property
    def silent_layers(self) -> list[str]:
        """Names of the layers no statistics came from so far, though they were asked for."""
        real = self._unwrapped()
        assert isinstance(real, AdaFisherOptimizer)
        return [] if real._window is None else real._window.silent()

    def _forget_layers(self) -> None:
        self._window: LayerWindow | None = None
        self._compiled = False
        self._pairs: dict[int, list[tuple[str, str]]] = {}
        self._stuck: frozenset[int] = frozenset()
        self._diagonals: dict[int, Diagonal] | None = None

    @property
    def _reference(self) -> bool:
        return bool(self.param_groups[0]["mode"] == "reference")

    def _watch(self, oracle: Oracle) -> None:
        """Install the hooks and give every layer its factors."""
        assert oracle.module is not None
        self._compiled = is_compiled(oracle.module) or _has_compiled_methods(oracle.module)
        kind = ReferenceWindow if self._reference else CorrectedWindow
        self._window = kind(oracle.module, self._all_params(), self._watches_main_pass)
        oracle.attachments.append(self._window)
        self._factors = entries_of(self._window.layers, self._factors, where=self._cannot_load)
        self._pair()
        if self.fallback_parameters:
            names = ", ".join(self.fallback_parameters)
            _log.info(f"{type(self).__name__}: no layer known for {names}.")

    def _pair(self) -> None:
        assert self._window is not None
        self._pairs, self._stuck = paired_by_identity(self._window.layers), frozenset()
        if self._reference:
            self._pairs, self._stuck = paired_in_parallel(self._window.layers, self._all_params())
        self._diagonals = None

    def _find_layers(self) -> None:
        """Look whether there are other parameters; some callbacks write to ``param_groups``."""
        if self._window is not None and self._window.find(self._all_params()):
            self._factors = renumbered(self._window.layers, self._factors)
            self._pair()

    def _watches_main_pass(self) -> bool:
        # Hooks inside a compiled region are unreliable: there an extra pass is made.
        return not self._compiled and self._due(_INTERVAL)

    def wants_record(self) -> bool:
        """Tell whether the coming step runs its batches again to see the layers."""
        return self._compiled and self._due(_INTERVAL)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; its layers count from the next refresh on.

        Args:
            param_group: As for every torch optimizer.

        Raises:
            ValueError: If an argument is out of range, or differs from the other groups though it
                is one value for all.
        """
        super().add_param_group(param_group)
        self._find_layers()

    # One step

    def _prepare(
        self,
        params: list[Tensor],
        oracle: Oracle | None,
        usable: Tensor | None,
        stats: dict[str, Tensor],
    ) -> None:
        assert oracle is not None
        assert self._window is not None
        self._find_layers()
        due = self._due(_INTERVAL)
        if due:
            self._refresh(oracle, usable, stats)
        damping = max(float(group["damping"]) for group in self.param_groups)
        stats["damping"] = torch.full_like(stats["grad_norm"], damping)
        if self._diagonals is None:
            scaling = None if self._reference else self.param_groups[0]["normalization"]
            self._diagonals = parameter_diagonals(
                self._all_params(),
                self._pairs,
                self._window.layers,
                as_averages(self._factors),
                scaling,
            )
        self._numbers = {id(p): number for number, p in enumerate(self._all_params())}
        if due:
            each = [float(g["damping"]) for g in self.param_groups for _ in g["params"]]
            stats.update(damping_stats(self._diagonals, dict(enumerate(each))))

    def _refresh(self, oracle: Oracle, usable: Tensor | None, stats: dict[str, Tensor]) -> None:
        """Put the statistics of this step into the averages, unless they are not finite."""
        window = self._window
        assert window is not None
        if self._compiled:
            window.clear()
            with window.hooks.during_extra_pass():
                oracle.gradient()
        if window.layers:
            # Where the model is now: it may have been moved since it was attached.
            self._factors = moved(self._factors, self._all_params())
            decay = float(self.param_groups[0]["factor_decay"])
            new = window.refresh(as_averages(self._factors), decay, oracle, usable)
            self._factors = as_entries(new.averages, window.layers)
            self._diagonals = None
            skipped = self._scalar("skipped_refreshes", stats["grad_norm"])
            self._scalars["skipped_refreshes"] = skipped + new.failed.to(skipped)
            stats["curvature_drift"] = new.drift
        self._refreshed(_INTERVAL, stats.get("curvature_drift"))

    def _update_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        usable: Tensor | None,
        stats: dict[str, Tensor],
    ) -> None:
        params = [p for p in params if self._numbers[id(p)] not in self._stuck]
        if not params:
            return
        steps, averages = self._state_lists(params, "step", "exp_avg")
        advance_(steps, usable)
        grads = [p.grad for p in params if p.grad is not None]
        # 1 - beta^t goes into the denominator, which for most parameters is two vectors.
        corrections = list(torch._foreach_clamp_min(steps, 1.0))
        corrections = list(torch._foreach_pow(float(group["beta"]), corrections))
        torch._foreach_neg_(corrections)
        torch._foreach_add_(corrections, [torch.ones_like(c) for c in corrections])
        denominators = [
            self._denominator(group, p, grad, correction, usable)
            for p, grad, correction in zip(params, grads, corrections, strict=True)
        ]
        lr, beta, decay = (float(group[name]) for name in ("lr", "beta", "weight_decay"))
        length = lr if self._reference else lr * (1 + float(group["damping"]))
        for ps, gs, ms, ds in denominated(params, grads, averages, denominators, group["foreach"]):
            values = self._grads(group, gs)
            if self.decoupled:
                vectors.shrink_(ps, lr * decay, usable)
            elif decay != 0:
                values = list(torch._foreach_add(values, ps, alpha=decay))
            vectors.ema_(ms, values, beta, usable)
            if usable is None and all(p.dtype == m.dtype for p, m in zip(ps, ms, strict=True)):
                torch._foreach_addcdiv_(ps, ms, ds, -length)
            else:
                vectors.move_(ps, torch._foreach_div(ms, ds), -length, usable)

    def _denominator(
        self,
        group: dict[str, Any],
        p: Tensor,
        grad: Tensor,
        correction: Tensor,
        usable: Tensor | None,
    ) -> Denominator:
        """Return what the average gradient of a parameter is divided by."""
        assert self._diagonals is not None
        damping = float(group["damping"])
        diagonal = self._diagonals.get(self._numbers[id(p)])
        if diagonal is None and self._reference:
            diagonal, damping = torch.ones_like(correction).expand(p.shape), 0.0
        elif diagonal is None:
            diagonal = self._squares(p, grad, usable)
        return Denominator(diagonal, correction, damping)

    def _squares(self, p: Tensor, grad: Tensor, usable: Tensor | None) -> Tensor:
        """Return the running average of a squared gradient, divided by its mean."""
        ((square,),) = self._state_lists([p], _SQUARES)
        vectors.ema_squares_([square], [grad.to(square.dtype)], _SQUARES_DECAY, usable)
        return square / square.mean().clamp_min(torch.finfo(square.dtype).tiny)

    # State

    def _curvature_state(self) -> dict[str, Any]:
        self._find_layers()
        return {
            **super()._curvature_state(),
            "factors": {k: {**v} for k, v in self._factors.items()},
        }

    def _load_curvature_state(self, state: dict[str, Any]) -> None:
        super()._load_curvature_state(state)
        self._factors = moved(state["factors"], self._all_params())
        if self._window is not None:
            self._factors = entries_of(self._window.layers, self._factors, where=self._cannot_load)
        self._diagonals = None

    @property
    def _cannot_load(self) -> str:
        return f"Cannot load the state into {type(self).__name__}"

    def _check_state(self, saved: Any) -> None:
        super()._check_state(saved)
        self._find_layers()
        where, params = self._cannot_load, self._all_params()
        own, groups, states = saved[STATE_KEY], saved["param_groups"], saved["state"]
        ids = [index for group in groups for index in group["params"]]
        if not groups or len(ids) != len(params):
            return  # torch refuses that
        mode, present = groups[0]["mode"], self.param_groups[0]["mode"]
        if mode != present:
            raise ValueError(f"{where}: its mode is {mode!r}, here it is {present!r}.")
        if "factors" not in own:
            raise ValueError(f"{where}: it is cut off, there are no 'factors'.")
        check_saved_factors(own["factors"], len(params), where=where)
        if self._window is not None:
            entries_of(self._window.layers, own["factors"], where=where)
        for index, p in zip(ids, params, strict=True):
            square = states.get(index, {}).get(_SQUARES, p)
            if not isinstance(square, Tensor) or square.shape != p.shape:
                raise ValueError(
                    f"{where}: '{_SQUARES}' of parameter {index} must be a tensor of shape "
                    f"{list(p.shape)}."
                )


def _has_compiled_methods(module: nn.Module) -> bool:
    """Tell whether a method of a module, ``training_step`` say, was given to `torch.compile`."""
    kinds = {kind for part in module.modules() for kind in type(part).__mro__}
    values = [value for part in module.modules() for value in vars(part).values()]
    values += [value for kind in kinds for value in vars(kind).values()]
    return any(hasattr(value, "_torchdynamo_orig_callable") for value in values if callable(value))
