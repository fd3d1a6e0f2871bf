"""Measure the nine released checkpoints and compare them with the paper's tables.

    python tools/reproduce.py --imagenet DIR --coco DIR --checkpoints DIR --nproc 8
    python tools/reproduce.py --checkpoints DIR --verify

--imagenet holds val/ or val.tar, --coco holds annotations/instances_val2017.json and val2017/ or val2017.zip,
--checkpoints holds the files under their released names. Nothing is downloaded. Each checkpoint is evaluated by its
codebase's own main.py. After every row results.json, results.md and results.png are written to OUT, or to
outputs/reproduce; a row is measured again only if its file, data, flags, code or libraries changed, so that the same
command goes on where it was stopped.
--verify needs no data: it loads every file, compares keys and shapes with the model, and counts parameters and MACs.

Exit status: 0 all rows passed; 1 one was measured beyond its bound, or with --verify does not fit its model; 2 the
command line is wrong; 3 no such row, but some could not be measured; 130 stopped by a signal or a closed pipe.
"""

import argparse
import contextlib
import fnmatch
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from drawing import COLORS, ROOT, new_figure, save
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import runtime
from runtime import UserError

PASS, FAIL, USAGE, INCOMPLETE, INTERRUPTED = 0, 1, 2, 3, 130
STOPPING_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows lacks the last
STOPPING = tuple(getattr(signal, name) for name in STOPPING_NAMES if hasattr(signal, name))


@dataclass(frozen=True)
class Codebase:
    """How one codebase is evaluated and judged."""

    folder: Path
    data: str  # the flag with its data set
    parts: tuple[tuple[str, ...], ...]  # of the data set; one name of each must be there
    metrics: tuple[str, ...]  # the first one is judged
    points: int  # that a metric of 1 is: percent, or AP points
    tolerance: float  # in points
    size: tuple[int, int]  # of the picture that MACs are counted for, in pixels


CODEBASES = {
    "deit": Codebase(ROOT / "DeiT-with-iRPE", "imagenet", (("val", "val.tar"),), ("top1", "top5"), 1, 0.1, (224, 224)),
    "detr": Codebase(
        ROOT / "DETR-with-iRPE",
        "coco",
        (("annotations/instances_val2017.json",), ("val2017", "val2017.zip")),
        ("ap", "ap50", "ap75", "aps", "apm", "apl"),
        100,
        0.2,
        (800, 1088),
    ),
}


# What was asked for


def parse_args(argv=None):
    parser = runtime.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--imagenet", type=Path, metavar="DIR")
    parser.add_argument("--coco", type=Path, metavar="DIR")
    parser.add_argument("--checkpoints", type=Path, metavar="DIR", required=True)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these rows; *, ? and [] match as in a shell")
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="processes, one a GPU")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--output_dir", type=Path, default=Path("outputs", "reproduce"), metavar="OUT")
    parser.add_argument("--verify", action="store_true", help="only check the files")
    parser.add_argument(
        "--deit_args",
        type=shlex.split,
        default=[],
        metavar="FLAGS",
        help="more for DeiT's main.py, as one word: --deit_args='--batch-size 256'",
    )
    parser.add_argument("--detr_args", type=shlex.split, default=[], metavar="FLAGS", help="the same for DETR's")
    parser.add_argument(
        "--table",
        type=Path,
        default=Path(__file__).with_name("released.json"),
        metavar="FILE",
        help="rows and numbers to compare with, in the form of released.json",
    )
    return parser.parse_args(argv)


def read_table(path):
    """Rows of a table file as dicts, with their `codebase`. Raises: UserError for a table that cannot be used."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        rows = [{"codebase": name, **row} for name in CODEBASES for row in table.get(name, [])]
        for row in rows:
            _ = [row[key] for key in ("name", "file", "url", *CODEBASES[row["codebase"]].metrics)]
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        raise UserError(f"--table {path} cannot be read in the form of released.json: {error!r}") from error
    return rows


def select(rows, patterns):
    """The rows whose names match one of the patterns; all rows without patterns."""
    names = [row["name"] for row in rows]
    for pattern in patterns or []:
        if not fnmatch.filter(names, pattern):
            raise UserError(f"--only {pattern} names no row; rows are {', '.join(names)}")
    return [row for row in rows if not patterns or any(fnmatch.fnmatch(row["name"], p) for p in patterns)]


def check(args):
    """Raise UserError for what cannot work, before anything is run or written."""
    if not args.checkpoints.is_dir():
        raise UserError(f"--checkpoints {args.checkpoints} is not a folder")
    if args.nproc < 1:
        raise UserError(f"--nproc {args.nproc} must be at least 1")
    if args.verify:
        return
    if not (args.imagenet or args.coco):
        raise UserError("no data to measure on: say --imagenet DIR and --coco DIR, or --verify to check files only")
    for codebase in CODEBASES.values():
        if getattr(args, codebase.data):
            data_files(codebase, args)
    new_figure(1, 1)  # that it cannot be drawn is known before hours of work


def data_files(codebase, args):
    """The paths that an evaluation reads. Raises: UserError if the data set is not whole."""
    folder, found = getattr(args, codebase.data), []
    for names in codebase.parts:
        there = [folder / name for name in names if (folder / name).exists()]
        if not there:
            raise UserError(f"--{codebase.data} {folder} has no {' and no '.join(names)}")
        found += there
    return found


def device_name(device):
    """Processor and GPU, asked by a process that ends, and so frees the GPU. Raises: UserError if there is none."""
    asked = subprocess.run(
        [sys.executable, "-c", f"import machine; print(machine.machine({device!r}))"],
        cwd=ROOT / "benchmarks",
        capture_output=True,
        text=True,
    )
    if asked.returncode:
        raise UserError("--device cuda needs a GPU and PyTorch finds none: say --device cpu")
    return asked.stdout.strip()


def lock(out):
    """The open lock file of a folder that one run uses at a time; its evaluation, which may outlive it, inherits it."""
    import fcntl  # which systems without SIGHUP do not have either

    with runtime.writing(f"--output_dir {out}"):
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / ".lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UserError(
            f"another run, or an evaluation that it left behind, is using --output_dir {out}: wait for its "
            "end, or choose another folder"
        ) from error
    return file


# What is measured


def outline(row):
    """The row's model without memory for its weights. Raises: UserError if it, or a library, is not there."""
    try:
        return torch.hub.load(str(ROOT), row["name"], source="local").eval().requires_grad_(False).to("meta")
    except (ModuleNotFoundError, RuntimeError) as error:
        raise UserError(f"{row['name']} cannot be built: {error}") from error


def count(model, size):
    """{"params", "macs"}; MACs are those of matrix products and convolutions, for a picture of (height, width)."""
    # PyTorch's fused attention would not be counted on every device
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, *size, device="meta"))
    return {"params": sum(p.numel() for p in model.parameters()), "macs": counter.get_total_flops() // 2}


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fingerprint(paths):
    """Hash of the names, sizes and times of all files under the paths; reading ImageNet itself would take too long."""
    digest = hashlib.sha256()
    for root in paths:
        below = [Path(folder, name) for folder, _, names in os.walk(root, followlinks=True) for name in names]
        for file in sorted(below) if root.is_dir() else [root]:
            stat = file.stat()
            digest.update(f"{file.relative_to(root.parent)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def dependencies(row, args, path):
    """All that changes a result; the number of processes does not."""
    codebase = CODEBASES[row["codebase"]]
    code = "".join(map(sha256, sorted(codebase.folder.rglob("*.py"))))
    return {
        "sha256": sha256(path),
        "data": fingerprint(data_files(codebase, args)),
        "device": args.device,
        "flags": getattr(args, f"{row['codebase']}_args"),
        "code": hashlib.sha256(code.encode()).hexdigest(),
        "versions": versions(),
    }


def versions():
    """Versions of what a result depends on, as far as it is installed."""
    installed = {library.name: library.version for library in importlib.metadata.distributions()}
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{
            name: installed[name]
            for name in ("torchvision", "timm", "scipy", "pycocotools", "rpe_ops")
            if name in installed
        },
    }


def command_of(row, args, path):
    """The evaluation's command line, to be run in the codebase's folder."""
    if row["codebase"] == "deit":
        flags = ["--model", row["name"], "--data-path", args.imagenet.resolve()]
        flags += ["--load-tar"] * (not (args.imagenet / "val").is_dir())
    else:
        flags = ["--enc_rpe2d", row["enc_rpe2d"], "--coco_path", args.coco.resolve(), "--num_classes", "91"]
    flags += [
        "--device",
        args.device,
        "--output_dir",
        (args.output_dir / row["name"]).resolve(),
        *getattr(args, f"{row['codebase']}_args"),
        "--eval",
        "--resume",
        path.resolve(),
    ]
    return [
        "python",
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(args.nproc),
        "main.py",
        *map(str, flags),
    ]


def evaluate(row, command, out, locked):
    """Run the command; its metrics by name. What it says goes where ours goes. Raises: UserError if it fails."""
    codebase, path = CODEBASES[row["codebase"]], out / row["name"] / "eval.json"
    path.unlink(missing_ok=True)
    process = None
    try:
        with signals_deferred():
            process = subprocess.Popen(
                [sys.executable, *command[1:]],
                cwd=codebase.folder,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                pass_fds=[locked.fileno()],
            )
        said = ""
        for line in process.stderr:
            print(line, end="", file=sys.stderr, flush=True)
            said += line
        status = process.wait()
    finally:
        if process:
            end(process)
    if status or not path.is_file():
        raise UserError(error_in(said) or f"the evaluation ended with status {status} and no result")
    stats = json.loads(path.read_text(encoding="utf-8"))
    values = stats["coco_eval_bbox"] if row["codebase"] == "detr" else (stats["acc1"], stats["acc5"])
    return dict(zip(codebase.metrics, values, strict=False))  # COCO's other six are recalls


def end(process):
    """End a process that still runs; a launcher kills what has not ended half a minute after it was told to."""
    if process.poll() is None:
        ignore_signals()
        process.terminate()
        process.wait()
    process.stderr.close()


def error_in(said):
    """What went wrong first, among warnings, what the other processes say then, and the launcher's report."""
    for pattern in (
        r"^error: (?!.*(?:(?:another rank|rank [\d, ]+) is lost|Traceback))(.*)",
        r"^(?:\[rank\d+\]: )?((?!.*ChildFailedError)[\w.]*(?:Error|Exception)\b.*)",
        r"(Signal \d+ .*) received by PID",
        r"^error: (.*)",
    ):
        if found := re.search(pattern, said, re.MULTILINE):
            return found[1]
    return ""


def judge(row, measured):
    """The part of an entry that compares what was measured with the paper: status and why, in points."""
    codebase = CODEBASES[row["codebase"]]
    metric, points = codebase.metrics[0], codebase.points
    difference = points * (measured[metric] - row[metric])
    # differences of decimal fractions, as 81.3 - 81.2, are not exact
    return {
        "status": "pass" if abs(difference) <= codebase.tolerance + 1e-9 else "fail",
        "why": f"{metric} {points * measured[metric]:.3f}, paper {points * row[metric]:.1f}, "
        f"difference {difference:+.3f} of ±{codebase.tolerance}",
        "measured": measured,
        "paper": {name: row[name] for name in codebase.metrics},
        "difference": difference,
    }


def measure(row, args, device, old, locked):
    """The row's new entry; what `old`, {} for none, has measured stays where nothing new could be measured."""
    codebase, path = CODEBASES[row["codebase"]], args.checkpoints / row["file"]
    if not path.is_file():
        return {**old, "status": "missing", "why": f"{row['file']}, to be had from {row['url']}"}
    if not getattr(args, codebase.data):
        return {**old, "status": "no data", "why": f"say --{codebase.data} DIR"}
    try:
        depends = dependencies(row, args, path)
        if old.get("depends") == depends:
            print("kept: measured before with the same file, data, flags, code and libraries")
            return {**old, **judge(row, old["measured"])}
        counts = count(outline(row), codebase.size)
        command = command_of(row, args, path)
        said = f"cd {codebase.folder.name} && {shlex.join(command)}"
        print(f"$ {said}", flush=True)
        measured = evaluate(row, command, args.output_dir, locked)
    except BrokenPipeError:
        raise
    except (UserError, OSError) as error:
        return {**old, "status": "error", "why": str(error)}
    return {
        **judge(row, measured),
        **counts,
        "command": said,
        "device": device,
        "processes": args.nproc,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "depends": depends,
    }


# Reports


def write_reports(out, rows, entries):
    """results.json, results.md and results.png of all rows of the table, measured now or earlier."""
    with runtime.writing(f"a report in --output_dir {out}"):
        with runtime.replacing(out / "results.json") as file:
            file.write(json.dumps({"rows": entries}, indent=1).encode())
        (out / "results.md").write_text(markdown(rows, entries), encoding="utf-8")
        draw(rows, entries, out / "results.png")


def markdown(rows, entries):
    lines = ["# The paper's tables, measured", ""]
    for name, codebase in CODEBASES.items():
        heads = ["model", *codebase.metrics, "difference", "#Params (M)", "MACs (M)", "result"]
        lines += [f"## {codebase.folder.name}", "", f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
        lines += [
            f"| {' | '.join(cells(row, entries.get(row['name'], {})))} |" for row in rows if row["codebase"] == name
        ]
        lines += [
            "",
            f"Measured, and in brackets the paper's number; {codebase.metrics[0]} may differ by "
            f"{codebase.tolerance} points. MACs are counted at {' × '.join(map(str, codebase.size))} pixels.",
            "",
        ]
    for name, entry in entries.items():
        lines += [f"## {name}", "", *(f"- {key}: {value}" for key, value in entry.items()), ""]
    return "\n".join(lines)


def cells(row, entry):
    """A row of the table: metrics in points, counts in millions, each as measured (paper)."""

    def cell(value, digits, paper):
        # pycocotools says -1 where there is no object of that size
        return (f"{value:.{digits}f}" if value >= 0 else "-") + (f" ({paper:g})" if paper else "")

    codebase, measured = CODEBASES[row["codebase"]], entry.get("measured", {})
    metrics = [
        cell(measured.get(name, -1) * codebase.points, 2, row[name] * codebase.points) for name in codebase.metrics
    ]
    return [
        row["name"],
        *metrics,
        f"{entry['difference']:+.2f}" if "difference" in entry else "-",
        cell(entry.get("params", -1) / 1e6, 2, row.get("params_m")),
        cell(entry.get("macs", -1) / 1e6, 0, row.get("macs_m")),
        f"**{entry.get('status', 'not run')}**",
    ]


def draw(rows, entries, path):
    """How far every row is from the paper's number, in parts of what it may differ by."""
    figure = new_figure(11, 2 + 0.4 * len(rows))
    axes = figure.subplots()
    axes.axvspan(-1, 1, color="#999999", alpha=0.25, lw=0)
    for row in rows:
        entry = {"difference": float("nan"), "status": "not run", **entries.get(row["name"], {})}
        axes.plot(
            entry["difference"] / CODEBASES[row["codebase"]].tolerance,
            f"{row['name']}: {entry['status']}",
            "o",
            color=COLORS[entry["status"] != "pass"],
        )
    axes.set(xlabel="measured minus the paper's number, in parts of what it may differ by", ylim=(len(rows), -1))
    save(figure, path)


def reproduce(args, table_rows, rows, locked):
    """Measure the rows; returns their statuses."""
    before = args.output_dir / "results.json"
    try:
        entries = json.loads(before.read_text(encoding="utf-8"))["rows"] if before.exists() else {}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{before} of an earlier run cannot be read ({error!r}): move it away") from error
    device = device_name(args.device)
    write_reports(args.output_dir, table_rows, entries)  # that this cannot be done is known before hours of work
    for number, row in enumerate(rows, start=1):
        name = row["name"]
        print(f"[{number}/{len(rows)}] {name}", flush=True)
        entries[name] = measure(row, args, device, entries.get(name, {}), locked)
        write_reports(args.output_dir, table_rows, entries)
        print(f"{entries[name]['status']}: {entries[name]['why']}", flush=True)
    print(f"reports: {args.output_dir}/results.md, results.json, results.png", flush=True)
    return {entries[row["name"]]["status"] for row in rows}


def verify(row, path):
    """(status of the file, why). Raises: UserError if there is no model to compare it with."""
    if not path.exists():
        return "missing", f"{row['file']}, to be had from {row['url']}"
    model = outline(row)
    try:
        weights = runtime.model_weights(runtime.load_checkpoint(path), path)
    except UserError as error:
        return "fail", str(error)
    own, found = (
        {key: value for key, value in values.items() if not key.endswith("num_batches_tracked")}
        for values in (model.state_dict(), weights)
    )
    if differences := runtime.key_differences(own, found):
        return "fail", f"{path.name} does not fit: {differences}"
    counts = count(model, CODEBASES[row["codebase"]].size)
    paper = f" (paper: {row['params_m']} M, {row['macs_m']} M)" if "macs_m" in row else ""
    return "pass", (
        f"{counts['params'] / 1e6:.2f} M parameters, {counts['macs'] / 1e6:.0f} M MACs{paper}, sha256 {sha256(path)}"
    )


def run(args):
    """Do what was asked for; returns the exit status."""
    table_rows = read_table(args.table)
    rows = select(table_rows, args.only)
    check(args)
    if args.verify:
        statuses = set()
        for row in rows:
            status, why = verify(row, args.checkpoints / row["file"])
            print(f"{row['name']}: {status}: {why}", flush=True)
            statuses.add(status)
    else:
        with lock(args.output_dir) as locked:
            statuses = reproduce(args, table_rows, rows, locked)
    return FAIL if "fail" in statuses else INCOMPLETE if statuses - {"pass"} else PASS


def main(argv=None):
    return guarded(run, parse_args(argv), "interrupted; the same command goes on after the last row that was measured")


def ignore_signals():
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


def stop(*_):
    """Handle the first signal; a second one must not cut short how the first one ends the processes."""
    ignore_signals()
    raise KeyboardInterrupt


@contextlib.contextmanager
def signals_deferred():
    """Inside, a signal waits: one that came while a process starts would leave it behind, unknown and running."""
    arrived = []
    handlers = {number: handler for number in STOPPING if callable(handler := signal.getsignal(number))}
    for number in handlers:
        signal.signal(number, lambda number, _: arrived.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if arrived:
        signal.raise_signal(arrived[0])


def guarded(run, args, stopped):
    """run(args)'s exit status, or that of a mistake or a signal, which are said in a sentence, a signal's `stopped`."""
    for number in STOPPING:
        if signal.getsignal(number) != signal.SIG_IGN:  # as SIGHUP is under nohup
            signal.signal(number, stop)
    try:
        runtime.need_signals(Path(sys.argv[0]).name, *STOPPING_NAMES)
        return run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    except BrokenPipeError:
        pass  # nobody reads what could be said
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
    return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
