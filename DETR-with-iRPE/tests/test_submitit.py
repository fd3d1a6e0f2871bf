"""DETR as a job of a cluster; run_with_submitit.py is DeiT's, where the rest of it is tested."""

import json
import os
import re
import subprocess
import sys
import time

import pytest

from conftest import PATIENCE, PROJECT, free_port, parse, small
from util.runtime import UserError, load_checkpoint

pytest.importorskip("submitit", reason="submitit is not installed; pip install -r requirements-submitit.txt")
import run_with_submitit


def epochs(folder):
    return [json.loads(line)["epoch"] for line in (folder / "log.txt").read_text().splitlines()]


def test_job_of_two_processes_trains_and_writes_into_its_folder(coco, tmp_path):
    with open(tmp_path / "said", "w") as said:  # the job, which goes on in the background, keeps it open
        subprocess.run(
            [
                sys.executable,
                "run_with_submitit.py",
                *map(str, small(coco)),
                "--ngpus",
                "2",
                "--job_dir",
                tmp_path / "%j",
            ],
            cwd=PROJECT,
            stdout=said,
            stderr=said,
            check=True,
            timeout=PATIENCE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port())},
        )
    number = re.search(r"job (\d+) \(local\)", (tmp_path / "said").read_text())[1]
    folder, deadline = tmp_path / number, time.monotonic() + PATIENCE
    while not all((folder / f"{number}_{task}_result.pkl").exists() for task in (0, 1)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    args = load_checkpoint(folder / "checkpoint.pth")["args"]
    assert epochs(folder) == [0] and (args.world_size, args.job_id) == (2, number)


def test_requeued_finetuning_goes_on_and_does_not_start_anew_from_the_first_weights(coco, tmp_path, monkeypatch):
    for name in ("MASTER_ADDR", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "overwritten")
    for name, value in (("EXECUTOR", "local"), ("FOLDER", f"{tmp_path}/%j"), ("LOCAL_JOB_ID", "1")):
        monkeypatch.setenv(f"SUBMITIT_{name}", value)
    run_with_submitit.Trainer(parse(*small(coco)))()
    monkeypatch.setenv("SUBMITIT_LOCAL_JOB_ID", "2")
    trainer = run_with_submitit.Trainer(parse(*small(coco, "--finetune", "--resume", tmp_path / "1/checkpoint.pth")))
    trainer()
    assert epochs(tmp_path / "2") == [0]
    trainer.args.epochs = 2
    trainer.checkpoint().result()
    assert epochs(tmp_path / "2") == [0, 1]


def test_mistake_in_main_s_flags_is_said_before_the_job_waits_in_line(tmp_path):
    with pytest.raises(UserError, match="--coco_path is missing"):
        run_with_submitit.submit(run_with_submitit.get_parser().parse_args(["--job_dir", str(tmp_path / "%j")]))
    assert not os.listdir(tmp_path)
