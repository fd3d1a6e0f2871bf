"""Draw the log.txt of one or more runs over each other, and tell where a run leaves the first of them.

    python plot_log.py LOG [LOG ...] [--reference LOG] [--margin POINTS] [--output FILE.png]

LOG is the log.txt of a run, of this code or the public one, of DeiT or DETR, which its columns tell. Loss, top-1 or
AP, and learning rate are drawn as a PNG, with an × for what is not finite. For each run a line says at which epoch its
top-1 (AP) first differs from the reference's, which is --reference or else the first log, by more than the margin.
Where a log has an epoch several times, as after a run was resumed, the last line counts. Epochs are numbered as in the
logs, from 0.
"""
import argparse
import json
import math
import reprlib
import sys
from dataclasses import dataclass
from pathlib import Path

from drawing import COLORS, figure_class, new_figure, runtime, save

SCORES = {"DeiT": "top-1", "DETR": "AP"}
LARGEST = 1e30  # more is no loss, and more than can be drawn
LINES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Log:
    """A log by columns: {epoch: number} of `train_lr`, `train_loss`, `test_loss` and `score`, in points of 100."""
    name: str
    kind: str
    columns: dict[str, dict[int, float]]


def parser():
    result = runtime.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("logs", nargs="+", metavar="LOG")
    result.add_argument("--reference", metavar="LOG", help="the curve to compare with, drawn in black below the others")
    result.add_argument("--margin", type=float, default=1.0, metavar="POINTS",
                        help="difference in top-1 or AP that is still taken for the same, in points of 100")
    result.add_argument("--output", default="plot_log.png", metavar="FILE.png")
    return result


def read_rows(path):
    """{epoch: row} of a log.txt, in the order of epochs; a cut-off last line is left out with a note.

    Raises: UserError that names the first line that is no line of a log.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").rstrip().splitlines()
    except OSError as error:
        raise runtime.UserError(f"log {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise runtime.UserError(f"{path} is not a log: it is no text") from error
    rows = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines) and rows and line.startswith("{"):
                print(f"note: line {number} of {path}, the last one, is cut off and left out", file=sys.stderr)
                break
            raise runtime.UserError(f"line {number} of {path} is not a JSON object, as those of a log.txt are: give a "
                                    "log, or remove the line") from error
        epoch = row.get("epoch") if isinstance(row, dict) else None
        if type(epoch) is not int or not 0 <= epoch < LARGEST:
            raise runtime.UserError(f"line {number} of {path} has no epoch, as those of a log.txt have")
        rows[epoch] = row
    if not rows:
        raise runtime.UserError(f"log {path} is empty")
    return dict(sorted(rows.items()))


def to_number(value):
    """A number of a log as a float, which may be NaN or infinite. Raises: ValueError for anything else."""
    if type(value) not in (int, float) or LARGEST < abs(value) < math.inf:
        raise ValueError
    return float(value)


def read_log(path):
    """The Log in a file. Raises: UserError for a file that is none, or has other things than numbers in it."""
    rows, label = read_rows(path), Path(path)
    keys = set().union(*rows.values())
    kind = ("DeiT" if "test_acc1" in keys else
            "DETR" if keys & {"test_coco_eval_bbox", "train_loss_bbox"} else None)
    if kind is None:
        raise runtime.UserError(f"{path} is no log of DeiT or DETR: it has neither test_acc1 nor test_coco_eval_bbox")

    def column(key, convert=to_number):
        values = {}
        for epoch, row in rows.items():
            if key in row:
                try:
                    values[epoch] = convert(row[key])
                except (TypeError, ValueError, IndexError, KeyError) as error:
                    raise runtime.UserError(f"{key} of epoch {epoch} in {path} is {reprlib.repr(row[key])}, not a "
                                            f"number up to {LARGEST:g}") from error
        return values

    columns = {key: column(key) for key in ("train_lr", "train_loss", "test_loss")}
    columns["score"] = (column("test_acc1") if kind == "DeiT" else
                        column("test_coco_eval_bbox", lambda numbers: 100 * to_number(numbers[0])))
    return Log(str(label.resolve().parent.name if label.name == "log.txt" else label.stem), kind, columns)


def with_names(logs, paths):
    """The logs, those that share their name with another called by their path."""
    names = [log.name for log in logs]
    return [log if names.count(log.name) == 1 else Log(path, log.kind, log.columns)
            for log, path in zip(logs, paths, strict=True)]


def differences(log, reference):
    """{epoch: score of the run minus the reference's} where both have one."""
    other = reference.columns["score"]
    return {epoch: score - other[epoch] for epoch, score in log.columns["score"].items() if epoch in other}


def verdict(log, reference, margin):
    """The sentence that tells where a run leaves the reference, if it does."""
    apart, what = differences(log, reference), f"{margin:g} point{'s' * (margin != 1)} of {SCORES[log.kind]}"
    if not apart:
        return f"{log.name}: no epoch with {SCORES[log.kind]} in common with {reference.name}"
    # what is not a number is not within the margin
    outside = [epoch for epoch, difference in apart.items() if not abs(difference) <= margin]
    if not outside:
        widest = max(apart, key=lambda epoch: abs(apart[epoch]))
        epochs = f"all {len(apart)} epochs" if len(apart) > 1 else "the one epoch"
        return (f"{log.name}: within {what} of {reference.name} at {epochs} of both; the largest difference "
                f"is {apart[widest]:+.2f}, at epoch {widest}")
    first, last = outside[0], max(apart)
    return (f"{log.name}: leaves {reference.name} by more than {what} at epoch {first} "
            f"({log.columns['score'][first]:.2f}, not {reference.columns['score'][first]:.2f}) and is outside at "
            f"{len(outside)} of {len(apart)} epochs, last at {outside[-1]}; at the end, epoch {last}, it is "
            f"{apart[last]:+.2f}")


def curve(axes, values, style):
    """Draw {epoch: number} and return the line; an × at the foot marks each epoch without a finite number."""
    line, = axes.plot(values.keys(), values.values(), **style)
    if lost := [epoch for epoch, value in values.items() if not math.isfinite(value)]:
        axes.plot(lost, [0.03] * len(lost), "x", color=style["color"], markersize=7, markeredgewidth=2, zorder=4,
                  transform=axes.get_xaxis_transform())
    return line


def draw(logs, reference, margin):
    """A figure of loss, score, learning rate and, with several logs, the score's difference from the reference."""
    several, lines, runs = len(logs) > 1, [], [log for log in logs if log is not reference]
    figure = new_figure(10 if several else 13, (7 if several else 4) + 0.2 * len(logs))
    panels = figure.subplots(2 if several else 1, 2 if several else 3).flat
    loss, score, rate = panels[:3]
    for log in logs:
        # the reference lies below and is wider, so that also a run equal to it is seen
        style = {"color": "black", "linewidth": 3.0, "zorder": 2}
        if log is not reference:
            turn, color = divmod(runs.index(log), len(COLORS))
            style = {"color": COLORS[color], "linestyle": LINES[turn % len(LINES)], "linewidth": 1.3, "zorder": 3}
        style["marker"] = "." if len(log.columns["train_loss"]) < 20 else ""
        curve(loss, log.columns["train_loss"], {**style, "alpha": 0.4})
        curve(loss, log.columns["test_loss"], style)
        lines.append(curve(score, log.columns["score"], style))
        curve(rate, log.columns["train_lr"], style)
        if several and log is not reference:
            curve(panels[3], differences(log, reference), style)
    name = SCORES[reference.kind]
    loss.set(title="loss: test (strong), training (pale)", ylabel="loss")
    score.set(title="top-1 accuracy" if name == "top-1" else "AP (mean over IoU 0.50 to 0.95)", ylabel=f"{name} (%)")
    rate.set(title="learning rate", ylabel="learning rate")
    if several:
        panels[3].axhspan(-margin, margin, color="black", alpha=0.08, linewidth=0)
        panels[3].axhline(0, color="black", linewidth=1)
        panels[3].set(title=f"{name} minus the reference's (grey: ±{margin:g})", ylabel="difference (points)")
    for axes in panels:
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    # matplotlib hides labels that begin with an underscore and reads what stands between dollars as a formula
    names = [" " + log.name.replace("$", r"\$") + " (reference)" * (several and log is reference) for log in logs]
    figure.legend(lines, names, loc="outside lower center", fontsize=9)
    figure.suptitle(f"{reference.kind}: {'log of a run' if not several else f'logs of {len(logs)} runs'}")
    return figure


def main(args):
    if not 0 <= args.margin < math.inf:
        raise runtime.UserError(f"--margin is {args.margin}; it must be a number of points, 0 or more")
    figure_class()
    paths = list(dict.fromkeys(([args.reference] if args.reference else []) + args.logs))
    logs = with_names([read_log(path) for path in paths], paths)
    reference = logs[0]
    if other := [path for path, log in zip(paths, logs, strict=True) if log.kind != reference.kind]:
        raise runtime.UserError(f"{paths[0]} is a log of {reference.kind} and {other[0]} is not: draw them apart")
    save(draw(logs, reference, args.margin), args.output)
    print(f"{args.output}: {', '.join(log.name for log in logs)}")
    for log in logs[1:]:
        print(verdict(log, reference, args.margin))


if __name__ == "__main__":
    runtime.run(main, parser().parse_args())
