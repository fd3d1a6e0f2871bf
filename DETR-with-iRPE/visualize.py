"""Draw what a checkpoint finds, and what its encoder attends to, on pictures.

    python visualize.py --resume FILE --image FILE ... --output_dir DIR [--threshold 0.7] [--attention X Y]

Boxes, with masks where the model has them, and panoptic maps. The model's flags come from the checkpoint where it has
them (those of training runs do), else from the command line.
"""

import argparse
import io
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import distance_transform_edt
from torchvision import tv_tensors
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from datasets.coco import read_picture
from datasets.transforms import make_coco_transforms
from main import check_args, get_args_parser
from models import build_model
from models.rpe_attention import RPEMultiheadAttention
from util import runtime
from util.checkpoint import count_classes, load_weights
from util.images import orientation, to_rgb
from util.runtime import UserError, print_once

try:
    from matplotlib import colormaps, patches
    from matplotlib.figure import Figure
except ModuleNotFoundError:
    sys.exit("error: pictures are drawn with matplotlib, which is not installed: pip install matplotlib")

MODEL_FLAGS = (
    "backbone",
    "dilation",
    "last_stride",
    "position_embedding",
    "enc_layers",
    "dec_layers",
    "dim_feedforward",
    "hidden_dim",
    "nheads",
    "num_queries",
    "pre_norm",
    "enc_rpe2d",
    "short_side",
    "masks",
    "dataset_file",
    "is_thing_map",
)


def parser(defaults=None):
    result = runtime.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[get_args_parser()],
        allow_abbrev=False,
    )
    result.set_defaults(**(defaults or {}))
    result.add_argument("--image", nargs="+", required=True, metavar="FILE")
    result.add_argument("--threshold", type=float, default=0.7, help="lowest score that is drawn")
    result.add_argument(
        "--attention",
        nargs=2,
        type=float,
        metavar=("X", "Y"),
        help="also draw the encoder's attention from this point of each picture, in pixels",
    )
    result.add_argument("--layer", type=int, default=-1, help="encoder layer of --attention; -1 is the last")
    return result


def load_model(args, argv):
    """All flags, and model, postprocessors and category names of `--resume`; flags that are given win over its own."""
    checkpoint = runtime.load_checkpoint(args.resume)
    stored = vars(checkpoint.get("args", argparse.Namespace()))
    args = parser({name: stored[name] for name in MODEL_FLAGS if name in stored}).parse_args(argv)
    args.num_classes = count_classes(runtime.model_weights(checkpoint, args.resume)) or args.num_classes
    args.eval = True
    check_args(args, needs_data=False)
    model, _, postprocessors = build_model(args)
    load_weights(model, checkpoint, args.resume)
    names = checkpoint.get("categories") or dict(enumerate(FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]))
    return args, model.eval(), postprocessors, names


def prepare(picture, args):
    """PIL picture → the tensor (3, H, W) that evaluation would see."""
    boxes = tv_tensors.BoundingBoxes(torch.empty(0, 4), format="XYXY", canvas_size=(picture.height, picture.width))
    return make_coco_transforms("val", args.short_side)(picture, {"boxes": boxes})[0]


def encoder_attention(model, samples, layer):
    """Attention of an encoder layer, mean over its heads: (h·w, h·w) with and without iRPE, and (h, w)."""
    layers, seen = getattr(model, "detr", model).transformer.encoder.layers, {}
    if not -len(layers) <= layer < len(layers):
        raise UserError(f"--layer {layer} is not among the encoder's {len(layers)} layers")
    attention = layers[layer].self_attn
    plain = RPEMultiheadAttention(attention.embed_dim, attention.num_heads, batch_first=True).eval().to(samples.device)
    plain.load_state_dict(attention.state_dict(), strict=False)
    hook = attention.register_forward_pre_hook(
        lambda module, inputs, named: seen.update(inputs=inputs[:4], **named), with_kwargs=True
    )
    model(samples)
    hook.remove()
    return [module(*seen["inputs"], hw=seen["hw"])[1][0] for module in (attention, plain)], seen["hw"]


def draw_detections(picture, found, names, threshold):
    """Boxes, masks if there are some, names and scores above the threshold: the figure, and how many there are."""
    figure, (axes,) = _canvas(picture, 1)
    kept = (found["scores"] >= threshold).nonzero()[:, 0].tolist()
    for i in kept:
        x1, y1, x2, y2 = found["boxes"][i].tolist()
        label = int(found["labels"][i])
        color = colormaps["tab10"](label % 10)
        axes.add_patch(patches.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color, linewidth=2))
        if "masks" in found:
            _tint(axes, found["masks"][i, 0].numpy(force=True), color)
        _write(axes, x1, y1, f"{names.get(label, label)} {found['scores'][i]:.2f}", color, verticalalignment="bottom")
    return figure, f"{len(kept)} objects"


def draw_panoptic(picture, found, names):
    """Every pixel in the colour of its segment, with names: the figure, and how many segments there are."""
    figure, (axes,) = _canvas(picture, 1)
    ids = np.asarray(Image.open(io.BytesIO(found["png_string"]))) @ np.array([1, 256, 256**2])
    for number, segment in enumerate(found["segments_info"]):
        mask, label, color = ids == segment["id"], segment["category_id"], colormaps["tab10"](number % 10)
        _tint(axes, mask, color)
        depth = distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]  # the name goes where it is farthest from others
        y, x = np.unravel_index(depth.argmax(), mask.shape)
        _write(axes, x, y, names.get(label, label), color, verticalalignment="center", horizontalalignment="center")
    return figure, f"{len(found['segments_info'])} segments"


def draw_attention(picture, maps, hw, point):
    """Attention from a point, with and without the iRPE term, over the picture: the figure, and what it is."""
    x, y = point
    if not (0 <= x < picture.width and 0 <= y < picture.height):
        raise UserError(f"--attention {x:g} {y:g} lies outside a picture of {picture.width}×{picture.height} pixels")
    height, width = hw
    token = int(y / picture.height * height) * width + int(x / picture.width * width)
    figure, axes = _canvas(picture, 2)
    top = max(weights[token].max().item() for weights in maps)
    for ax, weights, title in zip(axes, maps, ("with iRPE", "without its term"), strict=True):
        ax.imshow(
            weights[token].view(height, width).numpy(force=True),
            alpha=0.6,
            vmin=0,
            vmax=top,
            extent=(0, picture.width, picture.height, 0),
        )
        ax.plot(x, y, "r+", markersize=12, markeredgewidth=2)
        ax.set_title(title)
    return figure, f"from pixel {x:g}, {y:g}"


def _canvas(picture, panels):
    figure = Figure(figsize=(6 * panels, 6 * picture.height / picture.width + 0.4), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for ax in axes:
        ax.imshow(picture)
        ax.set_axis_off()
    return figure, axes


def _tint(axes, mask, color):
    axes.imshow(np.where(mask[..., None], (*color[:3], 0.5), 0))


def _write(axes, x, y, text, color, **alignment):
    axes.text(
        x,
        y,
        text,
        color="white",
        fontsize=8,
        parse_math=False,
        **alignment,
        bbox={"facecolor": color, "edgecolor": "none", "pad": 1},
    )


def drawings(model, picture, postprocessors, names, args, device):
    """What the model and the flags ask to be drawn of a picture: its kind, the figure, and a word about it."""
    samples = prepare(picture, args)[None].to(device)
    outputs = model(samples)
    processed, original = (torch.tensor([size], device=device) for size in (samples.shape[-2:], picture.size[::-1]))
    found = postprocessors["bbox"](outputs, original)
    if "segm" in postprocessors:
        found = postprocessors["segm"](found, outputs, original, processed)
    yield "detections", *draw_detections(picture, found[0], names, args.threshold)
    if "panoptic" in postprocessors:
        postprocessors["panoptic"].threshold = args.threshold
        yield "panoptic", *draw_panoptic(picture, postprocessors["panoptic"](outputs, processed, original)[0], names)
    if args.attention:
        yield "attention", *draw_attention(picture, *encoder_attention(model, samples, args.layer), args.attention)


@torch.inference_mode()
def main(args, argv=None):
    if not args.resume or not args.output_dir:
        raise UserError("--resume FILE and --output_dir DIR are needed: the checkpoint, and where pictures go")
    stems = [Path(file).stem for file in args.image]
    if repeated := [stem for stem in stems if stems.count(stem) > 1]:
        raise UserError(
            f"two pictures of --image are named {repeated[0]}, and so would be their drawings: draw them "
            "into different folders"
        )
    device = runtime.find_device(args.device, args.world_size)
    runtime.prepare_output_dir(args.output_dir)
    args, model, postprocessors, names = load_model(args, argv)
    model.to(device)
    for stem, file in zip(stems, args.image, strict=True):
        picture, turned = read_picture(Path(file), f"image {file}", lambda image: (to_rgb(image), orientation(image)))
        if turned != 1:
            print_once(
                f"note: image {file} has the EXIF orientation {turned} and is drawn as it is stored: rotate the "
                "file if that is wrong"
            )
        for kind, figure, words in drawings(model, picture, postprocessors, names, args, device):
            path = Path(args.output_dir, f"{stem}_{kind}.png")
            figure.savefig(path)
            print_once(f"{path}: {words}")


if __name__ == "__main__":
    runtime.run(main, parser().parse_args())
