"""Ends a distributed job when one of its ranks dies, stops or hangs, whatever the job is doing at that moment."""

import contextlib
import datetime
import math
import sys
import threading
from collections.abc import Callable, Iterator

import torch.distributed as dist

# Ranks of one job may start this many seconds apart, since each of them first has to import PyTorch from the disk.
STARTUP_SECONDS = 60
_BEATS_PER_TIMEOUT = 8
_LONGEST_INTERVAL = 5.0


class Watchdog:
    """Watches the ranks of a job from two background threads in each of them.

    Every rank counts its heartbeats in the store through which the job's ranks met. Rank 0 watches all heartbeats and
    publishes which ranks are lost; the other ranks watch rank 0. A job of N ranks therefore costs its store N + 3 short
    requests per rank and interval at most. A heartbeat shows that a process is alive and running. Whether its main
    thread makes progress is judged in the process itself: after a call of `progressed` no more than the timeout may
    pass until the next, except inside `waiting`.

    Args:
        store: where the ranks met; the watchdog opens a connection of its own to it, because a request of another
            thread may block the store's connection for as long as it waits.
        rank, world_size: the place of this process in the job.
        timeout: seconds after which a silent rank counts as lost.
        on_loss: called once, from a background thread, with the lost ranks. It must end the process.
        on_hang: called once, from a background thread, with the place in the code at which the main thread of this
            process hangs. It must end the process.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world_size: int,
        timeout: float,
        on_loss: Callable[[list[int]], None],
        on_hang: Callable[[str], None],
    ) -> None:
        self._store = connect_again(store, world_size)
        self._rank = rank
        self._timeout = timeout
        self._interval = min(timeout / _BEATS_PER_TIMEOUT, _LONGEST_INTERVAL)
        self._on_loss = on_loss
        self._on_hang = on_hang
        watched = range(1, world_size) if rank == 0 else [0]
        self._heartbeats = dict.fromkeys(watched, 0)
        self._lost: list[int] = []
        self._main_thread = threading.main_thread().ident
        # Seconds granted to the main thread, in a new list for each call of `progressed`, so that `is` detects a call.
        self._patience = [math.inf]
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._exchange, self._judge)]
        for thread in self._threads:
            thread.start()

    def progressed(self, patience: float = 0.0) -> None:
        """Tell that the main thread makes progress, and does so again within the timeout, or `patience` if longer."""
        self._patience = [patience]

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, the main thread may take any time: it waits for other ranks or for a slow disk."""
        before = self._patience
        self.progressed(math.inf)
        try:
            yield
        finally:
            self.progressed(*before)

    def stop(self) -> None:
        """Leave the job in order: the other ranks no longer expect a heartbeat from this one."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(timeout=2 * self._interval)

    def _exchange(self) -> None:
        """Count up this rank's heartbeat and read the others', until stopped. The store may block this thread."""
        while True:
            # The store is gone when the process that keeps it has ended. Then nobody's heartbeat counts up any more,
            # and the judging thread draws the conclusion.
            with contextlib.suppress(RuntimeError):
                if self._stopped.is_set():
                    self._store.set(f"watchdog/left/{self._rank}", "")
                    return
                self._store.add(f"watchdog/heartbeat/{self._rank}", 1)
                self._read_others()
            if self._stopped.is_set():
                return
            self._stopped.wait(self._interval)

    def _read_others(self) -> None:
        if self._rank == 0 and self._lost:
            self._store.set("watchdog/lost", ",".join(map(str, self._lost)))
        elif self._store.check(["watchdog/lost"]):
            self._lost = [int(rank) for rank in self._store.get("watchdog/lost").decode().split(",")]
        for rank in list(self._heartbeats):
            count = self._store.add(f"watchdog/heartbeat/{rank}", 0)
            if count == self._heartbeats[rank] and self._store.check([f"watchdog/left/{rank}"]):
                del self._heartbeats[rank]
            else:
                self._heartbeats[rank] = count

    def _judge(self) -> None:
        """Look every interval for a rank that is lost, or for a main thread that hangs, until stopped."""
        last = dict.fromkeys(self._heartbeats.copy(), 0)
        silence = dict.fromkeys(last, 0.0)
        patience_at_start = max(self._timeout, STARTUP_SECONDS)
        patience, quiet = self._patience, 0.0
        # Silence is counted in turns of this thread rather than by the clock: when a whole job was suspended for an
        # hour, as by Ctrl-Z, no rank has been silent in the eyes of another.
        while not self._stopped.wait(self._interval):
            for rank, count in self._heartbeats.copy().items():
                silence[rank] = silence[rank] + self._interval if count == last[rank] else 0.0
                last[rank] = count
            lost = self._lost or [
                rank
                for rank, count in self._heartbeats.copy().items()
                if silence[rank] >= (self._timeout if count else patience_at_start)
            ]
            if lost:
                self._lost = lost
                if self._rank == 0:
                    # Within one interval the other thread publishes the loss, within the next one the others read it.
                    # They must have read it before this process, which may host the store, ends.
                    self._stopped.wait(3 * self._interval)
                self._on_loss(lost)
                return
            quiet = quiet + self._interval if patience is self._patience else 0.0
            patience = self._patience
            # Wait two intervals longer than a loader waits for its workers, because its own error says more.
            if quiet > max(self._timeout, *patience) + 2 * self._interval:
                self._on_hang(self._place_of_main_thread())
                return

    def _place_of_main_thread(self) -> str:
        frame = sys._current_frames()[self._main_thread]
        return f"{frame.f_code.co_filename}:{frame.f_lineno} ({frame.f_code.co_name})"


def connect_again(store: dist.Store, world_size: int) -> dist.Store:
    """A second connection to the store of `dist.rendezvous`, a `TCPStore` or a `FileStore`."""
    if isinstance(store, dist.FileStore):
        return dist.FileStore(store.path, world_size)
    return dist.TCPStore(
        store.host,
        store.port,
        is_master=False,
        wait_for_workers=False,
        timeout=datetime.timedelta(seconds=STARTUP_SECONDS),
    )
