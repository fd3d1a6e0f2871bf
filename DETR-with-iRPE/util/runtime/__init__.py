"""What a training program needs around any model: errors, ranks, files, checkpoints, logs.

DeiT-with-iRPE/runtime and DETR-with-iRPE/util/runtime are the same package; `make vendor` copies it. Each of its
modules has one subject:

- `errors`: errors with a message for the user;
- `program`: the command line, and how a program ends;
- `ranks`: which rank this process is, its device, and communication between the ranks;
- `job`: this process's part in a job of several ranks, from the start to the end;
- `watchdog`: ends a job of which a rank died or hangs;
- `requirements`: what the system and the compiler must offer;
- `seeding`: random numbers that depend on the position in training only;
- `loading`: batches from loading processes;
- `files`: writing files, and the lock of an output directory;
- `checkpoints`: reading checkpoints and comparing them with a model and with the flags;
- `training_run`: saves, signals and the epochs of a run that can be resumed;
- `progress`: the lines that a pass over a loader prints;
- `run_log`: log.txt and TensorBoard.
"""

from .checkpoints import (
    Checkpoint,
    checkpoint_to_resume,
    key_differences,
    load_checkpoint,
    model_weights,
    newest_checkpoint,
    note_values_kept,
    resume_point,
    start_values_kept,
)
from .errors import Interrupted, UserError
from .files import output_lock, prepare_output_dir, replacing, writing
from .job import Job
from .loading import own_group, read_batches
from .program import ArgumentParser, run
from .progress import Progress, step_optimizer
from .ranks import all_reduce_sum, find_device, gather, gather_on_main, get_rank, get_world_size, print_once, with_place
from .requirements import check_compiler, need_signals, step_timeout
from .run_log import RunLog
from .seeding import SeededDataset, SeededSampler, seed_everything
from .training_run import STOPPING, Run

__all__ = [
    "STOPPING",
    "ArgumentParser",
    "Checkpoint",
    "Interrupted",
    "Job",
    "Progress",
    "Run",
    "RunLog",
    "SeededDataset",
    "SeededSampler",
    "UserError",
    "all_reduce_sum",
    "check_compiler",
    "checkpoint_to_resume",
    "find_device",
    "gather",
    "gather_on_main",
    "get_rank",
    "get_world_size",
    "key_differences",
    "load_checkpoint",
    "model_weights",
    "need_signals",
    "newest_checkpoint",
    "note_values_kept",
    "output_lock",
    "own_group",
    "prepare_output_dir",
    "print_once",
    "read_batches",
    "replacing",
    "resume_point",
    "run",
    "seed_everything",
    "start_values_kept",
    "step_optimizer",
    "step_timeout",
    "with_place",
    "writing",
]
