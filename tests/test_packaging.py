"""What is written twice agrees: versions, entry points, commands, tables, public names."""

import re
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

import lightning_curvature
from lightning_curvature.__about__ import __version__

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

DISTRIBUTION = "lightning-curvature"
MAIN_JOB = 'pip install ".[demo]" && lightning-curvature fit -c configs/recipes/digits_adamqlr.yaml'
TESTS = 'pip install ".[test]" && pytest'
PUBLIC_NAMES = sorted(name for name in lightning_curvature.__all__ if not name.startswith("_"))


@pytest.fixture
def pyproject(repo_root: Path) -> dict[str, Any]:
    return tomllib.loads((repo_root / "pyproject.toml").read_text("utf-8"))


@pytest.fixture
def distribution() -> metadata.Distribution:
    try:
        return metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        pytest.skip("the package is imported from a checkout and not installed")


def test_version_is_a_release_number() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+|\.dev\d+)?", __version__)
    assert lightning_curvature.__version__ == __version__


def test_installed_version(distribution: metadata.Distribution) -> None:
    assert distribution.version == __version__


def test_citation_version(repo_root: Path) -> None:
    citation = yaml.safe_load((repo_root / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == __version__


def test_changelog_has_the_version(repo_root: Path) -> None:
    changelog = (repo_root / "CHANGELOG.md").read_text("utf-8")
    headings = re.findall(r"^## \[(.+?)\]", changelog, flags=re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert headings[1] == __version__


def test_installed_entry_points(
    pyproject: dict[str, Any], distribution: metadata.Distribution
) -> None:
    project = pyproject["project"]
    declared = {("console_scripts", name, value) for name, value in project["scripts"].items()}
    for group, entries in project["entry-points"].items():
        declared |= {(group, name, value) for name, value in entries.items()}
    installed = {(entry.group, entry.name, entry.value) for entry in distribution.entry_points}
    assert installed == declared


def test_entry_points_load(pyproject: dict[str, Any]) -> None:
    project = pyproject["project"]
    targets = [*project["scripts"].items()]
    for entries in project["entry-points"].values():
        targets += entries.items()
    for name, value in targets:
        assert callable(metadata.EntryPoint(name, value, "any").load())


def test_typed_marker_is_shipped() -> None:
    assert Path(lightning_curvature.__file__).with_name("py.typed").is_file()


def test_readme_has_the_two_commands(repo_root: Path) -> None:
    lines = (repo_root / "README.md").read_text("utf-8").splitlines()
    assert MAIN_JOB in lines
    assert TESTS in lines


def test_extras_named_in_the_documentation_exist(
    repo_root: Path, pyproject: dict[str, Any]
) -> None:
    pages = [*repo_root.glob("*.md"), *(repo_root / "docs").rglob("*.md")]
    text = "\n".join(page.read_text("utf-8") for page in pages)
    groups = re.findall(r"(?:\.|curvature)\[([\w,]+)\]", text)
    named = {extra for group in groups for extra in group.split(",")}
    assert named
    assert named <= pyproject["project"]["optional-dependencies"].keys()


def test_optimizer_table_of_the_readme(repo_root: Path) -> None:
    """One row per registered optimizer, with what it asks and how many copies it keeps."""
    readme = (repo_root / "README.md").read_text("utf-8")
    rows = {
        cells[0].strip("`"): cells[1:]
        for line in readme.splitlines()
        if line.startswith("| `")
        and (cells := [cell.strip() for cell in line.strip("|").split("|")])
    }
    for info in lightning_curvature.list_optimizers():
        asks, _, copies, *_ = rows[info.cls.__name__]
        assert set(re.findall(r"`(\w+)`", asks)) == info.asks
        assert int(copies.split()[0]) == info.copies


@pytest.mark.parametrize("name", PUBLIC_NAMES)
def test_public_name_is_documented(name: str, repo_root: Path) -> None:
    assert getattr(lightning_curvature, name) is not None
    reference = (repo_root / "docs" / "api.md").read_text("utf-8")
    assert re.search(rf"^::: lightning_curvature\.{name}$", reference, flags=re.MULTILINE)


def test_every_page_is_in_the_navigation(repo_root: Path) -> None:
    def pages(entry: Any) -> set[str]:
        if isinstance(entry, str):
            return {entry}
        values = entry.values() if isinstance(entry, dict) else entry
        return set().union(*(pages(value) for value in values))

    config = yaml.safe_load((repo_root / "mkdocs.yml").read_text("utf-8"))
    docs = repo_root / "docs"
    written = {page.relative_to(docs).as_posix() for page in docs.rglob("*.md")}
    assert pages(config["nav"]) == written


def test_import_without_extras_or_side_effects(
    run_python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    """A plain import needs no extra, draws no random number and turns no switch of torch."""
    script = """
import random, sys

import lightning.pytorch.cli, numpy as np, torch, torchmetrics, torchvision

# Only now: some of these import an extra of ours when they find it installed.
for name in ("matplotlib", "sklearn", "tensorboard"):
    sys.modules[name] = None  # importing it raises ModuleNotFoundError

def state():
    return (
        random.getstate(),
        np.random.get_state()[1].tobytes(),
        torch.get_rng_state().tolist(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_grad_enabled(),
    )

before = state()
import lightning_curvature
assert state() == before, "importing the package changed global state"
"""
    done = run_python(["-c", script])
    assert done.returncode == 0, done.stderr
