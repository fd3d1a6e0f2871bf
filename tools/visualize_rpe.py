"""Draw what a model has learned about relative positions: a map for every layer and head.

    python tools/visualize_rpe.py --resume FILE --output_dir DIR [--image FILE ...]

FILE is a checkpoint of DeiT or of DETR, which its weights tell. Writes rpe_q.png, rpe_k.png and rpe_v.png, as far as
the model has iRPE there. A pixel stands for the offset from a query, in the middle, to a key. On queries and keys it is
what the encoding adds to the logit: in bias mode the table itself, in contextual mode the mean over all queries (on
queries: over all keys) of the pictures. On values it is the norm of the vector that a unit of attention adds to the
output. The bucket of the prefix tokens is left out. The offsets are those of the first picture's map.

Flags of that codebase's main.py, such as --model or --enc_rpe2d, are taken too, where the checkpoint lacks them.
"""

import argparse
import itertools
import sys
from pathlib import Path

import torch
from drawing import ROOT, new_figure, runtime, save

sys.modules["util.runtime"] = runtime  # DETR's is the same file; its UserError is to be the one that `run` knows
SAMPLE = 8  # pictures taken from the validation set
TERMS = {
    "q": ("queries", "added to the logit, mean over all keys"),
    "k": ("keys", "added to the logit, mean over all queries"),
    "v": ("values", "norm of what a unit of attention adds to the output"),
}


def parser():
    result = runtime.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    result.add_argument("--resume", required=True, metavar="FILE", help="checkpoint or URL")
    result.add_argument("--output_dir", required=True, metavar="DIR", help="where the pictures go")
    result.add_argument(
        "--image",
        nargs="+",
        default=[],
        metavar="FILE",
        help=f"pictures to average over; without them {SAMPLE} of the validation set of the training",
    )
    return result


def main_flags(parser, args, checkpoint, **defaults):
    """Flags of a codebase's main.py: those given here, else those of the checkpoint, else `defaults`, else its own."""
    parser = runtime.ArgumentParser(parents=[parser], allow_abbrev=False)
    parser.set_defaults(**{**defaults, **vars(checkpoint.get("args", argparse.Namespace()))})
    return parser.parse_args([*args.flags, "--resume", args.resume, "--eval"])


def load_deit(args, checkpoint):
    """A DeiT, its name, the side of its pictures, and two functions: one reads a picture as evaluation would see it,
    (3, H, W), the other opens the validation set."""
    from checkpoint import load_weights, with_model_flags
    from datasets import build_dataset, build_transform, load_image
    from main import build_model, get_args_parser

    flags = main_flags(get_args_parser(), args, checkpoint, model=Path(args.resume).stem)
    flags = with_model_flags(flags, runtime.Checkpoint(args.resume, checkpoint))
    head = runtime.model_weights(checkpoint, args.resume).get("head.weight", ())
    model = build_model(flags, len(head))
    load_weights(model, checkpoint, args.resume)
    transform = build_transform(False, flags)
    return (
        model,
        flags.model,
        flags.input_size,
        lambda file: transform(load_image(file)),
        lambda: build_dataset(False, flags)[0],
    )


def load_detr(args, checkpoint):
    """As `load_deit`."""
    sys.path.insert(0, str(ROOT / "DETR-with-iRPE"))
    from datasets import build_dataset
    from datasets.coco import read_picture
    from main import check_args, get_args_parser
    from models import build_model
    from util.checkpoint import count_classes, load_weights
    from visualize import prepare

    flags = main_flags(get_args_parser(), args, checkpoint, coco_path="coco")
    flags.num_classes = count_classes(runtime.model_weights(checkpoint, args.resume)) or flags.num_classes
    check_args(flags, needs_data=False)
    model, *_ = build_model(flags)
    load_weights(model, checkpoint, args.resume)
    return (
        model,
        f"DETR, --enc_rpe2d {flags.enc_rpe2d}",
        flags.short_side,
        lambda file: prepare(read_picture(file, f"image {file}"), flags),
        lambda: build_dataset("val", flags),
    )


def load_pictures(args, read, open_data):
    """`--image`, or some pictures from all over the validation set."""
    if args.image:
        return [read(file) for file in args.image]
    try:
        dataset = open_data()
    except runtime.UserError as error:
        raise runtime.UserError(
            f"a contextual encoding depends on what it meets: give some pictures, --image FILE "
            f"..., or the validation set ({error})"
        ) from error
    return [dataset[number][0] for number in range(0, len(dataset), -(-len(dataset) // SAMPLE))]


def find_terms(model):
    """The terms of the encoding that a model has, by what they act on: {"k": one for each layer, ...}."""
    found = {on: [rpe for module in model.modules() if (rpe := getattr(module, f"rpe_{on}", None))] for on in TERMS}
    return {on: layers for on, layers in found.items() if layers}


def tables_of(rpe):
    """The tables of a term: one, or of cross that of the rows and that of the columns."""
    return [rpe.rp_rows, rpe.rp_cols] if hasattr(rpe, "rp_rows") else [rpe]


@torch.inference_mode()
def mean_inputs(model, terms, pictures):
    """What the terms on queries and keys meet while the model looks at pictures (3, H, W), one after another.

    Returns: {term: mean over the tokens of all maps of the scaled keys (on queries) or queries (on keys), (H, D)}, and
        (height, width) of the first picture's map, in tokens.
    """
    met, sizes = {}, []

    def keep(term, inputs):
        x, height, width = inputs
        sizes.append((height, width))
        if tables_of(term)[0].on != "v":
            met.setdefault(term, []).append(x[0, :, -height * width :])  # (H, h·w, D)

    for term in terms:
        term.register_forward_pre_hook(keep)
    for picture in pictures:
        model(picture[None])
    return {term: torch.cat(vectors, dim=1).mean(1) for term, vectors in met.items()}, sizes[0]


def offset_map(rpe, height, width, mean=None):
    """What a term of the encoding adds at every offset between query and key, without the prefix tokens.

    Args:
        rpe: `irpe.iRPE` or `irpe.iRPE_Cross`.
        height, width: the map, in tokens.
        mean: in contextual mode on q and k, the mean of the scaled keys (for q) or queries (for k), (H, D).
    Returns: (H or H', 2·height - 1, 2·width - 1), where [height - 1 + dr, width - 1 + dc] is a key dr rows below and
        dc columns right of its query: on q and k what is added to the logits, in the mean over those vectors; on v
        the norm of the vector that a unit of attention adds to the output.
    """
    encoding, (tall, wide) = 0, (2 * height - 1, 2 * width - 1)
    for table in tables_of(rpe):
        skip = table.config.skip
        # seen from the middle of a map of this size, the keys are at these offsets
        ids = table.bucket_ids(tall * wide + skip, "cpu", tall, wide)[skip + tall * wide // 2, skip:].view(tall, wide)
        ids = (ids.flip(0, 1) if table.on == "q" else ids).long()  # on queries the bucket of the pair turned round
        values = next(table.parameters()).detach()
        encoding = encoding + (values.transpose(1, 2) if table.on == "v" else values)[..., ids]
    if table.config.mode == "bias":
        return encoding  # (H', tall, wide)
    return encoding.norm(dim=1) if table.on == "v" else (mean[:, :, None, None] * encoding).sum(1)


def draw_offset_maps(maps, title, unit, signed):
    """A figure with a map for each layer and head, and one colour scale for all.

    Args:
        maps: one (heads, 2h - 1, 2w - 1) tensor for each layer, as `offset_map` returns them.
        title, unit: of the figure and of its colour bar.
        signed: diverging colours around zero; else from the least value up.
    """
    panels, tall, wide = torch.stack(maps), *maps[0].shape[1:]
    heads = [f"head {head}" for head in range(len(maps[0]))] if len(maps[0]) > 1 else [""]
    names = [f"layer {layer}" for layer in range(len(maps))], heads
    if len(names[0]) > len(names[1]):  # the longer side goes from left to right
        panels, names = panels.transpose(0, 1), names[::-1]
    rows, columns = panels.shape[:2]
    cell = min(2.5, max(0.9, 11 / columns))
    figure = new_figure(max(5.5, cell * columns + 1.8), max(2.6, cell * tall / wide * rows + 1.0))
    figure.set_layout_engine("compressed")  # which leaves room for labels beside panels of a fixed shape
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    grid[0, 0].set(xticks=[-(wide // 2), 0, wide // 2], yticks=[-(tall // 2), 0, tall // 2])
    # a few offsets far above the rest would leave the others pale: half a percent may lie beyond the scale's end
    size = panels.abs().flatten()
    limit = size.quantile(0.995, interpolation="higher").item() or size.max().item() or 1.0
    colors = ("RdBu_r", -limit, "black") if signed else ("viridis", size.min().item(), "white")
    for axes, values in zip(grid.flat, panels.flatten(0, 1), strict=True):
        image = axes.imshow(
            values.numpy(),
            colors[0],
            vmin=colors[1],
            vmax=limit,
            interpolation="nearest",
            extent=(-wide / 2, wide / 2, tall / 2, -tall / 2),
        )
        axes.plot(0, 0, "+", color=colors[2], markersize=4)
        axes.tick_params(labelsize=6, length=2)
    for axes, name in zip(grid[:, 0], names[0], strict=True):
        axes.set_ylabel(name, fontsize=8)
    for axes, name in zip(grid[0], names[1], strict=True):
        axes.set_title(name, fontsize=8)
    figure.suptitle(f"{title}\neach pixel: rows and columns from the query (+) to the key, in tokens", fontsize=9)
    bar = figure.colorbar(
        image,
        ax=grid,
        fraction=0.03,
        aspect=30,
        extend=("both" if signed else "max") if size.max() > limit else "neither",
    )
    bar.set_label(unit, fontsize=8)
    bar.ax.tick_params(labelsize=8)
    return figure


def load_model(args):
    """What `load_deit` returns, for the codebase that `--resume` is of; the model is in evaluation mode."""
    checkpoint = runtime.load_checkpoint(args.resume)
    weights = runtime.model_weights(checkpoint, args.resume)
    load = load_detr if any("transformer.encoder" in key for key in weights) else load_deit
    model, *rest = load(args, checkpoint)
    return model.eval(), *rest


def main(args):
    model, name, side, read, open_data = load_model(args)
    terms = find_terms(model)
    if not terms:
        raise runtime.UserError(f"{args.resume}, {name}, has no iRPE to draw")
    every_term = list(itertools.chain(*terms.values()))
    is_bias = tables_of(every_term[0])[0].config.mode == "bias"
    pictures = load_pictures(args, read, open_data) if args.image or not is_bias else [torch.zeros(3, side, side)]
    means, (height, width) = mean_inputs(model, every_term, pictures)
    runtime.prepare_output_dir(args.output_dir)
    for on, layers in terms.items():
        maps = [offset_map(rpe, height, width, means.get(rpe)) for rpe in layers]
        where, unit = TERMS[on]
        unit = "added to the logit" if is_bias else unit
        path = Path(args.output_dir, f"rpe_{on}.png")
        title = f"{name}\nencoding on {where}, map of {height}×{width} tokens"
        save(draw_offset_maps(maps, title, unit, signed=on != "v"), path)
        low, high = torch.stack(maps).aminmax()
        print(f"{path}: from {low:.3g} to {high:.3g} {unit}")


if __name__ == "__main__":
    args, flags = parser().parse_known_args()
    runtime.run(main, argparse.Namespace(**vars(args), flags=flags))
