"""An optimizer that asks the oracle and then does something plain: only the asking can differ."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_curvature import CurvatureCallback, CurvatureOptimizer
from lightning_curvature.oracle import Oracle

ROUTES = ("strategy", "callback", "auto")


class Probe(CurvatureOptimizer):
    """AdamW that asks questions and ignores the answers.

    Args:
        params: parameters.
        lr: learning rate of the plain update.
        passes: what to ask in each step, in order: "directional", "hessian", "loss", "hvp".
        follow_slope: multiply each parameter with a number made of the answers, so that answers
            that differ in the last bit lead to other parameters.

    Attributes:
        deviations: ``|slope - <g, d>| / |<g, d>|`` of each directional question.
        slopes: ``(measured, from the gradient)`` of each directional question.
        curvatures: d^T C d of each directional question.
        losses: ``(base_loss, loss)`` of each loss question, parameters unchanged.
        closures: closures given to ``step``: True for a closure, False for none.
    """

    asks = frozenset({"loss", "directional", "hvp"})

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        passes: Sequence[str] = ("directional",),
        follow_slope: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr})
        self.passes = tuple(passes)
        self.follow_slope = follow_slope
        self.plain = torch.optim.AdamW(self._all_params(), lr=lr)
        self.deviations: list[float] = []
        self.slopes: list[tuple[Tensor, Tensor]] = []
        self.curvatures: list[Tensor] = []
        self.losses: list[tuple[Tensor, Tensor]] = []
        self.closures: list[bool] = []

    def wants_record(self) -> bool:
        """Ask only if there is something to ask."""
        return bool(self.passes)

    def step(self, closure: Any = None) -> Any:
        """Note whether there was a closure."""
        self.closures.append(closure is not None)
        return super().step(closure)

    def direction(self, params: Sequence[Tensor]) -> list[Tensor]:
        """Return an update direction like Adam's first, made without random numbers."""
        scale = torch.stack([p.grad.abs().max() for p in params]).max().clamp_min(1e-30)
        return [p.grad / (p.grad.abs() + 0.01 * scale) for p in params]

    def _ask(self, question: str, params: list[Tensor], oracle: Oracle) -> None:
        direction = self.direction(params)
        if question == "loss":
            self.losses.append((oracle.base_loss().clone(), oracle.loss().clone()))
        elif question == "hvp":
            oracle.hvp(direction)
        else:
            expected = torch.stack(
                [(p.grad * d).sum() for p, d in zip(params, direction, strict=True)]
            ).sum()
            answer = oracle.directional(
                direction,
                grad_slope=oracle.grad_slope(expected),
                curvature="hessian" if question == "hessian" else "fisher",
            )
            deviation = (answer.slope - expected).abs() / expected.abs()
            self.slopes.append((answer.slope.clone(), expected.clone()))
            self.curvatures.append(answer.curvature.clone())
            self.deviations.append(deviation.item())

    def _update(self, params: list[Tensor], oracle: Oracle | None) -> None:
        for question in self.passes:
            assert oracle is not None
            self._ask(question, params, oracle)
        if self.follow_slope:
            factor = 1 + 1e-3 * torch.tanh(self.slopes[-1][0] + self.curvatures[-1])
            for param in params:
                param.mul_(factor)
        with torch.enable_grad():
            self.plain.step()


def attachments(route: str, directional: str = "auto") -> dict[str, Any]:
    """Return the Trainer arguments that attach the oracle by a route.

    Args:
        route: "strategy", "callback", "auto" (the entry point) or "none" (nothing attached: for
            plain optimizers).
        directional: method of `WindowOracle.directional`; the entry point chooses by itself.
    """
    if route == "strategy":
        if directional == "auto":
            return {"strategy": "single_device_curvature"}
        from lightning_curvature import SingleDeviceCurvatureStrategy

        return {"strategy": SingleDeviceCurvatureStrategy(directional=directional)}
    if route == "callback":
        return {"callbacks": [CurvatureCallback(directional=directional)]}
    return {}


def make_trainer(
    route: str, *, directional: str = "auto", callbacks: Sequence[Callback] = (), **kwargs: Any
) -> Trainer:
    """Build a quiet Trainer on the CPU with the oracle attached by a route."""
    attached = attachments(route, directional)
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        **attached,
        **kwargs,
    }
    settings.setdefault("devices", 1)
    settings["callbacks"] = [*attached.get("callbacks", []), *callbacks]
    trainer = Trainer(**settings)
    names = {type(callback).__name__ for callback in trainer.callbacks}
    if route == "auto" and "AutoAttachCallback" not in names:
        raise RuntimeError("The entry point is missing: install the package (pip install -e .).")
    return trainer


def the_optimizer(module: LightningModule) -> Any:
    """Return the optimizer that a fit used, without Lightning's wrapper."""
    return module.trainer.optimizers[0]


def parameters_and_buffers(module: torch.nn.Module) -> dict[str, Tensor]:
    """Return copies of all parameters and buffers, also of those that are not saved."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in tensors}


def assert_bitwise(actual: dict[str, Tensor], expected: dict[str, Tensor], what: str = "") -> None:
    """Assert that two dictionaries of tensors have the same bits; NaN equals NaN."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            actual[name], tensor, rtol=0, atol=0, equal_nan=True, msg=f"{what} {name} differs"
        )
