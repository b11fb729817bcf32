"""Isolation of every test and doctest: seeds, threads, environment, process group, directory.

At the root, not under ``tests/``, because the doctests of the package need the same.
"""

import os

# Before torch is imported: subprocesses inherit these, and one thread each is the faster choice on
# machines with few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

SEED = 20231014


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Run named files in this process: workers need seconds to import torch and Lightning."""
    places = [config.invocation_params.dir / arg.partition("::")[0] for arg in config.args]
    return 0 if all(place.is_file() for place in places) else None


@pytest.fixture(autouse=True, scope="session")
def single_thread() -> None:
    """Use one thread for the whole session: small tensors, and sums in a fixed order."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Seed the three global random streams a training step may draw from."""
    random.seed(SEED)
    np.random.seed(SEED)  # noqa: NPY002 - users' augmentation draws from the global stream
    torch.manual_seed(SEED)


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Put the environment variables back: a Trainer sets ranks, ports and seeds there."""
    before = dict(os.environ)
    yield
    if dict(os.environ) != before:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    """Destroy a process group that the test left behind."""
    yield
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def torch_globals() -> Iterator[None]:
    """Put back the switches of torch that a test, or a Trainer on its behalf, may turn."""
    dtype = torch.get_default_dtype()
    precision = torch.get_float32_matmul_precision()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    grad_enabled = torch.is_grad_enabled()
    yield
    torch.set_default_dtype(dtype)
    torch.set_float32_matmul_precision(precision)
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch.set_grad_enabled(grad_enabled)


@pytest.fixture(autouse=True)
def working_directory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run in ``tmp_path``, so that logs and checkpoints never land in the checkout.

    A test marked ``keep_cwd`` stays in the directory pytest was started from.
    """
    if request.node.get_closest_marker("keep_cwd") is not None:
        yield
        return
    before = Path.cwd()
    os.chdir(request.getfixturevalue("tmp_path"))
    yield
    os.chdir(before)
