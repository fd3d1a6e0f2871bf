"""Measure the nine released checkpoints and compare them with the paper's tables.

    python tools/reproduce.py --imagenet DIR --coco DIR --checkpoints DIR --nproc 8
    python tools/reproduce.py --checkpoints DIR --verify

--imagenet contains val/ or val.tar, --coco contains annotations/instances_val2017.json and val2017/ or val2017.zip, and
--checkpoints contains the files under their released names. Nothing is downloaded. The main.py of each codebase
evaluates its checkpoints. After every row, results.json, results.md and results.png are written to --output_dir. A row
is only measured again if its file, data, flags, code or libraries have changed, so the same command resumes an
interrupted run. --verify needs no data: it loads every file, compares keys and shapes with the model, and counts
parameters and MACs.

Exit status: 0 all rows passed; 1 a result is out of tolerance or, with --verify, a file does not match its model; 2 the
command line is wrong; 3 no row failed, but some could not be measured; 130 interrupted by a signal or a closed pipe.
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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch
from drawing import COLORS, ROOT, new_figure, save
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import runtime
from runtime import UserError

PASS, FAIL, USAGE, INCOMPLETE, INTERRUPTED = 0, 1, 2, 3, 130
STOPPING_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
STOPPING = tuple(getattr(signal, name) for name in STOPPING_NAMES if hasattr(signal, name))
Row = dict[str, Any]  # of the table, or what was measured for it


@dataclass(frozen=True)
class Codebase:
    """How one codebase is evaluated and judged."""

    folder: Path
    data: str  # the flag for its data set
    parts: tuple[tuple[str, ...], ...]  # paths in the data set; one path of each tuple must exist
    metrics: tuple[str, ...]  # the first one decides whether a row passes
    points: int  # factor from a metric to percentage points
    tolerance: float  # in percentage points
    size: tuple[int, int]  # height and width of the image for which MACs are counted, in pixels


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


# Command line


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, `sys.argv` by default."""
    parser = runtime.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--imagenet", type=Path, metavar="DIR")
    parser.add_argument("--coco", type=Path, metavar="DIR")
    parser.add_argument("--checkpoints", type=Path, metavar="DIR", required=True)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these rows; *, ? and [] work as in a shell")
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="number of ranks, one per GPU")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--output_dir", type=Path, default=Path("outputs", "reproduce"), metavar="OUT")
    parser.add_argument("--verify", action="store_true", help="only check the files")
    parser.add_argument(
        "--deit_args",
        type=shlex.split,
        default=[],
        metavar="FLAGS",
        help="additional flags for DeiT's main.py, as one argument: --deit_args='--batch-size 256'",
    )
    parser.add_argument("--detr_args", type=shlex.split, default=[], metavar="FLAGS", help="the same for DETR's")
    parser.add_argument(
        "--table",
        type=Path,
        default=Path(__file__).with_name("released.json"),
        metavar="FILE",
        help="rows and published results, in the format of released.json",
    )
    return parser.parse_args(argv)


def read_table(path: Path) -> list[Row]:
    """The rows of a table file as dicts that include their `codebase`. Raises: UserError for an unusable table."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        rows = [{"codebase": name, **row} for name in CODEBASES for row in table.get(name, [])]
        for row in rows:
            _ = [row[key] for key in ("name", "file", "url", *CODEBASES[row["codebase"]].metrics)]
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        raise UserError(f"--table {path} cannot be read in the format of released.json: {error!r}") from error
    return rows


def select(rows: list[Row], patterns: list[str] | None) -> list[Row]:
    """The rows whose names match one of the patterns; all rows if there are none.

    Raises: UserError for a pattern that matches no row.
    """
    names = [row["name"] for row in rows]
    for pattern in patterns or []:
        if not fnmatch.filter(names, pattern):
            raise UserError(f"--only {pattern} names no row; rows are {', '.join(names)}")
    return [row for row in rows if not patterns or any(fnmatch.fnmatch(row["name"], p) for p in patterns)]


def check(args: argparse.Namespace) -> None:
    """Raise UserError for flags that cannot work, before anything is run or written."""
    if not args.checkpoints.is_dir():
        raise UserError(f"--checkpoints {args.checkpoints} is not a folder")
    if args.nproc < 1:
        raise UserError(f"--nproc {args.nproc} must be at least 1")
    if args.verify:
        return
    if not (args.imagenet or args.coco):
        raise UserError("no data set: give --imagenet DIR and --coco DIR, or --verify to check the files only")
    for codebase in CODEBASES.values():
        if getattr(args, codebase.data):
            data_files(codebase, args)
    new_figure(1, 1)  # fails without matplotlib, now instead of after hours of evaluation


def data_files(codebase: Codebase, args: argparse.Namespace) -> list[Path]:
    """The paths that an evaluation reads. Raises: UserError if the data set is incomplete."""
    folder, found = getattr(args, codebase.data), []
    for names in codebase.parts:
        existing = [folder / name for name in names if (folder / name).exists()]
        if not existing:
            raise UserError(f"--{codebase.data} {folder} has no {' and no '.join(names)}")
        found += existing
    return found


def device_name(device: str) -> str:
    """The names of the processor and the GPU, from a short-lived process, which frees the GPU when it exits.

    Raises: UserError if there is no GPU and `device` is cuda.
    """
    asked = subprocess.run(
        [sys.executable, "-c", f"import machine; print(machine.machine({device!r}))"],
        cwd=ROOT / "benchmarks",
        capture_output=True,
        text=True,
    )
    if asked.returncode:
        raise UserError("--device cuda needs a GPU, and PyTorch finds none: use --device cpu")
    return asked.stdout.strip()


def lock(out: Path) -> TextIO:
    """Lock an output folder, and return the open lock file. Only one run may use a folder.

    Evaluations inherit the lock: one that outlives a killed run still holds it. Raises: UserError if it is taken.
    """
    import fcntl  # Windows does not have it, but was already rejected because it lacks SIGHUP

    with runtime.writing(f"--output_dir {out}"):
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / ".lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UserError(
            f"another run, or an evaluation that it left behind, is using --output_dir {out}: wait until it ends, or "
            "choose another folder"
        ) from error
    return file


# Measurement


def model_on_meta(row: Row) -> nn.Module:
    """The row's model on the meta device, without weights. Raises: UserError if it cannot be built."""
    try:
        return torch.hub.load(str(ROOT), row["name"], source="local").eval().requires_grad_(False).to("meta")
    except (ModuleNotFoundError, RuntimeError) as error:
        raise UserError(f"{row['name']} cannot be built: {error}") from error


def count(model: nn.Module, size: tuple[int, int]) -> dict[str, int]:
    """{"params", "macs"}, where MACs are those of matrix products and convolutions for an image of (height, width)."""
    # PyTorch counts attention by the math backend on every device, but by the fused backends only on some.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, *size, device="meta"))
    return {"params": sum(p.numel() for p in model.parameters()), "macs": counter.get_total_flops() // 2}


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fingerprint(paths: Iterable[Path]) -> str:
    """Hash of the names, sizes and times of all files under the paths. Hashing all of ImageNet would take too long."""
    digest = hashlib.sha256()
    for root in paths:
        below = [Path(folder, name) for folder, _, names in os.walk(root, followlinks=True) for name in names]
        for file in sorted(below) if root.is_dir() else [root]:
            stat = file.stat()
            digest.update(f"{file.relative_to(root.parent)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def dependencies(row: Row, args: argparse.Namespace, path: Path) -> dict[str, Any]:
    """Everything that a result depends on. The number of ranks does not matter."""
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


def versions() -> dict[str, str]:
    """Versions of the installed packages that a result depends on."""
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


def command_of(row: Row, args: argparse.Namespace, path: Path) -> list[str]:
    """The evaluation's command line, to be run in the codebase's folder."""
    if row["codebase"] == "deit":
        flags = ["--model", row["name"], "--data-path", args.imagenet.resolve()]
        if not (args.imagenet / "val").is_dir():
            flags.append("--load-tar")
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


def evaluate(row: Row, command: list[str], out: Path, locked: TextIO) -> dict[str, float]:
    """Run the command, pass on its output, and return its metrics by name. Raises: UserError if it fails."""
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
        errors = ""
        for line in process.stderr:
            print(line, end="", file=sys.stderr, flush=True)
            errors += line
        status = process.wait()
    finally:
        if process:
            end(process)
    if status or not path.is_file():
        raise UserError(error_in(errors) or f"the evaluation ended with status {status} and no result")
    stats = json.loads(path.read_text(encoding="utf-8"))
    values = stats["coco_eval_bbox"] if row["codebase"] == "detr" else (stats["acc1"], stats["acc5"])
    return dict(zip(codebase.metrics, values, strict=False))  # COCO's other six are recalls


def end(process: subprocess.Popen) -> None:
    """Terminate the launcher if it still runs; it kills ranks that have not exited after half a minute."""
    if process.poll() is None:
        ignore_signals()
        process.terminate()
        process.wait()
    process.stderr.close()


def error_in(output: str) -> str:
    """The original error in output that also contains warnings, errors of other ranks and the launcher's report.

    The patterns are ordered: the program's own error, an exception, a signal, an error because of another rank.
    """
    for pattern in (
        r"^error: (?!.*(?:(?:another rank|rank [\d, ]+) is lost|Traceback))(.*)",
        r"^(?:\[rank\d+\]: )?((?!.*ChildFailedError)[\w.]*(?:Error|Exception)\b.*)",
        r"(Signal \d+ .*) received by PID",
        r"^error: (.*)",
    ):
        if found := re.search(pattern, output, re.MULTILINE):
            return found[1]
    return ""


def judge(row: Row, measured: dict[str, float]) -> Row:
    """Compare measured metrics with the paper's: the part of an entry with status, reason and difference, in points."""
    codebase = CODEBASES[row["codebase"]]
    metric, points = codebase.metrics[0], codebase.points
    difference = points * (measured[metric] - row[metric])
    # Differences of decimal fractions, such as 81.3 - 81.2, are not exact.
    return {
        "status": "pass" if abs(difference) <= codebase.tolerance + 1e-9 else "fail",
        "why": f"{metric} {points * measured[metric]:.3f}, paper {points * row[metric]:.1f}, "
        f"difference {difference:+.3f}, tolerance ±{codebase.tolerance}",
        "measured": measured,
        "paper": {name: row[name] for name in codebase.metrics},
        "difference": difference,
    }


def measure(row: Row, args: argparse.Namespace, device: str, old: Row, locked: TextIO) -> Row:
    """Measure a row, and return its new entry.

    If nothing can be measured, the entry keeps the results of `old`, the row's earlier entry or {}.
    """
    codebase, path = CODEBASES[row["codebase"]], args.checkpoints / row["file"]
    if not path.is_file():
        return {**old, "status": "missing", "why": f"{row['file']}, which {row['url']} provides"}
    if not getattr(args, codebase.data):
        return {**old, "status": "no data", "why": f"it needs --{codebase.data} DIR"}
    try:
        depends = dependencies(row, args, path)
        if old.get("depends") == depends:
            print("kept: already measured with the same file, data, flags, code and libraries")
            return {**old, **judge(row, old["measured"])}
        counts = count(model_on_meta(row), codebase.size)
        command = command_of(row, args, path)
        printed_command = f"cd {codebase.folder.name} && {shlex.join(command)}"
        print(f"$ {printed_command}", flush=True)
        measured = evaluate(row, command, args.output_dir, locked)
    except BrokenPipeError:
        raise
    except (UserError, OSError) as error:
        return {**old, "status": "error", "why": str(error)}
    return {
        **judge(row, measured),
        **counts,
        "command": printed_command,
        "device": device,
        "processes": args.nproc,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "depends": depends,
    }


# Reports


def write_reports(out: Path, rows: list[Row], entries: dict[str, Row]) -> None:
    """Write results.json, results.md and results.png with all rows of the table, measured now or earlier."""
    with runtime.writing(f"a report in --output_dir {out}"):
        with runtime.replacing(out / "results.json") as file:
            file.write(json.dumps({"rows": entries}, indent=1).encode())
        (out / "results.md").write_text(markdown(rows, entries), encoding="utf-8")
        draw(rows, entries, out / "results.png")


def markdown(rows: list[Row], entries: dict[str, Row]) -> str:
    """The text of results.md."""
    lines = ["# The paper's tables, measured", ""]
    for name, codebase in CODEBASES.items():
        heads = ["model", *codebase.metrics, "difference", "#Params (M)", "MACs (M)", "result"]
        lines += [f"## {codebase.folder.name}", "", f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
        lines += [
            f"| {' | '.join(cells(row, entries.get(row['name'], {})))} |" for row in rows if row["codebase"] == name
        ]
        lines += [
            "",
            f"Measured results, with the paper's in brackets. Tolerance: {codebase.tolerance} points of "
            f"{codebase.metrics[0]}. MACs are counted at {' × '.join(map(str, codebase.size))} pixels.",
            "",
        ]
    for name, entry in entries.items():
        lines += [f"## {name}", "", *(f"- {key}: {value}" for key, value in entry.items()), ""]
    return "\n".join(lines)


def cells(row: Row, entry: Row) -> list[str]:
    """A row of the table: metrics in points and counts in millions, each as "measured (paper)"."""

    def cell(value: float, digits: int, paper: float | None) -> str:
        # pycocotools returns -1 if there is no object of that size.
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


def draw(rows: list[Row], entries: dict[str, Row], path: Path) -> None:
    """Draw each row's difference from the paper, relative to the tolerance."""
    figure = new_figure(11, 2 + 0.4 * len(rows))
    axes = figure.subplots()
    axes.axvspan(-1, 1, color="#999999", alpha=0.25, lw=0)
    for row in rows:
        entry = {"difference": float("nan"), "status": "not run", **entries.get(row["name"], {})}
        axes.plot(
            entry["difference"] / CODEBASES[row["codebase"]].tolerance,
            f"{row['name']}: {entry['status']}",
            "o",
            color=COLORS[0] if entry["status"] == "pass" else COLORS[1],
        )
    axes.set(xlabel="(measured - paper) / tolerance", ylim=(len(rows), -1))
    save(figure, path)


def reproduce(args: argparse.Namespace, table_rows: list[Row], rows: list[Row], locked: TextIO) -> set[str]:
    """Measure the rows; returns their statuses."""
    results_path = args.output_dir / "results.json"
    try:
        entries = json.loads(results_path.read_text(encoding="utf-8"))["rows"] if results_path.exists() else {}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{results_path} of an earlier run cannot be read ({error!r}): move it away") from error
    device = device_name(args.device)
    write_reports(args.output_dir, table_rows, entries)  # fails now, not after hours of work, if it is impossible
    for number, row in enumerate(rows, start=1):
        name = row["name"]
        print(f"[{number}/{len(rows)}] {name}", flush=True)
        entries[name] = measure(row, args, device, entries.get(name, {}), locked)
        write_reports(args.output_dir, table_rows, entries)
        print(f"{entries[name]['status']}: {entries[name]['why']}", flush=True)
    print(f"reports: {args.output_dir}/results.md, results.json, results.png", flush=True)
    return {entries[row["name"]]["status"] for row in rows}


def verify(row: Row, path: Path) -> tuple[str, str]:
    """Check a file; returns (status, reason). Raises: UserError if its model cannot be built."""
    if not path.exists():
        return "missing", f"{row['file']}, which {row['url']} provides"
    model = model_on_meta(row)
    try:
        weights = runtime.model_weights(runtime.load_checkpoint(path), path)
    except UserError as error:
        return "fail", str(error)
    own, found = (
        {key: value for key, value in values.items() if not key.endswith("num_batches_tracked")}
        for values in (model.state_dict(), weights)
    )
    if differences := runtime.key_differences(own, found):
        return "fail", f"{path.name} does not match the model: {differences}"
    counts = count(model, CODEBASES[row["codebase"]].size)
    paper = f" (paper: {row['params_m']} M, {row['macs_m']} M)" if "macs_m" in row else ""
    return "pass", (
        f"{counts['params'] / 1e6:.2f} M parameters, {counts['macs'] / 1e6:.0f} M MACs{paper}, sha256 {sha256(path)}"
    )


def run(args: argparse.Namespace) -> int:
    """Run what the command line asks for; returns the exit status."""
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


def main(argv: list[str] | None = None) -> int:
    """Run the command line, `sys.argv` by default; returns the exit status."""
    return guarded(run, parse_args(argv), "interrupted; the same command resumes after the last measured row")


# Signals


def ignore_signals() -> None:
    """From now on, ignore the signals that stop a run."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


def stop(*_: object) -> NoReturn:
    """Handle the first signal, and ignore further ones while the processes are being terminated."""
    ignore_signals()
    raise KeyboardInterrupt


@contextlib.contextmanager
def signals_deferred() -> Iterator[None]:
    """Defer signals until the end of the block. One that arrived while a process starts would leave it running."""
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


def guarded(run: Callable[[argparse.Namespace], int], args: argparse.Namespace, interrupted: str) -> int:
    """Return the exit status of run(args). After a UserError or a signal, print one sentence instead of a traceback.

    Args:
        interrupted: the sentence for a signal.
    """
    for number in STOPPING:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, stop)
    try:
        runtime.need_signals(Path(sys.argv[0]).name, *STOPPING_NAMES)
        return run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    except BrokenPipeError:
        pass  # nobody reads the output any more
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
    return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
