"""Every file in examples/ runs, is listed in its README, and stays short."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
MAX_LINES = 100

# Small settings, and what the last lines must say: text before a number, and its limit.
SETTINGS: dict[str, tuple[list[str], dict[str, float]]] = {
    "plain_pytorch": (
        ["--epochs", "3"],
        {r"attached epoch 2 loss": 0.6, r"closure epoch 2 loss": 0.6},
    ),
    "lightning_unchanged": (["--epochs", "5"], {r"AdamW loss": 2.0, r"AdamQLR loss": 0.6}),
    "finetune_zeroth_order": (
        ["--epochs", "50"],
        {r"errors on shifted digits after / before:": 0.5},
    ),
    "prune_mfac": (
        ["--epochs", "8"],
        {
            r"fisher: sparsity 0.900, errors": 0.1,
            r"fisher: errors after two epochs of training": 0.1,
            r"errors by fisher / by magnitude:": 0.3,
        },
    ),
    "ddp": (
        ["--epochs", "5"],
        {
            r"one process: loss": 0.3,
            r"ddp_curvature: .* between the processes by": 0.0,
            r"ddp: .* between the processes by": 0.0,
            r"ddp_curvature: .* of one process by": 1e-6,
            r"ddp: .* of one process by": 1e-6,
        },
    ),
}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path: Path, run_python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """Runs without a warning, and its numbers are small."""
    arguments, expected = SETTINGS[path.stem]
    done = run_python(["-W", "error::RuntimeWarning", path, *arguments])
    assert done.returncode == 0, done.stderr
    for text, limit in expected.items():
        (number,) = re.findall(rf"^{text} ([0-9.e+-]+)", done.stdout, flags=re.MULTILINE)
        assert float(number) <= limit, done.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_length(path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) < MAX_LINES


def test_readme_lists_every_example() -> None:
    text = (ROOT / "examples" / "README.md").read_text("utf-8")
    listed = re.findall(r"^\| \[(\w+\.py)\]\((\w+\.py)\) \| .+ \| [\d.]+ \|$", text, re.MULTILINE)
    assert sorted(listed) == [(path.name, path.name) for path in EXAMPLES]
    assert set(SETTINGS) == {path.stem for path in EXAMPLES}
    for name in re.findall(r"python examples/(\w+\.py)", text):
        assert (ROOT / "examples" / name).exists()
