"""Arrows between the rooms of the package point down only (see ``docs/concepts/index.md``)."""

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PACKAGE = "lightning_curvature"

# Room -> layer. A room may import its own layer and those below.
LAYERS = {
    "__about__": 0,
    "checks": 0,
    "vectors": 0,
    "oracle": 0,
    "curvature": 1,
    "optim": 2,
    "pruning": 2,
    "influence": 2,
    "registry": 2,
    "strategies": 3,
    "callbacks": 3,
    "__init__": 4,  # the public names; cli and demos use them like anybody else
    "demos": 5,
    "cli": 5,
    "__main__": 5,
}
HIGHEST_WITHOUT_LIGHTNING = 2
# What layers 0-2 may import besides the standard library.
CORE_DEPENDENCIES = {"torch", "numpy", "typing_extensions"}


def package_root() -> Path:
    """Find the package without importing it."""
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations)))


ROOT = package_root()
FILES = sorted(ROOT.rglob("*.py"))


def room(module: str) -> str:
    """Return the room of a dotted module name below the package."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def module_name(path: Path, root: Path = ROOT) -> str:
    parts = [PACKAGE, *path.relative_to(root).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


def imported_modules(source: str, module: str, *, is_package: bool = False) -> Iterator[str]:
    """Yield the absolute name of every module that the source imports, wherever it does so."""
    parents = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level + 1] if node.level else []
            target = ".".join([*base, *([node.module] if node.module else [])])
            if target == PACKAGE:  # `from lightning_curvature import optim` imports a room
                yield from (f"{target}.{alias.name}" for alias in node.names)
            else:
                yield target
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in {"__import__", "import_module", "importlib.import_module"}
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield str(node.args[0].value)


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """List what is wrong with the imports of one file."""
    own = LAYERS[room(module)]
    found = []
    for target in imported_modules(source, module, is_package=is_package):
        top = target.split(".")[0]
        if top == PACKAGE:
            other = room(target)
            # A public name taken from the top of the package counts as the top of the package.
            layer = LAYERS.get(other, LAYERS["__init__"])
            if layer > own:
                found.append(f"{module} (layer {own}) imports {target} (layer {layer})")
        elif (
            own <= HIGHEST_WITHOUT_LIGHTNING
            and top not in CORE_DEPENDENCIES
            and top not in sys.stdlib_module_names
        ):
            found.append(f"{module} (layer {own}) imports {target}")
    return found


def test_every_room_has_a_layer() -> None:
    """A new room must be placed in ``LAYERS``."""
    assert FILES
    assert {room(module_name(path)) for path in FILES} <= LAYERS.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_down(path: Path) -> None:
    is_package = path.name == "__init__.py"
    assert violations(path.read_text("utf-8"), module_name(path), is_package=is_package) == []


@pytest.mark.parametrize(
    ("module", "source", "allowed"),
    [
        ("oracle.window", "import torch\nimport lightning", False),
        ("oracle.window", "from lightning.pytorch import Trainer", False),
        ("optim.base", "from pytorch_lightning import Trainer", False),
        ("optim.base", "if True:\n    import torchmetrics", False),
        ("optim.base", "import importlib\nimportlib.import_module('lightning')", False),
        ("optim.base", "from ..strategies import recorder", False),
        ("optim.base", "from lightning_curvature import callbacks", False),
        ("optim.base", "from lightning_curvature import CurvatureCallback", False),
        ("curvature.damping", "from lightning_curvature.optim.base import x", False),
        ("callbacks.monitor", "from lightning_curvature.cli import main", False),
        ("optim.base", "import math\nfrom torch import nn\nfrom ..oracle import x", True),
        ("optim.base", "from .. import checks", True),
        ("optim.base", "from lightning_curvature.curvature import damping", True),
        ("callbacks.monitor", "from lightning.pytorch import Callback", True),
        ("cli", "import lightning_curvature", True),
        ("__init__", "from lightning_curvature.cli import main", False),
        ("callbacks.monitor", "from lightning_curvature.strategies.recorder import x", True),
    ],
)
def test_the_rule_itself(module: str, source: str, allowed: bool) -> None:
    """The checker finds what it is meant to find."""
    assert (violations(source, f"{PACKAGE}.{module}") == []) is allowed


def test_core_runs_without_lightning(
    run_python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    """Layers 0-2 import, and train, where neither Lightning nor torchmetrics can be imported.

    The package's own ``__init__`` imports the strategies, so an empty module stands in for it.
    """
    script = f"""
import sys, types

for name in ("lightning", "pytorch_lightning", "torchmetrics", "torchvision"):
    sys.modules[name] = None  # importing it raises ModuleNotFoundError
package = types.ModuleType({PACKAGE!r})
package.__path__ = [{str(ROOT)!r}]
sys.modules[{PACKAGE!r}] = package

import torch
import {PACKAGE}.curvature, {PACKAGE}.oracle, {PACKAGE}.registry
from {PACKAGE}.optim import AdamQLR

model = torch.nn.Linear(3, 2)
optimizer = AdamQLR(model.parameters())
criterion = optimizer.attach_model(model, torch.nn.functional.cross_entropy)
x, y = torch.randn(8, 3), torch.randint(0, 2, (8,))
for _ in range(3):
    optimizer.zero_grad()
    loss = criterion(model(x), y)
    loss.backward()
    optimizer.step()
print("steps taken")
"""
    done = run_python(["-c", script])
    assert done.returncode == 0, done.stderr
    assert "steps taken" in done.stdout
