"""Draw iRPE.png: for one query on a 14×14 map the bucket of every key, under each mapping, and the function g.

python tools/draw_irpe.py [--position ROW COLUMN] [--output FILE.png]
"""

import argparse
import itertools
from typing import TYPE_CHECKING

import torch
from drawing import COLORS, ROOT, new_figure, runtime, save

from irpe import get_bucket_ids_2d, get_rpe_config, piecewise_index

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIDE = 14
# The mappings with the ratios of the published models.
PANELS = (
    ("euc", 20, "Euclidean: g(√(Δr² + Δc²))"),
    ("quant", 33, "Quantization: g(Δr² + Δc²)"),
    ("product", 1.9, "Product: g(Δr) and g(Δc)"),
    ("cross_rows", 20, "Cross, rows: g(Δr)"),
    ("cross_cols", 20, "Cross, columns: g(Δc)"),
)
CURVE_RATIO, REACH = 4, 40
# Colours of the corners of the map of product buckets; the others are interpolated between them.
CORNERS = torch.tensor([[[0.00, 0.45, 0.70], [0.00, 0.62, 0.45]], [[0.80, 0.47, 0.65], [0.90, 0.62, 0.00]]])


def buckets(method: str, ratio: float, position: tuple[int, int]) -> torch.Tensor:
    """(14, 14) bucket ids of every key for the query at `position` (row, column)."""
    ids, _ = get_bucket_ids_2d(method, SIDE, SIDE, 0, *get_rpe_config(ratio).piecewise)
    return ids[position[0] * SIDE + position[1]].view(SIDE, SIDE)


def colors(ids: torch.Tensor) -> torch.Tensor:
    """(14, 14, 3): one colour for each bucket, from dark to bright in the order of their ids."""
    from matplotlib import colormaps  # new_figure has already checked that matplotlib is installed

    values, ranks = ids.unique(return_inverse=True)
    return torch.from_numpy(colormaps["viridis"](ranks.numpy() / (len(values) - 1))[..., :3]).float()


def product_colors(ratio: float, position: tuple[int, int]) -> torch.Tensor:
    """(14, 14, 3): one colour for each bucket of the product method, interpolated by its row and column."""
    rows, columns = (
        buckets(axis, ratio, position).unique(return_inverse=True)[1] for axis in ("cross_rows", "cross_cols")
    )
    down, right = (axis[..., None] / axis.max() for axis in (rows, columns))
    top, bottom = (row[0] * (1 - right) + row[1] * right for row in CORNERS)
    mixed = top * (1 - down) + bottom * down
    # Alternate lighter and darker, so that neighbouring buckets are easy to distinguish.
    return mixed + (1 - mixed) * 0.35 * ((rows + columns) % 2)[..., None]


def draw_buckets(axes: "Axes", ids: torch.Tensor, position: tuple[int, int], title: str, pixels: torch.Tensor) -> None:
    """Draw coloured squares with their bucket ids, and frame the query.

    Args:
        ids, pixels: bucket ids (14, 14) and their colours (14, 14, 3).
        position: row and column of the query.
    """
    axes.imshow(pixels.numpy())
    bright = pixels @ torch.tensor([0.3, 0.59, 0.11])
    for row, column in itertools.product(range(SIDE), repeat=2):
        axes.text(
            column,
            row,
            str(ids[row, column].item()),
            ha="center",
            va="center",
            fontsize=7.5,
            color="black" if bright[row, column] > 0.5 else "white",
        )
    row, column = position
    for width, color in ((4, "white"), (2, "#D00000")):
        axes.plot(
            [column - 0.5, column + 0.5, column + 0.5, column - 0.5, column - 0.5],
            [row - 0.5, row - 0.5, row + 0.5, row + 0.5, row - 0.5],
            color=color,
            linewidth=width,
        )
    axes.set_title(f"{title}\n{len(ids.unique())} buckets used by this query", fontsize=10)
    axes.set(xticks=[], yticks=[])


def draw_functions(axes: "Axes") -> None:
    """Draw g at whole offsets, and the clip function of earlier encodings with the same number of buckets."""
    alpha, beta, gamma = get_rpe_config(CURVE_RATIO).piecewise
    x = torch.arange(-REACH, REACH + 1)
    axes.plot(x, x.clamp(-int(beta), int(beta)), "-", color=COLORS[1], linewidth=1.6, label="clip")
    axes.plot(
        x,
        piecewise_index(x, alpha, beta, gamma, torch.long),
        ".-",
        color=COLORS[0],
        markersize=5,
        linewidth=0.8,
        label="g (Eq. 18)",
    )
    for value, name in ((alpha, "α"), (gamma, "γ")):
        axes.axvline(value, color="grey", linewidth=0.8, linestyle=":")
        axes.text(value + 0.6, -beta, f"{name} = {value:g}", fontsize=8, color="0.35")
    axes.set_title(
        f"Piecewise function g and clip, β = {beta:g}:\ng distinguishes far offsets, in coarser and coarser steps",
        fontsize=10,
    )
    axes.set_xlabel("offset in tokens", fontsize=9)
    axes.set_ylabel("index", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.legend(loc="upper left", fontsize=9)
    axes.grid(alpha=0.3)


def draw(position: tuple[int, int]) -> "Figure":
    """The figure for a query at `position` (row, column)."""
    figure = new_figure(13, 9)
    grid = figure.subplots(2, 3).flat
    for axes, (method, ratio, title) in zip(grid, PANELS, strict=False):
        ids = buckets(method, ratio, position)
        pixels = product_colors(ratio, position) if method == "product" else colors(ids)
        draw_buckets(axes, ids, position, title, pixels)
    draw_functions(grid[5])
    figure.suptitle("iRPE: which bucket each key of a 14×14 map falls into, for the query in the red frame")
    return figure


def main(args: argparse.Namespace) -> None:
    """Draw and save the figure."""
    if not all(0 <= value < SIDE for value in args.position):
        raise runtime.UserError(
            f"--position {args.position[0]} {args.position[1]} is not on the map of {SIDE}×{SIDE}: "
            f"rows and columns go from 0 to {SIDE - 1}"
        )
    save(draw(args.position), args.output, dpi=80)
    print(args.output)


if __name__ == "__main__":
    parser = runtime.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--position", nargs=2, type=int, default=(5, 8), metavar=("ROW", "COLUMN"))
    parser.add_argument("--output", default=str(ROOT / "iRPE.png"), metavar="FILE.png")
    runtime.run(main, parser.parse_args())
