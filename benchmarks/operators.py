"""Compare the operators of rpe_ops with PyTorch's own and with a copy: `python benchmarks/operators.py`.

For the shapes of DeiT-S (batch 8, 224x224) and DETR (batch 2, a 25x34 map) it times, forward and backward:

    rpe_ops      rpe_index and, for the backward pass, rpe_bucket_sum
    gather       torch.gather with a broadcast index, and scatter_add
    flatten      the last two dimensions flattened and indexed once, and index_add
    copy_        a copy of the logits, whose time the memory bandwidth limits

Each round runs all of them in random order. Times are medians over the rounds; ratios are medians of the ratios within
a round.
"""

import argparse
import ctypes
import math
import random
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date

import torch
from machine import machine
from rpe_ops import reference
from rpe_ops.rpe_index import rpe_bucket_sum, rpe_index
from torch import Tensor

GOALS = {"cpu": {"forward": 2.0, "backward": 2.0}, "cuda": {"forward": 1.2, "backward": 1.5}}  # in times of a copy
FASTER = 1.5  # On the CPU: how many times faster than the faster of PyTorch's two ways.
SHAPES = [("DeiT", 8, 6, (14, 14), 1, 1.9), ("DETR", 2, 8, (25, 34), 0, 2.0)]  # batch, heads, map, skip, ratio
CALLS = 20  # On a GPU: calls per measurement.


def product_ids(height: int, width: int, skip: int, ratio: float) -> tuple[Tensor, int]:
    """Bucket ids of the product method (Wu et al., ICCV 2021), and the number of buckets.

    The ids are an (L, L) tensor of int64, L = height·width + skip. If there are `skip` tokens in front of the map, the
    last bucket belongs to them.
    """
    alpha, beta, gamma = ratio, 2 * ratio, 8 * ratio

    def piecewise(x: Tensor) -> Tensor:
        far = alpha + torch.log(x.abs().clamp(min=1) / alpha) / math.log(gamma / alpha) * (beta - alpha)
        return torch.where(x.abs() <= alpha, x, x.sign() * far.round().clamp(max=beta)).long() + int(beta)

    rows, cols = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
    side = 2 * int(beta) + 1
    ids = torch.full((height * width + skip,) * 2, side * side)
    ids[skip:, skip:] = piecewise((rows[:, None] - rows).float()) * side + piecewise((cols[:, None] - cols).float())
    return ids, side * side + (skip > 0)


def contestants(
    batch: int, heads: int, ids: Tensor, buckets: int, device: str, dtype: torch.dtype
) -> dict[str, dict[str, Callable[[], Tensor]]]:
    """The functions to time, as {direction: {name: function}}; `ids` are (L, L).

    Each function returns a new tensor, except copy_, which overwrites one.

    Raises: AssertionError if a function's result is wrong.
    """
    length = len(ids)
    x = torch.randn(batch, heads, length, buckets, device=device).to(dtype)
    p, other = torch.randn(2, batch, heads, length, length, device=device).to(dtype)
    index, ids = ids.int().to(device), ids.to(device)
    broadcast = ids.expand(batch, heads, length, length)
    flat = (ids + buckets * torch.arange(length, device=device)[:, None]).flatten()
    functions = {
        "forward": {
            "rpe_ops": lambda: rpe_index(x, index),
            "gather": lambda: torch.gather(x, 3, broadcast),
            "flatten": lambda: x.flatten(2)[:, :, flat].view_as(p),
        },
        "backward": {
            "rpe_ops": lambda: rpe_bucket_sum(p, index, buckets),
            "gather": lambda: torch.zeros_like(x).scatter_add_(3, broadcast, p),
            "flatten": lambda: torch.zeros_like(x).flatten(2).index_add_(2, flat, p.flatten(2)).view_as(x),
        },
    }
    for name in functions["forward"]:
        check(name, functions["forward"][name](), reference.rpe_index(x, ids), 0.0)
        # rpe_ops sums half types in float32, PyTorch's own operators in the half type.
        accumulator = torch.promote_types(dtype, torch.float32) if name == "rpe_ops" else dtype
        check(
            name,
            functions["backward"][name](),
            reference.rpe_bucket_sum(p.double(), ids, buckets),
            adding_error(p, ids, buckets, accumulator),
        )
    for direction in functions.values():
        direction["copy_"] = lambda: other.copy_(p)
    return functions


def check(name: str, result: Tensor, expected: Tensor, error: Tensor | float) -> None:
    """Raise AssertionError if an element of `result` differs from `expected` by more than `error`."""
    distance = (result.double() - expected.double()).abs()
    assert (distance <= error).all(), f"{name} is off by up to {distance.max():.3g}"


def adding_error(p: Tensor, ids: Tensor, buckets: int, accumulator: torch.dtype) -> Tensor:
    """Bound on the rounding error of bucket sums of `p` (B, H, L, L) that are accumulated in the type `accumulator`.

    The result, (B, H, L, buckets) in float64, includes the rounding of the sums to the type of `p`.
    """
    relative = torch.finfo(p.dtype).eps / 2 + len(ids) * torch.finfo(accumulator).eps
    return relative * reference.rpe_bucket_sum(p.double().abs(), ids, buckets)


def cpu_timer(function: Callable[[], object]) -> Callable[[], float]:
    """A function that calls `function` once and returns its time in seconds."""

    def run() -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    return run


def cuda_timer(function: Callable[[], object]) -> Callable[[], float]:
    """A function that returns the time of one call in seconds.

    It replays a CUDA graph of CALLS calls, so that the time of launches does not count.
    """
    function()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            function()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def run() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / CALLS

    return run


def measure(functions: dict[str, Callable[[], object]], device: str, rounds: int) -> dict[str, list[float]]:
    """The seconds of each function in each round, by name.

    The order is random in each round, so that no function always finds the cache as the same other function left it.
    """
    timers = {name: (cuda_timer if device == "cuda" else cpu_timer)(f) for name, f in functions.items()}
    for timer in timers.values():
        timer()
    seconds = {name: [] for name in timers}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(timers), len(timers)):
            seconds[name].append(timers[name]())
    return seconds


def ratio(numerator: list[float], denominator: list[float]) -> float:
    """The median of the ratios within a round."""
    return statistics.median(n / d for n, d in zip(numerator, denominator, strict=True))


def report(shape: str, direction: str, seconds: dict[str, list[float]], device: str) -> None:
    """Print one line per function, and whether rpe_ops meets the goals."""
    print(f"\n{shape}, {direction}")
    for name, times in seconds.items():
        print(f"  {name:8}{statistics.median(times) * 1e3:9.3f} ms{ratio(times, seconds['copy_']):8.2f} copies")
    copies = ratio(seconds["rpe_ops"], seconds["copy_"])
    speedup = min(ratio(seconds[way], seconds["rpe_ops"]) for way in ("gather", "flatten"))
    goal = GOALS[device][direction]
    print(
        f"  rpe_ops: {copies:.2f} copies (goal: at most {goal}: {'met' if copies <= goal else 'MISSED'}), "
        f"{speedup:.2f} times faster than PyTorch's faster way"
        + (f" (goal: at least {FASTER}: {'met' if speedup >= FASTER else 'MISSED'})" if device == "cpu" else "")
    )


def keep_memory() -> None:
    """Make glibc keep freed memory, as PyTorch's CUDA allocator does.

    Otherwise the times would be those of new memory pages, not of the operators.
    """
    if sys.platform == "linux":
        mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD in malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 2**30)
        libc.mallopt(trim_threshold, 2**31 - 1)


def get_args_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=100, help="rounds of each comparison (default: 100)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads on the CPU")
    return parser


def main(args: argparse.Namespace) -> None:
    """Time all shapes, types and directions, and print the results."""
    keep_memory()
    torch.set_num_threads(args.threads)
    dtypes = [torch.float32] if args.device == "cpu" else [torch.float32, torch.float16, torch.bfloat16]
    print(
        f"{date.today()}, {machine(args.device)}, {args.threads} threads, PyTorch {torch.__version__}, "
        f"{args.rounds} rounds"
    )
    for name, batch, heads, (height, width), skip, alpha in SHAPES:
        ids, buckets = product_ids(height, width, skip, alpha)
        for dtype in dtypes:
            shape = f"{name} ({batch}, {heads}, {len(ids)}, {len(ids)}; {buckets} buckets), {str(dtype)[6:]}"
            for direction, functions in contestants(batch, heads, ids, buckets, args.device, dtype).items():
                report(shape, direction, measure(functions, args.device, args.rounds), args.device)


if __name__ == "__main__":
    parser = get_args_parser()
    args = parser.parse_args()
    if min(args.rounds, args.threads) < 1:
        parser.error("--rounds and --threads must be at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU, but PyTorch finds none; use --device cpu")
    main(args)
