"""Slopes and curvature of recorded passes along directions, on this rank, in three ways.

Cost per direction relative to one forward and backward: finite differences 0.4, forward mode 1.2,
Hessian 2.5 and more. Each function returns the weighted sums over the micro-batches of ``<grad,
d>`` and ``d^T C e`` for all directions d, e. A direction of zeros gives zeros.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_curvature import vectors
from lightning_curvature.oracle.capture import LossCapture
from lightning_curvature.oracle.forms import bilinear_forms, pairs
from lightning_curvature.oracle.hidden import check_differentiable_twice
from lightning_curvature.oracle.protocol import RegressionScaling
from lightning_curvature.oracle.record import PassRecord
from lightning_curvature.oracle.replay import Replay, eager, load_forward_mode, matched_terms

__all__ = [
    "PROBE_LENGTHS",
    "Measured",
    "finite_differences",
    "forward_mode",
    "hessian_forms",
    "hessian_product",
]

Vector = Sequence[Tensor]

# Length of a finite-difference probe relative to the parameters: round-off and the curvature of the
# model balance near the square root of the machine precision.
PROBE_LENGTHS = {torch.float32: 1e-4, torch.float64: 1e-7}
_HALF_PROBE_LENGTH = 1e-2
# A model near zero has no scale of its own.
_MIN_PARAMETER_NORM = 1e-2
# Round-off of a loss, in units of the machine precision.
_ROUNDOFF = 4.0
# Share of the probe's known bias that may be wrong.
_BIAS_DOUBT = 0.1


class Measured(NamedTuple):
    """What the directions show, as 0-dim tensors.

    Attributes:
        slopes: <grad, d> of each direction.
        forms: d^T C e of each pair of directions, in the order of `pairs`.
        roundoff: Deviation of the first slope that round-off alone may cause.
    """

    slopes: list[Tensor]
    forms: list[Tensor]
    roundoff: Tensor


def _zero(params: Vector) -> Tensor:
    return torch.zeros((), dtype=vectors.scalar_dtype(params), device=params[0].device)


def _no_sums(params: Vector, count: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return the sums of slopes and of forms before the first micro-batch."""
    return [_zero(params)] * count, [_zero(params)] * len(pairs(count))


@torch.no_grad()
def finite_differences(
    replay: Replay,
    records: Sequence[PassRecord],
    params: Vector,
    directions: Sequence[Vector],
    scaling: RegressionScaling,
    saved: Vector | None = None,
) -> Measured:
    """Difference the model outputs between theta + eps d and theta.

    One forward per micro-batch and direction.

    Args:
        replay: Runs passes again.
        records: Micro-batches of the window.
        params: Parameters that have a component in ``directions``.
        directions: The directions, each one tensor per parameter.
        scaling: See `Oracle.directional`.
        saved: Copies of the parameters.
    """
    count = len(directions)
    slopes, forms = _no_sums(params, count)
    roundoff = _zero(params)
    dtype = roundoff.dtype
    probes = [_probe(params, direction) for direction in directions]
    saved = vectors.clone(params) if saved is None else saved
    order, at = list(range(count)), None
    try:
        for record in records:
            before = record.total().to(dtype)
            noise = _ROUNDOFF * torch.finfo(dtype).eps * before.abs()
            # Tangents of this micro-batch: per loss call, then per direction.
            found: list[list[list[Tensor]]] = [[[]] * count for _ in record.terms]
            for i in order:
                if at != i:
                    if at is not None:
                        vectors.copy_(params, saved)
                    vectors.add_scaled_(params, directions[i], probes[i].step)
                    at = i
                with LossCapture() as capture:
                    total = replay.total(record)
                divisor = probes[i].divisor
                slopes[i] = slopes[i] + (total.to(dtype) - before) / divisor * record.weight
                if i == 0:
                    roundoff = roundoff + noise / divisor * record.weight
                for tangents, (term, loss) in zip(
                    found, matched_terms(record, capture.calls), strict=True
                ):
                    values = term.loss.values()
                    tangents[i] = [
                        (new.to(dtype) - old.to(dtype)) / divisor
                        for new, old in zip(loss.values(), values, strict=True)
                    ]
            # The next micro-batch starts where this one ended: the parameters move less often.
            order.reverse()
            for term, tangents in zip(record.terms, found, strict=True):
                parts = bilinear_forms(
                    term.loss, term.loss.values(), tangents, term.coefficient, scaling
                )
                forms = [
                    form + part * record.weight for form, part in zip(forms, parts, strict=True)
                ]
    finally:
        # By copy: theta + eps d - eps d is not theta.
        vectors.copy_(params, saved)
    # A forward difference is off by half the curvature times eps, which is known here but for the
    # part that the Gauss-Newton matrix leaves out. Close to a minimum that may exceed the slope.
    own = [form for form, (i, j) in zip(forms, pairs(count), strict=True) if i == j]
    doubt = roundoff + _BIAS_DOUBT * probes[0].step * own[0].abs()
    slopes = [
        slope - 0.5 * probe.step * curvature
        for slope, probe, curvature in zip(slopes, probes, own, strict=True)
    ]
    return Measured(slopes, forms, doubt)


class _Probe(NamedTuple):
    """How far a finite difference moves along a direction.

    Attributes:
        step: Factor on the direction.
        divisor: What differences are divided by: the same, but infinite for a direction of zeros,
            where no difference counts, not even one by kernels that are not deterministic.
    """

    step: Tensor
    divisor: Tensor


def _probe(params: Vector, direction: Vector) -> _Probe:
    length = vectors.norm(params).clamp_min(_MIN_PARAMETER_NORM)
    # The coarsest parameters must still move.
    eps = max(PROBE_LENGTHS.get(p.dtype, _HALF_PROBE_LENGTH) for p in params) * length
    norm = vectors.norm(direction)
    eps = eps / norm.clamp_min(torch.finfo(vectors.scalar_dtype(params)).tiny)
    moves = norm != 0  # true of NaN: what is not finite must show
    return _Probe(torch.where(moves, eps, 0.0), torch.where(moves, eps, math.inf))


@torch.no_grad()
def forward_mode(
    replay: Replay,
    records: Sequence[PassRecord],
    params: Vector,
    directions: Sequence[Vector],
    scaling: RegressionScaling,
) -> Measured:
    """Push each direction forward through the model with dual tensors; exact.

    Args:
        replay: Runs passes again.
        records: Micro-batches of the window.
        params: Parameters that have a component in ``directions``.
        directions: The directions, each one tensor per parameter.
        scaling: See `Oracle.directional`.

    Raises:
        NotImplementedError: If an operator has no forward-mode rule.
        RuntimeError: Likewise; torch raises both.
    """
    load_forward_mode()
    slopes, forms = _no_sums(params, len(directions))
    dtype = _zero(params).dtype
    for record in records:
        # Per direction, then per loss call: values and tangents of its inputs.
        found: list[list[list[tuple[Tensor, Tensor]]]] = []
        for i, direction in enumerate(directions):
            slope, split = _pushed_forward(replay, record, params, direction)
            slopes[i] = slopes[i] + slope.to(dtype) * record.weight
            found.append(split)
        for term, calls in zip(record.terms, zip(*found, strict=True), strict=True):
            values = [value for value, _ in calls[0]]
            tangents = [[tangent for _, tangent in call] for call in calls]
            parts = bilinear_forms(term.loss, values, tangents, term.coefficient, scaling)
            forms = [
                form + part.to(dtype) * record.weight
                for form, part in zip(forms, parts, strict=True)
            ]
    return Measured(slopes, forms, _zero(params))


def _pushed_forward(
    replay: Replay, record: PassRecord, params: Vector, direction: Vector
) -> tuple[Tensor, list[list[tuple[Tensor, Tensor]]]]:
    """Return the slope of one micro-batch, and per loss call values and tangents of its inputs."""
    with _differentiable_kernels(replay), forward_ad.dual_level():
        duals = {
            id(p): forward_ad.make_dual(p.detach(), d.to(p.dtype))  # type: ignore[no-untyped-call]
            for p, d in zip(params, direction, strict=True)
        }
        with LossCapture() as capture:
            total = replay.total_with(record, duals)
        return _split(total)[1], [
            [_split(loss.arguments[name]) for name in loss.inputs]
            for _, loss in matched_terms(record, capture.calls)
        ]


@contextmanager
def _differentiable_kernels(replay: Replay) -> Iterator[None]:
    """Choose kernels that can be differentiated forward, or twice; fused ones cannot."""
    with ExitStack() as stack:
        stack.enter_context(eager())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if replay.recurrent:
            # Setting these flags warns of hardware that is not there.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            enabled = torch._C._get_mkldnn_enabled()
            stack.callback(torch._C._set_mkldnn_enabled, enabled)
            torch._C._set_mkldnn_enabled(False)
        yield


def _split(dual: Tensor) -> tuple[Tensor, Tensor]:
    """Return value and tangent; a missing tangent is zero (the self-check notices a lost one)."""
    pair = forward_ad.unpack_dual(dual)  # type: ignore[no-untyped-call]
    return pair.primal, torch.zeros_like(pair.primal) if pair.tangent is None else pair.tangent


@contextmanager
def _slopes(
    replay: Replay, record: PassRecord, params: Vector, directions: Sequence[Vector]
) -> Iterator[list[Tensor]]:
    """Give <grad, d> of one micro-batch along each direction, with the graph of all of them."""
    with (
        torch.enable_grad(),
        _differentiable_kernels(replay),
        replay.running(record) as total,
    ):
        present: list[Tensor | None] = [None] * len(params)
        if total.requires_grad:
            grads = torch.autograd.grad(total, params, create_graph=True, allow_unused=True)
            present = list(grads)
            if not replay.checked_twice:
                check_differentiable_twice(total, present)
                replay.checked_twice = True
        slopes = []
        for direction in directions:
            parts = [
                (grad * d.to(grad.dtype)).sum().to(vectors.scalar_dtype(params))
                for grad, d in zip(present, direction, strict=True)
                if grad is not None
            ]
            # A loss that does not depend on the parameters has no part.
            slopes.append(torch.stack(parts).sum() if parts else _zero(params))
        yield slopes


def _product(slope: Tensor, params: Vector, *, last: bool) -> list[Tensor | None]:
    """Differentiate a slope, the last one on its graph or not."""
    if not slope.requires_grad:
        return [None] * len(params)
    return list(torch.autograd.grad(slope, params, allow_unused=True, retain_graph=not last))


def hessian_product(
    replay: Replay, record: PassRecord, params: Vector, direction: Vector
) -> tuple[Tensor, list[Tensor | None]]:
    """Return <grad, d> and H d of one micro-batch, unweighted, by double backward.

    Args:
        replay: Runs passes again.
        record: The micro-batch.
        params: Parameters that have a component in ``direction``.
        direction: The direction d, one tensor per parameter.
    """
    with _slopes(replay, record, params, [direction]) as (slope,):
        products = _product(slope, params, last=True)
    return slope.detach(), products


def hessian_forms(
    replay: Replay, records: Sequence[PassRecord], params: Vector, directions: Sequence[Vector]
) -> Measured:
    """Differentiate each slope once more, by double backward; one graph per micro-batch.

    Args:
        replay: Runs passes again.
        records: Micro-batches of the window.
        params: Parameters that have a component in ``directions``.
        directions: The directions, each one tensor per parameter.
    """
    count = len(directions)
    slopes, forms = _no_sums(params, count)
    for record in records:
        with _slopes(replay, record, params, directions) as found:
            for i, slope in enumerate(found):
                slopes[i] = slopes[i] + slope.detach() * record.weight
                products = _product(slope, params, last=i == count - 1)
                for at, (row, column) in enumerate(pairs(count)):
                    if row == i:
                        forms[at] = _add_dots(
                            forms[at], products, directions[column], record.weight
                        )
    return Measured(slopes, forms, _zero(params))


def _add_dots(
    form: Tensor, products: Sequence[Tensor | None], direction: Vector, weight: float | Tensor
) -> Tensor:
    for product, d in zip(products, direction, strict=True):
        if product is not None:
            form = form + vectors.dot([product], [d]) * weight
    return form
