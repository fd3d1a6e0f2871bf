"""Measure the nine released checkpoints and compare them with the paper's tables.

    python reproduce.py --imagenet DIR --coco DIR --checkpoints DIR --nproc 8
    python reproduce.py --checkpoints DIR --verify

--imagenet holds val/ or val.tar, --coco holds annotations/instances_val2017.json and val2017/ or val2017.zip,
--checkpoints holds the files under their released names. Nothing is downloaded. Each checkpoint is evaluated by its
codebase's own main.py. OUT/results.json, results.md and results.png are written after every row; a row is measured
again only if its file, data, flags, code or libraries changed, so that the same command goes on where it was stopped.
--verify needs no data: it loads every file, compares keys and shapes with the model, and counts parameters and MACs.

Exit status: 0 all rows passed; 1 one was measured beyond its bound, or with --verify does not fit its model; 2 the
command line is wrong; 3 no such row, but some could not be measured (no file or data set, or an error); 130 stopped by
Ctrl-C, SIGTERM, a closed terminal or a closed pipe.
"""
import argparse
import contextlib
import datetime
import fcntl
import fnmatch
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent
PASS, FAIL, USAGE, INCOMPLETE, INTERRUPTED = 0, 1, 2, 3, 130
LIBRARIES = ("torch", "torchvision", "timm", "pycocotools", "rpe_ops")
FINISHED = ("pass", "fail")  # of the statuses; the others are "error", "missing" and "no data"
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE = 45  # seconds that the launcher has for ending its processes; it waits 30 before it kills them


@dataclass(frozen=True)
class Codebase:
    """How one codebase is evaluated and judged; `points` turns its metrics into percent or AP points."""
    title: str
    folder: Path
    data: str
    metrics: tuple[str, ...]  # the first one is judged
    labels: tuple[str, ...]
    points: float
    tolerance: float
    libraries: tuple[str, ...]
    macs: str  # what is to be known of the count of MACs


CODEBASES = {
    "deit": Codebase("DeiT on ImageNet-1K", ROOT / "DeiT-with-iRPE", "imagenet", ("top1", "top5"), ("top-1", "top-5"),
                     1.0, 0.1, ("torch", "torchvision", "timm"),
                     "within 1 % of the paper's, but on values fewer: ours sum the attention per bucket first"),
    "detr": Codebase("DETR on COCO val2017", ROOT / "DETR-with-iRPE", "coco",
                     ("ap", "ap50", "ap75", "aps", "apm", "apl"), ("AP", "AP50", "AP75", "APS", "APM", "APL"), 100.0,
                     0.2, ("torch", "torchvision", "scipy", "pycocotools"), "at 800×1088 pixels"),
}


class Mistake(Exception):
    """What is wrong with the command line, as one sentence."""


# ---------------------------------------------------------------------------------------------------------------------
# What was asked for

class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser, but a mistake is one sentence without the usage of all flags."""

    def error(self, message):
        self.exit(USAGE, f"error: {message}; --help lists all flags\n")


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--imagenet", type=Path, metavar="DIR")
    parser.add_argument("--coco", type=Path, metavar="DIR")
    parser.add_argument("--checkpoints", type=Path, metavar="DIR", required=True)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these rows; *, ? and [] match as in a shell")
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="processes, one a GPU")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--output_dir", type=Path, default=Path("outputs", "reproduce"), metavar="OUT")
    parser.add_argument("--verify", action="store_true", help="only check the files")
    parser.add_argument("--deit_args", type=shlex.split, default=[], metavar="FLAGS",
                        help="more flags for DeiT's main.py, as one word: --deit_args='--batch-size 256'")
    parser.add_argument("--detr_args", type=shlex.split, default=[], metavar="FLAGS", help="the same for DETR's")
    parser.add_argument("--table", type=Path, default=ROOT / "released.json", metavar="FILE",
                        help="rows and numbers to compare with, in the form of released.json")
    return parser.parse_args(argv)


def is_number(value):
    """Whether a value of a JSON file is a finite number."""
    return type(value) in (int, float) and math.isfinite(value)


def read_json(path):
    """What a file holds. Raises: OSError; ValueError if that is not JSON, or has NaN or infinity in it."""
    def refuse(constant):
        raise ValueError(f"{constant} is no number")

    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except RecursionError as error:
        raise ValueError("its brackets are nested too deeply") from error


def read_table(path):
    """Rows of a table file as dicts, with their `codebase`. Raises: Mistake for a table that cannot be used."""
    try:
        table = read_json(path)
    except (OSError, ValueError) as error:
        raise Mistake(f"--table {path} cannot be read: {error}") from error
    if not isinstance(table, dict) or not all(isinstance(table.get(name, []), list) for name in CODEBASES):
        raise Mistake(f'--table {path} is not of the form of released.json: {{"deit": [rows], "detr": [rows]}}')
    rows = []
    for name, codebase in CODEBASES.items():
        for number, row in enumerate(table.get(name, []), start=1):
            if wrong := wrong_key(row, name, codebase.metrics):
                raise Mistake(f"--table {path}: row {number} of {name} has no {wrong}, or a wrong one")
            if not re.fullmatch(r"\w[\w.-]*", row["name"]) or row["name"] in [other["name"] for other in rows]:
                raise Mistake(f"--table {path}: the name {row['name']!r} is there twice or is no name of a folder")
            rows.append({"codebase": name, **row})
    if not rows:
        raise Mistake(f"--table {path} has no rows")
    return rows


def wrong_key(row, codebase, metrics):
    """The first key that a row of a table lacks or that has no proper value; None for a whole row."""
    if not isinstance(row, dict):
        return "name"
    words = ("name", "file", "url", *(["enc_rpe2d"] if codebase == "detr" else []))
    numbers = (*metrics, *(key for key in ("params_m", "macs_m") if key in row))
    wrong = [key for key in words if not isinstance(row.get(key), str)]
    wrong += [key for key in numbers if not is_number(row.get(key))]
    return wrong[0] if wrong else None


def select(rows, patterns):
    """The rows whose names match one of the patterns; all rows without patterns."""
    for pattern in patterns or []:
        if not fnmatch.filter([row["name"] for row in rows], pattern):
            raise Mistake(f"--only {pattern} names no row; rows are {', '.join(row['name'] for row in rows)}")
    return [row for row in rows if not patterns or any(fnmatch.fnmatch(row["name"], p) for p in patterns)]


def check(args, rows):
    """Raise Mistake for what cannot work, before anything is run or written."""
    if not args.checkpoints.is_dir():
        raise Mistake(f"--checkpoints {args.checkpoints} is not a folder")
    if args.nproc < 1:
        raise Mistake(f"--nproc {args.nproc} must be at least 1")
    needed = dict.fromkeys(name for row in rows for name in CODEBASES[row["codebase"]].libraries)
    if absent := [name for name in needed if not importlib.util.find_spec(name)]:
        raise Mistake(f"{', '.join(absent)} must be installed first: python -m pip install {' '.join(absent)}")
    if not args.verify:
        check_data(args, rows)


def check_data(args, rows):
    """The part of `check` that only an evaluation needs."""
    if not any(getattr(args, CODEBASES[row["codebase"]].data) for row in rows):
        needed = sorted({f"--{CODEBASES[row['codebase']].data} DIR" for row in rows}, reverse=True)
        raise Mistake(f"there is no data to measure on: say {' and '.join(needed)}, or --verify to check files only")
    if args.imagenet and not ((args.imagenet / "val").is_dir() or (args.imagenet / "val.tar").is_file()):
        raise Mistake(f"--imagenet {args.imagenet} has neither val/ nor val.tar")
    if args.coco and not (args.coco / "annotations" / "instances_val2017.json").is_file():
        raise Mistake(f"--coco {args.coco} has no annotations/instances_val2017.json")
    if args.coco and not ((args.coco / "val2017").is_dir() or (args.coco / "val2017.zip").is_file()):
        raise Mistake(f"--coco {args.coco} has neither val2017/ nor val2017.zip")
    if not importlib.util.find_spec("matplotlib"):
        raise Mistake("results.png needs matplotlib: python -m pip install matplotlib")


@contextlib.contextmanager
def locked(out):
    """The output folder for this run alone; gives the lock's file descriptor, which an evaluation inherits.

    So the lock outlives a run that is killed while its evaluation goes on.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / ".lock", "w")
    except OSError as error:
        raise Mistake(f"--output_dir {out} cannot be written: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise Mistake(f"another run, or an evaluation that a killed run left behind, is using --output_dir {out}: "
                          "wait for its end, or choose another folder") from error
        yield file.fileno()


# ---------------------------------------------------------------------------------------------------------------------
# In a process for each codebase, because both have modules of the same names

def cuda_name():
    """{"device": name of the GPU}, or {"error": sentence}."""
    import torch
    if not torch.cuda.is_available():
        return {"error": "--device cuda needs a GPU and PyTorch finds none: say --device cpu"}
    return {"device": torch.cuda.get_device_name(0)}


def build_deit(row):
    """(model without memory for its weights, picture size, its module of checkpoint functions)"""
    import model_cards
    import runtime
    return model_cards.outline(row["name"]), (224, 224), runtime


def build_detr(row):
    """As `build_deit`; DETR's MACs are counted at 800×1088 pixels, a common size of a picture of COCO."""
    import torch

    import main
    from models import build_model
    from util import runtime
    flags = ["--enc_rpe2d", row["enc_rpe2d"], "--num_classes", "91", "--eval"]
    with torch.device("meta"):
        return build_model(main.get_args_parser().parse_args(flags))[0], (800, 1088), runtime


def inspect_file(row, path):
    """What is to be known of a file without data: {"params", "macs"} as counts, "torch_build"; or {"unfit": sentence}.

    The model is made without memory ("meta"), so the MACs (multiplications of matrices and convolutions) are counted
    from shapes alone.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    if (folder := str(CODEBASES[row["codebase"]].folder)) not in sys.path:
        sys.path.insert(0, folder)
    model, size, runtime = {"deit": build_deit, "detr": build_detr}[row["codebase"]](row)
    # PyTorch's fused attention would not be counted on every device
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.eval().requires_grad_(False)(torch.zeros(1, 3, *size))
    try:
        weights = runtime.model_weights(runtime.load_checkpoint(path), path)
    except runtime.UserError as error:
        return {"unfit": str(error)}
    expected, found = ({key: value for key, value in values.items() if not key.endswith("num_batches_tracked")}
                       for values in (model.state_dict(), weights))
    if differences := runtime.key_differences(expected, found):
        return {"unfit": f"{path.name} does not fit {row['name']}: {differences}"}
    return {"params": sum(p.numel() for p in model.parameters()), "macs": counter.get_total_flops() // 2,
            "torch_build": torch.__version__}


@functools.cache
def helper(codebase):
    """The process that looks at a codebase's files; Ctrl-C is for its parent."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN))


def ask(codebase, function, *arguments):
    """Result of a function in the codebase's process; {"error": sentence} for whatever it raises or dies of."""
    try:
        future = helper(codebase).submit(function, *arguments)
    except BrokenProcessPool:  # its process died after its last task
        helper.cache_clear()
        future = helper(codebase).submit(function, *arguments)
    error = future.exception()
    if isinstance(error, BrokenProcessPool):
        helper.cache_clear()
        return {"error": f"the process of {function.__name__} was killed, perhaps for lack of memory"}
    return {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"} if error else future.result()


def describe_device(device):
    """The name that people know the device by. Raises Mistake if it is not there."""
    if device.startswith("cuda"):
        found = ask("device", cuda_name)
        if "error" in found:
            raise Mistake(found["error"])
        return found["device"]
    cpuinfo = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return cpu[1] if cpu else platform.processor() or platform.machine()


# ---------------------------------------------------------------------------------------------------------------------
# What a result depends on

def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(paths):
    """Hash of the names, sizes and times of all files under the paths; reading ImageNet itself would take too long."""
    digest = hashlib.sha256()
    for root in filter(Path.exists, paths):
        files = [root] if root.is_file() else sorted(
            Path(folder, name) for folder, _, names in os.walk(root, followlinks=True) for name in names)
        for file in files:
            stat = file.stat()
            digest.update(f"{file.relative_to(root.parent)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def data_files(row, args):
    """The paths that an evaluation reads."""
    if row["codebase"] == "deit":
        return [args.imagenet / ("val" if (args.imagenet / "val").is_dir() else "val.tar")]
    return [args.coco / name for name in ("annotations/instances_val2017.json", "val2017", "val2017.zip")]


def code_hash(codebase):
    """Hash of the codebase's Python files, without its tests."""
    digest = hashlib.sha256()
    for file in sorted(codebase.folder.rglob("*.py")):
        if "tests" not in file.relative_to(codebase.folder).parts:
            digest.update(file.read_bytes())
    return digest.hexdigest()


def version(library):
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def dependencies(row, args, path):
    """All that changes a result; the number of processes does not."""
    data = getattr(args, CODEBASES[row["codebase"]].data)
    versions = {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}
    return {"sha256": sha256(path), "data": str(data.resolve()), "data_files": fingerprint(data_files(row, args)),
            "device": args.device, "flags": getattr(args, f"{row['codebase']}_args"),
            "code": code_hash(CODEBASES[row["codebase"]]), "versions": versions}


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation

def command_of(row, args, path):
    """The evaluation's command line, to be run in the codebase's folder."""
    if row["codebase"] == "deit":
        flags = ["--model", row["name"], "--data-path", args.imagenet.resolve()]
        flags += ["--load-tar"] * (not (args.imagenet / "val").is_dir())
    else:
        flags = ["--enc_rpe2d", row["enc_rpe2d"], "--coco_path", args.coco.resolve(), "--num_classes", "91"]
    flags += ["--device", args.device, "--output_dir", (args.output_dir / row["name"]).resolve(),
              *getattr(args, f"{row['codebase']}_args"), "--eval", "--resume", path.resolve()]
    return ["python", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(args.nproc), "main.py",
            *map(str, flags)]


def evaluate(row, command, out, lock):
    """Run the command; {"measured": metrics by name, "seconds"} or {"error": sentence}. Its output goes to ours."""
    codebase, path, started = CODEBASES[row["codebase"]], out / row["name"] / "eval.json", time.monotonic()
    path.unlink(missing_ok=True)
    with subprocess.Popen([sys.executable, *command[1:]], cwd=codebase.folder, stderr=subprocess.PIPE, text=True,
                          errors="replace", pass_fds=[lock]) as process:
        try:
            said = []
            for line in process.stderr:
                print(line, end="", file=sys.stderr, flush=True)
                said.append(line.rstrip())
            status = process.wait()
        finally:
            if process.poll() is None:
                end(process)
    if status or not path.is_file():
        return {"error": last_error(said) or f"the evaluation ended with status {status} and no result"}
    measured = read_metrics(row["codebase"], path)
    if measured is None:
        return {"error": f"{path} holds no result: {', '.join(codebase.metrics)} must be finite numbers"}
    return {"measured": measured, "seconds": time.monotonic() - started}


def read_metrics(name, path):
    """The metrics in an eval.json by name; None if they are not all there as finite numbers."""
    metrics = CODEBASES[name].metrics
    try:
        stats = read_json(path)
        values = stats["coco_eval_bbox"][:len(metrics)] if name == "detr" else [stats["acc1"], stats["acc5"]]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return dict(zip(metrics, values, strict=True)) if [*map(is_number, values)] == [True] * len(metrics) else None


def end(process):
    """End the launcher, which ends its processes when it is told to; nothing interrupts this."""
    ignore_signals()
    process.terminate()
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()


def ignore_signals():
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


def last_error(lines):
    """The last line that says what went wrong, not the report that the launcher adds to it."""
    own = [line for line in lines if line.startswith("error: ")]
    raised = [re.sub(r"^\[rank\d+\]: ", "", line) for line in lines
              if re.match(r"(\[rank\d+\]: )?[\w.]*(Error|Exception)\b", line) and "ChildFailedError" not in line]
    if own or raised:
        return (own or raised)[-1].removeprefix("error: ")
    codes = re.findall(r"exitcode\s*: (-?\d+)", "\n".join(lines))
    if codes and codes[-1].startswith("-"):
        return f"a process was ended by signal {codes[-1][1:]}, perhaps for lack of memory"
    return f"a process ended with status {codes[-1]} and said nothing" if codes else ""


def measure(row, args, device_name, old, lock):
    """The row's entry in results.json; `old` is the one that is there, {} if none.

    What was measured before stays, with what it depended on, where nothing new could be measured.
    """
    codebase, path = CODEBASES[row["codebase"]], args.checkpoints / row["file"]
    old = {key: value for key, value in old.items() if key not in ("error", "tried")}
    if not path.is_file() or not getattr(args, codebase.data):
        return {**old, "status": "no data" if path.is_file() else "missing"}
    try:
        depends = dependencies(row, args, path)
    except OSError as error:
        return {**old, "status": "error", "error": f"{error.filename} cannot be read: {error.strerror}"}
    if old.get("depends") == depends and "measured" in old:
        print("kept: measured before with the same file, data, flags, code and libraries")
        return {**old, "status": judge(row, old["measured"])}
    found = ask(row["codebase"], inspect_file, row, path)
    if sentence := found.get("error") or found.get("unfit"):
        return {**old, "status": "error", "error": sentence}
    command = command_of(row, args, path)
    said = f"cd {codebase.folder.name} && {shlex.join(command)}"
    print(f"$ {said}", flush=True)
    result = evaluate(row, command, args.output_dir, lock)
    if "error" in result:
        return {**old, "status": "error", "error": result["error"], "tried": said}
    return {**found, **result, "command": said, "depends": depends, "device": device_name, "nproc": args.nproc,
            "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "status": judge(row, result["measured"])}


def difference(row, measured):
    """What the judged metric is above the paper's, in points."""
    codebase = CODEBASES[row["codebase"]]
    metric = codebase.metrics[0]
    return codebase.points * (measured[metric] - row[metric])


def judge(row, measured):
    """The status "pass" or "fail"."""
    # differences of decimal fractions, as 81.3 - 81.2, are not exact
    return "pass" if abs(difference(row, measured)) <= CODEBASES[row["codebase"]].tolerance + 1e-9 else "fail"


def exit_status(entries):
    statuses = {entry["status"] for entry in entries}
    return FAIL if "fail" in statuses else INCOMPLETE if statuses - {"pass"} else PASS


# ---------------------------------------------------------------------------------------------------------------------
# Reports

KINDS = {"status": str, "error": str, "tried": str, "measured": dict, "paper": dict, "params": int, "macs": int,
         "seconds": (int, float), "torch_build": str, "command": str, "depends": dict, "device": str, "nproc": int,
         "date": str}


def load_results(path, rows):
    """Entries of an earlier results.json by the rows' names. Raises: Mistake if it is damaged."""
    try:
        entries = read_json(path)["rows"] if path.exists() else {}
    except OSError as error:
        raise Mistake(f"{path} of an earlier run cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise Mistake(f"{path} of an earlier run is damaged: move it away") from error
    if not isinstance(entries, dict) or not all(
            is_entry(entries[row["name"]], CODEBASES[row["codebase"]]) for row in rows if row["name"] in entries):
        raise Mistake(f"{path} of an earlier run is damaged: move it away")
    return entries


def is_entry(entry, codebase):
    """Whether an entry is what `measure` writes."""
    if not isinstance(entry, dict) or "status" not in entry:
        return False
    finished = entry["status"] not in FINISHED or KINDS.keys() - {"error", "tried"} <= entry.keys()
    return finished and all(isinstance(entry[key], kind) for key, kind in KINDS.items() if key in entry) and (
        "measured" not in entry or all(is_number(entry["measured"].get(name)) for name in codebase.metrics)) and (
        "depends" not in entry or isinstance(entry["depends"].get("versions"), dict))


def write_atomically(path, text):
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_reports(out, rows, entries):
    """results.json, results.md and results.png of all rows of the table, measured now or earlier."""
    try:
        write_atomically(out / "results.json", json.dumps({"rows": entries}, indent=1, allow_nan=False))
        write_atomically(out / "results.md", markdown(rows, entries))
        draw(rows, entries, out / "results.png")
    except OSError as error:
        raise Mistake(f"{error.filename or out} cannot be written: {error.strerror}") from error


def shown(value, points, digits):
    """A metric in percent or AP points; pycocotools says -1 where there is no object of that size."""
    return "-" if value is None or value < 0 else f"{points * value:.{digits}f}"


def markdown(rows, entries):
    lines = ["# The paper's tables, measured", ""]
    for name, codebase in CODEBASES.items():
        own = [row for row in rows if row["codebase"] == name]
        if own:
            lines += [f"## {codebase.title}", "", *table(codebase, own, entries), ""]
    absent = [row for row in rows if entries.get(row["name"], {}).get("status") == "missing"]
    if absent:
        lines += ["## Missing checkpoints", "", *(f"- `{row['file']}`: <{row['url']}>" for row in absent), ""]
    for row in rows:
        entry = entries.get(row["name"], {})
        if entry.get("status") in (*FINISHED, "error"):
            lines += [f"## {row['name']}", "", *details(row, entry), ""]
    return "\n".join(lines)


def table(codebase, rows, entries):
    """Lines of the table of one codebase; each metric as measured (paper)."""
    heads = ["model", *codebase.labels, "difference", "#Params (M)", "MACs (M)", "result"]
    lines = [" | ".join(["", *heads, ""]).strip(), "| --- " * len(heads) + "|"]
    for row in rows:
        entry = entries.get(row["name"], {})
        finished = entry.get("status") in FINISHED
        measured = entry["measured"] if finished else {}
        cells = [f"{shown(measured.get(name), codebase.points, 2)} ({codebase.points * row[name]:.1f})"
                 for name in codebase.metrics]
        off = f"{difference(row, measured):+.2f}" if measured else "-"
        params, macs = (f"{entry[key] / 1e6:.{digits}f}" if finished else "-"
                        for key, digits in (("params", 2), ("macs", 0)))
        paper = [f" ({row[key]})" if key in row else "" for key in ("params_m", "macs_m")]
        cells += [off, params + paper[0], macs + paper[1], f"**{entry.get('status', 'not run')}**"]
        lines.append(" | ".join(["", row["name"], *cells, ""]).strip())
    return [*lines, "", f"Measured, and in brackets the paper's number; {codebase.labels[0]} may differ by "
            f"{codebase.tolerance} points. MACs are counted here, {codebase.macs}."]


def details(row, entry):
    """Lines on how a row was measured, or why it could not be."""
    if entry["status"] == "error":
        return [f"- error: {entry['error']}", *([f"- command: `{entry['tried']}`"] if "tried" in entry else [])]
    depends = entry["depends"]
    versions = ", ".join(f"{name} {version}" for name, version in
                         {**depends["versions"], "torch": entry["torch_build"]}.items())
    return [f"- command: `{entry['command']}`", f"- file: `{row['file']}`, sha256 `{depends.get('sha256')}`",
            f"- device: {entry['device']} ({depends.get('device')}), {entry['nproc']} process(es)",
            f"- versions: {versions}", f"- measured: {entry['date']}, took {entry['seconds']:.0f} s"]


def draw(rows, entries, path):
    """Difference to the paper of every row, with the band that passes."""
    from matplotlib.figure import Figure
    groups = [(codebase, [row for row in rows if row["codebase"] == name]) for name, codebase in CODEBASES.items()]
    groups = [(codebase, own) for codebase, own in groups if own]
    figure = Figure(figsize=(11, 1 + 0.9 * len(groups) + 0.4 * len(rows)), layout="constrained")
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=[len(own) + 1 for _, own in groups])[:, 0]
    for axes, (codebase, own) in zip(panels, groups, strict=True):
        draw_panel(axes, codebase, own, entries)
    figure.suptitle("Released checkpoints: measured minus the paper's number")
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, dpi=120, format="png")
    os.replace(temporary, path)


def draw_panel(axes, codebase, rows, entries):
    metric = codebase.metrics[0]
    axes.axvspan(-codebase.tolerance, codebase.tolerance, color="#999999", alpha=0.25, lw=0)
    axes.axvline(0, color="#555555", lw=1)
    reach = 3 * codebase.tolerance
    for y, row in enumerate(rows):
        entry = entries.get(row["name"], {})
        paper, status = f"paper {codebase.points * row[metric]:.1f}", entry.get("status", "not run")
        text = f"{status}, {paper}"
        if status in FINISHED:
            passed, off = status == "pass", difference(row, entry["measured"])
            axes.plot(off, y, "o" if passed else "X", color="#0072B2" if passed else "#D55E00", ms=9)
            text = f"{status}: {shown(entry['measured'][metric], codebase.points, 2)}, {paper}"
            reach = max(reach, 1.1 * abs(off))
        axes.text(1.01, y, text, transform=axes.get_yaxis_transform(), va="center",
                  color="black" if status in FINISHED else "#666666")
    axes.set(xlim=(-reach, reach), ylim=(len(rows) - 0.5, -0.5), yticks=range(len(rows)),
             yticklabels=[row["name"] for row in rows], xlabel=f"difference in {codebase.labels[0]} (points)",
             title=f"{codebase.title}; the band of ±{codebase.tolerance} passes")
    axes.grid(axis="x", alpha=0.3)


# ---------------------------------------------------------------------------------------------------------------------
# The two ways to walk the rows

def reproduce(args, table_rows, rows, lock):
    """Measure the rows; returns the exit status."""
    entries = load_results(args.output_dir / "results.json", table_rows)
    device_name = describe_device(args.device)
    write_reports(args.output_dir, table_rows, entries)  # that this cannot be done is known before hours of work
    for number, row in enumerate(rows, start=1):
        name, codebase = row["name"], CODEBASES[row["codebase"]]
        print(f"[{number}/{len(rows)}] {name}", flush=True)
        entries[name] = {**measure(row, args, device_name, entries.get(name, {}), lock),
                         "paper": {metric: row[metric] for metric in codebase.metrics}}
        write_reports(args.output_dir, table_rows, entries)
        print(summary(row, entries[name]), flush=True)
    print(f"reports: {args.output_dir}/results.md, results.json, results.png")
    return exit_status([entries[row["name"]] for row in rows])


def summary(row, entry):
    """The line that is printed when a row was walked."""
    codebase, status = CODEBASES[row["codebase"]], entry["status"]
    if status not in FINISHED:
        return {"missing": absent(row), "no data": f"no data: say --{codebase.data} DIR",
                "error": f"error: {entry.get('error')}"}[status]
    metric, label = codebase.metrics[0], codebase.labels[0]
    return (f"{status}: {label} {shown(entry['measured'][metric], codebase.points, 3)}, paper "
            f"{codebase.points * row[metric]:.1f}, difference {difference(row, entry['measured']):+.3f} of "
            f"±{codebase.tolerance}")


def absent(row):
    return f"missing: {row['file']}, to be had from {row['url']}"


def verify(args, rows):
    """Check the files of the rows; returns the exit status."""
    entries = []
    for row in rows:
        entry, text = verify_file(row, args.checkpoints / row["file"])
        entries.append(entry)
        print(f"{row['name']}: {text}", flush=True)
    return exit_status(entries)


def verify_file(row, path):
    """An entry with the status alone, and what is to be said of the file."""
    if path.exists() and not path.is_file():
        return {"status": "error"}, f"error: {path} is not a file"
    if not path.is_file():
        return {"status": "missing"}, absent(row)
    found = ask(row["codebase"], inspect_file, row, path)
    if "error" in found:
        return {"status": "error"}, f"error: {found['error']}"
    if "unfit" in found:
        return {"status": "fail"}, f"fail: {found['unfit']}"
    paper = f" (paper: {row['params_m']} M, {row['macs_m']} M)" if {"params_m", "macs_m"} <= row.keys() else ""
    return {"status": "pass"}, (f"pass: {found['params'] / 1e6:.2f} M parameters, {found['macs'] / 1e6:.0f} M MACs"
                                f"{paper}, sha256 {sha256(path)}")


def main(argv=None):
    args = parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
        signal.signal(signal.SIGHUP, signal.default_int_handler)
    try:
        table_rows = read_table(args.table)
        rows = select(table_rows, args.only)
        check(args, rows)
        if args.verify:
            return verify(args, rows)
        with locked(args.output_dir) as lock:
            return reproduce(args, table_rows, rows, lock)
    except Mistake as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is left in the buffer
        return leave()
    except KeyboardInterrupt:
        leave()
        print("interrupted" + ("" if args.verify else f"; what was finished is in {args.output_dir}, and the same "
                               "command goes on"), file=sys.stderr)
        return INTERRUPTED


def leave():
    """End the processes that look at files, which nothing interrupts."""
    ignore_signals()
    for child in multiprocessing.active_children():
        child.terminate()
    return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
