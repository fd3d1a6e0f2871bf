"""Draw what a model has learned about relative positions: a map for every layer and head.

    python tools/visualize_rpe.py --resume FILE --output_dir DIR [--image FILE ...]

FILE is a checkpoint of DeiT or DETR; the tool recognises which from the weights. It writes rpe_q.png, rpe_k.png and
rpe_v.png, as far as the model has iRPE on queries, keys and values. Each pixel of a map is an offset from a query, in
the centre, to a key. For queries and keys, its value is what the encoding adds to the logit: in bias mode the entry of
the table, in contextual mode the mean over all queries (for rpe_q: over all keys) of the images. For values, it is the
norm of the vector that an attention weight of 1 adds to the output. The bucket of the prefix tokens is not drawn. The
size of the map is that of the first image.

If the checkpoint lacks flags of its training, such as --model or --enc_rpe2d, pass them as for main.py.
"""

import argparse
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from drawing import ROOT, new_figure, runtime, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import nn
    from torch.utils.data import Dataset

sys.modules["util.runtime"] = runtime  # DETR's copy of the file; `run` must recognize its UserError
SAMPLE = 8  # images taken from the validation set
TERMS = {
    "q": ("queries", "added to the logit, mean over all keys"),
    "k": ("keys", "added to the logit, mean over all queries"),
    "v": ("values", "norm of what an attention weight of 1 adds to the output"),
}


class Loaded(NamedTuple):
    """A model of either codebase in evaluation mode, and how to read images for it."""

    model: "nn.Module"
    name: str
    side: int  # of the images, in pixels
    read: Callable[[str], torch.Tensor]  # file → image (3, H, W) as evaluation sees it
    open_data: Callable[[], "Dataset"]  # the validation set


def build_parser() -> argparse.ArgumentParser:
    """The parser of this tool's own flags."""
    result = runtime.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    result.add_argument("--resume", required=True, metavar="FILE", help="checkpoint or URL")
    result.add_argument("--output_dir", required=True, metavar="DIR", help="folder for the figures")
    result.add_argument(
        "--image",
        nargs="+",
        default=[],
        metavar="FILE",
        help=f"images to average over; default: {SAMPLE} images of the validation set",
    )
    return result


def main_flags(
    parser: argparse.ArgumentParser, args: argparse.Namespace, checkpoint: dict[str, Any], **defaults: Any
) -> argparse.Namespace:
    """The flags of main.py: from the command line, else the checkpoint, else `defaults`, else main.py's defaults."""
    parser = runtime.ArgumentParser(parents=[parser], allow_abbrev=False)
    parser.set_defaults(**{**defaults, **vars(checkpoint.get("args", argparse.Namespace()))})
    return parser.parse_args([*args.flags, "--resume", args.resume, "--eval"])


def load_deit(args: argparse.Namespace, checkpoint: dict[str, Any]) -> Loaded:
    """The DeiT of a checkpoint. Raises: UserError if the flags or the weights do not match."""
    from checkpoint import load_weights, with_model_flags
    from datasets import build_dataset, build_transform, load_image
    from main import build_model, get_args_parser

    flags = main_flags(get_args_parser(), args, checkpoint, model=Path(args.resume).stem)
    flags = with_model_flags(flags, runtime.Checkpoint(args.resume, checkpoint))
    head = runtime.model_weights(checkpoint, args.resume).get("head.weight", ())
    model = build_model(flags, len(head))
    load_weights(model, checkpoint, args.resume)
    transform = build_transform(False, flags)
    return Loaded(
        model.eval(),
        flags.model,
        flags.input_size,
        lambda file: transform(load_image(file)),
        lambda: build_dataset(False, flags)[0],
    )


def load_detr(args: argparse.Namespace, checkpoint: dict[str, Any]) -> Loaded:
    """The DETR of a checkpoint. Raises: UserError if the flags or the weights do not match."""
    sys.path.insert(0, str(ROOT / "DETR-with-iRPE"))
    from datasets import build_dataset
    from datasets.coco import read_image
    from main import check_args, get_args_parser
    from models import build_model
    from util.checkpoint import count_classes, load_weights
    from visualize import prepare

    flags = main_flags(get_args_parser(), args, checkpoint, coco_path="coco")
    flags.num_classes = count_classes(runtime.model_weights(checkpoint, args.resume)) or flags.num_classes
    check_args(flags, needs_data=False)
    model, *_ = build_model(flags)
    load_weights(model, checkpoint, args.resume)
    return Loaded(
        model.eval(),
        f"DETR, --enc_rpe2d {flags.enc_rpe2d}",
        flags.short_side,
        lambda file: prepare(read_image(file, file), flags),
        lambda: build_dataset("val", flags),
    )


def load_images(args: argparse.Namespace, loaded: Loaded) -> list[torch.Tensor]:
    """The images (3, H, W) of `--image`, or `SAMPLE` evenly spaced ones of the validation set."""
    if args.image:
        return [loaded.read(file) for file in args.image]
    try:
        dataset = loaded.open_data()
    except runtime.UserError as error:
        raise runtime.UserError(
            "a contextual encoding depends on the images: give some with --image FILE ..., or the validation set "
            f"({error})"
        ) from error
    return [dataset[number][0] for number in range(0, len(dataset), -(-len(dataset) // SAMPLE))]


def find_terms(model: "nn.Module") -> dict[str, list["nn.Module"]]:
    """The encodings of a model, by what they act on: {"k": one for each layer, ...}."""
    found = {on: [rpe for module in model.modules() if (rpe := getattr(module, f"rpe_{on}", None))] for on in TERMS}
    return {on: layers for on, layers in found.items() if layers}


def single_table_modules(rpe: "nn.Module") -> list["nn.Module"]:
    """The parts of an encoding with one table each: itself or, for the cross method, those of the rows and columns."""
    return [rpe.rp_rows, rpe.rp_cols] if hasattr(rpe, "rp_rows") else [rpe]


@torch.inference_mode()
def mean_inputs(
    model: "nn.Module", terms: list["nn.Module"], images: list[torch.Tensor]
) -> tuple[dict["nn.Module", torch.Tensor], tuple[int, int]]:
    """The mean inputs of the encodings on queries and keys, over images (3, H, W) that are processed one by one.

    Returns: {encoding: mean over the tokens of all maps of the scaled keys (for rpe_q) or queries (for rpe_k), (H, D)},
        and (height, width) of the first image's map, in tokens.
    """
    inputs_of, sizes = {}, []

    def keep(term: "nn.Module", inputs: tuple[torch.Tensor, int, int]) -> None:
        x, height, width = inputs
        sizes.append((height, width))
        if single_table_modules(term)[0].on != "v":
            inputs_of.setdefault(term, []).append(x[0, :, -height * width :])  # (H, h·w, D)

    for term in terms:
        term.register_forward_pre_hook(keep)
    for image in images:
        model(image[None])
    return {term: torch.cat(vectors, dim=1).mean(1) for term, vectors in inputs_of.items()}, sizes[0]


def offset_map(rpe: "nn.Module", height: int, width: int, mean: torch.Tensor | None = None) -> torch.Tensor:
    """What an encoding adds at every offset between query and key, without the prefix tokens.

    Args:
        rpe: `irpe.iRPE` or `irpe.iRPE_Cross`.
        height, width: size of the map, in tokens.
        mean: in contextual mode, for rpe_q and rpe_k, the mean of the scaled keys or queries, (H, D).
    Returns: (H or H', 2·height - 1, 2·width - 1), where [height - 1 + dr, width - 1 + dc] is a key dr rows below and
        dc columns right of its query: for rpe_q and rpe_k what is added to the logit, averaged over those vectors; for
        rpe_v the norm of the vector that an attention weight of 1 adds to the output.
    """
    encoding, (tall, wide) = 0, (2 * height - 1, 2 * width - 1)
    for table in single_table_modules(rpe):
        skip = table.config.skip
        # On a map of tall × wide tokens, the keys have all these offsets from the query in the centre.
        ids = table.bucket_ids(tall * wide + skip, "cpu", tall, wide)[skip + tall * wide // 2, skip:].view(tall, wide)
        ids = (ids.flip(0, 1) if table.on == "q" else ids).long()  # rpe_q uses the offset from the key to the query
        values = next(table.parameters()).detach()
        encoding = encoding + (values.transpose(1, 2) if table.on == "v" else values)[..., ids]
    if table.config.mode == "bias":
        return encoding  # (H', tall, wide)
    return encoding.norm(dim=1) if table.on == "v" else (mean[:, :, None, None] * encoding).sum(1)


def draw_offset_maps(maps: list[torch.Tensor], title: str, unit: str, signed: bool) -> "Figure":
    """A figure with a map for each layer and head, on one colour scale.

    Args:
        maps: one (heads, 2h - 1, 2w - 1) tensor for each layer, as `offset_map` returns them.
        title, unit: title of the figure, and label of its colour bar.
        signed: use diverging colours around zero, else a scale that starts at the smallest value.
    """
    panels, tall, wide = torch.stack(maps), *maps[0].shape[1:]
    heads = [f"head {head}" for head in range(len(maps[0]))] if len(maps[0]) > 1 else [""]
    names = [f"layer {layer}" for layer in range(len(maps))], heads
    if len(names[0]) > len(names[1]):  # the longer axis is horizontal
        panels, names = panels.transpose(0, 1), names[::-1]
    rows, columns = panels.shape[:2]
    cell = min(2.5, max(0.9, 11 / columns))
    figure = new_figure(max(5.5, cell * columns + 1.8), max(2.6, cell * tall / wide * rows + 1.0))
    figure.set_layout_engine("compressed")  # leaves room for labels next to panels with a fixed aspect ratio
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    grid[0, 0].set(xticks=[-(wide // 2), 0, wide // 2], yticks=[-(tall // 2), 0, tall // 2])
    # A few very large values would make all others pale, so half a percent may exceed the colour scale.
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


def load_model(args: argparse.Namespace) -> Loaded:
    """The model of `--resume`, from the codebase that its weights belong to."""
    checkpoint = runtime.load_checkpoint(args.resume)
    weights = runtime.model_weights(checkpoint, args.resume)
    load = load_detr if any("transformer.encoder" in key for key in weights) else load_deit
    return load(args, checkpoint)


def main(args: argparse.Namespace) -> None:
    """Draw the encodings of `--resume`."""
    loaded = load_model(args)
    terms = find_terms(loaded.model)
    if not terms:
        raise runtime.UserError(f"{args.resume}, {loaded.name}, has no iRPE to draw")
    every_term = list(itertools.chain(*terms.values()))
    is_bias = single_table_modules(every_term[0])[0].config.mode == "bias"
    if is_bias and not args.image:  # any image shows the size of the map, and a bias depends on nothing else
        images = [torch.zeros(3, loaded.side, loaded.side)]
    else:
        images = load_images(args, loaded)
    means, (height, width) = mean_inputs(loaded.model, every_term, images)
    runtime.prepare_output_dir(args.output_dir)
    for on, layers in terms.items():
        maps = [offset_map(rpe, height, width, means.get(rpe)) for rpe in layers]
        where, unit = TERMS[on]
        unit = "added to the logit" if is_bias else unit
        path = Path(args.output_dir, f"rpe_{on}.png")
        title = f"{loaded.name}\nencoding on {where}, map of {height}×{width} tokens"
        save(draw_offset_maps(maps, title, unit, signed=on != "v"), path)
        low, high = torch.stack(maps).aminmax()
        print(f"{path}: from {low:.3g} to {high:.3g} {unit}")


if __name__ == "__main__":
    args, flags = build_parser().parse_known_args()
    runtime.run(main, argparse.Namespace(**vars(args), flags=flags))
