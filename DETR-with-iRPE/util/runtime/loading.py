"""Batches from the loading processes of a DataLoader."""

import os
import time
from collections.abc import Iterable, Iterator
from typing import Any


def own_group(_: int) -> None:
    """Put the worker into a process group of its own; a ``worker_init_fn`` of DataLoaders.

    A signal to the training process's group then does not kill workers that the current step still needs.
    """
    if hasattr(os, "setpgid"):  # a system without process groups sends them no signals
        os.setpgid(0, 0)


def read_batches(loader: Iterable) -> Iterator[Any]:
    """Start loading; return an iterator over the loader's batches.

    A worker that dies while it hands over a batch is reported as a dead worker.
    """
    return _read_batches(iter(loader))


def _read_batches(batches: Iterator) -> Iterator[Any]:
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (ConnectionError, EOFError) as error:
            time.sleep(5)  # PyTorch raises an error here that names the worker, as soon as it learns of its end
            raise RuntimeError(f"DataLoader worker ended while it handed over a batch: {error!r}") from error
        yield batch
