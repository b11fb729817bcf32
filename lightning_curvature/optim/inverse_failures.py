"""InverseFailures: counts decompositions that failed, and names their layers once."""

import warnings
from collections import Counter

__all__ = ["InverseFailures"]


class InverseFailures:
    """Counts failed decompositions.

    Args:
        name: Name of the optimizer, for messages.

    Attributes:
        failed: How often the inverse of a block could not be computed, by name of the block.
        retries: Decompositions that were repeated in float64, in all.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.failed: Counter[str] = Counter()
        self.retries = 0

    def add(self, failed: list[str], retries: int) -> None:
        """Count those of one refresh; warn of a block the first time.

        Args:
            failed: Names of the blocks without a new inverse.
            retries: Repeated decompositions.
        """
        new = [block for block in failed if block not in self.failed]
        self.failed.update(failed)
        self.retries += retries
        if new:
            warnings.warn(
                f"{self.name} could not invert the factors of {', '.join(new)}, not even in "
                "float64 with a multiple of the identity added; the last good inverse stays in "
                "use, and without one the layer does not move. Look for NaN or infinite "
                "activations, or raise min_damping. stats['inverse_failures'] goes on counting.",
                RuntimeWarning,
                stacklevel=6,
            )

    def counts(self) -> dict[str, int]:
        """Return the counts by their names in the statistics."""
        return {"inverse_failures": self.failed.total(), "inverse_retries": self.retries}
