"""Every Python example of the README runs as it stands, and so does every command on it.

Those of some pages of the documentation do, too.
"""

import re
import runpy
import shlex
import subprocess
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("docs/how-to/mfac.md", "docs/how-to/pruning.md", "docs/how-to/zeroth-order.md")
# ```python or ```bash blocks, in tabs too; a first line `# name.py` gives the file its name.
BLOCK = re.compile(r"^( *)```(python|bash)\n(.*?)^\1```$", flags=re.MULTILINE | re.DOTALL)
FILE_NAME = re.compile(r"# (\w+\.py)\n")


class Example(NamedTuple):
    """One Python block and the ``python name.py ...`` command lines that follow it."""

    source: str
    name: str
    commands: tuple[str, ...]


def examples(markdown: str) -> list[Example]:
    """Collect the Python blocks, each with the commands that are about its file."""
    found: list[Example] = []
    for _, language, text in BLOCK.findall(markdown):
        body = textwrap.dedent(text)
        if language == "python":
            name = FILE_NAME.match(body)
            found.append(Example(body, name[1] if name else f"example_{len(found)}.py", ()))
        elif found:
            last = found[-1]
            lines = body.replace("\\\n", " ").splitlines()
            commands = [line for line in lines if line.startswith(f"python {last.name} ")]
            found[-1] = last._replace(commands=(*last.commands, *commands))
    return found


EXAMPLES = examples((ROOT / "README.md").read_text("utf-8"))
SCRIPTS = [example for example in EXAMPLES if not example.commands]
OF_PAGES = [
    pytest.param(example, id=f"{Path(page).stem}-{example.name}")
    for page in PAGES
    for example in examples((ROOT / page).read_text("utf-8"))
]
COMMANDS = [(example, command) for example in EXAMPLES for command in example.commands]


def test_collection() -> None:
    """A file's commands belong to it; other commands are left alone."""
    markdown = (
        "```python\nx = 1\n```\n```bash\npip install .\n```\n"
        "    ```python\n    # train.py\n    y = 2\n    ```\n"
        "```bash\npython train.py fit \\\n  --a 1\nls\n```\n"
    )
    assert examples(markdown) == [
        Example("x = 1\n", "example_0.py", ()),
        Example("# train.py\ny = 2\n", "train.py", ("python train.py fit    --a 1",)),
    ]
    assert len(SCRIPTS) >= 2
    assert COMMANDS


@pytest.mark.parametrize(
    "example", [*(pytest.param(script, id=script.name) for script in SCRIPTS), *OF_PAGES]
)
def test_script(example: Example, tmp_path: Path) -> None:
    path = tmp_path / example.name
    path.write_text(example.source, "utf-8")
    runpy.run_path(str(path), run_name="__main__")


@pytest.mark.parametrize(("example", "command"), COMMANDS)
def test_command(
    example: Example,
    command: str,
    tmp_path: Path,
    run_python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    (tmp_path / example.name).write_text(example.source, "utf-8")
    done = run_python(shlex.split(command)[1:])
    assert done.returncode == 0, done.stderr
