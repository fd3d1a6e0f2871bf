"""log.txt and TensorBoard, which contain each epoch exactly once, even after restarts."""

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from .errors import UserError
from .files import replacing, writing
from .ranks import get_rank, print_once


class RunLog:
    """``log.txt`` (one JSON object a line) and TensorBoard scalars in ``output_dir``; only rank 0 writes them.

    Args:
        output_dir: nothing is written if it is empty.
        first_epoch: the first epoch of a resumed run. The lines that an interrupted run left for this epoch and later
            ones are dropped; None keeps all lines. A line that a crash cut off is always dropped.
    """

    def __init__(self, output_dir: str, first_epoch: int | None = None) -> None:
        self.path = pathlib.Path(output_dir, "log.txt") if output_dir and get_rank() == 0 else None
        self.unwritten = False
        self.scalars: list[tuple[str, float, int]] = []
        self.lines = _kept_lines(self.path, first_epoch) if self.path and self.path.exists() else []

    def write(self, epoch: int, values: Mapping[str, Any] | None = None) -> None:
        """Append an epoch's values, if there are any, and write what is not written yet. TensorBoard gets the numbers.

        If TensorBoard's files cannot be written, there is only a note, since log.txt has all the numbers; the next call
        tries again.

        Raises: UserError if log.txt cannot be written; the next call tries again.
        """
        if values and self.path:
            self.lines.append(json.dumps(values).encode() + b"\n")
            self.scalars += [(name, value, epoch) for name, value in values.items() if isinstance(value, (int, float))]
            self.unwritten = True
        if self.unwritten:
            with replacing(self.path) as file:
                file.writelines(self.lines)
            self.unwritten = False
        if self.scalars:
            try:
                self._write_scalars()
            except UserError as error:
                print_once(f"note: {error}: training continues and tries again at the next save")

    def _write_scalars(self) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and evaluation does not need it

        folder = self.path.with_name("tensorboard")
        # TensorBoard hides what earlier writers wrote for this epoch and later ones.
        with writing(folder), SummaryWriter(str(folder), purge_step=self.scalars[0][2]) as board:
            for scalar in self.scalars:
                board.add_scalar(*scalar)
        self.scalars = []


def _kept_lines(path: pathlib.Path, first_epoch: int | None) -> list[bytes]:
    """The complete lines of the log, without those of ``first_epoch`` and later ones."""
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        epoch = re.search(rb'"epoch": (\d+)', line)
        repeated = epoch and first_epoch is not None and int(epoch[1]) >= first_epoch
        if line.endswith(b"\n") and not repeated:
            kept.append(line)
    return kept
