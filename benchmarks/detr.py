"""Compare DETR's encoder attention with iRPE with nn.MultiheadAttention, and its training step with plain DETR's.

    python benchmarks/detr.py [--device cuda] [--rounds 21] [--model-rounds 5] [--amp-dtype bfloat16]

Attention: one layer with 8 heads and 256 channels on 25×34 tokens (an image of 800×1088 pixels), batch 2; a quarter of
the second image is padding. nn.MultiheadAttention gets the same mask and returns no weights. Step: DETR-R50 at this
size, with matching, losses and AdamW. Every round runs each variant once, so that a change of the machine's speed
affects all of them. The script prints median times, and the medians of the ratios within a round.
"""

import argparse
import datetime
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from machine import machine
from torch import Tensor, nn

sys.path.insert(1, str(Path(__file__).resolve().parent.parent / "DETR-with-iRPE"))
import main as detr_main
from engine import named_losses
from models import build_model, parse_enc_rpe2d
from models.rpe_attention import RPEMultiheadAttention, irpe
from util.misc import nested_tensor_from_tensor_list

HEIGHT, WIDTH, BATCH = 25, 34, 2
ENCODINGS = {where: f"rpe-2.0-product-ctx-1-{where}" for where in ("k", "qk", "qkv")}


def attention_variants(args: argparse.Namespace) -> dict[str, Callable[[bool], None]]:
    """{name: function} of the attentions. A function runs once: forward, and also backward if its argument is true."""

    def variant(module: nn.Module, call: Callable[[nn.Module], Tensor]) -> Callable[[bool], None]:
        module.to(args.device)

        def run(train: bool) -> None:
            module.train(train)
            with torch.set_grad_enabled(train), autocast(args):
                out = call(module)
            if train:
                module.zero_grad()
                out.backward(grad)

        return run

    generator = torch.Generator().manual_seed(0)
    length = HEIGHT * WIDTH
    x, pos, grad = (torch.randn(BATCH, length, 256, generator=generator).to(args.device) for _ in range(3))
    query, value = (x + pos).requires_grad_(), x.requires_grad_()
    padding = torch.zeros(BATCH, HEIGHT, WIDTH, dtype=torch.bool, device=args.device)
    padding[1, :, WIDTH - WIDTH // 4 :] = True
    padding = padding.flatten(1)
    # DETR computes this additive mask once for all layers.
    added = torch.zeros(BATCH, length, device=args.device).masked_fill_(padding, -torch.inf)
    variants = {
        "nn.MultiheadAttention": variant(
            nn.MultiheadAttention(256, 8, batch_first=True),
            lambda module: module(query, query, value, key_padding_mask=padding, need_weights=False)[0],
        )
    }
    for where, text in ENCODINGS.items():
        module = RPEMultiheadAttention(256, 8, batch_first=True, rpe_config=parse_enc_rpe2d(text))
        for table in (p for name, p in module.named_parameters() if "lookup_table" in name):
            nn.init.xavier_uniform_(table)
        variants[f"iRPE on {where}"] = variant(
            module, lambda module: module(query, query, value, added, need_weights=False, hw=(HEIGHT, WIDTH))[0]
        )
    return variants


def step_variants(args: argparse.Namespace) -> dict[str, Callable[[bool], None]]:
    """{name: function} of the models. A function runs one training step of DETR-R50 and ignores its argument."""

    def variant(text: str) -> Callable[[bool], None]:
        # With --resume, DETR does not download pretrained weights.
        flags = ["--enc_rpe2d", text, "--device", args.device, "--resume", "x"]
        model_args = detr_main.get_args_parser().parse_args(flags)
        torch.manual_seed(0)
        model, criterion, _ = build_model(model_args)
        model.to(args.device).train()
        criterion.to(args.device).train()
        optimizer = detr_main.build_optimizer(model, model_args)

        def run(train: bool) -> None:
            with autocast(args):
                outputs = model(samples)
            loss = named_losses(criterion, criterion(outputs, targets))["loss"]
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), model_args.clip_max_norm)
            optimizer.step()

        return run

    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(3, 32 * HEIGHT, 32 * width, generator=generator) for width in (WIDTH, WIDTH - WIDTH // 4)]
    samples = nested_tensor_from_tensor_list(images).to(args.device)
    targets = [
        {
            "labels": torch.randint(1, 91, (7,), generator=generator).to(args.device),
            "boxes": (torch.rand(7, 4, generator=generator) * 0.3 + 0.3).to(args.device),
        }
        for _ in images
    ]
    return {"DETR-R50": variant(""), **{f"iRPE on {where}": variant(ENCODINGS[where]) for where in ("k", "qkv")}}


def autocast(args: argparse.Namespace) -> torch.autocast:
    """The context for `--amp-dtype`; float32 turns autocast off."""
    enabled = args.amp_dtype != "float32"
    return torch.autocast(args.device, dtype=getattr(torch, args.amp_dtype) if enabled else None, enabled=enabled)


def measure(
    variants: dict[str, Callable[[bool], None]], train: bool, rounds: int, args: argparse.Namespace, warm_up: int = 3
) -> None:
    """Print each variant's median time and its median ratio to the first variant in the same round.

    The first `warm_up` rounds do not count.
    """
    times = {name: [] for name in variants}
    for number in range(rounds + warm_up):
        for name, run in variants.items():
            start = time.perf_counter()
            run(train)
            if args.device == "cuda":
                torch.cuda.synchronize()
            if number >= warm_up:
                times[name].append(time.perf_counter() - start)
    peer = next(iter(times.values()))
    for name, own in times.items():
        ratio = statistics.median(a / b for a, b in zip(own, peer, strict=True))
        print(f"  {name:24}{statistics.median(own) * 1e3:10.2f} ms  ×{ratio:5.2f}", flush=True)


def main() -> None:
    """Time the attentions and the training steps, and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=21, help="rounds of the attention (default: 21)")
    parser.add_argument(
        "--model-rounds", type=int, default=5, help="rounds of the training step; 0 skips it (default: 5)"
    )
    parser.add_argument(
        "--amp-dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="type of autocast"
    )
    args = parser.parse_args()
    print(
        f"{datetime.date.today()}  {machine(args.device)}\ntorch {torch.__version__}, {torch.get_num_threads()} "
        f"threads, {args.amp_dtype}, rpe_ops {'in use' if getattr(irpe, 'HAS_RPE_OPS', False) else 'absent'}"
    )
    attention = attention_variants(args)
    for name, train in (("inference", False), ("training", True)):
        print(f"\none encoder attention, {HEIGHT}×{WIDTH} tokens, batch {BATCH}, {name}, {args.rounds} rounds")
        measure(attention, train, args.rounds, args)
    if args.model_rounds:
        print(f"\nwhole training step at {32 * HEIGHT}×{32 * WIDTH} pixels, batch {BATCH}, {args.model_rounds} rounds")
        measure(step_variants(args), True, args.model_rounds, args, warm_up=1)


if __name__ == "__main__":
    main()
