"""Draw the detections of a checkpoint, and the attention of its encoder, on images.

    python visualize.py --resume FILE --image FILE ... --output_dir DIR [--threshold 0.7] [--attention X Y]

Detections are boxes, with masks and panoptic maps if the model predicts them. The model's flags are read from the
checkpoint, where training stores them; the command line provides those that it lacks.
"""

import argparse
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import distance_transform_edt
from torch import nn
from torchvision import tv_tensors
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from datasets.coco import read_image
from datasets.coco_panoptic import to_ids
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
    sys.exit("error: visualize.py needs matplotlib, which is not installed: pip install matplotlib")

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


def parser(defaults: Mapping[str, Any] | None = None) -> argparse.ArgumentParser:
    """The parser of the command line; `defaults` replace the defaults of flags."""
    result = runtime.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[get_args_parser()],
        allow_abbrev=False,
    )
    result.set_defaults(**(defaults or {}))
    result.add_argument("--image", nargs="+", required=True, metavar="FILE", help="images to draw on")
    result.add_argument("--threshold", type=float, default=0.7, help="least score of the detections to draw")
    result.add_argument(
        "--attention",
        nargs=2,
        type=float,
        metavar=("X", "Y"),
        help="also draw the encoder's attention from this point of each image, in pixels",
    )
    result.add_argument("--layer", type=int, default=-1, help="encoder layer of --attention; -1 is the last")
    return result


def load_model(
    args: argparse.Namespace, argv: Sequence[str] | None
) -> tuple[argparse.Namespace, nn.Module, dict[str, nn.Module], dict[int, str]]:
    """Load the model of `--resume`. Flags of the command line override those of the checkpoint.

    Args:
        args: the parsed command line.
        argv: the same before parsing; None for that of the process.
    Returns: all flags, the model, its postprocessors by name, and the names of the categories by id.
    """
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


def prepare(image: Image.Image, args: argparse.Namespace) -> torch.Tensor:
    """Transform an image to the model's input (3, H, W), as in evaluation."""
    boxes = tv_tensors.BoundingBoxes(torch.empty(0, 4), format="XYXY", canvas_size=(image.height, image.width))
    return make_coco_transforms("val", args.short_side)(image, {"boxes": boxes})[0]


def encoder_attention(
    model: nn.Module, samples: torch.Tensor, layer: int
) -> tuple[list[torch.Tensor], tuple[int, int]]:
    """Compute the attention weights of an encoder layer, averaged over its heads.

    Args:
        model: `DETR` or `DETRsegm`.
        samples: a batch of one image (1, 3, H, W).
        layer: index of the layer; negative indices count from the last.
    Returns: the weights (h·w, h·w) with and without the iRPE terms, and (h, w), the size of the map.
    Raises: UserError if there is no such layer.
    """
    layers = getattr(model, "detr", model).transformer.encoder.layers
    if not -len(layers) <= layer < len(layers):
        raise UserError(f"--layer {layer} is not among the encoder's {len(layers)} layers")
    attention = layers[layer].self_attn
    plain = RPEMultiheadAttention(attention.embed_dim, attention.num_heads, batch_first=True).eval().to(samples.device)
    plain.load_state_dict(attention.state_dict(), strict=False)
    calls = []  # positional and keyword arguments of the attention
    hook = attention.register_forward_pre_hook(
        lambda module, inputs, named: calls.append((inputs, named)), with_kwargs=True
    )
    model(samples)
    hook.remove()
    inputs, named = calls[0]
    weights = [module(*inputs, **{**named, "need_weights": True})[1][0] for module in (attention, plain)]
    return weights, named["hw"]


def draw_detections(
    image: Image.Image, found: dict[str, torch.Tensor], names: Mapping[int, str], threshold: float
) -> tuple[Figure, str]:
    """Draw the boxes, masks, category names and scores of detections.

    Args:
        image: the original image.
        found: its detections, as `PostProcess` and `PostProcessSegm` return them.
        names: category id → name.
        threshold: least score of the detections to draw.
    Returns: the figure, and the number of detections in words.
    """
    figure, (axes,) = _canvas(image, 1)
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


def draw_panoptic(image: Image.Image, found: dict[str, Any], names: Mapping[int, str]) -> tuple[Figure, str]:
    """Draw a panoptic map: the pixels of each segment in its colour, and the names of the categories.

    Args:
        image: the original image.
        found: its result of `PostProcessPanoptic`.
        names: category id → name.
    Returns: the figure, and the number of segments in words.
    """
    figure, (axes,) = _canvas(image, 1)
    ids = to_ids(Image.open(io.BytesIO(found["png_string"])))
    for number, segment in enumerate(found["segments_info"]):
        mask, label, color = ids == segment["id"], segment["category_id"], colormaps["tab10"](number % 10)
        _tint(axes, mask, color)
        # The name is centred on the pixel that is farthest from other segments and from the borders of the image.
        depth = distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
        y, x = np.unravel_index(depth.argmax(), mask.shape)
        _write(axes, x, y, names.get(label, label), color, verticalalignment="center", horizontalalignment="center")
    return figure, f"{len(found['segments_info'])} segments"


def draw_attention(
    image: Image.Image, maps: Sequence[torch.Tensor], hw: tuple[int, int], point: tuple[float, float]
) -> tuple[Figure, str]:
    """Draw the attention from a point with and without the iRPE terms, over the image.

    Args:
        image: the original image.
        maps, hw: the result of `encoder_attention`.
        point: x and y in pixels of the image.
    Returns: the figure, and the point in words.
    Raises: UserError for a point outside of the image.
    """
    x, y = point
    if not (0 <= x < image.width and 0 <= y < image.height):
        raise UserError(f"--attention {x:g} {y:g} lies outside an image of {image.width}×{image.height} pixels")
    height, width = hw
    token = int(y / image.height * height) * width + int(x / image.width * width)
    figure, axes = _canvas(image, 2)
    top = max(weights[token].max().item() for weights in maps)
    for ax, weights, title in zip(axes, maps, ("with iRPE", "without the iRPE terms"), strict=True):
        ax.imshow(
            weights[token].view(height, width).numpy(force=True),
            alpha=0.6,
            vmin=0,
            vmax=top,
            extent=(0, image.width, image.height, 0),
        )
        ax.plot(x, y, "r+", markersize=12, markeredgewidth=2)
        ax.set_title(title)
    return figure, f"from pixel {x:g}, {y:g}"


def _canvas(image: Image.Image, panels: int) -> tuple[Figure, Sequence[Any]]:
    """A figure with the image in each of its panels, and the axes of the panels."""
    figure = Figure(figsize=(6 * panels, 6 * image.height / image.width + 0.4), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for ax in axes:
        ax.imshow(image)
        ax.set_axis_off()
    return figure, axes


def _tint(axes: Any, mask: np.ndarray, color: tuple[float, ...]) -> None:
    """Colour the pixels of a mask (H, W), half transparent."""
    axes.imshow(np.where(mask[..., None], (*color[:3], 0.5), 0))


def _write(axes: Any, x: float, y: float, text: str, color: tuple[float, ...], **alignment: str) -> None:
    """Write a text on a background of the colour."""
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


def drawings(
    model: nn.Module,
    image: Image.Image,
    postprocessors: Mapping[str, nn.Module],
    names: Mapping[int, str],
    args: argparse.Namespace,
    device: torch.device,
) -> Iterator[tuple[str, Figure, str]]:
    """Run the model on an image, and draw what the model predicts and the flags ask for.

    Yields: the kind of the figure (`detections`, `panoptic` or `attention`), the figure, and a description.
    """
    samples = prepare(image, args)[None].to(device)
    outputs = model(samples)
    processed = torch.tensor([samples.shape[-2:]], device=device)
    original = torch.tensor([(image.height, image.width)], device=device)
    found = postprocessors["bbox"](outputs, original)
    if "segm" in postprocessors:
        found = postprocessors["segm"](found, outputs, original, processed)
    yield "detections", *draw_detections(image, found[0], names, args.threshold)
    if "panoptic" in postprocessors:
        postprocessors["panoptic"].threshold = args.threshold
        panoptic = postprocessors["panoptic"](outputs, processed, original)
        yield "panoptic", *draw_panoptic(image, panoptic[0], names)
    if args.attention:
        maps, hw = encoder_attention(model, samples, args.layer)
        yield "attention", *draw_attention(image, maps, hw, args.attention)


@torch.inference_mode()
def main(args: argparse.Namespace, argv: Sequence[str] | None = None) -> None:
    """Draw on all images of the command line, into `--output_dir`; `argv` as for `load_model`."""
    if not args.resume or not args.output_dir:
        raise UserError(
            "--resume FILE and --output_dir DIR are needed: the checkpoint, and the folder for the drawings"
        )
    stems = [Path(file).stem for file in args.image]
    if repeated := [stem for stem in stems if stems.count(stem) > 1]:
        raise UserError(
            f"two files of --image are named {repeated[0]}, so their drawings would overwrite each other: draw "
            "them with different --output_dir"
        )
    device = runtime.find_device(args.device, args.world_size)
    runtime.prepare_output_dir(args.output_dir)
    args, model, postprocessors, names = load_model(args, argv)
    model.to(device)
    for stem, file in zip(stems, args.image, strict=True):
        image, exif = read_image(Path(file), file, lambda image: (to_rgb(image), orientation(image)))
        if exif != 1:
            print_once(
                f"note: image {file} has the EXIF orientation {exif} and is drawn as it is stored: rotate the "
                "file if that is wrong"
            )
        for kind, figure, words in drawings(model, image, postprocessors, names, args, device):
            path = Path(args.output_dir, f"{stem}_{kind}.png")
            figure.savefig(path)
            print_once(f"{path}: {words}")


if __name__ == "__main__":
    runtime.run(main, parser().parse_args())
