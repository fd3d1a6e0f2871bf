"""Draw what DETR's encoder has learned about relative positions: a map for every layer and head.

    python visualize_rpe.py --resume FILE --output_dir DIR [--image FILE ...] [--layer N ...]

Writes rpe_q.png, rpe_k.png and rpe_v.png, as far as the model has iRPE there. A pixel stands for the offset from a
query, in the middle, to a key. On queries and keys it is what the encoding adds to the logit: in bias mode the table
itself, in contextual mode the mean over all queries (on queries: over all keys) of the pictures. On values it is the
norm of the vector that a unit of attention adds to the output. The offsets are those of the first picture's map, or
without pictures those of a square picture. The model's flags come from the checkpoint, else from the command line.
"""
import argparse
from pathlib import Path

import torch

from datasets import build_dataset
from datasets.coco import read_picture
from drawing import chosen_layers, draw_encodings, needs_pictures
from main import get_args_parser
from util import runtime
from util.runtime import UserError
from visualize import MODEL_FLAGS, load_model, prepare

SAMPLE = 4  # pictures taken from the validation set


def parser(defaults=None):
    result = runtime.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     parents=[get_args_parser()], allow_abbrev=False)
    result.set_defaults(device="cpu", **(defaults or {}))
    result.add_argument("--image", nargs="+", metavar="FILE",
                        help=f"pictures to average over; without them {SAMPLE} of the validation set of the training")
    result.add_argument("--layer", nargs="+", type=int, metavar="N", help="layers to draw, from 0; -1 is the last")
    return result


def load_pictures(args):
    """Pictures (3, H, W) as evaluation would see them, one after another: `--image`, or some of the validation set."""
    if args.image:
        return (prepare(read_picture(Path(file), f"picture {file}"), args) for file in args.image)
    if not args.coco_path or not Path(args.coco_path).is_dir():
        raise UserError("contextual encodings depend on what they meet, and the checkpoint names no data set that is "
                        "here: give some pictures, --image FILE ..., or --coco_path DIR")
    dataset = build_dataset("val", args)
    numbers = torch.linspace(0, len(dataset) - 1, min(SAMPLE, len(dataset))).round().int().tolist()
    return (dataset[number][0] for number in numbers)


@torch.inference_mode()
def mean_queries_and_keys(model, pictures, device):
    """For each encoder layer the means of the scaled queries and keys over the pictures' tokens.

    Returns: a list of {"q": (H, D), "k": (H, D)}, and (height, width) of the first picture's map.
    """
    attentions, seen = [layer.self_attn for layer in model.transformer.encoder.layers], {}

    def keep(attention, inputs, named):
        q, k, _ = (attention.split_heads(x)[0] for x in attention.project(*inputs[:3]))  # (H, L, D)
        seen.setdefault("hw", named["hw"])
        for name, x in (("q", q), ("k", k)):
            seen.setdefault((attention, name), []).append(x * attention.head_dim ** -0.5)

    hooks = [attention.register_forward_pre_hook(keep, with_kwargs=True) for attention in attentions]
    for picture in pictures:
        model(picture[None].to(device))  # alone in its batch, so that no token is padding
    for hook in hooks:
        hook.remove()
    return [{name: torch.cat(seen[attention, name], dim=1).mean(1).cpu() for name in "qk"}
            for attention in attentions], seen["hw"]


def square_map(args):
    """(height, width) in tokens of a square picture."""
    side = -(-args.short_side // (16 if args.dilation or args.last_stride == 1 else 32))
    return side, side


def main(args, argv=None):
    if not args.resume or not args.output_dir:
        raise UserError("--resume FILE and --output_dir DIR are needed: the checkpoint, and where pictures go")
    device = runtime.init_distributed(args)
    args, model, _, _ = load_model(args, argv, parser, (*MODEL_FLAGS, "coco_path"))
    attentions = [layer.self_attn for layer in model.transformer.encoder.layers]
    if not (attentions and args.enc_rpe2d):
        raise UserError(f"{args.resume} has no encoder layer with iRPE to draw")
    layers = chosen_layers(args.layer, len(attentions))
    means, map_size = None, square_map(args)
    if args.image or needs_pictures(attentions):
        means, map_size = mean_queries_and_keys(model.to(device), load_pictures(args), device)
    runtime.prepare_output_dir(args.output_dir)
    draw_encodings(attentions, layers, map_size, means, f"DETR, --enc_rpe2d {args.enc_rpe2d}", args.output_dir)


if __name__ == "__main__":
    runtime.run(main, parser().parse_args())
