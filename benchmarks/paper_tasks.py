"""Tasks of the AdamQLR paper (arXiv:2310.14963), beside the numbers of its official code.

python benchmarks/paper_tasks.py uci_energy --data DIR
python benchmarks/paper_tasks.py uci_protein --data DIR
python benchmarks/paper_tasks.py uci_protein --data DIR --batch 3200
python benchmarks/paper_tasks.py fashion_mnist --data DIR --png curves.png
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import fashion_mnist
import torch
import uci_regression
from report import add_common_arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Run a task.

    Args:
        argv: Arguments of the command line, None for those of the process.
    """
    parser = argparse.ArgumentParser(
        description="Tasks of the AdamQLR paper (arXiv:2310.14963), beside the numbers of its "
        "official code."
    )
    tasks = parser.add_subparsers(dest="task", required=True)
    for name, task in uci_regression.TASKS.items():
        parts = tasks.add_parser(name, help=f"UCI {task.file} regression")
        _add_shared(parts)
        uci_regression.add_arguments(parts, task)
    parts = tasks.add_parser("fashion_mnist", help="AdamQLR against AdamW in the same time")
    _add_shared(parts)
    fashion_mnist.add_arguments(parts)
    args = parser.parse_args(argv)

    torch.set_num_threads(args.threads)
    try:
        if args.task == "fashion_mnist":
            fashion_mnist.run(args)
        else:
            uci_regression.run(args.task, args)
    except FileNotFoundError as error:
        parser.error(str(error))


def _add_shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="folder that holds the data sets"
    )
    add_common_arguments(parser)


if __name__ == "__main__":
    main()
