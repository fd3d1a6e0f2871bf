"""What a training program needs around any model: readable errors, processes that meet, whole files, and logs."""
import argparse
import contextlib
import datetime
import json
import math
import os
import pathlib
import re
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, NoReturn

import torch
import torch.distributed as dist


class UserError(Exception):
    """A mistake of the user's (flag, file, picture): one sentence says what was wrong and what to do."""

    def __str__(self) -> str:
        # a DataLoader raises a worker's anew, with the worker's traceback before the sentence
        return " ".join(super().__str__().rpartition("UserError: ")[2].splitlines()).strip()


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser, but a mistake is said in one line, without the usage of all flags."""

    def error(self, message: str) -> NoReturn:
        _fail(2, f"{message}; --help lists all flags")


def run(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> None:
    """Call ``main(args)``; end the process with status 1 and one sentence on a ``UserError``, 130 on Ctrl-C.

    The first process of a machine speaks at once, and the launcher then stops the others; another one speaks, with its
    number, if it still runs some seconds later. So what all meet is said once, and what one meets alone by that one.
    Other exceptions keep their traceback, unless they only say that another process has failed.
    """
    try:
        main(args)
    except KeyboardInterrupt:
        _end(130)
    except UserError as error:
        _fail(1, str(error))
    except Exception as error:
        if not dist.is_initialized():
            raise
        lost = isinstance(error, dist.DistError) or "gloo" in str(error)
        _fail(1, f"another process is lost: {UserError(error)}" if lost else traceback.format_exc())
    if dist.is_initialized():
        dist.destroy_process_group()


def _fail(status: int, words: str) -> NoReturn:
    if _local_rank():
        time.sleep(10)
    me = f"process {get_rank()} of {get_world_size()}: " if get_world_size() > 1 else ""
    print(f"error: {me}{words}", file=sys.stderr, flush=True)
    _end(status)


def _end(status: int) -> NoReturn:
    if get_world_size() > 1:
        sys.stdout.flush()
        os._exit(status)  # an orderly exit would wait for collectives whose partners are gone
    sys.exit(status)


# Processes

def find_place(args: argparse.Namespace) -> torch.device:
    """Learn which of how many processes this is, without meeting them, and return its device.

    torchrun says it, or SLURM. Sets ``args.rank``, ``args.world_size``, ``args.distributed``; raises ``UserError``.
    """
    if args.world_size > 1 and get_world_size() == 1:
        raise UserError(f"--world_size {args.world_size} without a launcher: start with "
                        f"torchrun --nproc_per_node={args.world_size}")
    args.rank, args.world_size, args.distributed = get_rank(), get_world_size(), get_world_size() > 1
    try:
        device = torch.device(args.device)
        if device.type == "cuda":
            device = torch.device("cuda", _local_rank() if args.distributed else device.index or 0)
            torch.cuda.set_device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        cause = str(error).partition("\n")[0]
        raise UserError(f"--device {args.device} cannot be used ({cause}): start as many processes as there are GPUs, "
                        "or choose another, such as --device cpu") from error
    return device


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
            raise UserError(f"the others cannot be joined at --dist_url {args.dist_url} ({error}): "
                            "without torchrun say tcp://HOST:PORT with the first machine's name") from error
    return device


def _launched(torchrun: str, slurm: str, alone: int) -> int:
    return int(os.environ.get(torchrun) or os.environ.get(slurm) or alone)


def _local_rank() -> int:
    return _launched("LOCAL_RANK", "SLURM_LOCALID", 0)


def get_rank() -> int:
    """Number of this process, 0 if it is alone."""
    return dist.get_rank() if dist.is_initialized() else _launched("RANK", "SLURM_PROCID", 0)


def get_world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else _launched("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", 1)


def is_main_process() -> bool:
    """Whether this process writes the files and the log."""
    return get_rank() == 0


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over the processes, in place; under NCCL the tensor has to be on the GPU."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


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
    if path and is_main_process():
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


# what kept command lines hold; only one flavour of paths can be made here, so both come back as pure ones, and their
# module has two names in Python's versions
_ALLOWED = [argparse.Namespace, *((cls, f"{module}.{cls.__name__.removeprefix('Pure')}")
                                  for module in ("pathlib", "pathlib._local")
                                  for cls in (pathlib.PurePosixPath, pathlib.PureWindowsPath))]


def load_checkpoint(path_or_url: str | os.PathLike) -> dict:
    """Read a checkpoint, a URL's from PyTorch's hub cache or else downloaded, without running code from it.

    Beyond tensors, on the CPU, and plain containers only ``argparse.Namespace`` and paths are let in. Raises
    ``UserError`` for a file that is missing, truncated, no checkpoint, or asks for anything else (named).
    """
    path, load, place = str(path_or_url), torch.load, ""
    if "://" in path:
        load = torch.hub.load_state_dict_from_url
        place = f": fetch it elsewhere and put it into {torch.hub.get_dir()}/checkpoints"
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            checkpoint = load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"checkpoint {path} cannot be read: {error.strerror or error}{place}") from error
    except Exception as error:  # changed bytes have raised ten kinds
        if name := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(f"checkpoint {path} is refused: it needs {name[1]} to be read, which could run foreign "
                            "code") from error
        raise UserError(f"checkpoint {path} is truncated, damaged or none of PyTorch's"
                        f"{place or ': fetch or copy it again'}") from error
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
    differences = {
        "missing": [key for key in expected if key not in found],
        "unexpected": [key for key in found if key not in expected],
        "of another shape": [f"{key} is {tuple(found[key].shape)} instead of {tuple(value.shape)}"
                             for key, value in expected.items() if key in found and found[key].shape != value.shape]}
    return ", ".join(f"{len(keys)} {kind} ({_some(keys)})" for kind, keys in differences.items() if keys)


def _some(names: Iterable[Any]) -> str:
    names = list(map(str, names))
    return ", ".join(names[:3] + ["..."] * (len(names) > 3))


# Logs

class Progress:
    """One pass over a loader: gives its batches, and every 20 steps and at the end prints a line of steps, time left,
    images/s, GPU memory, and of the values ``shown`` (or all) the mean of the last 20 steps and, in brackets, of all.
    ``constants`` are values that are the same in all steps.
    """

    def __init__(self, header: str, loader: Sized, images_per_step: float, shown: Iterable[str] = (),
                 **constants: float) -> None:
        self.header, self.loader, self.images_per_step, self.shown = header, loader, images_per_step, shown
        self.values = {name: [value] for name, value in constants.items()}
        self._unread: list[dict[str, torch.Tensor]] = []

    def __iter__(self) -> Iterator:
        started = time.perf_counter()
        for done, batch in enumerate(self.loader, 1):
            yield batch
            if done % 20 == 0 or done == len(self.loader):
                self._read(done)
                print_once(self._line(done, time.perf_counter() - started))

    def add(self, **values: torch.Tensor) -> None:
        """Take one step's 0-d tensors. They are read, as means over the processes, only when the next line is due, so
        that the GPU does not wait for the CPU. If one is then not finite all processes raise the same ``UserError``.
        """
        self._unread.append({name: value.detach().float() for name, value in values.items()})

    def averages(self) -> dict[str, float]:
        """Mean of every value over all steps."""
        return {name: statistics.fmean(values) for name, values in self.values.items()}

    def _read(self, done: int) -> None:
        if not self._unread:
            return
        rows = torch.stack([torch.stack(list(step.values())) for step in self._unread])
        rows = all_reduce_sum(rows) / get_world_size()
        for step, row in enumerate(rows.tolist(), done - len(rows)):
            for name, value in zip(self._unread[0], row, strict=True):
                if not math.isfinite(value):
                    raise UserError(f"{name} is {value} at {self.header}, step {step}: training stops; a lower --lr or "
                                    "gradient clipping may help, and the last checkpoint is still there")
                self.values.setdefault(name, []).append(value)
        self._unread.clear()

    def _line(self, done: int, elapsed: float) -> str:
        steps, rate = len(self.loader), done / elapsed
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
    if loss_scaler.is_enabled() and loss_scaler.get_scale() < 2 ** -14:  # 2¹⁶ at the start: 31 halvings
        raise UserError("the gradients are not finite in float16 at any scale of the loss: training stops; bfloat16 "
                        "or float32, or a lower --lr, may help, and the last checkpoint is still there")
    loss_scaler.step(optimizer)
    loss_scaler.update()


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
