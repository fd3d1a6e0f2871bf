"""Writing files so that they are always whole, and the lock of an output directory."""

import contextlib
import os
import pathlib
import socket
import tempfile
import time
from collections.abc import Iterator
from typing import BinaryIO, TextIO

from .errors import UserError
from .ranks import get_rank, print_once


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """A context for code that writes a file: if it cannot be written, a ``UserError`` names it."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save raises a RuntimeError whose context is the cause
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise UserError(f"{path} cannot be written: {cause.strerror}") from error


@contextlib.contextmanager
def replacing(path: str | os.PathLike, keep_previous: bool = False) -> Iterator[BinaryIO]:
    """Open a new file that replaces ``path`` at the end of the context; until then, the old file is untouched.

    Args:
        keep_previous: keep the old NAME.pth as NAME.previous.pth.
    Raises: UserError if the disk is full or cannot be written; the old files then stay as they were.
    """
    path, temporary = pathlib.Path(path), pathlib.Path(f"{path}.tmp")
    with writing(path):
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if keep_previous and path.exists():
                _keep(path)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _keep(path: pathlib.Path) -> None:
    """Keep the file as NAME.previous.pth; where the disk has hard links, ``path`` stays there too at every moment."""
    previous = path.with_suffix(".previous.pth")
    previous.unlink(missing_ok=True)
    try:
        os.link(path, previous)
    except OSError:  # a disk without hard links
        os.replace(path, previous)


def prepare_output_dir(path: str) -> None:
    """Create the output directory (on rank 0) and make sure at the start, not after an epoch, that it is writable."""
    if path and get_rank() == 0:
        with writing(f"output directory {path}"):
            os.makedirs(path, exist_ok=True)
            tempfile.TemporaryFile(dir=path).close()


@contextlib.contextmanager
def output_lock(path: str) -> Iterator[None]:
    """A context in which this job alone uses the output directory.

    The operating system releases the lock of a process that ends, however it ends, so nothing has to be cleaned up
    after a kill.

    Raises: UserError that names the other job if the directory is in use.
    """
    if not path or get_rank() != 0:
        yield
        return
    with writing(f"output directory {path}"):
        file = open(os.path.join(path, ".lock"), "a+")
    with file:
        _lock(file, path)
        yield


def _lock(file: TextIO, path: str) -> None:
    """Lock the open file and write into it who has the lock, for the message to the next job.

    A lock by ``lockf`` belongs to the process: its loading processes, which may outlive it, do not keep the lock.
    """
    try:
        import fcntl  # Windows lacks it, and can evaluate without it

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        raise UserError(
            f"--output_dir {path} is in use by {file.read() or 'another job'}: choose another one, or stop "
            "that job first"
        ) from error
    except (ModuleNotFoundError, OSError) as error:
        print_once(
            f"note: --output_dir {path} is on a disk without locks ({error}): make sure that no other job uses it"
        )
        return
    with writing(f"output directory {path}"):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        file.flush()
