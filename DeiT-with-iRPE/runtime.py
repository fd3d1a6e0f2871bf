"""What a training program needs around its model: errors a user can read, processes that find each other,
files that are always whole, and logs. Nothing here knows which model is trained.

What is wrong for all processes (flags, files, data sets) is found before they meet, and the first of each machine
says it. After that a mistake is one process's own, and said with its number, unless it is a ``SharedError``.
"""
import argparse
import contextlib
import datetime
import fcntl
import json
import math
import multiprocessing
import os
import pathlib
import random
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist


class UserError(Exception):
    """A mistake of the user's (flag, file, picture): one sentence says what was wrong and what to do."""

    def __str__(self) -> str:
        # A DataLoader raises a worker's again as "Caught UserError in DataLoader worker process 0. Original Traceback".
        message = super().__str__()
        if message.startswith("Caught ") and "Original Traceback" in message:
            message = message.rpartition("UserError: ")[2]
        return " ".join(message.split("\n")).strip()


class SharedError(UserError):
    """A ``UserError`` that all processes raise together, since it comes from numbers that they share."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser, but a mistake is said in one line, once, without the usage of all flags."""

    def error(self, message: str) -> NoReturn:
        _leave(2, f"error: {message}; --help lists all flags")


def run(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> None:
    """Call ``main(args)``; end the process with status 1 and one sentence on a ``UserError``, 130 on Ctrl-C.

    A process that cannot go on because another one failed says that in a line. Other exceptions keep their traceback.
    """
    try:
        main(args)
    except KeyboardInterrupt:
        _leave(130, "interrupted")
    except Exception as error:
        joined, me = dist.is_initialized(), f"process {get_rank()} of {get_world_size()}"
        if isinstance(error, SharedError) or isinstance(error, UserError) and not joined:
            _leave(1, f"error: {error}")
        if not joined:
            raise
        if isinstance(error, UserError):
            _leave(1, f"error: {me}: {error}", alone=True)
        lost = isinstance(error, dist.DistError) or "gloo" in str(error)
        _leave(1, f"error: {me} lost the others: {_first_line(error)}" if lost else traceback.format_exc(), alone=True)
    if dist.is_initialized():
        dist.destroy_process_group()


def _leave(status: int, words: str, alone: bool = False) -> NoReturn:
    """End the process; what it does not meet alone only the first of the machine says."""
    if alone or _local_rank() == 0:
        print(words, file=sys.stderr, flush=True)
    else:
        time.sleep(2)  # a launcher that sees one process end stops the others, also the one that is to speak
    if not dist.is_initialized():
        sys.exit(status)
    for child in multiprocessing.active_children():
        child.terminate()
    sys.stdout.flush()
    os._exit(status)  # an orderly exit would wait for collectives whose partners are gone


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


# Processes

_place = (0, 1)  # (number of this process, how many there are), set by find_place


def find_place(args: argparse.Namespace) -> torch.device:
    """Learn which of how many processes this is, without meeting them, and return its device.

    The launcher's environment says it: torchrun's and torch.distributed.launch's, or SLURM's. Sets ``args.rank``,
    ``args.world_size`` and ``args.distributed``. Raises ``UserError`` for what cannot work.
    """
    global _place
    args.rank, args.world_size = _place = _read_place(args)
    args.distributed = args.world_size > 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    try:
        device = torch.device(args.device)
        if device.type == "cuda" and processes > torch.cuda.device_count() > 0:
            raise UserError(f"there are {processes} processes on a machine with {torch.cuda.device_count()} GPUs: "
                            "start one for each GPU at most")
        if device.type == "cuda" and args.distributed:
            device = torch.device("cuda", _local_rank(args))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {args.device} cannot be used ({_first_line(error)}): choose another, such as "
                        "--device cpu") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _read_place(args: argparse.Namespace) -> tuple[int, int]:
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return int(env["RANK"]), int(env["WORLD_SIZE"])
    tasks = int(env.get("SLURM_STEP_NUM_TASKS", 1))
    if tasks > 1:
        if args.dist_url == "env://" and "MASTER_ADDR" not in env:
            raise UserError(f"{tasks} processes under SLURM need --dist_url tcp://HOST:PORT with the first node's name")
        return int(env["SLURM_PROCID"]), tasks
    if args.world_size > 1:
        raise UserError(f"--world_size {args.world_size} without a launcher: start with "
                        f"torchrun --nproc_per_node={args.world_size}")
    return 0, 1


def _local_rank(args: argparse.Namespace | None = None) -> int:
    return int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or getattr(args, "local_rank", 0) or 0)


def init_distributed(args: argparse.Namespace) -> torch.device:
    """Find this process's place, join the others, if there are any, at ``--dist_url``, and return the device.

    NCCL connects GPUs, gloo CPUs. Raises ``UserError`` as ``find_place``, or if the others cannot be joined.
    """
    device = find_place(args)
    if args.distributed and not dist.is_initialized():
        backend, bound = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        try:
            dist.init_process_group(backend, args.dist_url, rank=args.rank, world_size=args.world_size, device_id=bound)
        except (RuntimeError, ValueError, AssertionError) as error:
            raise UserError(f"process {args.rank} of {args.world_size} cannot join the others at --dist_url "
                            f"{args.dist_url}: {_first_line(error)}") from error
    return device


def get_rank() -> int:
    """Number of this process, 0 if it is alone."""
    return dist.get_rank() if dist.is_initialized() else _place[0]


def get_world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else _place[1]


def is_main_process() -> bool:
    """Whether this process writes the files and the log."""
    return get_rank() == 0


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over the processes, in place; under NCCL the tensor has to be on the GPU."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def seed_everything(*numbers: int) -> None:
    """Seed Python, NumPy and PyTorch from non-negative integers, such as (seed, rank, epoch)."""
    python, numpy, pytorch = np.random.SeedSequence(numbers).generate_state(3)
    random.seed(int(python))
    np.random.seed(numpy)
    torch.manual_seed(int(pytorch))


def print_once(*values: Any) -> None:
    """``print`` from the main process only."""
    if is_main_process():
        print(*values, flush=True)


# Files

@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Where the file cannot be written inside, a ``UserError`` names it."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save's RuntimeError is about positions; its context is the cause
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise UserError(f"{path} cannot be written: {cause.strerror}") from error


def prepare_output_dir(path: str) -> None:
    """Create the folder (main process) and make sure now, not after the first epoch, that it can be written."""
    if not path or not is_main_process():
        return
    with writing(f"output directory {path}"):
        os.makedirs(path, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()


def save_atomically(obj: Any, path: str | os.PathLike) -> None:
    """``torch.save`` beside ``path`` and rename, so that ``path`` is at every moment either the old file or the new.

    Raises ``UserError`` if the disk is full or cannot be written; the old file then stays as it was.
    """
    temporary = pathlib.Path(f"{path}.tmp")
    try:
        with writing(path):
            with open(temporary, "wb") as file:
                torch.save(obj, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def cached_download(url: str) -> str:
    """Path of ``url`` in PyTorch's hub cache, downloaded by one process if it is not there yet.

    Raises ``UserError`` with the URL and the place for the file if it cannot be downloaded.
    """
    path = pathlib.Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if path.is_file():
        return str(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_name(path.name + ".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.is_file():
                torch.hub.download_url_to_file(url, str(path), progress=is_main_process())
    except OSError as error:
        raise UserError(f"{url} cannot be downloaded ({_first_line(error)}): "
                        f"fetch it on another machine and put it at {path}") from error
    return str(path)


# Checkpoints of training runs carry their command line, sometimes with paths in it. Only one of the two flavours can be
# created, so both come back as pure paths; the module that they are pickled under changed with Python 3.13.
_ALLOWED_GLOBALS = [argparse.Namespace] + [
    (cls, f"{module}.{name}") for cls in (pathlib.PurePosixPath, pathlib.PureWindowsPath)
    for module in ("pathlib", "pathlib._local") for name in (cls.__name__, cls.__name__.removeprefix("Pure"))]


def load_checkpoint(path_or_url: str | os.PathLike) -> dict:
    """Read a checkpoint to the CPU without running code from it.

    Beyond tensors and plain containers only ``argparse.Namespace`` and pathlib paths are let in. Raises
    ``UserError`` for a file that is missing, truncated, no checkpoint, or asks for anything else (named).
    """
    path = str(path_or_url)
    path = cached_download(path) if path.startswith(("http://", "https://")) else path
    try:
        with torch.serialization.safe_globals(_ALLOWED_GLOBALS):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"checkpoint {path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # changed bytes have raised ten kinds
        if name := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(f"checkpoint {path} is refused: it needs {name[1]} to be read, which could run foreign "
                            "code") from error
        raise UserError(f"checkpoint {path} is truncated, damaged or none of PyTorch's: fetch or copy it "
                        "again") from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"checkpoint {path} holds a {type(checkpoint).__name__}, not a dict of weights")
    return checkpoint


def model_weights(checkpoint: Mapping[str, Any], path: str, key: str = "model") -> dict[str, torch.Tensor]:
    """The state dict in a checkpoint: under ``key``, or the checkpoint itself if it holds only tensors."""
    weights = checkpoint.get(key, checkpoint)
    if not (isinstance(weights, Mapping) and weights and all(isinstance(v, torch.Tensor) for v in weights.values())):
        raise UserError(f"checkpoint {path} has no state dict under {key!r}; its keys are {_some(checkpoint)}")
    return dict(weights)


def key_differences(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> str:
    """What keeps ``found`` from being loaded into a model with the state dict ``expected``; empty if nothing."""
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    reshaped = [f"{key} is {tuple(found[key].shape)} instead of {tuple(value.shape)}"
                for key, value in expected.items() if key in found and found[key].shape != value.shape]
    return ", ".join(f"{len(keys)} {kind} ({_some(keys)})" for keys, kind in (
        (missing, "missing"), (unexpected, "unexpected"), (reshaped, "of another shape")) if keys)


def _some(names: Iterable[str], limit: int = 3) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


# Logs

class Progress:
    """Averages of one pass over a loader, and every ``interval`` seconds and at the end a line about it: steps, time
    left, images/s, GPU memory, and of each value the mean over the last 20 steps and, in brackets, over all.
    """

    def __init__(self, header: str, steps: int, images_per_step: float, device: torch.device | None = None,
                 interval: float = 10.0) -> None:
        self.header, self.steps, self.images_per_step = header, steps, images_per_step
        self.device, self.interval = device, interval
        self.values: dict[str, list[float]] = {}

    def update(self, **values: float) -> None:
        """Add one step's values."""
        for name, value in values.items():
            self.values.setdefault(name, []).append(value)

    def track(self, loader: Iterable) -> Iterator:
        """Yield from the loader; print the line between steps."""
        started = shown = time.perf_counter()
        for done, batch in enumerate(loader, 1):
            yield batch
            now = time.perf_counter()
            if now - shown >= self.interval or done == self.steps:
                shown = now
                print_once(self._line(done, now - started))

    def averages(self) -> dict[str, float]:
        """Mean of every value over all steps."""
        return {name: math.fsum(values) / len(values) for name, values in self.values.items()}

    def _line(self, done: int, elapsed: float) -> str:
        left = datetime.timedelta(seconds=round((self.steps - done) * elapsed / done))
        line = f"{self.header} [{done}/{self.steps}]  eta {left}  {done / elapsed * self.images_per_step:.1f} img/s"
        for name, values in self.values.items():
            recent = values[-20:]
            line += f"  {name} {sum(recent) / len(recent):.4g} ({sum(values) / len(values):.4g})"
        if self.device is not None and self.device.type == "cuda":
            line += f"  mem {torch.cuda.max_memory_allocated(self.device) / 2**20:.0f} MB"
        return line


class DeferredScalars:
    """Per-step scalars averaged over the processes, read one step late so that the GPU never waits for the CPU.

    ``push`` takes this step's 0-d tensors and returns the floats of the step before (``{}`` at the first step),
    ``flush`` those of the last step. A value that is not finite on one process is not finite on any, so all
    processes raise the same ``SharedError`` at the same step; ``place`` says where in the training that was.
    """

    def __init__(self, place: str) -> None:
        self.place, self.step = place, 0
        self._pending: tuple[list[str], torch.Tensor, torch.cuda.Event | None] | None = None

    def push(self, **tensors: torch.Tensor) -> dict[str, float]:
        previous = self.flush()
        sums = all_reduce_sum(torch.stack([tensor.detach().float() for tensor in tensors.values()]))
        host = (sums / get_world_size()).to("cpu", non_blocking=True)
        copied = torch.cuda.current_stream().record_event() if sums.is_cuda else None
        self._pending = list(tensors), host, copied
        return previous

    def flush(self) -> dict[str, float]:
        if self._pending is None:
            return {}
        names, host, copied = self._pending
        self._pending = None
        if copied:
            copied.synchronize()
        values = dict(zip(names, host.tolist(), strict=True))
        for name, value in values.items():
            if not math.isfinite(value):
                raise SharedError(f"{name} is {value} at {self.place}, step {self.step}: training stops; a lower --lr "
                                  "or gradient clipping may help, and the last checkpoint is still there")
        self.step += 1
        return values


def step_optimizer(loss_scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
    """Step and update the scaler, which leaves out steps whose gradients overflow and halves its scale.

    Raises ``SharedError`` when it has come down without end: then the gradients are not finite at any scale.
    """
    loss_scaler.step(optimizer)
    loss_scaler.update()
    if loss_scaler.is_enabled() and loss_scaler.get_scale() < 2 ** -14:  # 2¹⁶ at the start: 31 halvings
        raise SharedError("the gradients are not finite in float16 at any scale of the loss: training stops; bfloat16 "
                          "or float32, or a lower --lr, may help, and the last checkpoint is still there")


class RunLog:
    """``log.txt`` (one JSON object a line) and TensorBoard scalars under ``output_dir``; main process only.

    Without an output directory it does nothing. ``first_epoch`` hides scalars that an interrupted run left beyond it.
    """

    def __init__(self, output_dir: str, first_epoch: int = 0) -> None:
        self.path = None
        if output_dir and is_main_process():
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and evaluation has no use for it
            self.path = pathlib.Path(output_dir, "log.txt")
            self.board = SummaryWriter(os.path.join(output_dir, "tensorboard"), purge_step=first_epoch or None)

    def write(self, epoch: int, values: Mapping[str, Any]) -> None:
        """Append one epoch's values; numbers go to TensorBoard too."""
        if self.path is None:
            return
        with writing(self.path), open(self.path, "a") as file:
            file.write(json.dumps(values) + "\n")
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self.board.add_scalar(name, value, epoch)
        self.board.flush()
