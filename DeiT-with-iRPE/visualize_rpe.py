"""Draw what a model has learned about relative positions: a map for every layer and head.

    python visualize_rpe.py --resume FILE --output_dir DIR [--image FILE ...] [--layer N ...]

Writes rpe_q.png, rpe_k.png and rpe_v.png, as far as the model has iRPE there. A pixel stands for the offset from a
query, in the middle, to a key. On queries and keys it is what the encoding adds to the logit: in bias mode the table
itself, in contextual mode the mean over all queries (on queries: over all keys) of the pictures. On values it is the
norm of the vector that a unit of attention adds to the output. The bucket of the prefix tokens is left out.
"""
import argparse
from pathlib import Path

import torch

from checkpoint import load_weights
from datasets import build_dataset, build_transform, load_image
from drawing import chosen_layers, draw_encodings, figure_class, needs_pictures
from rpe_models import create_model
from rpe_vision_transformer import RPEAttention
from runtime import ArgumentParser, UserError, load_checkpoint, model_weights, prepare_output_dir, run

SAMPLE = 8  # pictures taken from the validation set


def parser():
    result = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--resume", required=True, metavar="FILE", help="checkpoint or URL")
    result.add_argument("--output_dir", required=True, metavar="DIR", help="where the pictures go")
    result.add_argument("--image", nargs="+", metavar="FILE",
                        help=f"pictures to average over; without them {SAMPLE} of the validation set of the training")
    result.add_argument("--layer", nargs="+", type=int, metavar="N", help="layers to draw, from 0; -1 is the last")
    result.add_argument("--model", metavar="NAME", help="if it is neither in the checkpoint nor the file's name")
    result.add_argument("--input-size", type=int, metavar="PIXELS", help="if it is not in the checkpoint")
    return result


def load_model(args):
    """The model of `--resume` in evaluation mode, its name, and the flags that it was trained with, or None."""
    checkpoint = load_checkpoint(args.resume)
    trained = checkpoint.get("args")
    name = args.model or getattr(trained, "model", None) or Path(args.resume).stem
    size = args.input_size or getattr(trained, "input_size", None)
    if not isinstance(name, str) or not isinstance(size, int | None):
        raise UserError(f"{args.resume} holds the flags --model {name!r} and --input-size {size!r}, which are no name "
                        "and number: give both")
    weights = model_weights(checkpoint, args.resume)
    classes = len(weights["head.weight"]) if "head.weight" in weights else 1000
    try:
        model = create_model(name, num_classes=classes, **({"img_size": size} if size else {}))
    except (ValueError, TypeError, AssertionError, RuntimeError) as error:
        raise UserError(f"{args.resume} cannot be drawn as {name}: {error}; --model says which one it is") from error
    if not any(isinstance(module, RPEAttention) for module in model.modules()):
        tables = any("lookup_table" in key for key in weights)
        raise UserError(f"{args.resume} has iRPE's tables, but {name} has none: --model says which one it is" if tables
                        else f"{name} has no iRPE to draw")
    load_weights(model, checkpoint, args.resume)
    return model.eval(), name, trained


def load_pictures(args, trained, size):
    """Pictures (N, 3, size, size) as evaluation would see them: `--image`, or some of the validation set."""
    if args.image:
        transform = build_transform(False, argparse.Namespace(input_size=size, data_set="FOLDER"))
        return torch.stack([transform(load_image(file)) for file in args.image])
    data_path = getattr(trained, "data_path", None)
    if not data_path or not Path(data_path).is_dir():
        raise UserError("contextual encodings depend on what they meet, and the checkpoint names no data set that is "
                        "here: give some pictures, --image FILE ...")
    dataset, _ = build_dataset(False, trained)
    numbers = torch.linspace(0, len(dataset) - 1, min(SAMPLE, len(dataset))).round().int().tolist()
    return torch.stack([dataset[number][0] for number in numbers])


@torch.inference_mode()
def mean_queries_and_keys(model, pictures):
    """For each layer the means of the scaled queries and keys, without prefix tokens: {"q": (H, D), "k": (H, D)}."""
    means = []

    def keep(attn, inputs):
        q, k, _ = attn.qkv(inputs[0]).unflatten(-1, (3, attn.num_heads, attn.head_dim)).unbind(2)  # (B, L, H, D)
        means.append({name: attn.scale * x[:, attn.num_prefix_tokens:].mean((0, 1))
                      for name, x in (("q", attn.q_norm(q)), ("k", attn.k_norm(k)))})

    hooks = [block.attn.register_forward_pre_hook(keep) for block in model.blocks]
    model(pictures)
    for hook in hooks:
        hook.remove()
    return means


def main(args):
    figure_class()  # before anything is computed in vain
    model, name, trained = load_model(args)
    layers = chosen_layers(args.layer, len(model.blocks))
    attentions, means = [block.attn for block in model.blocks], None
    if needs_pictures(attentions):
        means = mean_queries_and_keys(model, load_pictures(args, trained, model.patch_embed.img_size[0]))
    prepare_output_dir(args.output_dir)
    draw_encodings(attentions, layers, model.patch_embed.grid_size, means, name, args.output_dir)


if __name__ == "__main__":
    run(main, parser().parse_args())
