"""Blocks of K-FAC against one-shot estimates of kfac-jax: averages, products, damped inverses.

Two defects of the reference touch none of the recorded files. It counts masked positions in the
bias corner of A: no position is masked in these. Its exact modes are wrong for logits with
positions: the files that have such logits use the empirical mode. Its diagonal of embeddings
squares gradients of whole batches, as ours does of parameters outside of known layers.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_curvature.curvature.kronecker import (
    averaged,
    averaged_diagonal,
    eigen_state,
    factored_inverse_state,
    multiplied,
    preconditioned,
)
from lightning_curvature.curvature.layer_rows import from_matrix, to_matrix
from tests.golden.kfac_estimates import Case, cases
from tests.golden.kfac_files import close, compare_factors, run_on_files

TOLERANCE = 1e-10
KINDS = ("grad", "mul", "inv_approx", "inv_exact")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    run_on_files(metafunc, "estimates_file", trajectories=False)


def compare_lists(ours: list[Tensor], expected: list[Tensor]) -> None:
    for x, value in zip(ours, expected, strict=True):
        close(x, value, TOLERANCE)


def block_key(case: Case, update: int, names: tuple[str, ...]) -> str:
    return f"{case.name}/after_update_{update}/{'+'.join(names)}"


def compare_averages(case: Case, update: int, blocks: dict, diagonals: dict) -> set[str]:
    """Compare running averages after an update; return the keys that were compared."""
    arrays, compared = case.arrays, set()
    for layer, names in case.layers.items():
        key = block_key(case, update, names)
        module = case.model.get_submodule(layer)
        if f"{key}/A" in arrays:
            theirs = arrays[f"{key}/A"], arrays[f"{key}/G"]
            state = blocks[layer]
            compared |= {f"{key}/A", f"{key}/G"}
            compare_factors(state, module, theirs, rtol=TOLERANCE)
            if f"{key}/average_repeats" in arrays:
                compared.add(f"{key}/average_repeats")
                expected = float(arrays[f"{key}/average_repeats"])
                assert float(state["positions"]) == pytest.approx(expected, rel=TOLERANCE)
            continue
        for name, p in zip(names, module.parameters(), strict=True):
            compared.add(f"{key}/diag:{name}")
            expected = torch.from_numpy(arrays[f"{key}/diag:{name}"])
            close(diagonals[id(p)]["diagonal"], expected, TOLERANCE)
    return compared


def compare_products(case: Case, parts: Any, blocks: dict, diagonals: dict) -> set[str]:
    """Compare products with the matrix and its damped inverses; return what was compared."""
    dtype = torch.float64
    mu = torch.tensor(case.damping, dtype=dtype)
    compared = set()
    for layer, names in case.layers.items():
        module = case.model.get_submodule(layer)
        compared |= {f"{case.name}/{k}/{n}" for k in KINDS for n in names}
        given = [case.recorded("grad", name) for name in names]
        compare_lists([p.grad for p in module.parameters()], given)
        answers: dict[str, list[Tensor]] = {}
        if layer in blocks:
            info, state = parts.blocks[layer], blocks[layer]
            matrix = to_matrix(module, given[0], given[1] if given[1:] else None)
            factored = factored_inverse_state(info, state, mu, dtype).state
            exact = eigen_state(info, state, dtype, corrected=False).state
            products = {
                "mul": multiplied(info, state, matrix),
                "inv_approx": preconditioned(info, {**state, **factored}, matrix, mu),
                "inv_exact": preconditioned(info, {**state, **exact}, matrix, mu),
            }
            for kind, product in products.items():
                found = from_matrix(module, product, has_bias=len(names) > 1)
                answers[kind] = [x for x in found if x is not None]
        else:
            own = [diagonals[id(p)]["diagonal"] for p in module.parameters()]
            pairs = list(zip(given, own, strict=True))
            answers["mul"] = [g * d for g, d in pairs]
            answers["inv_approx"] = answers["inv_exact"] = [g / (d + mu) for g, d in pairs]
        for kind, answer in answers.items():
            compare_lists(answer, [case.recorded(kind, name) for name in names])
    return compared


def test_estimates(estimates_file: Path) -> None:
    number = 0
    for case in cases(estimates_file):
        number += 1
        blocks: dict[str, Any] = {}
        diagonals: dict[int, Any] = {}
        compared: set[str] = set()
        for update, (oracle, window) in enumerate(case.windows(), start=1):
            sums = window.collect(oracle)
            for name, found in sums.blocks.items():
                old = blocks.get(name, {})
                blocks[name] = averaged(old, found, case.decay, None, torch.float64)
            for index, squares in sums.diagonals.items():
                place = id(window.params[index])
                old = diagonals.get(place, {})
                diagonals[place] = averaged_diagonal(old, squares, case.decay, None)
            compared |= compare_averages(case, update, blocks, diagonals)
        compared |= compare_products(case, window.parts, blocks, diagonals)
        everything = {
            key for key in case.arrays if key.startswith(f"{case.name}/") and "/params/" not in key
        }
        assert compared == everything
    assert number > 0
