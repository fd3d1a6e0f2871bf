"""Measure the nine released checkpoints and compare them with the paper's tables.

    python reproduce.py --imagenet DIR --coco DIR --checkpoints DIR --nproc 8
    python reproduce.py --checkpoints DIR --verify

--imagenet holds val/ or val.tar, --coco holds annotations/instances_val2017.json and val2017/ or val2017.zip,
--checkpoints holds the files under their released names. Nothing is downloaded. Each checkpoint is evaluated by its
codebase's own main.py. OUT/results.json, results.md and results.png are written after every row; a row is measured
again only if its file, data, flags, code or libraries changed, so that the same command goes on where it was stopped.
--verify needs no data: it loads every file, compares keys and shapes with the model, and counts parameters and MACs.

Exit status: 0 all rows passed, 1 one failed, 2 the command line is wrong, 3 none failed but some could not be measured
(no file, or no data set given), 130 stopped by Ctrl-C or SIGTERM.
"""
import argparse
import datetime
import fnmatch
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
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
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parent
PASS, FAIL, USAGE, INCOMPLETE, INTERRUPTED = 0, 1, 2, 3, 130
LIBRARIES = ("torch", "torchvision", "timm", "pycocotools", "rpe_ops")
FINISHED = ("pass", "fail")


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


CODEBASES = {
    "deit": Codebase("DeiT on ImageNet-1K", ROOT / "DeiT-with-iRPE", "imagenet", ("top1", "top5"), ("top-1", "top-5"),
                     1.0, 0.1),
    "detr": Codebase("DETR on COCO val2017", ROOT / "DETR-with-iRPE", "coco",
                     ("ap", "ap50", "ap75", "aps", "apm", "apl"), ("AP", "AP50", "AP75", "APS", "APM", "APL"), 100.0,
                     0.2),
}


class Mistake(Exception):
    """What is wrong with the command line, as one sentence."""


# ---------------------------------------------------------------------------------------------------------------------
# What was asked for

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--imagenet", type=Path, metavar="DIR")
    parser.add_argument("--coco", type=Path, metavar="DIR")
    parser.add_argument("--checkpoints", type=Path, metavar="DIR", required=True)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these rows; *, ? and [] match as in a shell")
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="processes, one a GPU")
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs", "reproduce"), metavar="OUT")
    parser.add_argument("--verify", action="store_true", help="only check the files")
    parser.add_argument("--deit_args", type=shlex.split, default=[], metavar="FLAGS",
                        help="more flags for DeiT's main.py, as one word: --deit_args='--batch-size 256'")
    parser.add_argument("--detr_args", type=shlex.split, default=[], metavar="FLAGS", help="the same for DETR's")
    parser.add_argument("--table", type=Path, default=ROOT / "released.json", metavar="FILE",
                        help="rows and numbers to compare with, in the form of released.json")
    return parser.parse_args(argv)


def read_table(path):
    """Rows of a table file as dicts, with their `codebase`."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Mistake(f"--table {path} cannot be read: {error}") from error
    return [{"codebase": name, **row} for name in CODEBASES for row in table.get(name, [])]


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
    if args.verify:
        return
    if not any(getattr(args, CODEBASES[row["codebase"]].data) for row in rows):
        needed = sorted({f"--{CODEBASES[row['codebase']].data} DIR" for row in rows}, reverse=True)
        raise Mistake(f"there is no data to measure on: say {' and '.join(needed)}, or --verify to check files only")
    if args.imagenet and not any((args.imagenet / name).exists() for name in ("val", "val.tar")):
        raise Mistake(f"--imagenet {args.imagenet} has neither val/ nor val.tar")
    if args.coco and not (args.coco / "annotations" / "instances_val2017.json").is_file():
        raise Mistake(f"--coco {args.coco} has no annotations/instances_val2017.json")
    if not importlib.util.find_spec("matplotlib"):
        raise Mistake("results.png needs matplotlib: python -m pip install matplotlib")
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Mistake(f"--output_dir {args.output_dir} cannot be made: {error.strerror}") from error


# ---------------------------------------------------------------------------------------------------------------------
# In a process for each codebase, because both have modules of the same names

def cuda_name():
    """{"device": name of the GPU}, or {"error": sentence}."""
    import torch
    if not torch.cuda.is_available():
        return {"error": "--device cuda needs a GPU and PyTorch finds none: say --device cpu"}
    return {"device": torch.cuda.get_device_name(0)}


def build_deit(row):
    """(model, picture size, its module of checkpoint functions)"""
    import runtime
    from rpe_models import create_model
    return create_model(row["name"]), (224, 224), runtime


def build_detr(row):
    """As `build_deit`; DETR's MACs are counted at 800×1088 pixels, a common size of a picture of COCO."""
    import main
    from models import build_model
    from util import runtime
    flags = ["--enc_rpe2d", row["enc_rpe2d"], "--num_classes", "91", "--eval"]
    return build_model(main.get_args_parser().parse_args(flags))[0], (800, 1088), runtime


def inspect_file(row, path):
    """What is to be known of a file without data: {"params", "macs"} as counts, "torch_build"; or {"error": sentence}.

    The model is made without memory ("meta"), so the MACs (multiplications of matrices and convolutions) are counted
    from shapes alone.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    if (folder := str(CODEBASES[row["codebase"]].folder)) not in sys.path:
        sys.path.insert(0, folder)
    with torch.device("meta"):
        model, size, runtime = {"deit": build_deit, "detr": build_detr}[row["codebase"]](row)
        # PyTorch's fused attention would not be counted on every device
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model.eval().requires_grad_(False)(torch.zeros(1, 3, *size))
    try:
        weights = runtime.model_weights(runtime.load_checkpoint(path), path)
    except runtime.UserError as error:
        return {"error": str(error)}
    expected, found = ({key: value for key, value in values.items() if not key.endswith("num_batches_tracked")}
                       for values in (model.state_dict(), weights))
    if differences := runtime.key_differences(expected, found):
        return {"error": f"{path.name} does not fit {row['name']}: {differences}"}
    return {"params": sum(p.numel() for p in model.parameters()), "macs": counter.get_total_flops() // 2,
            "torch_build": torch.__version__}


@functools.cache
def helper(codebase):
    """The process that looks at a codebase's files; Ctrl-C is for its parent."""
    return ProcessPoolExecutor(1, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN))


def ask(codebase, function, *arguments):
    """Result of a function in the codebase's process; {"error": sentence} if that dies."""
    try:
        return helper(codebase).submit(function, *arguments).result()
    except BrokenProcessPool:
        helper.cache_clear()
        return {"error": f"the process of {function.__name__} was killed, perhaps for lack of memory"}


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


def evaluate(row, command, out):
    """Run the command; {"measured": metrics by name, "seconds"} or {"error": sentence}. Its output goes to ours."""
    codebase, result, started = CODEBASES[row["codebase"]], out / row["name"] / "eval.json", time.monotonic()
    result.unlink(missing_ok=True)
    with subprocess.Popen([sys.executable, *command[1:]], cwd=codebase.folder, stderr=subprocess.PIPE, text=True,
                          errors="replace") as process:
        try:
            said = []
            for line in process.stderr:
                print(line, end="", file=sys.stderr, flush=True)
                said.append(line.rstrip())
            status = process.wait()
        finally:  # the launcher ends its processes when it is told to end
            if process.poll() is None:
                process.terminate()
    if status or not result.is_file():
        return {"error": last_error(said) or f"the evaluation ended with status {status} and no result"}
    stats = json.loads(result.read_text())
    values = stats["coco_eval_bbox"] if row["codebase"] == "detr" else [stats["acc1"], stats["acc5"]]
    return {"measured": dict(zip(codebase.metrics, values, strict=False)), "seconds": time.monotonic() - started}


def last_error(lines):
    """The last line that says what went wrong, not the report that the launcher adds to it."""
    own = [line for line in lines if line.startswith("error: ")]
    raised = [re.sub(r"^\[rank\d+\]: ", "", line) for line in lines
              if re.match(r"(\[rank\d+\]: )?[\w.]*(Error|Exception)\b", line) and "ChildFailedError" not in line]
    killed = re.findall(r"exitcode: -(\d+)", "\n".join(lines))
    if own or raised:
        return (own or raised)[-1].removeprefix("error: ")
    return f"a process was ended by signal {killed[-1]}, perhaps for lack of memory" if killed else ""


def measure(row, args, device_name, old):
    """The row's entry in results.json; `old` is the one that is there, {} if none."""
    codebase, path = CODEBASES[row["codebase"]], args.checkpoints / row["file"]
    if not path.is_file() or not getattr(args, codebase.data):
        # what was measured before stays for when they are back
        return {**old, "status": "no data" if path.is_file() else "missing"}
    try:
        depends = dependencies(row, args, path)
    except OSError as error:
        return {"status": "fail", "error": f"{error.filename} cannot be read: {error.strerror}"}
    if old.get("depends") == depends and "measured" in old:
        print("kept: measured before with the same file, data, flags, code and libraries")
        return {**old, **judge(row, old["measured"])}
    found = ask(row["codebase"], inspect_file, row, path)
    if "error" not in found:
        command = command_of(row, args, path)
        found["command"] = f"cd {codebase.folder.name} && {shlex.join(command)}"
        print(f"$ {found['command']}", flush=True)
        found.update(evaluate(row, command, args.output_dir))
    entry = {**found, "depends": depends, "device": device_name, "nproc": args.nproc,
             "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds")}
    return {**entry, **(judge(row, entry["measured"]) if "measured" in entry else {"status": "fail"})}


def judge(row, measured):
    """Status and the difference to the paper in points."""
    codebase = CODEBASES[row["codebase"]]
    metric = codebase.metrics[0]
    difference = codebase.points * (measured[metric] - row[metric])
    # differences of decimal fractions, as 81.3 - 81.2, are not exact
    return {"status": "pass" if abs(difference) <= codebase.tolerance + 1e-9 else "fail", "difference": difference}


def exit_status(entries):
    statuses = {entry["status"] for entry in entries}
    return FAIL if "fail" in statuses else INCOMPLETE if statuses - {"pass"} else PASS


# ---------------------------------------------------------------------------------------------------------------------
# Reports

def load_results(path):
    """Entries of an earlier results.json by the rows' names."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else {}
    except (OSError, ValueError, KeyError) as error:
        raise Mistake(f"{path} of an earlier run cannot be read ({error!r}): move it away") from error


def write_atomically(path, text):
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_reports(out, rows, entries):
    """results.json, results.md and results.png of all rows of the table, measured now or earlier."""
    try:
        write_atomically(out / "results.json", json.dumps({"rows": entries}, indent=1))
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
        if entry.get("status") in FINISHED:
            lines += [f"## {row['name']}", "", *details(row, entry), ""]
    return "\n".join(lines)


def table(codebase, rows, entries):
    """Lines of the table of one codebase; each metric as measured (paper)."""
    heads = ["model", *codebase.labels, "difference", "#Params (M)", "MACs (M)", "result"]
    lines = [" | ".join(["", *heads, ""]).strip(), "| --- " * len(heads) + "|"]
    for row in rows:
        entry = entries.get(row["name"], {})
        finished = entry.get("status") in FINISHED
        measured = entry.get("measured", {}) if finished else {}
        cells = [f"{shown(measured.get(name), codebase.points, 2)} ({codebase.points * row[name]:.1f})"
                 for name in codebase.metrics]
        difference = f"{entry['difference']:+.2f}" if measured else "-"
        params, macs = (f"{entry[key] / 1e6:.{digits}f}" if finished and key in entry else "-"
                        for key, digits in (("params", 2), ("macs", 0)))
        paper = [f" ({row[key]})" if key in row else "" for key in ("params_m", "macs_m")]
        cells += [difference, params + paper[0], macs + paper[1], f"**{entry.get('status', 'not run')}**"]
        lines.append(" | ".join(["", row["name"], *cells, ""]).strip())
    return [*lines, "", f"Measured, and in brackets the paper's number; {codebase.labels[0]} may differ by "
            f"{codebase.tolerance} points."]


def details(row, entry):
    depends = entry.get("depends", {})
    versions = {**depends.get("versions", {}), **({"torch": entry["torch_build"]} if "torch_build" in entry else {})}
    pairs = {"error": entry.get("error"), "command": entry.get("command") and f"`{entry['command']}`",
             "file": f"`{row['file']}`, sha256 `{depends.get('sha256', '-')}`",
             "device": entry.get("device") and f"{entry['device']} ({depends['device']}), {entry['nproc']} process(es)",
             "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
             "measured": entry.get("date")
             and entry["date"] + (f", took {entry['seconds']:.0f} s" if "seconds" in entry else "")}
    return [f"- {name}: {value}" for name, value in pairs.items() if value]


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
        if status in FINISHED and "measured" in entry:
            passed, difference = status == "pass", entry["difference"]
            axes.plot(difference, y, "o" if passed else "X", color="#0072B2" if passed else "#D55E00", ms=9)
            text = f"{status}: {shown(entry['measured'][metric], codebase.points, 2)}, {paper}"
            reach = max(reach, 1.1 * abs(difference))
        axes.text(1.01, y, text, transform=axes.get_yaxis_transform(), va="center",
                  color="black" if status in FINISHED else "#666666")
    axes.set(xlim=(-reach, reach), ylim=(len(rows) - 0.5, -0.5), yticks=range(len(rows)),
             yticklabels=[row["name"] for row in rows], xlabel=f"difference in {codebase.labels[0]} (points)",
             title=f"{codebase.title}; the band of ±{codebase.tolerance} passes")
    axes.grid(axis="x", alpha=0.3)


# ---------------------------------------------------------------------------------------------------------------------
# The two ways to walk the rows

def reproduce(args, table_rows, rows):
    """Measure the rows; returns the exit status."""
    device_name = describe_device(args.device)
    entries = load_results(args.output_dir / "results.json")
    for number, row in enumerate(rows, start=1):
        name, codebase = row["name"], CODEBASES[row["codebase"]]
        print(f"[{number}/{len(rows)}] {name}", flush=True)
        entries[name] = {**measure(row, args, device_name, entries.get(name, {})),
                         "paper": {metric: row[metric] for metric in codebase.metrics}}
        write_reports(args.output_dir, table_rows, entries)
        print(summary(row, entries[name]), flush=True)
    print(f"reports: {args.output_dir}/results.md, results.json, results.png")
    return exit_status([entries[row["name"]] for row in rows])


def summary(row, entry):
    codebase, status = CODEBASES[row["codebase"]], entry["status"]
    if status == "missing":
        return absent(row)
    if status == "no data":
        return f"no data: say --{codebase.data} DIR"
    if "error" in entry:
        return f"fail: {entry['error']}"
    metric, label = codebase.metrics[0], codebase.labels[0]
    return (f"{status}: {label} {shown(entry['measured'][metric], codebase.points, 3)}, paper "
            f"{codebase.points * row[metric]:.1f}, difference {entry['difference']:+.3f} of ±{codebase.tolerance}")


def absent(row):
    return f"missing: {row['file']}, to be had from {row['url']}"


def verify(args, rows):
    """Check the files of the rows; returns the exit status."""
    entries = []
    for row in rows:
        path = args.checkpoints / row["file"]
        entry = ask(row["codebase"], inspect_file, row, path) if path.is_file() else {"status": "missing"}
        entries.append({"status": "fail" if "error" in entry else "pass", **entry})
        if path.is_file() and "error" not in entry:
            paper = f" (paper: {row['params_m']} M, {row['macs_m']} M)" if "params_m" in row else ""
            text = f"pass: {entry['params'] / 1e6:.2f} M parameters, {entry['macs'] / 1e6:.0f} M MACs{paper}, sha256 " \
                   f"{sha256(path)}"
        else:
            text = f"fail: {entry['error']}" if path.is_file() else absent(row)
        print(f"{row['name']}: {text}", flush=True)
    return exit_status(entries)


def main(argv=None):
    args = parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        table_rows = read_table(args.table)
        rows = select(table_rows, args.only)
        check(args, rows)
        return verify(args, rows) if args.verify else reproduce(args, table_rows, rows)
    except Mistake as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print(f"interrupted; what was finished is in {args.output_dir}, and the same command goes on", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
