"""Two processes: what AdamQLR sends beyond DDP's gradients, and its time per step.

**Communication.** Every collective of both processes is intercepted at torch's dispatcher, also
those that DDP starts in C++. What a run with AdamW sends in the same step is subtracted; the rest
belongs to the questions of the optimizer.

**Time.** As in step_time.py: Trainers that take turns after every step, here in both processes in
the same order, compared in cycles of ten steps with AdamW under ``ddp``. The processes wait for
each other before every step, outside of the measured time; a step lasts until the later one is
done. One thread per process.

    python benchmarks/ddp.py
    python benchmarks/ddp.py --workloads mlp --rounds 6 --clock cpu
"""

import argparse
import dataclasses
import json
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import step_time  # before lightning: it switches automatic attachment off

# isort: split
import lightning.pytorch as pl
import torch
import torch.distributed
import torch.multiprocessing
from networks import USUAL, WORKLOADS
from report import (
    Measurement,
    add_common_arguments,
    append_csv,
    markdown_table,
    quiet_trainers,
    verdict,
)
from step_time import CYCLE, RIVAL, Setting, Variant
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_curvature import AdamQLR

RANKS = 2
_GOAL_COLLECTIVES = 2
_GOAL_BYTES = 100
_COUNTED_STEPS = 2 * CYCLE

_DDP, _CURVATURE = "ddp", "ddp_curvature"
VARIANTS = {
    RIVAL: Variant(torch.optim.AdamW, _DDP),
    "AdamW and two bare forwards": Variant(torch.optim.AdamW, _DDP, extra_forwards=2),
    "AdamQLR, everything every step": Variant(
        AdamQLR, _CURVATURE, goal=lambda name: WORKLOADS[name].goal
    ),
    "AdamQLR, both intervals 10": Variant(
        partial(AdamQLR, curvature_update_interval=CYCLE, damping_update_interval=CYCLE), _CURVATURE
    ),
}


@dataclass(frozen=True)
class Found:
    """What one rank measured.

    Attributes:
        sent: Per variant and step, the collectives as (name, bytes).
        seconds: Per workload and variant, the mean seconds per step of every cycle.
    """

    sent: dict[str, list[list[tuple[str, int]]]]
    seconds: dict[str, dict[str, list[float]]]


class Listening(TorchDispatchMode):
    """Hears the collectives of this process."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[tuple[str, int]] = []

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "c10d":
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            self.heard.append((func.name(), sum(x.numel() * x.element_size() for x in tensors)))
        return func(*args, **(kwargs or {}))


class StepListener(pl.Callback):
    """Cuts what is heard into steps.

    Args:
        listening: Hears.

    Attributes:
        steps: What was heard in every step.
    """

    def __init__(self, listening: Listening) -> None:
        self.steps: list[list[tuple[str, int]]] = []
        self._listening = listening

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget what the set-up sent."""
        self._listening.heard = []

    @override
    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """End a step."""
        self.steps.append(self._listening.heard)
        self._listening.heard = []


def listen(variant: Variant, *, seed: int) -> list[list[tuple[str, int]]]:
    """Train a small network and return the collectives of every step.

    Args:
        variant: What to train it with.
        seed: Seed of the data.
    """
    workload = WORKLOADS["conv"]
    with Listening() as listening:
        listener = StepListener(listening)
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=RANKS,
            strategy=variant.strategy,
            max_epochs=1,
            callbacks=[listener],
            use_distributed_sampler=False,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        batches = workload.batches(_COUNTED_STEPS, batch_size=4, seed=seed)
        module = workload.module(variant.make_optimizer)
        trainer.fit(module, DataLoader(batches, batch_size=None))
    return listener.steps


def run_rank(rank: int, folder: str, names: Sequence[str], setting: Setting) -> None:
    """Join the other rank, measure, and write what was found to a file.

    Args:
        rank: Number of this rank.
        folder: For the files.
        names: Workloads to time.
        setting: How to measure.
    """
    # What torchrun would set: Lightning then starts no processes of its own.
    ranks = str(RANKS)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), GROUP_RANK="0")
    os.environ.update(WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks, TORCHELASTIC_RUN_ID="benchmark")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    torch.set_num_threads(setting.threads)
    quiet_trainers()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=RANKS
    )
    own = dataclasses.replace(setting, seed=setting.seed + rank, devices=RANKS)
    found = Found(
        {name: listen(variant, seed=own.seed) for name, variant in VARIANTS.items()},
        {name: step_time.measure(WORKLOADS[name], own, VARIANTS) for name in names},
    )
    Path(folder, f"{rank}.json").write_text(json.dumps(dataclasses.asdict(found)), encoding="utf-8")
    torch.distributed.destroy_process_group()


def beyond(rival: Sequence[Any], own: Sequence[Any]) -> list[tuple[str, int]]:
    """Return the collectives of a step that the rival's step does not have.

    Args:
        rival: Collectives of the rival's step.
        own: Collectives of the step.
    """
    return list((Counter(map(tuple, own)) - Counter(map(tuple, rival))).elements())


def summarize_communication(ranks: Sequence[Found]) -> tuple[str, list[Measurement]]:
    """Return the table of what is sent and its measurements.

    Args:
        ranks: What each rank found.
    """
    rows, measurements = [], []
    for variant in ranks[0].sent:
        if any(other.sent[variant] != ranks[0].sent[variant] for other in ranks):
            raise RuntimeError(f"{variant}: the ranks sent different things.")
        pairs = zip(ranks[0].sent[RIVAL], ranks[0].sent[variant], strict=True)
        first, *steps = [beyond(rival, own) for rival, own in pairs]
        cycle = steps[CYCLE - 1 :][:CYCLE]  # a whole one, whatever the interval
        counts = [len(step) for step in cycle]
        sizes = [sum(size for _, size in step) for step in cycle]
        met = {verdict(max(counts), _GOAL_COLLECTIVES), verdict(max(sizes), _GOAL_BYTES)}
        rows.append(
            [
                variant,
                str(max(counts)),
                str(max(sizes)),
                f"{sum(counts) / CYCLE:.1f}",
                f"{sum(sizes) / CYCLE:.1f}",
                f"{len(first)}, {sum(size for _, size in first)}",
                "FAIL" if "FAIL" in met else "pass",
            ]
        )
        for metric, values, goal in (
            ("collectives", counts, _GOAL_COLLECTIVES),
            ("bytes", sizes, _GOAL_BYTES),
        ):
            measurements.append(
                Measurement(
                    "ddp",
                    "two processes",
                    variant,
                    f"{metric} beyond {RIVAL}'s, most in a step",
                    max(values),
                    goal=goal,
                )
            )
    header = ["optimizer", "collectives, most", "bytes, most", "collectives, mean", "bytes, mean"]
    table = markdown_table([*header, "first step", ""], rows)
    gradient = max(size for _, size in ranks[0].sent[RIVAL][-1])
    note = f"Per step, beyond those of {RIVAL}, whose gradients here are {gradient} bytes; float32."
    return f"{table}\n\n{note}", measurements


def later(ranks: Sequence[Found], workload: str) -> dict[str, list[float]]:
    """Return the seconds per step of the rank that was done later, by variant and cycle.

    Args:
        ranks: What each rank found.
        workload: Name of the workload.
    """
    return {
        variant: [
            max(pair)
            for pair in zip(*(rank.seconds[workload][variant] for rank in ranks), strict=True)
        ]
        for variant in VARIANTS
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark.

    Args:
        argv: Arguments of the command line, None for those of the process.
    """
    parser = argparse.ArgumentParser(
        description="Two processes: what AdamQLR sends beyond DDP's gradients, and its time per "
        "step relative to torch AdamW."
    )
    parser.add_argument(
        "--workloads",
        nargs="*",
        choices=list(WORKLOADS),
        default=USUAL,
        help="what to time (default: all)",
    )
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument(
        "--cycles", type=int, default=6, help="cycles of ten steps per round (default: %(default)s)"
    )
    parser.add_argument(
        "--batch-size", type=int, help="examples per process instead of each workload's own number"
    )
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="wall time, or time of each process on its processor, without waiting, for a machine "
        "shared with others (with one thread)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and data")
    add_common_arguments(parser)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    setting = Setting(
        args.rounds,
        args.cycles,
        batch_size=args.batch_size,
        clock=args.clock,
        seed=args.seed,
        threads=args.threads,
    )
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(run_rank, (folder, args.workloads, setting), nprocs=RANKS)
        ranks = [
            Found(**json.loads(Path(folder, f"{rank}.json").read_text(encoding="utf-8")))
            for rank in range(RANKS)
        ]
    table, measurements = summarize_communication(ranks)
    print(f"\n### Communication\n\n{table}", flush=True)
    for name in args.workloads:
        table, found = step_time.summarize(name, later(ranks, name), VARIANTS, "ddp")
        measurements += found
        print(f"\n### {WORKLOADS[name].description}, in each of two processes\n\n{table}")
    append_csv(args.csv, measurements)


if __name__ == "__main__":
    main()
