"""Console script `lightning-curvature`: LightningCLI with the names of this package known.

Nothing is added but the import, so that ``--optimizer AdamQLR``,
``--trainer.strategy single_device_curvature`` and ``--trainer.callbacks+=CurvatureCallback`` work
without a Python file, and two options, ``--test_after_fit`` and ``--num_threads``.
"""

import os
import sys
from typing import Any

import torch
from jsonargparse.typing import PositiveInt
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.model_helpers import is_overridden
from typing_extensions import override

# Imported for its effect: jsonargparse resolves a bare class name among the classes already
# loaded, and the strategy names are registered by the import.
import lightning_curvature  # noqa: F401

__all__ = ["CurvatureCLI", "main"]

_PROG = "lightning-curvature"


class CurvatureCLI(LightningCLI):
    """LightningCLI for any module and data module, given by import path.

    Running the same command twice in one folder works: where LightningCLI refuses to overwrite
    the ``config.yaml`` of the previous run, this one replaces it (a logger that numbers its
    versions starts a new folder anyway).

    Args:
        *args: As for LightningCLI.
        **kwargs: As for LightningCLI.

    Examples:
        ```console
        $ lightning-curvature fit --model my.Net --data my.Data --optimizer AdamQLR
        ```
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        save_config_kwargs = kwargs.get("save_config_kwargs") or {}
        kwargs["save_config_kwargs"] = {"overwrite": True, **save_config_kwargs}
        super().__init__(*args, **kwargs)

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the two options to every subcommand: all of them read the same files."""
        parser.add_argument(
            "--test_after_fit",
            type=bool,
            default=False,
            help="Whether `fit` ends with `trainer.test` of the weights it ended with.",
        )
        parser.add_argument(
            "--num_threads",
            type=PositiveInt | None,
            default=None,
            help="CPU threads of torch; by default as many as torch chooses. One is often the "
            "fastest for small models.",
        )

    @override
    def before_instantiate_classes(self) -> None:
        """Set the number of threads before anything is computed."""
        num_threads = self._get(self.config, "num_threads")
        if num_threads is not None:
            torch.set_num_threads(num_threads)

    def before_fit(self) -> None:
        """Say what is missing where the Trainer would only name a method."""
        if not is_overridden("configure_optimizers", self.model):
            self._parser("fit").error(
                f"{type(self.model).__name__} has no optimizer. Choose one, for example "
                "`--optimizer AdamQLR`, or define `configure_optimizers` in the module."
            )

    def after_fit(self) -> None:
        """Test the trained model if asked to."""
        if self._get(self.config_init, "test_after_fit"):
            self.trainer.test(self.model, datamodule=self.datamodule)


def main(args: ArgsType = None) -> None:
    """Run the command line.

    Args:
        args: Arguments instead of those of the process.
    """
    # A console script has its own folder on the path, not the user's: `--model my.Net` looks for
    # my.py where the command is given, as `python -m` does.
    if not getattr(sys.flags, "safe_path", False) and not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    CurvatureCLI(args=args, parser_kwargs={"prog": _PROG})
