"""Errors with a message that tells the user what is wrong and what to do."""

import errno
import os
import re
import signal

import torch
import torch.distributed as dist

# When the system kills a loading process, no error says why, so the message names the likely causes.
_LOADING_ADVICE = (
    "if the machine's memory or its shared memory (df -h /dev/shm; in Docker, --shm-size) was full, a "
    "lower --num_workers needs less of both"
)


class UserError(Exception):
    """A mistake of the user (flag, file, image). One sentence says what is wrong and what to do."""

    def __str__(self) -> str:
        # A DataLoader raises a worker's error again, with the worker's traceback in front of the sentence.
        return " ".join(super().__str__().rpartition("UserError: ")[2].splitlines()).strip()


class Interrupted(Exception):
    """A signal asked training to stop, and everything up to then is saved.

    Args:
        number: the signal, as in `signal.SIGTERM`.
        place: where in training it stopped, such as "epoch 3, step 7".
    """

    def __init__(self, number: int, place: str) -> None:
        super().__init__(number, place)

    @property
    def number(self) -> int:
        """The number of the signal."""
        return self.args[0]

    def __str__(self) -> str:
        number, place = self.args
        return f"stopped by {signal.Signals(number).name} in {place}: --resume auto continues from the last save"


def explanation(error: Exception, place: str = "") -> str:
    """A sentence for an error caused by a full GPU, a limit of the system or a lost loading process; else empty.

    Args:
        place: what the program was doing, such as "epoch 3, step 7".
    """
    where = f" in {place}" if place else ""
    if isinstance(error, torch.OutOfMemoryError):
        return f"the GPU's memory is full{where}: a smaller batch or mixed precision may fit: {UserError(error)}"
    if _tells_of_open_files(error):
        return f"too many files are open{where}: raise the limit with ulimit -n, or lower --num_workers"
    if "DataLoader" in str(error):
        return f"a loading process ended or hangs{where}: {UserError(error)}; {_LOADING_ADVICE}"
    return ""


def tells_of_lost_rank(error: BaseException | None) -> bool:
    """Whether communication failed because another rank has ended or does not answer."""
    if isinstance(error, UserError):  # its sentence may name --step-timeout, or a folder "gloo"
        return False
    return isinstance(error, dist.DistError) or bool(re.search("gloo|timeout|closed by peer", str(error)))


def _tells_of_open_files(error: BaseException) -> bool:
    # A DataLoader and PyTorch's shared memory raise a RuntimeError with the system's words instead of an OSError.
    return getattr(error, "errno", None) == errno.EMFILE or os.strerror(errno.EMFILE) in str(error)
