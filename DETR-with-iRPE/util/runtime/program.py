"""The command line of a program, and how it ends: exit status and error message."""

import argparse
import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch.distributed as dist

from .errors import Interrupted, UserError, explanation
from .ranks import get_local_rank, get_rank, get_world_size, print_once


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser that accepts every flag with dashes and with underscores (``--save-every``, ``--save_every``).

    It reports a mistake in one line, without the usage of all flags.
    """

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse as argparse does, with every flag in either spelling."""
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([self._own_spelling(word) for word in words], namespace)

    def error(self, message: str) -> NoReturn:
        """End the program with status 2 and the message."""
        end_process(2, f"{message}; --help lists all flags")

    def _own_spelling(self, word: str) -> str:
        """The word with its flag in the spelling that the parser knows; other words are unchanged."""
        flag, equals, value = word.partition("=")
        own = {option.replace("_", "-"): option for option in self._option_string_actions}
        if not flag.startswith("--") or flag in self._option_string_actions:
            return word
        return own.get(flag.replace("_", "-"), flag) + equals + value


def run(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> None:
    """Call ``main(args)`` and end the process with the exit status and message for what it raises.

    The status is 1 after a ``UserError``, 130 after Ctrl-C, and 75, the "try again" of sysexits.h, after a signal that
    stopped training. Other exceptions keep their traceback.
    """
    try:
        main(args)
    except KeyboardInterrupt:
        end_process(130)
    except Interrupted as stop:
        print_once(stop)
        end_process(75)
    except UserError as error:
        end_process(1, error)
    except Exception as error:
        if sentence := explanation(error):
            end_process(1, sentence)
        if not dist.is_initialized():
            raise
        end_process(1, traceback.format_exc())  # os._exit would not print it


def end_process(status: int, error: object = "") -> NoReturn:
    """Print the error, if there is one, and end the process with this status.

    The first rank of a machine prints at once, and the launcher then stops the others; another rank prints only if it
    is still running some seconds later. Errors shared by all ranks are therefore printed once, and an error on one rank
    is printed by that rank.
    """
    with contextlib.suppress(OSError):  # the terminal or pipe may be closed
        if error:
            time.sleep(10 if get_local_rank() else 0)
            speaker = f"rank {get_rank()} of {get_world_size()}: " if get_world_size() > 1 else ""
            print(f"error: {speaker}{error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
    if get_world_size() > 1:
        os._exit(status)  # an orderly exit would wait for collectives whose partners are gone
    sys.exit(status)
