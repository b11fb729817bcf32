"""Runs Python programs in processes that have imported torch and Lightning already.

Importing those two takes seconds, and many programs of users take far less besides. So one process
imports them, and forks for each program; the copy has a fresh ``__main__``, its own environment,
directory and streams, and has imported nothing of this package.

As a script this file is that process: it reads one request per line and answers with exit codes.
"""

import contextlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# What every program of a user of Lightning imports anyway.
PRELOADED = ("lightning.pytorch.cli", "torchmetrics.classification", "torch.utils.data")


class WarmPython:
    """Starts programs; the process behind it starts when first needed."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        self._answers: dict[int, int] = {}
        self._answered = threading.Condition()
        self._count = 0

    def run(
        self,
        args: Sequence[str | os.PathLike[str]],
        *,
        cwd: Path,
        env: Mapping[str, str],
        timeout: float,
    ) -> subprocess.CompletedProcess[str]:
        """Run ``python`` with arguments and return the finished process; for any thread.

        Args:
            args: Options of the interpreter, a program and its arguments; the options are "-m" and
                "-W" only.
            cwd: Directory to run in.
            env: Its whole environment.
            timeout: Seconds that it may take.
        """
        command = [os.fspath(arg) for arg in args]
        with tempfile.TemporaryDirectory(prefix="warm-") as folder:
            files = [Path(folder, name) for name in ("stdout", "stderr")]
            number = self._send(
                {"args": command, "cwd": str(cwd), "env": dict(env), "files": list(map(str, files))}
            )
            with self._answered:
                if not self._answered.wait_for(lambda: number in self._answers, timeout):
                    raise subprocess.TimeoutExpired(command, timeout)
                code = self._answers.pop(number)
            stdout, stderr = (file.read_text(encoding="utf-8") for file in files)
        return subprocess.CompletedProcess(command, code, stdout, stderr)

    def _send(self, request: dict[str, Any]) -> int:
        with self._lock:
            if self._server is None:
                # Nothing of the checkout on the path, so that nothing of it can be imported.
                environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
                self._server = subprocess.Popen(
                    [sys.executable, __file__],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env=environment,
                    cwd=tempfile.gettempdir(),
                )
                self._listener = threading.Thread(target=self._listen, args=(self._server,))
                self._listener.daemon = True
                self._listener.start()
            self._count += 1
            assert self._server.stdin is not None
            self._server.stdin.write(json.dumps({**request, "number": self._count}) + "\n")
            self._server.stdin.flush()
            return self._count

    def _listen(self, server: "subprocess.Popen[str]") -> None:
        assert server.stdout is not None
        for line in server.stdout:
            number, code = map(int, line.split())
            with self._answered:
                self._answers[number] = code
                self._answered.notify_all()

    def close(self) -> None:
        """End the process, when the programs have ended."""
        if self._server is not None:
            assert self._server.stdin is not None
            assert self._server.stdout is not None
            self._server.stdin.close()
            self._server.wait()
            self._listener.join()
            self._server.stdout.close()
            self._server = None


def _serve() -> "dict[str, Any] | None":
    """Fork for every request; return it in the copy, None when there are no more."""
    running: dict[int, int] = {}

    def reap(options: int) -> None:
        while running:
            pid, status = os.waitpid(-1, options)
            if pid == 0:
                return
            code = os.waitstatus_to_exitcode(status)
            os.write(1, f"{running.pop(pid)} {code}\n".encode())

    import select

    while True:
        readable, _, _ = select.select([0], [], [], 0.02 if running else None)
        reap(os.WNOHANG)
        if not readable:
            continue
        line = _read_line()
        if not line:
            reap(0)
            return None
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            return dict(request)
        running[pid] = request["number"]


def _read_line() -> bytes:
    """Read up to the end of the line and no further, for `select` to see what follows."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            return b""
        line += byte
    return line


def _become(request: dict[str, Any]) -> None:
    """Turn this process into the program of a request."""
    import warnings

    for number, file in enumerate([os.devnull, *request["files"]]):
        flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        os.dup2(os.open(file, flags), number)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    args = list(request["args"])
    paths = [path for path in request["env"].get("PYTHONPATH", "").split(os.pathsep) if path]
    while args[0] == "-W":
        action, message, category, *_ = [*args[1].split(":"), "", ""]
        kind = getattr(__builtins__, category, Warning) if category else Warning
        warnings.filterwarnings(action, message, kind)  # type: ignore[arg-type]
        args = args[2:]
    as_module = args[0] == "-m"
    program = args[1] if as_module else args[0]
    sys.argv = args[1:] if as_module else args
    first = os.getcwd() if as_module else str(Path(program).resolve().parent)
    sys.path[:1] = [first, *paths]
    del sys.modules["__main__"]
    if as_module:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    with contextlib.suppress(ImportError):
        for _name in PRELOADED:
            __import__(_name)
    _request = _serve()
    if _request is not None:
        _become(_request)
