"""This process's part in a job of one or more ranks, from the start to the end."""

import atexit
import contextlib
import datetime
import math
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from .errors import Interrupted, UserError, explanation, tells_of_lost_rank
from .loading import read_batches
from .program import end_process
from .ranks import get_rank, get_world_size, silent_ranks
from .watchdog import STARTUP_SECONDS, Watchdog

# A collective outside training steps waits this long: rank 0 may evaluate or write while the others wait for it.
_LONGEST_WAIT = datetime.timedelta(hours=1)


class Job:
    """One rank's part in its job: a context around everything that this process does in the job.

    At the end of the context this rank leaves the job. If an error ends the context, the rank leaves without notice, so
    that the others count it as lost; and an error of PyTorch whose cause is known, such as a full GPU or a lost rank,
    becomes a ``UserError``. `meet` and `connect` do nothing for a single rank.

    Args:
        dist_url: where the ranks meet; "env://" takes the address that the launcher set in the environment.
        step_timeout: seconds without an answer or progress after which a rank counts as lost.

    Attributes:
        place: what the main thread is doing, such as "epoch 3, step 7", for messages.
        received_signals: numbers of the signals that asked to stop; the handlers of `Run` append to it.
        training_group: process group for training steps, whose collectives wait ``step_timeout`` seconds; before
            `connect` it is None, which stands for the default group.
    """

    def __init__(self, dist_url: str = "env://", step_timeout: float = 60) -> None:
        self.dist_url = dist_url
        self.step_timeout = step_timeout
        self.place = "its first steps"
        self.received_signals: list[int] = []
        self.training_group: dist.ProcessGroup | None = None
        self._store: dist.Store | None = None
        self._watchdog: Watchdog | None = None
        self._ending = threading.Lock()  # held by the thread that ends this process, so that only one error is printed

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if error is None or isinstance(error, Interrupted):
            self._leave()
        if error is None:
            self._disconnect()
            return
        self._claim_ending()
        if isinstance(error, UserError | Interrupted) or not isinstance(error, Exception):
            return
        sentence = explanation(error, self.place)
        if not sentence and dist.is_initialized() and tells_of_lost_rank(error):
            sentence = f"{_named(silent_ranks())} is lost or hangs in {self.place}: {UserError(error)}"
        if sentence:
            raise UserError(sentence) from error

    def meet(self) -> None:
        """Meet the other ranks, if there are any, and watch from then on that all of them stay alive.

        If a rank dies or hangs, the others exit about ``step_timeout`` seconds later, whatever they are doing.

        Raises: UserError if the others do not come within ``step_timeout`` or ``STARTUP_SECONDS``, whichever is longer.
        """
        if get_world_size() == 1 or self._watchdog:
            return
        patience = datetime.timedelta(seconds=max(self.step_timeout, STARTUP_SECONDS))
        try:
            meeting = dist.rendezvous(self.dist_url, get_rank(), get_world_size(), timeout=patience)
            self._store, _, _ = next(meeting)
            self._watchdog = Watchdog(
                self._store, get_rank(), get_world_size(), self.step_timeout, self._end_for_loss, self._end_for_hang
            )
        except (RuntimeError, ValueError, AssertionError) as error:
            raise UserError(
                f"the other ranks cannot be reached at --dist_url {self.dist_url} ({UserError(error)}): check that all "
                f"{get_world_size()} ranks have started; without torchrun, use tcp://HOST:PORT with the name of the "
                "machine of rank 0; if the ranks start at very different times, raise the step timeout"
            ) from error

    def connect(self, device: torch.device) -> None:
        """Set up communication between the ranks that met: NCCL between GPUs, gloo between CPUs.

        Raises: UserError if that fails.
        """
        if get_world_size() == 1 or dist.is_initialized():
            return
        backend, bound = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        try:
            dist.init_process_group(
                backend,
                store=self._store,
                rank=get_rank(),
                world_size=get_world_size(),
                device_id=bound,
                timeout=_LONGEST_WAIT,
            )
            self.training_group = dist.new_group(timeout=datetime.timedelta(seconds=self.step_timeout))
            atexit.register(self._disconnect)  # for a program that continues after an error, as submitit's does
        except (RuntimeError, ValueError) as error:
            stale = "; delete a file that an earlier job left" if "file://" in self.dist_url else ""
            raise UserError(
                f"{backend} cannot connect the {get_world_size()} ranks: {UserError(error)}{stale}"
            ) from error

    def progressed(self, patience: float = 0.0) -> None:
        """Tell the watchdog that the main thread makes progress.

        The main thread has to call this again, or leave the job, within the step timeout, or within ``patience``
        seconds if that is longer; otherwise it counts as hanging.
        """
        if self._watchdog:
            self._watchdog.progressed(patience)

    def waiting(self) -> contextlib.AbstractContextManager:
        """A context in which the main thread may take any time, because it waits for other ranks or for a slow disk."""
        return self._watchdog.waiting() if self._watchdog else contextlib.nullcontext()

    @contextlib.contextmanager
    def training_steps(self) -> Iterator[None]:
        """A context for the training steps of an epoch.

        The ranks wait for each other in every training step, so the timeout of ``training_group`` ends a hang there,
        and the watchdog does not judge the main thread.
        """
        self.progressed(math.inf)
        yield
        self.progressed()

    def evaluation_steps(self, header: str, loader: Iterable) -> Iterator[Any]:
        """The loader's batches for a pass in which the ranks do not wait for each other.

        A step that takes ten times as long as the slowest one before it, and longer than the step timeout, is a hang.
        """
        self.progressed(math.inf)
        before, slowest = time.perf_counter(), 0.0
        for step, batch in enumerate(read_batches(loader)):
            self.place = f"{header}, step {step}"
            yield batch
            now = time.perf_counter()
            before, slowest = now, max(slowest, now - before)
            self.progressed(10 * slowest)
        self.progressed()

    def stop_if_signalled(self) -> None:
        """Raise ``Interrupted`` if this rank received a signal that asks training to stop."""
        if self.received_signals:
            raise Interrupted(self.received_signals[0], self.place)

    def _leave(self) -> None:
        """Tell the other ranks that this one ends in order."""
        if self._watchdog:
            self._watchdog.stop()
            self._watchdog = None

    def _disconnect(self) -> None:
        """End the threads of the process group, which would abort the exit of the process, and drop the store.

        The last process to drop the store of a file:// address deletes the file.
        """
        if self._store is not None and dist.is_initialized():
            dist.destroy_process_group()
        self.training_group = self._store = None

    def _claim_ending(self) -> None:
        """Wait forever if the watchdog's thread, or the main one, is already ending this process."""
        if not self._ending.acquire(blocking=False):
            threading.Event().wait()

    def _end_for_loss(self, ranks: list[int]) -> NoReturn:
        self._claim_ending()
        if get_rank() in ranks:  # this rank was stopped for so long that the others have given it up
            end_process(1, f"this rank did not answer the others for too long in {self.place}")
        end_process(1, f"{_named(ranks)} is lost or hangs in {self.place}: it does not answer")

    def _end_for_hang(self, line: str) -> NoReturn:
        self._claim_ending()
        end_process(1, f"this rank hangs in {self.place}, at {line}")


def _named(ranks: list[int]) -> str:
    return f"rank {', '.join(map(str, ranks))}" if ranks else "another rank"
