"""ablate.py: runs that are interrupted, fail, resume and count, and the intervals of their results."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys

import ablate
import numpy as np
import pytest
from PIL import Image
from scipy.stats import t, ttest_1samp, ttest_rel

from conftest import ROOT, finish, wait_until

STUDY = {
    "recipe": "--epochs 1",
    "seeds": [0, 1],
    "baseline": "plain",
    "variants": {"plain": "", "other": "--lr 0.1", "third": "--lr 0.2"},
    "comparisons": {"others are better": ["other third", "plain"], "third is better": ["t*", "*n"]},
}
# Stands in for train_together.py. Top-1 is a function of the seed and the learning rate. Training takes as long as the
# file `slow` exists, or until SIGTERM, and creates the file `waits`. The evaluation needs what training wrote.
TRAIN_TOGETHER = """
import argparse, json, os, pathlib, shlex, signal, sys, time
parser = argparse.ArgumentParser()
parser.add_argument("--output_dir", type=pathlib.Path)
parser.add_argument("--seed", type=int)
parser.add_argument("--lr", type=float, default=0)
parser.add_argument("--data-path", type=pathlib.Path)
parser.add_argument("--eval", action="store_true")
parser.add_argument("--resume")
lines = [shlex.split(line) for line in open(sys.argv[1])]
assert all(words[:2] == ["python", "main.py"] for words in lines)
runs = [parser.parse_known_args(words[2:])[0] for words in lines]
assert [run.eval for run in runs] == sorted(run.eval for run in runs)

def save_and_end(*_):
    for run in runs:
        (run.output_dir / "saved").touch()
    sys.exit(75)

signal.signal(signal.SIGTERM, save_and_end)
failed = set()
for args in runs:
    checkpoint, data = args.output_dir / "checkpoint.pth", args.data_path.parent / "data"
    if (args.data_path.name, args.resume) != (("test", str(checkpoint)) if args.eval else ("data", "auto")):
        sys.exit(f"error: {sys.argv}")
    if args.output_dir in failed:
        continue
    if (data / f"crash{args.seed}").exists():
        sys.exit("error: image 5 cannot be read")
    checkpoint.open("r" if args.eval else "w").close()
    if (data / f"broken{args.seed}").exists() and args.lr == 0.2:
        print(f"error: {args.output_dir}: the loss is nan", file=sys.stderr)
        failed.add(args.output_dir)
        continue
    while (data / "slow").exists() and args.seed and not args.eval:
        (args.output_dir / "waits").touch()
        time.sleep(0.05)
    if (data / f"killed{args.seed}").exists() and args.eval:
        sys.stderr.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    (data / "word").write_text(os.environ.get("WORD", ""))
    (data / "log").open("a").write(f"{args.seed} {args.lr} {args.eval}\\n")
    if (data / f"damaged{args.seed}").exists() and args.eval:
        (args.output_dir / "eval.json").touch()
    elif args.eval:
        (args.output_dir / "eval.json").write_text(json.dumps({"acc1": 80 + args.seed + 10 * args.lr, "loss": 1.0}))
if failed:
    sys.exit("error: some runs failed")
"""


@pytest.fixture
def place(tmp_path):
    """A folder with a stand-in for train_together.py, a study and data."""
    for folder in ("deit", "data", "test"):
        (tmp_path / folder).mkdir()
    for program in ("train_together.py", "train_stacked.py"):
        (tmp_path / "deit" / program).write_text(TRAIN_TOGETHER)
    (tmp_path / "study.json").write_text(json.dumps(STUDY))
    yield tmp_path
    (tmp_path / "data" / "slow").unlink(missing_ok=True)  # what a failed test has left behind ends then


def start(place, *flags, change=""):
    """The study in a process and a process group of its own, as a shell starts it."""
    code = (
        "import pathlib, sys; sys.path[:0] = ['tools', 'tests']; import ablate, conftest; "
        "ablate.DEIT = pathlib.Path(sys.argv[1]); ablate.TRAIN_TOGETHER = ablate.DEIT / 'train_together.py'; "
        f"{change or 'pass'}; sys.exit(ablate.main(sys.argv[2:]))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, (place / "deit", *given(place), *flags))],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


@pytest.fixture
def run(place, capsys, monkeypatch):
    """A function of flags that gives (exit status, standard output, standard error) of the study in this process."""
    monkeypatch.setattr(ablate, "DEIT", place / "deit")
    monkeypatch.setattr(ablate, "TRAIN_TOGETHER", place / "deit" / "train_together.py")
    monkeypatch.setattr(ablate, "TRAIN_STACKED", place / "deit" / "train_stacked.py")

    def run(*flags):
        capsys.readouterr()
        status = ablate.main([*map(str, (*given(place), *flags))])
        return status, *capsys.readouterr()

    return run


def given(place):
    return (
        "--study",
        place / "study.json",
        "--data-path",
        place / "data",
        "--test-path",
        place / "test",
        "--device",
        "cpu",
        "--output_dir",
        place / "out",
    )


def results(place):
    return json.loads((place / "out" / "results.json").read_text())


def done(place):
    """What the stand-in has done: (seed, learning rate, whether it evaluated)"""
    return [tuple(line.split()) for line in (place / "data" / "log").read_text().splitlines()]


def start_slow(place):
    """A study whose process for seed 1 waits in its first run."""
    (place / "data" / "slow").touch()
    process = start(place, "--jobs", "2")
    wait_until(lambda: (place / "out" / "plain-seed1" / "waits").exists() and has_seed0(place))
    return process


def has_seed0(place):
    """Whether the study has reported the runs of seed 0."""
    return all(len(entry["top1"]["values"]) == 1 for entry in results(place)["variants"].values())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_study_lets_its_runs_save_and_resumes_the_unfinished_ones(place, run, number):
    process = start_slow(place)
    os.killpg(process.pid, number)  # as a terminal does
    status, _, err = finish(process)
    assert status == 130 and err == "interrupted; the same command resumes the study\n"
    assert len(list((place / "out").glob("*-seed1/saved"))) == 3
    seconds = {path: json.loads(path.read_text())["seconds"] for path in (place / "out").glob("*-seed1/run.json")}
    assert [len(entry["top1"]["values"]) for entry in results(place)["variants"].values()] == [1, 1, 1]
    before = done(place)
    (place / "data" / "slow").unlink()
    status, out, err = run("--jobs", "2")
    assert status == 0, err
    assert len(done(place)) == 12 and {seed for seed, *_ in done(place)[len(before) :]} == {"1"}
    assert "seed 0" not in out and all("failed" not in record for record in results(place)["runs"])
    assert f"OMP_NUM_THREADS={max(1, len(os.sched_getaffinity(0)) // 2)} python" in out
    assert len(seconds) == 3 and all(json.loads(path.read_text())["seconds"] > seconds[path] > 0 for path in seconds)
    assert [entry["top1"]["values"] for entry in results(place)["variants"].values()] == [[80, 81], [81, 82], [82, 83]]


def test_a_signal_while_a_run_starts_does_not_leave_it_behind(place):
    (place / "data" / "slow").touch()
    signalled = f"conftest.signal_at_start('seed1/commands', {signal.SIGTERM:d})"
    status, _, err = finish(start(place, change=signalled))
    assert status == 130 and err == "interrupted; the same command resumes the study\n"
    ablate.reproduce.lock(place / "out").close()


def test_runs_left_behind_by_a_killed_study_keep_its_folder_locked(place):
    process = start_slow(place)
    process.kill()
    finish(process)
    with pytest.raises(ablate.UserError, match="an evaluation that it left behind, is using --output_dir"):
        ablate.reproduce.lock(place / "out")
    (place / "data" / "slow").unlink()
    wait_until(lambda: len(done(place)) == 12)


def test_a_run_whose_record_cannot_be_written_is_not_started(place):
    (place / "out" / "plain-seed0" / "run.json.tmp").mkdir(parents=True)
    status, _, err = finish(start(place))
    assert status == 2 and "run.json cannot be written" in err
    assert not (place / "out" / "plain-seed0" / "output.txt").exists()


def test_all_variants_run_with_one_seed_before_the_next(place, run):
    assert run()[0] == 0
    assert [(seed, rate) for seed, rate, evaluated in done(place) if evaluated == "True"] == [
        (seed, rate) for seed in "01" for rate in ("0", "0.1", "0.2")
    ]


def test_a_failed_run_is_reported_and_repeated(place, run):
    (place / "data" / "broken1").touch()
    status, out, _ = run()
    assert status == 3 and "third-seed1 failed: the loss is nan" in out
    assert "no result: third-seed1 failed: the loss is nan" in (place / "out" / "results.md").read_text()
    found = results(place)
    assert [entry["top1"]["values"] for entry in found["variants"].values()] == [[80, 81], [81, 82], [82]]
    assert found["comparisons"]["others are better"]["values"] == [1.5]  # seed 1 lacks a variant
    assert found["variants"]["other"]["difference"]["values"] == [1, 1]
    (place / "data" / "broken1").unlink()
    status, out, _ = run()
    assert status == 0 and out.count("$ cd") == 1 and "failed" not in (place / "out" / "results.md").read_text()
    with Image.open(place / "out" / "results.png") as figure:
        assert min(figure.size) > 200


@pytest.mark.parametrize("n", [2, 5, 9])
def test_intervals_are_those_of_scipys_t_tests(n):
    random = np.random.default_rng(n)
    top1 = {name: dict(enumerate(random.normal(80, 1, n))) for name in "abc"}
    columns = {name: [*values.values()] for name, values in top1.items()}
    for values, truth in (
        (ablate.summary(columns["a"]), ttest_1samp(columns["a"], 0)),
        (ablate.difference(top1, ["b"], ["a"]), ttest_rel(columns["b"], columns["a"])),
        (ablate.difference(top1, ["b", "c"], ["a"]), ttest_rel(np.mean([columns["b"], columns["c"]], 0), columns["a"])),
    ):
        low, high = truth.confidence_interval(0.95)
        assert values["mean"] - values["half"] == pytest.approx(low, abs=1e-9)
        assert values["mean"] + values["half"] == pytest.approx(high, abs=1e-9)
        assert (ablate.cells(values)[1] == "not significant") == (truth.pvalue >= 0.05)


def test_claims_are_corrected_by_holms_method():
    # Holm's adjusted p-values by hand: 4 · 0.01, max(0.04, 3 · 0.02), max(0.06, 2 · 0.021), max(0.06, 0.5)
    random = np.random.default_rng(0)
    wanted = {"a": (0.02, 1), "b": (0.01, -1), "c": (0.5, 1), "d": (0.021, 1)}
    claims = {name: ablate.summary(values_with(p, sign, random)) for name, (p, sign) in wanted.items()}
    ablate.judge_claims(claims)
    assert {name: claims[name]["holm_p"] for name in wanted} == pytest.approx(
        {"a": 0.06, "b": 0.04, "c": 0.5, "d": 0.06}
    )
    assert {name: claims[name]["verdict"] for name in wanted} == {
        "a": "inconclusive",
        "b": "contradicted",
        "c": "inconclusive",
        "d": "inconclusive",
    }
    for values in claims.values():
        low, high = ttest_1samp(values["values"], 0).confidence_interval(1 - 0.05 / 4)
        assert values["simultaneous"] == pytest.approx((high - low) / 2)


def test_claims_without_results_count_in_the_correction():
    values = values_with(0.03, 1, np.random.default_rng(0))
    claims = {"a": ablate.summary(values), "one": ablate.summary([1.0]), "none": ablate.summary([])}
    ablate.judge_claims(claims)
    assert claims["a"]["holm_p"] == pytest.approx(0.09) and "verdict" not in claims["one"]
    assert ablate.claim_cells("x", claims["one"]) == ("x", "+1.00", "-", "-", "-", "-")


def values_with(p, sign, random):
    """Six values whose two-sided t-test has this p-value."""
    values = random.normal(0, 1, 6)
    values = (values - values.mean()) / values.std(ddof=1)
    return list(values + sign * t.isf(p / 2, 5) / 6**0.5)


def test_a_clear_claim_holds_and_its_opposite_is_contradicted():
    claims = {"up": ablate.summary([1.0, 1.1, 0.9, 1.0]), "down": ablate.summary([-1.0, -1.1, -0.9, -1.0])}
    ablate.judge_claims(claims)
    assert {name: values["verdict"] for name, values in claims.items()} == {"up": "holds", "down": "contradicted"}


@pytest.mark.parametrize("error_rate", [0.05, 0.05 / 7])
def test_a_difference_of_the_detectable_size_is_found_four_times_in_five(error_rate):
    random = np.random.default_rng(0)
    sample = random.normal(0, 1, 20)
    sample = list((sample - sample.mean()) / sample.std(ddof=1))  # its spread is 1
    shift = ablate.detectable(sample, error_rate)
    studies = random.normal(shift, 1, (20_000, 20))
    assert (ttest_1samp(studies, 0, axis=1).pvalue < error_rate).mean() == pytest.approx(0.8, abs=0.02)


@pytest.mark.parametrize("values", [[0.0, 0.0, 0.0], [2.0, 2.0]])
def test_values_without_any_spread_tell_nothing(values):
    claims = {"x": ablate.summary(values)}
    ablate.judge_claims(claims)
    assert claims["x"]["verdict"] == "inconclusive" and claims["x"]["p"] == 1


def test_a_killed_process_and_a_damaged_result_fail_their_runs_only(place, run):
    (place / "data" / "broken1").touch()
    (place / "data" / "killed1").touch()
    status, out, _ = run()
    assert status == 3 and "third-seed1 failed: the loss is nan" in out
    assert out.count("-seed1 failed: the process was ended by signal 9") == 2
    for name in ("broken1", "killed1"):
        (place / "data" / name).unlink()
    (place / "data" / "damaged1").touch()
    status, out, _ = run()
    assert status == 3 and out.count("-seed1/eval.json cannot be read: JSONDecodeError") == 3
    assert [len(entry["top1"]["values"]) for entry in results(place)["variants"].values()] == [1, 1, 1]
    assert "its verdicts are preliminary" in (place / "out" / "results.md").read_text()


def test_a_crash_fails_all_runs_of_its_process_with_the_same_error(place, run):
    (place / "data" / "crash1").touch()
    status, out, _ = run()
    assert status == 3 and out.count("-seed1 failed: image 5 cannot be read") == 3
    assert [len(entry["top1"]["values"]) for entry in results(place)["variants"].values()] == [1, 1, 1]


def test_a_study_can_set_environment_variables(place, run):
    (place / "study.json").write_text(json.dumps({**STUDY, "environment": {"WORD": "two words"}}))
    status, out, _ = run()
    assert status == 0 and (place / "data" / "word").read_text() == "two words"
    assert "$ cd deit && WORD='two words' OMP_NUM_THREADS=" in out
    assert results(place)["runs"][0]["environment"] == {"WORD": "two words"}
    (place / "study.json").write_text(json.dumps(STUDY))
    status, _, err = run()
    assert status == 2 and "run.json records a run with different environment" in err


def test_separate_runs_have_a_process_each(place, run):
    status, out, _ = run("--separately")
    assert status == 0 and out.count("$ cd") == 6
    assert "train_together.py ../out/third-seed1/commands.txt" in out
    assert [entry["top1"]["values"] for entry in results(place)["variants"].values()] == [[80, 81], [81, 82], [82, 83]]


def test_a_stacked_study_has_one_process(place, run):
    (place / "data" / "broken1").touch()
    status, out, _ = run("--stacked")
    assert status == 3 and out.count("$ cd") == 1
    assert "train_stacked.py ../out/all/commands.txt" in out and "third-seed1 failed: the loss is nan" in out
    (place / "data" / "broken1").unlink()
    (place / "data" / "log").unlink()
    assert run("--stacked")[0] == 0 and done(place) == [("1", "0.2", "False"), ("1", "0.2", "True")]
    assert [entry["top1"]["values"] for entry in results(place)["variants"].values()] == [[80, 81], [81, 82], [82, 83]]


def test_the_kinds_of_processes_exclude_each_other(place, run, capsys):
    with pytest.raises(SystemExit):
        run("--stacked", "--separately")
    assert "not allowed with argument" in capsys.readouterr().err


def test_differences_use_the_seeds_that_all_variants_have():
    top1 = {"a": {0: 80.0, 1: 70.0, 2: 75.0}, "b": {1: 71.0, 2: 77.0, 3: 90.0}}
    assert ablate.difference(top1, ["b"], ["a"])["values"] == [1.0, 2.0]
    assert ablate.cells(ablate.difference(top1, ["b"], ["a"]))[0] == "+1.50 ± 6.35"
    assert ablate.cells(ablate.difference({"a": {0: 80.0}, "b": {1: 71.0}}, ["b"], ["a"])) == ("-", "-")
    assert ablate.cells(ablate.difference({"a": {0: 80.0}, "b": {0: 71.0}}, ["b"], ["a"])) == ("-9.00", "-")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": []}, "must have seeds"),
        ({"seeds": [0, 1, 1]}, "must have seeds, each only once"),
        ({"baseline": "none"}, "a baseline that is one of its variants"),
        ({"variants": {"plain": "", "a b": ""}, "comparisons": {}}, "has a variant 'a b'"),
        ({"comparisons": {"x": ["plain", "y*"]}}, "the comparison of 'y*' matches no variant"),
        ({"environment": {"WORD": 5}}, "environment must consist of strings"),
        ({"recipe": 5}, "cannot be read in the format of ablate_fashion.json"),
        ({"variants": {"plain": None}, "comparisons": {}}, "cannot be read in the format of ablate_fashion.json"),
        ({"recipe": "'"}, "No closing quotation"),
    ],
)
def test_a_study_that_cannot_be_used_is_refused_in_one_sentence(change, message, place, run):
    (place / "study.json").write_text(json.dumps({**STUDY, **change}))
    status, _, err = run()
    assert status == 2 and message in err and err.count("\n") == 1 and not (place / "out").exists()


def test_runs_of_other_flags_or_versions_are_not_mixed(place, run, monkeypatch):
    assert run("--", "--lr", "0.3")[0] == 0
    commands = (place / "out" / "seed0" / "commands.txt").read_text()
    assert "--lr 0.3 --lr 0.1 --seed" in commands  # the flags of the variant come last
    status, _, err = run()
    assert (
        status == 2 and "plain-seed0/run.json records a run with different commands: choose another --output_dir" in err
    )
    monkeypatch.setattr(ablate.reproduce, "versions", lambda: {"torch": "1.0"})
    status, _, err = run("--", "--lr", "0.3")
    assert (
        status == 2 and "plain-seed0/run.json records a run with different versions: choose another --output_dir" in err
    )


def test_the_shipped_study_has_the_variants_of_the_paper():
    study = ablate.read_study(ROOT / "tools" / "ablate_fashion.json")
    assert len(study["variants"]) == 21 and len(study["seeds"]) >= 5


@pytest.mark.parametrize("more", [[], ["--stacked"]])
def test_the_commands_of_a_run_reproduce_it_on_their_own(more, tmp_path):
    random = np.random.RandomState(0)
    for split in ("train", "val"):
        for label in range(2):
            folder = tmp_path / "data" / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(16):
                pixels = random.randint(0, 60, (8, 8)) + 60 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    recipe = (
        "--model vit_tiny_patch16_224 --input-size 8 --model-kwargs patch_size=4 embed_dim=8 depth=1 num_heads=1 "
        "--epochs 1 --batch-size 8 --num_workers 0 --aa none --reprob 0 --mixup 0 --cutmix 0 --drop-path 0 "
        "--no-model-ema --amp-dtype float32"
    )
    (tmp_path / "study.json").write_text(
        json.dumps(
            {
                "recipe": recipe,
                "seeds": [0],
                "baseline": "none",
                "comparisons": {},
                "variants": {"none": "", "iRPE": "--rpe rpe-1.9-product-ctx-1-k"},
            }
        )
    )
    flags = ["--study", tmp_path / "study.json", "--data-path", tmp_path / "data", "--device", "cpu", *more]
    finished = subprocess.run(
        [sys.executable, "tools/ablate.py", *flags, "--output_dir", tmp_path / "out"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    printed = re.search(r"\$ cd (\S+) && OMP_NUM_THREADS=(\d+) python (.*)", finished.stdout)
    place, threads, words = ROOT / printed[1], printed[2], shlex.split(printed[3])
    commands = (place / words[1]).read_text().splitlines()
    own_commands = [shlex.split(command) for command in commands if "iRPE-seed0" in command]
    assert len(own_commands) == 2
    (tmp_path / "out").rename(tmp_path / "before")
    for _, *command in own_commands:
        subprocess.run(
            [sys.executable, *command],
            cwd=place,
            check=True,
            capture_output=True,
            env={**os.environ, "OMP_NUM_THREADS": threads},
        )
    first, again = (
        json.loads((tmp_path / folder / "iRPE-seed0" / "eval.json").read_text()) for folder in ("before", "out")
    )
    assert again == (pytest.approx(first, rel=1e-5) if more else first)
