"""DETR's transforms of images, boxes and masks, built from torchvision's transforms.

Each transform takes and returns (PIL image, target). The target's `boxes` are `tv_tensors.BoundingBoxes` with corners
in pixels. Its `masks`, if it has any, are a `tv_tensors.Mask` of uint8: torchvision would resize bool masks as float32.
"""

from typing import Any

import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from util.box_ops import box_xyxy_to_cxcywh
from util.images import MAX_ASPECT, resized_size

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Resize:
    """Scale the short side to `short_side` pixels, or to less if the long side would exceed `max_size`.

    Unlike torchvision's `Resize`, it never makes a side of a long and narrow image 0 pixels long.
    """

    def __init__(self, short_side: int, max_size: int | None = None) -> None:
        self.short_side = short_side
        self.max_size = max_size

    def __call__(self, image: Image.Image, target: dict) -> tuple[Image.Image, dict]:
        return v2.Resize(resized_size(image.height, image.width, self.short_side, self.max_size))(image, target)


class RandomSizeCrop:
    """Crop a random region. Its sides are between `min_size` and `max_size` pixels, as far as the image allows."""

    def __init__(self, min_size: int, max_size: int) -> None:
        self.min_size = min_size
        self.max_size = max_size

    def __call__(self, image: Image.Image, target: dict) -> tuple[Image.Image, dict]:
        height = self._draw_side(image.height)
        width = self._draw_side(image.width)
        top = _draw(0, image.height - height)
        left = _draw(0, image.width - width)
        return crop(image, target, top, left, height, width)

    def _draw_side(self, side: int) -> int:
        """The side of the region, for an image with this side."""
        return _draw(min(self.min_size, side), min(self.max_size, side))


def _draw(low: int, high: int) -> int:
    """A random integer from `low` to `high`, both included."""
    return int(torch.randint(low, high + 1, ()))


def crop(image: Image.Image, target: dict, top: int, left: int, height: int, width: int) -> tuple[Image.Image, dict]:
    """Crop a region in pixels. Boxes are clipped to it, and objects whose box has no area there are removed."""
    region = (top, left, height, width)
    cut = {name: v2.functional.crop(target[name], *region) for name in ("boxes", "masks") if name in target}
    left_over = (cut["boxes"][:, 2:] > cut["boxes"][:, :2]).all(1)
    kept = {name: tv_tensors.wrap(values[left_over], like=values) for name, values in cut.items()}
    return v2.functional.crop(image, *region), {**target, **kept, "labels": target["labels"][left_over]}


def finish_target(image: torch.Tensor, target: dict) -> tuple[torch.Tensor, dict]:
    """Convert the target to what the model needs, for an image (C, H, W).

    Boxes become a plain tensor of (cx, cy, w, h) relative to the image's size, masks a plain bool tensor. `size` is the
    height and width of the image.
    """
    height, width = image.shape[-2:]
    boxes = target["boxes"].as_subclass(torch.Tensor) / torch.tensor([width, height, width, height])
    target = {**target, "boxes": box_xyxy_to_cxcywh(boxes), "size": torch.tensor([height, width])}
    if "masks" in target:
        target["masks"] = target["masks"].as_subclass(torch.Tensor).view(torch.bool)
    return image, target


def make_coco_transforms(split: str, short_side: int = 800, augment: bool = True) -> Any:
    """The transforms of a split, from (PIL image, target) to (float tensor (3, H, W), target).

    Args:
        split: `train` or `val`.
        short_side: short side of the images in evaluation, and the largest in training, in pixels. DETR's is 800;
            another value scales all sizes of the recipe.
        augment: flip, crop and resize training images at random; otherwise they are processed as in evaluation.
    """

    def scaled(*sizes: int) -> list[int]:
        return [max(1, round(size * short_side / 800)) for size in sizes]

    def resize(sizes: list[int], max_size: int | None = None) -> v2.Transform:
        """Resize to a random one of the sizes."""
        return v2.RandomChoice([Resize(size, max_size or MAX_ASPECT * size) for size in sizes])

    (max_size,) = scaled(1333)
    finish = [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        finish_target,
    ]
    if split == "val" or not augment:
        return v2.Compose([resize([short_side], max_size), *finish])
    random_resize = resize(scaled(*range(480, 801, 32)), max_size)
    random_crop = v2.Compose([resize(scaled(400, 500, 600)), RandomSizeCrop(*scaled(384, 600)), random_resize])
    return v2.Compose([v2.RandomHorizontalFlip(), v2.RandomChoice([random_resize, random_crop]), *finish])
