"""What the tools that draw have in common. Importing this file makes DeiT-with-iRPE's modules importable.

It uses matplotlib's classes without pyplot, so no display is needed.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "DeiT-with-iRPE"))
import runtime

ROOT = Path(__file__).resolve().parent.parent
# Okabe and Ito's colours, which colour-blind readers can distinguish, without black and the yellow that is too pale.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure, width and height in inches, with automatic layout. Raises: UserError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise runtime.UserError("drawing needs matplotlib, which is not installed: pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: "Figure", path: str | Path, dpi: int = 120) -> None:
    """Write a PNG file. Raises: UserError if the path has another suffix or cannot be written."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise runtime.UserError(f"the figure is written as PNG, but {path} does not end in .png")
    with runtime.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=dpi)
