"""What a program needs of the system: signals, a compiler, and patience while it compiles."""

import argparse
import platform
import signal

import torch

from .errors import UserError

_COMPILING_SECONDS = 600  # One rank may take this much longer to compile than another.


def need_signals(task: str, *names: str) -> None:
    """Raise ``UserError`` if the system, such as Windows, lacks one of the signals that ``task`` needs."""
    missing = [name for name in names if not hasattr(signal, name)]
    if missing:
        raise UserError(
            f"{task} needs the signals {' and '.join(names)}, and {platform.system()} lacks "
            f"{' and '.join(missing)}: use Linux, on Windows in WSL; main.py --eval works without them"
        )


def check_compiler(device: torch.device) -> None:
    """Try ``torch.compile`` on one addition, so that a run without a compiler fails at once, not in its first step.

    Raises: UserError that says what ``torch.compile`` lacks here.
    """
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as error:  # a missing compiler, header, library or Triton each raises its own kind
        cause = str(error).partition("\n")[0]
        raise UserError(
            f"--compile cannot be used, since torch.compile fails on {device} ({cause}): install a C++ "
            "compiler such as g++, on a GPU also Triton, or leave --compile out"
        ) from error


def step_timeout(args: argparse.Namespace) -> float:
    """Seconds that a rank waits for another in a training step; with ``--compile`` one may compile much longer."""
    return max(args.step_timeout, _COMPILING_SECONDS) if args.compile else args.step_timeout
