"""List and describe the models that can be created by name.

python model_cards.py --list [PATTERN]
python model_cards.py --describe NAME
"""

import argparse
import fnmatch
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import models
import rpe_models
from irpe import RPEConfig
from runtime import ArgumentParser, UserError, run

NAMES = (*rpe_models.RELEASED, *rpe_models.UNRELEASED, *models.__all__)
NUMBERS = Path(__file__).resolve().parent.parent / "tools" / "released.json"
METHODS = {"euc": "Euclidean", "quant": "quantization", "cross": "cross", "product": "product"}


def model_on_meta(name: str) -> nn.Module:
    """The model on the meta device: it has shapes, so that parameters and MACs can be counted, but no weights."""
    try:
        with torch.device("meta"):
            return rpe_models.create_model(name).eval()
    except RuntimeError:  # timm 1.0.15 reads the drop path rates from a tensor, which has no values on that device
        return rpe_models.create_model(name).eval().to("meta")


def count_parameters(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module) -> int:
    """Multiply-accumulate operations for one image, as PyTorch counts them in convolutions and matrix products."""
    # PyTorch counts the math backend's attention on every device, and that of the fused ones only on some.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, *model.patch_embed.img_size, device="meta"))
    return counter.get_total_flops() // 2


def released_numbers() -> dict[str, dict[str, Any]]:
    """{name: {"top1", "top5", "url", ...}} of the released models; empty without the repository's tools folder."""
    if not NUMBERS.is_file():
        return {}
    return {entry["name"]: entry for entry in json.loads(NUMBERS.read_text(encoding="utf-8"))["deit"]}


def matching(pattern: str) -> list[str]:
    """The known names that match a pattern: a glob if it contains one of *?[, else a part of the name.

    Raises: UserError if none matches.
    """
    glob = pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*"
    if names := [name for name in NAMES if fnmatch.fnmatchcase(name, glob)]:
        return names
    raise UserError(
        f"no name in the list matches {pattern!r}; --list alone shows all names, and --describe accepts any name of "
        f"the form {rpe_models.GRAMMAR}"
    )


def list_models(pattern: str) -> None:
    """Print a line for each name that matches."""
    released, names = released_numbers(), matching(pattern)
    width = max(map(len, names))
    print(f"{'name':{width}}  params (M)  MACs (M)  buckets  top-1  top-5")
    for name in names:
        model = model_on_meta(name)
        buckets = name.split("_")[6] if name not in models.__all__ else "-"
        top1, top5 = (released.get(name, {}).get(key, "-") for key in ("top1", "top5"))
        print(
            f"{name:{width}}  {count_parameters(model) / 1e6:10.2f}  {count_macs(model) / 1e6:8.0f}  {buckets:>7}  "
            f"{top1!s:>5}  {top5!s:>5}"
        )
    print(
        "parameters and MACs: counted here; buckets: used on a 14×14 map; top-1 and top-5: the authors' results on "
        "ImageNet-1K's validation set, in %"
    )


def encoding_lines(config: RPEConfig, attention: nn.Module, side: int) -> list[tuple[str, str]]:
    """(label, value) lines that describe an encoding and its tables in an attention, on a map of side × side tokens."""
    *most, last = [{"q": "queries", "k": "keys", "v": "values"}[on] for on in config.rpe_on]
    places = f"{', '.join(most)} and {last}" if most else last
    alpha, beta, gamma = (f"{value:g}" for value in config.piecewise)
    used = rpe_models.count_used_buckets(config.method.value, config.ratio, side)
    tables = [(key, tuple(table.shape)) for key, table in attention.named_parameters() if "lookup_table" in key]
    labels = ["table" if len(tables) == 1 else "tables", *[""] * (len(tables) - 1)]
    table_lines = [(label, f"{key} {shape} in each layer") for label, (key, shape) in zip(labels, tables, strict=True)]
    return [
        ("method", METHODS[config.method.value]),
        (
            "mode",
            "contextual (ctx): a vector per bucket" if config.mode == "contextual" else "bias: a number per bucket",
        ),
        ("where", f"{places} ({config.rpe_on})"),
        ("heads", "share one table" if config.shared_head else "have one table each (unshared)"),
        ("ratio", f"{config.ratio:g}: alpha {alpha}, beta {beta}, gamma {gamma}"),
        (
            "buckets",
            f"{rpe_models.count_used_buckets(config.method.value, config.ratio)} used on a 14×14 map, "
            f"{used} on this one",
        ),
        *table_lines,
    ]


def describe(name: str) -> None:
    """Print what a name of the grammar, or of a baseline, means. Raises: UserError for any other name."""
    is_baseline = name in models.__all__
    try:
        parsed = None if is_baseline else rpe_models.parse_name(name)
    except ValueError as error:
        near = ", ".join(near for near in rpe_models.near_names(name) if near.startswith("deit_"))
        raise UserError(f"{error}" + (f"; did you mean {near}?" if near else "")) from error
    model = model_on_meta(name)
    block, (side, _) = model.blocks[0], model.patch_embed.grid_size
    numbers = released_numbers().get(name, {})
    lines = [
        (
            "model",
            f"DeiT-{name.split('_')[1]}: width {model.embed_dim}, depth {len(model.blocks)}, "
            f"{block.attn.num_heads} heads of {block.attn.head_dim} channels",
        ),
        (
            "image",
            f"{16 * side}×{16 * side} pixels in patches of 16: a map of {side}×{side} tokens after "
            + ("1 prefix token" if model.num_prefix_tokens == 1 else f"{model.num_prefix_tokens} prefix tokens"),
        ),
        *(encoding_lines(parsed.rpe_config, block.attn, side) if parsed else [("method", "none, without iRPE")]),
        ("parameters", f"{count_parameters(model):,}"),
        ("MACs", f"{count_macs(model) / 1e6:.0f} M, counted here"),
        (
            "released",
            "{params_m} M parameters, {macs_m} M MACs, top-1 {top1} %, top-5 {top5} %".format(**numbers)
            if numbers
            else "no numbers in this repository",
        ),
        ("checkpoint", model.pretrained_cfg["url"] or "none released"),
    ]
    print(name)
    for what, value in lines:
        print(f"  {what:10}  {value}")


def main(args: argparse.Namespace) -> None:
    """Run what the command line asks for."""
    if args.describe is not None:
        describe(args.describe)
    else:
        list_models(args.list)


if __name__ == "__main__":
    parser = ArgumentParser("model_cards.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument(
        "--list",
        nargs="?",
        const="",
        metavar="PATTERN",
        help="known names that match a glob or a part of a name, with parameters, MACs, buckets and published results",
    )
    action.add_argument("--describe", metavar="NAME", help="what a name with iRPE, or of a baseline, means")
    run(main, parser.parse_args())
