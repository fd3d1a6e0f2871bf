"""Jobs of a cluster: what SLURM is asked for, processes that find each other, and going on after a requeue."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import PATIENCE, PROJECT, finish, free_port, parse, small, start
from runtime import UserError, load_checkpoint

pytest.importorskip("submitit", reason="submitit is not installed; pip install -r requirements-submitit.txt")
import run_with_submitit

# They stand for SLURM's programs: one keeps the script, the other starts all tasks of the only node.
SBATCH = """#!/bin/sh
grep -q refused "$1" && { echo "sbatch: error: invalid partition specified: refused" >&2; exit 1; }
cp "$1" "$(dirname "$0")/script" && echo "Submitted batch job 77"
"""
SRUN = f"""#!{sys.executable}
import os, subprocess, sys
command = sys.argv[sys.argv.index("--error") + 2:]
tasks = [subprocess.Popen(command, env=dict(os.environ, SLURM_PROCID=k, SLURM_LOCALID=k)) for k in "01"]
sys.exit(max(task.wait() for task in tasks))
"""


def submitted(*flags):
    return run_with_submitit.submit(run_with_submitit.get_parser().parse_args([str(flag) for flag in flags]))


def asked(slurm):
    return dict(re.findall(r"#SBATCH --(\S+)=(\S+)", (slurm / "script").read_text()))


def epochs(folder):
    log = Path(folder, "log.txt")
    return [json.loads(line)["epoch"] for line in log.read_text().splitlines()] if log.is_file() else []


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(autouse=True)
def unchanged_path(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))  # submit() sets another one


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A folder with SLURM's programs, which come first; without the fixture a job runs on this machine."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, program in (("sbatch", SBATCH), ("srun", SRUN)):
        (folder / name).write_text(program)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Calls a Trainer with main.py's flags as process 0 of 1 of the job with that number."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "overwritten")
    monkeypatch.delenv("MASTER_PORT")
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setenv("SUBMITIT_FOLDER", str(tmp_path / "%j"))

    def call(number, *flags, trainer=None):
        monkeypatch.setenv("SLURM_JOB_ID", str(number))
        trainer = trainer or run_with_submitit.Trainer(parse(*flags))
        trainer()
        return trainer

    return call


def test_both_codebases_share_the_same_bytes():
    other = PROJECT.parent / "DETR-with-iRPE" / "run_with_submitit.py"
    if not other.is_file():
        pytest.skip("needs DETR-with-iRPE beside this folder")
    assert (PROJECT / "run_with_submitit.py").read_bytes() == other.read_bytes()


# Submitting


def test_slurm_is_asked_for_what_the_flags_say(slurm, tmp_path, capsys):
    submitted(
        "--ngpus",
        4,
        "--nodes",
        2,
        "--timeout",
        90,
        "--partition",
        "fast",
        "--num_workers",
        6,
        "--job_dir",
        tmp_path / "jobs" / "%j",
    )
    assert capsys.readouterr().out == f"job 77 (slurm) prints to {tmp_path}/jobs/77/77_0_log.out\n"
    expected = {
        "nodes": "2",
        "ntasks-per-node": "4",
        "gpus-per-node": "4",
        "time": "90",
        "partition": "fast",
        "cpus-per-task": "6",
        "job-name": "DeiT-with-iRPE",
    }
    assert expected.items() <= asked(slurm).items() and asked(slurm)["signal"].startswith("USR2@")


def test_without_flags_a_node_of_eight_gpus_is_asked_for_two_days(slurm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    submitted()
    expected = {"nodes": "1", "gpus-per-node": "8", "time": "2880", "output": f"{tmp_path}/outputs/%j/%j_0_log.out"}
    assert expected.items() <= asked(slurm).items() and "partition" not in asked(slurm)


def test_on_the_cpu_no_gpus_are_asked_for(slurm, tmp_path):
    submitted("--device", "cpu", "--ngpus", 2, "--num_workers", 0, "--job_dir", tmp_path / "%j")
    assert {"ntasks-per-node": "2", "cpus-per-task": "1"}.items() <= asked(slurm).items()
    assert "gpus-per-node" not in asked(slurm)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--ngpus", 0], "--ngpus 0 is out of range"),
        (["--nodes", 0], "--nodes 0 is out of range"),
        (["--timeout", -1], "--timeout -1 is out of range"),
        (["--epochs", 0], "--epochs 0 is out of range"),
        (["--partition", "refused"], "cannot be submitted: sbatch: error: invalid partition specified: refused"),
        (["--job_dir", "file/%j"], "--job_dir file/%j cannot be written"),
    ],
)
def test_mistake_is_said_before_the_job_waits_in_line(slurm, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as caught:
        submitted(*flags)
    assert words in str(caught.value) and "\n" not in str(caught.value) and not (slurm / "script").exists()


def test_launcher_would_submit_a_job_for_every_process_and_is_refused(slurm, monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="run run_with_submitit.py with python, without a launcher"):
        submitted("--local-rank", 0)
    assert not (slurm / "script").exists()


def test_system_without_the_signals_of_a_job_is_told_so(slurm, like_windows):
    with pytest.raises(UserError, match="a job needs the signals .*, and Windows lacks SIGUSR1 and SIGUSR2: use Linux"):
        submitted()
    assert not (slurm / "script").exists()


def test_two_nodes_without_slurm_are_refused(tmp_path):
    with pytest.raises(UserError, match="the job cannot be submitted: LocalExecutor can use only one node"):
        submitted("--device", "cpu", "--nodes", 2, "--job_dir", tmp_path / "%j")


def test_without_submitit_a_sentence_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "submitit", None)
    monkeypatch.setattr(sys, "argv", ["run_with_submitit.py"])
    with pytest.raises(SystemExit, match="1"):
        runpy.run_path(run_with_submitit.__file__, run_name="__main__")
    assert capsys.readouterr().err == (
        "error: jobs are submitted with submitit, which is not installed: pip install submitit\n"
    )


# Running


def test_two_tasks_of_slurm_train_together_and_write_into_the_job_s_folder(slurm, image_root, tmp_path):
    """From the command line, by the script that sbatch got."""
    status, out, said = finish(
        start(PROJECT / "run_with_submitit.py", *small(image_root), "--ngpus", 2, "--job_dir", tmp_path / "%j")
    )
    assert status == 0 and out.startswith("job 77 (slurm)"), said
    environment = {
        "SLURM_JOB_ID": "77",
        "SLURM_NTASKS": "2",
        "SLURM_JOB_NUM_NODES": "1",
        "OMP_NUM_THREADS": "1",
        "SLURM_JOB_NODELIST": "localhost",
        "MASTER_PORT": str(free_port()),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    subprocess.run(["sh", slurm / "script"], env={**os.environ, **environment}, check=True, timeout=PATIENCE)
    args = load_checkpoint(tmp_path / "77" / "checkpoint.pth")["args"]
    assert epochs(tmp_path / "77") == [0] and (args.world_size, args.job_id) == (2, "77")
    assert {f"77_{task}_result.pkl" for task in (0, 1)} <= set(os.listdir(tmp_path / "77"))


def test_preempted_job_of_two_processes_goes_on_by_itself(image_root, tmp_path):
    """Without SLURM, from another folder; submitit's own controller starts the job again."""
    with open(tmp_path / "said", "w") as said:  # the controller keeps it open
        subprocess.run(
            [
                sys.executable,
                PROJECT / "run_with_submitit.py",
                *map(str, small(image_root)),
                "--ngpus",
                "2",
                "--epochs",
                "100000",
                "--output_dir",
                "out_%j",
            ],
            cwd=tmp_path,
            stdout=said,
            stderr=said,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port())},
            check=True,
            timeout=PATIENCE,
        )
    controller = int(re.search(r"job (\d+) \(local\)", (tmp_path / "said").read_text())[1])
    folder = tmp_path / f"out_{controller}"

    def tasks():
        return map(int, Path(f"/proc/{controller}/task/{controller}/children").read_text().split())

    try:
        wait_until(lambda: epochs(folder))
        for task in tasks():
            os.kill(task, signal.SIGUSR2)
        stdout = tmp_path / "outputs" / str(controller) / f"{controller}_0_log.out"
        wait_until(lambda: stdout.read_text().count("M parameters") == 2)
        before = len(epochs(folder))
        wait_until(lambda: len(epochs(folder)) > before)
    finally:
        for process in (controller, *tasks()):
            os.kill(process, signal.SIGKILL)
    done = epochs(folder)
    assert done == sorted(set(done))  # the first ones were not trained again


# Going on


def test_requeued_job_goes_on_from_its_checkpoint_and_not_from_another_run_s(job, image_root, tmp_path, capsys):
    flags = small(image_root, "--output_dir", tmp_path / "out")
    job(1, *flags)
    trainer = job(2, *flags)
    assert epochs(tmp_path / "out") == [0, 0]
    submission = trainer.checkpoint()
    assert submission.function is trainer
    trainer.args.epochs = 2
    capsys.readouterr()
    submission.result()
    assert epochs(tmp_path / "out") == [0, 0, 1]
    assert "--finetune for the initial weights" not in capsys.readouterr().out  # nobody gave this flag
    assert load_checkpoint(tmp_path / "out" / "checkpoint.pth")["args"].resume == str(
        tmp_path / "out" / "checkpoint.pth"
    )


def test_job_that_saved_nothing_begins_as_it_began(job, image_root, tmp_path, capsys):
    job(1, *small(image_root, "--output_dir", tmp_path / "first"))
    first = tmp_path / "first" / "checkpoint.pth"
    flags = small(image_root, "--resume", first, "--epochs", 2)
    trainer = job(2, *flags)
    assert epochs(tmp_path / "2") == [1] and trainer.args == parse(*flags)
    for name in ("checkpoint.pth", "checkpoint.previous.pth"):
        (tmp_path / "2" / name).unlink()
    capsys.readouterr()
    trainer.checkpoint().result()
    assert "from epoch 1 to 2" in capsys.readouterr().out and epochs(tmp_path / "2") == [1]


def test_all_gpus_stay_visible_for_the_processes_to_choose_by_number(job, image_root, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    job(1, *small(image_root, "--eval"))
    assert (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["LOCAL_RANK"]) == ("4,5", "0")


def test_mistake_in_a_job_is_one_sentence_and_a_failure(job, image_root, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        job(1, *small(tmp_path / "nowhere"))
    assert caught.value.code == 1 and re.fullmatch(r"error: [^\n]*nowhere[^\n]*\n", capsys.readouterr().err)
