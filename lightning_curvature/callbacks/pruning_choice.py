"""Which parameters of a module are pruned, and which modules and Trainers cannot be."""

import inspect
from collections.abc import Sequence
from fnmatch import fnmatchcase

from lightning.fabric.utilities import rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.plugins.precision import BitsandbytesPrecision
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
)
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
from lightning.pytorch.strategies.xla import XLAStrategy
from torch import nn

from lightning_curvature.callbacks.layer_norms import plain_name
from lightning_curvature.callbacks.sensitive_parameter_mask import SensitiveParameterMask
from lightning_curvature.callbacks.trajectory_log import TrajectoryLog
from lightning_curvature.pruning.parameters import PrunableParameters, prunable_weights

__all__ = ["Choice", "choose_parameters", "refuse_manual_steps", "refuse_trainer"]

Choice = Sequence[tuple[nn.Module, str] | str]

_STRATEGIES: dict[type[Strategy], str] = {
    FSDPStrategy: "shards them",
    ModelParallelStrategy: "shards them",
    DeepSpeedStrategy: "runs backward and the optimizer itself",
    XLAStrategy: "compiles the whole step",
    SingleDeviceXLAStrategy: "compiles the whole step",
}
_CALLBACKS: dict[type[Callback], str] = {
    ModelPruning: "both put masks on the layers",
    SensitiveParameterMask: "both decide which weights are trained",
    TrajectoryLog: "what is pruned cannot be replayed from its log",
    WeightAveraging: "its averages remember weights that are pruned",
    StochasticWeightAveraging: "its averages remember weights that are pruned",
}


def refuse_trainer(trainer: Trainer) -> None:
    """Refuse what weights cannot be pruned with.

    Args:
        trainer: The Trainer, when it is set up.

    Raises:
        MisconfigurationException: If its strategy, precision or another callback is such.
    """
    for kind, reason in _STRATEGIES.items():
        if isinstance(trainer.strategy, kind):
            # Not an inherited name, which is that of another strategy.
            word = vars(kind).get("strategy_name", kind.__name__)
            raise MisconfigurationException(
                f"MFACPruning needs whole parameters on every rank; strategy '{word}' {reason}. "
                "Use strategy='ddp'."
            )
    period = getattr(trainer.strategy, "_model_averaging_period", None)
    if period is not None:
        raise MisconfigurationException(
            "MFACPruning needs the same weights on every rank; with "
            f"model_averaging_period={period!r} each rank takes steps of its own in between. Leave "
            "it out."
        )
    if isinstance(trainer.precision_plugin, BitsandbytesPrecision):
        raise MisconfigurationException(
            "MFACPruning changes weights, which precision plugin BitsandbytesPrecision quantizes. "
            "Use precision='32-true', 'bf16-mixed', 'bf16-true' or '16-mixed'."
        )
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        for other, reason in _CALLBACKS.items():
            if isinstance(callback, other):
                raise MisconfigurationException(
                    f"MFACPruning and {type(callback).__name__} cannot be used together: {reason}. "
                    "Remove one of them."
                )


def refuse_manual_steps(module: LightningModule) -> None:
    """Refuse modules whose training step cannot be called for a gradient alone.

    Args:
        module: The module.

    Raises:
        MisconfigurationException: If it is one.
    """
    reason = None
    if not module.automatic_optimization:
        reason = "manual optimization, whose training_step takes steps"
    elif "dataloader_iter" in inspect.signature(module.training_step).parameters:
        reason = "training_step(dataloader_iter), which takes the batches of training"
    if reason is not None:
        raise MisconfigurationException(
            f"Gradients for pruning cannot be collected with {reason}. Use criterion='magnitude' "
            "or 'random'."
        )


def choose_parameters(
    module: LightningModule,
    chosen: Choice | None,
    names: Sequence[str],
    need_gradients: bool,
) -> PrunableParameters:
    """Return the parameters to prune.

    Args:
        module: The module.
        chosen: Layers with names of parameters, or patterns of whole names; None for all linear and
            convolution layers, but for weights that other modules use, too.
        names: Names of parameters of such a layer.
        need_gradients: Whether frozen parameters cannot be pruned.

    Raises:
        MisconfigurationException: If one is not there, frozen, not a parameter, or there is none.
    """
    if chosen is None:
        pairs = _not_shared(module, prunable_weights(module, names))
    else:
        pairs = [pair for one in chosen for pair in _pairs(module, one)]
        pairs = [pair for i, pair in enumerate(pairs) if pair not in pairs[:i]]
    if not pairs:
        kinds = sorted(
            {type(part).__name__ for part in module.modules() if not list(part.children())}
        )
        raise MisconfigurationException(
            "MFACPruning found nothing to prune: no trained parameter named "
            f"{' or '.join(map(repr, names))} of a linear or convolution layer. Kinds of layers: "
            f"{', '.join(kinds) or 'none'}. Name others with parameters_to_prune."
        )
    try:
        parameters = PrunableParameters(pairs, model=module)
    except ValueError as error:
        raise MisconfigurationException(str(error)) from error
    frozen = [
        name
        for name, p in zip(parameters.names, parameters.tensors(), strict=True)
        if not p.requires_grad
    ]
    if frozen and need_gradients:
        raise MisconfigurationException(
            f"MFACPruning cannot prune frozen parameters, which have no gradient: "
            f"{', '.join(frozen)}. Leave them out, or use criterion='magnitude'."
        )
    return parameters


def _pairs(
    module: LightningModule, one: tuple[nn.Module, str] | str
) -> list[tuple[nn.Module, str]]:
    """Return the parameters that one entry of the choice means."""
    there = {
        plain_name(f"{path}.{name}" if path else name): (part, name)
        for path, part in module.named_modules()
        for name in (key.removesuffix("_orig") for key in part._parameters)
        if part._parameters.get(name) is not None or f"{name}_mask" in part._buffers
    }
    if isinstance(one, str):
        matching = [pair for name, pair in there.items() if fnmatchcase(name, one)]
        # A weight that several modules share has several names, all of which may match.
        found = list({_identity(pair): pair for pair in reversed(matching)}.values())[::-1]
        if not found:
            raise MisconfigurationException(
                f"Invalid parameters_to_prune: no parameter has a name like {one!r}. Names: "
                f"{', '.join(there)}."
            )
        return found
    part, name = one
    if not any(part is other for other in module.modules()):
        raise MisconfigurationException(
            f"Invalid parameters_to_prune: the model has no such module: {part}."
        )
    return [(part, name)]


def _identity(pair: tuple[nn.Module, str]) -> int:
    part, name = pair
    return id(part._parameters.get(name, part._parameters.get(f"{name}_orig")))


def _not_shared(
    module: LightningModule, pairs: list[tuple[nn.Module, str]]
) -> list[tuple[nn.Module, str]]:
    """Leave out parameters that belong to several modules, and say so."""
    users: dict[int, list[str]] = {}
    for path, part in module.named_modules():
        for name, p in part._parameters.items():
            if p is not None:
                users.setdefault(id(p), []).append(f"{path}.{name}" if path else name)
    own, shared = [], []
    for part, name in pairs:
        p = part._parameters.get(name, part._parameters.get(f"{name}_orig"))
        if len(users[id(p)]) == 1:
            own.append((part, name))
        else:
            shared.append(" = ".join(users[id(p)]))
    if shared:
        rank_zero_warn(
            f"MFACPruning leaves out weights that several modules share: {', '.join(shared)}. Name "
            "them with parameters_to_prune to prune them in all of these.",
            category=RuntimeWarning,
        )
    return own
