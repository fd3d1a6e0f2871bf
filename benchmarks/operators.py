"""rpe_ops against PyTorch's own ways and against one pass over memory: `python benchmarks/operators.py`.

For the shapes of DeiT-S (batch 8, 224x224) and DETR (batch 2, a 25x34 map), forward and backward of

    rpe_ops      rpe_index, and rpe_bucket_sum as its backward
    gather       torch.gather with a broadcast index, and scatter_add
    flatten      the last two dimensions flattened and indexed once, and index_add
    copy_        one pass over the logits, the limit of memory

in random order within every round of one run. Times are medians over the rounds, ratios medians of the ratios within
a round.
"""

import argparse
import ctypes
import math
import random
import statistics
import sys
import time
from datetime import date

import torch
from machine import machine
from rpe_ops import reference
from rpe_ops.rpe_index import rpe_bucket_sum, rpe_index

GOALS = {"cpu": {"forward": 2.0, "backward": 2.0}, "cuda": {"forward": 1.2, "backward": 1.5}}  # in copies
FASTER = 1.5  # than the faster of PyTorch's two ways, on the CPU
SHAPES = [("DeiT", 8, 6, (14, 14), 1, 1.9), ("DETR", 2, 8, (25, 34), 0, 2.0)]  # batch, heads, map, skip, ratio
CALLS = 20  # on a GPU, calls per measurement


def product_ids(height, width, skip, ratio):
    """The ids of the product method with their number, as in spec order: (L, L) int64, L = height·width + skip."""
    alpha, beta, gamma = ratio, 2 * ratio, 8 * ratio

    def piecewise(x):
        far = alpha + torch.log(x.abs().clamp(min=1) / alpha) / math.log(gamma / alpha) * (beta - alpha)
        return torch.where(x.abs() <= alpha, x, x.sign() * far.round().clamp(max=beta)).long() + int(beta)

    rows, cols = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
    side = 2 * int(beta) + 1
    ids = torch.full((height * width + skip,) * 2, side * side)
    ids[skip:, skip:] = piecewise((rows[:, None] - rows).float()) * side + piecewise((cols[:, None] - cols).float())
    return ids, side * side + (skip > 0)


def contestants(batch, heads, ids, buckets, device, dtype):
    """{direction: {name: function}}; every function returns a new tensor except copy_, which fills one."""
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
        # PyTorch's own ways add half types in those, rpe_ops in float32
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


def check(name, result, expected, error):
    """Raise AssertionError where a contestant's result is further than `error` from what is expected."""
    distance = (result.double() - expected.double()).abs()
    assert (distance <= error).all(), f"{name} is off by up to {distance.max():.3g}"


def adding_error(p, ids, buckets, accumulator):
    """Bound on the rounding of a sum per bucket that is added in `accumulator` and then rounded to the type of `p`."""
    relative = torch.finfo(p.dtype).eps / 2 + len(ids) * torch.finfo(accumulator).eps
    return relative * reference.rpe_bucket_sum(p.double().abs(), ids, buckets)


def cpu_timer(function):
    """A function that runs `function` once and returns the seconds it took."""

    def run():
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    return run


def cuda_timer(function):
    """A function that replays a graph of CALLS calls, so that launches cost nothing; it returns seconds per call."""
    function()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            function()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def run():
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / CALLS

    return run


def measure(functions, device, rounds):
    """{name: [seconds per round]}, all functions in every round, in random order: each finds the others' caches."""
    timers = {name: (cuda_timer if device == "cuda" else cpu_timer)(f) for name, f in functions.items()}
    for timer in timers.values():
        timer()
    seconds = {name: [] for name in timers}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(timers), len(timers)):
            seconds[name].append(timers[name]())
    return seconds


def ratio(numerator, denominator):
    return statistics.median(n / d for n, d in zip(numerator, denominator, strict=True))


def report(shape, direction, seconds, device):
    """Print one line per contestant, then how rpe_ops stands against the goals."""
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


def keep_memory():
    """Have glibc keep freed memory, as PyTorch's CUDA allocator does: else new pages, not the operators, are timed."""
    if sys.platform == "linux":
        mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 2**30)
        libc.mallopt(trim_threshold, 2**31 - 1)


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser


def main(args):
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
        parser.error("--device cuda needs a GPU and PyTorch finds none: say --device cpu")
    main(args)
