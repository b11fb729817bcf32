"""Attaches by itself: Lightning asks this module for callbacks whenever a Trainer is built.

With it a stock ``Trainer(strategy="ddp")`` and ``configure_optimizers`` returning a curvature
optimizer need no further line. The environment variable LIGHTNING_CURVATURE_AUTO_ATTACH=0 turns it
off.
"""

import logging
import os
from typing import Any

__all__ = ["VARIABLE", "auto_attach_callbacks"]

VARIABLE = "LIGHTNING_CURVATURE_AUTO_ATTACH"

_log = logging.getLogger(__name__)


def auto_attach_callbacks() -> list[Any]:
    """Return the callback for a new Trainer; an empty list when switched off. Never raises."""
    if os.environ.get(VARIABLE, "1").strip().lower() in ("0", "false", "off", "no"):
        return []
    try:
        # Every Trainer of the environment comes here: nothing heavy at the top of this file.
        from lightning_curvature.callbacks.auto_attach_callback import AutoAttachCallback

        return [AutoAttachCallback()]
    except Exception:  # a broken plugin must not break training without it
        _log.warning("lightning_curvature could not prepare to attach by itself.", exc_info=True)
        return []
