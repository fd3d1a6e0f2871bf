"""What names of models stand for.

python model_cards.py --list [PATTERN]
python model_cards.py --describe NAME
"""

import argparse
import fnmatch
import json
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import models
import rpe_models
from runtime import ArgumentParser, UserError, run

NAMES = (*rpe_models.RELEASED, *rpe_models.UNRELEASED, *models.__all__)
NUMBERS = Path(__file__).resolve().parent.parent / "tools" / "released.json"
METHODS = {"euc": "Euclidean", "quant": "quantization", "cross": "cross", "product": "product"}


def outline(name):
    """The model without memory for its weights, which can tell its shapes and be counted."""
    try:
        with torch.device("meta"):
            return rpe_models.create_model(name).eval()
    except RuntimeError:  # timm 1.0.15 reads the drop path rates off a tensor, which has no values there
        return rpe_models.create_model(name).eval().to("meta")


def count_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model):
    """Multiply-accumulates of a picture, as PyTorch counts them in convolutions and products of matrices."""
    # the math backend does its products one by one, on every device
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, *model.patch_embed.img_size, device="meta"))
    return counter.get_total_flops() // 2


def released_numbers():
    """{name: {"top1", "top5", "url", ...}} of the released models; empty where the repository's table is not there."""
    if not NUMBERS.is_file():
        return {}
    return {entry["name"]: entry for entry in json.loads(NUMBERS.read_text(encoding="utf-8"))["deit"]}


def matching(pattern):
    """The known names that a pattern fits: a glob if it has one of *?[, else a part of the name.

    Raises: UserError if it fits none.
    """
    glob = pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*"
    if names := [name for name in NAMES if fnmatch.fnmatchcase(name, glob)]:
        return names
    raise UserError(
        f"no name in the list fits {pattern!r}; --list alone shows all, and --describe any name of the "
        f"form {rpe_models.GRAMMAR}"
    )


def list_models(pattern):
    """Print a line for each name that fits."""
    released, names = released_numbers(), matching(pattern)
    width = max(map(len, names))
    print(f"{'name':{width}}  params (M)  MACs (M)  buckets  top-1  top-5")
    for name in names:
        model = outline(name)
        buckets = name.split("_")[6] if name not in models.__all__ else "-"
        top1, top5 = (released.get(name, {}).get(key, "-") for key in ("top1", "top5"))
        print(
            f"{name:{width}}  {count_parameters(model) / 1e6:10.2f}  {count_macs(model) / 1e6:8.0f}  {buckets:>7}  "
            f"{top1!s:>5}  {top5!s:>5}"
        )
    print(
        "parameters and MACs are counted here, buckets are those that a 14×14 map uses, top-1 and top-5 are the "
        "authors', in % of ImageNet-1K's validation set"
    )


def encoding_lines(config, attention, side):
    """(what, value) lines of a configuration and of the tables that an attention has for it, on a square map."""
    *most, last = [{"q": "queries", "k": "keys", "v": "values"}[on] for on in config.rpe_on]
    places = f"{', '.join(most)} and {last}" if most else last
    alpha, beta, gamma = (f"{value:g}" for value in config.piecewise)
    tables = [(key, tuple(table.shape)) for key, table in attention.named_parameters() if "lookup_table" in key]
    used = rpe_models.count_used_buckets(config.method.value, config.ratio, side)
    return [
        ("method", METHODS[config.method.value]),
        ("mode", "contextual (ctx): a vector a bucket" if config.mode == "contextual" else "bias: a number a bucket"),
        ("where", f"{places} ({config.rpe_on})"),
        ("heads", "share their table" if config.shared_head else "have a table each (unshared)"),
        ("ratio", f"{config.ratio:g}: alpha {alpha}, beta {beta}, gamma {gamma}"),
        (
            "buckets",
            f"{rpe_models.count_used_buckets(config.method.value, config.ratio)} used on a 14×14 map, "
            f"{used} on this one",
        ),
        *(
            (f"table{'s' * (len(tables) > 1)}" if number == 0 else "", f"{key} {shape} in each layer")
            for number, (key, shape) in enumerate(tables)
        ),
    ]


def describe(name):
    """Print what a name of the grammar, or a baseline's, stands for. Raises: UserError for any other."""
    known = name in models.__all__
    try:
        parsed = None if known else rpe_models.parse_name(name)
    except ValueError as error:
        near = ", ".join(near for near in rpe_models.near_names(name) if near.startswith("deit_"))
        raise UserError(f"{error}" + (f"; did you mean {near}?" if near else "")) from error
    model = outline(name)
    block, (side, _) = model.blocks[0], model.patch_embed.grid_size
    numbers = released_numbers().get(name, {})
    lines = [
        (
            "model",
            f"DeiT-{name.split('_')[1]}: width {model.embed_dim}, depth {len(model.blocks)}, "
            f"{block.attn.num_heads} heads of {block.attn.head_dim} channels",
        ),
        (
            "picture",
            f"{16 * side}×{16 * side} pixels in patches of 16: a map of {side}×{side} tokens after "
            f"{model.num_prefix_tokens} prefix token{'s' * (model.num_prefix_tokens > 1)}",
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


def main(args):
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
        help="known names that a glob or a part of a name fits, with parameters, MACs, buckets and released numbers",
    )
    action.add_argument("--describe", metavar="NAME", help="what any name with iRPE, or a baseline's, encodes")
    run(main, parser.parse_args())
