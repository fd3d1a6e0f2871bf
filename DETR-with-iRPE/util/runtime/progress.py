"""The lines that a pass over a loader prints."""

import datetime
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.distributed as dist

from .errors import UserError
from .ranks import all_reduce_sum, get_world_size, print_once

_STEPS_BETWEEN_LINES = 20


class Progress:
    """Counts the steps of one pass over a loader, and averages their values over the steps and the ranks.

    Every 20 steps, and at the end, it prints a line: steps, time left, images/s, GPU memory, and for each value the
    mean of the last 20 steps and, in brackets, of all steps.

    Args:
        header: the beginning of the lines, such as "epoch 3".
        steps: of the whole pass.
        images_per_step: over all ranks.
        shown: the names of the values to print; all if there are none.
        first_step: above 0 if the pass continues one that was stopped.
        values: the values of the steps before ``first_step``, by name.
        group: process group in which the means are computed.
        describe_step: called on all ranks with a step and {name: value} if a value of this step is not finite; returns
            the end of the error message.
        constants: values that are the same in all steps, such as the learning rate.
    """

    def __init__(
        self,
        header: str,
        steps: int,
        images_per_step: float,
        shown: Iterable[str] = (),
        *,
        first_step: int = 0,
        values: Mapping[str, Sequence[float]] | None = None,
        group: dist.ProcessGroup | None = None,
        describe_step: Callable[[int, dict[str, float]], str] | None = None,
        **constants: float,
    ) -> None:
        self.header, self.steps, self.images_per_step, self.shown = header, steps, images_per_step, shown
        self.done = first_step
        self.values = {name: [value] for name, value in constants.items()} | dict(values or {})
        self._group, self._describe_step = group, describe_step
        self._unread: list[dict[str, torch.Tensor]] = []
        self._first_step, self._started = first_step, time.perf_counter()

    def step(self, **values: torch.Tensor) -> None:
        """Count a step, and take its values: 0-d tensors, the same names in every step.

        They are read only when the next line is due, since reading them makes the program wait for the GPU.

        Raises: UserError on all ranks if a value that is read is not finite.
        """
        if values:
            self._unread.append({name: value.detach().float() for name, value in values.items()})
        self.done += 1
        if self.done % _STEPS_BETWEEN_LINES == 0 or self.done == self.steps:
            self.read()
            print_once(self._line())

    def averages(self) -> dict[str, float]:
        """The mean of every value over all steps."""
        return {name: statistics.fmean(values) for name, values in self.values.items()}

    def read(self) -> dict[str, list[float]]:
        """The values of all steps up to now by name, as means over the ranks; all ranks have to call this.

        Raises: UserError on all ranks if one is not finite.
        """
        if not self._unread:
            return self.values
        rows = torch.stack([torch.stack(list(step.values())) for step in self._unread])
        rows = all_reduce_sum(rows, self._group) / get_world_size()
        names = list(self._unread[0])
        self._unread.clear()
        for step, row in enumerate(rows.tolist(), self.done - len(rows)):
            for name, value in zip(names, row, strict=True):
                if not math.isfinite(value):
                    raise self._nonfinite(name, value, step)
                self.values.setdefault(name, []).append(value)
        return self.values

    def _nonfinite(self, name: str, value: float, step: int) -> UserError:
        more = self._describe_step(step, {name: value}) if self._describe_step else ""
        return UserError(
            f"{name} is {value} at {self.header}, step {step}: training stops; a lower --lr or "
            f"gradient clipping may help; checkpoints saved before are unaffected{more}"
        )

    def _line(self) -> str:
        rate = (self.done - self._first_step) / (time.perf_counter() - self._started)
        left = datetime.timedelta(seconds=round((self.steps - self.done) / rate))
        line = f"{self.header} [{self.done}/{self.steps}]  eta {left}  {rate * self.images_per_step:.1f} img/s"
        means = self.averages()
        for name in self.shown or means:
            recent = statistics.fmean(self.values[name][-_STEPS_BETWEEN_LINES:])
            line += f"  {name} {recent:.4g} ({means[name]:.4g})"
        if memory := torch.cuda.max_memory_allocated():
            line += f"  mem {memory / 2**20:.0f} MB"
        return line


def step_optimizer(loss_scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
    """Step the optimizer and update the scaler, which skips steps whose gradients overflow and then halves its scale.

    Raises: UserError if the scale has become tiny: then the gradients are not finite at any scale.
    """
    # Read before the step, which waits for the gradients anyway; read after it, it would wait for the optimizer too.
    # The scale starts at 2¹⁶, so this takes 31 halvings; a disabled scaler returns 1.
    if loss_scaler.get_scale() < 2**-14:
        raise UserError(
            "the gradients are not finite in float16 at any scale of the loss: training stops; bfloat16 "
            "or float32, or a lower --lr, may help; checkpoints saved before are unaffected"
        )
    loss_scaler.step(optimizer)
    loss_scaler.update()
