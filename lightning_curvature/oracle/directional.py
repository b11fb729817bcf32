"""Slope and curvature of recorded passes along a direction, on this rank, in three ways.

Cost relative to one forward and backward: finite differences 0.4, forward mode 1.2, Hessian 2.5 and
more. Each function returns the weighted sums over the micro-batches of ``<grad, d>`` and ``d^T C
d``.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_curvature import vectors
from lightning_curvature.oracle.capture import LossCapture
from lightning_curvature.oracle.heads import quadratic_form
from lightning_curvature.oracle.hidden import check_differentiable_twice
from lightning_curvature.oracle.protocol import RegressionScaling
from lightning_curvature.oracle.record import PassRecord
from lightning_curvature.oracle.replay import Replay, eager, load_forward_mode, matched_terms

__all__ = [
    "PROBE_LENGTHS",
    "Measured",
    "finite_differences",
    "forward_mode",
    "hessian_form",
    "hessian_product",
]

Vector = Sequence[Tensor]
Measured = tuple[Tensor, Tensor, Tensor]

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


def _zero(params: Vector) -> Tensor:
    return torch.zeros((), dtype=vectors.scalar_dtype(params), device=params[0].device)


@torch.no_grad()
def finite_differences(
    replay: Replay,
    records: Sequence[PassRecord],
    params: Vector,
    direction: Vector,
    scaling: RegressionScaling,
    saved: Vector | None = None,
) -> Measured:
    """Difference the model outputs between theta + eps d and theta; one forward per micro-batch.

    Args:
        replay: Runs passes again.
        records: Micro-batches of the window.
        params: Parameters that have a component in ``direction``.
        direction: The direction, one tensor per parameter.
        scaling: See `Oracle.directional`.
        saved: Copies of the parameters.
    """
    slope = curvature = roundoff = _zero(params)
    dtype = slope.dtype
    length = vectors.norm(params).clamp_min(_MIN_PARAMETER_NORM)
    # The coarsest parameters must still move.
    eps = max(PROBE_LENGTHS.get(p.dtype, _HALF_PROBE_LENGTH) for p in params) * length
    eps = eps / vectors.norm(direction).clamp_min(torch.finfo(dtype).tiny)
    saved = vectors.clone(params) if saved is None else saved
    try:
        vectors.add_scaled_(params, direction, eps)
        for record in records:
            with LossCapture() as capture:
                total = replay.total(record)
            before = record.total().to(dtype)
            slope = slope + (total.to(dtype) - before) / eps * record.weight
            noise = _ROUNDOFF * torch.finfo(dtype).eps * before.abs()
            roundoff = roundoff + noise / eps * record.weight
            for term, loss in matched_terms(record, capture.calls):
                values = term.loss.values()
                tangents = [
                    (new.to(dtype) - old.to(dtype)) / eps
                    for new, old in zip(loss.values(), values, strict=True)
                ]
                form = quadratic_form(term.loss, values, tangents, term.coefficient, scaling)
                curvature = curvature + form * record.weight
    finally:
        # By copy: theta + eps d - eps d is not theta.
        vectors.copy_(params, saved)
    # A forward difference is off by half the curvature times eps, which is known here but for the
    # part that the Gauss-Newton matrix leaves out. Close to a minimum that may exceed the slope.
    doubt = roundoff + _BIAS_DOUBT * eps * curvature.abs()
    return slope - 0.5 * eps * curvature, curvature, doubt


@torch.no_grad()
def forward_mode(
    replay: Replay,
    records: Sequence[PassRecord],
    params: Vector,
    direction: Vector,
    scaling: RegressionScaling,
) -> Measured:
    """Push the direction forward through the model with dual tensors; exact.

    Args:
        replay: Runs passes again.
        records: Micro-batches of the window.
        params: Parameters that have a component in ``direction``.
        direction: The direction, one tensor per parameter.
        scaling: See `Oracle.directional`.

    Raises:
        NotImplementedError: If an operator has no forward-mode rule.
        RuntimeError: Likewise; torch raises both.
    """
    load_forward_mode()
    slope = curvature = _zero(params)
    dtype = slope.dtype
    for record in records:
        with _differentiable_kernels(replay), forward_ad.dual_level():
            duals = {
                id(p): forward_ad.make_dual(p.detach(), d.to(p.dtype))  # type: ignore[no-untyped-call]
                for p, d in zip(params, direction, strict=True)
            }
            with LossCapture() as capture:
                total = replay.total_with(record, duals)
            slope = slope + _split(total)[1].to(dtype) * record.weight
            split = [
                (term, [_split(loss.arguments[name]) for name in loss.inputs])
                for term, loss in matched_terms(record, capture.calls)
            ]
        for term, pairs in split:
            values, tangents = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
            form = quadratic_form(term.loss, values, tangents, term.coefficient, scaling)
            curvature = curvature + form.to(dtype) * record.weight
    return slope, curvature, _zero(params)


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
        parts = [
            (grad * d.to(grad.dtype)).sum().to(vectors.scalar_dtype(params))
            for grad, d in zip(present, direction, strict=True)
            if grad is not None
        ]
        # A loss that does not depend on the parameters has no part.
        slope = torch.stack(parts).sum() if parts else _zero(params)
        products: list[Tensor | None] = [None] * len(params)
        if slope.requires_grad:
            products = list(torch.autograd.grad(slope, params, allow_unused=True))
    return slope.detach(), products


def hessian_form(
    replay: Replay, records: Sequence[PassRecord], params: Vector, direction: Vector
) -> Measured:
    """Differentiate the slope once more, by double backward.

    Args:
        replay: Runs passes again.
        records: Micro-batches of the window.
        params: Parameters that have a component in ``direction``.
        direction: The direction, one tensor per parameter.
    """
    slope = curvature = _zero(params)
    for record in records:
        part, products = hessian_product(replay, record, params, direction)
        slope = slope + part * record.weight
        for product, d in zip(products, direction, strict=True):
            if product is not None:
                curvature = curvature + vectors.dot([product], [d]) * record.weight
    return slope, curvature, _zero(params)
