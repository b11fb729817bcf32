"""Table of single-loss objectives on logits of shape ``[6, 4]`` that provoke mistakes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCH, FEATURES, CLASSES = 6, 5, 4


def _gen(seed: int = 11) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs(dtype: torch.dtype = torch.float64, batch: int = BATCH) -> Tensor:
    """Draw a batch of inputs, shape ``[batch, 5]``."""
    return torch.randn(batch, FEATURES, generator=_gen(), dtype=torch.float64).to(dtype)


def labels(batch: int = BATCH) -> Tensor:
    """Draw class indices, shape ``[batch]``."""
    return torch.randint(CLASSES, (batch,), generator=_gen(12))


def values() -> Tensor:
    """Draw regression targets, shape ``[6, 4]``."""
    return torch.randn(BATCH, CLASSES, generator=_gen(13), dtype=torch.float64)


def fractions() -> Tensor:
    """Draw targets in (0, 1), shape ``[6, 4]``."""
    return torch.rand(BATCH, CLASSES, generator=_gen(14), dtype=torch.float64)


def distributions() -> Tensor:
    """Draw class distributions, shape ``[6, 4]``, one strongly peaked."""
    return (2 * values()).softmax(dim=1)


WEIGHT = torch.tensor([0.3, 1.7, 0.9, 2.5], dtype=torch.float64)
MASK = torch.tensor([1.0, 0.0, 1.0, 0.5, 0.0, 2.0], dtype=torch.float64)
MASKED_LABELS = torch.tensor([0, -100, 3, 1, -100, 2])
CUSTOM_IGNORED = torch.tensor([0, 2, 3, 1, 2, 2])
NO_SMOOTHING = 0.0


@dataclass(frozen=True)
class LossCase:
    """One objective.

    Args:
        name: test id.
        loss: ``loss(link(model_output), *targets)`` is the objective.
        targets: makes the targets.
        link: map from the model output to what the Gauss-Newton matrix regards as the logits; part
            of the objective unless ``curved`` is given.
            Losses of probabilities or log-probabilities count as the cross-entropy they belong to,
            so their sigmoid or log-softmax is part of ``loss``.
        curved: the loss whose Hessian counts, where that is not the whole of ``loss``.
    """

    name: str
    loss: Callable[..., Tensor]
    targets: Callable[[], tuple[Tensor, ...]]
    link: Callable[[Tensor], Tensor] = lambda z: z
    curved: Callable[..., Tensor] | None = None

    def objective(self, output: Tensor, *targets: Tensor) -> Tensor:
        """Return the objective, written as a user would."""
        if self.curved is not None:
            return self.loss(output, *targets)
        return self.loss(self.link(output), *targets)


def _grid(z: Tensor) -> Tensor:
    """Read six rows of four numbers as one image batch with four classes, shape ``[3, 4, 2]``."""
    return z.view(3, 2, CLASSES).transpose(1, 2)


def _grid_labels() -> tuple[Tensor, ...]:
    return (labels().view(3, 2),)


def _cross_entropy_cases() -> list[LossCase]:
    cases = []
    for reduction in ("mean", "sum", "none"):
        for weight_name, weight in (("", None), ("-weights", WEIGHT)):
            for smoothing in (NO_SMOOTHING, 0.15):
                for ignore_name, ignore, target in (
                    ("", -100, labels()),
                    ("-ignored", -100, MASKED_LABELS),
                    ("-ignored2", 2, CUSTOM_IGNORED),
                ):

                    def loss(
                        z: Tensor,
                        y: Tensor,
                        reduction: str = reduction,
                        weight: Tensor | None = weight,
                        ignore: int = ignore,
                        smoothing: float = smoothing,
                    ) -> Tensor:
                        out = F.cross_entropy(
                            z,
                            y,
                            weight=weight,
                            ignore_index=ignore,
                            reduction=reduction,
                            label_smoothing=smoothing,
                        )
                        return out if out.dim() == 0 else (out * MASK).sum() / MASK.sum()

                    name = f"ce-{reduction}{weight_name}{ignore_name}"
                    name += "-smoothed" if smoothing else ""
                    cases.append(LossCase(name, loss, lambda target=target: (target,)))
    return cases


def _soft_target_cases() -> list[LossCase]:
    zero_row = distributions() * (MASK != 0).double()[:, None]
    return [
        LossCase("ce-soft", F.cross_entropy, lambda: (distributions(),)),
        LossCase(
            "ce-soft-sum",
            lambda z, t: F.cross_entropy(z, t, reduction="sum"),
            lambda: (distributions(),),
        ),
        LossCase(
            "ce-soft-none",
            lambda z, t: (F.cross_entropy(z, t, reduction="none") * MASK).mean(),
            lambda: (distributions(),),
        ),
        LossCase(
            "ce-soft-weights",
            lambda z, t: F.cross_entropy(z, t, weight=WEIGHT),
            lambda: (distributions(),),
        ),
        LossCase(
            "ce-soft-weights-smoothed",
            lambda z, t: F.cross_entropy(z, t, weight=WEIGHT, label_smoothing=0.2),
            lambda: (distributions(),),
        ),
        LossCase("ce-soft-zero-rows", F.cross_entropy, lambda: (zero_row,)),
        LossCase(
            "ce-module",
            nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1),
            lambda: (labels(),),
        ),
        LossCase(
            "ce-keywords", lambda z, y: F.cross_entropy(target=y, input=z), lambda: (labels(),)
        ),
        LossCase("ce-positional", lambda z, y: F.cross_entropy(z, y, WEIGHT), lambda: (labels(),)),
        LossCase("ce-grid", F.cross_entropy, _grid_labels, _grid),
        LossCase(
            "ce-grid-weights-ignored",
            lambda z, y: F.cross_entropy(z, y, weight=WEIGHT, ignore_index=1),
            _grid_labels,
            _grid,
        ),
        LossCase(
            "ce-grid-none",
            lambda z, y: (F.cross_entropy(z, y, reduction="none") * MASK.view(3, 2)).mean(),
            _grid_labels,
            _grid,
        ),
        LossCase(
            "ce-grid-soft", F.cross_entropy, lambda: (_grid(distributions()).contiguous(),), _grid
        ),
        LossCase("ce-one-datum", lambda z, y: F.cross_entropy(z[0], y[0]), lambda: (labels(),)),
        LossCase("ce-temperature", lambda z, y: F.cross_entropy(z / 0.3, y), lambda: (labels(),)),
    ]


def _nll_cases() -> list[LossCase]:
    def nll(**kwargs: object) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda z, y: F.nll_loss(F.log_softmax(z, dim=1), y, **kwargs)

    return [
        LossCase("nll", nll(), lambda: (labels(),)),
        LossCase("nll-sum", nll(reduction="sum"), lambda: (labels(),)),
        LossCase(
            "nll-none",
            lambda z, y: (F.nll_loss(z.log_softmax(1), y, reduction="none") * MASK).mean(),
            lambda: (labels(),),
        ),
        LossCase("nll-weights", nll(weight=WEIGHT), lambda: (labels(),)),
        LossCase("nll-ignored", nll(weight=WEIGHT), lambda: (MASKED_LABELS,)),
        LossCase(
            "nll-module",
            lambda z, y: nn.NLLLoss(ignore_index=2)(z.log_softmax(dim=-1), y),
            lambda: (CUSTOM_IGNORED,),
        ),
        LossCase("nll-grid", nll(weight=WEIGHT), _grid_labels, _grid),
        LossCase(
            "kl_div-batchmean",
            lambda z, t: F.kl_div(z.log_softmax(1), t, reduction="batchmean"),
            lambda: (distributions(),),
        ),
        LossCase(
            "kl_div-sum",
            lambda z, t: F.kl_div(z.log_softmax(1), t, reduction="sum"),
            lambda: (distributions(),),
        ),
        LossCase(
            "kl_div-mean-log_target",
            lambda z, t: F.kl_div(z.log_softmax(1), t.log(), reduction="mean", log_target=True),
            lambda: (distributions(),),
        ),
        LossCase(
            "kl_div-none",
            lambda z, t: (F.kl_div(z.log_softmax(1), t, reduction="none").sum(1) * MASK).mean(),
            lambda: (distributions(),),
        ),
    ]


def _regression_cases() -> list[LossCase]:
    variance = fractions() + 0.2
    row_variance = fractions()[:, :1] + 0.2

    return [
        LossCase(
            "gaussian_nll-learned-variance",
            lambda z, t: F.gaussian_nll_loss(z[:, :2], t[:, :2], z[:, 2:].exp() + 0.1),
            lambda: (values(),),
            lambda z: torch.cat([z[:, :2], z[:, 2:].exp() + 0.1], dim=1),
            curved=lambda out, t: F.gaussian_nll_loss(out[:, :2], t[:, :2], out[:, 2:]),
        ),
        LossCase(
            "mse-between-outputs",
            lambda z, t: F.mse_loss(z[:, :2].tanh(), z[:, 2:].tanh()),
            lambda: (values(),),
            torch.tanh,
            curved=lambda out, t: F.mse_loss(out[:, :2], out[:, 2:]),
        ),
        LossCase("mse", F.mse_loss, lambda: (values(),)),
        LossCase("mse-half", lambda z, t: 0.5 * F.mse_loss(z, t), lambda: (values(),)),
        LossCase("mse-sum", lambda z, t: F.mse_loss(z, t, reduction="sum"), lambda: (values(),)),
        LossCase(
            "mse-none",
            lambda z, t: (F.mse_loss(z, t, reduction="none").mean(1) * MASK).sum() / MASK.sum(),
            lambda: (values(),),
        ),
        LossCase("mse-module", nn.MSELoss(), lambda: (values(),)),
        LossCase(
            "mse-weight",
            lambda z, t: F.mse_loss(z, t, weight=fractions()),
            lambda: (values(),),
        ),
        LossCase(
            "mse-root",
            lambda z, t: F.mse_loss(z, t).sqrt(),
            lambda: (values(),),
            curved=lambda z, t: F.mse_loss(z, t) / (2 * F.mse_loss(z.detach(), t).sqrt()),
        ),
        LossCase("mse-one-output", lambda z, t: F.mse_loss(z[:, 0], t[:, 0]), lambda: (values(),)),
        LossCase("huber", lambda z, t: F.huber_loss(z, t, delta=0.7), lambda: (values(),)),
        LossCase("huber-sum", nn.HuberLoss(reduction="sum"), lambda: (values(),)),
        LossCase("smooth_l1", lambda z, t: F.smooth_l1_loss(z, t, beta=0.5), lambda: (values(),)),
        LossCase("bce-logits", F.binary_cross_entropy_with_logits, lambda: (fractions(),)),
        LossCase(
            "bce-logits-weights",
            lambda z, t: F.binary_cross_entropy_with_logits(
                z, t, weight=fractions().flip(0), pos_weight=WEIGHT
            ),
            lambda: (fractions().round(),),
        ),
        LossCase(
            "bce-logits-pos_weight-sum",
            lambda z, t: F.binary_cross_entropy_with_logits(
                z, t, pos_weight=WEIGHT, reduction="sum"
            ),
            lambda: (fractions(),),
        ),
        LossCase(
            "bce-logits-broadcast-weight",
            nn.BCEWithLogitsLoss(weight=WEIGHT),
            lambda: (fractions(),),
        ),
        LossCase(
            "bce-logits-none",
            lambda z, t: (
                F.binary_cross_entropy_with_logits(z, t, reduction="none").sum(1) * MASK
            ).mean(),
            lambda: (fractions(),),
        ),
        LossCase(
            "bce", lambda z, t: F.binary_cross_entropy(z.sigmoid(), t), lambda: (fractions(),)
        ),
        LossCase(
            "bce-weight",
            lambda z, t: nn.BCELoss(weight=WEIGHT, reduction="sum")(z.sigmoid(), t),
            lambda: (fractions().round(),),
        ),
        LossCase(
            "bce-none",
            lambda z, t: (
                F.binary_cross_entropy(z.sigmoid(), t, reduction="none").mean(1) * MASK
            ).mean(),
            lambda: (fractions(),),
        ),
        LossCase(
            "gaussian_nll",
            lambda z, t: F.gaussian_nll_loss(z, t, variance),
            lambda: (values(),),
        ),
        LossCase(
            "gaussian_nll-rows",
            lambda z, t: nn.GaussianNLLLoss(full=True, reduction="sum")(z, t, row_variance),
            lambda: (values(),),
        ),
    ]


CASES = [*_cross_entropy_cases(), *_soft_target_cases(), *_nll_cases(), *_regression_cases()]
