"""What a training program needs around its model: errors a user can read, processes that find each other,
files that are always whole, and logs. Nothing here knows which model is trained.
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
import pickle
import random
import re
import struct
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import IO, Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

# --------------------------------------------------------------------------------------------------------------
# Errors
# --------------------------------------------------------------------------------------------------------------


class UserError(Exception):
    """A mistake of the user's (flag, file, picture): one sentence says what was wrong and what to do.

    ``str()`` gives that sentence also after a DataLoader worker's exception was raised again in the main process,
    which wraps the message as "Caught UserError in DataLoader worker process 0. Original Traceback ...".
    """

    def __str__(self) -> str:
        message = super().__str__()
        if message.startswith("Caught ") and "Original Traceback" in message:
            message = message.rpartition("UserError: ")[2]
        return " ".join(message.split("\n")).strip()


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser, but a mistake is said in one line, once, without the usage of all flags."""

    def error(self, message: str) -> NoReturn:
        sentence = f"error: {message}; --help lists all flags"
        _leave(2, sentence if _speaks_for(sentence) else "")


def run(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> None:
    """Call ``main(args)``; end the process with status 1 and one sentence on a ``UserError``, 130 on Ctrl-C.

    Of several processes that meet the same mistake one speaks. A process whose collective breaks because another
    one failed leaves silently with status 1. Any other exception keeps its traceback.
    """
    finished = False
    try:
        main(args)
        finished = True
    except UserError as error:
        _leave(1, f"error: {error}" if _speaks_for("UserError: " + str(error)) else "")
    except KeyboardInterrupt:
        _leave(130, "interrupted" if _local_rank() == 0 else "")
    except RuntimeError:
        if not _another_process_failed():
            raise
        _leave(1)
    finally:
        if not finished:
            _note_failure()
    if dist.is_initialized():
        dist.destroy_process_group()


def _leave(status: int, sentence: str = "") -> NoReturn:
    if sentence:
        print(sentence, file=sys.stderr)
    if not dist.is_initialized():
        sys.exit(status)
    # An orderly exit would wait for collectives whose partners are gone.
    _note_failure()
    for child in multiprocessing.active_children():
        child.terminate()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _speaks_for(sentence: str) -> bool:
    """Whether this process is the first to say the sentence (before the processes know each other: one a machine)."""
    if _store is None:
        if _local_rank() > 0:
            time.sleep(2)  # a launcher that sees one process end stops the others, also the one that is to speak
        return _local_rank() == 0
    try:
        with _muted():
            return _store.add(sentence, 1) == 1
    except RuntimeError:  # the store ended with its process, which has spoken
        return False


def _note_failure() -> None:
    if _store is not None:
        with contextlib.suppress(RuntimeError), _muted():  # maybe nobody is left to read the note
            _store.set(_FAILED, "")


def _another_process_failed() -> bool:
    if _store is None:
        return False
    try:
        with _muted():
            return _store.check([_FAILED])
    except RuntimeError:  # the store ended with its process
        return True


@contextlib.contextmanager
def _muted() -> Iterator[None]:
    """Keep back what C++ prints: to ask a store that is gone is foreseen here, and c10d warns with a stack trace."""
    sys.stderr.flush()
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


# --------------------------------------------------------------------------------------------------------------
# Processes
# --------------------------------------------------------------------------------------------------------------

_FAILED = "a process failed"
_store: dist.Store | None = None  # where the processes met; set by init_distributed when there are several


def init_distributed(args: argparse.Namespace) -> torch.device:
    """Join the other processes, if there are any, and return the device of this one.

    The place of this process comes from the environment of ``torchrun`` or ``torch.distributed.launch`` (RANK,
    WORLD_SIZE, LOCAL_RANK, or ``--local-rank``), or from SLURM together with ``--world_size``; the meeting point
    from ``--dist_url``. NCCL connects GPUs, gloo CPUs. Sets ``args.rank``, ``args.world_size`` and
    ``args.distributed``. Raises ``UserError`` for a device or an environment that cannot work.
    """
    global _store
    args.rank, args.world_size, local_rank = _place(args)
    args.distributed = args.world_size > 1
    device = _device(args.device, local_rank if args.distributed else None)
    if args.distributed and not dist.is_initialized():
        try:
            store, _, _ = next(rendezvous(args.dist_url, args.rank, args.world_size))
        except (RuntimeError, ValueError, AssertionError) as error:
            raise UserError(f"process {args.rank} of {args.world_size} cannot join the others at --dist_url "
                            f"{args.dist_url}: {_first_line(error)}") from error
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=args.rank,
                                world_size=args.world_size, device_id=device if device.type == "cuda" else None)
        _store = dist.PrefixStore("runtime", store)
    return device


def _place(args: argparse.Namespace) -> tuple[int, int, int]:
    """(rank, number of processes, rank on this machine)"""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        rank, world_size = int(env["RANK"]), int(env["WORLD_SIZE"])
        if args.world_size not in (1, world_size):
            raise UserError(f"--world_size {args.world_size} contradicts the launcher, which started {world_size} "
                            "processes: leave the flag out")
        return rank, world_size, int(env.get("LOCAL_RANK") or getattr(args, "local_rank", None) or 0)
    if "SLURM_PROCID" in env and args.world_size > 1:
        if args.dist_url == "env://" and "MASTER_ADDR" not in env:
            raise UserError("--world_size under SLURM needs --dist_url tcp://HOST:PORT with the first node's name")
        return int(env["SLURM_PROCID"]), args.world_size, int(env["SLURM_LOCALID"])
    if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        raise UserError(f"SLURM started {env['SLURM_STEP_NUM_TASKS']} processes: say --world_size "
                        f"{env['SLURM_STEP_NUM_TASKS']} --dist_url tcp://HOST:PORT")
    if args.world_size > 1:
        raise UserError(f"--world_size {args.world_size} without a launcher: start with "
                        f"torchrun --nproc_per_node={args.world_size}")
    return 0, 1, 0


def _device(name: str, local_rank: int | None) -> torch.device:
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {name} needs a GPU and PyTorch finds none: say --device cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda" and local_rank is not None:
            device = torch.device("cuda", local_rank)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name} cannot be used by process {local_rank or 0} of this machine: "
                        f"{_first_line(error)}") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)


def get_rank() -> int:
    """Number of this process, 0 if it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:
    """Whether this process writes the files and the log."""
    return get_rank() == 0


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


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


# --------------------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------------------


def prepare_output_dir(path: str) -> None:
    """Create the folder (main process) and make sure now, not after the first epoch, that it can be written."""
    if not path or not is_main_process():
        return
    probe = pathlib.Path(path, ".write_test")
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"output directory {path} cannot be written: {error.strerror}") from error


def save_atomically(obj: Any, path: str | os.PathLike) -> None:
    """``torch.save`` beside ``path`` and rename, so that ``path`` is at every moment either the old file or the new.

    Raises ``UserError`` if the disk is full or cannot be written; the old file then stays as it was.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(obj, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch.save reports a failed write as a RuntimeError about file positions, on top of the OSError.
        cause = error if isinstance(error, OSError) else error.__context__
        raise UserError(f"{path} cannot be written ({getattr(cause, 'strerror', None) or _first_line(error)}); "
                        "a file that was there before is unchanged") from error
    finally:
        temporary.unlink(missing_ok=True)


def is_url(path: str | os.PathLike) -> bool:
    return str(path).startswith(("http://", "https://"))


def cached_download(url: str, file_name: str | None = None) -> str:
    """Path of ``url`` in PyTorch's hub cache, downloaded if it is not there yet.

    Raises ``UserError`` with the URL and the place for the file if it cannot be downloaded.
    """
    path = pathlib.Path(torch.hub.get_dir(), "checkpoints", file_name or url.rpartition("/")[2])
    if path.is_file():
        return str(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_name(path.name + ".lock"), "w") as lock:  # one of the processes downloads
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.is_file():
                torch.hub.download_url_to_file(url, str(path), progress=is_main_process())
    except OSError as error:
        raise UserError(f"{url} cannot be downloaded ({_first_line(error)}): "
                        f"fetch it on another machine and put it at {path}") from error
    return str(path)


# Checkpoints of training runs carry their command line in an argparse.Namespace, sometimes with paths in it. The
# module that paths are pickled under changed with Python 3.13, and only one of the two flavours can be created.
_PATH_CLASSES = {
    "PosixPath": pathlib.PosixPath if os.name == "posix" else pathlib.PurePosixPath,
    "WindowsPath": pathlib.WindowsPath if os.name == "nt" else pathlib.PureWindowsPath,
    "PurePosixPath": pathlib.PurePosixPath,
    "PureWindowsPath": pathlib.PureWindowsPath,
}
_ALLOWED_GLOBALS = [argparse.Namespace] + [
    (cls, f"{module}.{name}") for name, cls in _PATH_CLASSES.items() for module in ("pathlib", "pathlib._local")]


def load_checkpoint(path_or_url: str | os.PathLike) -> dict:
    """Read a checkpoint to the CPU without running code from it.

    Beyond tensors and plain containers only ``argparse.Namespace`` and pathlib paths are let in. Raises
    ``UserError`` for a file that is missing, truncated, no checkpoint, or asks for anything else (named).
    """
    path = cached_download(str(path_or_url)) if is_url(path_or_url) else path_or_url
    try:
        with open(path, "rb") as file:
            checkpoint = _read_checkpoint(file, path)
    except OSError as error:
        raise UserError(f"checkpoint {path} cannot be read: {error.strerror}") from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"checkpoint {path} holds a {type(checkpoint).__name__}, not a dict of weights")
    return checkpoint


def _read_checkpoint(file: IO[bytes], path: str | os.PathLike) -> Any:
    if file.read(4) not in (b"PK\x03\x04", b"\x80\x02\x8a\n"):  # zip, or the pickled magic number of old files
        raise UserError(f"{path} is {'empty' if not file.tell() else 'not a PyTorch checkpoint'}")
    file.seek(0)
    try:
        with torch.serialization.safe_globals(_ALLOWED_GLOBALS):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it needs {name[1]} to be read" if name else "it holds more than tensors and plain containers"
        raise UserError(f"checkpoint {path} is refused: {reason}, which could run foreign code") from error
    except (OSError, RuntimeError, EOFError, ValueError, LookupError,
            AssertionError, TypeError, AttributeError, struct.error) as error:  # all seen for changed bytes
        raise UserError(f"checkpoint {path} is truncated or damaged: fetch or copy it again") from error


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
    parts = [f"{len(keys)} {kind} ({_some(keys)})" for keys, kind in
             ((missing, "missing"), (unexpected, "unexpected"), (reshaped, "of another shape")) if keys]
    return ", ".join(parts)


def _some(names: Iterable[str], limit: int = 3) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


# --------------------------------------------------------------------------------------------------------------
# Logs
# --------------------------------------------------------------------------------------------------------------


class Progress:
    """Averages of one pass over a loader and its progress line: steps, time left, images/s, values, GPU memory.

    In a terminal the line is rewritten in place; elsewhere a plain line is printed every ``interval`` seconds and
    at the end. Each value is shown as its mean over the last ``window`` steps and, in brackets, over all.
    """

    def __init__(self, header: str, steps: int, images_per_step: int, device: torch.device | None = None,
                 window: int = 20, interval: float = 10.0) -> None:
        self.header, self.steps, self.images_per_step = header, steps, images_per_step
        self.device, self.window = device, window
        self.in_place = sys.stdout.isatty()
        self.interval = 0.2 if self.in_place else interval
        self.recent: dict[str, deque[float]] = {}
        self.totals: dict[str, list[float]] = {}  # name -> [sum, count]
        self.done = 0

    def update(self, **values: float) -> None:
        """Add one step's values."""
        for name, value in values.items():
            self.recent.setdefault(name, deque(maxlen=self.window)).append(value)
            total = self.totals.setdefault(name, [0.0, 0])
            total[0] += value
            total[1] += 1

    def track(self, loader: Iterable) -> Iterator:
        """Yield from the loader; print the line between steps."""
        self.started = time.perf_counter()
        shown = self.started
        for batch in loader:
            yield batch
            self.done += 1
            now = time.perf_counter()
            if now - shown >= self.interval or self.done == self.steps:
                shown = now
                self._show(now - self.started)
        if self.in_place and is_main_process():
            print()

    def averages(self) -> dict[str, float]:
        """Mean of every value over all steps and processes; all processes have to call it with the same names."""
        if not self.totals:
            return {}
        device = self.device if dist.is_initialized() and self.device else "cpu"
        sums = all_reduce_sum(torch.tensor(list(self.totals.values()), dtype=torch.float64, device=device)).tolist()
        return {name: total / count for name, (total, count) in zip(self.totals, sums, strict=True)}

    def _show(self, elapsed: float) -> None:
        if not is_main_process():
            return
        rate = self.done / elapsed
        left = datetime.timedelta(seconds=round((self.steps - self.done) / rate))
        parts = [f"{self.header} [{self.done}/{self.steps}]", f"eta {left}",
                 f"{rate * self.images_per_step:.1f} img/s"]
        for name, recent in self.recent.items():
            total, count = self.totals[name]
            parts.append(f"{name} {sum(recent) / len(recent):.4g} ({total / count:.4g})")
        if self.device is not None and self.device.type == "cuda":
            parts.append(f"mem {torch.cuda.max_memory_allocated(self.device) / 2**20:.0f} MB")
        line = "  ".join(parts)
        print(f"\r{line}\x1b[K" if self.in_place else line, end="" if self.in_place else "\n", flush=True)


class DeferredScalars:
    """Per-step scalars averaged over the processes, read one step late so that the GPU never waits for the CPU.

    ``push`` takes this step's 0-d tensors and returns the floats of the step before (``{}`` at the first step),
    ``flush`` those of the last step. A value that is not finite on one process is not finite on any, so all
    processes raise the same ``UserError`` at the same step; ``place`` says where in the training that was.
    """

    def __init__(self, place: str) -> None:
        self.place, self.step = place, 0
        self._pending: Callable[[], list[float]] | None = None
        self._names: list[str] = []

    def push(self, **tensors: torch.Tensor) -> dict[str, float]:
        previous = self.flush()
        self._names = list(tensors)
        self._pending = _start_mean(torch.stack([tensor.detach().float() for tensor in tensors.values()]))
        return previous

    def flush(self) -> dict[str, float]:
        if self._pending is None:
            return {}
        values = dict(zip(self._names, self._pending(), strict=True))
        self._pending = None
        for name, value in values.items():
            if not math.isfinite(value):
                raise UserError(f"{name} is {value} at {self.place}, step {self.step}: training stops; "
                                "a lower --lr or gradient clipping may help, and the last checkpoint is still there")
        self.step += 1
        return values


def step_optimizer(loss_scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
    """Step and update the scaler, which leaves out steps whose gradients overflow and halves its scale.

    Raises: UserError when it has come down without end: then the gradients are not finite at any scale.
    """
    loss_scaler.step(optimizer)
    loss_scaler.update()
    if loss_scaler.is_enabled() and loss_scaler.get_scale() < 2 ** -14:  # 2¹⁶ at the start: 31 halvings
        raise UserError("the gradients are not finite in float16 at any scale of the loss: training stops; bfloat16 or "
                        "float32, or a lower --lr, may help, and the last checkpoint is still there")


def _start_mean(values: torch.Tensor) -> Callable[[], list[float]]:
    """Start averaging a vector over the processes and return the function that waits for the floats."""
    work = dist.all_reduce(values, async_op=True) if dist.is_initialized() else None
    if values.is_cuda:
        if work is not None:
            work.wait()  # orders the streams; the CPU goes on
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

    def finish() -> list[float]:
        if values.is_cuda:
            copied.synchronize()
            return [value / get_world_size() for value in host.tolist()]
        if work is not None:
            work.wait()
        return [value / get_world_size() for value in values.tolist()]

    return finish


class RunLog:
    """``log.txt`` (one JSON object a line) and TensorBoard scalars under ``output_dir``; main process only.

    Without an output directory it does nothing. ``first_epoch`` hides scalars that an interrupted run left beyond it.
    """

    def __init__(self, output_dir: str, first_epoch: int = 0) -> None:
        self.path = self.board = None
        if output_dir and is_main_process():
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and evaluation has no use for it
            self.path = pathlib.Path(output_dir, "log.txt")
            self.board = SummaryWriter(os.path.join(output_dir, "tensorboard"), purge_step=first_epoch or None)

    def write(self, epoch: int, values: Mapping[str, Any]) -> None:
        """Append one epoch's values; numbers go to TensorBoard too."""
        if self.path is None:
            return
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror}") from error
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self.board.add_scalar(name, value, epoch)
        self.board.flush()

    def close(self) -> None:
        if self.board is not None:
            self.board.close()
