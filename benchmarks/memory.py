"""Peak memory of training in a Trainer with AdamQLR, beside torch AdamW.

On the CPU every allocation of torch's allocator is recorded by its profiler, from before the model
is built, and the running sum gives the peak; scratch memory inside library calls (oneDNN, MKL) and
Python's own is not seen. On CUDA it is the peak that the caching allocator reports. Both count
bytes asked for by tensors, so they do not depend on the machine's load, and differ little from run
to run.

    python benchmarks/memory.py
    python benchmarks/memory.py --suite zeroth
    python benchmarks/memory.py --workloads mlp transformer --device cuda
"""

import argparse
import gc
import os
from collections.abc import Callable, Sequence
from functools import partial

# AdamW's Trainer must be a stock one.
os.environ["LIGHTNING_CURVATURE_AUTO_ATTACH"] = "0"
# The profiler's own log would fill the terminal.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

import lightning.pytorch as pl
import torch
from networks import WORKLOADS, OptimizerFactory, Workload
from report import Measurement, add_common_arguments, append_csv, markdown_table, quiet_trainers
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from lightning_curvature import AdamQLR, HiZOO, HiZOOL, MeZO, ZOAdam, ZOMomentum

RIVAL = "AdamW"
_MIB = 2**20

Variants = dict[str, tuple[OptimizerFactory, str]]

VARIANTS: Variants = {
    RIVAL: (torch.optim.AdamW, "auto"),
    "AdamW, foreach=True": (partial(torch.optim.AdamW, foreach=True), "auto"),
    "AdamQLR": (AdamQLR, "single_device_curvature"),
    "AdamQLR, foreach=False": (partial(AdamQLR, foreach=False), "single_device_curvature"),
    "AdamQLR, both intervals 10": (
        partial(AdamQLR, curvature_update_interval=10, damping_update_interval=10),
        "single_device_curvature",
    ),
}


def _without_backward() -> Variants:
    strategy = "single_device_curvature"
    return {
        RIVAL: (torch.optim.AdamW, "auto"),
        "SGD": (partial(torch.optim.SGD, lr=1e-3), "auto"),
        "MeZO": (MeZO, strategy),
        "MeZO, snapshot": (partial(MeZO, restore="snapshot"), strategy),
        "HiZOO": (HiZOO, strategy),
        "HiZOOL": (HiZOOL, strategy),
        "ZOMomentum": (ZOMomentum, strategy),
        "ZOAdam": (ZOAdam, strategy),
    }


SUITES: dict[str, tuple[Variants, list[str]]] = {
    "qlr": (VARIANTS, ["transformer"]),
    "zeroth": (_without_backward(), ["transformer20m"]),
}


def peak_memory(
    workload: Workload,
    variant: tuple[OptimizerFactory, str],
    *,
    steps: int,
    batch_size: int | None,
    device: str,
    seed: int,
) -> tuple[int, int]:
    """Train for some steps and return the peak and what the model's parameters take, in bytes.

    Args:
        workload: What to train.
        variant: What to train it with: the optimizer and the strategy.
        steps: Number of optimizer steps; the state exists after the first.
        batch_size: Examples per batch, None for the workload's own number.
        device: "cpu" or "cuda".
        seed: Seed of weights and data.
    """
    make_optimizer, strategy = variant
    parameters = 0

    def train() -> None:
        nonlocal parameters
        trainer = pl.Trainer(
            accelerator="gpu" if device == "cuda" else "cpu",
            devices=1,
            strategy=strategy,
            max_steps=steps,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        module = workload.module(make_optimizer, seed=seed)
        parameters = sum(p.numel() * p.element_size() for p in module.parameters())
        batches = workload.batches(1, batch_size=batch_size, seed=seed) * steps
        trainer.fit(module, DataLoader(batches, batch_size=None))

    gc.collect()
    return (_cuda_peak if device == "cuda" else _cpu_peak)(train), parameters


def _cuda_peak(train: Callable[[], None]) -> int:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    train()
    return torch.cuda.max_memory_allocated() - before


def _cpu_peak(train: Callable[[], None]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        train()
    results = recorded.profiler.kineto_results
    changes = [event for event in results.events() if event.name() == "[memory]"]
    if not changes:
        raise RuntimeError("The profiler of this torch version records no allocations.")
    present = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        present += event.nbytes()
        peak = max(peak, present)
    return peak


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark.

    Args:
        argv: Arguments of the command line, None for those of the process.
    """
    parser = argparse.ArgumentParser(
        description="Peak memory of training with AdamQLR, beside torch AdamW."
    )
    parser.add_argument(
        "--workloads",
        nargs="+",
        choices=list(WORKLOADS),
        help="what to train (default: those of the suite)",
    )
    parser.add_argument(
        "--suite",
        choices=list(SUITES),
        default="qlr",
        help="what to train with: AdamQLR, or what needs no backward (default: %(default)s)",
    )
    parser.add_argument("--steps", type=int, default=4, help="default: %(default)s")
    parser.add_argument(
        "--batch-size", type=int, help="examples per batch instead of each workload's own number"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and data")
    add_common_arguments(parser)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    quiet_trainers()

    measurements = []
    variants, usual = SUITES[args.suite]
    for name in args.workloads or usual:
        workload = WORKLOADS[name]
        rows = []
        rival = 0
        # The first run also pays for what is built only once.
        for variant in (RIVAL, *variants):
            peak, parameters = peak_memory(
                workload,
                variants[variant],
                steps=args.steps,
                batch_size=args.batch_size,
                device=args.device,
                seed=args.seed,
            )
            if not rival:
                rival = peak
                continue
            rival = peak if variant == RIVAL else rival
            rows.append(
                [
                    variant,
                    f"{peak / _MIB:.2f}",
                    f"{peak / parameters:.1f}",
                    f"{peak / rival:.3f}",
                ]
            )
            measurements.append(
                Measurement(
                    "memory",
                    workload.description,
                    variant,
                    "peak bytes",
                    peak,
                    RIVAL,
                    peak / rival,
                )
            )
        header = ["optimizer", "peak, MiB", "in copies of the parameters", f"ratio to {RIVAL}"]
        method = "caching allocator" if args.device == "cuda" else "allocations in torch.profiler"
        print(
            f"\n### {workload.description}: parameters {parameters / _MIB:.2f} MiB, peak by "
            f"{method}\n\n{markdown_table(header, rows)}",
            flush=True,
        )
    append_csv(args.csv, measurements, device=args.device)


if __name__ == "__main__":
    main()
