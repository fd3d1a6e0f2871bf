"""The recipe of DETR for images, boxes and masks, made of torchvision's transforms.

Each takes and returns (PIL image, target), where the target's `boxes` are tv_tensors.BoundingBoxes as corners and its
`masks`, if there are any, tv_tensors.Mask of uint8: torchvision resizes bool by way of float32.
"""

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from util.box_ops import box_xyxy_to_cxcywh
from util.images import MAX_ASPECT, resized

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Resize:
    """Make the short side ``short_side`` pixels, or fewer if the long one would exceed ``max_size``, but at least one.

    torchvision's own rule makes it 0 for long and narrow images.
    """

    def __init__(self, short_side, max_size=None):
        self.short_side, self.max_size = short_side, max_size

    def __call__(self, image, target):
        return v2.Resize(resized(image.height, image.width, self.short_side, self.max_size))(image, target)


class RandomSizeCrop:
    """Crop at a random place; height and width are drawn from [min_size, max_size] as far as the image allows."""

    def __init__(self, min_size, max_size):
        self.min_size, self.max_size = min_size, max_size

    def __call__(self, image, target):
        height, width = (
            self._draw(min(self.min_size, side), min(self.max_size, side)) for side in (image.height, image.width)
        )
        top, left = self._draw(0, image.height - height), self._draw(0, image.width - width)
        return crop(image, target, top, left, height, width)

    @staticmethod
    def _draw(low, high):
        return int(torch.randint(low, high + 1, ()))


def crop(image, target, top, left, height, width):
    """Cut out a region in pixels; boxes are clipped to it, and objects whose box has nothing left are dropped."""
    region = (top, left, height, width)
    cut = {name: v2.functional.crop(target[name], *region) for name in ("boxes", "masks") if name in target}
    left_over = (cut["boxes"][:, 2:] > cut["boxes"][:, :2]).all(1)
    kept = {name: tv_tensors.wrap(values[left_over], like=values) for name, values in cut.items()}
    return v2.functional.crop(image, *region), {**target, **kept, "labels": target["labels"][left_over]}


def finish_target(image, target):
    """Boxes: corners in pixels → plain tensor of (cx, cy, w, h) as shares of the image (C, H, W); masks → bool."""
    height, width = image.shape[-2:]
    boxes = target["boxes"].as_subclass(torch.Tensor) / torch.tensor([width, height, width, height])
    target = {**target, "boxes": box_xyxy_to_cxcywh(boxes), "size": torch.tensor([height, width])}
    if "masks" in target:
        target["masks"] = target["masks"].as_subclass(torch.Tensor).view(torch.bool)
    return image, target


def make_coco_transforms(split, short_side=800, augment=True):
    """Transforms from (PIL image, target) to (float tensor (3, H, W), target).

    Args:
        split: `train` or `val`.
        short_side: of the images in evaluation and the largest in training; 800 is the recipe, another value
            scales all of its sizes.
        augment: in training flip, crop and vary the size; otherwise as in evaluation.
    """

    def scaled(*sizes):
        return [max(1, round(size * short_side / 800)) for size in sizes]

    def resize(sizes, max_size=None):
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
    vary = resize(scaled(*range(480, 801, 32)), max_size)
    cut = v2.Compose([resize(scaled(400, 500, 600)), RandomSizeCrop(*scaled(384, 600)), vary])
    return v2.Compose([v2.RandomHorizontalFlip(), v2.RandomChoice([vary, cut]), *finish])
