"""What a training program needs around any model: readable errors, processes that meet, whole files, and logs."""

import argparse
import atexit
import contextlib
import datetime
import errno
import itertools
import json
import math
import os
import pathlib
import platform
import random
import re
import shlex
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
import traceback
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, BinaryIO, NoReturn, TextIO

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, Sampler

if __package__:  # DETR keeps this file in a package, DeiT beside its main.py
    from .watchdog import STARTUP_SECONDS, Watchdog
else:
    from watchdog import STARTUP_SECONDS, Watchdog


# What to do about a loading process that the system has ended, which does not tell why.
LOADING_CURE = (
    "if the machine's memory or its shared memory (df -h /dev/shm; in Docker, --shm-size) was full, a "
    "lower --num_workers needs less of both"
)


class UserError(Exception):
    """A mistake of the user's (flag, file, picture): one sentence says what was wrong and what to do."""

    def __str__(self) -> str:
        # a DataLoader raises a worker's anew, with the worker's traceback before the sentence
        return " ".join(super().__str__().rpartition("UserError: ")[2].splitlines()).strip()


class Interrupted(Exception):
    """A signal, whose number is the argument, asked the run to end, and all that it has done is saved."""

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.args[0]).name} in {_where}: --resume auto goes on where it saved"


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser that accepts every flag with dashes and with underscores (``--save-every``, ``--save_every``).

    It reports a mistake in one line, without the usage of all flags.
    """

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([self._own_spelling(word) for word in words], namespace)

    def _own_spelling(self, word: str) -> str:
        """The word, where it is a flag in its other spelling that of the parser."""
        flag, equals, value = word.partition("=")
        own = {option.replace("_", "-"): option for option in self._option_string_actions}
        if not flag.startswith("--") or flag in self._option_string_actions:
            return word
        return own.get(flag.replace("_", "-"), flag) + equals + value

    def error(self, message: str) -> NoReturn:
        _end(2, f"{message}; --help lists all flags")


def run(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> None:
    """Call ``main(args)``; end the process with status 1 and one sentence on a ``UserError``, 130 on Ctrl-C, and
    75, sysexits.h's "try again", when a signal has ended training.

    The first process of a machine speaks at once, and the launcher then stops the others; another one speaks if it
    still runs some seconds later. So what all meet is said once, and what one meets alone by that one. Other exceptions
    keep their traceback, unless they only say that another process has failed.
    """
    try:
        main(args)
        leave()
    except KeyboardInterrupt:
        _end(130)
    except Interrupted as stop:
        leave()
        print_once(stop)
        _end(75)
    except UserError as error:
        _end(1, error)
    except torch.OutOfMemoryError as error:
        _end(1, f"the GPU's memory is full in {_where}: a smaller batch or mixed precision may fit: {UserError(error)}")
    except Exception as error:  # raised again, or said whole: the end of one of several processes would not say it
        if _tells_of_open_files(error):
            _end(1, f"too many files are open in {_where}: raise the limit with ulimit -n, or lower --num_workers")
        if "DataLoader" in str(error):
            _end(1, f"a loading process ended or hangs in {_where}: {UserError(error)}; {LOADING_CURE}")
        if not dist.is_initialized():
            raise
        lost = f"{_missing()} is lost or hangs in {_where}: {UserError(error)}" if _tells_of_loss(error) else None
        _end(1, lost or traceback.format_exc())


_ending = threading.Lock()  # taken by the thread that ends this process, so that no other one says a second error


def _end(status: int, error: object = "") -> NoReturn:
    if get_world_size() > 1 and not _ending.acquire(blocking=False):
        threading.Event().wait()  # the watchdog's thread, or the main one, is ending this process
    with contextlib.suppress(OSError):  # nobody may be listening any more
        if error:
            time.sleep(10 if _launched("LOCAL_RANK", "SLURM_LOCALID", 0) else 0)
            me = f"process {get_rank()} of {get_world_size()}: " if get_world_size() > 1 else ""
            print(f"error: {me}{error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
    if get_world_size() > 1:
        os._exit(status)  # an orderly exit would wait for collectives whose partners are gone
    sys.exit(status)


def _tells_of_open_files(error: BaseException) -> bool:
    # a DataLoader and PyTorch's shared memory raise RuntimeErrors with the system's words instead of an OSError
    return getattr(error, "errno", None) == errno.EMFILE or os.strerror(errno.EMFILE) in str(error)


def _tells_of_loss(error: BaseException | None) -> bool:
    return isinstance(error, dist.DistError) or bool(re.search("gloo|timeout|closed by peer", str(error)))


def _missing() -> str:
    """Who has not noticed within two seconds that a process is lost; the store is where the processes met."""
    silent = ["0"]  # which keeps the store: if that does not answer it is gone or hangs

    def ask() -> None:
        store = dist.distributed_c10d._get_default_store()
        with contextlib.suppress(dist.DistError):
            store.set(f"alive {get_rank()}", "")
            time.sleep(2)
            silent[:] = [str(rank) for rank in range(get_world_size()) if not store.check([f"alive {rank}"])]

    thread = threading.Thread(target=ask, daemon=True)  # the store's own time-outs do not hold for all of this
    thread.start()
    thread.join(10)
    return f"process {', '.join(silent)}" if silent else "another process"


# Processes


def need_signals(task: str, *names: str) -> None:
    """Raise ``UserError`` on a system without signals of these names that ``task`` needs, as Windows is one."""
    missing = [name for name in names if not hasattr(signal, name)]
    if missing:
        raise UserError(
            f"{task} needs the signals {' and '.join(names)}, and {platform.system()} lacks "
            f"{' and '.join(missing)}: use Linux, on Windows in WSL; main.py --eval works without them"
        )


def find_place(args: argparse.Namespace) -> torch.device:
    """Learn which of how many processes this is, without meeting them, and return its device.

    torchrun says it, or SLURM. Sets ``args.rank``, ``args.world_size``, ``args.distributed``; raises ``UserError``.
    """
    if args.world_size > 1 and get_world_size() == 1:
        raise UserError(
            f"--world_size {args.world_size} without a launcher: start with torchrun --nproc_per_node={args.world_size}"
        )
    args.rank, args.world_size, args.distributed = get_rank(), get_world_size(), get_world_size() > 1
    try:
        device = torch.device(args.device)
        if device.type == "cuda":
            number = _launched("LOCAL_RANK", "SLURM_LOCALID", 0) if args.distributed else device.index or 0
            device = torch.device("cuda", number)
            torch.cuda.set_device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        cause = str(error).partition("\n")[0]
        raise UserError(
            f"--device {args.device} cannot be used ({cause}): start as many processes as there are GPUs, "
            "or choose another, such as --device cpu"
        ) from error
    return device


def meet(args: argparse.Namespace, step_timeout: float = 60) -> None:
    """Meet the other ranks at ``--dist_url``, if there are any, and watch from then on that all of them stay alive.

    A rank that dies or hangs ends the job after ``step_timeout`` seconds, whatever it is doing. Call ``find_place``
    first. Raises ``UserError`` if the others do not come: they have that long, but at least ``STARTUP_SECONDS``.
    """
    global _store, _watchdog
    if not args.distributed or _watchdog:
        return
    patience = datetime.timedelta(seconds=max(step_timeout, STARTUP_SECONDS))
    try:
        _store, _, _ = next(dist.rendezvous(args.dist_url, args.rank, args.world_size, timeout=patience))
        _watchdog = Watchdog(_store, args.rank, args.world_size, step_timeout, _end_for_lost, _end_for_hang)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UserError(
            f"the others cannot be joined at --dist_url {args.dist_url} ({UserError(error)}): see whether "
            f"all {args.world_size} processes have started; without torchrun say tcp://HOST:PORT with the "
            "first machine's name; if they start far apart raise the step timeout"
        ) from error


def leave() -> None:
    """Tell the other ranks that this one ends in order, so that they do not miss it."""
    global _store, _watchdog
    if _watchdog:
        _watchdog.stop()
        _watchdog = _store = None  # of a file:// address, the last one to let go of it deletes the file


def _end_for_lost(ranks: list[int]) -> NoReturn:
    if get_rank() in ranks:  # this process was stopped for so long that the others have given it up
        _end(1, f"the other processes did not hear of this one for too long in {_where}")
    _end(1, f"process {', '.join(map(str, ranks))} is lost or hangs in {_where}: the others have not heard of it")


def _end_for_hang(place: str) -> NoReturn:
    _end(1, f"this process hangs in {_where}, at {place}")


def progressed(patience: float = 0.0) -> None:
    """Tell the watchdog, if there is one, that the main thread will call this again, or end, within the step timeout,
    or ``patience`` seconds if that is longer."""
    if _watchdog:
        _watchdog.progressed(patience)


def waiting() -> contextlib.AbstractContextManager:
    """A context in which the main thread may take any time: for other ranks, or for a slow disk."""
    return _watchdog.waiting() if _watchdog else contextlib.nullcontext()


def init_distributed(args: argparse.Namespace, step_timeout: float = 60) -> torch.device:
    """Find this process's place, join the other ranks, if there are any, for computing, and return the device.

    NCCL connects GPUs, gloo CPUs. A rank that waits ``step_timeout`` seconds for another in ``training_group`` ends;
    elsewhere, where the main one may evaluate or write for long, it waits an hour for one that is alive. Raises
    ``UserError`` as ``find_place`` and ``meet``.
    """
    global training_group
    device = find_place(args)
    meet(args, step_timeout)
    if args.distributed and not dist.is_initialized():
        backend, bound = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        try:
            dist.init_process_group(
                backend,
                store=_store,
                rank=args.rank,
                world_size=args.world_size,
                device_id=bound,
                timeout=datetime.timedelta(hours=1),
            )
            training_group = dist.new_group(timeout=datetime.timedelta(seconds=step_timeout))
            atexit.register(_disconnect)
        except (RuntimeError, ValueError) as error:
            stale = "; a file that an earlier job left must be deleted first" if "file://" in args.dist_url else ""
            raise UserError(
                f"the {args.world_size} processes cannot be connected by {backend}: {UserError(error)}{stale}"
            ) from error
    return device


def _disconnect() -> None:
    """End what computing has kept of the other ranks: threads, which would abort at the exit, and the store."""
    global training_group
    if dist.is_initialized():
        dist.destroy_process_group()
        training_group = None


def _launched(torchrun: str, slurm: str, alone: int) -> int:
    return int(os.environ.get(torchrun) or os.environ.get(slurm) or alone)


def get_rank() -> int:
    """Number of this process; 0 is the main one, which writes the files and the log."""
    return dist.get_rank() if dist.is_initialized() else _launched("RANK", "SLURM_PROCID", 0)


def get_world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else _launched("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", 1)


training_group: dist.ProcessGroup | None = None  # of training steps, in which the processes are never far apart
_where = "its first steps"  # of a pass over a loader, for messages
_store: dist.Store | None = None  # where the ranks met
_watchdog: Watchdog | None = None
_caught: list[int] = []  # signals that ask to end


def all_reduce_sum(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Sum over the processes, in place; under NCCL the tensor has to be on the GPU."""
    if dist.is_initialized():
        with waiting():
            dist.all_reduce(tensor, group=group)
    return tensor


def gather(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """The values of all processes, on each of them."""
    values = [value] * get_world_size()
    if dist.is_initialized():
        with waiting():
            dist.all_gather_object(values, value, group)
    return values


def gather_on_main(value: Any) -> list[Any] | None:
    """The values of all processes on the main one, None on the others."""
    if not dist.is_initialized():
        return [value]
    values = [None] * get_world_size() if get_rank() == 0 else None
    with waiting():
        dist.gather_object(value, values)
    return values


def print_once(*values: Any) -> None:
    """``print`` from the main process only; a full disk or a closed pipe behind it ends nothing."""
    if get_rank() == 0:
        with contextlib.suppress(OSError):
            print(*values, flush=True)


def own_group(_: int) -> None:
    """A DataLoader's ``worker_init_fn``: signals to a training process's group spare those it needs to end a step."""
    if hasattr(os, "setpgid"):  # systems without groups of processes send them no signals
        os.setpgid(0, 0)


# Compilation

_COMPILING_SECONDS = 600  # that one process may compile longer than another


def check_compiler(device: torch.device) -> None:
    """Try ``torch.compile`` on one addition; raises ``UserError`` with what it lacks here, since the first training
    step would fail for the same reason."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as error:  # a missing compiler, header, library or Triton each raises its own kind
        cause = str(error).partition("\n")[0]
        raise UserError(
            f"--compile cannot be used, since torch.compile fails on {device} ({cause}): install a C++ "
            "compiler such as g++, on a GPU also Triton, or leave --compile out"
        ) from error


def step_timeout(args: argparse.Namespace) -> float:
    """Seconds that a process waits for another in a training step; with ``--compile`` one may compile much longer."""
    return max(args.step_timeout, _COMPILING_SECONDS) if args.compile else args.step_timeout


# Random numbers and order: functions of where training is, so that it goes on anywhere as if it had never stopped


def seed_everything(*numbers: int) -> None:
    """Seed Python, NumPy and PyTorch from non-negative integers, such as (seed, epoch, step, process)."""
    python, numpy, pytorch = np.random.SeedSequence(numbers).generate_state(3)
    random.seed(int(python))
    np.random.seed(numpy)
    torch.manual_seed(int(pytorch))


class SeededDataset(Dataset):
    """``dataset`` asked by ``SeededSampler``'s keys, which seed the random numbers, whichever process loads it."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, ...]) -> Any:
        index, *numbers = key
        seed_everything(*numbers)
        return self.dataset[index]


class SeededSampler(Sampler[tuple[int, ...]]):
    """Keys (index, seed, epoch, place) of a sampler's indices; the place is that in the order over all processes.

    The sampler has to deal them out in turn, as torch's DistributedSampler does. ``len`` is that of a whole epoch.
    """

    def __init__(self, sampler: Sampler[int], seed: int) -> None:
        self.sampler, self.seed = sampler, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int, done: int = 0) -> None:
        """Go to an epoch of which all processes together have had ``done`` samples."""
        self.sampler.set_epoch(epoch)
        self.epoch, self.first = epoch, done // get_world_size()

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        for place, index in itertools.islice(enumerate(self.sampler), self.first, None):
            yield index, self.seed, self.epoch, place * get_world_size() + get_rank()

    def __len__(self) -> int:
        return len(self.sampler)


# Files


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Where the file cannot be written inside, a ``UserError`` names it."""
    try:
        with waiting():  # for the disk
            yield
    except (OSError, RuntimeError) as error:  # torch.save's RuntimeError is about positions; its context is the cause
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise UserError(f"{path} cannot be written: {cause.strerror}") from error


def prepare_output_dir(path: str) -> None:
    """Create the folder (main process) and make sure now, not after the first epoch, that it can be written."""
    if path and get_rank() == 0:
        with writing(f"output directory {path}"):
            os.makedirs(path, exist_ok=True)
            tempfile.TemporaryFile(dir=path).close()


@contextlib.contextmanager
def output_lock(path: str) -> Iterator[None]:
    """Keep the output directory for this job alone while inside.

    The operating system releases the lock of a process that ends, however it ends, so nothing has to be cleaned up
    after a kill. Raises ``UserError`` if another job, which is named, has the lock.
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

    A lock by ``lockf`` belongs to the process, so that its loading processes, which may outlive it, do not keep it.
    """
    try:
        import fcntl  # which Windows lacks, where evaluation works all the same

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


@contextlib.contextmanager
def replacing(path: str | os.PathLike, keep_previous: bool = False) -> Iterator[BinaryIO]:
    """A file to write, which then is renamed to ``path``, so that this is at every moment either the old or the new;
    the old NAME.pth can be kept as NAME.previous.pth.

    Raises ``UserError`` if the disk is full or cannot be written; the old files then stay as they were.
    """
    path, temporary = pathlib.Path(path), pathlib.Path(f"{path}.tmp")
    with writing(path):
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if keep_previous and path.exists():
                previous = path.with_suffix(".previous.pth")
                previous.unlink(missing_ok=True)
                try:
                    os.link(path, previous)
                except OSError:  # a disk without hard links
                    os.replace(path, previous)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def newest_checkpoint(output_dir: str, needed: bool = False) -> str:
    """The checkpoint of ``output_dir`` that ``--resume auto`` takes, "" if there is none. If the last is damaged that
    is said, and it makes room for the one before. Raises ``UserError`` if all are damaged, since a fresh start would
    replace them, or if there is none and one is ``needed``."""
    if not output_dir:
        raise UserError("--resume auto looks for checkpoints in --output_dir: say that too")
    damaged = []
    for path in (pathlib.Path(output_dir, name) for name in ("checkpoint.pth", "checkpoint.previous.pth")):
        try:
            if path.exists() and load_checkpoint(path):
                if damaged and get_rank() == 0:  # else it would be kept in place of the good one at the next save
                    with writing(path):
                        os.replace(damaged[0], path.with_name("checkpoint.damaged.pth"))
                return str(path)
        except UserError as error:
            print_once(f"note: {error}")
            damaged.append(path)
    if damaged or needed:
        raise UserError(f"no checkpoint in {output_dir} is whole: delete them to start anew, or --resume another")
    return ""


# what kept command lines hold; only one flavour of paths can be made here, so both come back as pure ones, and their
# module has two names in Python's versions
_ALLOWED = [
    argparse.Namespace,
    *(
        (cls, f"{module}.{cls.__name__.removeprefix('Pure')}")
        for module in ("pathlib", "pathlib._local")
        for cls in (pathlib.PurePosixPath, pathlib.PureWindowsPath)
    ),
]


def load_checkpoint(path_or_url: str | os.PathLike) -> dict:
    """Read a checkpoint, a URL's from PyTorch's hub cache or else downloaded, without running code from it.

    Beyond tensors, on the CPU, and plain containers only ``argparse.Namespace`` and paths are let in. Raises
    ``UserError`` for a file that is missing, truncated, no checkpoint, or asks for anything else (named).
    """
    path, load, cure = str(path_or_url), torch.load, "fetch or copy it again"
    if "://" in path:
        load = torch.hub.load_state_dict_from_url
        cure = f"fetch it elsewhere and put it at {torch.hub.get_dir()}/checkpoints/{path.rpartition('/')[2]}"
    try:
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():  # PyTorch reads changed weights without a word
            raise zipfile.BadZipFile
        with torch.serialization.safe_globals(_ALLOWED):
            checkpoint = load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"checkpoint {path} cannot be read: {error.strerror or error}: {cure}") from error
    except Exception as error:  # changed bytes have raised ten kinds
        if name := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"checkpoint {path} is refused: it needs {name[1]} to be read, which could run foreign code"
            ) from error
        raise UserError(f"checkpoint {path} is truncated, damaged or none of PyTorch's: {cure}") from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"checkpoint {path} holds a {type(checkpoint).__name__}, not a dict of weights")
    return checkpoint


def resume_point(checkpoint: Mapping[str, Any]) -> tuple[int, dict[str, Any] | None]:
    """The epoch that training goes on with, and the progress in it, None if it begins. Raises errors of several kinds
    where these are damaged."""
    epoch, progress = checkpoint["epoch"], checkpoint.get("progress")
    images = 0 if progress is None else progress["images"]
    if not (isinstance(epoch, int) and isinstance(images, int) and min(epoch, images) >= 0):
        raise ValueError(f"its epoch is {epoch!r} and has {images!r} pictures")
    if progress is None:
        return epoch + 1, None
    return epoch, {"images": images, "values": {name: steps.tolist() for name, steps in progress["values"].items()}}


def note_values_kept(path: str | os.PathLike, values: Mapping[str, tuple[Any, Any]], cure: str) -> None:
    """Print one note with the flags whose value a run that resumes from ``path`` does not follow; none if there are
    none.

    Args:
        values: of every flag that a resumed run does not follow, what the command line says and what the run goes on
            with; the flag may have words after it, such as "--epochs for the schedule".
        cure: how to train with the values of the command line.
    """
    shown = {flag: tuple(map(_shown, pair)) for flag, pair in values.items()}  # rates may differ in the last bit
    differing = [f"{flag}: {kept}, not {now}" for flag, (now, kept) in shown.items() if now != kept]
    if differing:
        print_once(
            f"note: {path} is resumed with what its run began with, not with all that the command line says: "
            f"{'; '.join(differing)}. {cure}"
        )


def start_values_kept(
    args: argparse.Namespace, checkpoint: Mapping[str, Any], flags: Mapping[str, Any], epoch: int | None
) -> dict[str, tuple[Any, Any]]:
    """Values for ``note_values_kept`` of flags that only say how a run begins, if they ask for what the run in the
    checkpoint did not begin with.

    Args:
        flags: names of these flags, with the values that ask for nothing.
        epoch: the one to go on with; None where the checkpoint does not say, and ``start_epoch`` is followed.
    """
    values = {}
    for flag, nothing in flags.items():
        now, before = getattr(args, flag), getattr(checkpoint.get("args"), flag, nothing)
        if now not in (nothing, before):
            values[flag] = (now, before)
    if "start_epoch" in values:
        values["start_epoch"] = (args.start_epoch, args.start_epoch if epoch is None else epoch)
    return values


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(_shown, value))
    if value is None or value == "":
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def model_weights(checkpoint: Mapping[str, Any], path: str, key: str = "model") -> dict[str, torch.Tensor]:
    """The state dict in a checkpoint: under ``key``, or the checkpoint itself if it holds only tensors."""
    weights = checkpoint.get(key, checkpoint)
    if not (isinstance(weights, Mapping) and weights and all(isinstance(v, torch.Tensor) for v in weights.values())):
        raise UserError(f"checkpoint {path} has no state dict under {key!r}; its keys are {_some(checkpoint)}")
    return dict(weights)


def key_differences(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> str:
    """What keeps ``found`` from being loaded into a model with the state dict ``expected``; empty if nothing."""
    differences = {
        "missing": [key for key in expected if key not in found],
        "unexpected": [key for key in found if key not in expected],
        "of another shape": [
            f"{key} is {tuple(found[key].shape)} instead of {tuple(value.shape)}"
            for key, value in expected.items()
            if key in found and found[key].shape != value.shape
        ],
    }
    return ", ".join(f"{len(keys)} {kind} ({_some(keys)})" for kind, keys in differences.items() if keys)


def _some(names: Iterable[Any]) -> str:
    names = list(map(str, names))
    return ", ".join(names[:3] + ["..."] * (len(names) > 3))


# A run of training that may be ended at any moment

STOPPING = ("SIGTERM", "SIGUSR1", "SIGUSR2")  # the last is submitit's; Windows has only the first


class Run(contextlib.ExitStack):
    """Training from where it was: saves every ``save_every`` steps (0: none), before and after each evaluation, and
    when a signal came. Inside a ``with`` signals end training by ``Interrupted`` after the running step; on several
    GPUs after at most 20, since that is how often the processes meet without slowing each other down.

    Args:
        save: writes the state; takes a path, the epoch, ``args``, and the progress in the epoch, None after it.
        epoch: the first one to train, of which ``progress`` has been made, None for none.
        loader: of ``SeededSampler``'s samples.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        log: "RunLog",
        save: Callable[..., None],
        epoch: int,
        progress: dict | None,
        loader: DataLoader,
    ) -> None:
        super().__init__()
        places = gather((epoch, progress and progress["images"]))
        if len(set(places)) > 1:
            raise UserError(
                f"the processes would go on from different places (epoch, pictures), {places}: they must "
                "all see the same files in --output_dir, or in --resume"
            )
        self.args, self.log, self._save, self.loader, self.failure = args, log, save, loader, None
        self.epoch, self.progress, self.images_per_step = epoch, progress, loader.batch_size * get_world_size()
        _caught.clear()
        for number in (getattr(signal, name) for name in STOPPING):
            self.callback(signal.signal, number, signal.signal(number, lambda number, _: _caught.append(number)))

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        super().__exit__(kind, error, trace)
        if self.failure and kind in (None, Interrupted):
            raise self.failure
        if _caught and _tells_of_loss(error):  # another one heard the signal first, in the evaluation
            raise Interrupted(_caught[0]) from error

    def epochs(self) -> Iterator[int]:
        """The epochs to train, each with the loader's sampler where it has to go on."""
        while self.epoch < self.args.epochs:
            self.progress = self.progress or {"images": 0, "values": {}}
            self.first_step = self.progress["images"] // self.images_per_step
            self.loader.sampler.set_epoch(self.epoch, self.first_step * self.images_per_step)
            yield self.epoch
            self.epoch, self.progress = self.epoch + 1, None

    def save(self, progress: dict[str, Any] | None = None, row: Mapping[str, Any] | None = None) -> None:
        """Write the state in the middle of the epoch, or after it with its ``row`` of the log. What fails is said and
        tried again at the next save. All processes have to call this."""
        global _where
        before, _where = _where, f"the save after {_where}"
        with waiting():  # the next step would not wait long for the main process to write
            try:
                self.log.write(self.epoch, row)
                if self.args.output_dir and get_rank() == 0:
                    self._save(pathlib.Path(self.args.output_dir, "checkpoint.pth"), self.epoch, self.args, progress)
                self.failure = None
            except UserError as error:
                print_once(f"note: {error}: training goes on and tries again at the next save")
                self.failure = error
            gather("saved")
        _where = before

    def after_step(self, progress: "Progress") -> None:
        """Save if it is time or the epoch's last step, and end if a process got a signal."""
        due = progress.done == len(self.loader) or self.args.save_every and progress.done % self.args.save_every == 0
        stop = max(_caught, default=0)
        if dist.is_initialized():  # it takes all processes to stop
            meet = due or progress.done % 20 == 0 or dist.get_backend() == "gloo"
            stop = max(gather(stop, training_group)) if meet else 0
        if stop or due:
            progress.read()
            values = {name: torch.tensor(steps, dtype=torch.float64) for name, steps in progress.values.items()}
            self.save({"images": progress.done * self.images_per_step, "values": values})
        if stop:
            raise Interrupted(stop)

    def describe(self, step: int, values: Mapping[str, float]) -> str:
        """Write nonfinite.json: a step, its values and the names of its pictures in all processes. Returns how to
        replay it. All processes have to call this."""
        if not self.args.output_dir:
            return ""
        self.loader.sampler.set_epoch(self.epoch, step * self.images_per_step)
        keys = itertools.islice(self.loader.sampler, self.loader.batch_size)
        name = getattr(self.loader.dataset.dataset, "name", str)
        pictures = gather([name(index) for index, *_ in keys])
        path = pathlib.Path(self.args.output_dir, "nonfinite.json")
        if get_rank() == 0:
            try:
                with replacing(path) as file:
                    file.write(json.dumps({"epoch": self.epoch, "step": step, **values, "pictures": pictures}).encode())
            except UserError as error:  # what is not finite has to be said all the same
                return f"; {error}"
        launcher = f"torchrun --nproc_per_node={get_world_size()}" if get_world_size() > 1 else "python"
        return f"; its pictures are in {path}; to replay it: {launcher} {shlex.join(sys.argv)} --resume auto"


# Logs


class Progress:
    """One pass over a loader: gives its batches, and every 20 steps and at the end prints a line of steps, time left,
    images/s, GPU memory, and of the values ``shown`` (or all) the mean of the last 20 steps and, in brackets, of all.
    ``constants`` are the same in all steps. In training ``run`` says where to begin; each step has its random numbers.
    """

    def __init__(
        self,
        header: str,
        loader: Sized,
        images_per_step: float,
        shown: Iterable[str] = (),
        run: Run | None = None,
        **constants: float,
    ) -> None:
        self.header, self.loader, self.images_per_step, self.shown = header, loader, images_per_step, shown
        self.run, self.done = run, run.first_step if run else 0
        self.values = {name: [value] for name, value in constants.items()} | (run.progress["values"] if run else {})
        self._unread: list[dict[str, torch.Tensor]] = []

    def __iter__(self) -> Iterator:
        # In training the ranks wait for each other in every step, and the one that waits for too long ends the job.
        # In evaluation they do not; there a step hangs that takes ten times as long as the slowest one before it.
        progressed(math.inf)
        before, slowest = time.perf_counter(), 0.0
        for batch in self._steps():
            yield batch
            now = time.perf_counter()
            before, slowest = now, max(slowest, now - before)
            if not self.run:
                progressed(10 * slowest)
        progressed()

    def _steps(self) -> Iterator:
        global _where
        started, first = time.perf_counter(), self.done
        for batch in self._batches():
            _where = f"{self.header}, step {self.done}"
            if self.run:  # a sample's numbers end with 0, a process's with its own
                seed_everything(self.run.args.seed, self.run.epoch, self.done, 1 + get_rank())
            yield batch
            self.done += 1
            if self.done % 20 == 0 or self.done == len(self.loader):
                self.read()
                print_once(self._line(first, time.perf_counter() - started))
            if self.run:
                self.run.after_step(self)
            elif _caught:
                raise Interrupted(_caught[0])

    def _batches(self) -> Iterator:
        """The loader's batches. What a worker leaves that ends while it hands one over, is told as its end."""
        batches = iter(self.loader)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (ConnectionError, EOFError) as error:
                time.sleep(5)  # PyTorch raises an error here that names the worker, as soon as it learns of its end
                raise RuntimeError(f"DataLoader worker ended while it handed over a batch: {error!r}") from error
            yield batch

    def add(self, **values: torch.Tensor) -> None:
        """Take one step's 0-d tensors; they are read when the next line is due, since the GPU would wait for that, as
        means over the processes. If one is then not finite all processes raise the same ``UserError``."""
        self._unread.append({name: value.detach().float() for name, value in values.items()})

    def averages(self) -> dict[str, float]:
        """Mean of every value over all steps."""
        return {name: statistics.fmean(values) for name, values in self.values.items()}

    def read(self) -> None:
        """Take the steps since the last time into ``values``."""
        if not self._unread:
            return
        rows = torch.stack([torch.stack(list(step.values())) for step in self._unread])
        rows = all_reduce_sum(rows, training_group) / get_world_size()
        for step, row in enumerate(rows.tolist(), self.done - len(rows)):
            for name, value in zip(self._unread[0], row, strict=True):
                if not math.isfinite(value):
                    more = self.run.describe(step, {name: value, "lr": self.values["lr"][0]}) if self.run else ""
                    raise UserError(
                        f"{name} is {value} at {self.header}, step {step}: training stops; a lower --lr or "
                        f"gradient clipping may help, and what was saved is still there{more}"
                    )
                self.values.setdefault(name, []).append(value)
        self._unread.clear()

    def _line(self, first: int, elapsed: float) -> str:
        done, steps, rate = self.done, len(self.loader), (self.done - first) / elapsed
        left = datetime.timedelta(seconds=round((steps - done) / rate))
        line = f"{self.header} [{done}/{steps}]  eta {left}  {rate * self.images_per_step:.1f} img/s"
        means = self.averages()
        for name in self.shown or means:
            line += f"  {name} {statistics.fmean(self.values[name][-20:]):.4g} ({means[name]:.4g})"
        if memory := torch.cuda.max_memory_allocated():
            line += f"  mem {memory / 2**20:.0f} MB"
        return line


def step_optimizer(loss_scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
    """Step and update the scaler, which leaves out steps whose gradients overflow and halves its scale.

    Raises ``UserError`` when it has come down without end: then the gradients are not finite at any scale.
    """
    # read before the step, which waits for the gradients anyway: read after it, it would wait for the optimizer too
    if loss_scaler.get_scale() < 2**-14:  # 2¹⁶ at the start: 31 halvings; 1 if disabled
        raise UserError(
            "the gradients are not finite in float16 at any scale of the loss: training stops; bfloat16 "
            "or float32, or a lower --lr, may help, and what was saved is still there"
        )
    loss_scaler.step(optimizer)
    loss_scaler.update()


class RunLog:
    """``log.txt`` (one JSON object a line) and TensorBoard scalars under ``output_dir``; main process only.

    Without an output directory it does nothing. ``first_epoch`` is that of a run that goes on: what an interrupted one
    left of it or later epochs is dropped; None adds to what is there. A line cut by a crash is dropped too.
    """

    def __init__(self, output_dir: str, first_epoch: int | None = None) -> None:
        self.path = pathlib.Path(output_dir, "log.txt") if output_dir and get_rank() == 0 else None
        self.lines, self.unwritten, self.scalars = [], False, []
        old = self.path.read_bytes() if self.path and self.path.exists() else b""
        for line in old.splitlines(keepends=True):
            epoch = re.search(rb'"epoch": (\d+)', line)
            dropped = epoch and first_epoch is not None and int(epoch[1]) >= first_epoch
            self.lines += [line] * (line.endswith(b"\n") and not dropped)

    def write(self, epoch: int, values: Mapping[str, Any] | None = None) -> None:
        """Append an epoch's values, if there are any, and write what is not written yet; numbers go to TensorBoard too.

        Raises ``UserError`` if log.txt cannot be written; the next call tries that again. A failure to write for
        TensorBoard, whose numbers are all in log.txt, is only noted, and the next call writes them too.
        """
        if values and self.path:
            self.lines.append(json.dumps(values).encode() + b"\n")
            self.scalars += [(name, value, epoch) for name, value in values.items() if isinstance(value, (int, float))]
            self.unwritten = True
        if self.unwritten:
            with replacing(self.path) as file:
                file.writelines(self.lines)
            self.unwritten = False
        if self.scalars:
            try:
                self._write_scalars()
            except UserError as error:
                print_once(f"note: {error}: training goes on and tries again at the next save")

    def _write_scalars(self) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and evaluation has no use for it

        folder = self.path.with_name("tensorboard")
        # what earlier writers left from here on is hidden
        with writing(folder), SummaryWriter(str(folder), purge_step=self.scalars[0][2]) as board:
            for scalar in self.scalars:
                board.add_scalar(*scalar)
        self.scalars = []
