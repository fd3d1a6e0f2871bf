"""Plot the log.txt of one or more runs in one figure, and print at which epoch a run departs from the first one.

    python tools/plot_log.py LOG [LOG ...] [--margin POINTS] [--output FILE.png]

LOG is the log.txt of a DeiT or DETR run, with this code or the authors'. The PNG file shows loss, top-1 or AP, and
learning rate. The first log is the reference. For each other log, a line is printed with the first epoch at which its
top-1 (AP) differs from the reference's by more than the margin. If a log contains an epoch several times, for example
after a restart, its last line counts. Epochs are numbered as in the logs, from 0.
"""

import argparse
import itertools
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drawing import COLORS, new_figure, runtime, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Column = dict[int, float]  # {epoch: number}
Columns = dict[str, Column]
SCORES = ("top-1", "AP")
COLUMNS = ("train_lr", "train_loss", "test_loss", *SCORES)
STYLES = list(itertools.product(("-", "--", ":", "-."), COLORS))


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    result = runtime.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("logs", nargs="+", metavar="LOG")
    result.add_argument(
        "--margin",
        type=float,
        default=1.0,
        metavar="POINTS",
        help="largest difference in top-1 or AP to ignore, in percentage points (default: 1)",
    )
    result.add_argument("--output", default="plot_log.png", metavar="FILE.png")
    return result


def read_line(line: str) -> tuple[int, dict[str, float]]:
    """The epoch of a line, and its values by column name (see COLUMNS)."""
    row = json.loads(line)
    if "test_acc1" in row:
        row["top-1"] = row["test_acc1"]
    if "test_coco_eval_bbox" in row:
        row["AP"] = 100 * row["test_coco_eval_bbox"][0]
    return int(row["epoch"]), {name: float(row[name]) for name in COLUMNS if name in row}


def read_log(path: str | Path) -> Columns:
    """Read the columns of a log, {name: {epoch: value}}. Missing columns are empty; top-1 and AP are in percent.

    A truncated last line is skipped with a note. Raises: UserError, with the line, for a file that is not a log.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise runtime.UserError(f"log {path} cannot be read: {error}") from error
    rows = {}
    for number, line in enumerate(lines, start=1):
        try:
            epoch, rows[epoch] = read_line(line)
        except (ValueError, TypeError, KeyError, IndexError) as error:
            if number == len(lines) and rows:
                print(f"note: line {number} of {path}, the last one, is truncated and skipped", file=sys.stderr)
                break
            raise runtime.UserError(
                f"line {number} of {path} is not a log entry (a JSON object with an epoch and numbers): give a "
                "log.txt, or remove the line"
            ) from error
    columns = {name: {epoch: row[name] for epoch, row in rows.items() if name in row} for name in COLUMNS}
    if not any(columns[name] for name in SCORES):
        raise runtime.UserError(f"{path} has no epoch with DeiT's test_acc1 or DETR's test_coco_eval_bbox")
    return columns


def differences(values: Column, expected: Column) -> Column:
    """{epoch: value - expected value} for the epochs that both have."""
    return {epoch: value - expected[epoch] for epoch, value in values.items() if epoch in expected}


def verdict(values: Column, expected: Column, score: str, margin: float) -> str:
    """A sentence on whether and where a run's top-1 or AP differs from the reference's by more than the margin."""
    apart = differences(values, expected)
    if not apart:
        return f"has no epoch with {score} in common with the reference"
    # NaN is not within the margin.
    outside = [epoch for epoch, difference in apart.items() if not abs(difference) <= margin]
    if not outside:
        widest = max(apart, key=lambda epoch: abs(apart[epoch]))
        return (
            f"is within {margin:g} of the reference's {score} at all {len(apart)} common epochs; the largest "
            f"difference is {apart[widest]:+.2f}, at epoch {widest}"
        )
    first, last = outside[0], max(apart)
    return (
        f"first differs from the reference's {score} by more than {margin:g} at epoch {first} ({values[first]:.2f}, "
        f"not {expected[first]:.2f}), does so at {len(outside)} of {len(apart)} common epochs, last at {outside[-1]}, "
        f"and differs by {apart[last]:+.2f} at the last one, {last}"
    )


def draw(logs: dict[str, Columns], score: str, margin: float) -> "Figure":
    """A figure of loss, score, learning rate and, with several logs, the score's difference from the first one's.

    Args:
        logs: {name: columns}, as `read_log` returns them.
        score: "top-1" or "AP".
        margin: in points, drawn as a band.
    """
    several = len(logs) > 1
    figure = new_figure(10 if several else 13, (7 if several else 4) + 0.2 * len(logs))
    panels = figure.subplots(2 if several else 1, 2 if several else 3).flatten()
    styles = [line_style(number, several) for number in range(len(logs))]
    for log, style in zip(logs.values(), styles, strict=True):
        draw_curves(panels, log, score, style)
    panels[0].set(title="loss: validation (strong), training (pale)", ylabel="loss")
    panels[1].set(title=f"{score} on the validation set", ylabel=f"{score} (%)")
    panels[2].set(title="learning rate", ylabel="learning rate")
    if several:
        draw_differences(panels[3], [log[score] for log in logs.values()], styles, score, margin)
    for axes in panels:
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    names = [f"{'run' if number or not several else 'reference'}: {name}" for number, name in enumerate(logs)]
    figure.legend(panels[1].lines, names, loc="outside lower center", fontsize=9)
    return figure


def line_style(number: int, several: bool) -> dict[str, Any]:
    """matplotlib's arguments for the lines of a log; number 0 is the reference if there are several logs."""
    if number:
        linestyle, color = STYLES[(number - 1) % len(STYLES)]
        return {"color": color, "linestyle": linestyle, "linewidth": 1.3}
    # The reference is drawn below and wider, so that a run equal to it stays visible.
    return {"color": "black", "linestyle": "-", "linewidth": 3.0 if several else 1.3}


def draw_curves(panels: Sequence["Axes"], log: Columns, score: str, style: dict[str, Any]) -> None:
    """Draw the losses, the score and the learning rate of a log into the first three panels."""
    marker = "." if len(log["train_loss"]) < 20 else ""
    for axes, values, alpha in (
        (panels[0], log["train_loss"], 0.4),
        (panels[0], log["test_loss"], 1),
        (panels[1], log[score], 1),
        (panels[2], log["train_lr"], 1),
    ):
        axes.plot(values.keys(), values.values(), alpha=alpha, marker=marker, **style)


def draw_differences(
    axes: "Axes", scores: list[Column], styles: list[dict[str, Any]], score: str, margin: float
) -> None:
    """Draw each run's score minus that of the reference, the first one, and the margin as a grey band."""
    reference, *runs = scores
    for values, style in zip(runs, styles[1:], strict=True):
        apart = differences(values, reference)
        axes.plot(apart.keys(), apart.values(), marker="." if len(apart) < 20 else "", **style)
    axes.axhspan(-margin, margin, color="black", alpha=0.08, linewidth=0)
    axes.axhline(0, color="black", linewidth=1)
    axes.set(title=f"{score} minus the reference's (grey: ±{margin:g})", ylabel="difference (points)")


def main(args: argparse.Namespace) -> None:
    """Draw the logs and print how they differ."""
    if not 0 <= args.margin < math.inf:
        raise runtime.UserError(f"--margin is {args.margin}; it must be a number of percentage points, 0 or more")
    logs = {path: read_log(path) for path in args.logs}
    (reference, expected), *runs = logs.items()
    score = next(name for name in SCORES if expected[name])
    if other := [path for path, log in runs if not log[score]]:
        raise runtime.UserError(f"{reference} is a log of {score} and {other[0]} is not: draw them separately")
    save(draw(logs, score, args.margin), args.output)
    print(args.output)
    for path, log in runs:
        print(f"{path} {verdict(log[score], expected[score], score, args.margin)}")


if __name__ == "__main__":
    runtime.run(main, build_parser().parse_args())
