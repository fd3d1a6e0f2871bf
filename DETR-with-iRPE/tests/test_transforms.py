"""Transforms move boxes as they move masks that are drawn for comparison."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from conftest import random_boxes
from datasets.transforms import RandomSizeCrop, crop, make_coco_transforms
from util.box_ops import box_cxcywh_to_xyxy


def sample(seed, integral=False):
    """A random image, its target, and for each box a PIL mask that is white inside the box."""
    random = np.random.RandomState(seed)
    width, height = (int(side) for side in random.randint(80, 300, 2))
    boxes = random_boxes(random, 4, width, height)
    boxes[:, 2:] += boxes[:, :2]
    boxes = boxes.round() if integral else boxes
    masks = np.zeros((4, height, width), dtype=np.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.round().astype(int), strict=True):
        mask[y1:y2, x1:x2] = 255
    target = {
        "boxes": tv_tensors.BoundingBoxes(
            torch.tensor(boxes, dtype=torch.float32), format="XYXY", canvas_size=(height, width)
        ),
        "labels": torch.arange(4),
        "masks": tv_tensors.Mask(torch.from_numpy(masks // 255)),
    }
    image = Image.fromarray(random.randint(0, 255, (height, width, 3)).astype(np.uint8))
    return image, target, [Image.fromarray(mask) for mask in masks]


def extent(mask):
    """(x1, y1, x2, y2) of the white pixels of a PIL mask; None without white pixels."""
    rows, columns = (np.flatnonzero((np.asarray(mask) > 127).any(axis)) for axis in (1, 0))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1] if len(rows) else None


@pytest.mark.parametrize("seed", range(8))
def test_two_flips_restore_image_and_boxes(seed):
    image, target, _ = sample(seed)
    flip = v2.RandomHorizontalFlip(p=1)
    once = flip(image, target)
    assert not torch.equal(once[1]["boxes"], target["boxes"])
    again, boxes = flip(*once)
    torch.testing.assert_close(boxes["boxes"], target["boxes"], rtol=0, atol=1e-4)
    assert np.array_equal(np.asarray(again), np.asarray(image))


@pytest.mark.parametrize("seed", range(8))
def test_flipped_boxes_enclose_the_flipped_masks(seed):
    image, target, masks = sample(seed, integral=True)
    found = v2.RandomHorizontalFlip(p=1)(image, target)[1]
    flipped = [v2.functional.horizontal_flip(mask) for mask in masks]
    assert found["boxes"].tolist() == [extent(mask) for mask in flipped]
    assert np.array_equal(found["masks"] * 255, np.stack(flipped))


@pytest.mark.parametrize("seed", range(20))
def test_cropped_boxes_and_labels_fit_the_cropped_masks(seed):
    image, target, masks = sample(seed, integral=True)
    random = np.random.RandomState(seed + 100)
    top, left = random.randint(0, image.height // 2), random.randint(0, image.width // 2)
    region = (top, left, random.randint(10, image.height - top), random.randint(10, image.width - left))
    cut, found = crop(image, target, *region)
    masks = [v2.functional.crop(mask, *region) for mask in masks]
    expected = {i: extent(mask) for i, mask in enumerate(masks) if extent(mask)}
    assert found["labels"].tolist() == list(expected)
    assert found["boxes"].tolist() == list(expected.values())
    assert np.array_equal(
        found["masks"] * 255, np.array([np.asarray(masks[i]) for i in expected]).reshape(-1, *region[2:])
    )
    assert (cut.height, cut.width) == region[2:] == found["boxes"].canvas_size


@pytest.mark.parametrize("seed", range(8))
def test_resized_boxes_enclose_the_resized_masks(seed):
    image, target, masks = sample(seed, integral=True)
    resized, found = v2.Resize(217, max_size=333)(image, target)
    assert found["boxes"].canvas_size == (resized.height, resized.width)
    for box, small, mask in zip(found["boxes"], found["masks"], masks, strict=True):
        expected = v2.functional.resize(mask, [resized.height, resized.width])
        np.testing.assert_allclose(box, extent(expected), atol=1.0)
        assert (small.numpy() != (np.asarray(expected) > 127)).mean() < 0.02 and set(small.unique().tolist()) <= {0, 1}


@pytest.mark.parametrize("seed", range(12))
def test_boxes_enclose_their_masks_after_the_whole_recipe(seed):
    image, target, _ = sample(seed, integral=True)
    torch.manual_seed(seed)
    transformed, found = make_coco_transforms("train", 200)(image, target)
    height, width = transformed.shape[1:]
    assert found["masks"].dtype == torch.bool and found["masks"].shape == (len(found["labels"]), height, width)
    boxes = box_cxcywh_to_xyxy(found["boxes"]) * torch.tensor([width, height, width, height])
    for box, mask in zip(boxes, found["masks"], strict=True):
        np.testing.assert_allclose(box, extent(mask * 255), atol=4.0)


def test_random_crops_stay_inside_the_image_and_within_their_limits():
    seen = set()
    for seed in range(60):
        image, target, _ = sample(seed % 5)
        cut, found = RandomSizeCrop(100, 150)(image, target)
        for side, whole in ((cut.height, image.height), (cut.width, image.width)):
            assert min(100, whole) <= side <= min(150, whole)
        boxes = found["boxes"]
        assert len(boxes) == len(found["labels"])
        assert (boxes >= 0).all() and (boxes[:, 2:] > boxes[:, :2]).all()
        assert (boxes[:, 2:] <= torch.tensor([cut.width, cut.height])).all()
        seen.add(cut.size)
    assert len(seen) > 20


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [(640, 480, (800, 1066)), (500, 375, (800, 1066)), (640, 213, (443, 1333)), (300, 300, (800, 800))],
)
def test_evaluation_resizes_the_short_side_to_800_and_the_long_side_to_at_most_1333(width, height, expected):
    target = {
        "boxes": tv_tensors.BoundingBoxes([[10.0, 20.0, 110.0, 70.0]], format="XYXY", canvas_size=(height, width)),
        "labels": torch.tensor([1]),
    }
    image, found = make_coco_transforms("val")(Image.new("RGB", (width, height), (124, 116, 104)), target)
    assert image.shape[1] == pytest.approx(expected[0], abs=1) and image.shape[2] == expected[1]
    assert image.abs().max() < 0.02  # normalisation maps ImageNet's mean colour to about zero
    scale = torch.tensor([width, height, width, height])
    torch.testing.assert_close(box_cxcywh_to_xyxy(found["boxes"]) * scale, torch.tensor([[10.0, 20, 110, 70]]))


def test_training_varies_the_size_as_in_the_recipe():
    torch.manual_seed(0)
    whole, cut = set(), 0
    for _ in range(60):
        target = {
            "boxes": tv_tensors.BoundingBoxes(torch.empty(0, 4), format="XYXY", canvas_size=(480, 640)),
            "labels": torch.empty(0, dtype=torch.long),
        }
        image, _ = make_coco_transforms("train")(Image.new("RGB", (640, 480)), target)
        height, width = image.shape[1:]
        assert max(height, width) <= 1333
        if (height, width) in {(side, side * 640 // 480) for side in range(480, 801, 32)}:
            whole.add(height)
        else:
            cut += 1
            assert min(height, width) in range(480, 801, 32) or max(height, width) == 1333
    assert len(whole) > 5 and 15 < cut < 45


def test_a_smaller_short_side_scales_the_whole_recipe():
    torch.manual_seed(0)
    heights = set()
    for _ in range(40):
        target = {
            "boxes": tv_tensors.BoundingBoxes(torch.empty(0, 4), format="XYXY", canvas_size=(90, 90)),
            "labels": torch.empty(0, dtype=torch.long),
        }
        heights.add(min(make_coco_transforms("train", 80)(Image.new("RGB", (90, 90)), target)[0].shape[1:]))
    assert heights <= {round(side / 10) for side in range(480, 801, 32)} and len(heights) > 5
