"""Lightning's way in: it asks this module for callbacks whenever a Trainer is built.

With the callback a stock ``Trainer(strategy="ddp")`` and a ``configure_optimizers`` that returns a
curvature optimizer need no further line. LIGHTNING_CURVATURE_AUTO_ATTACH=0 turns it off.

A module of its own, outside the package: every Trainer of the environment comes here, so loading it
must cost nothing and must not fail, not even if the package itself cannot be imported.
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
        from lightning_curvature.callbacks.auto_attach import AutoAttachCallback

        return [AutoAttachCallback()]
    except Exception:  # a broken plugin must not break training without it
        _log.warning("lightning_curvature could not prepare to attach by itself.", exc_info=True)
        return []
