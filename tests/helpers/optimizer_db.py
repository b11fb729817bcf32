"""What the contract tests need to know about each optimizer beyond its registry row."""

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from torch import Tensor

from lightning_curvature import CurvatureOptimizer, OptimizerInfo, list_optimizers
from tests.helpers.labels import ContentSampler


@dataclass(frozen=True)
class Contract:
    """One optimizer as the contract tests use it.

    Attributes:
        info: Its row in the registry.
        options: Arguments under which it must train the small problems, and under which it asks
            its oracle often enough for them.
        steep: Arguments for problems whose curvature is a thousand times that of a network.
        quiet: Arguments that postpone everything it may read from the device now and then.
        exact: Arguments under which a batch may be cut in micro-batches and dealt out to ranks
            without changing the steps.
        sampler: What then draws in the place of the optimizer's own sampler, None if it draws
            nothing for each micro-batch and rank.
        is_exact: Whether both of them are in use, see `exactly`.
        shared_state: Keys of the curvature's state whose tensors later steps may change, as torch's
            optimizers do with those of parameters.
        represents: Whether the wide tests take it for its family, instead of the first one.
        precise: Whether its state holds tensors in float64 where the parameters are float32.
        variant_of: Name of the optimizer that it is a variant of, "" if of none. A variant shares
            all but its rule with it, so by default it runs in few tests only, see families.py.
    """

    info: OptimizerInfo
    options: dict[str, Any] = field(default_factory=dict)
    steep: dict[str, Any] = field(default_factory=dict)
    quiet: dict[str, Any] = field(default_factory=dict)
    exact: dict[str, Any] = field(default_factory=dict)
    sampler: type | None = None
    is_exact: bool = False
    shared_state: tuple[str, ...] = ()
    represents: bool = False
    precise: bool = False
    variant_of: str = ""

    @property
    def family(self) -> tuple[frozenset[str], bool]:
        """What the optimizers of its family have in common: see families.py."""
        return self.info.asks, self.info.cls.needs_whole_params

    @property
    def elementwise(self) -> bool:
        """Whether it works where every rank has its part of the parameters."""
        return not (self.info.asks or self.info.cls.needs_whole_params)

    @property
    def forward_only(self) -> bool:
        """Whether it runs no backward, so that there are no gradients."""
        return "forward" in self.info.asks

    @property
    def runs_wide(self) -> bool:
        """Whether wide tests can run with it at all.

        Those without a backward have all but their rule in common, and what a few of their steps
        reach depends on arguments that one of them has been given for these tests.
        """
        return self.represents or not self.forward_only

    @property
    def slack(self) -> float:
        """How many times the loss that is asked of others it may leave in a small problem."""
        return 1.5 if self.forward_only else 1.0

    @property
    def runs_again(self) -> bool:
        """Whether it asks for extra passes; what others ask is found in the main passes."""
        return not self.info.asks.isdisjoint({"loss", "directional", "forward"})

    @property
    def records(self) -> bool:
        """Whether it needs its batches recorded; layers are watched without."""
        return not self.info.asks <= {"layers"}

    @property
    def needs_module(self) -> bool:
        """Whether it must know the layers, so that a bare closure is not enough."""
        return not self.info.asks.isdisjoint({"layers", "slope"})

    @property
    def needs_known_loss(self) -> bool:
        """Whether it must know the loss function."""
        return not self.info.asks.isdisjoint({"directional", "sampled"})

    def make(self, params: Iterable[Any], **options: Any) -> CurvatureOptimizer:
        """Build the optimizer."""
        optimizer = self.info.cls(params, **{**self.options, **options})
        if self.is_exact and self.sampler is not None:
            optimizer.sampler = self.sampler
        return optimizer

    def making(self, **options: Any) -> Any:
        """Return a function of the parameters."""
        return partial(self.make, **options)

    def exactly(self) -> "Contract":
        """Return the contract for comparisons of ranks and micro-batches with a whole batch."""
        return replace(self, options={**self.options, **self.exact}, is_exact=True)

    def takes(self, *arguments: str) -> bool:
        """Tell whether the optimizer has all these arguments."""
        return set(arguments) <= set(inspect.signature(self.info.cls).parameters)

    def accepts(self, **options: Any) -> bool:
        """Tell whether the optimizer has all these arguments and, where they are named, values."""
        if not self.takes(*options):
            return False
        hints = get_type_hints(self.info.cls.__init__)
        named = {name: get_args(hints[name]) for name in options if _is_literal(hints[name])}
        return all(options[name] in values for name, values in named.items())

    def known(self, options: dict[str, Any]) -> dict[str, Any]:
        """Return those options that the optimizer has."""
        return {name: value for name, value in options.items() if self.accepts(**{name: value})}

    @property
    def rich(self) -> dict[str, Any]:
        """Arguments under which more than the defaults has to be saved."""
        return {**dict.fromkeys(self.intervals, RICH_INTERVAL), **self.known(RICH)}

    @property
    def intervals(self) -> tuple[str, ...]:
        """Names of the arguments that say how often something is refreshed."""
        names = inspect.signature(self.info.cls).parameters
        return tuple(name for name in names if name.endswith("_update_interval"))


def _is_literal(hint: Any) -> bool:
    return get_origin(hint) is Literal


NEVER = 1_000_000
# Interval of the estimates of those that make some, so that steps of both kinds are tested.
PERIOD = 2

# Arguments under which more than the defaults has to be saved.
RICH: dict[str, Any] = {
    "lr_ema": 0.5,
    "curvature_ema": 0.5,
    "damping_update_interval": 2,
    "weight_decay": 0.1,
}
RICH_INTERVAL = 3

# Entries of the curvature's state that older releases did not save.
OPTIONAL = ("schedules",)

# Short averages: a problem is over after a hundred steps.
SOPHIA: dict[str, Any] = {
    "lr": 0.05,
    "betas": (0.5, 0.9),
    "weight_decay": 0.0,
    "hessian_update_interval": PERIOD,
}

# Inverses after the warm-up come from older factors, as in a long run. Batches are of 4 and 8
# examples, whose quadratic models promise too much: shorter steps.
KFAC: dict[str, Any] = {
    "lr": 0.3,
    "factor_warmup": 2,
    "inverse_update_interval": PERIOD,
    "damping_update_interval": PERIOD,
}

# An inversion waits for the device: whether it succeeded decides what is done next.
KFAC_QUIET: dict[str, Any] = {
    "max_failures": NEVER,
    "factor_warmup": 0,
    "inverse_update_interval": NEVER,
}

# A direction says little about a gradient: several per step, so that a few steps show something.
# Each costs two passes, so not many, and short steps instead.
ZEROTH: dict[str, Any] = {"lr": 0.2, "num_samples": 4}

# H moves, and second differences are above the round-off of float32.
HIZOO: dict[str, Any] = {
    "lr": 0.1,
    "num_samples": 6,
    "perturbation_scale": 0.01,
    "hessian_smoothing": 1e-3,
}

SPECIAL: dict[str, dict[str, Any]] = {
    "adamqlr": {"quiet": {"max_failures": NEVER}},
    "sgdqlr": {"quiet": {"max_failures": NEVER}},
    "fadam": {
        "options": {"lr": 0.05, "betas": (0.5, 0.9)},
        "quiet": {"max_failures": NEVER},
    },
    "betaftrl": {
        "options": {"lr": 0.05, "betas": (0.5, 0.9), "scale": "adam"},
        "quiet": {"max_failures": NEVER},
    },
    "adafisher": {
        "options": {"factor_update_interval": PERIOD},
        "steep": {"lr": 0.003, "damping": 0.03},
        "quiet": {"max_failures": NEVER},
    },
    "adafisherw": {
        "options": {"factor_update_interval": PERIOD},
        "steep": {"lr": 0.003, "damping": 0.03},
        "quiet": {"max_failures": NEVER},
    },
    "adahessian": {
        "options": {
            "lr": 0.2,
            "eps": 0.01,
            "hessian_update_interval": PERIOD,
            "hvp_method": "double-backward",
        },
        "quiet": {"max_failures": NEVER},
    },
    **{
        name: {
            "options": KFAC,
            "exact": {"fisher_type": "type-2"},
            "quiet": KFAC_QUIET,
            "shared_state": ("blocks",),
            # The bases of EK-FAC are not unique where a factor is singular, and dearer.
            "represents": name == "kfac",
        }
        for name in ("kfac", "ekfac")
    },
    "mfac": {
        # A window that fills, in a metric that changes little from step to step.
        "options": {"lr": 0.2, "num_grads": 8, "damping": 0.1},
        "steep": {"lr": 2.0, "damping": 8.0},
        "quiet": {"max_failures": NEVER},
        "shared_state": ("window",),
        "precise": True,
    },
    "sophiag": {
        "options": {**SOPHIA, "rho": 1.0},
        "exact": {"squared": "window"},
        "sampler": ContentSampler,
        "quiet": {"max_failures": NEVER},
    },
    "sophiah": {
        "options": {**SOPHIA, "rho": 1.0},
        "quiet": {"max_failures": NEVER},
    },
    "mezo": {
        "options": ZEROTH,
        "steep": {"lr": 0.01},
        "quiet": {"max_failures": NEVER},
    },
    "hizoo": {
        "options": HIZOO,
        "steep": {"lr": 0.015},
        "quiet": {"max_failures": NEVER},
        # Of those without a backward: it has state, and asks for three evaluations.
        "represents": True,
    },
    "hizool": {
        "options": HIZOO,
        "steep": {"lr": 0.015},
        "quiet": {"max_failures": NEVER},
        "variant_of": "hizoo",
    },
    "zoadam": {
        "options": {**ZEROTH, "lr": 0.05, "betas": (0.5, 0.9)},
        "quiet": {"max_failures": NEVER},
    },
    "zomomentum": {
        "options": {**ZEROTH, "lr": 0.1, "momentum": 0.5},
        "steep": {"lr": 0.005},
        "quiet": {"max_failures": NEVER},
        "variant_of": "mezo",
    },
    "zosignsgd": {
        "options": {**ZEROTH, "lr": 0.05},
        "quiet": {"max_failures": NEVER},
        "variant_of": "mezo",
    },
    "zoconservative": {
        "options": {"lr": 0.1},
        "steep": {"lr": 0.02},
        "quiet": {"max_failures": NEVER},
        "variant_of": "mezo",
    },
    "forwardgradient": {
        "options": ZEROTH,
        "steep": {"lr": 0.01},
        "quiet": {"max_failures": NEVER},
        "variant_of": "mezo",
    },
}

CONTRACTS = [Contract(info, **SPECIAL.get(info.name, {})) for info in list_optimizers()]


def _with_each(contracts: list[Contract]) -> pytest.MarkDecorator:
    names = [contract.info.name for contract in contracts]
    return pytest.mark.parametrize("contract", contracts, ids=names)


every_optimizer = _with_each(CONTRACTS)
every_wide = _with_each([c for c in CONTRACTS if c.runs_wide])
# The core of those that run no backward.
every_forward_only = _with_each([c for c in CONTRACTS if c.forward_only])


def state_tensors(optimizer: CurvatureOptimizer) -> dict[str, Tensor]:
    """List every tensor of the state under a name."""
    found: dict[str, Tensor] = {}

    def walk(name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, dict):
            for key, part in value.items():
                walk(f"{name}/{key}", part)
        elif isinstance(value, (list, tuple)):
            for index, part in enumerate(value):
                walk(f"{name}/{index}", part)

    walk("", optimizer.state_dict())
    return found


def numbered(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state whose layers are numbered: their names depend on what was attached."""
    own = state["curvature"]
    layers = {key: own[key] for key in ("factors", "blocks") if key in own}
    found = {key: dict(enumerate(entries.values())) for key, entries in layers.items()}
    return {**state, "curvature": {**own, **found}}


def same_on_all_ranks(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state without what every rank has its own part of."""
    own = state["curvature"]
    if not isinstance(own.get("window"), dict):
        return state
    window = {key: x for key, x in own["window"].items() if key not in ("rows", "columns")}
    return {**state, "curvature": {**own, "window": window}}


def identical(one: Any, other: Any) -> bool:
    """Tell whether two states are the same, tensors bit for bit and of the same dtype."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.dtype is other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(identical(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(identical, one, other))
    return bool(one == other)
