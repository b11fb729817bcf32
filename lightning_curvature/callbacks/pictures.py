"""What all pictures of callbacks share: matplotlib is there, the file is written."""

import io
import os
from typing import TYPE_CHECKING

from lightning.fabric.utilities.cloud_io import get_filesystem

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["require_matplotlib", "write_picture"]


def require_matplotlib(who: str) -> None:
    """Check that matplotlib is there.

    Args:
        who: Name of the callback that wants to draw.

    Raises:
        ModuleNotFoundError: If it is not.
    """
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"The picture of {who} needs matplotlib. Install it with "
            f'`pip install "lightning-curvature[demo]"`, or use {who}(plot=False).'
        ) from error


def write_picture(figure: "Figure", folder: str, filename: str) -> None:
    """Write a figure into a folder, local or not, in one go.

    Args:
        figure: The figure.
        folder: The folder; it is made if it is not there.
        filename: Path inside of it. Its ending picks the format, PNG if there is none.
    """
    content = io.BytesIO()  # a failure leaves no broken file
    ending = os.path.splitext(filename)[1]
    figure.savefig(content, format=ending.removeprefix(".") or "png", dpi=120)
    path = os.path.join(folder, filename)
    filesystem = get_filesystem(folder)
    filesystem.makedirs(os.path.dirname(path), exist_ok=True)
    with filesystem.open(path, "wb") as file:
        file.write(content.getvalue())
