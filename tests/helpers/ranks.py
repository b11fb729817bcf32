"""Two processes with a gloo group that run functions for the tests.

Starting a process that imports torch and Lightning costs seconds, a fit of a few batches costs a
fraction of one. So the processes live as long as the session and run one function after the other.
A Trainer in them finds the environment that ``torchrun`` would make, and the group initialized.
"""

import datetime
import logging
import multiprocessing
import multiprocessing.connection
import os
import pickle
import shutil
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

WORLD_SIZE = 2
# After one rank has failed, the others are given this long to end by themselves.
GRACE = 10.0
# Seconds for the processes to start, on a busy machine.
STARTING = 240.0


def world() -> tuple[int, int]:
    """Return rank and number of ranks, ``(0, 1)`` outside of a group."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@dataclass
class _Reply:
    """What a rank answers: a value, or a traceback."""

    value: Any = None
    error: str | None = None


@dataclass
class _Rank:
    process: BaseProcess
    connection: Connection


class RankPool:
    """Runs functions on two ranks at once; the processes start when first needed.

    Args:
        world_size: Number of ranks.
    """

    def __init__(self, world_size: int = WORLD_SIZE) -> None:
        self.world_size = world_size
        self._ranks: list[_Rank] = []
        self._folder: Path | None = None

    def run(
        self, function: Callable[..., Any], *args: Any, timeout: float = 60.0, **kwargs: Any
    ) -> list[Any]:
        """Call a function on every rank and return what each returned, in order of the ranks.

        Args:
            function: A function at the top level of an importable module.
            *args: Its arguments; they are pickled.
            timeout: Seconds after which the ranks are taken to hang.
            **kwargs: Its keyword arguments.

        Raises:
            AssertionError: If a rank raised, died, or did not return in time.
        """
        if not self._ranks:
            self._start()
            self._call(STARTING, _nothing, (), {})
        return self._call(timeout, function, args, kwargs)

    def _call(self, timeout: float, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        for rank in self._ranks:
            # Not `send`, which would share the memory of tensors instead of copying it.
            rank.connection.send_bytes(pickle.dumps((function, args, kwargs)))
        replies = self._collect(time.monotonic() + timeout)
        problems = [
            f"rank {number}: {reply.error if reply is not None else 'no answer'}"
            for number, reply in enumerate(replies)
            if reply is None or reply.error is not None
        ]
        if problems:
            self.close()  # their group may be out of step
            raise AssertionError("\n".join(problems))
        return [reply.value for reply in replies if reply is not None]

    def _collect(self, deadline: float) -> list[_Reply | None]:
        replies: list[_Reply | None] = [None] * self.world_size
        while time.monotonic() < deadline and None in replies:
            waiting = {
                rank.connection: number
                for number, rank in enumerate(self._ranks)
                if replies[number] is None
            }
            remaining = max(deadline - time.monotonic(), 0.0)
            for connection in multiprocessing.connection.wait(list(waiting), remaining):
                assert isinstance(connection, Connection)
                number = waiting[connection]
                try:
                    reply = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionError):
                    self._ranks[number].process.join(1.0)
                    code = self._ranks[number].process.exitcode
                    reply = _Reply(error=f"died with exit code {code}")
                replies[number] = reply
                if reply.error is not None:
                    deadline = min(deadline, time.monotonic() + GRACE)
        return replies

    def _start(self) -> None:
        # Not "fork": the test process has threads and locks of torch.
        context = multiprocessing.get_context("spawn")
        self._folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        for number in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(number, self.world_size, self._folder, theirs),
                daemon=True,
            )
            process.start()
            theirs.close()
            self._ranks.append(_Rank(process, ours))

    def close(self) -> None:
        """End the processes."""
        for rank in self._ranks:
            rank.connection.close()
            rank.process.kill()
            rank.process.join()
        self._ranks = []
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


def _serve(rank: int, world_size: int, folder: Path, connection: Connection) -> None:
    """Join the group and answer calls until the other side goes away."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        GROUP_RANK="0",
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="0",
        # By this variable Lightning knows that the processes were started for it.
        TORCHELASTIC_RUN_ID="tests",
    )
    import torch
    import torch.distributed as dist

    # Lightning would announce every Trainer.
    logging.getLogger("lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    own = folder / str(rank)
    own.mkdir()
    os.chdir(own)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/group",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=120),
    )
    while True:
        try:
            call = connection.recv_bytes()
        except EOFError:
            return
        connection.send_bytes(_answer(call))


def _nothing() -> None:
    """Wait until the process is there."""


def _answer(call: bytes) -> bytes:
    import torch

    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", RuntimeWarning)  # what the library warns with
            function, args, kwargs = pickle.loads(call)
            return pickle.dumps(_Reply(function(*args, **kwargs)))
    except BaseException:
        return pickle.dumps(_Reply(error=traceback.format_exc()))
    finally:
        torch.set_default_dtype(dtype)
