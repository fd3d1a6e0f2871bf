"""What the programs that draw share: a figure, colours, and a PNG. It makes DeiT-with-iRPE's modules importable.

Only matplotlib's objects are used, never pyplot, so that nothing asks for a screen.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "DeiT-with-iRPE"))
import runtime

ROOT = Path(__file__).resolve().parent.parent
# Okabe and Ito's, which colour-blind readers tell apart, without black and yellow, which white paper swallows
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")


def new_figure(width, height):
    """An empty figure of so many inches, which arranges what is put on it. Raises: UserError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise runtime.UserError(
            "pictures are drawn with matplotlib, which is not installed: pip install matplotlib"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def save(figure, path, dpi=120):
    """Write a PNG. Raises: UserError if the path has another ending or cannot be written."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise runtime.UserError(f"the picture {path} must be a .png file")
    with runtime.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=dpi)
