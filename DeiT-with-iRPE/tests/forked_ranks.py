"""Runs main.py's program in ranks that are forked from one process, which saves each of them the imports.

    python forked_ranks.py JOBS.json RESULTS.json

A job has `flags` of main.py, a `change` (code that runs before main.py's program), `bad_rank`, which the change may
make hang, `ranks`, those to start of two, and `ending`, those that have to end. Its result is rank -> [exit status,
standard error] of the latter; the others are killed afterwards.
"""
import json
import os
import signal
import sys
import tempfile
import time  # noqa: F401  for the changes
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import engine  # noqa: F401  for the changes
import main
import runtime


def run_rank(job, rank, output):
    """In a process of its own: become this rank of the job and end as main.py would."""
    # every rank is the first of its machine, which says its error without leaving others the time to do so
    os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="localhost",
                      MASTER_PORT=str(job["port"]))
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    sys.stdout = open(os.devnull, "w")
    bad = rank == job["bad_rank"]
    exec(job["change"], {**globals(), "bad": bad})
    try:
        parser = runtime.ArgumentParser(parents=[main.get_args_parser()])
        runtime.run(main.main, parser.parse_args(job["flags"]))
    except SystemExit as end:
        os._exit(end.code or 0)
    os._exit(0)


def start_job(job):
    """rank -> (process id, file of its standard error)"""
    started = {}
    for rank in job["ranks"]:
        output = tempfile.TemporaryFile()
        pid = os.fork()
        if not pid:
            run_rank(job, rank, output)
        started[rank] = (pid, output)
    return started


def end_job(job, started):
    """Wait for the ranks that are to end, then kill the one that hangs."""
    statuses = {}
    for rank in job["ending"]:
        statuses[rank] = os.waitstatus_to_exitcode(os.waitpid(started[rank][0], 0)[1])
    for rank in started.keys() - statuses.keys():
        os.kill(started[rank][0], signal.SIGKILL)
        os.waitpid(started[rank][0], 0)
    results = {}
    for rank, status in statuses.items():
        output = started[rank][1]
        output.seek(0)
        results[rank] = [status, output.read().decode()]
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    jobs = json.loads(Path(sys.argv[1]).read_text())
    running = {name: start_job(job) for name, job in jobs.items()}
    results = {name: end_job(job, running[name]) for name, job in jobs.items()}
    Path(sys.argv[2]).write_text(json.dumps(results))
