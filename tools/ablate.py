"""Train variants of a model with the same seeds, and report which claims about them the results support.

    python tools/ablate.py --data-path outputs/fashion/tune --test-path outputs/fashion/test --device cpu --jobs 2
    python tools/ablate.py --study mine.json --data-path DIR --data-set CIFAR -- --input-size 32 --epochs 100

Each run consists of two commands of DeiT's main.py, which also work on their own: training on --data-path, and one
evaluation on --test-path (default: --data-path). All variants of a seed run in one process of train_together.py, which
loads each batch once for all of them; on a CPU, the results are bit-identical to those of separate runs. With
--stacked, which is meant for GPUs, the whole study runs in one process of train_stacked.py, which computes all seeds of
a variant as one model; the results equal those of separate runs up to rounding. With --separately each run has a
process of its own, for studies whose variants differ in more than the model and the optimizer.

Flags after -- are passed to all commands. The study is a JSON file in the format of ablate_fashion.json. After every
process, results.json, results.md and results.png are written to --output_dir. The same command resumes an interrupted
study; on a CPU, its results are bit-identical to those of an uninterrupted one.

A claim is a comparison of variants, paired by seed, that is tested by Student's t. Holm's method corrects for the
number of claims: it keeps the probability of at least one false positive at or below 5 %.

Exit status: 0 all runs have a result; 2 the command line or the study is wrong; 3 some runs failed; 130 interrupted by
a signal or a closed pipe.
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
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TextIO

import drawing
import reproduce
from scipy.stats import t

import runtime
from runtime import UserError

DEIT = drawing.ROOT / "DeiT-with-iRPE"
TRAIN_TOGETHER = Path(__file__).with_name("train_together.py")
TRAIN_STACKED = Path(__file__).with_name("train_stacked.py")
ERROR_RATE = 0.05  # largest probability of at least one false positive (the family-wise error rate)
POWER = 0.8  # probability of finding a difference of the detectable size


# Command line and study


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, `sys.argv` by default."""
    parser = runtime.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, metavar="FILE", default=Path(__file__).with_name("ablate_fashion.json"))
    parser.add_argument("--data-path", type=Path, metavar="DIR", required=True, help="data set for training")
    parser.add_argument("--test-path", type=Path, metavar="DIR", help="data set for the evaluation")
    parser.add_argument("--data-set", default="FOLDER", help="as for main.py")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="parallel processes, which share the cores")
    processes = parser.add_mutually_exclusive_group()
    processes.add_argument("--separately", action="store_true", help="one process per run instead of one per seed")
    processes.add_argument(
        "--stacked", action="store_true", help="one process for all runs; the seeds of a variant are one stacked model"
    )
    parser.add_argument("--output_dir", type=Path, metavar="OUT", default=Path("outputs", "ablate"))
    parser.add_argument("more", nargs="*", metavar="FLAG", help="additional flags for main.py, after --")
    args = parser.parse_args(argv)
    args.test_path = args.test_path or args.data_path
    return args


def read_study(path: Path) -> dict[str, Any]:
    """Read a study, with the sides of its comparisons as lists of names. Raises: UserError if it is invalid."""
    try:
        study = json.loads(path.read_text(encoding="utf-8"))
        names, seeds = list(study["variants"]), study["seeds"]
        for flags in (study["recipe"], *study["variants"].values()):
            if not isinstance(flags, str):
                raise TypeError(f"flags must be a string, not {flags!r}")
            shlex.split(flags)
        environment = study.setdefault("environment", {})
        if not all(isinstance(word, str) for pair in environment.items() for word in pair):
            raise TypeError(f"environment must consist of strings, not {environment!r}")
        study["comparisons"] = {
            words: (match(left, names), match(right, names)) for words, (left, right) in study["comparisons"].items()
        }
        seeds_differ = len({int(seed) for seed in seeds}) == len(seeds)
        is_complete = bool(seeds) and seeds_differ and study["baseline"] in names
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        raise UserError(f"--study {path} cannot be read in the format of ablate_fashion.json: {error!r}") from error
    if not is_complete:
        raise UserError(f"--study {path} must have seeds, each only once, and a baseline that is one of its variants")
    if unusable := [name for name in names if not re.fullmatch(r"[\w.-]+", name)]:
        raise UserError(
            f"--study {path} has a variant {unusable[0]!r}: names consist of letters, digits, '.', '_' and '-'"
        )
    return study


def match(patterns: str, names: list[str]) -> list[str]:
    """The names that match one of the shell patterns, which are separated by spaces.

    Raises: ValueError if there is none.
    """
    found = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns.split())]
    if not found:
        raise ValueError(f"the comparison of {patterns!r} matches no variant")
    return found


# Runs


def relative(path: Path) -> str:
    """The path from main.py's folder, so that the printed commands work on any machine."""
    return os.path.relpath(path, DEIT)


class Run:
    """One variant with one seed: a training and an evaluation. `record` is the content of its run.json."""

    def __init__(
        self, study: dict[str, Any], variant: str, seed: int, args: argparse.Namespace, versions: dict[str, str]
    ) -> None:
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
        self.record = {
            "variant": variant,
            "seed": seed,
            "commands": self.commands,
            "environment": study["environment"],
            "versions": versions,
            "seconds": 0,
        }
        self.load_record(self.folder / "run.json")

    def load_record(self, path: Path) -> None:
        """Continue from the record of an earlier run. Raises: UserError if its commands or versions differ."""
        if not path.exists():
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            settled = ("commands", "environment", "versions")
            found.setdefault("environment", {})  # records of older versions lack it
            changed = [key for key in settled if found[key] != self.record[key]]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} of an earlier run cannot be read ({error!r}): move its folder away") from error
        if changed:
            raise UserError(
                f"{path} records a run with different {' and '.join(changed)}: choose another --output_dir, or move "
                "its folder away"
            )
        self.record = found

    @property
    def is_done(self) -> bool:
        """Whether the run has a result."""
        return "top1" in self.record

    def prepare(self, threads: int) -> None:
        """Create the folder with the record, and remove the result of an attempt that was not recorded."""
        self.record["threads"] = threads
        self.folder.mkdir(exist_ok=True)
        (self.folder / "eval.json").unlink(missing_ok=True)
        self.write()

    def write(self) -> None:
        """Write the record."""
        with runtime.replacing(self.folder / "run.json") as file:
            file.write(json.dumps(self.record, indent=1).encode())

    def record_result(self, output: str, error: str) -> None:
        """Record the result, or why there is none.

        Args:
            output: of the process that has ended.
            error: of the whole process, for a run without an error of its own.
        """
        self.record.pop("failed", None)
        result = self.folder / "eval.json"
        try:
            stats = json.loads(result.read_text(encoding="utf-8"))
            self.record.update(top1=stats["acc1"], loss=stats["loss"], date=time.strftime("%Y-%m-%dT%H:%M:%S%z"))
        except FileNotFoundError:
            own_error = re.search(f"^error: {re.escape(relative(self.folder))}: (.*)", output, re.MULTILINE)
            self.record["failed"] = own_error[1] if own_error else error
        except (OSError, ValueError, TypeError, KeyError) as problem:
            self.record["failed"] = f"{result} cannot be read: {problem!r}"

    def __str__(self) -> str:
        if self.is_done:
            return f"{self.name}: top-1 {self.record['top1']:.2f} in {self.record['seconds']:.0f} s"
        return f"{self.name} failed: {self.record['failed']}"


class Group:
    """The runs of one process, and their folder for its commands and its output."""

    process: subprocess.Popen | None = None

    def __init__(self, name: str, runs: list[Run], out: Path, program: Path) -> None:
        self.program = program
        self.runs = [run for run in runs if not run.is_done]
        self.folder = out / name
        self.environment = runs[0].record["environment"]

    def start(self, threads: int, locked: TextIO) -> None:
        """Start the process, which writes its output to output.txt and inherits the lock file."""
        with runtime.writing(self.folder):
            self.folder.mkdir(exist_ok=True)
            for run in self.runs:
                run.prepare(threads)
            trainings = [run.commands[0] for run in self.runs]
            evaluations = [run.commands[1] for run in self.runs]
            path = self.folder / "commands.txt"
            path.write_text("\n".join([*trainings, *evaluations, ""]), encoding="utf-8")
            output = open(self.folder / "output.txt", "wb")
        command = [relative(self.program), relative(path)]
        environment = {**self.environment, "OMP_NUM_THREADS": str(threads)}
        words = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
        print(f"$ cd {DEIT.name} && {' '.join(words)} python {shlex.join(command)}", flush=True)
        self.started = time.monotonic()
        # In its own session the process does not receive Ctrl-C; `work` sends SIGTERM, on which it ends in order.
        with output, reproduce.signals_deferred():
            self.process = subprocess.Popen(
                [sys.executable, *command],
                cwd=DEIT,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **environment},
                pass_fds=[locked.fileno()],
            )

    def judge(self) -> None:
        """Record the result of each run after the process has ended."""
        output = (self.folder / "output.txt").read_text(encoding="utf-8", errors="replace")
        error = self.error_in(output)
        for run in self.runs:
            run.record_result(output, error)
        self.end()

    def error_in(self, output: str) -> str:
        """Why the process ended, apart from the errors of single runs."""
        if self.process.returncode < 0:
            return f"the process was ended by signal {-self.process.returncode}"
        own = tuple(f"error: {relative(run.folder)}: " for run in self.runs)
        rest = "\n".join(line for line in output.strip().splitlines() if not line.startswith(own))
        last_line = rest.rpartition("\n")[2]
        return reproduce.error_in(rest) or last_line or f"the process ended with status {self.process.returncode}"

    def end(self) -> None:
        """Record the time of a process that has ended, an equal share for each run."""
        for run in self.runs:
            run.record["seconds"] += (time.monotonic() - self.started) / len(self.runs)
            run.write()


def group_runs(runs: list[Run], args: argparse.Namespace) -> list[Group]:
    """The groups that have runs without a result: one per seed, one per run, or one for all."""
    members: dict[str, list[Run]] = {}
    for run in runs:
        if args.stacked:
            name = "all"
        elif args.separately:
            name = run.name
        else:
            name = f"seed{run.record['seed']}"
        members.setdefault(name, []).append(run)
    program = TRAIN_STACKED if args.stacked else TRAIN_TOGETHER
    groups = [Group(name, its_runs, args.output_dir, program) for name, its_runs in members.items()]
    return [group for group in groups if group.runs]


def work(groups: list[Group], jobs: int, locked: TextIO, report: Callable[[], None]) -> None:
    """Execute the groups in order, `jobs` at a time, and call report() after each. An interrupt also ends them."""
    # macOS has no function that returns the cores available to this process.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = max(1, cores // jobs)
    waiting, running = list(groups), []
    left = sum(len(group.runs) for group in groups)
    try:
        while left:
            while waiting and len(running) < jobs:
                running.append(waiting.pop(0))
                running[-1].start(threads, locked)
            for group in [group for group in running if group.process.poll() is not None]:
                group.judge()
                running.remove(group)
                for run in group.runs:
                    left -= 1
                    print(f"{run}; runs left: {left}", flush=True)
                report()
            time.sleep(0.1)
    finally:
        running = [group for group in running if group.process]
        if running:
            reproduce.ignore_signals()
        for group in running:
            group.process.terminate()
        for group in running:
            group.process.wait()
            group.end()


# Results


def summary(values: list[float]) -> dict[str, Any]:
    """Mean of the values and half the width of its 95 % interval by Student's t; None if there are too few values."""
    n = len(values)
    half = half_width(values, 0.05) if n > 1 else None
    return {"values": values, "mean": statistics.fmean(values) if n else None, "half": half}


def judge_claims(differences: dict[str, dict[str, Any]]) -> None:
    """Add verdicts to the summaries of paired differences that are each claimed to be above zero.

    Holm's step-down method orders the m claims by their p-values, and rejects "no difference" in this order as long as
    the i-th p-value is below 5 % / (m - i + 1) (Holm, Scand. J. Stat. 6, 1979). Claims without two values count in m,
    so that the verdicts of an incomplete study are corrected too. Each other summary gets
        p: of the two-sided t-test;
        holm_p: p corrected for the number of claims;
        simultaneous: half the width of the interval at 1 - 5 % / m, so that all intervals hold together (Bonferroni);
        detectable: the true difference that a t-test at 5 % / m finds with a probability of 80 %;
        verdict: holds, contradicted, or inconclusive.
    """
    testable = [values for values in differences.values() if values["half"] is not None]
    for values in testable:
        values["p"] = p_value(values["values"])
    m, corrected = len(differences), 0.0
    for i, values in enumerate(sorted(testable, key=lambda values: values["p"])):
        corrected = max(corrected, min(1.0, (m - i) * values["p"]))
        values["holm_p"] = corrected
        values["simultaneous"] = half_width(values["values"], ERROR_RATE / m)
        values["detectable"] = detectable(values["values"], ERROR_RATE / m)
        if corrected >= ERROR_RATE:
            values["verdict"] = "inconclusive"
        else:
            values["verdict"] = "holds" if values["mean"] > 0 else "contradicted"


def p_value(values: list[float]) -> float:
    """The p-value of the two-sided t-test for a mean of zero; 1 for equal values, whose spread is unknown."""
    spread = standard_error(values)
    if not spread:
        return 1.0
    return float(2 * t.sf(abs(statistics.fmean(values)) / spread, len(values) - 1))


def half_width(values: list[float], error_rate: float) -> float:
    """Half the width of the interval of the mean, at the level 1 - `error_rate`, by Student's t."""
    return float(t.isf(error_rate / 2, len(values) - 1)) * standard_error(values)


def standard_error(values: list[float]) -> float:
    """The standard error of the mean."""
    return statistics.stdev(values) / math.sqrt(len(values))


def detectable(values: list[float], error_rate: float) -> float:
    """The true mean that a two-sided t-test of so many values with this spread finds with the probability `POWER`.

    This is the usual approximation by two quantiles of Student's t. For 20 values the probability is within a point of
    `POWER`; for 5 values and 13 claims it is 72 %.
    """
    freedom = len(values) - 1
    return float(t.isf(error_rate / 2, freedom) + t.isf(1 - POWER, freedom)) * standard_error(values)


def difference(top1: dict[str, dict[int, float]], left: Iterable[str], right: Iterable[str]) -> dict[str, Any]:
    """Summarise the mean top-1 of `left` minus that of `right`, over the seeds that all of these variants have.

    Args:
        top1: {variant: {seed: top-1 in percent}}.
        left, right: names of variants.
    """
    seeds = sorted(set.intersection(*(set(top1[name]) for name in (*left, *right))))
    return summary(
        [
            statistics.fmean(top1[name][seed] for name in left) - statistics.fmean(top1[name][seed] for name in right)
            for seed in seeds
        ]
    )


def summarize(study: dict[str, Any], runs: list[Run]) -> dict[str, Any]:
    """{"variants", "comparisons"} of the runs with a result, in points of top-1 and in minutes."""
    top1 = {name: {} for name in study["variants"]}
    minutes = {name: {} for name in study["variants"]}
    for record in (run.record for run in runs if run.is_done):
        top1[record["variant"]][record["seed"]] = record["top1"]
        minutes[record["variant"]][record["seed"]] = record["seconds"] / 60
    comparisons = {words: difference(top1, *sides) for words, sides in study["comparisons"].items()}
    judge_claims(comparisons)
    return {
        "variants": {
            name: {
                "top1": summary(list(top1[name].values())),
                "minutes": summary(list(minutes[name].values())),
                "difference": difference(top1, [name], [study["baseline"]]),
            }
            for name in top1
        },
        "comparisons": comparisons,
    }


def write_reports(out: Path, study: dict[str, Any], runs: list[Run], about: dict[str, str]) -> None:
    """Write results.json, results.md and results.png of the runs with a result.

    Args:
        about: device and versions.
    """
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


def cells(values: dict[str, Any]) -> tuple[str, str]:
    """Mean ± half the width of the interval, and whether the interval is above zero, below zero or contains it."""
    mean, half = values["mean"], values["half"]
    if half is None:
        return "-" if mean is None else f"{mean:+.2f}", "-"
    if abs(mean) <= half:
        side = "not significant"
    else:
        side = "higher" if mean > 0 else "lower"
    return f"{mean:+.2f} ± {half:.2f}", side


def claim_cells(words: str, values: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table of claims."""
    if "verdict" not in values:
        return (words, cells(values)[0], "-", "-", "-", "-")
    return (
        words,
        cells(values)[0],
        f"{values['holm_p']:.2g}",
        f"± {values['simultaneous']:.2f}",
        f"{values['detectable']:.2f}",
        values["verdict"],
    )


def markdown_table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Lines of a Markdown table, after an empty line."""
    heads = list(heads)
    body = [f"| {' | '.join(row)} |" for row in rows]
    return ["", f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|", *body]


def markdown(study: dict[str, Any], runs: list[Run], found: dict[str, Any], about: dict[str, str]) -> str:
    """The text of results.md; `found` is what `summarize` returns."""
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
    counted = sum(run.is_done for run in runs)
    claims = [claim_cells(words, values) for words, values in found["comparisons"].items()]
    lines = [
        f"{counted} of {len(runs)} runs have a result. Top-1 (%) and differences in points, paired by seed: mean "
        "± half the width of the 95 % interval by Student's t.",
        *markdown_table(("variant", "seeds", "top-1", f"minus {baseline}", "", "minutes per run"), rows),
        *markdown_table(("claim", "difference", "p (Holm)", "simultaneous", "detectable", "verdict"), claims),
        "",
        *(["The study is not complete, so its verdicts are preliminary.", ""] if counted < len(runs) else []),
        "The differences are means with their own 95 % intervals. The p-values are corrected for the number of claims "
        "by Holm's method, which keeps the probability of at least one false positive (the family-wise error rate) at "
        f"or below {100 * ERROR_RATE:.0f} %. The simultaneous 95 % intervals use the Bonferroni correction, which is "
        "slightly more conservative than Holm's: together they contain all true differences with a probability of at "
        "least 95 %. A true difference of the detectable size is found with a probability of about "
        f"{100 * POWER:.0f} %. The differences in the table of variants are not corrected.",
        "",
        *(f"- {key}: {value}" for key, value in about.items()),
        *(f"- no result: {run}" for run in runs if "failed" in run.record),
        "",
    ]
    return "\n".join(lines)


def draw(study: dict[str, Any], variants: dict[str, Any], path: Path) -> None:
    """Draw top-1 of every variant and its difference from the baseline: each seed, and the mean with its interval."""
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
    panels[1].set(xlabel=f"difference from {study['baseline']} with the same seed (points)")
    panels[1].axvline(0, color="#666666", lw=1)
    drawing.save(figure, path)


def run(args: argparse.Namespace) -> int:
    """Run the study; returns the exit status."""
    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs} must be at least 1")
    study = read_study(args.study)
    versions = reproduce.versions()
    about = {"device": reproduce.device_name(args.device), **versions}
    with reproduce.lock(args.output_dir) as locked:
        runs = [Run(study, variant, seed, args, versions) for seed in study["seeds"] for variant in study["variants"]]

        def report() -> None:
            write_reports(args.output_dir, study, runs, about)

        report()
        work(group_runs(runs, args), args.jobs, locked, report)
    print(f"reports: {args.output_dir}/results.md, results.json, results.png", flush=True)
    return reproduce.PASS if all(run.is_done for run in runs) else reproduce.INCOMPLETE


def main(argv: list[str] | None = None) -> int:
    """Run the command line, `sys.argv` by default; returns the exit status."""
    return reproduce.guarded(run, parse_args(argv), "interrupted; the same command resumes the study")


if __name__ == "__main__":
    sys.exit(main())
