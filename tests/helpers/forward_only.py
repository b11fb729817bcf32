"""Short fits with optimizers that run no backward."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from lightning_curvature import ForwardGradient, HiZOO, MeZO
from tests.helpers.features import Validated, batched
from tests.helpers.modules import StockModule, mlp_module
from tests.helpers.probing import make_trainer

KINDS: dict[str, dict[str, Any]] = {
    "two-sided": {"cls": MeZO},
    "one-sided": {"cls": MeZO, "estimator": "one_sided"},
    "hizoo": {"cls": HiZOO, "hessian_smoothing": 1e-3},
    "forward gradient": {"cls": ForwardGradient},
}
every_kind = pytest.mark.parametrize("kind", KINDS)
DOUBLE: dict[str, Any] = {"precision": "64-true"}


def maker(kind: str = "two-sided", **options: Any) -> Callable[[Any], Any]:
    """Return what makes the optimizer; by default parameters come back to their very bits."""
    given = dict(KINDS[kind])
    cls = given.pop("cls")
    if cls is not ForwardGradient:
        given = {"restore": "snapshot", "perturbation_scale": 0.01, **given}
    return lambda params: cls(params, **{"lr": 0.05, **given, **options})


def fit(
    module: LightningModule,
    *,
    route: str = "strategy",
    data: Any = None,
    val: Any = None,
    callbacks: Sequence[Callback] = (),
    **settings: Any,
) -> Trainer:
    """Fit five batches of eight rows, or what is given."""
    trainer = make_trainer(route, callbacks=callbacks, **settings)
    trainer.fit(module, batched() if data is None else data, val)
    return trainer


def mlp(make: Callable[[Any], Any], kind: type[StockModule] = Validated) -> StockModule:
    """Build the same small module every time."""
    seed_everything(5)
    return kind(mlp_module(make).network, make)
