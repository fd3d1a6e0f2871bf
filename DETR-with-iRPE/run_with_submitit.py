"""Train or evaluate as a job of a SLURM cluster.

    python run_with_submitit.py --nodes 2 --ngpus 8 --partition NAME [main.py's flags]

A job whose time is over, or that had to make room for another, finishes its step, saves, is requeued and goes on; one
that lost a node goes on from its last checkpoint. What else a cluster asks for, such as an account, sbatch reads from
the environment (SBATCH_ACCOUNT).
Where there is no SLURM, the job runs in the background of this machine.
"""

import argparse
import copy
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import main
from main import runtime  # which the codebases, where this file is the same, keep in different places

try:
    import submitit
except ModuleNotFoundError:
    submitit = None


def get_parser() -> argparse.ArgumentParser:
    """Parser of main.py's flags and the job's."""
    parser = runtime.ArgumentParser(
        "run_with_submitit.py",
        parents=[main.get_args_parser()],
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument_group("job").add_argument
    add("--ngpus", default=8, type=int, help="GPUs of each node, a process for each; with --device cpu only processes")
    add("--nodes", default=1, type=int, help="machines of the cluster")
    add("--timeout", default=2 * 24 * 60, type=int, help="minutes until the job is requeued")
    add("--partition", type=str, metavar="NAME", help="of the cluster; its default if not given")
    add(
        "--job_dir",
        default="outputs/%j",
        type=str,
        metavar="DIR",
        help="folder of the job's logs, on a disk that all nodes see, and --output_dir if that is not given; "
        "%%j is the job's number in both",
    )
    return parser


class Trainer:
    """What every process of the job calls. It has a ``checkpoint``, therefore submitit requeues it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args

    def __call__(self) -> None:
        job, args = submitit.JobEnvironment(), copy.copy(self.args)
        # all GPUs stay visible: the processes choose theirs by LOCAL_RANK
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        args.job_id = job.job_id
        args.output_dir = args.output_dir.replace("%j", job.job_id) or str(job.paths.folder)
        runtime.run(go_on, args)

    def checkpoint(self) -> "submitit.helpers.DelayedSubmission":
        """What to run after a requeue: the same, since only a start sees what the last try, however it ended, saved."""
        return submitit.helpers.DelayedSubmission(self)


def go_on(args: argparse.Namespace) -> None:
    """Run main.py, from the checkpoint that an earlier try of this job wrote, if there is one."""
    requeue = signal.getsignal(signal.SIGUSR2)  # submitit's, which ends the main process and is nothing to the others
    try:
        main.main(argparse.Namespace(**{**vars(args), **_flags_to_go_on(args)}))
    except runtime.Interrupted as stop:
        # SLURM itself requeues a job that it ended by SIGTERM to make room for another; one that a user cancelled stays
        # cancelled.
        if stop.number != signal.SIGTERM and callable(requeue):
            requeue(signal.SIGUSR2, None)
            time.sleep(10)  # the end of another process might end the main one before it has requeued the job
        raise


def _flags_to_go_on(args: argparse.Namespace) -> dict[str, Any]:
    """The flags with which this job resumes from its own checkpoint; none if the newest checkpoint is another job's."""
    checkpoint = runtime.newest_checkpoint(args.output_dir)
    if checkpoint is None or getattr(checkpoint.args, "job_id", None) != args.job_id:
        return {}
    return {"resume": checkpoint.path, "finetune": False}  # the run has started, so its first weights do not matter


def submit(args: argparse.Namespace) -> None:
    """Submit the job and print its number. Raises ``UserError`` for flags that cannot work, before it waits in line."""
    if submitit is None:
        raise runtime.UserError("jobs are submitted with submitit, which is not installed: pip install submitit")
    runtime.need_signals("a job", *runtime.STOPPING)
    if runtime.get_world_size() > 1:
        raise runtime.UserError(
            "the job starts its processes itself, --ngpus on each of --nodes: run "
            "run_with_submitit.py with python, without a launcher"
        )
    main.check_args(args)
    for name in ("ngpus", "nodes", "timeout"):
        if getattr(args, name) < 1:
            raise runtime.UserError(f"--{name} {getattr(args, name)} is out of range: it must be at least 1")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # the job imports main, wherever it is submitted from
    try:
        with runtime.writing(f"--job_dir {args.job_dir}"):
            executor = submitit.AutoExecutor(args.job_dir, slurm_max_num_timeout=30)
            executor.update_parameters(
                name=Path(__file__).resolve().parent.name,
                nodes=args.nodes,
                tasks_per_node=args.ngpus,
                gpus_per_node=args.ngpus if args.device.startswith("cuda") else None,
                cpus_per_task=max(1, args.num_workers),
                timeout_min=args.timeout,
                slurm_partition=args.partition,
            )
            job = executor.submit(Trainer(args))
    except (submitit.core.utils.FailedJobError, ValueError) as error:  # sbatch refuses, or more nodes without SLURM
        raise runtime.UserError(f"the job cannot be submitted: {error}") from error
    print(f"job {job.job_id} ({executor.cluster}) prints to {job.paths.stdout}")


if __name__ == "__main__":
    runtime.run(submit, get_parser().parse_args())
