"""Which rank of the job this process is, the device it uses, and communication between the ranks."""

import argparse
import contextlib
import os
import threading
import time
from typing import Any

import torch
import torch.distributed as dist

from .errors import UserError


def get_rank() -> int:
    """The number of this process in the job. Rank 0 is the main one, which writes the files and prints the log."""
    return dist.get_rank() if dist.is_initialized() else _launched("RANK", "SLURM_PROCID", 0)


def get_world_size() -> int:
    """The number of ranks of the job."""
    return dist.get_world_size() if dist.is_initialized() else _launched("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", 1)


def get_local_rank() -> int:
    """The number of this process among those of the same machine."""
    return _launched("LOCAL_RANK", "SLURM_LOCALID", 0)


def _launched(torchrun: str, slurm: str, alone: int) -> int:
    """The value that the launcher set in the environment: torchrun or SLURM; ``alone`` without a launcher."""
    return int(os.environ.get(torchrun) or os.environ.get(slurm) or alone)


def with_place(args: argparse.Namespace) -> argparse.Namespace:
    """A copy of the flags with this process's place in the job: ``rank``, ``world_size`` and ``distributed``."""
    world_size = get_world_size()
    return argparse.Namespace(
        **{**vars(args), "rank": get_rank(), "world_size": world_size, "distributed": world_size > 1}
    )


def find_device(name: str, world_size: int = 1) -> torch.device:
    """The device of this rank, without communication with the others; a GPU also becomes the current one.

    Args:
        name: the value of ``--device``, such as "cuda" or "cpu".
        world_size: the value of ``--world_size``.
    Raises: UserError if the device cannot be used, or ``--world_size`` asks for ranks that no launcher started.
    """
    if world_size > 1 and get_world_size() == 1:
        raise UserError(
            f"--world_size {world_size} without a launcher: start with torchrun --nproc_per_node={world_size}"
        )
    try:
        device = torch.device(name)
        if device.type == "cuda":
            device = torch.device("cuda", get_local_rank() if get_world_size() > 1 else device.index or 0)
            torch.cuda.set_device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        cause = str(error).partition("\n")[0]
        if torch.cuda.is_available():
            cure = f"start at most {torch.cuda.device_count()} ranks, one for each GPU, or add --device cpu"
        else:
            cure = "PyTorch finds no GPU here, so add --device cpu"
        raise UserError(f"--device {name} cannot be used ({cause}): {cure}") from error
    return device


def all_reduce_sum(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Sum the tensor over the ranks, in place, and return it. Under NCCL it must be on the GPU."""
    if dist.is_initialized():
        dist.all_reduce(tensor, group=group)
    return tensor


def gather(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """The values of all ranks, on every rank."""
    values = [value] * get_world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value, group)
    return values


def gather_on_main(value: Any) -> list[Any] | None:
    """The values of all ranks on rank 0; None on the others."""
    if not dist.is_initialized():
        return [value]
    values = [None] * get_world_size() if get_rank() == 0 else None
    dist.gather_object(value, values)
    return values


def print_once(*values: Any) -> None:
    """``print`` on rank 0 only. A full disk or a closed pipe behind the output does not end the run."""
    if get_rank() == 0:
        with contextlib.suppress(OSError):
            print(*values, flush=True)


def silent_ranks() -> list[int]:
    """The ranks that do not call this function within two seconds, for a message about a lost rank.

    Rank 0 keeps the store in which the ranks sign in; if the store does not answer, rank 0 is the silent one.
    """
    silent = [0]

    def sign_in() -> None:
        store = dist.distributed_c10d._get_default_store()
        with contextlib.suppress(dist.DistError):
            store.set(f"alive {get_rank()}", "")
            time.sleep(2)
            silent[:] = [rank for rank in range(get_world_size()) if not store.check([f"alive {rank}"])]

    thread = threading.Thread(target=sign_in, daemon=True)  # the store has no time-out for some of its requests
    thread.start()
    thread.join(10)
    return silent
