"""Masks and weights of the official M-FAC pruner (see lightning_curvature/pruning)."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_curvature.pruning import FisherPruner, recomputation_targets
from tests.golden.conftest import golden_files

FILES = [file for file in golden_files("mfac") if file.stem.startswith("obs_")]


@pytest.mark.skipif(not FILES, reason="no recorded pruning of 'mfac'")
@pytest.mark.parametrize("block_size", [-1, 64])
def test_recorded_pruning(block_size: int) -> None:
    data = np.load(FILES[0])
    x, y, batch = torch.tensor(data["X"]), torch.tensor(data["y"]), int(data["batch"])
    wide = [int(size) for size in data["sizes"]]
    model = nn.Sequential(
        nn.Linear(wide[0], wide[1]),
        nn.Tanh(),
        nn.Linear(wide[1], wide[2]),
        nn.Tanh(),
        nn.Linear(wide[2], wide[3]),
    ).double()
    nn.utils.vector_to_parameters(torch.tensor(data["trained"]), model.parameters())
    # The official loop stops one gradient early, and divides by their number as if it had not.
    pruner = FisherPruner(
        model,
        num_grads=int(data["ngrads"]) - 1,
        damping=float(data["damp"]),
        block_size=None if block_size < 0 else block_size,
        weight_update="sum",
    )

    def loss(number: int) -> torch.Tensor:
        rows = slice(number * batch, (number + 1) * batch)
        return nn.functional.cross_entropy(model(x[rows]), y[rows])

    count = int(data["nrecomps"])
    reached = 0.0
    for number, target in enumerate(data["targets"]):
        targets = recomputation_targets(reached, float(target), count)
        for recomputation, sparsity in enumerate(targets, start=1):
            key = f"b{block_size}_t{number}_r{recomputation}_"
            assert sparsity == pytest.approx(float(data[key + "sparsity_request"]), rel=1e-12)
            gradients = pruner.collect(loss)
            zero = torch.zeros_like(gradients[:1])
            pruner.prune(sparsity, torch.cat([gradients, zero]))
            assert torch.equal(pruner.parameters.keep(), torch.tensor(data[key + "mask"])), key
            expected = torch.tensor(data[key + "w"])
            error = (pruner.parameters.weights() - expected).norm() / expected.norm()
            assert float(error) < 1e-9, key
        reached = pruner.parameters.sparsity()
