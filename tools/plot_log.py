"""Draw the log.txt of one or more runs over each other, and tell where a run leaves the first of them.

    python tools/plot_log.py LOG [LOG ...] [--margin POINTS] [--output FILE.png]

LOG is the log.txt of a run, of this code or the public one, of DeiT or DETR, which its columns tell. Loss, top-1 or
AP, and learning rate are drawn as a PNG. The first log is the reference: for each other a line says at which epoch its
top-1 (AP) first differs from the reference's by more than the margin. Where a log has an epoch several times, as after
a run was resumed, the last line counts. Epochs are numbered as in the logs, from 0.
"""

import argparse
import itertools
import json
import math
import sys
from pathlib import Path

from drawing import COLORS, new_figure, runtime, save

SCORES = ("top-1", "AP")
COLUMNS = ("train_lr", "train_loss", "test_loss", *SCORES)
STYLES = list(itertools.product(("-", "--", ":", "-."), COLORS))


def parser():
    result = runtime.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("logs", nargs="+", metavar="LOG")
    result.add_argument(
        "--margin",
        type=float,
        default=1.0,
        metavar="POINTS",
        help="difference in top-1 or AP that is still taken for the same, in points of 100",
    )
    result.add_argument("--output", default="plot_log.png", metavar="FILE.png")
    return result


def read_line(line):
    """Epoch of a line, and its numbers by the names of COLUMNS."""
    row = json.loads(line)
    if "test_acc1" in row:
        row["top-1"] = row["test_acc1"]
    if "test_coco_eval_bbox" in row:
        row["AP"] = 100 * row["test_coco_eval_bbox"][0]
    return int(row["epoch"]), {name: float(row[name]) for name in COLUMNS if name in row}


def read_log(path):
    """Columns of a log, {name: {epoch: number}}; those that it lacks are empty, top-1 and AP are in points of 100.

    A cut-off last line is left out with a note. Raises: UserError for a file that is no log, with the line.
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
                print(f"note: line {number} of {path}, the last one, is cut off and left out", file=sys.stderr)
                break
            raise runtime.UserError(
                f"line {number} of {path} is not one of a log.txt, a JSON object with an epoch and "
                "numbers: give a log, or remove the line"
            ) from error
    columns = {name: {epoch: row[name] for epoch, row in rows.items() if name in row} for name in COLUMNS}
    if not any(columns[name] for name in SCORES):
        raise runtime.UserError(f"{path} has no epoch with the test_acc1 of DeiT or the test_coco_eval_bbox of DETR")
    return columns


def differences(values, expected):
    """{epoch: value minus expected one} where both have one."""
    return {epoch: value - expected[epoch] for epoch, value in values.items() if epoch in expected}


def verdict(values, expected, score, margin):
    """Where a run with these values of top-1 or AP, {epoch: number}, leaves the expected ones of the reference."""
    apart = differences(values, expected)
    if not apart:
        return f"has no epoch with {score} in common with the reference"
    # what is not a number is not within the margin
    outside = [epoch for epoch, difference in apart.items() if not abs(difference) <= margin]
    if not outside:
        widest = max(apart, key=lambda epoch: abs(apart[epoch]))
        return (
            f"is within {margin:g} of the reference's {score} at all epochs of both, {len(apart)}; the largest "
            f"difference is {apart[widest]:+.2f}, at epoch {widest}"
        )
    first, last = outside[0], max(apart)
    return (
        f"leaves the reference's {score} by more than {margin:g} at epoch {first} ({values[first]:.2f}, not "
        f"{expected[first]:.2f}) and is outside at {len(outside)} of {len(apart)} epochs, last at {outside[-1]}; "
        f"at the end, epoch {last}, it is {apart[last]:+.2f}"
    )


def draw(logs, score, margin):
    """A figure of loss, score, learning rate and, with several logs, the score's difference from the first one's.

    Args:
        logs: {name: columns}, as `read_log` returns them.
        score: "top-1" or "AP".
        margin: in points, drawn as a band.
    """
    several, expected = len(logs) > 1, next(iter(logs.values()))[score]
    figure = new_figure(10 if several else 13, (7 if several else 4) + 0.2 * len(logs))
    panels = figure.subplots(2 if several else 1, 2 if several else 3).flatten()
    for number, log in enumerate(logs.values()):
        # the reference lies below and is wider, so that also a run equal to it is seen
        linestyle, color = STYLES[(number - 1) % len(STYLES)] if number else ("-", "black")
        style = {
            "color": color,
            "linestyle": linestyle,
            "linewidth": 1.3 if number or not several else 3.0,
            "marker": "." if len(log["train_loss"]) < 20 else "",
        }
        for axes, values, alpha in (
            (panels[0], log["train_loss"], 0.4),
            (panels[0], log["test_loss"], 1),
            (panels[1], log[score], 1),
            (panels[2], log["train_lr"], 1),
        ):
            axes.plot(values.keys(), values.values(), alpha=alpha, **style)
        if number:
            apart = differences(log[score], expected)
            panels[3].plot(apart.keys(), apart.values(), **style)
    panels[0].set(title="loss: test (strong), training (pale)", ylabel="loss")
    panels[1].set(title=f"{score} on the validation set", ylabel=f"{score} (%)")
    panels[2].set(title="learning rate", ylabel="learning rate")
    if several:
        panels[3].axhspan(-margin, margin, color="black", alpha=0.08, linewidth=0)
        panels[3].axhline(0, color="black", linewidth=1)
        panels[3].set(title=f"{score} minus the reference's (grey: ±{margin:g})", ylabel="difference (points)")
    for axes in panels:
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    names = [f"{'run' if number or not several else 'reference'}: {name}" for number, name in enumerate(logs)]
    figure.legend(panels[1].lines, names, loc="outside lower center", fontsize=9)
    return figure


def main(args):
    if not 0 <= args.margin < math.inf:
        raise runtime.UserError(f"--margin is {args.margin}; it must be a number of points, 0 or more")
    logs = {path: read_log(path) for path in args.logs}
    (reference, expected), *runs = logs.items()
    score = next(name for name in SCORES if expected[name])
    if other := [path for path, log in runs if not log[score]]:
        raise runtime.UserError(f"{reference} is a log of {score} and {other[0]} is not: draw them apart")
    save(draw(logs, score, args.margin), args.output)
    print(args.output)
    for path, log in runs:
        print(f"{path} {verdict(log[score], expected[score], score, args.margin)}")


if __name__ == "__main__":
    runtime.run(main, parser().parse_args())
