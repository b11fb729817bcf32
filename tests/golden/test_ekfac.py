"""Factors, eigenvalues and their correction against kronfluence, recorded with EK-FAC scores.

Sums are over the training set, of a loss that is summed: every example has the weight 1. Where
labels were enumerated instead of read from the data, every class counts as an example there: sums
and counts are larger by the number of classes, and averages are the same.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_curvature.curvature.inverse import eigenbasis_of
from lightning_curvature.curvature.kronecker_blocks import find_blocks
from lightning_curvature.curvature.kronecker_sums import (
    Basis,
    BlockSums,
    ExampleWeights,
    block_sums,
)
from lightning_curvature.curvature.layer_tape import LayerTape
from lightning_curvature.oracle.capture import LossCapture
from lightning_curvature.oracle.labels import LabelSampler
from lightning_curvature.oracle.plans import FisherType
from lightning_curvature.oracle.record import loss_terms
from lightning_curvature.oracle.roots import layer_roots
from tests.golden.ekfac_files import Recording
from tests.golden.kfac_files import close

FAMILY = "ekfac"
COVARIANCES, EIGENVALUES, GIVEN_BASIS, OWN_BASIS = 1e-12, 1e-10, 1e-10, 1e-8


class Gradients:
    """Calls of all layers over the training set, with the gradients at their outputs.

    Args:
        recording: The file.
        fisher_type: What the loss sends back.

    Attributes:
        times: How often an example is counted there.
    """

    def __init__(self, recording: Recording, fisher_type: FisherType) -> None:
        # An enumerated label counts every class.
        self.times = recording.classes if fisher_type == "type-2" else 1
        model = recording.model()
        self.blocks = find_blocks(model, list(model.parameters())).blocks
        tape = LayerTape(dict(model.named_children()), {}, lambda: True)
        output = model(recording.x)
        with LossCapture() as capture:
            total = recording.loss(output, recording.targets())
        self.calls = {call.name: call for call in tape.take()}
        edges = [call.edge for call in self.calls.values()]
        found: list[tuple[Tensor, ...]] = []
        weights: list[Tensor] = []
        (term,) = loss_terms(total, capture.calls)
        for root in layer_roots(term, fisher_type, LabelSampler(0)):
            (name,) = root.values
            inputs, values = [term.loss.arguments[name]], [root.values[name]]
            found.append(torch.autograd.grad(inputs, edges, values, retain_graph=True))
            weights = [root.weights]
        tape.close()
        self.weights = ExampleWeights.of(weights)
        columns = zip(*found, strict=True)
        self.grads = dict(zip(self.calls, map(list, columns), strict=True))

    def sums(self, layer: str, basis: Basis | None = None) -> BlockSums:
        """Return the sums over the training set."""
        return block_sums(
            self.blocks[layer], self.calls[layer], self.grads[layer], self.weights, basis=basis
        )

    @property
    def examples(self) -> int:
        return len(next(iter(self.calls.values())).given)


def counted(recording: Recording, prefix: str, layer: str) -> tuple[int, int]:
    """Return the recorded numbers of positions and of examples."""
    positions = recording.count(f"{prefix}num_activation_covariance_processed", layer)
    assert positions == recording.count(f"{prefix}num_gradient_covariance_processed", layer)
    return positions, recording.count(f"{prefix}num_lambda_processed", layer)


def test_sums_and_counts(golden_file: Path) -> None:
    recording = Recording(golden_file)
    for prefix, fisher_type in recording.kinds():
        gradients = Gradients(recording, fisher_type)
        times = gradients.times
        for layer in recording.layers:
            positions, examples = counted(recording, prefix, layer)
            sums = gradients.sums(layer)
            assert gradients.examples * times == examples
            if recording.mask is None:
                assert float(sums.positions) * times == pytest.approx(positions, rel=COVARIANCES)
            else:
                # Every token has the weight 1.
                assert float(gradients.weights.total) == pytest.approx(positions, rel=COVARIANCES)
            expected = recording.get(f"{prefix}gradient_covariance", layer)
            close(sums.g_sum[0, 0] * times, expected, COVARIANCES)
            expected = recording.get(f"{prefix}activation_covariance", layer)
            close(sums.a_sum[0, 0] / sums.positions, expected / positions, COVARIANCES)


def test_eigenvalues(golden_file: Path) -> None:
    recording = Recording(golden_file)
    for prefix, fisher_type in recording.kinds():
        gradients = Gradients(recording, fisher_type)
        for layer in recording.layers:
            sums = gradients.sums(layer)
            positions, _ = counted(recording, prefix, layer)
            averages = sums.a_sum / sums.positions, sums.g_sum * gradients.times / positions
            for average, name in zip(averages, ("activation", "gradient"), strict=True):
                found = eigenbasis_of(average)
                values = recording.get(f"{prefix}{name}_eigenvalues", layer)
                vectors = recording.get(f"{prefix}{name}_eigenvectors", layer)
                # Theirs are below zero by rounding where ours are cut off.
                close(found.values[0, 0], values.clamp_min(0.0), EIGENVALUES)
                ours = found.vectors[0, 0]
                again = (ours * found.values[0, 0]) @ ours.mT
                close(again, (vectors * values) @ vectors.mT, EIGENVALUES)


def basis(*vectors: Tensor) -> Basis:
    """Return a basis of the vectors of activations and of gradients."""
    return Basis(*(x[None, None] for x in vectors))


def test_corrected_eigenvalues(golden_file: Path) -> None:
    recording = Recording(golden_file)
    for prefix, fisher_type in recording.kinds():
        gradients = Gradients(recording, fisher_type)
        times = gradients.times
        for layer in recording.layers:
            theirs = [
                recording.get(f"{prefix}{name}_eigenvectors", layer)
                for name in ("activation", "gradient")
            ]
            sums = gradients.sums(layer, basis(*theirs))
            assert sums.squares is not None
            expected = recording.get(f"{prefix}lambda_matrix", layer)
            close(sums.squares[0] * times, expected, GIVEN_BASIS)
            # In our own basis it is the same matrix where an eigenvalue is not repeated.
            own = [
                eigenbasis_of(total / sums.positions).vectors[0, 0]
                for total in (sums.a_sum, sums.g_sum)
            ]
            again = gradients.sums(layer, basis(*own)).squares
            assert again is not None
            close(_matrix(again[0] * times, own), _matrix(expected, theirs), OWN_BASIS)
            # Whatever the basis, its sum is the squared length of all gradients.
            assert float(again.sum()) == pytest.approx(float(sums.squares.sum()), rel=GIVEN_BASIS)


def _matrix(squares: Tensor, vectors: list[Tensor]) -> Tensor:
    """Return what the corrected block maps a fixed matrix to."""
    probe = torch.arange(squares.numel(), dtype=squares.dtype).view(squares.shape).sin()
    a, g = vectors
    return g @ (squares * (g.mT @ probe @ a)) @ a.mT


def test_diagonal(golden_file: Path) -> None:
    recording = Recording(golden_file)
    prefix = "diag_"
    if not recording.has(f"{prefix}lambda_matrix"):
        # Of masked sequences none was recorded.
        assert recording.mask is not None
        return
    gradients = Gradients(recording, "empirical")
    for layer in recording.layers:
        sums = gradients.sums(layer, Basis(None, None))
        assert sums.squares is not None
        close(sums.squares[0], recording.get(f"{prefix}lambda_matrix", layer), GIVEN_BASIS)
        assert recording.count(f"{prefix}num_lambda_processed", layer) == gradients.examples
