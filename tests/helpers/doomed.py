"""Script: fits on two ranks of which one is killed, fails, or hangs in the middle of a step.

Called as ``python doomed.py TIMEOUT SCENARIO...``; a scenario is
``LAUNCHER:OPTIMIZER:HOW:WHERE:RANK``, for instance ``apart:adamqlr:kill:loss:1``.

- LAUNCHER: "apart" (two processes that nobody watches, as on two machines), "fork" (Lightning's
  launcher with that start method), "popen" (Lightning's usual one, where this process is rank 0;
  only as the one scenario);
- HOW: "kill" (SIGKILL), "exit" (`os._exit`), "raise", "stall" (sleeps for twice the timeout),
  "interrupt" (Ctrl+C), "none" (``training_step`` returns None), "nothing";
- WHERE: "main" (forward of the main pass), "directional", "loss" (first and second extra pass, of
  K-FAC those for its two directions),
  "between" (before the answers of the first extra pass are averaged).

Optimizers without extra passes meet their fate in the main pass. A line of JSON per scenario goes
to ``outcomes.jsonl``.
"""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_curvature as lc

FATAL_BATCH = 2
BATCHES = 5


class Doomed(LightningModule):
    """A small network with a fate.

    Args:
        optimizer: Name of the optimizer.
        how: See the docstring of this file.
        where: See there.
        rank: Rank that it happens to.
        stall: Seconds to sleep.
    """

    def __init__(self, optimizer: str, how: str, where: str, rank: int, stall: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4))
        self.info = lc.get_optimizer_info(optimizer)
        self.how, self.rank, self.stall = how, rank, stall
        self.where = where if "directional" in self.info.asks else "main"
        self.batch_idx = -1
        self.extra = 0

    def meet(self, where: str) -> None:
        """Meet the fate if this is the place."""
        at = self.where == where and self.batch_idx == FATAL_BATCH
        if not at or self.how == "nothing" or self.trainer.global_rank != self.rank:
            return
        Path("fault").write_text(str(time.time()))
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.how == "exit":
            os._exit(3)
        elif self.how == "raise":
            raise KeyError("doomed")
        elif self.how == "interrupt":
            raise KeyboardInterrupt
        elif self.how == "stall":
            time.sleep(self.stall)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Return the loss, or not."""
        if lc.in_extra_pass():
            self.extra += 1
        else:
            self.batch_idx, self.extra = batch_idx, 0
        logits = self.network(batch[0])
        self.meet(["main", "directional", "loss"][min(self.extra, 2)])
        if (
            self.how == "none"
            and batch_idx == FATAL_BATCH
            and self.trainer.global_rank == self.rank
        ):
            return None
        return F.cross_entropy(logits, batch[1])

    def on_train_start(self) -> None:
        """Stand before every average over the ranks."""
        all_reduce = torch.distributed.all_reduce

        def watched(*args: Any, **kwargs: Any) -> Any:
            if self.extra:
                self.meet("between")
            return all_reduce(*args, **kwargs)

        torch.distributed.all_reduce = watched

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make the optimizer."""
        return self.info.cls(self.parameters())


def fit(scenario: str, timeout: float) -> dict[str, Any]:
    """Fit once and return how it ended for this process."""
    launcher, optimizer, how, where, rank = scenario.split(":")
    torch.manual_seed(1)
    data = TensorDataset(torch.randn(8 * BATCHES, 5), torch.randint(4, (8 * BATCHES,)))
    module = Doomed(optimizer, how, where, int(rank), 2 * timeout)
    start = {} if launcher == "apart" else {"start_method": launcher}
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=lc.DDPCurvatureStrategy(timeout=timedelta(seconds=timeout), **start),
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    error: BaseException | None = None
    try:
        trainer.fit(module, DataLoader(data, batch_size=4))
    except BaseException as caught:
        error = caught
        traceback.print_exc()
    return {
        "error": error if error is None else type(error).__name__,
        "message": str(error),
        "finite": all(bool(p.isfinite().all()) for p in module.parameters()),
        "seconds": since_fault(),
    }


def since_fault() -> float | None:
    """Return the seconds since the fault, None if there was none."""
    fault = Path("fault")
    return time.time() - float(fault.read_text()) if fault.exists() else None


def fit_apart(scenario: str, timeout: float, rank: int, port: int) -> None:
    """Fit as one of two ranks; write down how it ended and set the exit status."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        GROUP_RANK="0",
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="doomed",
    )
    outcome = fit(scenario, timeout)
    Path(f"rank{rank}").write_text(json.dumps(outcome))
    # Not through the clean-up of the parent that was forked with the rest.
    os._exit(outcome["error"] is not None)


def run_apart(scenario: str, timeout: float) -> list[dict[str, Any]]:
    """Start two ranks, wait for both, and return how each ended."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=fit_apart, args=(scenario, timeout, rank, port)) for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    deadline = time.time() + 10 * timeout
    ends = []
    for rank, process in enumerate(processes):
        process.join(max(deadline - time.time(), 0.1))
        if process.exitcode is None:
            process.kill()
            process.join()
        path = Path(f"rank{rank}")
        said = json.loads(path.read_text()) if path.exists() else {"error": None}
        ends.append({**said, "code": process.exitcode})
    return ends


def run(scenario: str, timeout: float) -> dict[str, Any]:
    """Run a scenario and return how it ended."""
    for name in ("fault", "rank0", "rank1"):
        Path(name).unlink(missing_ok=True)
    if scenario.startswith("apart:"):
        ends = run_apart(scenario, timeout)
    else:
        ends = [fit(scenario, timeout)]
    children = len(multiprocessing.active_children())
    return {"scenario": scenario, "ends": ends, "seconds": since_fault(), "children": children}


def main(timeout: str, *scenarios: str) -> None:
    """Run the scenarios; end with status 1 if a fit of this process failed."""
    torch.set_num_threads(1)
    failed = False
    for scenario in scenarios:
        outcome = run(scenario, float(timeout))
        failed |= any(end["error"] is not None for end in outcome["ends"])
        if os.environ.get("LOCAL_RANK", "0") == "0":
            with Path("outcomes.jsonl").open("a") as file:
                file.write(json.dumps(outcome) + "\n")
    sys.exit(failed)


if __name__ == "__main__":
    main(*sys.argv[1:])
