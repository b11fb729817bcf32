"""What the main pass of one micro-batch leaves behind for the oracle."""

import copy
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lightning_curvature.oracle.capture import SUPPORTED_LOSSES, RawCall
from lightning_curvature.oracle.extra_pass import Environment, version_of
from lightning_curvature.oracle.heads import BoundLoss, bind_loss
from lightning_curvature.oracle.protocol import NoLossCapturedError

__all__ = [
    "LossTerm",
    "PassRecord",
    "batch_versions",
    "check_batch_unchanged",
    "copied_containers",
    "loss_terms",
    "no_loss_captured",
]


@dataclass(frozen=True)
class LossTerm:
    """A captured loss that the total loss depends on.

    Attributes:
        index: Number of the call within the pass, counted over all captured calls.
        loss: The call.
        coefficient: d(total loss) / d(this loss), of the shape of this loss.
        share: coefficient * loss, its part of the total; None if the loss was changed in place.
    """

    index: int
    loss: BoundLoss
    coefficient: Tensor
    share: Tensor | None

    def detached(self) -> "LossTerm":
        """Return the same term without its graph."""
        return LossTerm(self.index, self.loss.detached(), self.coefficient, self.share)


@dataclass
class PassRecord:
    """The main pass of one micro-batch.

    Attributes:
        run: Computes the total loss again, at the present parameters, in the present environment.
        environment: What the main pass started from.
        weight: Weight of this micro-batch in the step's loss (1/k under accumulation).
        loss: Total loss of the micro-batch, unweighted and detached; None before it is known.
        terms: The captured losses it consists of.
        num_calls: Number of captured loss calls, also those without influence.
        versions: The tensors of the batch with their version counters.
    """

    run: Callable[[], Tensor | None]
    environment: Environment
    weight: float | Tensor = 1.0
    loss: Tensor | None = None
    terms: list[LossTerm] = field(default_factory=list)
    num_calls: int = 0
    versions: list[tuple[Tensor, int]] = field(default_factory=list)

    def total(self) -> Tensor:
        """Return the total loss of the main pass."""
        if self.loss is None:
            raise RuntimeError("The main pass of this micro-batch has not finished.")
        return self.loss

    def modeled(self) -> Tensor:
        """Return the part of the total that the captured losses account for."""
        if not self.terms:
            return torch.zeros_like(self.total())
        shares = [term.share for term in self.terms if term.share is not None]
        if len(shares) < len(self.terms):
            return self.total()
        return torch.stack(shares).sum()


def no_loss_captured() -> NoLossCapturedError:
    """Return the error for a loss whose curvature is unknown."""
    names = ", ".join(name for name in SUPPORTED_LOSSES.values() if name != "declare_loss")
    return NoLossCapturedError(
        "The curvature of the loss is unknown: no supported loss function was called on outputs "
        f"that depend on the optimized parameters. Supported are torch.nn.functional.{{{names}}} "
        "and their modules. For a hand-written loss call "
        "lightning_curvature.declare_loss(loss, logits, targets, kind=...)."
    )


def loss_terms(total: Tensor, calls: Iterable[RawCall]) -> list[LossTerm]:
    """Decompose a total loss into the captured losses it depends on.

    One backward from the total to the captured losses; it ends there, so it costs next to nothing
    and leaves the graph as it was. The terms hold on to the graph until they are detached.

    Args:
        total: Total loss, a scalar with its graph.
        calls: The loss calls captured while it was computed.

    Raises:
        RuntimeError: If an argument of a loss was changed in place after the call.
    """
    if not total.requires_grad:
        return []
    numbered = [(i, call) for i, call in enumerate(calls) if call.output.requires_grad]
    if not numbered:
        return []
    # A declared loss may be one that was captured already: the declaration wins.
    declared = {
        id(call.output) for _, call in numbered if SUPPORTED_LOSSES[call.function] == "declare_loss"
    }
    numbered = [
        (i, call)
        for i, call in numbered
        if id(call.output) not in declared or SUPPORTED_LOSSES[call.function] == "declare_loss"
    ]
    points: Any = [call.output if call.edge is None else call.edge for _, call in numbered]
    with torch.enable_grad():
        coefficients = torch.autograd.grad(total, points, retain_graph=True, allow_unused=True)
    terms = []
    for (index, call), coefficient in zip(numbered, coefficients, strict=True):
        if coefficient is None:  # computed for a log line only
            continue
        loss = bind_loss(call)
        if not loss.inputs:
            continue
        if call.versions and any(version_of(x) != version for x, version in call.versions):
            raise RuntimeError(
                f"An argument of {SUPPORTED_LOSSES[call.function]} was changed in place after the "
                "call, so the curvature of this loss cannot be computed. Change a copy: write "
                "`p = logits.softmax(-1)` instead of an in-place operation."
            )
        value = call.output.detach()
        # Only a fresh loss still has the value that belongs to the coefficient.
        share = (coefficient * value).sum() if value._version == 0 else None
        terms.append(LossTerm(index, loss, coefficient.detach(), share))
    return terms


def copied_containers(batch: Any) -> Any:
    """Copy the lists, tuples and dictionaries of a batch, not its tensors.

    A training step may take its batch apart (``y = batch.pop("y")``); every pass gets a whole one.

    Args:
        batch: Any nesting of containers.
    """

    def copied(leaf: Any) -> Any:
        # A tokenizer's output, a dataclass, a graph: copied as far as its own `copy` goes.
        plain = isinstance(leaf, Tensor) or not _is_container(leaf)
        return leaf if plain else copy.copy(leaf)

    return tree_map(copied, batch)


def batch_versions(batch: Any) -> list[tuple[Tensor, int]]:
    """List the tensors of a batch with their version counters."""
    found = []
    for leaf in tree_leaves(batch):
        inside = [leaf, *_contents(leaf)] if _is_container(leaf) else [leaf]
        found += [(x, version_of(x)) for x in inside if isinstance(x, Tensor)]
    return found


def _is_container(leaf: Any) -> bool:
    """Tell whether something holds tensors though torch sees no container in it."""
    return isinstance(leaf, MutableMapping) or is_dataclass(leaf) or hasattr(leaf, "__copy__")


def _contents(leaf: Any) -> list[Any]:
    values = leaf.values() if isinstance(leaf, Mapping) else getattr(leaf, "__dict__", {}).values()
    return list(values)


def check_batch_unchanged(versions: list[tuple[Tensor, int]]) -> None:
    """Check that a main pass did not change its batch.

    Args:
        versions: What `batch_versions` returned before the pass.

    Raises:
        RuntimeError: If a tensor of the batch was changed in place.
    """
    changed = [tuple(tensor.shape) for tensor, version in versions if version_of(tensor) != version]
    if changed:
        shapes = ", ".join(str(list(shape)) for shape in changed)
        raise RuntimeError(
            f"The training step changed its batch in place (tensors of shape {shapes}), or someone "
            "did before the optimizer's step, so it cannot be evaluated again on the same data. "
            "Write `x = x - mean` instead of "
            "`x -= mean`, or clone the tensor first."
        )
