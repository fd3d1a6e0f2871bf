"""Train or evaluate as a job of a SLURM cluster.

    python run_with_submitit.py --nodes 2 --ngpus 8 --partition NAME [main.py's flags]

A job that reaches its time limit or is preempted finishes its step, saves, is requeued and resumes. A job that lost a
node resumes from its last checkpoint. sbatch reads other options, such as an account, from the environment
(SBATCH_ACCOUNT). Without SLURM, the job runs in the background on this machine.
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
from main import runtime  # this file is the same in both codebases, which keep runtime in different places

try:
    import submitit
except ModuleNotFoundError:
    submitit = None


def get_parser() -> argparse.ArgumentParser:
    """Parser of the flags of main.py and of those of the job."""
    parser = runtime.ArgumentParser(
        "run_with_submitit.py",
        parents=[main.get_args_parser()],
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument_group("job").add_argument
    add("--ngpus", default=8, type=int, help="GPUs per node, with one rank each; with --device cpu, ranks per node")
    add("--nodes", default=1, type=int, help="number of nodes")
    add("--timeout", default=2 * 24 * 60, type=int, help="minutes until the job is requeued")
    add("--partition", type=str, metavar="NAME", help="partition of the cluster; by default the cluster's default")
    add(
        "--job_dir",
        default="outputs/%j",
        type=str,
        metavar="DIR",
        help="folder for the job's logs, on a disk that all nodes share; also --output_dir if that is not given; "
        "%%j stands for the job's number in both",
    )
    return parser


class Trainer:
    """What every rank of the job calls. submitit requeues the job because this class has a ``checkpoint`` method."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args

    def __call__(self) -> None:
        job, args = submitit.JobEnvironment(), copy.copy(self.args)
        # All GPUs stay visible: each rank chooses its own by LOCAL_RANK.
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        args.job_id = job.job_id
        args.output_dir = args.output_dir.replace("%j", job.job_id) or str(job.paths.folder)
        runtime.run(go_on, args)

    def checkpoint(self) -> "submitit.helpers.DelayedSubmission":
        """What to run after a requeue: the same call, which looks for the checkpoint when it starts."""
        return submitit.helpers.DelayedSubmission(self)


def go_on(args: argparse.Namespace) -> None:
    """Run main.py, and resume from the checkpoint that an earlier try of this job wrote, if there is one."""
    requeue = signal.getsignal(signal.SIGUSR2)  # submitit's handler; it ends rank 0 and does nothing on other ranks
    try:
        main.main(argparse.Namespace(**{**vars(args), **_flags_to_go_on(args)}))
    except runtime.Interrupted as stop:
        # SLURM itself requeues a job that it preempted by SIGTERM; a job that a user cancelled stays cancelled.
        if stop.number != signal.SIGTERM and callable(requeue):
            requeue(signal.SIGUSR2, None)
            time.sleep(10)  # if this rank ended first, rank 0 might be ended before it has requeued the job
        raise


def _flags_to_go_on(args: argparse.Namespace) -> dict[str, Any]:
    """The flags with which this job resumes from its own checkpoint; none if the newest checkpoint is another job's."""
    checkpoint = runtime.newest_checkpoint(args.output_dir)
    if checkpoint is None or getattr(checkpoint.args, "job_id", None) != args.job_id:
        return {}
    # The run has started, so its initial weights do not matter: --finetune counts as not given.
    return {"resume": checkpoint.path, "finetune": main.get_args_parser().get_default("finetune")}


def submit(args: argparse.Namespace) -> None:
    """Submit the job and print its number. Raises ``UserError`` at once for flags that cannot work."""
    if submitit is None:
        raise runtime.UserError("jobs are submitted with submitit, which is not installed: pip install submitit")
    runtime.need_signals("a job", *runtime.STOPPING)
    if runtime.get_world_size() > 1:
        raise runtime.UserError(
            "the job starts its ranks itself, --ngpus on each of --nodes: run "
            "run_with_submitit.py with python, without a launcher"
        )
    main.check_args(args)
    for name in ("ngpus", "nodes", "timeout"):
        if getattr(args, name) < 1:
            raise runtime.UserError(f"--{name} {getattr(args, name)} is out of range: it must be at least 1")
    # The job can then import main from wherever it is submitted.
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
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
