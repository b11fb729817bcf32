"""Expectations over all labels a model may draw, without drawing any.

The gradient under drawn labels is a sum over examples of terms that are linear in the label (or in
the noise, or in the sign) of the example. So the gradients in which one label differs from a base
tell every term, and with the model's probabilities the exact second moment follows.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_curvature.oracle.labels import LabelSampler
from lightning_curvature.oracle.record import LossTerm
from lightning_curvature.oracle.sampling import Sample, sample_gradients


class Chosen(LabelSampler):
    """Gives label 0, noise 0 and sign +1 to all examples but one.

    Args:
        number: The one, None for none.
        label: Its label.

    Attributes:
        kind: What was asked for: "categorical", "bernoulli", "normal" or "signs".
        probabilities: Of the classes, shape ``[examples, classes]``, for labels.
        count: Number of examples (or entries).
    """

    def __init__(self, number: int | None = None, label: int = 1) -> None:
        super().__init__()
        self.number = number
        self.label = label
        self.kind = ""
        self.probabilities = torch.empty(0)
        self.count = 0

    def _base(self, like: Tensor, kind: str, value: float) -> Tensor:
        assert not self.kind, "one draw per sampler"
        self.kind, self.count = kind, like.numel()
        chosen = torch.full_like(like, value).reshape(-1)
        if self.number is not None:
            chosen[self.number] = -1.0 if kind == "signs" else float(self.label)
        return chosen.view(like.shape)

    def categorical(self, probabilities: Tensor, dim: int, call: int) -> Tensor:
        """Give class numbers."""
        rows = probabilities.movedim(dim, -1)
        self.probabilities = rows.reshape(-1, rows.shape[-1])
        return self._base(rows[..., 0], "categorical", 0.0).long()

    def bernoulli(self, probabilities: Tensor, call: int, name: str = "input") -> Tensor:
        """Give zeros and a one."""
        p = probabilities.reshape(-1)
        self.probabilities = torch.stack([1 - p, p], dim=1)
        return self._base(probabilities, "bernoulli", 0.0)

    def normal(self, mean: Tensor, call: int) -> Tensor:
        """Give zeros and a one."""
        return self._base(mean, "normal", 0.0)

    def signs(self, like: Tensor, call: int, name: str) -> Tensor:
        """Give +1, and one -1."""
        return self._base(like, "signs", 1.0)


class Signs(LabelSampler):
    """Gives a row of signs, one after the other.

    Args:
        row: The signs.
    """

    def __init__(self, row: Sequence[float]) -> None:
        super().__init__()
        self.left = list(row)

    def signs(self, like: Tensor, call: int, name: str) -> Tensor:
        """Give the next signs."""
        given, self.left = self.left[: like.numel()], self.left[like.numel() :]
        return torch.tensor(given, dtype=like.dtype).view(like.shape)


def estimate(sample: Sample | None, params: Sequence[Tensor]) -> Tensor:
    """Return the estimate of the diagonal by one sample, as a vector."""
    assert sample is not None
    partners = sample.grads if sample.partners is None else sample.partners
    parts = [
        torch.zeros_like(p) if g is None or h is None else g * h
        for g, h, p in zip(sample.grads, partners, params, strict=True)
    ]
    return torch.cat([part.reshape(-1) for part in parts])


def mean_over_signs(terms: Sequence[LossTerm], params: Sequence[Tensor], count: int) -> Tensor:
    """Return the exact mean of the estimate, over all rows of signs.

    Args:
        terms: Losses of which no likelihood is known.
        params: The parameters.
        count: Number of signs in all.
    """
    found = []
    for row in itertools.product([-1.0, 1.0], repeat=count):
        sampler = Signs(row)
        found.append(estimate(sample_gradients(terms, params, sampler), params))
        assert not sampler.left
    return torch.stack(found).mean(0)


def _flat(sample: Sample | None, params: Sequence[Tensor]) -> Tensor:
    assert sample is not None
    assert sample.partners is None, "products are not linear in the signs"
    pairs = zip(sample.grads, params, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in pairs])


def moments(
    terms: Sequence[LossTerm], params: Sequence[Tensor], **options: Any
) -> tuple[Tensor, Tensor]:
    """Return the exact mean of the sampled gradient of one loss, and of its square.

    Args:
        terms: A single loss, connected to the graph.
        params: The parameters.
        **options: Of `sample_gradients`.
    """

    def gradient(number: int | None, label: int = 1) -> Tensor:
        return _flat(sample_gradients(terms, params, Chosen(number, label), **options), params)

    base = Chosen()
    at_base = _flat(sample_gradients(terms, params, base, **options), params)
    if base.kind in ("normal", "signs"):
        if base.kind == "normal":
            parts = [gradient(i) - at_base for i in range(base.count)]
            mean = at_base
        else:
            parts = [(at_base - gradient(i)) / 2 for i in range(base.count)]
            mean = at_base - torch.stack(parts).sum(0)
        return mean, torch.stack(parts).square().sum(0) + mean.square()
    mean, variance = at_base.clone(), torch.zeros_like(at_base)
    for i, p in enumerate(base.probabilities):
        others = [gradient(i, k) - at_base for k in range(1, len(p))]
        shifts = torch.stack([torch.zeros_like(at_base), *others])
        own = p @ shifts
        mean += own
        variance += p @ (shifts - own).square()
    return mean, variance + mean.square()
