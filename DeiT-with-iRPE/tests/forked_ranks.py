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
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import engine  # noqa: F401  for the changes
import main
import runtime


def run_rank(job, rank, output):
    """In a process of its own: become this rank of the job and end as main.py would."""
    # every rank is the first of its machine, which says its error without leaving others the time to do so
    os.environ.update(
        RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(job["port"])
    )
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    sys.stdout = open(os.devnull, "w")
    status = 1
    try:
        exec(job["change"], {**globals(), "rank": rank, "bad": rank == job["bad_rank"]})
        parser = runtime.ArgumentParser(parents=[main.get_args_parser()])
        runtime.run(main.main, parser.parse_args(job["flags"]))
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)  # what follows in this program is the first process's


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
    """Wait for the ranks that are to end, then kill the one that hangs; `started` is empty then."""
    results = {}
    for rank in job["ending"]:
        pid, output = started[rank]
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        del started[rank]
        output.seek(0)
        results[rank] = [status, output.read().decode()]
    kill(started)
    return results


def kill(started):
    """Leave none of these ranks behind, least of all one that hangs."""
    while started:
        _, (pid, _) = started.popitem()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    jobs, running = json.loads(Path(sys.argv[1]).read_text()), {}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # a test that waits no longer
    try:
        running.update((name, start_job(job)) for name, job in jobs.items())
        results = {name: end_job(job, running[name]) for name, job in jobs.items()}
        Path(sys.argv[2]).write_text(json.dumps(results))
    finally:
        for started in running.values():
            kill(started)
