"""Attention and training steps on a GPU: composed and fused against the plain ones, `python benchmarks/gpu.py`.

Times are medians over the rounds, in random order within each, and peak memory is that of a forward and backward pass.
Under torchrun every process takes a GPU, and the gradients of the steps are averaged with NCCL.
"""
import argparse
import os
import random
import statistics
import sys
from pathlib import Path

os.environ["IRPE_ATTENTION"] = "fused"  # which loads the kernels; a measurement of the composed path says so itself
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "DeiT-with-iRPE"))
import timm
import torch
import torch.nn.functional as F
from machine import machine
from rpe_ops import blockwise

from irpe import build_rpe, get_rpe_config, rpe_attention
from rpe_vision_transformer import equip_irpe

# pictures, heads, map, prefix tokens, channels of a head
SHAPES = {"DeiT-S": (128, 6, (14, 14), 1, 64), "DeiT-S, 384": (32, 6, (24, 24), 1, 64),
          "DETR": (2, 8, (25, 34), 0, 32), "DETR, large": (2, 8, (35, 40), 0, 32)}


def chosen(way, function):
    """`function` with `way`, composed or fused, for iRPE's attention."""
    def run():
        blockwise.ATTENTION = way
        return function()
    return run


def attention(shape, dtype):
    """{name: forward and backward pass of one attention}"""
    batch, heads, (height, width), skip, channels = shape
    length = height * width + skip
    x = torch.randn(batch, length, 3, heads, channels, device="cuda", dtype=dtype, requires_grad=True)
    grad = torch.randn(batch, heads, length, channels, device="cuda", dtype=dtype)

    def run(function):
        def step():
            x.grad = None  # to add to one that is there would be a pass more
            function(*x.permute(2, 0, 3, 1, 4)).backward(grad)
        return step

    passes = {"plain": run(F.scaled_dot_product_attention)}
    for on in ("k", "qkv"):
        modules = [rpe and rpe.to("cuda", dtype) for rpe in
                   build_rpe(get_rpe_config(skip=skip, rpe_on=on), channels, heads)]
        function = run(lambda q, k, v, m=modules: rpe_attention(q, k, v, *m, height=height, width=width))
        passes |= {f"{way} {on}": chosen(way, function) for way in ("composed", "fused")}
    return passes


def steps(dtype, batch):
    """{name: training step of DeiT-S under autocast}, averaged over the processes if there are several."""
    pictures, targets = torch.randn(batch, 3, 224, 224, device="cuda"), torch.arange(batch, device="cuda")

    def run(on):
        model = timm.create_model("deit_small_patch16_224")
        model = equip_irpe(model, on and get_rpe_config(rpe_on=on)).cuda()
        if torch.distributed.is_initialized():
            model = torch.nn.parallel.DistributedDataParallel(model, [torch.cuda.current_device()])
        optimizer = torch.optim.AdamW(model.parameters())

        def step():
            with torch.autocast("cuda", dtype):
                loss = F.cross_entropy(model(pictures), targets)
            optimizer.zero_grad()
            loss.backward()  # without a scale for float16: only the time counts here
            optimizer.step()
        return step

    passes = {"plain": run(None)}
    for on in ("k", "qkv"):
        function = run(on)
        passes |= {f"{way} {on}": chosen(way, function) for way in ("composed", "fused")}
    return passes


def measure(title, passes, rounds):
    """Print times, and ratios to the plain pass of the same round, with the peak of memory."""
    seconds, memory, order = {name: [] for name in passes}, {}, random.Random(0)
    for name, function in passes.items():
        function()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        memory[name] = torch.cuda.max_memory_allocated() - before
    for _ in range(rounds):
        for name in order.sample(list(passes), len(passes)):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            passes[name]()
            end.record()
            end.synchronize()
            seconds[name].append(start.elapsed_time(end))
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"\n{title}")
        for name, times in seconds.items():
            ratio = statistics.median(a / b for a, b in zip(times, seconds["plain"], strict=True))
            print(f"  {name:14}{statistics.median(times):9.3f} ms{ratio:7.2f} x plain{memory[name] / 2 ** 20:9.0f} MiB")


def main(args):
    if "RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl")
    print(f"{machine('cuda')}, PyTorch {torch.__version__}, {args.rounds} rounds")
    for dtype in (torch.float16, torch.bfloat16):
        name = str(dtype)[6:]
        for shape in () if args.steps_only else SHAPES:
            measure(f"{shape}, attention, {name}", attention(SHAPES[shape], dtype), args.rounds)
        measure(f"DeiT-S, training step of {args.batch_size}, {name}", steps(dtype, args.batch_size), args.rounds)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--steps-only", action="store_true")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this needs a GPU, and PyTorch finds none")
    main(args)
