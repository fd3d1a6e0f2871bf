"""Time what attention by rows does on the CPU to launch its kernels: `python benchmarks/rows_launches.py`.

A driver that compiles kernels for an H100 but launches nothing stands in for a GPU's, so no GPU is needed. The
overhead of the real driver is not included; it would add the same time to both columns. The times are CPU times, which
depend little on other processes.
"""

import argparse
import datetime
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from machine import machine
from rpe_ops import rows
from triton.backends.compiler import GPUTarget

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "DeiT-with-iRPE"))
from irpe import row_layout

HEADS, CHANNELS, BUCKETS = 2, 64, 50


class Utilities:
    """The part of a driver that loads compiled kernels; it numbers them instead."""

    def __init__(self) -> None:
        self.loaded = 0

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        """(module, function, registers, spills, most threads per block) of a kernel."""
        self.loaded += 1
        return 1, self.loaded, 32, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        """What Triton compares a kernel's needs with, in bytes."""
        return {"max_shared_mem": 232448}

    def unload_module(self, module: int) -> None:
        """Do nothing."""


class Driver:
    """Takes the place of a GPU's driver in Triton.

    Args:
        launch: called instead of every launch, with the kernel's name, its function's number, the grid and the
            arguments.
    """

    def __init__(self, launch: Callable[..., None] = lambda *args: None) -> None:
        self.utils = Utilities()
        self.launch = launch

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """What Triton calls to launch a compiled kernel."""

        def launcher(
            x: int,
            y: int,
            z: int,
            stream: int,
            function: int,
            packed: Any,
            launch_metadata: Any,
            enter_hook: Any,
            exit_hook: Any,
            *arguments: Any,
        ) -> None:
            self.launch(metadata.name, function, (x, y, z), arguments)

        return launcher

    def get_current_target(self) -> GPUTarget:
        """An H100."""
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The only one."""
        return 0


def through_triton(kernel: Any, grid: Any, options: rows.Tile, arguments: list) -> Callable[..., None]:
    """Launch a kernel and, in contrast to `rows._launch`, let Triton look the kernel up again in later launches."""
    launch(kernel, grid, options, arguments)
    return lambda *arguments: launch(kernel, grid, options, list(arguments)) and None


def microseconds(run: Callable[[], Any], repeats: int) -> float:
    """The CPU time of a call: the shortest mean of 100 calls in a row."""
    found = []
    for _ in range(repeats):
        start = time.process_time()
        for _ in range(100):
            run()
        found.append((time.process_time() - start) * 1e4)
    return min(found)


def measure(places: str, repeats: int) -> tuple[float, float]:
    """CPU time in µs of (forward, backward) for terms on these places, without autograd."""
    rows.forget_launches()
    # The size of the map does not matter, because nothing is computed.
    index = torch.arange(-3, 4) + 3
    layout, sizes = row_layout((index[:, None] * 7 + index)[None], 1, BUCKETS)
    q, k, v = torch.zeros(1, 17, 3, HEADS, CHANNELS, dtype=torch.float16).permute(2, 0, 3, 1, 4)
    shapes = {"q": (1, CHANNELS, BUCKETS), "k": (1, CHANNELS, BUCKETS), "v": (1, BUCKETS, CHANNELS)}
    tables = [torch.zeros(shapes[place]) for place in places]
    arguments = q, k, v, tables, places, layout, list(sizes), False, None, None, 0.0
    saved = rows._forward(*arguments)
    grad = torch.ones_like(saved[0])
    return (
        microseconds(lambda: rows._forward(*arguments), repeats),
        microseconds(lambda: rows._backward(grad, *saved, *arguments), repeats),
    )


def main(args: argparse.Namespace) -> None:
    """Print the table."""
    triton.runtime.driver.set_active(Driver())
    torch.set_num_threads(1)
    print(f"{datetime.date.today()}, {machine('cpu')}, PyTorch {torch.__version__}, Triton {triton.__version__}")
    print("CPU time in µs per layer; Triton: every launch goes through Triton's look-up of the compiled kernel")
    print(f"{'on':6}{'pass':10}{'Triton':>8}{'now':>8}{'ratio':>8}")
    for places in args.places:
        rows._launch = through_triton
        before = measure(places, args.repeats)
        rows._launch = launch
        now = measure(places, args.repeats)
        for name, x, y in zip(("forward", "backward"), before, now, strict=True):
            print(f"{places:6}{name:10}{x:8.0f}{y:8.0f}{x / y:8.2f}", flush=True)


launch = rows._launch

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--places", nargs="+", default=["k", "qk", "qkv"], help="where iRPE is applied: q, k, v")
    parser.add_argument("--repeats", type=int, default=30, help="number of measurements, of which the shortest counts")
    main(parser.parse_args())
