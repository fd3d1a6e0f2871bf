"""Compare the time and memory of DeiT-S with iRPE with those of timm's DeiT-S.

    python benchmarks/deit.py [--device cuda] [--batch-size 16] [--rounds 15] [--amp-dtype bfloat16]

Every round runs each model once, so that a change of the machine's speed affects all of them. The script prints median
times, and the medians of the ratios within a round. Memory is the peak of a process that runs two training steps; on a
GPU it is the peak of CUDA's allocator.
"""

import argparse
import datetime
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import timm
import torch
from machine import machine
from torch import Tensor, nn

sys.path.insert(1, str(Path(__file__).resolve().parent.parent / "DeiT-with-iRPE"))
import irpe
import rpe_models

PEER = "deit_small_patch16_224"
MODELS = [f"{PEER}_ctx_product_50_shared_{where}" for where in ("k", "qk", "qkv")]


def build(name: str, args: argparse.Namespace) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model and its optimizer. The peer comes from timm, with the same drop path."""
    torch.manual_seed(0)
    make = timm.create_model if name == PEER else rpe_models.create_model
    model = make(name, drop_path_rate=0.1).to(args.device)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4)


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, train: bool, args: argparse.Namespace
) -> float:
    """Time of one training step or one inference in seconds, until the device has finished.

    x: images (B, 3, 224, 224). y: labels (B,).
    """
    model.train(train)
    autocast = torch.autocast(args.device, dtype=getattr(torch, args.amp_dtype), enabled=args.amp_dtype != "float32")
    start = time.perf_counter()
    if train:
        with autocast:
            loss = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    else:
        with torch.inference_mode(), autocast:
            model(x)
    if args.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def batch(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Random images (B, 3, 224, 224) and labels (B,)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(args.batch_size, 3, 224, 224, generator=generator).to(args.device)
    return x, torch.randint(1000, (args.batch_size,), generator=generator).to(args.device)


def ratios(train: bool, args: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """For each model, the median time in seconds and the median ratio to the peer's time in the same round."""
    data = batch(args)
    built = {name: build(name, args) for name in (PEER, *MODELS)}
    times = {name: [] for name in built}
    for round_ in range(args.rounds + 2):
        for name, (model, optimizer) in built.items():
            seconds = step(model, optimizer, *data, train, args)
            if round_ >= 2:  # The first two rounds warm up.
                times[name].append(seconds)
    return {
        name: (statistics.median(own), statistics.median(a / b for a, b in zip(own, times[PEER], strict=True)))
        for name, own in times.items()
    }


def peak_memory(name: str, args: argparse.Namespace) -> float:
    """Peak memory of two training steps in MiB, measured in a separate process."""
    command = [
        sys.executable,
        __file__,
        "--memory-of",
        name,
        "--device",
        args.device,
        "--batch-size",
        str(args.batch_size),
        "--amp-dtype",
        args.amp_dtype,
    ]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_own_peak(args: argparse.Namespace) -> None:
    """Run two training steps and print the peak memory of this process in MiB."""
    model, optimizer = build(args.memory_of, args)
    data = batch(args)
    for _ in range(2):
        step(model, optimizer, *data, True, args)
    on_gpu = args.device == "cuda"
    print(
        torch.cuda.max_memory_allocated() / 2**20
        if on_gpu
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    )


def main() -> None:
    """Measure all models and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch-size", type=int, default=16, help="images per step (default: 16)")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each comparison (default: 15)")
    parser.add_argument(
        "--amp-dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="type of autocast"
    )
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        return print_own_peak(args)
    print(
        f"{datetime.date.today()}  {machine(args.device)}\ntorch {torch.__version__}, timm {timm.__version__}, "
        f"{torch.get_num_threads()} threads, batch {args.batch_size}, {args.amp_dtype}, {args.rounds} rounds, "
        f"rpe_ops {'in use' if getattr(irpe, 'HAS_RPE_OPS', False) else 'absent'}\n"
    )
    # Memory comes first, because a child's peak includes what its parent used when it was forked.
    memory = {name: peak_memory(name, args) for name in (PEER, *MODELS)}
    inference, training = ratios(False, args), ratios(True, args)
    print(f"{'':50}{'inference':>16}{'training':>18}{'peak memory':>20}")
    for name in (PEER, *MODELS):
        columns = (
            f"{inference[name][0] * 1e3:8.0f} ms ×{inference[name][1]:5.2f}",
            f"{training[name][0] * 1e3:8.0f} ms ×{training[name][1]:5.2f}",
            f"{memory[name]:8.0f} MiB ×{memory[name] / memory[PEER]:5.2f}",
        )
        print(f"{name:50}{''.join(f'{column:>19}' for column in columns)}")


if __name__ == "__main__":
    main()
