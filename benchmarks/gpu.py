"""Time training steps, the kernels of an attention and their tilings on a GPU.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --device cpu --tiny     # try the whole script without a GPU

Each model runs in its own process. The processes compile at the same time and wait. They are then timed one at a time,
and every round times each of them once. The script prints kernel time, number of launches, wall time and peak memory
of a training step, in eager mode and compiled, and their ratios to the plain model's step (timm's model, or an encoder
without relative positions). At the end it compares the ratios with the goals.
"""

import argparse
import contextlib
import dataclasses
import datetime
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:  # The environment has to be set before torch and rpe_ops are imported.
    from multiprocessing.connection import Connection

    import torch
    from rpe_ops.rows import Tile
    from torch import nn

ROOT = Path(__file__).resolve().parent.parent
MODELS = {  # name: (batch size, timm's name of the model or (height, width) of the encoder's map)
    "DeiT-S": (128, "deit_small_patch16_224"),
    "DETR encoder, 25x34": (2, (25, 34)),
    "DeiT-B": (128, "deit_base_patch16_224"),
    "DETR encoder, 35x40": (2, (35, 40)),
}
TINY_MODELS = {"DeiT-S": (1, "deit_small_patch16_224"), "DETR encoder, 1x2": (2, (1, 2))}
WAYS = [("plain", ""), ("composed", "k"), ("rows", "k"), ("composed", "qkv"), ("rows", "qkv")]
TINY_WAYS = {
    "DeiT-S": [("plain", ""), ("rows", "k")],  # only two, because the interpreter is slow
    "DETR encoder, 1x2": [("plain", ""), ("composed", "qkv")],
}
MODES = ("eager", "compiled")
TOGETHER = 10  # Processes that compile at the same time. The five ways of one DeiT take at most 55 GB together.
GOALS = {("k", "kernels"): 1.12, ("qkv", "kernels"): 1.35, ("k", "memory"): 1.02, ("qkv", "memory"): 1.12}
SLACK = 0.03  # By how much the ratio of compiled wall times may exceed the ratio of kernel times.


Ratios: TypeAlias = dict[
    tuple[str, str, str, str], dict[str, float]
]  # (model, mode, way, places): kernels, wall, memory


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model to time: `way` is plain, composed or rows, and `on` the places that have terms, for example "qkv"."""

    model: str
    way: str
    on: str

    @property
    def name(self) -> str:
        """The way and the places, for tables."""
        return f"{self.way} {self.on}".strip()


@dataclasses.dataclass
class Measurement:
    """A training step: kernel time (ms), number of launches, wall time of each round (ms), and peak memory (MiB)."""

    kernels: float = 0.0
    launches: int = 0
    wall: list[float] = dataclasses.field(default_factory=list)
    memory: float = 0.0


# --- The timed training steps, each in its own process ---------------------------------------------------------------


def deit_step(subject: Subject, args: "Arguments") -> tuple["nn.Module", Callable[[Callable], "torch.Tensor"]]:
    """A DeiT, and a function that returns the loss of a batch, given the model or its compiled form."""
    sys.path.insert(0, str(ROOT / "DeiT-with-iRPE"))
    import timm
    import torch
    import torch.nn.functional as F

    from irpe import get_rpe_config
    from rpe_vision_transformer import equip_irpe

    batch, name = models(args)[subject.model]
    options = {"img_size": 16, "depth": 1, "embed_dim": 16, "num_heads": 1} if args.tiny else {}
    model = timm.create_model(name, **options)
    equip_irpe(model, get_rpe_config(rpe_on=subject.on) if subject.on else None)
    model.to(args.device)
    images = torch.randn(batch, 3, *model.patch_embed.img_size, device=args.device)
    targets = torch.arange(batch, device=args.device)
    return model, lambda forward: F.cross_entropy(forward(images), targets)


def encoder_step(subject: Subject, args: "Arguments") -> tuple["nn.Module", Callable[[Callable], "torch.Tensor"]]:
    """The same as `deit_step` for DETR's encoder; the second image of the batch is padded."""
    sys.path.insert(0, str(ROOT / "DETR-with-iRPE"))
    import torch

    from models.rpe_attention.irpe import get_rpe_config
    from models.transformer import Encoder, EncoderLayer

    batch, (height, width) = models(args)[subject.model]
    channels, heads, layers = (16, 1, 1) if args.tiny else (256, 8, 6)
    config = get_rpe_config(2.0, rpe_on=subject.on) if subject.on else None
    model = Encoder([EncoderLayer(channels, heads, 8 * channels, 0.1, False, config) for _ in range(layers)], None)
    model.to(args.device)
    tokens, positions = torch.randn(2, batch, height * width, channels, device=args.device)
    padding = torch.zeros(batch, height, width, device=args.device)
    padding[1, :, width * 3 // 4 :] = -torch.inf
    padding = padding.flatten(1)
    return model, lambda forward: forward(tokens, positions, padding, (height, width)).square().mean()


class Runner:
    """Training steps of one subject; `mode` is eager or compiled."""

    def __init__(self, subject: Subject, args: "Arguments") -> None:
        import torch

        self.torch = torch
        self.args = args
        torch.manual_seed(0)
        self.model, self.loss = (encoder_step if "DETR" in subject.model else deit_step)(subject, args)
        fused = {"fused": True} if args.device == "cuda" else {}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), **fused)
        compiled = torch.compile(self.model, dynamic=False, backend=args.backend)
        self.forwards = {"eager": self.model, "compiled": compiled}

    def step(self, mode: str) -> None:
        """Run one training step. It does not scale the loss for float16, because only its time matters."""
        with self.torch.autocast(self.args.device, self.args.dtype()):
            loss = self.loss(self.forwards[mode])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def warm_up(self, mode: str) -> None:
        """Run an untimed step, because other processes used the GPU before."""
        if not self.args.tiny:
            self.step(mode)
            self.synchronize()

    def synchronize(self) -> None:
        """Wait until the GPU has finished."""
        if self.args.device == "cuda":
            self.torch.cuda.synchronize()

    def prepare(self) -> None:
        """Compile and warm up, then free memory for the other processes."""
        for mode in ["compiled"] if self.args.tiny else self.args.modes:
            for _ in range(1 if self.args.tiny else 3):
                self.patient_step(mode)
        self.synchronize()
        self.forget()

    def patient_step(self, mode: str) -> None:
        """Run a step. Try it again for up to a minute while other processes use too much memory."""
        for _ in range(20):
            try:
                return self.step(mode)
            except self.torch.OutOfMemoryError:
                self.forget()
                time.sleep(3)
        return self.step(mode)

    def forget(self) -> None:
        """Free the gradients and the allocator's cache."""
        self.optimizer.zero_grad()
        if self.args.device == "cuda":
            self.torch.cuda.empty_cache()

    def wall(self, mode: str) -> float:
        """Wall time of a step in milliseconds, the mean over three steps."""
        self.warm_up(mode)
        steps = 1 if self.args.tiny else 3
        started = time.perf_counter()
        for _ in range(steps):
            self.step(mode)
        self.synchronize()
        return 1e3 * (time.perf_counter() - started) / steps

    def kernels(self, mode: str) -> tuple[float, int]:
        """Kernel time of a step in milliseconds, and the number of launches."""
        self.warm_up(mode)
        steps = 1 if self.args.tiny else 3

        def run() -> None:
            for _ in range(steps):
                self.step(mode)
            self.synchronize()

        kernels = profile(run, self.args.device)
        milliseconds = sum(time for _, time, _ in kernels)
        launches = sum(number for _, _, number in kernels)
        return milliseconds / steps, round(launches / steps)

    def memory(self, mode: str) -> float:
        """Peak memory of a step in MiB, including the model and the optimizer's state. It is 1 without a GPU."""
        if self.args.device != "cuda":
            return 1.0
        self.optimizer.zero_grad()
        self.synchronize()
        self.torch.cuda.reset_peak_memory_stats()
        self.step(mode)
        self.synchronize()
        return self.torch.cuda.max_memory_allocated() / 2**20


def profile(function: Callable[[], Any], device: str) -> list[tuple[str, float, int]]:
    """(name, milliseconds, number of calls) of each kernel (on a CPU: operator) that `function` runs."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    on_gpu = device == "cuda"
    activities = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        function()
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    time_of = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    # Named regions are left out: their time on the GPU is that of the kernels inside.
    return [
        (event.key, getattr(event, time_of) / 1e3, event.count)
        for event in profiler.key_averages()
        if event.device_type == kind and not getattr(event, "is_user_annotation", False)
    ]


def serve(connection: "Connection", subject: Subject, args: "Arguments") -> None:
    """Run in a worker process: call the Runner's methods as requested, and send their results or a traceback."""
    os.environ["IRPE_ATTENTION"] = "rows" if subject.way == "rows" else "composed"
    try:
        runner = Runner(subject, args)
        runner.prepare()
        connection.send(("ready", None))
        while request := connection.recv():
            method, *arguments = request
            connection.send(("done", getattr(runner, method)(*arguments)))
    except Exception:  # The parent prints the traceback and continues without this process.
        connection.send(("failed", traceback.format_exc()))


class Worker:
    """The process that runs one subject, seen from the parent."""

    def __init__(self, subject: Subject, args: "Arguments") -> None:
        self.subject = subject
        context = multiprocessing.get_context("spawn")
        self.connection, end = context.Pipe()
        self.process = context.Process(target=serve, args=(end, subject, args), daemon=True)
        self.process.start()
        end.close()
        self.failed = False

    def answer(self) -> tuple[str, Any] | None:
        """The next answer of the process. If the process failed, print why and return None."""
        try:
            kind, value = self.connection.recv()
        except EOFError:
            kind, value = "failed", "the process ended"
        if kind == "failed":
            self.failed = True
            print(f"FAILED: {self.subject.model}, {self.subject.name}: {value}", flush=True)
            return None
        return kind, value

    def ask(self, *request: str) -> Any:
        """The result of a Runner's method, given its name and arguments; None if the process failed."""
        if self.failed:
            return None
        self.connection.send(request)
        answer = self.answer()
        return answer and answer[1]

    def end(self) -> None:
        """End the process."""
        self.process.terminate()
        self.process.join()


def start_workers(args: "Arguments") -> list[Worker]:
    """Start a worker for each subject, `TOGETHER` at a time, and wait until each is ready for timing or has failed."""
    subjects = [
        Subject(model, way, on) for model in models(args) for way, on in (TINY_WAYS[model] if args.tiny else WAYS)
    ]
    workers = []
    for first in range(0, len(subjects), TOGETHER):
        started = [Worker(subject, args) for subject in subjects[first : first + TOGETHER]]
        for worker in started:
            worker.answer()
        workers += started
    return workers


def time_workers(workers: list[Worker], args: "Arguments") -> dict[tuple[Subject, str], Measurement]:
    """Time all workers, then end them. Returns {(subject, mode): measurement} without those that failed."""
    found = {}
    for model in models(args):
        ours = [worker for worker in workers if worker.subject.model == model]
        for mode in args.modes:
            measured = [
                (worker, Measurement(*(worker.ask("kernels", mode) or ()), memory=worker.ask("memory", mode)))
                for worker in ours
            ]
            for _ in range(args.rounds):
                for worker, measurement in measured:
                    measurement.wall.append(worker.ask("wall", mode))
            found |= {(worker.subject, mode): measurement for worker, measurement in measured if not worker.failed}
        for worker in ours:
            worker.ask("forget")
            worker.end()
    return found


def report(found: dict[tuple[Subject, str], Measurement], args: "Arguments") -> Ratios:
    """Print a table for each model and mode. Returns the ratios to the plain step, by (model, mode, way, places)."""
    ratios = {}
    for model in models(args):
        for mode in args.modes:
            plain = found.get((Subject(model, "plain", ""), mode))
            if plain is None:
                continue
            print(
                f"\n{model}, batch {models(args)[model][0]}, {args.type_name}, {mode}\n"
                "                  kernels, ms  x plain  launches  wall, ms  x plain  peak MiB  x plain"
            )
            for (subject, its_mode), it in found.items():
                if subject.model != model or its_mode != mode:
                    continue
                wall = statistics.median(a / b for a, b in zip(it.wall, plain.wall, strict=True))
                ratio = {"kernels": it.kernels / plain.kernels, "wall": wall, "memory": it.memory / plain.memory}
                ratios[model, mode, subject.way, subject.on] = ratio
                print(
                    f"  {subject.name:15}{it.kernels:12.2f}{ratio['kernels']:9.2f}{it.launches:10}"
                    f"{statistics.median(it.wall):10.2f}{ratio['wall']:9.2f}{it.memory:10.0f}{ratio['memory']:9.2f}",
                    flush=True,
                )
    return ratios


def compare_with_goals(ratios: Ratios) -> None:
    """Print each goal for DeiT-S, the measured ratio, and whether it meets the goal."""
    print("\nGoals (DeiT-S; ratios to the plain step)")

    def compare(text: str, value: float, limit: float) -> None:
        print(f"  {text:66}{value:6.2f}  at most {limit:.2f}: {'met' if value <= limit else 'MISSED'}")

    for on in ("k", "qkv"):
        rows, composed = (ratios.get(("DeiT-S", "eager", way, on)) for way in ("rows", "composed"))
        compiled = ratios.get(("DeiT-S", "compiled", "rows", on))
        if rows is None:
            print(f"  rows on {on} was not measured")
            continue
        compare(f"rows on {on}, kernels", rows["kernels"], GOALS[on, "kernels"])
        compare(f"rows on {on}, peak memory", rows["memory"], GOALS[on, "memory"])
        if composed:
            compare(f"rows on {on}, eager wall time; the limit is composed's", rows["wall"], composed["wall"])
        if compiled:
            compare(
                f"rows on {on}, compiled wall time; the limit is the kernels' ratio",
                compiled["wall"],
                compiled["kernels"] + SLACK,
            )


# --- Tilings ---------------------------------------------------------------------------------------------------------


def variations(tile: "Tile", fixed_other: bool) -> list["Tile"]:
    """The tile, followed by the tiles that differ from it in one field; `fixed_other` keeps the field `other`."""
    others = {
        "own": (32, 64, 128),
        "other": () if fixed_other else (16, 32, 64, 128),
        "num_warps": (2, 4, 8),
        "num_stages": (1, 2, 3),
    }
    return [tile] + [
        tile._replace(**{name: value})
        for name, values in others.items()
        for value in values
        if value != getattr(tile, name)
    ]


def candidates(args: "Arguments") -> list[tuple[str, str, "Tile"]]:
    """The tilings to time, as (places, kernel, tile), for DeiT-S."""
    from rpe_ops import rows

    chosen, unused = [], {"k": ("forward, sums", "queries", "keys, sums"), "qkv": ("forward", "queries", "keys")}
    for on in unused:
        for kernel, tile in rows.HALF_64_TILES.items():
            if kernel in unused[on]:
                continue
            tile = rows.TILES[kernel, args.width(), 64] if (kernel, args.width(), 64) in rows.TILES else tile
            chosen += [(on, kernel, candidate) for candidate in variations(tile, "sums" in kernel)]
    return chosen[:2] if args.tiny else chosen


def one_attention(on: str, args: "Arguments") -> Callable[[], None]:
    """A function that runs one attention of DeiT-S by rows, forward and backward, with terms on the places `on`."""
    if str(ROOT / "DeiT-with-iRPE") not in sys.path:
        sys.path.insert(0, str(ROOT / "DeiT-with-iRPE"))
    import rpe_ops
    import torch

    from irpe import build_rpe, get_rpe_config, rpe_attention

    assert rpe_ops.ATTENTION == "rows"  # IRPE_ATTENTION has to be set before the first import.
    batch, heads, side, channels = (1, 1, 1, 16) if args.tiny else (128, 6, 14, 64)
    modules = [rpe and rpe.to(args.device) for rpe in build_rpe(get_rpe_config(skip=1, rpe_on=on), channels, heads)]
    length = side * side + 1
    x = torch.randn(batch, length, 3, heads, channels, device=args.device, dtype=args.dtype(), requires_grad=True)
    grad = torch.randn(batch, heads, length, channels, device=args.device, dtype=args.dtype())

    def run() -> None:
        x.grad = None
        with torch.autocast(args.device, args.dtype()):
            rpe_attention(*x.permute(2, 0, 3, 1, 4), *modules).backward(grad)
        if args.device == "cuda":
            torch.cuda.synchronize()

    return run


def with_tile(run: Callable[[], Any], kernel: str, tile: "Tile", args: "Arguments") -> str | None:
    """Call `run` while `kernel` uses this tile. Returns None, or the error if the tile does not work."""
    from rpe_ops import rows

    key = kernel, args.width(), 64
    before = rows.TILES[key]
    rows.TILES[key] = tile
    try:
        return run() and None
    except Exception as error:  # A tile may need too much shared memory or break the compiler. The table shows that.
        return f"{type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"
    finally:
        rows.TILES[key] = before


def compile_tiling(candidate: tuple[str, str, "Tile"], args: "Arguments") -> str | None:
    """Run a candidate once, so that Triton's cache on disk contains it. Returns the error, if any."""
    on, kernel, tile = candidate
    return with_tile(one_attention(on, args), kernel, tile, args)


def profile_attention(run: Callable[[], None], args: "Arguments") -> list[tuple[str, float]]:
    """(name, microseconds) of each kernel of an attention, the mean over five runs."""
    times = 1 if args.tiny else 5

    def several() -> None:
        for _ in range(times):
            run()

    return [(name, 1e3 * time / times) for name, time, _ in profile(several, args.device)]


def time_kernels(args: "Arguments") -> None:
    """Print the time of each kernel of an attention."""
    for on in ("k",) if args.tiny else ("k", "qkv"):
        run = one_attention(on, args)
        run()
        found = profile_attention(run, args)
        total = sum(time for _, time in found)
        print(f"\nOne attention of DeiT-S by rows on {on}, forward and backward: {total:.0f} microseconds")
        for name, spent in sorted(found, key=lambda pair: -pair[1])[:12]:
            print(f"  {spent:8.1f}  {name[:100]}", flush=True)


def time_tilings(tilings: list[tuple[str, str, "Tile"]], args: "Arguments") -> None:
    """Print the time of a kernel with each of its candidate tiles."""
    print(
        "\nTilings: kernel time in one attention of DeiT-S, in microseconds; each differs from the first in one field"
    )
    runs = {on: one_attention(on, args) for on in dict.fromkeys(on for on, *_ in tilings)}
    for on, kernel, tile in tilings:
        name = (
            f"  {on:4}{kernel:15}own {tile.own:3} other {tile.other:3} warps {tile.num_warps} stages {tile.num_stages}"
        )
        if problem := with_tile(runs[on], kernel, tile, args):
            print(f"{name}  {problem}", flush=True)
            continue
        found = []
        with_tile(lambda: found.extend(profile_attention(runs[on], args)), kernel, tile, args)  # noqa: B023
        function = f"{kernel.split(',')[0]}_kernel"
        print(f"{name}{sum(time for name, time in found if function in name):10.1f}", flush=True)


@contextlib.contextmanager
def compiling_beside(tilings: list[tuple[str, str, "Tile"]], args: "Arguments") -> Iterator[None]:
    """Compile all candidates in parallel processes while the body of the `with` statement runs."""
    if args.tiny or not tilings:
        yield
        return
    with multiprocessing.get_context("spawn").Pool(max(2, (os.cpu_count() or 2) // 3)) as pool:
        compiled = pool.starmap_async(compile_tiling, [(candidate, args) for candidate in tilings], chunksize=1)
        yield
        compiled.get()


# --- The program -----------------------------------------------------------------------------------------------------


class Arguments(argparse.Namespace):
    """The command line, which the workers receive too."""

    def dtype(self) -> "torch.dtype":
        """The type of autocast."""
        import torch

        return getattr(torch, self.type_name)

    def width(self) -> str:
        """The name of this type in `rows.TILES`: half or float32."""
        return "half" if self.type_name != "float32" else "float32"


def models(args: Arguments) -> dict[str, tuple]:
    """The models to time, in the form of `MODELS`."""
    return TINY_MODELS if args.tiny else {name: MODELS[name] for name in args.models}


def header(args: Arguments) -> str:
    """One line with the date, machine, versions and commit."""
    import torch
    import triton
    from machine import machine

    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    commit = os.environ.get("COMMIT") or git.stdout.strip() or "unknown"
    return (
        f"{datetime.date.today()}, {machine(args.device)}, PyTorch {torch.__version__}, Triton "
        f"{triton.__version__}, commit {commit}, {args.rounds} rounds"
    )


def wait_for(path: str | None, seconds: float = 600) -> None:
    """Wait until a file exists, which another program creates when it no longer uses the GPU. None does not wait.

    Ends the program with a message if the file does not appear in time.
    """
    started = time.monotonic()
    while path and not Path(path).exists():
        if time.monotonic() - started > seconds:
            raise SystemExit(f"error: {path} did not appear within {seconds} seconds")
        time.sleep(0.2)


def main(args: Arguments) -> None:
    """Run all measurements, print them, and exit with status 1 if a worker failed."""
    print(header(args), flush=True)
    tilings = [] if args.steps_only else candidates(args)
    with compiling_beside(tilings, args):
        workers = [] if args.tilings_only else start_workers(args)
    wait_for(args.after)
    ratios = report(time_workers(workers, args), args)
    if tilings:
        time_kernels(args)
        time_tilings(tilings, args)
    if ratios:
        compare_with_goals(ratios)
    sys.exit(any(worker.failed for worker in workers))


def get_args_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="use small shapes and no compiler, to try the script")
    parser.add_argument(
        "--models",
        nargs="+",
        choices=MODELS,
        default=list(MODELS),
        metavar="NAME",
        help=f"models to time (choices: {', '.join(MODELS)})",
    )
    parser.add_argument(
        "--modes", nargs="+", choices=MODES, default=list(MODES), metavar="MODE", help="eager, compiled (default: both)"
    )
    parser.add_argument("--rounds", type=int, default=6, help="rounds of wall times (default: 6)")
    parser.add_argument("--type", dest="type_name", choices=["float16", "bfloat16"], default="float16")
    parser.add_argument("--backend", default="inductor", help="backend of torch.compile (default: inductor)")
    parser.add_argument("--steps-only", action="store_true", help="time only the training steps")
    parser.add_argument("--tilings-only", action="store_true", help="time only the kernels and their tilings")
    parser.add_argument("--after", metavar="FILE", help="compile, then wait for this file before timing")
    return parser


if __name__ == "__main__":
    args = get_args_parser().parse_args(namespace=Arguments())
    os.environ["IRPE_ATTENTION"] = "rows"
    if args.tiny:
        args.rounds, args.backend = 1, "eager"
        os.environ["TRITON_INTERPRET"] = "1" if args.device == "cpu" else "0"
        if args.device == "cpu":
            args.type_name = "bfloat16"
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: --device cuda needs a GPU, but PyTorch finds none; use --device cpu --tiny to try it")
    main(args)
