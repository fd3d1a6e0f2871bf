"""Draw what a checkpoint detects, and what its encoder attends to, on pictures.

    python visualize.py --resume FILE --image FILE ... --output_dir DIR [--threshold 0.7] [--attention X Y]

The model's flags come from the checkpoint where it has them (those of training runs do), else from the command line.
"""
import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torchvision import tv_tensors
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from datasets.coco import read_picture
from datasets.transforms import make_coco_transforms
from main import check_args, get_args_parser
from models import build_model
from models.rpe_attention.irpe import rpe_attention
from util import runtime
from util.checkpoint import load_weights
from util.runtime import UserError, print_once

MODEL_FLAGS = ("backbone", "dilation", "last_stride", "position_embedding", "enc_layers", "dec_layers",
               "dim_feedforward", "hidden_dim", "nheads", "num_queries", "pre_norm", "enc_rpe2d", "short_side")


def parser(defaults=None):
    result = runtime.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     parents=[get_args_parser()], allow_abbrev=False)
    result.set_defaults(**(defaults or {}))
    result.add_argument("--image", nargs="+", required=True, metavar="FILE")
    result.add_argument("--threshold", type=float, default=0.7, help="lowest score that is drawn")
    result.add_argument("--attention", nargs=2, type=float, metavar=("X", "Y"),
                        help="also draw the encoder's attention from this point of each picture, in pixels")
    result.add_argument("--layer", type=int, default=-1, help="encoder layer of --attention; -1 is the last")
    return result


def load_model(args, argv, parser=parser, flags=MODEL_FLAGS):
    """All flags, and model, post-processing and category names of `--resume`.

    Flags that are given win over those in the checkpoint; `parser` makes the command line with those for defaults.
    """
    checkpoint = runtime.load_checkpoint(args.resume)
    stored = {name: value for name, value in vars(checkpoint.get("args", argparse.Namespace())).items()
              if name in flags}
    args = parser(stored).parse_args(argv)
    weights = runtime.model_weights(checkpoint, args.resume)
    if "class_embed.weight" in weights:
        args.num_classes = len(weights["class_embed.weight"]) - 1
    args.eval = True
    check_args(args, needs_data=False)
    model, _, postprocessors = build_model(args)
    load_weights(model, checkpoint, args.resume)
    names = checkpoint.get("categories") or dict(enumerate(FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]))
    return args, model.eval(), postprocessors["bbox"], names


def prepare(picture, args):
    """PIL picture → the tensor (3, H, W) that evaluation would see."""
    boxes = tv_tensors.BoundingBoxes(torch.empty(0, 4), format="XYXY", canvas_size=(picture.height, picture.width))
    return make_coco_transforms("val", args.short_side)(picture, {"boxes": boxes})[0]


def encoder_attention(model, samples, layer):
    """Attention of an encoder layer, mean over its heads: (h·w, h·w) with and without iRPE, and (h, w)."""
    layers, seen = model.transformer.encoder.layers, {}
    if not -len(layers) <= layer < len(layers):
        raise UserError(f"--layer {layer} is not among the encoder's {len(layers)} layers")
    attention = layers[layer].self_attn
    hook = attention.register_forward_pre_hook(lambda module, inputs, named: seen.update(inputs=inputs, **named),
                                               with_kwargs=True)
    model(samples)
    hook.remove()
    query, key, value, padding = seen["inputs"]
    q, k, _ = (attention.split_heads(x) for x in attention.project(query, key, value))
    every_key = torch.eye(q.shape[2], device=q.device).expand(*q.shape[:3], -1)  # values that show the weights
    mask = padding[:, None, None]
    return [rpe_attention(q, k, every_key, rpe_q, rpe_k, None, *seen["hw"], mask).mean(1)[0]
            for rpe_q, rpe_k in ((attention.rpe_q, attention.rpe_k), (None, None))], seen["hw"]


def draw_detections(picture, found, names, threshold, path):
    """Boxes, names and scores above the threshold on the picture; returns how many."""
    from matplotlib import colormaps, patches
    figure, axes = _canvas(picture, 1)
    kept = [i for i in range(len(found["scores"])) if found["scores"][i] >= threshold]
    for i in kept:
        x1, y1, x2, y2 = found["boxes"][i].tolist()
        label = int(found["labels"][i])
        color = colormaps["tab10"](label % 10)
        axes[0].add_patch(patches.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color, linewidth=2))
        axes[0].text(x1, y1, f"{names.get(label, label)} {found['scores'][i]:.2f}", color="white", fontsize=8,
                     verticalalignment="bottom", parse_math=False,
                     bbox={"facecolor": color, "edgecolor": "none", "pad": 1})
    figure.savefig(path)
    return len(kept)


def draw_attention(picture, maps, hw, point, path):
    """Attention from a point, with and without the iRPE term, over the picture."""
    x, y = point
    if not (0 <= x < picture.width and 0 <= y < picture.height):
        raise UserError(f"--attention {x:g} {y:g} lies outside a picture of {picture.width}×{picture.height} pixels")
    height, width = hw
    token = int(y / picture.height * height) * width + int(x / picture.width * width)
    figure, axes = _canvas(picture, 2)
    top = max(weights[token].max().item() for weights in maps)
    for ax, weights, title in zip(axes, maps, ("with iRPE", "without its term"), strict=True):
        ax.imshow(weights[token].view(height, width).numpy(force=True), alpha=0.6, vmin=0, vmax=top,
                  extent=(0, picture.width, picture.height, 0))
        ax.plot(x, y, "r+", markersize=12, markeredgewidth=2)
        ax.set_title(title)
    figure.savefig(path)


def _canvas(picture, panels):
    figure = Figure(figsize=(6 * panels, 6 * picture.height / picture.width + 0.4), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for ax in axes:
        ax.imshow(np.asarray(picture))
        ax.set_axis_off()
    return figure, axes


@torch.inference_mode()
def main(args, argv=None):
    if not args.resume or not args.output_dir:
        raise UserError("--resume FILE and --output_dir DIR are needed: the checkpoint, and where pictures go")
    stems = [Path(file).stem for file in args.image]
    if repeated := [stem for stem in stems if stems.count(stem) > 1]:
        raise UserError(f"two pictures of --image are named {repeated[0]}, and so would be their drawings: draw them "
                        "into different folders")
    device = runtime.init_distributed(args)
    runtime.prepare_output_dir(args.output_dir)
    args, model, postprocess, names = load_model(args, argv)
    model.to(device)
    for file in map(Path, args.image):
        picture = read_picture(file, f"picture {file}")
        samples = prepare(picture, args)[None].to(device)
        found = postprocess(model(samples), torch.tensor([[picture.height, picture.width]], device=device))[0]
        path = Path(args.output_dir, f"{file.stem}_detections.png")
        print_once(f"{path}: {draw_detections(picture, found, names, args.threshold, path)} objects")
        if args.attention:
            path = Path(args.output_dir, f"{file.stem}_attention.png")
            draw_attention(picture, *encoder_attention(model, samples, args.layer), args.attention, path)
            print_once(path)


if __name__ == "__main__":
    runtime.run(main, parser().parse_args())
