"""A training run that can be stopped at any moment and resumed: its epochs, saves and signals."""

import argparse
import itertools
import json
import pathlib
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from .errors import Interrupted, UserError, tells_of_lost_rank
from .files import replacing
from .job import Job
from .ranks import gather, get_rank, get_world_size, print_once
from .run_log import RunLog

# Signals that ask training to stop. submitit sends SIGUSR2; Windows has only SIGTERM.
STOPPING = ("SIGTERM", "SIGUSR1", "SIGUSR2")
# On GPUs, the ranks ask each other for signals every so many steps: more often would slow training down.
_STEPS_BETWEEN_MEETINGS = 20


class Run:
    """Training from the epoch and step at which it starts or resumes.

    Inside its ``with``, a signal that asks to stop no longer kills the process; the loop asks for it after every step.
    A training loop looks like this::

        with Run(...) as run:
            for epoch in run.epochs():
                for step in ...:
                    ...  # train
                    signal_number = run.agreed_signal(step + 1)
                    if signal_number or run.save_is_due(step + 1):
                        run.save(step + 1, values)
                    if signal_number:
                        raise Interrupted(signal_number, job.place)
                run.save(row=...)

    Args:
        args: the flags: `output_dir`, `save_every` (0: save at the end of an epoch only), `epochs`. They are saved too.
        job: this process's part in the job.
        log: receives a row after each epoch.
        write_state: writes the state; takes a path, the epoch, ``args``, and the progress in the epoch (None if the
            epoch is done).
        loader: its sampler is a ``SeededSampler``.
        epoch: the first epoch to train.
        progress: what of this epoch is done already, as `resume_point` returns it.

    Attributes:
        epoch: the epoch that is being trained.
        first_step: its first step, which is above 0 if the run resumed within the epoch.
        values: the logged values of its steps before ``first_step``, by name.
        images_per_step: over all ranks.
        command: the program and its flags, which replay a step when they are given again.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        job: Job,
        log: RunLog,
        write_state: Callable[..., None],
        loader: DataLoader,
        epoch: int = 0,
        progress: Mapping[str, Any] | None = None,
    ) -> None:
        places = gather((epoch, progress and progress["images"]))
        if len(set(places)) > 1:
            raise UserError(
                f"the ranks would resume from different places (epoch, images), {places}: all of them "
                "must see the same files in --output_dir, or in --resume"
            )
        self.args, self.job, self.log, self.loader = args, job, log, loader
        self._write_state = write_state
        self._handlers: dict[int, Any] = {}
        self._failed_save: UserError | None = None
        self.command = list(sys.argv)
        self.epoch = epoch
        self.images_per_step = loader.batch_size * get_world_size()
        self.first_step = progress["images"] // self.images_per_step if progress else 0
        self.values: dict[str, list[float]] = dict(progress["values"]) if progress else {}

    def __enter__(self) -> "Run":
        self.job.received_signals.clear()
        for number in (getattr(signal, name) for name in STOPPING):
            self._handlers[number] = signal.signal(number, lambda number, _: self.job.received_signals.append(number))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._failed_save and (error is None or isinstance(error, Interrupted)):
            raise self._failed_save
        if self.job.received_signals and tells_of_lost_rank(error):  # another rank stopped first, in the evaluation
            raise Interrupted(self.job.received_signals[0], self.job.place) from error

    def epochs(self) -> Iterator[int]:
        """The epochs to train; the loader's sampler starts where the run has to continue."""
        while self.epoch < self.args.epochs:
            self.loader.sampler.set_epoch(self.epoch, self.first_step * self.images_per_step)
            yield self.epoch
            self.epoch, self.first_step, self.values = self.epoch + 1, 0, {}

    def save_is_due(self, steps: int) -> bool:
        """Whether the state is to be saved now that ``steps`` steps of the epoch are done."""
        save_every = self.args.save_every
        return steps == len(self.loader) or bool(save_every) and steps % save_every == 0

    def agreed_signal(self, steps: int) -> int:
        """The number of the signal for which training stops after this step; 0 if it continues.

        All ranks have to call this: they stop after the same step, whichever of them received the signal. On several
        GPUs, a signal takes effect after `_STEPS_BETWEEN_MEETINGS` steps at most.

        Args:
            steps: how many steps of the epoch are done.
        """
        received = max(self.job.received_signals, default=0)
        if not dist.is_initialized():
            return received
        meet = self.save_is_due(steps) or steps % _STEPS_BETWEEN_MEETINGS == 0 or dist.get_backend() == "gloo"
        return max(gather(received, self.job.training_group)) if meet else 0

    def save(
        self,
        steps: int = 0,
        values: Mapping[str, Sequence[float]] | None = None,
        row: Mapping[str, Any] | None = None,
    ) -> None:
        """Save within an epoch (with ``steps`` and ``values``) or at its end (with ``row``).

        A failure is noted, and the next save tries again; if the last save failed, the run ends with that error. All
        ranks have to call this.

        Args:
            steps: how many steps of the epoch are done.
            values: the logged values of these steps, by name.
            row: the epoch's row for the log.
        """
        progress = None
        if row is None:
            tensors = {name: torch.tensor(numbers, dtype=torch.float64) for name, numbers in values.items()}
            progress = {"images": steps * self.images_per_step, "values": tensors}
        place, self.job.place = self.job.place, f"the save after {self.job.place}"
        with self.job.waiting():
            try:
                self.log.write(self.epoch, row)
                if self.args.output_dir and get_rank() == 0:
                    path = pathlib.Path(self.args.output_dir, "checkpoint.pth")
                    self._write_state(path, self.epoch, self.args, progress)
                self._failed_save = None
            except UserError as error:
                print_once(f"note: {error}: training continues and tries again at the next save")
                self._failed_save = error
            gather("saved")  # The other ranks wait here for rank 0: in a training step, the wait would time out.
        self.job.place = place

    def describe_step(self, step: int, values: Mapping[str, float], lr: float) -> str:
        """Write a step, its values, the learning rate and the names of its images on all ranks to nonfinite.json.

        All ranks have to call this.

        Returns: the end of a sentence that says how to replay the step; "" without an output directory.
        """
        if not self.args.output_dir:
            return ""
        self.loader.sampler.set_epoch(self.epoch, step * self.images_per_step)
        keys = itertools.islice(self.loader.sampler, self.loader.batch_size)
        name_of = getattr(self.loader.dataset.dataset, "name", str)
        names = gather([name_of(index) for index, *_ in keys])
        path = pathlib.Path(self.args.output_dir, "nonfinite.json")
        if get_rank() == 0:
            content = {"epoch": self.epoch, "step": step, **values, "lr": lr, "images": names}
            try:
                with replacing(path) as file:
                    file.write(json.dumps(content).encode())
            except UserError as error:  # the value that is not finite must be reported all the same
                return f"; {error}"
        launcher = f"torchrun --nproc_per_node={get_world_size()}" if get_world_size() > 1 else "python"
        return f"; its images are in {path}; to replay it: {launcher} {shlex.join(self.command)} --resume auto"
