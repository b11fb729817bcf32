"""Fits that must come out the same on two ranks and on one process with twice the batch.

`fit` runs on the ranks of a pool, through `RankPool.run`, and likewise in the test process, where
there is one rank. Whatever it measures comes back as an `Outcome`.
"""

import copy
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from lightning_curvature import (
    CurvatureCallback,
    DDPCurvatureStrategy,
    SingleDeviceCurvatureStrategy,
)
from tests.helpers.modules import MakeOptimizer, mlp_module, vectors
from tests.helpers.optimizer_db import Contract, numbered, same_on_all_ranks
from tests.helpers.probing import make_trainer
from tests.helpers.ranks import RankPool, world

# Who attaches the oracle on two ranks; "loop" and "wrapped loop" are ordinary loops.
ROUTES = ("strategy", "name", "callback", "auto", "built")
LOOPS = ("loop", "wrapped loop")
ROWS, BATCH = 40, 8

# Arguments that let curvature and damping decide about the step: by default the cap on its length
# does, on problems as small as these. Full steps would lead into chaos, and round-off with them.
RESPONSIVE: dict[str, Any] = {"max_lr": None, "damping": 1.0, "amplification": 0.3}

ModuleMaker = Callable[[MakeOptimizer], LightningModule]


@dataclass
class Outcome:
    """What a fit left behind on one rank.

    Attributes:
        weights: All parameters as one vector, float64.
        state: The optimizer's state.
        stats: What its last step measured.
        buffers: The module's buffers.
        losses: Losses of the batches of this rank.
        steps: ``trainer.global_step``.
        warnings: Messages of the library's warnings.
        method: Method of the oracle after the last batch, None without one.
        seen: What callbacks and modules noted.
    """

    weights: Tensor
    state: dict[str, Any]
    stats: dict[str, Tensor]
    buffers: dict[str, Tensor] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    steps: int = 0
    warnings: list[str] = field(default_factory=list)
    method: str | None = None
    seen: dict[str, Any] = field(default_factory=dict)


class Witness(Callback):
    """Notes the losses, and the method of the oracle, which is gone after the fit."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.method: str | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any
    ) -> None:
        """Note loss and method."""
        if isinstance(outputs, Mapping) and "loss" in outputs:
            self.losses.append(float(outputs["loss"]))
        oracle = getattr(trainer.optimizers[0], "oracle", None)
        self.method = getattr(oracle, "method", None)


# Data


def batches_of(rows: int, batch_size: int) -> list[list[int]]:
    """Return the row numbers of this rank's batches: its part of the batches of one process.

    Args:
        rows: Number of rows in all.
        batch_size: Batch size of one process; the last batch may be shorter, and one that cannot
            be divided gives the first rank more rows.
    """
    rank, ranks = world()
    whole = torch.arange(rows).split(batch_size)
    return [batch.tensor_split(ranks)[rank].tolist() for batch in whole]


def shared_loader(data: TensorDataset, batch_size: int) -> DataLoader[Any]:
    """Return this rank's part of batches that have ``batch_size`` rows over all ranks."""
    return DataLoader(data, batch_sampler=batches_of(len(data), batch_size))


def weights_of(module: nn.Module) -> Tensor:
    """Return all parameters as one vector, float64."""
    return torch.cat([p.detach().double().flatten() for p in module.parameters()])


def maker(
    contract: Contract, options: Mapping[str, Any] | None = None, *, exactly: bool = True
) -> MakeOptimizer:
    """Return what makes the optimizer, by default for a comparison of ranks with one process."""
    chosen = contract.exactly() if exactly else contract
    return chosen.making(**{**contract.known(RESPONSIVE), **(options or {})})


# Fits


@contextmanager
def _set_up(seed: int, forward: bool, caught: list[str]) -> Iterator[None]:
    """Seed, let the method "auto" start with forward mode, and collect the library's warnings."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - what users' augmentation draws from
    torch.manual_seed(seed)
    precision = torch.get_float32_matmul_precision()
    # Names of strategies and the entry point leave the method to "auto", which takes forward mode
    # where float32 products are not computed in full precision; those of float64 always are.
    torch.set_float32_matmul_precision("medium" if forward else "highest")
    try:
        with warnings.catch_warnings(record=True) as records:
            warnings.simplefilter("always")
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
    caught += [str(w.message) for w in records if issubclass(w.category, RuntimeWarning)]


def attached(
    route: str, directional: str, window: str, flags: Mapping[str, Any]
) -> tuple[Any, list[Callback]]:
    """Return strategy and callbacks that attach the oracle by a route.

    Args:
        route: One of `ROUTES`, or the name of a strategy.
        directional: See `WindowOracle`; what takes no arguments uses "auto".
        window: See `StepRecorder`; likewise.
        flags: Arguments of the ``DDPStrategy``; dropped in one process.
    """
    arguments: dict[str, Any] = {"directional": directional, "window": window}
    if world()[1] == 1:
        if route in ("callback", "built"):
            return "auto", [CurvatureCallback(**arguments)]
        return SingleDeviceCurvatureStrategy(**arguments), []
    if route == "strategy":
        return DDPCurvatureStrategy(**arguments, **flags), []
    if route == "built":
        return DDPStrategy(**flags), [CurvatureCallback(**arguments)]
    if flags:
        raise ValueError(f"Invalid route={route!r} for {flags}: must be 'strategy' or 'built'.")
    if route == "callback":
        return "ddp", [CurvatureCallback(**arguments)]
    return {"name": "ddp_curvature", "auto": "ddp"}.get(route, route), []


def fit(
    contract: Contract,
    make_module: ModuleMaker = mlp_module,
    *,
    route: str = "strategy",
    data: TensorDataset | None = None,
    batch_size: int = BATCH,
    options: Mapping[str, Any] | None = None,
    directional: str = "jvp",
    window: str = "all",
    flags: Mapping[str, Any] | None = None,
    exactly: bool = True,
    own_seeds: bool = False,
    validate: bool = False,
    callbacks: Sequence[Callback] = (),
    **settings: Any,
) -> Outcome:
    """Fit on this rank and return what came out.

    Args:
        contract: The optimizer.
        make_module: Called with what makes the optimizer.
        route: See `attached`.
        data: The rows of all ranks.
        batch_size: Rows of a batch of all ranks together.
        options: Arguments of the optimizer besides those of `maker`.
        directional: See `attached`. "auto" starts with forward mode.
        window: See `attached`.
        flags: See `attached`.
        exactly: See `maker`.
        own_seeds: Whether every rank draws other numbers, also for the initial weights.
        validate: Whether there is a validation loader; it has the same data.
        callbacks: Further callbacks; copies of them are used.
        **settings: Further arguments of the Trainer.
    """
    rank, ranks = world()
    callbacks = copy.deepcopy(list(callbacks))
    caught: list[str] = []
    with _set_up(1 + (rank if own_seeds else 0), directional != "fd", caught):
        module = make_module(maker(contract, options, exactly=exactly))
        witness = Witness()
        strategy, attaching = attached(route, directional, window, flags or {})
        trainer = make_trainer(
            "none",
            strategy=strategy,
            devices=ranks,
            callbacks=[*attaching, witness, *callbacks],
            use_distributed_sampler=False,
            **{"precision": "64-true", **settings},
        )
        rows = vectors(ROWS) if data is None else data
        loaders = [shared_loader(rows, batch_size) for _ in range(1 + validate)]
        trainer.fit(module, *loaders)
    optimizer = trainer.optimizers[0]
    seen: dict[str, Any] = {}
    for owner in (module, *callbacks):
        seen |= getattr(owner, "seen", {})
    return Outcome(
        weights=weights_of(module),
        state=copy.deepcopy(optimizer.state_dict()),
        stats=dict(getattr(optimizer, "stats", {})),
        buffers={name: buffer.clone() for name, buffer in module.named_buffers()},
        losses=witness.losses,
        steps=trainer.global_step,
        warnings=caught,
        method=witness.method,
        seen=seen,
    )


def loop(contract: Contract, *, wrapped: bool = False, accumulate: int = 1) -> Outcome:
    """Train in an ordinary loop, under ``DistributedDataParallel`` if there are several ranks.

    Args:
        contract: The optimizer.
        wrapped: Whether to attach to the wrapper instead of to the network.
        accumulate: Micro-batches per step.
    """
    caught: list[str] = []
    with _set_up(1, True, caught):
        network = mlp_module(contract.make).network.double()
        model = DistributedDataParallel(network) if world()[1] > 1 else network
        optimizer = maker(contract)(model.parameters())
        criterion: Callable[..., Tensor] = F.cross_entropy
        if contract.info.asks:
            watched = model if wrapped else network
            criterion = optimizer.attach_model(watched, F.cross_entropy, directional="jvp")
        losses = []
        micro_batches = list(shared_loader(vectors(ROWS), BATCH // accumulate))
        for number, (x, y) in enumerate(micro_batches, start=1):
            loss = criterion(model(x.double()), y)
            losses.append(loss.item())
            (loss / accumulate).backward()
            if number % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
        optimizer.detach()
    return Outcome(
        weights=weights_of(network),
        state=numbered(copy.deepcopy(optimizer.state_dict())),
        stats=dict(optimizer.stats),
        losses=losses,
        steps=len(micro_batches) // accumulate,
        warnings=caught,
    )


# Comparisons


def unlike(one: Any, other: Any, name: str = "") -> list[str]:
    """List where two nested containers differ; tensors bit for bit, NaN being equal to NaN."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same = one.dtype is other.dtype and one.shape == other.shape
        same = same and torch.equal(one.isnan(), other.isnan())
        return [] if same and torch.equal(one.nan_to_num(), other.nan_to_num()) else [name]
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        keys = [*one.keys(), *(other.keys() - one.keys())]
        both = [key for key in keys if key in one and key in other]
        found = [f"{name}/{key}" for key in keys if key not in both]
        return found + [x for key in both for x in unlike(one[key], other[key], f"{name}/{key}")]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        if len(one) != len(other):
            return [f"length of {name}"]
        pairs = enumerate(zip(one, other, strict=True))
        return [x for i, (a, b) in pairs for x in unlike(a, b, f"{name}/{i}")]
    return [] if one == other else [name]


def failure(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str | None:
    """Call a function that fails on every rank, and return kind and message of the error."""
    try:
        function(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def assert_same_on_all(outcomes: Sequence[Outcome]) -> None:
    """Assert that all ranks ended with the same bits, having taken the same decisions."""
    first, *others = (replace(o, state=same_on_all_ranks(o.state)) for o in outcomes)
    for other in others:
        for part in ("weights", "state", "stats", "steps", "method"):
            assert unlike(getattr(first, part), getattr(other, part), part) == []
    assert first.weights.isfinite().all()


def deviation(one: Outcome, other: Outcome) -> float:
    """Return the largest difference between the weights of two fits."""
    return (one.weights - other.weights).abs().max().item()


def compare(
    ranks: RankPool,
    function: Callable[..., Outcome],
    contract: Contract,
    *args: Any,
    within: float = 1e-12,
    warns: str | None = None,
    **kwargs: Any,
) -> tuple[Outcome, Outcome, Outcome]:
    """Run a fit on two ranks and in one process, and assert that they agree.

    Args:
        ranks: The pool.
        function: `fit`, say.
        contract: The optimizer.
        *args: Arguments of the function.
        within: Largest difference allowed between the weights.
        warns: Part of the only warning that is allowed, and wanted, on every rank that gives it.
        **kwargs: Keyword arguments of the function.

    Returns:
        Outcomes of both ranks and of the one process.
    """
    first, second = ranks.run(function, contract, *args, **kwargs)
    assert_same_on_all([first, second])
    single = function(contract, *args, **kwargs)
    for outcome in (first, second, single):
        texts = outcome.warnings
        assert len(texts) <= (warns is not None)
        assert all(str(warns) in text for text in texts)
    assert first.steps == single.steps > 0
    assert first.method == single.method
    assert deviation(first, single) <= within
    # The state is compared by size: it may hold a mean square of 1e-20.
    for name, ours, theirs in _pairs([first.state, first.stats], [single.state, single.stats]):
        scale = theirs.abs().max().clamp_min(1e-30)
        assert (ours - theirs).abs().max() <= max(1e4 * within, 1e-8) * scale, name
    means = (torch.tensor(first.losses) + torch.tensor(second.losses)) / 2
    expected = torch.tensor(single.losses)
    torch.testing.assert_close(means, expected, rtol=0, atol=max(within, 1e-6), equal_nan=True)
    return first, second, single


def _pairs(one: Any, other: Any, name: str = "") -> list[tuple[str, Tensor, Tensor]]:
    if isinstance(one, Tensor):
        return [(name, one.double().reshape(-1), other.double().reshape(-1))]
    if isinstance(one, Mapping):
        assert one.keys() == other.keys(), name
        return [x for key in one for x in _pairs(one[key], other[key], f"{name}/{key}")]
    if isinstance(one, (list, tuple)):
        assert len(one) == len(other), name
        pairs = enumerate(zip(one, other, strict=True))
        return [x for i, (a, b) in pairs for x in _pairs(a, b, f"{name}/{i}")]
    return []
