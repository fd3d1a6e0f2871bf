"""Train variants of a model with the same seeds, several at a time, and say with 95 % intervals how they differ.

    python tools/ablate.py --data-path outputs/fashion/tune --test-path outputs/fashion/test --device cpu --jobs 2
    python tools/ablate.py --study mine.json --data-path DIR --data-set CIFAR -- --input-size 32 --epochs 100

Each run is two command lines of DeiT's main.py, which are printed and work alone: training on --data-path, and one
evaluation on --test-path (--data-path if it is left out). Flags after -- go to both. The study is a JSON file in the
form of ablate_fashion.json. After every run results.json, results.md and results.png are written to OUT, or to
outputs/ablate. The same command goes on where it was stopped; a run that was cut off goes on by --resume auto, on a
CPU to the same digits.

Exit status: 0 all runs are counted; 2 the command line or the study is wrong; 3 some runs failed; 130 stopped by a
signal or a closed pipe.
"""

import argparse
import fnmatch
import json
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

import drawing
import reproduce
from scipy.stats import t

import runtime
from runtime import UserError

DEIT = drawing.ROOT / "DeiT-with-iRPE"


# What was asked for


def parse_args(argv=None):
    parser = runtime.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, metavar="FILE", default=Path(__file__).with_name("ablate_fashion.json"))
    parser.add_argument("--data-path", type=Path, metavar="DIR", required=True, help="of training")
    parser.add_argument("--test-path", type=Path, metavar="DIR", help="of the evaluation that is counted")
    parser.add_argument("--data-set", default="FOLDER", help="as main.py's")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time, which share out the cores")
    parser.add_argument("--output_dir", type=Path, metavar="OUT", default=Path("outputs", "ablate"))
    parser.add_argument("more", nargs="*", metavar="FLAG", help="more for main.py, after --")
    args = parser.parse_args(argv)
    args.test_path = args.test_path or args.data_path
    return args


def read_study(path):
    """The study as a dict, the sides of its comparisons as lists of names. Raises: UserError if it cannot be used."""
    try:
        study = json.loads(path.read_text(encoding="utf-8"))
        names, seeds = [*study["variants"]], study["seeds"]
        _ = [shlex.split("" + flags) for flags in (study["recipe"], *study["variants"].values())]
        study["comparisons"] = {
            words: (match(left, names), match(right, names)) for words, (left, right) in study["comparisons"].items()
        }
        fit = study["baseline"] in names and seeds and len({*map(int, seeds)}) == len(seeds)
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        raise UserError(f"--study {path} cannot be read in the form of ablate_fashion.json: {error!r}") from error
    if not fit:
        raise UserError(f"--study {path} must have a seed, each once, and a baseline that is one of its variants")
    if unfit := [name for name in names if not re.fullmatch(r"[\w.-]+", name)]:
        raise UserError(f"--study {path} has a variant {unfit[0]!r}: names are letters, digits, '.', '_' and '-'")
    return study


def match(patterns, names):
    """The names that one of the patterns, with spaces between, matches as in a shell."""
    found = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns.split())]
    if not found:
        raise ValueError(f"a comparison of {patterns!r}, which matches no variant")
    return found


# Runs


class Run:
    """One variant with one seed: two commands in a row. `record` is what its run.json holds."""

    process = None  # the running one

    def __init__(self, study, variant, seed, args, versions):
        def relative(path):  # to where main.py runs, so that a command names no place that only this machine has
            return os.path.relpath(path, DEIT)

        self.name = f"{variant}-seed{seed}"
        self.folder = args.output_dir / self.name
        flags = [
            "--data-set",
            args.data_set,
            "--device",
            args.device,
            *shlex.split(study["recipe"]),
            *args.more,
            *shlex.split(study["variants"][variant]),
            "--seed",
            str(seed),
            "--output_dir",
            relative(self.folder),
        ]
        train = ["--data-path", relative(args.data_path), "--resume", "auto"]
        test = ["--data-path", relative(args.test_path), "--eval", "--resume", relative(self.folder / "checkpoint.pth")]
        self.commands = [shlex.join(["python", "main.py", *flags, *last]) for last in (train, test)]
        self.waiting = [*self.commands]
        self.record = {"variant": variant, "seed": seed, "commands": self.commands, "versions": versions, "seconds": 0}
        self.take_up(self.folder / "run.json")

    def take_up(self, path):
        """Go on from what an earlier run of the same commands has left. Raises: UserError if it was of others."""
        if not path.exists():
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            changed = [key for key in ("commands", "versions") if found[key] != self.record[key]]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} of an earlier run cannot be read ({error!r}): move its folder away") from error
        if changed:
            raise UserError(
                f"{path} is of a run by other {' and '.join(changed)}: choose another --output_dir, or "
                "move its folder away"
            )
        self.record = found

    def start(self, threads, locked):
        """Start the next command; what it says is in output.txt."""
        command, self.process = self.waiting.pop(0), None
        print(f"$ cd {DEIT.name} && OMP_NUM_THREADS={threads} {command}", flush=True)
        self.record["threads"] = threads
        with runtime.writing(self.folder):
            self.folder.mkdir(exist_ok=True)
            self.write()  # before the process: what fails here must not leave one behind
            output = open(self.folder / "output.txt", "wb")
        self.started = time.monotonic()
        # Ctrl-C must not reach the process, which saves on SIGTERM only: it gets a session of its own
        with output, reproduce.signals_deferred():
            self.process = subprocess.Popen(
                [sys.executable, *shlex.split(command)[1:]],
                cwd=DEIT,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                pass_fds=[locked.fileno()],
            )

    def write(self):
        with runtime.replacing(self.folder / "run.json") as file:
            file.write(json.dumps(self.record, indent=1).encode())

    def end(self):
        """Note the time of a process that has ended, and write the record."""
        self.record["seconds"] += time.monotonic() - self.started
        self.write()

    def judge(self):
        """Note the result of the process that has ended; returns whether the run is over."""
        self.record.pop("failed", None)
        if self.process.returncode:
            said = (self.folder / "output.txt").read_text(encoding="utf-8", errors="replace")
            self.record["failed"] = (
                reproduce.error_in(said) or said.strip().rpartition("\n")[2] or f"status {self.process.returncode}"
            )
        elif not self.waiting:
            stats = json.loads((self.folder / "eval.json").read_text(encoding="utf-8"))
            self.record.update(top1=stats["acc1"], loss=stats["loss"], date=time.strftime("%Y-%m-%dT%H:%M:%S%z"))
        self.end()
        return "failed" in self.record or not self.waiting

    def __str__(self):
        if "top1" in self.record:
            return f"{self.name}: top-1 {self.record['top1']:.2f} in {self.record['seconds']:.0f} s"
        return f"{self.name} failed: {self.record['failed']}"


def work(runs, jobs, locked, report):
    """Do the runs in their order, `jobs` at a time, and call report() after each. When it is stopped so are they."""
    # macOS cannot tell which cores are ours
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = max(1, cores // jobs)
    waiting, running = [run for run in runs if "top1" not in run.record], []
    left = len(waiting)
    try:
        while left:
            while waiting and len(running) < jobs:
                running.append(waiting.pop(0))
                running[-1].start(threads, locked)
            for run in [run for run in running if run.process.poll() is not None]:
                if run.judge():
                    running.remove(run)
                    left -= 1
                    print(f"[{len(runs) - left}/{len(runs)}] {run}", flush=True)
                    report()
                else:
                    run.start(threads, locked)
            time.sleep(0.1)
    finally:
        running = [run for run in running if run.process]
        if running:
            reproduce.ignore_signals()
        for run in running:
            run.process.terminate()
        for run in running:
            run.process.wait()
            run.end()


# Results


def summary(values):
    """Mean of the values and half of its 95 % interval by Student's t; None for what takes more values."""
    n = len(values)
    half = t.ppf(0.975, n - 1) * statistics.stdev(values) / math.sqrt(n) if n > 1 else None
    return {"values": values, "mean": statistics.fmean(values) if n else None, "half": half}


def difference(top1, left, right):
    """Summary of the mean of the variants `left` less that of `right`, by the seeds that all have in `top1`."""
    seeds = sorted(set.intersection(*(set(top1[name]) for name in (*left, *right))))
    return summary(
        [
            statistics.fmean(top1[name][seed] for name in left) - statistics.fmean(top1[name][seed] for name in right)
            for seed in seeds
        ]
    )


def summarize(study, runs):
    """{"variants", "comparisons"} of the runs that are counted, in points of top-1 and in minutes."""
    top1, minutes = ({name: {} for name in study["variants"]} for _ in range(2))
    for record in (run.record for run in runs if "top1" in run.record):
        top1[record["variant"]][record["seed"]] = record["top1"]
        minutes[record["variant"]][record["seed"]] = record["seconds"] / 60
    return {
        "variants": {
            name: {
                "top1": summary([*top1[name].values()]),
                "minutes": summary([*minutes[name].values()]),
                "difference": difference(top1, [name], [study["baseline"]]),
            }
            for name in top1
        },
        "comparisons": {words: difference(top1, *sides) for words, sides in study["comparisons"].items()},
    }


def write_reports(out, study, runs, about):
    """results.json, results.md and results.png of the runs that are counted."""
    found = {
        "study": study,
        **about,
        **summarize(study, runs),
        "runs": [{key: value for key, value in run.record.items() if key != "versions"} for run in runs],
    }
    with runtime.replacing(out / "results.json") as file:
        file.write(json.dumps(found, indent=1).encode())
    with runtime.writing(out / "results.md"):
        (out / "results.md").write_text(markdown(study, runs, found, about), encoding="utf-8")
    draw(study, found["variants"], out / "results.png")


def cells(values):
    """Mean ± half of the interval, and on which side of zero the interval is."""
    mean, half = values["mean"], values["half"]
    if half is None:
        return "-" if mean is None else f"{mean:+.2f}", "-"
    return f"{mean:+.2f} ± {half:.2f}", "not told apart" if abs(mean) <= half else "higher" if mean > 0 else "lower"


def markdown(study, runs, found, about):
    def table(*rows):
        return [
            "",
            f"| {' | '.join(rows[0])} |",
            "| --- " * len(rows[0]) + "|",
            *(f"| {' | '.join(row)} |" for row in rows[1:]),
        ]

    baseline, rows = study["baseline"], []
    for name, entry in found["variants"].items():
        minutes = entry["minutes"]["mean"]
        change = ("", "") if name == baseline else cells(entry["difference"])
        rows.append(
            (
                name,
                str(len(entry["top1"]["values"])),
                cells(entry["top1"])[0].removeprefix("+"),
                *change,
                f"{minutes:.1f}" if minutes else "-",
            )
        )
    counted = sum("top1" in run.record for run in runs)
    lines = [
        f"{counted} of {len(runs)} runs are counted. Top-1 (%) and differences in points, paired by seed: mean "
        "± half of the 95 % interval by Student's t.",
        *table(("variant", "seeds", "top-1", f"less {baseline}", "", "minutes a run"), *rows),
        *table(
            ("comparison", "difference", ""),
            *((words, *cells(values)) for words, values in found["comparisons"].items()),
        ),
        "",
        *(f"- {key}: {value}" for key, value in about.items()),
        *(f"- not counted: {run}" for run in runs if "failed" in run.record),
        "",
    ]
    return "\n".join(lines)


def draw(study, variants, path):
    """Top-1 of every variant and its difference to the baseline: each seed, and the mean with its interval."""
    figure = drawing.new_figure(11, 1.5 + 0.3 * len(variants))
    panels = figure.subplots(1, 2, sharey=True)
    for axes, key in zip(panels, ("top1", "difference"), strict=True):
        for place, entry in enumerate(variants.values()):
            values = entry[key]
            axes.plot(values["values"], [place] * len(values["values"]), ".", color=drawing.COLORS[4])
            if values["mean"] is not None:
                axes.errorbar(
                    values["mean"], place, xerr=values["half"] or 0, fmt="o", color=drawing.COLORS[0], capsize=3
                )
        axes.grid(axis="x", alpha=0.3)
    panels[0].set(
        xlabel="top-1 (%)", ylim=(len(variants) - 0.5, -0.5), yticks=range(len(variants)), yticklabels=variants
    )
    panels[1].set(xlabel=f"difference to {study['baseline']} with the same seed (points)")
    panels[1].axvline(0, color="#666666", lw=1)
    drawing.save(figure, path)


def run(args):
    """Do what was asked for; returns the exit status."""
    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs} must be at least 1")
    study = read_study(args.study)
    versions = reproduce.versions()
    about = {"device": reproduce.device_name(args.device), **versions}
    with reproduce.lock(args.output_dir) as locked:
        runs = [Run(study, variant, seed, args, versions) for seed in study["seeds"] for variant in study["variants"]]

        def report():
            write_reports(args.output_dir, study, runs, about)

        report()
        work(runs, args.jobs, locked, report)
    print(f"reports: {args.output_dir}/results.md, results.json, results.png", flush=True)
    return reproduce.PASS if all("top1" in run.record for run in runs) else reproduce.INCOMPLETE


def main(argv=None):
    return reproduce.guarded(run, parse_args(argv), "interrupted; the same command goes on where it was stopped")


if __name__ == "__main__":
    sys.exit(main())
