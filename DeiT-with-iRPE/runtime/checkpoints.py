"""Reading checkpoints, and comparing them with a model and with the flags of a run."""

import argparse
import os
import pathlib
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .errors import UserError
from .files import writing
from .ranks import get_rank, print_once

# The classes that a checkpoint may contain besides tensors and plain containers. The saved flags need them. A system
# can only instantiate paths of its own kind, so all paths are read as pure paths. The name of their module depends on
# the version of Python.
_ALLOWED = [
    argparse.Namespace,
    *(
        (cls, f"{module}.{cls.__name__.removeprefix('Pure')}")
        for module in ("pathlib", "pathlib._local")
        for cls in (pathlib.PurePosixPath, pathlib.PureWindowsPath)
    ),
]


@dataclass
class Checkpoint:
    """A checkpoint that was read, with the path or URL that it came from, for messages."""

    path: str
    content: dict[str, Any]

    @property
    def args(self) -> argparse.Namespace | None:
        """The flags of the run that wrote it; None if it has none, as files with weights only."""
        return self.content.get("args")


def checkpoint_to_resume(resume: str, output_dir: str, needed: bool = False) -> Checkpoint | None:
    """Read the checkpoint that ``--resume`` asks for; None if it asks for none.

    Args:
        resume: a path, a URL, "" for none, or "auto" for the newest checkpoint in ``output_dir``, if there is one.
        needed: whether it is an error if "auto" finds no checkpoint.
    Raises: UserError if the checkpoint cannot be read. For the errors of "auto", see `newest_checkpoint`.
    """
    if resume == "auto":
        return newest_checkpoint(output_dir, needed)
    return Checkpoint(str(resume), load_checkpoint(resume)) if resume else None


def newest_checkpoint(output_dir: str, needed: bool = False) -> Checkpoint | None:
    """Read the newest checkpoint in ``output_dir`` that is intact; None if there is none.

    If the last checkpoint is damaged, a note says so, and it is renamed so that the one before takes its place.

    Args:
        needed: raise an error if there is no checkpoint.
    Raises: UserError if all checkpoints are damaged, since a new run would replace them; also if there is none, but one
        is needed.
    """
    if not output_dir:
        raise UserError("--resume auto looks for checkpoints in --output_dir: give that too")
    damaged = []
    for path in (pathlib.Path(output_dir, name) for name in ("checkpoint.pth", "checkpoint.previous.pth")):
        if not path.exists():
            continue
        try:
            content = load_checkpoint(path)
        except UserError as error:
            print_once(f"note: {error}")
            damaged.append(path)
            continue
        if damaged and get_rank() == 0:  # else the next save would keep the damaged file in place of the good one
            with writing(path):
                os.replace(damaged[0], path.with_name("checkpoint.damaged.pth"))
        return Checkpoint(str(path), content)
    if damaged:
        raise UserError(
            f"no checkpoint in {output_dir} is intact: delete them to start a new run, or --resume another one"
        )
    if needed:
        raise UserError(
            f"--resume auto finds no checkpoint in --output_dir {output_dir}: give the folder of a run, or the "
            "checkpoint itself to --resume"
        )
    return None


def load_checkpoint(path_or_url: str | os.PathLike) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, without running code from it. A URL is downloaded once, into PyTorch's hub cache.

    Besides tensors and plain containers, only ``argparse.Namespace`` and paths are allowed.

    Raises: UserError for a file that is missing, truncated or no checkpoint, or needs any other class (which it names).
    """
    path, load, advice = str(path_or_url), torch.load, "check the path, or copy the file again"
    if "://" in path:
        load = torch.hub.load_state_dict_from_url
        advice = f"fetch it elsewhere and put it at {torch.hub.get_dir()}/checkpoints/{path.rpartition('/')[2]}"
    try:
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():  # PyTorch does not check the checksums
            raise zipfile.BadZipFile
        with torch.serialization.safe_globals(_ALLOWED):
            checkpoint = load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"checkpoint {path} cannot be read: {error.strerror or error}: {advice}") from error
    except Exception as error:  # changed bytes have raised ten kinds of exceptions
        if name := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"checkpoint {path} is refused: it contains {name[1]}, which could run arbitrary code"
            ) from error
        raise UserError(f"checkpoint {path} is truncated, damaged or not a PyTorch checkpoint: {advice}") from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"checkpoint {path} holds a {type(checkpoint).__name__}, not a dict of weights")
    return checkpoint


def resume_point(checkpoint: Mapping[str, Any]) -> tuple[int, dict[str, Any] | None]:
    """The epoch with which training continues, and the progress in it; None at the beginning of an epoch.

    The progress holds `images`, how many the epoch has seen, and `values`, the logged values of all its steps by name.

    Raises: exceptions of several kinds if these entries are damaged.
    """
    epoch, progress = checkpoint["epoch"], checkpoint.get("progress")
    images = 0 if progress is None else progress["images"]
    if not (isinstance(epoch, int) and isinstance(images, int) and min(epoch, images) >= 0):
        raise ValueError(f"its epoch is {epoch!r} and has {images!r} images")
    if progress is None:
        return epoch + 1, None
    return epoch, {"images": images, "values": {name: steps.tolist() for name, steps in progress["values"].items()}}


def note_values_kept(path: str | os.PathLike, values: Mapping[str, tuple[Any, Any]], cure: str) -> None:
    """Print one note with the flags whose new value a run that resumes from ``path`` ignores; none if there are none.

    Args:
        values: for every flag that a resumed run ignores, the value on the command line and the value in use; the flag
            may have words after it, such as "--epochs for the schedule".
        cure: how to train with the values of the command line.
    """
    shown = {flag: tuple(map(_shown, pair)) for flag, pair in values.items()}  # rates may differ in the last bit
    differing = [f"{flag}: {kept}, not {now}" for flag, (now, kept) in shown.items() if now != kept]
    if differing:
        print_once(
            f"note: resuming from {path} keeps these values of the checkpoint and ignores the command line: "
            f"{'; '.join(differing)}. {cure}"
        )


def start_values_kept(
    args: argparse.Namespace, checkpoint: Mapping[str, Any], flags: Mapping[str, Any], epoch: int | None
) -> dict[str, tuple[Any, Any]]:
    """The flags that matter only at the start of a run and differ from those of the checkpoint's run.

    Args:
        flags: the flags that matter only at the start of a run, each with the value that means "not given".
        epoch: the epoch to continue with; None if the checkpoint has none, so the run begins at ``start_epoch``.
    Returns: the ``values`` for `note_values_kept`.
    """
    values = {}
    for flag, not_given in flags.items():
        now, before = getattr(args, flag), getattr(checkpoint.get("args"), flag, not_given)
        if now not in (not_given, before):
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
    """The state dict in a checkpoint: under ``key``, or the checkpoint itself if it holds only tensors.

    Raises: UserError that names the keys of a checkpoint without a state dict.
    """
    weights = checkpoint.get(key, checkpoint)
    if not (isinstance(weights, Mapping) and weights and all(isinstance(v, torch.Tensor) for v in weights.values())):
        raise UserError(f"checkpoint {path} has no state dict under {key!r}; its keys are {_first(checkpoint)}")
    return dict(weights)


def key_differences(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> str:
    """Why ``found`` cannot be loaded into a model with the state dict ``expected``; empty if it can."""
    differences = {
        "missing": [key for key in expected if key not in found],
        "unexpected": [key for key in found if key not in expected],
        "of another shape": [
            f"{key} is {tuple(found[key].shape)} instead of {tuple(value.shape)}"
            for key, value in expected.items()
            if key in found and found[key].shape != value.shape
        ],
    }
    return ", ".join(f"{len(keys)} {kind} ({_first(keys)})" for kind, keys in differences.items() if keys)


def _first(names: Iterable[Any]) -> str:
    """The first three names, and dots for the others."""
    names = list(map(str, names))
    return ", ".join([*names[:3], "..."] if len(names) > 3 else names)
